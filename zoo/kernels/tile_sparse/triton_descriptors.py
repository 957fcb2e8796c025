"""Forward kernels of pattern sparse attention on Hopper, which load tiles by tensor descriptors (TMA).

A tile must be rows that follow each other in memory. Heads in frame-major order are read where they lie; those in
token-major order are copied into that order first: 6 S D values of a head are moved, which at bfloat16, 119,056 tokens
and a density of 7 % took 7 % of the attention's time on an H100, and less where more is attended.

Loops are pipelined, not specialised by warps: with Triton 3.6, every specialised form that was tried hung on an H100.
The compiler then divides a tile of queries between two groups of warps, but a descriptor made on the host keeps the box
of the whole tile, and so a copy brings twice the bytes that its barrier was told to expect. Gluon leaves roles and
barriers to the author: `gluon_hopper` is the specialised kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels.tile_sparse.patterns import MULTI_DIAGONAL, SKIP, STRIPE, Layout
from zoo.kernels.tile_sparse.triton_walk import LOG2E, load_pattern, load_rows, own_tile, places, reach, store_rows

_SKIP, _MULTI_DIAGONAL, _STRIPE = tl.constexpr(SKIP), tl.constexpr(MULTI_DIAGONAL), tl.constexpr(STRIPE)
# Warps and stages by head dimension and tile: the fastest of those tried on an H100.
CONFIGS = {
    (64, (128, 64)): dict(num_warps=4, num_stages=3),
    (64, (128, 128)): dict(num_warps=4, num_stages=3),
    (128, (128, 64)): dict(num_warps=4, num_stages=2),
    (128, (128, 128)): dict(num_warps=8, num_stages=3),
}
# Whether the kernel of `gluon_hopper` takes the place of the pipelined one.
SPECIALISED = False
# Rows of zeros after a copied head, so that its last tile does not reach into the next.
PADDING = 128
_SIZES = ["heads", "frames", "frame", "text", "video_start", "text_start"]


@triton.jit(do_not_specialize=_SIZES)
def _token_major_kernel(
    q_ptr, k_ptr, v_ptr, packed_ptr, ids_ptr, rows_ptr, q_stride_b, q_stride_m, q_stride_s,
    k_stride_b, k_stride_m, k_stride_s, v_stride_b, v_stride_m, v_stride_s,
    batch, rows, heads, frames, frame, text, video_start, text_start, inverse, D: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """packed[i, b, m] = rows of k, v and, with QUERIES, q (i = 0, 1, 2) of token-major heads, in token-major order.

    One program writes BLOCK of the `rows` of a head, zeros past its tokens, and moves 12 BLOCK D bytes of 16-bit
    values, 8 without queries. Those of other heads do nothing.
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
        if QUERIES:
            q = load_rows(q_ptr + b * q_stride_b + m * q_stride_m, place * q_stride_s, inside, D, D, True)
            store_rows(packed_ptr + 2 * step, q, to * D, written, D, D)


@triton.jit(do_not_specialize=_SIZES)
def _tile_sparse_descriptor_kernel(
    q_rows, k_rows, v_rows, out_ptr, lse_ptr, ids_ptr, order_ptr, rows_ptr, tiles_ptr, length_ptr,
    q_row_b, q_row_m, q_column_m, k_row_b, k_row_m, k_column_m, v_row_b, v_row_m, v_column_m,
    out_stride_b, out_stride_m, out_stride_s, heads, frames, frame, text, video_start, text_start, inverse, scale,
    D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TOKEN_MAJOR: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T) v and lse = log2 of the softmax denominator, of the heads in one order.

    One program computes a tile of queries of one head. q_rows, k_rows and v_rows are descriptors of matrices in which
    token s of head m and sample b is row b row_b + m row_m + s, from column m column_m on. Video and text are one walk.
    Tiles are loaded whole: what follows the end of the video or the valid text is multiplied by zero, and must be
    finite. Bytes and FLOPs as in the generic kernel. Programs of heads in the other order do nothing.
    """
    video = frames * frame
    rank, start, of_text = own_tile(heads, video, text, TILE_M)
    head = tl.load(order_ptr + rank)
    kind, width, first, count, _ = load_pattern(ids_ptr, rows_ptr, head)
    token_major = kind == _MULTI_DIAGONAL
    own = token_major == TOKEN_MAJOR
    width = tl.where(of_text, video + text, width)
    b = tl.program_id(1)
    length = tl.load(length_ptr + b)

    position = start + tl.arange(0, TILE_M)
    inside = position < tl.where(own, tl.where(of_text, text, video), 0)
    place = places(position, of_text, token_major, frames, inverse, frame, video_start, text_start)
    first_row = start + tl.where(of_text, text_start, video_start)
    q = q_rows.load([b * q_row_b + head * q_row_m + first_row, head * q_column_m])

    listed = (kind == _STRIPE) & (of_text == 0)
    low, end = reach(start, width, video - 1, TILE_M, TILE_N)
    low = tl.where(listed, first, low)
    tiles = tl.where(listed, count, end - low)
    steps = tl.where((kind == _SKIP) | (own == 0), 0, tiles + tl.cdiv(length, TILE_N))
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    norm = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, D], tl.float32)
    for i in tl.range(0, steps):
        of_video = i < tiles
        tile = tl.load(tiles_ptr + low + i, mask=listed & of_video, other=0)
        tile = tl.where(of_video, tl.where(listed, tile, low + i), i - tiles)
        row = tile * TILE_N + tl.where(of_video, video_start, text_start)
        limit = tl.where(of_video, video, length)
        k = k_rows.load([b * k_row_b + head * k_row_m + row, head * k_column_m])
        s = tl.dot(q, tl.trans(k))  # [TILE_M, TILE_N]
        if (tile + 1) * TILE_N > limit:
            valid = tile * TILE_N + tl.arange(0, TILE_N) < limit
            s = tl.where(valid[None, :], s, float("-inf"))
        # Every tile of a walk holds a valid key, so the maximum is finite.
        new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        norm = norm * rescale + tl.sum(p, 1)
        v = v_rows.load([b * v_row_b + head * v_row_m + row, head * v_column_m])
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        top = new_top

    found = norm > 0
    norm = tl.where(found, norm, 1.0)
    b, m = b.to(tl.int64), head.to(tl.int64)
    offset = place * out_stride_s
    store_rows(out_ptr + b * out_stride_b + m * out_stride_m, acc / norm[:, None], offset, inside, D, D)
    lse = tl.where(found, top + tl.log2(norm), float("inf"))
    tl.store(lse_ptr + (b * heads + m) * (video + text) + place, lse, mask=inside)


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


def can_describe(layout: Layout, *tensors: Tensor) -> bool:
    """Whether the kernels take these queries, keys and values."""
    tiles_fit = (tensors[0].shape[-1], layout.tile) in CONFIGS and layout.granularity == "block"
    return tiles_fit and all(_is_aligned(x) for x in tensors)


def _is_aligned(x: Tensor) -> bool:
    rows = rows_of(x)
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and rows is not None
        and rows.stride % 8 == 0
    )


def _specialised() -> ModuleType | None:
    """The module of the specialised kernel, None where it is switched off or this Triton's Gluon does not fit."""
    if not SPECIALISED:
        return None
    try:
        from zoo.kernels.tile_sparse import gluon_hopper
    except (ImportError, AttributeError):
        return None
    return gluon_hopper


def pack(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, rows: Tensor, sizes: tuple, queries: bool) -> tuple[Tensor, ...]:
    """Keys, values and perhaps queries of token-major heads in their order, each [B, M, S, D]; of others, nothing."""
    B, M, S, D = q.shape
    # Which heads are token-major is known on the device only.
    packed = torch.empty((3 if queries else 2, B, M, S + PADDING, D), dtype=q.dtype, device=q.device)
    strides = (stride for x in (q, k, v) for stride in x.stride()[:3])
    _token_major_kernel[triton.cdiv(S + PADDING, 64), M, B](
        q, k, v, packed, ids, rows, *strides, B, S + PADDING, *sizes, D=D, BLOCK=64, QUERIES=queries, num_warps=4
    )
    return packed[:, :, :, :S].unbind()


def layout_sizes(layout: Layout, heads: int) -> tuple:
    """Heads, frames, places of a frame, text, starts of video and text, 1 / frames: what the kernels take."""
    video_start, text_start = (layout.text, 0) if layout.text_first else (0, layout.video)
    frames = layout.grid[0]
    return heads, frames, layout.frame, layout.text, video_start, text_start, 1.0 / frames


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor, order: Tensor, rows: Tensor, tiles: Tensor,
    length: Tensor, layout: Layout, scale: float,
) -> None:  # fmt: skip
    """Launch the kernels: `out` and `lse` of all heads. Token-major heads take a copy of q, k and v."""
    specialised = _specialised()
    if specialised is not None:
        specialised.forward(q, k, v, out, lse, ids, order, rows, tiles, length, layout, scale)
        return
    B, M, _, D = q.shape
    sizes = layout_sizes(layout, M)
    packed = pack(q, k, v, ids, rows, sizes, True)
    for tensors, token_major in (((q, k, v), False), ((packed[2], *packed[:2]), True)):
        matrices = [rows_of(x) for x in tensors]
        descriptors = [
            TensorDescriptor(x, r.shape, [r.stride, 1], [side, D])
            for x, r, side in zip(tensors, matrices, (layout.tile[0], layout.tile[1], layout.tile[1]), strict=True)
        ]
        factors = (factor for r in matrices for factor in r.factors)
        _tile_sparse_descriptor_kernel[sum(layout.query_tiles) * M, B](
            *descriptors, out, lse, ids, order, rows, tiles, length, *factors, *out.stride()[:3], *sizes, scale,
            D=D, TILE_M=layout.tile[0], TILE_N=layout.tile[1], TOKEN_MAJOR=token_major, **CONFIGS[D, layout.tile],
        )  # fmt: skip
