"""Queries and keys of pattern sparse attention in FP8 (e4m3), in plain PyTorch: the definition.

Products of queries and keys run at twice the rate of 16 bits where tensor cores know FP8; softmax and values keep their
precision. A query has a scale of its own. Keys have one a tile, in the order of the head's pattern, and the mean of the
video's keys is taken off them first: it moves all logits of a query alike, which softmax does not see, and channels
with an offset would cost precision otherwise.

Taking off the mean of the keys follows SageAttention, arXiv:2410.02367.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.tile_sparse.patterns import Layout, PatternTable
from zoo.kernels.tile_sparse.reference import sequence_places, tile_sparse_attention

FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
# Tiles of zeros keep a scale to divide by.
TINY = 1e-12


def key_mean(k: Tensor, layout: Layout) -> Tensor:
    """Mean of the video's keys of each head: float32 [B, M, D]. Text may be padded with anything."""
    start = layout.text if layout.text_first else 0
    return k[:, :, start : start + layout.video].mean(2, dtype=torch.float32)


def round_to_fp8(x: Tensor, largest: Tensor) -> Tensor:
    """Values of x after rounding to FP8 under the scale that takes `largest` to its largest number."""
    scale = largest.clamp_min(TINY) / MAX
    return (x / scale).to(FP8).to(x.dtype) * scale


def round_queries(q: Tensor) -> Tensor:
    """Queries [B, M, S, D] as float32 after rounding, each under its own scale."""
    q = q.float()
    return round_to_fp8(q, q.abs().amax(-1, keepdim=True))


def round_keys(
    k: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout, text_length: Tensor | None
) -> Tensor:  # fmt: skip
    """Keys [B, M, S, D] less their mean as float32 after rounding, each tile under its own scale."""
    B, M, S, D = k.shape
    kinds = table.rows[pattern_ids.long(), 0].tolist()
    # [M, S]: place in the sequence of each position.
    order = torch.stack([sequence_places(kind, layout, k.device) for kind in kinds])
    k = (k - key_mean(k, layout)[:, :, None]).gather(2, order[None, :, :, None].expand(B, M, S, D))
    if text_length is not None:
        position = torch.arange(S, device=k.device)
        padded = position >= layout.video + text_length[:, None]  # [B, S]
        k = k.masked_fill(padded[:, None, :, None], 0)
    tiles = (tile for part in k.split([layout.video, layout.text], dim=2) for tile in part.split(layout.tile[1], dim=2))
    rounded = [round_to_fp8(tile, tile.abs().amax((2, 3), keepdim=True)) for tile in tiles if tile.shape[2]]
    rounded = torch.cat(rounded, dim=2)
    return torch.empty_like(rounded).scatter(2, order[None, :, :, None].expand(B, M, S, D), rounded)


def tile_sparse_attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout,
    text_length: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The reference on rounded queries and keys, in float32; arguments and result as in the public function."""
    keys = round_keys(k, pattern_ids, table, layout, text_length)
    settings = (pattern_ids, table, layout, text_length, scale)
    return tile_sparse_attention(round_queries(q), keys, v.float(), *settings).to(q.dtype)
