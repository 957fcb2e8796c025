"""Forward kernel of pattern sparse attention on Hopper, specialised by warps.

A program is three kinds of warps. One of them loads tiles of keys and values (TMA) into a ring; two groups of four
warps hold 64 of the tile's 128 queries each, and multiply. The groups are not in step: while one computes exponentials,
the tensor cores work for the other. Within a group, too, the logits of the next tile are multiplied meanwhile.

One launch serves heads of both orders: a tile must be rows that follow each other in memory, and so keys and values of
token-major heads are copied into their order before, 4 S D values of a head, and read from the copy.

Barriers. Every stage of the ring has four: `full` and `empty`, of keys and of values. Tile n of a program's walk lies
in stage n mod STAGES, and is the fill number r = n div STAGES of that stage.
 - The loading warp waits for the r-th phase of `empty` to end, which both groups end by arriving (count 2) once the
   products that read fill r - 1 are done. For r = 0 it waits for the parity before the first phase, which a fresh
   barrier has behind it. It then announces the bytes of the tile on `full` (the one arrival) and starts the copy.
 - A group waits for phase r of `full`, which the last byte ends.
Parities suffice: fill r + 1 cannot begin before both groups have arrived r + 1 times, so that no phase is ever missed
by two. All warps count the same tiles, from the same tables, so that none waits for a fill that never comes; without
tiles there is no wait at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from zoo.kernels.tile_sparse.hopper import QUERIES, STAGES, layout_sizes, pack, rows_of
from zoo.kernels.tile_sparse.patterns import MULTI_DIAGONAL, SKIP, STRIPE, Layout
from zoo.kernels.tile_sparse.triton_walk import places, reach

_SKIP, _MULTI_DIAGONAL, _STRIPE = gl.constexpr(SKIP), gl.constexpr(MULTI_DIAGONAL), gl.constexpr(STRIPE)
# Renamed in Triton 3.7 or later.
_copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LOG2E = gl.constexpr(1.4426950408889634)
TILE_M = gl.constexpr(QUERIES)
# Queries of a group of four warps, which is what one of their products takes.
ROWS = gl.constexpr(64)
# Registers of a thread that multiplies and of one that loads: 3 * 168 of them are divided among three groups of warps.
GROUP_REGISTERS, LOADER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
_SIZES = ["batch", "heads", "frames", "frame", "text", "video_start", "text_start"]
_FACTORS = [
    "k_row_b", "k_row_m", "k_column_m", "v_row_b", "v_row_m", "v_column_m", "packed_row_b", "packed_row_m",
]  # fmt: skip


@gluon.jit
def _item(sizes):
    """What a program computes: sample, rank of the head, first query of its tile, whether that is text."""
    batch, heads, frames, frame, text, video_start, text_start = sizes
    b = gl.program_id(0) % batch
    number = gl.program_id(0) // batch
    text_tiles = (text + TILE_M - 1) // TILE_M
    of_text = number < heads * text_tiles
    index = gl.where(of_text, number, number - heads * text_tiles)
    tiles = gl.where(of_text, text_tiles, (frames * frame + TILE_M - 1) // TILE_M)
    rank = index // tiles
    return b, rank, (index - rank * tiles) * TILE_M, of_text


@gluon.jit
def _walk(b, rank, start, of_text, tables, sizes, TILE_N: gl.constexpr):
    """Tiles of keys of a tile of queries, from the last to the first: those of text, then those of the video.

    Returns the head and its kind, tiles of text and of video, valid keys of the last one of each, the first tile of the
    video (an entry of the list where the walk is through it), and whether it is.
    """
    order_ptr, rows_ptr, tiles_ptr, length_ptr = tables
    batch, heads, frames, frame, text, video_start, text_start = sizes
    video = frames * frame
    head = gl.load(order_ptr + rank)
    length = gl.load(length_ptr + b)
    row_ptr = rows_ptr + rank * 6
    kind, width, first, count = gl.load(row_ptr), gl.load(row_ptr + 1), gl.load(row_ptr + 2), gl.load(row_ptr + 3)
    listed = (kind == _STRIPE) & (of_text == 0)
    low, end = reach(start, gl.where(of_text, video + text, width), video - 1, TILE_M, TILE_N)
    low = gl.where(listed, first, low)
    live = kind != _SKIP
    text_tiles = gl.where(live, (length + TILE_N - 1) // TILE_N, 0)
    tiles = gl.where(live, gl.where(listed, count, end - low), 0)
    last = gl.load(tiles_ptr + low + tiles - 1, mask=listed & (tiles > 0), other=0)
    last = gl.where(listed, last, low + tiles - 1)
    return head, kind, text_tiles, tiles, length - (text_tiles - 1) * TILE_N, video - last * TILE_N, low, listed


@gluon.jit
def _load(descriptor, row, column, ring, full, empty, stage, parity):
    """Start the copy of a tile into its stage, once the stage is free."""
    mbarrier.wait(empty.index(stage), parity ^ 1)
    mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)
    _copy_tile(descriptor, [row, column], full.index(stage), ring.index(stage))


@gluon.jit
def _load_tiles(descriptors, factors, shared, TILE_N: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: keys and values of all tiles, in the order in which the groups walk."""
    rings, barriers, tables, sizes, inverse, scale = shared
    k_rows, v_rows, k_packed, v_packed = descriptors
    k_row_b, k_row_m, k_column_m, v_row_b, v_row_m, v_column_m, packed_row_b, packed_row_m = factors
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    order_ptr, rows_ptr, tiles_ptr, length_ptr = tables
    batch, heads, frames, frame, text, video_start, text_start = sizes
    b, rank, start, of_text = _item(sizes)
    head, kind, text_tiles, tiles, text_valid, video_valid, low, listed = _walk(
        b, rank, start, of_text, tables, sizes, TILE_N
    )
    steps = text_tiles + tiles
    for i in range(steps):
        is_text = i < text_tiles
        at = low + steps - 1 - i
        tile = gl.load(tiles_ptr + at, mask=listed & (is_text == 0), other=0)
        tile = gl.where(listed, tile, at)
        row = gl.where(is_text, (text_tiles - 1 - i) * TILE_N + text_start, tile * TILE_N + video_start)
        stage, parity = i % STAGES, i // STAGES & 1
        if kind == _MULTI_DIAGONAL:
            row += b * packed_row_b + head * packed_row_m
            _load(k_packed, row, 0, k_ring, k_full, k_empty, stage, parity)
            _load(v_packed, row, 0, v_ring, v_full, v_empty, stage, parity)
        else:
            k_row, v_row = row + b * k_row_b + head * k_row_m, row + b * v_row_b + head * v_row_m
            _load(k_rows, k_row, head * k_column_m, k_ring, k_full, k_empty, stage, parity)
            _load(v_rows, v_row, head * v_column_m, v_ring, v_full, v_empty, stage, parity)


@gluon.jit
def _softmax(s, top, norm, valid, qk_scale, MASKED: gl.constexpr):
    """Weights of a tile, and the running maximum, its factor on what was summed before, and the denominator."""
    if MASKED:
        column = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < valid)[None, :], s, float("-inf"))
    # The first tile of a walk holds a valid key, so the maximum is finite.
    new_top = gl.maximum(top, gl.max(s, 1) * qk_scale)
    p = gl.exp2(s * qk_scale - new_top[:, None])
    rescale = gl.exp2(top - new_top)
    return p, new_top, rescale, norm * rescale + gl.sum(p, 1)


@gluon.jit
def _logits(q, rings, barriers, n, STAGES: gl.constexpr, TILE_N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Start the product of the queries and keys of tile n, once these are there."""
    stage = n % STAGES
    mbarrier.wait(barriers[0].index(stage), n // STAGES & 1)
    zero = gl.zeros([ROWS, TILE_N], gl.float32, S_LAYOUT)
    return warpgroup_mma(q, rings[0].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _step(
    q, s, acc, top, norm, valid, qk_scale, rings, barriers, n, STAGES: gl.constexpr, TILE_N: gl.constexpr,
    P_LAYOUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Softmax of tile n, of which `s` are the logits, while those of tile n + 1 are multiplied, and its values."""
    DTYPE: gl.constexpr = q.dtype
    S_LAYOUT: gl.constexpr = s.type.layout
    following = _logits(q, rings, barriers, n + 1, STAGES, TILE_N, S_LAYOUT)
    # The values are there as a rule: they were loaded before the next keys. A wait ends a block of instructions, so
    # that the assembler cannot move the product above behind the softmax.
    stage = n % STAGES
    mbarrier.wait(barriers[2].index(stage), n // STAGES & 1)
    p, top, rescale, norm = _softmax(s, top, norm, valid, qk_scale, MASKED)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    acc = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P_LAYOUT), rings[1].index(stage), acc, is_async=True)
    # Products end in the order in which they began.
    following = warpgroup_mma_wait(1, [following])
    mbarrier.arrive(barriers[1].index((n + 1) % STAGES), count=1)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(barriers[3].index(stage), count=1)
    return following, acc, top, norm


@gluon.jit
def _multiply(
    group: gl.constexpr, q_smem, shared, pointers, strides, D: gl.constexpr, TILE_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: its 64 queries."""
    rings, barriers, tables, sizes, inverse, scale = shared
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    q_ptr, out_ptr, lse_ptr = pointers
    q_stride_b, q_stride_m, q_stride_s, out_stride_b, out_stride_m, out_stride_s = strides
    batch, heads, frames, frame, text, video_start, text_start = sizes
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Rows of memory: 16 bytes a thread.
    IO_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    DTYPE: gl.constexpr = q_smem.dtype
    video = frames * frame
    qk_scale = scale * LOG2E
    d = gl.arange(0, D, gl.SliceLayout(0, IO_LAYOUT))
    b, rank, start, of_text = _item(sizes)
    head, kind, text_tiles, tiles, text_valid, video_valid, low, listed = _walk(
        b, rank, start, of_text, tables, sizes, TILE_N
    )  # fmt: skip
    token_major = kind == _MULTI_DIAGONAL
    b64, m64 = b.to(gl.int64), head.to(gl.int64)
    position = start + group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, IO_LAYOUT))
    inside = (position < gl.where(of_text, text, video))[:, None]
    place = places(position, of_text, token_major, frames, inverse, frame, video_start, text_start)
    at = q_ptr + b64 * q_stride_b + m64 * q_stride_m + (place * q_stride_s)[:, None] + d[None, :]
    q_smem.store(gl.load(at, mask=inside, other=0.0))
    fence_async_shared()

    top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    norm = gl.zeros([ROWS], gl.float32, ROW)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    steps = text_tiles + tiles
    if steps > 0:
        s = warpgroup_mma_wait(0, [_logits(q_smem, rings, barriers, 0, STAGES, TILE_N, S_LAYOUT)])
        mbarrier.arrive(k_empty.index(0), count=1)
        # Only the last tile of the text and of the video may be short: the first steps of the walk. What is left
        # but the last step goes by twos, so that two sets of registers take the logits in turn.
        final = steps - 1
        masked = gl.minimum(text_tiles + 1, final)
        masked += (final - masked) & 1
        for i in range(masked):
            valid = gl.where(i == text_tiles, video_valid, gl.where(i == 0, text_valid, TILE_N))
            s, acc, top, norm = _step(
                q_smem, s, acc, top, norm, valid, qk_scale, rings, barriers, i, STAGES, TILE_N, P_LAYOUT, True
            )  # fmt: skip
        for i in range(masked, final, 2):
            s, acc, top, norm = _step(
                q_smem, s, acc, top, norm, 0, qk_scale, rings, barriers, i, STAGES, TILE_N, P_LAYOUT, False
            )  # fmt: skip
            s, acc, top, norm = _step(
                q_smem, s, acc, top, norm, 0, qk_scale, rings, barriers, i + 1, STAGES, TILE_N, P_LAYOUT, False
            )  # fmt: skip
        valid = gl.where(final == text_tiles, video_valid, gl.where(final == 0, text_valid, TILE_N))
        p, top, rescale, norm = _softmax(s, top, norm, valid, qk_scale, True)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
        stage = final % STAGES
        mbarrier.wait(v_full.index(stage), final // STAGES & 1)
        acc = warpgroup_mma(p, v_ring.index(stage), acc)
        mbarrier.arrive(v_empty.index(stage), count=1)

    found = norm > 0
    norm = gl.where(found, norm, 1.0)
    acc = acc * gl.convert_layout(1.0 / norm, gl.SliceLayout(1, O_LAYOUT))[:, None]
    # Through the memory of the queries, which are done with, into whole rows.
    q_smem.store(acc.to(DTYPE))
    at = out_ptr + b64 * out_stride_b + m64 * out_stride_m + (place * out_stride_s)[:, None] + d[None, :]
    gl.store(at, q_smem.load(IO_LAYOUT), mask=inside)
    position = start + group * ROWS + gl.arange(0, ROWS, ROW)
    place = places(position, of_text, token_major, frames, inverse, frame, video_start, text_start)
    lse = gl.where(found, top + gl.log2(norm), float("inf"))
    at = lse_ptr + (b64 * heads + m64) * (video + text) + place
    gl.store(at, lse, mask=position < gl.where(of_text, text, video))


@gluon.jit(do_not_specialize=_SIZES + _FACTORS)
def _tile_sparse_specialised_kernel(
    k_rows, v_rows, k_packed, v_packed, q_ptr, out_ptr, lse_ptr, order_ptr, rows_ptr, tiles_ptr, length_ptr,
    k_row_b, k_row_m, k_column_m, v_row_b, v_row_m, v_column_m, packed_row_b, packed_row_m,
    q_stride_b, q_stride_m, q_stride_s, out_stride_b, out_stride_m, out_stride_s,
    batch, heads, frames, frame, text, video_start, text_start, inverse, scale,
    D: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T) v and lse = log2 of the softmax denominator, of all heads.

    One program computes a tile of 128 queries of one head. k_rows and v_rows are descriptors of matrices in which token
    s of head m and sample b is row b row_b + m row_m + s, from column m column_m on; k_packed and v_packed the same of
    the copies. Video and text are one walk. Tiles are loaded whole: what follows the end of the video or the valid text
    is multiplied by zero, and must be finite. Bytes and FLOPs as in the generic kernel.
    """
    DTYPE: gl.constexpr = k_rows.dtype
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    q_one = gl.allocate_shared_memory(DTYPE, [ROWS, D], Q_LAYOUT)
    q_two = gl.allocate_shared_memory(DTYPE, [ROWS, D], Q_LAYOUT)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_N, D], k_rows.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_N, D], v_rows.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    descriptors = (k_rows, v_rows, k_packed, v_packed)
    factors = (k_row_b, k_row_m, k_column_m, v_row_b, v_row_m, v_column_m, packed_row_b, packed_row_m)
    rings, barriers = (k_ring, v_ring), (k_full, k_empty, v_full, v_empty)
    tables = (order_ptr, rows_ptr, tiles_ptr, length_ptr)
    sizes = (batch, heads, frames, frame, text, video_start, text_start)
    pointers = (q_ptr, out_ptr, lse_ptr)
    strides = (q_stride_b, q_stride_m, q_stride_s, out_stride_b, out_stride_m, out_stride_s)
    shared = (rings, barriers, tables, sizes, inverse, scale)
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), q_one, shared, pointers, strides, D, TILE_N, STAGES)),
            (_multiply, (gl.constexpr(1), q_two, shared, pointers, strides, D, TILE_N, STAGES)),
            (_load_tiles, (descriptors, factors, shared, TILE_N, STAGES)),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS],
    )


def _descriptor(x: Tensor, keys: int) -> TensorDescriptor:
    """Tiles of `keys` rows of the matrix of a tensor [B, M, S, D]."""
    rows, block = rows_of(x), [keys, x.shape[-1]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor(x, rows.shape, [rows.stride, 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor, order: Tensor, rows: Tensor, tiles: Tensor,
    length: Tensor, layout: Layout, scale: float,
) -> None:  # fmt: skip
    """Launch the kernels: `out` and `lse` of all heads. Token-major heads take a copy of k and v."""
    (B, M, _, D), keys = q.shape, layout.tile[1]
    sizes = layout_sizes(layout, M)
    packed = pack(k, v, ids, rows, sizes)
    factors = (*rows_of(k).factors, *rows_of(v).factors, *rows_of(packed[0]).factors[:2])
    # Rows by rank: a program's first load has them all.
    ranked = rows.index_select(0, ids.index_select(0, order))
    _tile_sparse_specialised_kernel[(sum(layout.query_tiles) * M * B,)](
        *(_descriptor(x, keys) for x in (k, v, *packed)), q, out, lse, order, ranked, tiles, length, *factors,
        *q.stride()[:3], *out.stride()[:3], B, *sizes, scale,
        D=D, TILE_N=keys, STAGES=STAGES[D, keys], num_warps=4,
    )  # fmt: skip
