"""Putting a plan on a diffusers pipeline, and taking it off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zoo.heads.sparse_vdit.context import FAMILIES, ON_MISMATCH, Family, RootHook, Step, class_name, family_of
from zoo.heads.sparse_vdit.plan import Grid, SparsePlan
from zoo.kernels._dispatch import BACKENDS


class PlanHandle:
    """A plan at work on one transformer.

    Attributes:
        plan: The plan.
        model: The transformer.
    """

    def __init__(self, plan: SparsePlan, model: nn.Module, hook: RootHook) -> None:
        self.plan, self.model, self.hook = plan, model, hook
        self._stock = [module.processor for module in hook.modules]
        for module, processor in zip(hook.modules, hook.processors, strict=True):
            _set_processor(module, processor)
        self._removable = model.register_forward_pre_hook(hook, with_kwargs=True)

    def prepare(self, grid: Grid, text_length: int = 0) -> None:
        """Build the tables of a token grid ahead of the first call.

        Needed only before `torch.compile(model, fullgraph=True)` meets a grid that the plan was not searched on:
        otherwise the first call builds them.
        """
        self.hook.prepare(tuple(grid), text_length, str(_device(self.model)))

    def remove(self) -> None:
        """Restore the model. Processors that were replaced in the meantime stay; calling it again does nothing."""
        self._removable.remove()
        for module, ours, stock in zip(self.hook.modules, self.hook.processors, self._stock, strict=True):
            if module.processor is ours:
                # Whatever was set on ours meanwhile (`set_attention_backend`) was meant for the model.
                for name in ("_attention_backend", "_parallel_config"):
                    if hasattr(stock, name):
                        setattr(stock, name, getattr(ours, name))
                _set_processor(module, stock)

    def __enter__(self) -> PlanHandle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


class PlanHandles:
    """Plans at work on several transformers of one pipeline, by component."""

    def __init__(self, handles: dict[str, PlanHandle]) -> None:
        self.handles = handles

    def __getitem__(self, component: str) -> PlanHandle:
        return self.handles[component]

    def remove(self) -> None:
        """Restore all models."""
        for handle in self.handles.values():
            handle.remove()

    def __enter__(self) -> PlanHandles:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def apply_plan(
    pipe: Any,
    plan: SparsePlan | Mapping[str, SparsePlan],
    *,
    backend: str = "auto",
    qk_dtype: torch.dtype | None = None,
    on_mismatch: str = "dense",
    component: str = "transformer",
) -> PlanHandle | PlanHandles:
    """Let the self-attention of a video transformer follow a plan.

    The model keeps its weights, its class and its state dict. Caches, offloading, adapters, `set_attention_backend`
    (for dense layers) and compilation of blocks work as before. Apply a plan after `fuse_qkv_projections` of CogVideoX,
    which replaces all processors, and before `torch.compile` of the whole model. Under diffusers' Ulysses parallelism
    (Wan and LTX-Video) each device attends with the patterns of its own heads; other ways of splitting run dense,
    with one warning.

    Args:
        pipe: A pipeline, or its transformer: CogVideoX 1.0 and 1.5, HunyuanVideo, LTX-Video, Mochi, Wan 2.1 and 2.2.
        plan: The plan, or plans by component: `{"transformer": ..., "transformer_2": ...}` for the two experts of
            Wan 2.2.
        backend: Of `zoo.kernels.tile_sparse.tile_sparse_attention`: `auto`, `triton` or `reference`.
        qk_dtype: torch.float8_e4m3fn: queries and keys of sparse layers are multiplied in FP8, for inference on GPUs
            that have it; plans are searched without.
        on_mismatch: What to do at another token grid than the searched one if the plan has stripes of blocks, which
            are bound to it: `dense` (with one warning), `error`, or `nearest`, the same relative places. Plans without
            blocks fit every grid.
        component: The transformer's name in the pipeline.

    Returns:
        A handle with `remove()`, which is also a context manager; for several plans, a handle of all.

    Raises:
        NotImplementedError: A class of transformer that is not supported.
        ValueError: The plan belongs to another model, or the model's processors are not the stock ones.
    """
    if on_mismatch not in ON_MISMATCH:
        raise ValueError(f"on_mismatch must be one of {ON_MISMATCH}, got {on_mismatch!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    if isinstance(plan, Mapping):
        with contextlib.ExitStack() as applied:
            handles = {
                name: applied.enter_context(
                    apply_plan(pipe, each, backend=backend, qk_dtype=qk_dtype, on_mismatch=on_mismatch, component=name)
                )
                for name, each in plan.items()
            }
            applied.pop_all()
        return PlanHandles(handles)
    model = transformer_of(pipe, component)
    family = family_of(model)
    _check_model(model, family, plan)
    return _install(model, plan, Step(backend, qk_dtype), on_mismatch)


@contextlib.contextmanager
def use(pipe: Any, plan: SparsePlan | Mapping[str, SparsePlan], **settings: Any) -> Iterator[PlanHandle | PlanHandles]:
    """`apply_plan` for the length of a `with` block."""
    handle = apply_plan(pipe, plan, **settings)
    try:
        yield handle
    finally:
        handle.remove()


def transformer_of(pipe: Any, component: str = "transformer") -> nn.Module:
    """The transformer of a pipeline, without the wrapper of `torch.compile`.

    Raises:
        ValueError: The pipeline has none of this name.
    """
    model = pipe if isinstance(pipe, nn.Module) else getattr(pipe, component, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no component {component!r}.")
    return getattr(model, "_orig_mod", model)


def describe_model(pipe: Any, component: str = "transformer") -> dict[str, Any]:
    """The `model` field of a plan for a transformer: class, planned layers, heads and head dimension.

    Raises:
        NotImplementedError: A class of transformer that is not supported.
    """
    model = transformer_of(pipe, component)
    family = family_of(model)
    layers = layer_names(model, family)
    return {
        "class": class_name(model),
        "layers": layers,
        "heads": model.get_submodule(layers[0]).heads,
        "head_dim": _head_dim(model.get_submodule(layers[0])),
    }


def layer_names(model: nn.Module, family: Family) -> list[str]:
    """Module names of the attentions that a plan may cover, in the order of the forward pass."""
    return [
        f"{blocks}.{i}.{attention}"
        for blocks, attention in family.layers.items()
        for i in range(len(model.get_submodule(blocks)))
    ]


def _head_dim(attention: nn.Module) -> int:
    # The output projection of the last single-stream blocks is missing; the key's never is.
    return attention.to_k.out_features // attention.heads


def _check_model(model: nn.Module, family: Family, plan: SparsePlan) -> None:
    """Refuse a plan of another model."""
    actual, wanted = describe_model(model), plan.model
    for key, what in (("class", "the class"), ("heads", "the number of heads"), ("head_dim", "the head dimension")):
        if actual[key] != wanted[key]:
            raise ValueError(f"The plan is for another model: {what} is {wanted[key]} there and {actual[key]} here.")
    missing = [name for name in wanted["layers"] if name not in actual["layers"]]
    if missing:
        raise ValueError(f"The plan is for another model: this one has no layer {', '.join(map(repr, missing[:3]))}.")
    if plan.text_position != family.text_position:
        raise ValueError(
            f"The plan says text_position={plan.text_position!r}; in {actual['class']} it is {family.text_position!r}."
        )


def _install(model: nn.Module, plan: SparsePlan, step: Step, on_mismatch: str = "dense") -> PlanHandle:
    """Put processors and hook in place."""
    from zoo.heads.sparse_vdit import processors

    processors.register_with_skip_guiders()
    cls = getattr(processors, family_of(model).processor)
    modules = [model.get_submodule(name) for name in plan.layers]
    for name, module in zip(plan.layers, modules, strict=True):
        _check_processor(name, module.processor, cls)
    ours = [cls(n, step) for n in range(len(modules))]
    for module, processor in zip(modules, ours, strict=True):
        for name in ("_attention_backend", "_parallel_config"):
            setattr(processor, name, getattr(module.processor, name, None))
    hook = RootHook(model, plan, modules, ours, step, on_mismatch)
    if plan.calibrated.get("grid"):
        hook.prepare(*plan._where(None, None), str(_device(model)))
    return PlanHandle(plan, model, hook)


def _check_processor(name: str, current: Any, ours: type) -> None:
    """Only stock processors are replaced; the last base of ours is the stock one."""
    from zoo.heads.sparse_vdit.processors import SparseProcessor

    if isinstance(current, SparseProcessor):
        raise ValueError("A plan is at work on this model already: remove it first.")
    stock = ours.__bases__[-1].__name__
    if type(current).__name__ not in (stock, f"Fused{stock}"):
        raise ValueError(f"'{name}' has the processor {type(current).__name__}; a plan can only replace {stock}.")


def _set_processor(module: nn.Module, processor: Any) -> None:
    # Mochi's attention has no set_processor. The attribute is all that set_processor sets for plain objects.
    module.processor = processor


def _device(model: nn.Module) -> torch.device:
    device = next(model.parameters()).device
    # Weights that wait elsewhere (sequential offloading) are on no device that could hold tables.
    return torch.device("cpu") if device.type == "meta" else device


__all__ = ["FAMILIES", "PlanHandle", "PlanHandles", "apply_plan", "describe_model", "transformer_of", "use"]
