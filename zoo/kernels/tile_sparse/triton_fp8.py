"""Triton kernel that rounds keys to FP8 for the forward kernel of pattern sparse attention, and its launcher.

Keys are written in the order of the head's pattern, video and text filled up to whole tiles, so that the forward kernel
reads contiguous rows whatever the order, and one scale a tile. It rounds queries itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._rows import load_rows, store_rows
from zoo.kernels.tile_sparse.fp8 import FP8, MAX, TINY, key_mean
from zoo.kernels.tile_sparse.patterns import MULTI_DIAGONAL, Layout, PatternTable
from zoo.kernels.tile_sparse.triton_walk import load_pattern, places

_MAX, _TINY, _MULTI_DIAGONAL = tl.constexpr(MAX), tl.constexpr(TINY), tl.constexpr(MULTI_DIAGONAL)


@triton.jit
def to_fp8(x, largest):
    """x [N, D] in FP8 under the scale that takes `largest` to its largest number, and that scale."""
    scale = tl.maximum(largest, _TINY) / _MAX
    return x / scale, scale


@triton.jit(do_not_specialize=["heads", "frames", "frame", "text", "video_start", "text_start"])
def _tile_sparse_round_keys_kernel(
    k_ptr, mean_ptr, rounded_ptr, scale_ptr, ids_ptr, rows_ptr, length_ptr, k_stride_b, k_stride_m, k_stride_s,
    heads, frames, frame, text, video_start, text_start, inverse,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """rounded = fp8((k - mean) / scale) with scale = max |k - mean| / 448 of the tile.

    One program rounds a tile of keys of one head. Bytes: reads 2 TILE_N D, writes TILE_N D; bound by memory.
    """
    video = frames * frame
    video_tiles, text_tiles = tl.cdiv(video, TILE_N), tl.cdiv(text, TILE_N)
    program = tl.program_id(0)
    head = program // (video_tiles + text_tiles)
    tile = program - head * (video_tiles + text_tiles)
    of_text = tile >= video_tiles
    b, m = tl.program_id(1).to(tl.int64), head.to(tl.int64)
    kind, _, _, _, _ = load_pattern(ids_ptr, rows_ptr, head)
    position = (tile - tl.where(of_text, video_tiles, 0)) * TILE_N + tl.arange(0, TILE_N)
    valid = position < tl.where(of_text, tl.load(length_ptr + b), video)
    place = places(position, of_text, kind == _MULTI_DIAGONAL, frames, inverse, frame, video_start, text_start)
    k = load_rows(k_ptr + b * k_stride_b + m * k_stride_m, place * k_stride_s, valid, D, BLOCK_D, True)
    d = tl.arange(0, BLOCK_D)
    mean = tl.load(mean_ptr + (b * heads + m) * D + d, mask=d < D, other=0.0)
    k = tl.where(valid[:, None], k.to(tl.float32) - mean[None, :], 0.0)
    k, scale = to_fp8(k, tl.max(tl.abs(k)))
    row = (b * heads + m) * (video_tiles + text_tiles) + tile
    store_rows(rounded_ptr + row * TILE_N * D, k, tl.arange(0, TILE_N) * D, position >= 0, D, BLOCK_D)
    tl.store(scale_ptr + row, scale)


def round_keys(
    k: Tensor, ids: Tensor, table: PatternTable, length: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys in FP8 [B, M, N, D], in the order of the head's pattern and whole tiles, and scales [B, M, tiles]."""
    (B, M, _, D), tiles, size = k.shape, sum(layout.key_tiles), layout.tile[1]
    rounded = torch.empty(B, M, tiles * size, D, dtype=FP8, device=k.device)
    scale = torch.empty(B, M, tiles, dtype=torch.float32, device=k.device)
    video_start, text_start = (layout.text, 0) if layout.text_first else (0, layout.video)
    frames = layout.grid[0]
    _tile_sparse_round_keys_kernel[M * tiles, B](
        k, key_mean(k, layout), rounded, scale, ids, table.rows, length, *k.stride()[:3], M, frames, layout.frame,
        layout.text, video_start, text_start, 1.0 / frames,
        D=D, BLOCK_D=max(32, triton.next_power_of_2(D)), TILE_N=size, num_warps=4 if size * D <= 4096 else 8,
    )  # fmt: skip
    return rounded, scale
