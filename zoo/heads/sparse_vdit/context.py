"""What the processors must know and the attention modules are not told: the token grid and the noise level.

A forward pre-hook on the root transformer reads both from its arguments before the blocks run, and gives each processor
the patterns of its layer.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.heads.sparse_vdit.plan import Grid, SparsePlan
from zoo.kernels.tile_sparse import Full, Layout, PatternTable, VerticalStripe, pattern_table, tile_sparse_attention

TRAIN_TIMESTEPS = 1000
ON_MISMATCH = ("dense", "error", "nearest")


@dataclasses.dataclass(frozen=True)
class Family:
    """How a class of transformers lays out its tokens.

    Attributes:
        processor: Name of its class in `zoo.heads.sparse_vdit.processors`.
        layers: Attention of each block, by lists of blocks: `{list: attribute}`.
        text_position: Where text stands in the joint sequence.
        grid: `(config, arguments) -> (frames, height, width)` in tokens, or None where it cannot be told.
        rising_time: Timesteps rise from noise (0) to clean (1000) instead of falling.
    """

    processor: str
    layers: Mapping[str, str]
    text_position: str
    grid: Callable[[Any, Mapping[str, Any]], Grid | None]
    rising_time: bool = False


def _patch_grid(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> Grid:
    return tuple(n // p for n, p in zip(shape, patch, strict=True))


def _wan_grid(config: Any, call: Mapping[str, Any]) -> Grid:
    # [B, C, F, H, W]
    return _patch_grid(call["hidden_states"].shape[2:], config.patch_size)


def _hunyuan_grid(config: Any, call: Mapping[str, Any]) -> Grid:
    # [B, C, F, H, W]
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return _patch_grid(call["hidden_states"].shape[2:], patch)


def _mochi_grid(config: Any, call: Mapping[str, Any]) -> Grid:
    # [B, C, F, H, W]
    return _patch_grid(call["hidden_states"].shape[2:], (1, config.patch_size, config.patch_size))


def _cogvideox_grid(config: Any, call: Mapping[str, Any]) -> Grid:
    # [B, F, C, H, W]; version 1.0 has no patches in time.
    _, frames, _, height, width = call["hidden_states"].shape
    return -(-frames // (config.patch_size_t or 1)), height // config.patch_size, width // config.patch_size


def _ltx_grid(config: Any, call: Mapping[str, Any]) -> Grid | None:
    # Tokens come packed. With explicit coordinates they may be any set of places.
    if call.get("video_coords") is not None:
        return None
    grid = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    return None if None in grid else grid


FAMILIES = {
    "CogVideoXTransformer3DModel": Family(
        "SparseCogVideoXProcessor", {"transformer_blocks": "attn1"}, "first", _cogvideox_grid
    ),
    # The token refiner of HunyuanVideo has attentions too; they belong to the text encoder and stay as they are.
    "HunyuanVideoTransformer3DModel": Family(
        "SparseHunyuanVideoProcessor",
        {"transformer_blocks": "attn", "single_transformer_blocks": "attn"},
        "last",
        _hunyuan_grid,
    ),
    "LTXVideoTransformer3DModel": Family("SparseLTXProcessor", {"transformer_blocks": "attn1"}, "none", _ltx_grid),
    "MochiTransformer3DModel": Family(
        "SparseMochiProcessor", {"transformer_blocks": "attn1"}, "last", _mochi_grid, rising_time=True
    ),
    "WanTransformer3DModel": Family("SparseWanProcessor", {"blocks": "attn1"}, "none", _wan_grid),
}


def class_name(model: nn.Module) -> str:
    """Name of a transformer's class; `fully_shard` puts a prefix before it."""
    return type(model).__name__.removeprefix("FSDP")


def family_of(model: nn.Module) -> Family:
    """The family of a transformer.

    Raises:
        NotImplementedError: A class that is not supported; subclasses have other tokens and are not either.
    """
    name = class_name(model)
    if name not in FAMILIES:
        raise NotImplementedError(f"Sparse plans fit {', '.join(FAMILIES)}; got {name}.")
    return FAMILIES[name]


class Step:
    """State of the running forward pass, shared by the processors of one model.

    Attributes:
        tokens: Length of the joint sequence.
        layout: Its layout, None while the grid is unknown.
        table: The patterns at this layout.
        sigma: Noise level, 1 is pure noise.
        recorder: During a search, what takes the place of the attention.
    """

    def __init__(self, backend: str = "auto", qk_dtype: torch.dtype | None = None) -> None:
        self.backend, self.qk_dtype = backend, qk_dtype
        self.tokens = 0
        self.layout: Layout | None = None
        self.table: PatternTable | None = None
        self.sigma = 1.0
        self.recorder = None
        self.warned = False

    def attention(self, layer: int, ids: Tensor, q: Tensor, k: Tensor, v: Tensor, text_length: Tensor | None) -> Tensor:
        """Attention of one layer whose heads have the patterns `ids` `[M]`, `[B, M, S, D]`."""
        if self.recorder is not None:
            return self.recorder.attention(layer, q, k, v, self, text_length)
        if ids.device != q.device:
            ids = ids.to(q.device)
        table = self.table
        if table.rows.device != q.device:
            table = PatternTable(*(t.to(q.device) for t in table))
        options = dict(text_length=text_length, qk_dtype=self.qk_dtype, backend=self.backend)
        return tile_sparse_attention(q, k, v, ids, table, self.layout, **options)

    def warn(self, reason: str) -> None:
        """Say once why attention runs dense."""
        if not self.warned and not torch.compiler.is_compiling():
            self.warned = True
            warnings.warn(f"Sparse attention is off, attention runs dense: {reason}.", stacklevel=2)


class Prepared(NamedTuple):
    """What a token grid, a number of text tokens and a device need.

    Attributes:
        layout: The joint sequence.
        table: The patterns at this layout.
        ids: `[bins, layers, M]` int32, rows of the table.
    """

    layout: Layout
    table: PatternTable
    ids: Tensor


class RootHook:
    """Forward pre-hook of the root transformer.

    A hook of torch and not of diffusers: it runs before any wrapper of `forward` (offloading, caches), and a deep copy
    of the model gets a hook of its own with the copied processors.

    Args:
        model: The transformer.
        plan: The plan.
        modules: Planned attentions.
        processors: Their processors, in the same order.
        step: The state that they share.
        on_mismatch: As in `apply_plan`.
    """

    def __init__(
        self, model: nn.Module, plan: SparsePlan, modules: list, processors: list, step: Step, on_mismatch: str
    ) -> None:
        self.plan, self.family, self.step, self.on_mismatch = plan, family_of(model), step, on_mismatch
        self.modules, self.processors = modules, processors
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        full = [isinstance(pattern, Full) for pattern in plan.parsed()]
        # [bins][layers]
        self.sparse = [[not all(full[i] for i in ids) for ids in by_layer] for by_layer in plan.assign]
        self.prepared: dict[tuple[Grid, int, str], Prepared | None] = {}

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = dict(zip(self.arguments, args, strict=False), **kwargs)
        self.check_processors()
        located = self.locate(model, call)
        if located is None:
            for processor in self.processors:
                processor.active = False
            return
        self.step.layout, self.step.table, ids = located
        self.step.tokens = self.step.layout.tokens
        ids, sparse = self.patterns(call["timestep"], ids)
        if self.step.recorder is not None:
            sparse = self.step.recorder.begin_call(self.step, len(self.processors))
        for n, processor in enumerate(self.processors):
            processor.active = sparse[n]
            processor.pattern_ids = ids[n]

    def check_processors(self) -> None:
        """The processors must still be in place: `fuse_qkv_projections` of CogVideoX replaces them all."""
        if torch.compiler.is_compiling():
            return
        for name, module, processor in zip(self.plan.layers, self.modules, self.processors, strict=True):
            if module.processor is not processor:
                raise RuntimeError(
                    f"The processor of '{name}' was replaced by {type(module.processor).__name__} after the plan was "
                    "applied (fuse_qkv_projections and set_attn_processor do that). Remove the plan first, then change "
                    "the model, then apply the plan again."
                )

    def locate(self, model: nn.Module, call: Mapping[str, Any]) -> Prepared | None:
        """Layout and patterns of a call, or None where it must run dense."""
        grid = self.family.grid(model.config, call)
        if grid is None:
            self.step.warn("the token grid of this call is unknown")
            return None
        text = 0 if self.family.text_position == "none" else call["encoder_hidden_states"].shape[1]
        return self.prepare(tuple(grid), text, str(call["hidden_states"].device))

    def prepare(self, grid: Grid, text: int, device: str) -> Prepared | None:
        """Look up, or build, the tables of a grid; None where the plan does not fit it."""
        key = (grid, text, device)
        if key not in self.prepared:
            self.build(key)
        return self.prepared[key]

    # Building reads tensors on the host.
    @torch.compiler.disable
    def build(self, key: tuple[Grid, int, str]) -> None:
        grid, text, device = key
        patterns = self.fitting(grid)
        if patterns is None:
            self.prepared[key] = None
            return
        layout = self.plan.layout(grid, text)
        ids = torch.tensor(self.plan.assign, dtype=torch.int32, device=device)
        self.prepared[key] = Prepared(layout, pattern_table(patterns, layout, device), ids)

    def fitting(self, grid: Grid) -> tuple | None:
        """The patterns for a grid, or None where they do not fit. Stripes of blocks are bound to the searched grid."""
        patterns, calibrated = self.plan.parsed(), self.plan.calibrated.get("grid")
        bound = any(isinstance(p, VerticalStripe) and p.blocks for p in patterns)
        if not bound or calibrated is None or tuple(calibrated) == grid:
            return patterns
        reason = f"the plan has blocks of the token grid {tuple(calibrated)}, this call has {grid}"
        if self.on_mismatch == "error":
            raise ValueError(
                f"{reason}. Search a plan for this size, or apply it with on_mismatch='nearest' or 'dense'."
            )
        if self.on_mismatch == "dense":
            self.step.warn(reason)
            return None
        return tuple(_rescale_blocks(p, math.prod(calibrated), math.prod(grid)) for p in patterns)

    def patterns(self, timestep: Any, ids: Tensor) -> tuple[Tensor, list[bool]]:
        """Pattern of each head, `[layers, M]`, from those of all bins; and whether each layer is sparse at all."""
        if self.plan.num_bins == 1 and self.step.recorder is None:
            return ids[0], self.sparse[0]
        sigma = noise_level(timestep, self.family.rising_time)
        if torch.compiler.is_compiling():
            # The level stays on the device: reading it would break the graph. A layer is dense only if it always is.
            edges = torch.tensor(self.plan.bins[1:-1], dtype=sigma.dtype, device=sigma.device)
            b = (sigma >= edges).sum().reshape(1).to(ids.device)
            return ids.index_select(0, b)[0], [any(bins) for bins in zip(*self.sparse, strict=True)]
        self.step.sigma = float(sigma)
        b = self.plan.bin_of(self.step.sigma)
        return ids[b], self.sparse[b]


def noise_level(timestep: Any, rising_time: bool) -> Tensor:
    """Noise level of a call in [0, 1]: the highest of its samples (and, in Wan 2.2 and LTX, its tokens)."""
    timestep = torch.as_tensor(timestep)
    # Apple's GPUs have no float64.
    level = timestep.to(torch.float32 if timestep.device.type == "mps" else torch.float64) / TRAIN_TIMESTEPS
    return (1 - level if rising_time else level).max().clamp(0, 1)


def _rescale_blocks(pattern, old: int, new: int):
    """A stripe's blocks at the same relative places of a video of another number of tokens."""
    if not (isinstance(pattern, VerticalStripe) and pattern.blocks):
        return pattern
    size, blocks = pattern.block_size, set()
    for block in pattern.blocks:
        start, end = block * size * new / old, (block + 1) * size * new / old
        blocks.update(range(int(start // size), max(math.ceil(end / size), int(start // size) + 1)))
    return dataclasses.replace(pattern, blocks=tuple(sorted(b for b in blocks if b * size < new)))
