"""Forward kernel of pattern sparse attention on Hopper, where a warp of its own loads tiles by tensor descriptors.

For heads in frame-major order, in which the rows of a tile lie next to each other. It compiles for sm_90 with Triton
3.6 and agrees with the reference under Triton's interpreter; it has not run on a GPU yet, so nothing takes it until
`DESCRIPTORS` is set. It keeps to two stages: with three or four, loops specialised by Triton 3.6 have given NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels.tile_sparse.patterns import MULTI_DIAGONAL, SKIP, STRIPE, Layout
from zoo.kernels.tile_sparse.triton_walk import LOG2E, load_pattern, own_tile, reach, store_rows

# Whether frame-major heads take this kernel where it can run.
DESCRIPTORS = False
_SKIP, _MULTI_DIAGONAL, _STRIPE = tl.constexpr(SKIP), tl.constexpr(MULTI_DIAGONAL), tl.constexpr(STRIPE)


@triton.jit(do_not_specialize=["heads", "video", "text", "video_start", "text_start"])
def _tile_sparse_descriptor_kernel(
    q_rows, k_rows, v_rows, out_ptr, lse_ptr, ids_ptr, order_ptr, rows_ptr, tiles_ptr, length_ptr,
    out_stride_b, out_stride_m, out_stride_s, heads, video, text, video_start, text_start, scale,
    D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T) v of frame-major heads, and lse = log2 of the softmax denominator.

    One program computes a tile of queries of one head; q_rows, k_rows and v_rows are descriptors of [B, M, S, D].
    Video and text are one walk, as a loop that is specialised must be the only one, so every tile has a mask. Tiles
    are loaded whole: values past the end of the video and padded text values are multiplied by zero, and must be
    finite. Bytes and FLOPs as in the generic kernel. Programs of token-major heads do nothing.
    """
    rank, start, of_text = own_tile(heads, video, text, TILE_M)
    head = tl.load(order_ptr + rank)
    kind, width, first, count, _ = load_pattern(ids_ptr, rows_ptr, head)
    width = tl.where(of_text, video + text, width)
    batch = tl.program_id(1)
    b, m = batch.to(tl.int64), head.to(tl.int64)
    length = tl.load(length_ptr + b)
    token_major = kind == _MULTI_DIAGONAL

    position = start + tl.arange(0, TILE_M)
    inside = position < tl.where(token_major, 0, tl.where(of_text, text, video))
    first_place = start + tl.where(of_text, text_start, video_start)
    q = q_rows.load([batch, head, first_place, 0]).reshape(TILE_M, D)

    listed = (kind == _STRIPE) & (of_text == 0)
    low, end = reach(start, width, video - 1, TILE_M, TILE_N)
    low = tl.where(listed, first, low)
    tiles = tl.where(listed, count, end - low)
    steps = tl.where((kind == _SKIP) | token_major, 0, tiles + tl.cdiv(length, TILE_N))
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    norm = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, D], tl.float32)
    for i in tl.range(0, steps, warp_specialize=SPECIALIZE):
        of_video = i < tiles
        tile = tl.load(tiles_ptr + low + i, mask=listed & of_video, other=0)
        tile = tl.where(of_video, tl.where(listed, tile, low + i), i - tiles)
        row = tile * TILE_N + tl.where(of_video, video_start, text_start)
        k = k_rows.load([batch, head, row, 0]).reshape(TILE_N, D)
        s = tl.dot(q, tl.trans(k))  # [TILE_M, TILE_N]
        valid = tile * TILE_N + tl.arange(0, TILE_N) < tl.where(of_video, video, length)
        s = tl.where(valid[None, :], s, float("-inf"))
        # Every tile of a walk holds a valid key, so the maximum is finite.
        new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        norm = norm * rescale + tl.sum(p, 1)
        v = v_rows.load([batch, head, row, 0]).reshape(TILE_N, D)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        top = new_top

    found = norm > 0
    norm = tl.where(found, norm, 1.0)
    offset = (first_place + tl.arange(0, TILE_M)) * out_stride_s
    store_rows(out_ptr + b * out_stride_b + m * out_stride_m, acc / norm[:, None], offset, inside, D, D)
    lse = tl.where(found, top + tl.log2(norm), float("inf"))
    tl.store(
        lse_ptr + (b * heads + m) * (video + text) + first_place + tl.arange(0, TILE_M), lse, mask=inside
    )  # fmt: skip


def can_describe(layout: Layout, *tensors: Tensor) -> bool:
    """Whether the kernel takes these queries, keys and values."""
    # The loop does not compile for sm_90 with Triton 3.9; versions between have not been tried.
    specialises = triton.__version__.startswith("3.6.")
    tiles_fit = layout.tile in ((128, 64), (128, 128)) and layout.granularity == "block"
    return specialises and tiles_fit and all(_is_aligned(x) for x in tensors)


def _is_aligned(x: Tensor) -> bool:
    steps = [stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return (
        torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.element_size() == 2
        and x.shape[-1] in (64, 128)
        and x.data_ptr() % 16 == 0
        and all(step > 0 and step % 8 == 0 for step in steps)
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    D = x.shape[-1]
    # The stride of a dimension of size 1 may be anything, but is to be aligned.
    strides = [D if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, D])


def forward_frame_major(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor, order: Tensor, rows: Tensor, tiles: Tensor,
    length: Tensor, layout: Layout, scale: float,
) -> None:  # fmt: skip
    """Launch the kernel: `out` and `lse` of all heads in frame-major order; the others stay untouched."""
    (B, M, _, D), (tile_m, tile_n) = q.shape, layout.tile
    video_start, text_start = (layout.text, 0) if layout.text_first else (0, layout.video)
    _tile_sparse_descriptor_kernel[sum(layout.query_tiles) * M, B](
        _descriptor(q, tile_m), _descriptor(k, tile_n), _descriptor(v, tile_n), out, lse, ids, order, rows, tiles,
        length, *out.stride()[:3], M, layout.video, layout.text, video_start, text_start, scale,
        D=D, TILE_M=tile_m, TILE_N=tile_n, SPECIALIZE=True, num_warps=4, num_stages=2,
    )  # fmt: skip
