"""A stripe of those keys that the model attends to most, as another candidate of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.heads.sparse_vdit.context import Step, family_of
from zoo.heads.sparse_vdit.plan import uniform_plan
from zoo.heads.sparse_vdit.plugin import _install, describe_model
from zoo.heads.sparse_vdit.search import _arguments, _check_prompts, _plain_transformer
from zoo.kernels.tile_sparse import DEFAULT_TILE, Layout, tile_sparse_attention


class ColumnMass:
    """Takes the place of attention: dense, and adds up what sampled queries give to blocks of keys.

    Attributes:
        mass: `[blocks]` float64, blocks of the tile's keys in frame-major order; None before the first attention.
        layout: Of the calls.
    """

    def __init__(self, rows: int, backend: str = "auto") -> None:
        self.rows, self.backend = rows, backend
        self.mass: Tensor | None = None
        self.layout: Layout | None = None

    def begin_call(self, step: Step, layers: int) -> list[bool]:
        """Take note of a forward pass; all layers are to be measured.

        Raises:
            ValueError: The call has another token grid than earlier ones.
        """
        if self.layout is not None and self.layout.grid != step.layout.grid:
            raise ValueError(
                f"A call has the token grid {step.layout.grid}, expected {self.layout.grid}: all prompts need one size."
            )
        self.layout = step.layout
        return [True] * layers

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step, text_length: Tensor | None) -> Tensor:
        """Dense attention `[B, M, S, D]`."""
        self.add(q, k, step.layout, text_length)
        ids = torch.zeros(q.shape[1], dtype=torch.int32, device=q.device)
        options = dict(text_length=text_length, backend=self.backend)
        return tile_sparse_attention(q, k, v, ids, step.table, step.layout, **options)

    def add(self, q: Tensor, k: Tensor, layout: Layout, text_length: Tensor | None = None) -> None:
        """Add the attention of `rows` video queries, evenly spaced, of each head."""
        V, S, size = layout.video, layout.tokens, layout.tile[1]
        video_start, text_start = (layout.text, 0) if layout.text_first else (0, V)
        rows = min(self.rows, V)
        place = video_start + (2 * torch.arange(rows, device=q.device) + 1) * V // (2 * rows)
        logits = (q[:, :, place] @ k.mT).float() * q.shape[-1] ** -0.5  # [B, M, rows, S]
        if text_length is not None:
            token = torch.arange(S, device=q.device) - text_start
            padded = (token >= text_length[:, None]) & (token < layout.text)  # [B, S]
            logits = logits.masked_fill(padded[:, None, None], float("-inf"))
        columns = logits.softmax(-1)[..., video_start : video_start + V].sum((0, 1, 2))
        filled = torch.nn.functional.pad(columns, (0, -V % size))
        # [V] -> [blocks, size]
        mass = filled.unflatten(0, (-1, size)).double().sum(1).cpu()
        self.mass = mass if self.mass is None else self.mass + mass

    def top(self, share: float) -> tuple[int, ...]:
        """The blocks of most mass, ascending: this share of all, at least one."""
        count = max(1, round(share * len(self.mass)))
        return tuple(sorted(self.mass.argsort(descending=True, stable=True)[:count].tolist()))


def calibrate_blocks(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    share: float = 0.1,
    rows: int = 64,
    tile: tuple[int, int] = DEFAULT_TILE,
    generator: torch.Generator | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    component: str = "transformer",
    backend: str = "auto",
) -> dict[str, Any]:
    """Find the key blocks that a model attends to most, over all heads, layers and steps.

    The pipeline generates each prompt once with dense attention, while a few queries of each head show where attention
    goes. The result is a vertical stripe to search with:

        stripe = zoo.sparse_vdit.calibrate_blocks(pipe, prompts, call_kwargs=call)
        plan = zoo.sparse_vdit.search(pipe, prompts, candidates=[*zoo.sparse_vdit.CANDIDATES, stripe], call_kwargs=call)

    Blocks are bound to the size of the video; see `on_mismatch` of `apply_plan`.

    Args:
        pipe: A pipeline, or its transformer alone.
        prompts: As in `search`.
        share: Share of the video's key blocks to keep.
        rows: Queries of each head to look at, evenly spaced over the video.
        tile: As in `search`; blocks have the tile's keys.
        generator, call_kwargs, component, backend: As in `search`.

    Returns:
        The pattern, as in a plan.

    Raises:
        NotImplementedError: A class of transformer that is not supported.
        ValueError: Bad arguments, or videos of several sizes.
        RuntimeError: The runs had an unknown token grid.
    """
    _check_prompts(pipe, prompts)
    if not 0 < share <= 1 or rows < 1:
        raise ValueError(f"share must lie in (0, 1] and rows be positive, got {share} and {rows}.")
    model = _plain_transformer(pipe, component)
    first = uniform_plan(describe_model(model), family_of(model).text_position, tile=tile)
    seed = None if generator is None else generator.initial_seed()
    step, recorder = Step(backend), ColumnMass(rows, backend)
    step.recorder = recorder
    with _install(model, first, step), torch.no_grad():
        for i, prompt in enumerate(prompts):
            pipe(**_arguments(pipe, prompt, call_kwargs or {}, None if seed is None else seed + i)())
    if recorder.mass is None:
        raise RuntimeError("Nothing was measured: the runs had no known token grid.")
    return {"pattern": "vertical_stripe", "blocks": list(recorder.top(share)), "block_size": tile[1]}
