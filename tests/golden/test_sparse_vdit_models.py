"""Models of diffusers with a sparse plan equal an independent definition: outputs, and searches on a whole model."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from zoo.heads import sparse_vdit

from . import fill
from .cases import Case, find


class VideoCase(Case):
    """A case of this family has no kind of its own: the names of its outputs tell what it is about."""

    def __init__(self, path) -> None:
        import json

        from safetensors.torch import load_file

        self.spec = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self.name, self.model, self.kwargs = self.spec["case"], self.spec["model"], self.spec["kwargs"]
        self.compared: set[str] = set()
        self.kind = self._kind()

    def _kind(self) -> str:
        if hasattr(diffusers, self.model):
            return "model" if "plan" in self.kwargs else "modelsearch" if "candidates" in self.kwargs else "unknown"
        return {"sparse_vdit.search": "search"}.get(self.model, self.model)

    def check(self, name: str, actual: Tensor) -> None:
        expected = self.expected[name]
        rtol, atol = self.spec["rtol"], self.spec["atol"]
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}"
        torch.testing.assert_close(
            actual.to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
        )
        self.compared.add(name)

    def build(self) -> torch.nn.Module:
        model = getattr(diffusers, self.model)(**self.kwargs["config"]).eval()
        model.load_state_dict(fill.state_dict(self.spec["params"]))
        assert sum(p.numel() for p in model.parameters()) == self.spec["num_params"]
        return model

    def arguments(self, inputs: dict, prefix: str) -> dict:
        return {name: read_input(f"{prefix}.{name}", spec) for name, spec in inputs.items()}


def read_input(name: str, spec: dict):
    kind = spec["kind"]
    if kind == "image":
        return fill.image(name, spec["shape"])
    if kind == "value":
        return torch.tensor(spec["value"], dtype=getattr(torch, spec["dtype"]))
    if kind == "lengths":
        return (torch.arange(spec["T"]) < torch.tensor(spec["valid"])[:, None]).to(getattr(torch, spec["dtype"]))
    if kind == "rotary":
        return get_3d_rotary_pos_embed(**spec["kwargs"])
    if kind == "python":
        return spec["value"]
    raise ValueError(f"unknown kind {kind!r} of input {name!r}")


def plan_of(model: torch.nn.Module, kwargs: dict, granularity: str = "block") -> sparse_vdit.SparsePlan:
    described = sparse_vdit.describe_model(model)
    assert described["layers"] == kwargs["layers"]
    patterns = [p for by_layer in kwargs["plan"] for p in by_layer]
    heads = described["heads"]
    assign = [[list(range(n * heads, (n + 1) * heads)) for n in range(len(kwargs["plan"]))]]
    return sparse_vdit.SparsePlan(
        described, kwargs["text_position"], kwargs["tile"], granularity, [0, 1], patterns, assign
    )


def run_model(case: VideoCase) -> None:
    model, inputs = case.build(), case.arguments(case.spec["inputs"], case.name)

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    dense = run()
    case.check("dense", dense)
    plan = plan_of(model, case.kwargs)
    full = sparse_vdit.uniform_plan(plan.model, plan.text_position, tile=plan.tile)
    with sparse_vdit.use(model, full):
        assert torch.equal(run(), dense)
    with sparse_vdit.use(model, plan_of(model, case.kwargs, "element")):
        case.check("sparse.element", run())
    seen = []
    first = model.get_submodule(plan.layers[0])
    watch = first.register_forward_hook(lambda module, args, out: seen.append(out))
    with sparse_vdit.use(model, plan) as handle:
        case.check("sparse.block", run())
        # The grid comes from the call, and is the case's.
        assert handle.hook.step.layout.grid == tuple(case.kwargs["grid"])
    watch.remove()
    returned = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
    for i, value in enumerate(returned):
        case.check(f"layer0.out{i}", value)
    assert torch.equal(run(), dense)


RUNNERS = {"model": run_model}
# Masks and the op itself have a test of their own.
ELSEWHERE = ("sparse_vdit.masks", "sparse_vdit.attention")


@pytest.mark.parametrize("path", find("sparse_vdit"), ids=lambda p: p.stem)
def test_golden(path) -> None:
    case = VideoCase(path)
    if case.kind in ELSEWHERE:
        pytest.skip(f"{case.kind} is a case of the op")
    assert case.kind in RUNNERS, f"no runner for kind {case.kind!r}"
    RUNNERS[case.kind](case)
    missing = set(case.spec["outputs"]) - case.compared
    assert not missing, f"outputs never compared: {sorted(missing)}"


def test_cases_are_found() -> None:
    assert any(VideoCase(path).kind == "model" for path in find("sparse_vdit"))
