"""The host side of pattern sparse attention on Hopper: which problems its kernel takes, and what it needs of them.

The kernel, in `gluon_hopper`, loads tiles of keys and values by tensor descriptors (TMA). A tile must be rows that
follow each other in memory. Heads in frame-major order are read where they lie; keys and values of those in token-major
order are copied into that order first. That moves 4 S D values of a head.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._rows import load_rows, store_rows
from zoo.kernels.tile_sparse.patterns import MULTI_DIAGONAL, Layout
from zoo.kernels.tile_sparse.triton_walk import places

_MULTI_DIAGONAL = tl.constexpr(MULTI_DIAGONAL)
# Tiles in the ring of the kernel, by head dimension and keys of a tile: the fastest of those tried on an H100.
STAGES = {(64, 64): 4, (64, 128): 3, (128, 64): 3, (128, 128): 3}
QUERIES = 128
# Rows of zeros after a copied head, so that its last tile does not reach into the next.
PADDING = 128
_SIZES = ["heads", "frames", "frame", "text", "video_start", "text_start"]


@triton.jit(do_not_specialize=_SIZES)
def _token_major_kernel(
    k_ptr, v_ptr, packed_ptr, ids_ptr, rows_ptr, k_stride_b, k_stride_m, k_stride_s, v_stride_b, v_stride_m, v_stride_s,
    batch, rows, heads, frames, frame, text, video_start, text_start, inverse, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """packed[i, b, m] = rows of k and v (i = 0, 1) of token-major heads, in token-major order.

    One program writes BLOCK of the `rows` of a head, zeros past its tokens, and moves 8 BLOCK D bytes of 16-bit
    values. Those of other heads do nothing.
    """
    m, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if tl.load(rows_ptr + tl.load(ids_ptr + m) * 6) == _MULTI_DIAGONAL:
        tokens = frames * frame + text
        to = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        position = to - video_start
        of_video = (position >= 0) & (position < frames * frame)
        place = tl.where(of_video, places(position, False, True, frames, inverse, frame, video_start, text_start), to)
        inside, written = to < tokens, to < rows
        packed_ptr += (b * heads + m) * rows * D
        step = (heads * rows).to(tl.int64) * D * batch
        k = load_rows(k_ptr + b * k_stride_b + m * k_stride_m, place * k_stride_s, inside, D, D, True)
        store_rows(packed_ptr, k, to * D, written, D, D)
        v = load_rows(v_ptr + b * v_stride_b + m * v_stride_m, place * v_stride_s, inside, D, D, True)
        store_rows(packed_ptr + step, v, to * D, written, D, D)


class Rows(NamedTuple):
    """[B, M, S, D] as a matrix whose rows hold a token each."""

    shape: list[int]
    stride: int
    factors: tuple[int, int, int]  # rows a sample, rows a head, columns a head


def rows_of(x: Tensor) -> Rows | None:
    """The matrix of a tensor [B, M, S, D] with unit channel stride, None where its memory is none."""
    (B, M, S, D), (stride_b, stride_m, stride_s, _) = x.shape, x.stride()
    if B == 1:
        stride_b = 0
    if M == 1:
        stride_m = 0
    if stride_m * (M - 1) + D <= stride_s and (B == 1 or stride_b == S * stride_s):
        return Rows([B * S, stride_m * (M - 1) + D], stride_s, (S, 0, stride_m))
    if stride_s >= D and stride_b % stride_s == stride_m % stride_s == 0:
        row_b, row_m = stride_b // stride_s, stride_m // stride_s
        return Rows([row_b * (B - 1) + row_m * (M - 1) + S, D], stride_s, (row_b, row_m, 0))
    return None


@functools.cache
def kernel_module() -> ModuleType | None:
    """The module of the kernel, None where the Gluon of this Triton, which is experimental, has another interface."""
    try:
        from zoo.kernels.tile_sparse import gluon_hopper
    except (ImportError, AttributeError):
        return None
    return gluon_hopper


def can_run(layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these queries, keys and values, with unit channel strides."""
    if (q.shape[-1], layout.tile[1]) not in STAGES or layout.tile[0] != QUERIES or layout.granularity != "block":
        return False
    device_fits = q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)
    return device_fits and q.element_size() == 2 and all(map(_is_matrix, (k, v))) and kernel_module() is not None


def _is_matrix(x: Tensor) -> bool:
    """Whether TMA can load tiles of a tensor where it lies."""
    rows = rows_of(x)
    return x.data_ptr() % 16 == 0 and rows is not None and rows.stride % 8 == 0


def pack(k: Tensor, v: Tensor, ids: Tensor, rows: Tensor, sizes: tuple) -> tuple[Tensor, Tensor]:
    """Keys and values of token-major heads in their order, each [B, M, S, D]; of others, nothing."""
    B, M, S, D = k.shape
    # Which heads are token-major is known on the device only.
    packed = torch.empty((2, B, M, S + PADDING, D), dtype=k.dtype, device=k.device)
    _token_major_kernel[triton.cdiv(S + PADDING, 64), M, B](
        k, v, packed, ids, rows, *k.stride()[:3], *v.stride()[:3], B, S + PADDING, *sizes, D=D, BLOCK=64, num_warps=4
    )
    return packed[:, :, :, :S].unbind()


def layout_sizes(layout: Layout, heads: int) -> tuple:
    """Heads, frames, places of a frame, text, starts of video and text, 1 / frames: what the kernels take."""
    video_start, text_start = (layout.text, 0) if layout.text_first else (0, layout.video)
    frames = layout.grid[0]
    return heads, frames, layout.frame, layout.text, video_start, text_start, 1.0 / frames
