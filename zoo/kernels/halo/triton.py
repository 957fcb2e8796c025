"""Triton kernels of halo attention, then their launchers.

Maps are [B, H, W, C] with unit channel stride and are read in place: no window, halo or padding is ever copied.
Images are addressed in int64, pixels within an image in int32.

The position term is a matrix product. The rows of the two tables that a block can reach, N = w + side - 1 of each,
are stacked to a table [BLOCK_R, D], and q table^T holds every position logit of a query. A gather along the row turns
it into R [M, BLOCK_J]: one logit for each row of the window, one for each column, and a large negative number. Then

    logits = scale * (q k^T + R E^T),    E[n, j] = (j == row of key n) or (j == w + column of key n)

where a key that is to be left out takes the column of the large negative number as its row. The expansion costs
tensor cores, which idle otherwise, instead of two additions and a comparison for each logit. R is rounded to the
dtype of the inputs, as the probabilities are. Backward runs the same products the other way: ds E sums gradients over
the rows and the columns of the window.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._rows import load_rows, store_rows
from zoo.kernels.halo.reference import Geometry, block_grid

LOG2E = tl.constexpr(1.4426950408889634)
# Where the running maximum starts: far below every logit and far above the -1e30 of keys that are left out. A maximum
# among the latter would turn the rounding of their product with the scale, 1e22 and more, into an exponent.
LOWEST = tl.constexpr(-1e20)


@triton.jit
def _queries(block_row, block_col, tile, QH, QW, SIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of a block's queries: coordinates in the block, row and column on the map, whether on the map."""
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y = t // SIDE
    x = t - y * SIDE
    row, col = block_row * SIDE + y, block_col * SIDE + x
    return y, x, row, col, (t < SIDE * SIDE) & (row < QH) & (col < QW)


@triton.jit
def _expansion(y, x, dtype: tl.constexpr, WINDOW: tl.constexpr, BLOCK_J: tl.constexpr):
    """E [N, BLOCK_J] of keys at rows y and columns x of the window."""
    j = tl.arange(0, BLOCK_J)[None, :]
    return tl.where((j == y[:, None]) | (j == x[:, None] + WINDOW), 1.0, 0.0).to(dtype)


@triton.jit
def _window_tile(
    ptr, start, top, left, H, W, stride_h, stride_w, dtype: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, MASK_BORDER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N, DK], values [BLOCK_N, DV] and E of one head and the window with its corner at (top, left)."""
    n = start + tl.arange(0, BLOCK_N)
    y = n // WINDOW
    x = n - y * WINDOW
    row, col = top + y, left + x
    valid = n < WINDOW * WINDOW
    inside = valid & (row >= 0) & (row < H) & (col >= 0) & (col < W)
    offset = row * stride_h + col * stride_w
    k = load_rows(ptr, offset, inside, DK, BLOCK_DK, True)
    v = load_rows(ptr + DK, offset, inside, DV, BLOCK_DV, True)
    y = tl.where(inside if MASK_BORDER else valid, y, BLOCK_J - 1)
    return k, v, _expansion(y, x, dtype, WINDOW, BLOCK_J)


@triton.jit
def _table(
    height_ptr, width_ptr, SIDE: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] reachable rows of height_rel, then those of width_rel, then zeros."""
    N: tl.constexpr = WINDOW + SIDE - 1
    r = tl.arange(0, BLOCK_R)
    offset = (WINDOW - SIDE + r) * D
    rows = load_rows(height_ptr, offset, r < N, D, BLOCK_D, True)
    cols = load_rows(width_ptr, offset - N * D, (r >= N) & (r < 2 * N), D, BLOCK_D, True)
    return tl.where((r < N)[:, None], rows, cols)


@triton.jit
def _relative(
    q, table, y, x, factor, SIDE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """R [M, BLOCK_J] of queries at (y, x) of their block: factor * position logits by row and by column."""
    N: tl.constexpr = WINDOW + SIDE - 1
    products = tl.dot(q, tl.trans(table), input_precision="ieee") * factor  # [M, BLOCK_R]
    j = tl.arange(0, BLOCK_J)[None, :]
    index = tl.where(j < WINDOW, j - y[:, None], N - WINDOW + j - x[:, None]) + (SIDE - 1)
    index = tl.minimum(tl.maximum(index, 0), BLOCK_R - 1)  # of queries past the end and of unused columns
    # An infinity would turn the zeros of E into NaN; float16 has one at logits of some thousands.
    relative = tl.minimum(tl.maximum(tl.gather(products, index, 1), MASKED), -MASKED)
    return tl.where(j < 2 * WINDOW, relative, MASKED).to(q.dtype)


@triton.jit
def _relative_gradient(
    dr, y, x, SIDE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Transpose of the gather in `_relative`: [M, BLOCK_J] -> [M, BLOCK_R]."""
    N: tl.constexpr = WINDOW + SIDE - 1
    r = tl.arange(0, BLOCK_R)[None, :]
    key = tl.where(r < N, r + y[:, None], r - N + x[:, None]) - (SIDE - 1)  # row or column of the window
    valid = (key >= 0) & (key < WINDOW) & (r < 2 * N)
    index = tl.where(valid, tl.where(r < N, key, key + WINDOW), 0)
    return tl.where(valid, tl.gather(dr, index, 1), 0.0)


@triton.jit
def _again(x, i, size):
    """x, which the compiler takes to depend on i; `size` is below 2**30.

    Indices of a gather are cheap to compute and would occupy a register for each row if they were kept from one head
    to the next: enough to spill.
    """
    return x + (size >> 30) * i


_SIZES = ["QH", "QW", "H", "W", "rows", "cols", "chunk", "tiles"]


@triton.jit
def _softmax_step(q, relative, k, v, expansion, top, norm, acc, qk_scale):
    """Take a tile of keys into the running maximum, denominator and weighted sum."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = tl.dot(relative, tl.trans(expansion), s, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    new_top = tl.maximum(top, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    norm = norm * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_top, norm, acc


@triton.jit(do_not_specialize=_SIZES)
def _halo_forward_kernel(
    q_ptr, kv_ptr, height_ptr, width_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, QH, QW, H, W, rows, cols, scale, factor,
    HEADS: tl.constexpr, LOOP: tl.constexpr, UNROLL: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr,
    MASK_BORDER: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T + position) v, and lse = log2 of the softmax denominator.

    One program computes BLOCK_M queries of one block and LOOP heads over all keys of the window, BLOCK_N at a time and
    the last ones in a smaller tile of TAIL. UNROLL writes the key tiles out, so that what does not depend on the head
    (E, addresses, masks) is computed once for all heads; otherwise tiles are loaded ahead of their use. Bytes: q and
    kv read and out written once from HBM, kv (w / b)^2 times from L2. FLOPs a query and head: 2 w^2 (DK + DV +
    BLOCK_J) and w^2 exponentials, where unfolding writes and reads three matrices of w^2 logits a query.
    """
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    FULL: tl.constexpr = WINDOW * WINDOW // BLOCK_N * BLOCK_N
    TILES: tl.constexpr = (SIDE * SIDE + BLOCK_M - 1) // BLOCK_M
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) % (HEADS // LOOP)
    tile = tl.program_id(0) // (HEADS // LOOP)
    block_row, block_col = tile // TILES // cols, tile // TILES % cols
    top_row, left_col = block_row * BLOCK - HALO, block_col * BLOCK - HALO

    y, x, row, col, inside = _queries(block_row, block_col, tile % TILES, QH, QW, SIDE, BLOCK_M)
    position = row * QW + col
    table = _table(height_ptr, width_ptr, SIDE, WINDOW, DK, BLOCK_DK, BLOCK_R)
    for i in tl.range(0, LOOP):
        head = group * LOOP + i
        q = load_rows(
            q_ptr + b * q_stride_b + head * DK, row * q_stride_h + col * q_stride_w, inside, DK, BLOCK_DK, True
        )
        relative = _relative(
            q, table, _again(y, i, QH), _again(x, i, QH), factor, SIDE, WINDOW, MASKED, BLOCK_J, BLOCK_R
        )
        head_ptr = kv_ptr + b * kv_stride_b + head * (DK + DV)
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if UNROLL:
            for start in tl.static_range(0, FULL, BLOCK_N):
                k, v, expansion = _window_tile(
                    head_ptr, start, top_row, left_col, H, W, kv_stride_h, kv_stride_w, q.dtype,
                    DK, DV, BLOCK_DK, BLOCK_DV, WINDOW, MASK_BORDER, BLOCK_N, BLOCK_J,
                )  # fmt: skip
                top, norm, acc = _softmax_step(q, relative, k, v, expansion, top, norm, acc, scale * LOG2E)
        else:
            for start in tl.range(0, FULL, BLOCK_N):
                k, v, expansion = _window_tile(
                    head_ptr, start, top_row, left_col, H, W, kv_stride_h, kv_stride_w, q.dtype,
                    DK, DV, BLOCK_DK, BLOCK_DV, WINDOW, MASK_BORDER, BLOCK_N, BLOCK_J,
                )  # fmt: skip
                top, norm, acc = _softmax_step(q, relative, k, v, expansion, top, norm, acc, scale * LOG2E)
        if TAIL > 0:
            k, v, expansion = _window_tile(
                head_ptr, FULL, top_row, left_col, H, W, kv_stride_h, kv_stride_w, q.dtype,
                DK, DV, BLOCK_DK, BLOCK_DV, WINDOW, MASK_BORDER, TAIL, BLOCK_J,
            )  # fmt: skip
            top, norm, acc = _softmax_step(q, relative, k, v, expansion, top, norm, acc, scale * LOG2E)
        store_rows(
            out_ptr + b * QH * QW * (HEADS * DV) + head * DV, acc / norm[:, None], position * (HEADS * DV), inside,
            DV, BLOCK_DV,
        )  # fmt: skip
        tl.store(lse_ptr + (b * HEADS + head) * QH * QW + position, top + tl.log2(norm), mask=inside)


@triton.jit
def _dq_step(q, relative, do, lse, delta, k, v, expansion, dq, dr, qk_scale):
    """Add what a tile of keys contributes to ds k and to ds E."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = tl.dot(relative, tl.trans(expansion), s, input_precision="ieee")
    p = tl.exp2(s * qk_scale - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee"), tl.dot(ds, expansion, dr, input_precision="ieee")


@triton.jit(do_not_specialize=_SIZES)
def _halo_dq_kernel(
    q_ptr, kv_ptr, height_ptr, width_ptr, out_ptr, lse_ptr, grad_ptr, delta_ptr, relative_ptr, dq_ptr, dtable_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, QH, QW, H, W, rows, cols, scale, factor,
    chunk, tiles,
    HEADS: tl.constexpr, LOOP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr,
    MASK_BORDER: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dq = scale * ds k + S table and a partial sum of dtable = S^T q, where S undoes the gather of ds E.

    ds = p (do v^T - delta), delta = rowsum(do out), p = exp2(logits - lse). One program computes LOOP heads of
    `chunk` consecutive tiles of queries, all images counted on, and sums the table gradient over them in registers;
    `_halo_sum_kernel` adds the programs, in a fixed order and without atomics. It also writes delta and R for the key
    and value gradients. FLOPs a query and head: 2 w^2 (2 DK + DV + 2 BLOCK_J).
    """
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    FULL: tl.constexpr = WINDOW * WINDOW // BLOCK_N * BLOCK_N
    TILES: tl.constexpr = (SIDE * SIDE + BLOCK_M - 1) // BLOCK_M
    group = tl.program_id(0) % (HEADS // LOOP)
    first = (tl.program_id(0) // (HEADS // LOOP)) * chunk
    table = _table(height_ptr, width_ptr, SIDE, WINDOW, DK, BLOCK_DK, BLOCK_R)
    dtable = tl.zeros([BLOCK_R, BLOCK_DK], tl.float32)
    for i in tl.range(0, tl.minimum(chunk, tiles - first) * LOOP):
        tile = first + i // LOOP
        head = group * LOOP + i % LOOP
        b = (tile // (rows * cols * TILES)).to(tl.int64)
        block = tile // TILES % (rows * cols)
        block_row, block_col = block // cols, block % cols
        top_row, left_col = block_row * BLOCK - HALO, block_col * BLOCK - HALO

        y, x, row, col, inside = _queries(block_row, block_col, tile % TILES, QH, QW, SIDE, BLOCK_M)
        position = row * QW + col
        q = load_rows(
            q_ptr + b * q_stride_b + head * DK, row * q_stride_h + col * q_stride_w, inside, DK, BLOCK_DK, True
        )
        out_base = b * QH * QW * (HEADS * DV) + head * DV
        out = load_rows(out_ptr + out_base, position * (HEADS * DV), inside, DV, BLOCK_DV, True)
        do = load_rows(grad_ptr + out_base, position * (HEADS * DV), inside, DV, BLOCK_DV, True)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        stat = (b * HEADS + head) * QH * QW
        tl.store(delta_ptr + stat + position, delta, mask=inside)
        lse = tl.load(lse_ptr + stat + position, mask=inside, other=0.0)
        relative = _relative(
            q, table, _again(y, i, QH), _again(x, i, QH), factor, SIDE, WINDOW, MASKED, BLOCK_J, BLOCK_R
        )
        store_rows(relative_ptr + stat * BLOCK_J, relative, position * BLOCK_J, inside, BLOCK_J, BLOCK_J)

        head_ptr = kv_ptr + b * kv_stride_b + head * (DK + DV)
        dq = tl.zeros([BLOCK_M, BLOCK_DK], tl.float32)
        dr = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
        for start in tl.range(0, FULL, BLOCK_N):
            k, v, expansion = _window_tile(
                head_ptr, start, top_row, left_col, H, W, kv_stride_h, kv_stride_w, q.dtype,
                DK, DV, BLOCK_DK, BLOCK_DV, WINDOW, MASK_BORDER, BLOCK_N, BLOCK_J,
            )  # fmt: skip
            dq, dr = _dq_step(q, relative, do, lse, delta, k, v, expansion, dq, dr, scale * LOG2E)
        if TAIL > 0:
            k, v, expansion = _window_tile(
                head_ptr, FULL, top_row, left_col, H, W, kv_stride_h, kv_stride_w, q.dtype,
                DK, DV, BLOCK_DK, BLOCK_DV, WINDOW, MASK_BORDER, TAIL, BLOCK_J,
            )  # fmt: skip
            dq, dr = _dq_step(q, relative, do, lse, delta, k, v, expansion, dq, dr, scale * LOG2E)

        y, x = _again(y, i, QH), _again(x, i, QH)
        dproducts = _relative_gradient(dr * (scale * factor), y, x, SIDE, WINDOW, BLOCK_J, BLOCK_R).to(q.dtype)
        dq = tl.dot(dproducts, table, dq * scale, input_precision="ieee")
        dtable = tl.dot(tl.trans(dproducts), q, dtable, input_precision="ieee")
        store_rows(dq_ptr + b * QH * QW * (HEADS * DK) + head * DK, dq, position * (HEADS * DK), inside, DK, BLOCK_DK)

    REACHED: tl.constexpr = 2 * (WINDOW + SIDE - 1)
    r = tl.arange(0, BLOCK_R)
    store_rows(
        dtable_ptr + tl.program_id(0).to(tl.int64) * (REACHED * DK), dtable, r * DK, r < REACHED, DK, BLOCK_DK
    )  # fmt: skip


@triton.jit
def _first_block(pixel, BLOCK: tl.constexpr, HALO: tl.constexpr):
    """First block whose window reaches a row (or column) of pixels, -BLOCK < pixel."""
    SHIFT: tl.constexpr = HALO // BLOCK + 2  # keeps the dividend positive
    return tl.maximum((pixel - HALO + SHIFT * BLOCK) // BLOCK - SHIFT, 0)


@triton.jit(do_not_specialize=_SIZES)
def _halo_dkv_kernel(
    q_ptr, kv_ptr, lse_ptr, grad_ptr, delta_ptr, relative_ptr, dkv_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, QH, QW, H, W, rows, cols, scale, factor,
    HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dv = p^T do and dk = scale * ds^T q, summed over the blocks whose window holds a key.

    One program owns BLOCK_N keys of one head and of a square of BLOCK x BLOCK pixels, and walks over the queries of
    the blocks that see the square. Squares lie SHIFT pixels above and left of the blocks: with half a block and a
    halo of at most half a block, four blocks see a square (nine would see a block). The order is fixed and no atomics
    are used, so the result is the same in every run. FLOPs a key and head: 8 side^2 (2 DK + 2 DV + BLOCK_J).
    """
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    TILES: tl.constexpr = (SIDE * SIDE + BLOCK_M - 1) // BLOCK_M
    PARTS: tl.constexpr = (BLOCK * BLOCK + BLOCK_N - 1) // BLOCK_N
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    square = tl.program_id(0) // HEADS // PARTS
    square_cols = (W + SHIFT + BLOCK - 1) // BLOCK
    top_row = square // square_cols * BLOCK - SHIFT
    left_col = square % square_cols * BLOCK - SHIFT

    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    k_row, k_col = top_row + n // BLOCK, left_col + n % BLOCK
    k_inside = (n < BLOCK * BLOCK) & (k_row >= 0) & (k_row < H) & (k_col >= 0) & (k_col < W)
    k_offset = k_row * kv_stride_h + k_col * kv_stride_w
    head_ptr = kv_ptr + b * kv_stride_b + head * (DK + DV)
    k = load_rows(head_ptr, k_offset, k_inside, DK, BLOCK_DK, True)
    v = load_rows(head_ptr + DK, k_offset, k_inside, DV, BLOCK_DV, True)

    first_row, first_col = _first_block(top_row, BLOCK, HALO), _first_block(left_col, BLOCK, HALO)
    seen_cols = tl.minimum((left_col + BLOCK - 1 + HALO) // BLOCK, cols - 1) - first_col + 1
    seen_rows = tl.minimum((top_row + BLOCK - 1 + HALO) // BLOCK, rows - 1) - first_row + 1
    stat = (b * HEADS + head) * QH * QW
    dk = tl.zeros([BLOCK_N, BLOCK_DK], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i in tl.range(0, seen_rows * seen_cols * TILES):
        block = i // TILES
        block_row, block_col = first_row + block // seen_cols, first_col + block % seen_cols
        y, x, row, col, inside = _queries(block_row, block_col, i % TILES, QH, QW, SIDE, BLOCK_M)
        position = row * QW + col
        q = load_rows(
            q_ptr + b * q_stride_b + head * DK, row * q_stride_h + col * q_stride_w, inside, DK, BLOCK_DK, True
        )
        out_base = b * QH * QW * (HEADS * DV) + head * DV
        do = load_rows(grad_ptr + out_base, position * (HEADS * DV), inside, DV, BLOCK_DV, True)
        relative = load_rows(relative_ptr + stat * BLOCK_J, position * BLOCK_J, inside, BLOCK_J, BLOCK_J, True)
        lse = tl.load(lse_ptr + stat + position, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + stat + position, mask=inside, other=0.0)

        ky, kx = k_row - block_row * BLOCK + HALO, k_col - block_col * BLOCK + HALO
        seen = k_inside & (ky >= 0) & (ky < WINDOW) & (kx >= 0) & (kx < WINDOW)
        expansion = _expansion(tl.where(seen, ky, BLOCK_J - 1), kx, q.dtype, WINDOW, BLOCK_J)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        s = tl.dot(expansion, tl.trans(relative), s, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        # Queries off the map load zeros, which add nothing.
        p = tl.exp2(s * (scale * LOG2E) - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dkv_ptr += b * H * W * (HEADS * (DK + DV)) + head * (DK + DV)
    offset = (k_row * W + k_col) * (HEADS * (DK + DV))
    store_rows(dkv_ptr, dk * scale, offset, k_inside, DK, BLOCK_DK)
    store_rows(dkv_ptr + DK, dv, offset, k_inside, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["parts"])
def _halo_sum_kernel(
    dtable_ptr, dheight_ptr, dwidth_ptr, parts, SIDE: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of a row of a table's gradient: the sum of its partial sums [parts, 2 * N, D], or zero.

    No block reaches the first rows of a table.
    """
    N: tl.constexpr = WINDOW + SIDE - 1
    row = tl.program_id(0)
    reached = row - (WINDOW - SIDE)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dtable_ptr += (tl.program_id(1) * N + reached) * D
    for start in range(0, tl.where(reached < 0, 0, parts), BLOCK_P):
        at = (start + p).to(tl.int64)
        mask = (at < parts)[:, None] & (d < D)[None, :]
        total += tl.load(dtable_ptr + at[:, None] * (2 * N * D) + d[None, :], mask=mask, other=0.0)
    out_ptr = dheight_ptr if tl.program_id(1) == 0 else dwidth_ptr
    tl.store(out_ptr + row * D + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)


# Programs of the query gradient, each of which leaves a partial sum of the table gradients.
MAX_PARTS = 2048
# Programs that fill a GPU; below, heads are spread over programs rather than looped over.
MIN_PROGRAMS = 1024
# Key tiles that a kernel writes out.
MAX_UNROLL = 6


class Plan(NamedTuple):
    """What the launches of one problem share, computed once for its sizes and strides."""

    sizes: tuple  # the arguments after the pointers
    work: tuple[int, int]  # tiles of queries in a program of the query gradient, and in all
    relative: int  # width of R
    table: tuple[int, ...]  # partial sums of the table gradients
    launches: dict[str, tuple[tuple[int, ...], dict]]  # grid and configuration by kernel


def _tile(n: int, limit: int = 1024) -> int:
    return min(limit, max(16, triton.next_power_of_2(n)))


def _heads_per_program(heads: int, tiles: int) -> int:
    """The most heads that one program can loop over while enough programs remain."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or tiles * heads // n >= MIN_PROGRAMS))


def _config(kernel: str, geometry: Geometry, block_d: int, dtype: torch.dtype) -> dict:
    """Tiles, warps and stages of a kernel at head dimensions up to block_d: such that registers do not spill."""
    queries, keys = geometry.side**2, (geometry.block if kernel == "dkv" else geometry.window) ** 2
    wide, full = block_d > 32, dtype == torch.float32
    block_m = _tile(queries, 32 if kernel == "dkv" and wide else 64)
    block_n = _tile(keys, 32 if full or (kernel == "dq" and wide) else 64)
    config = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_stages=2)
    if kernel != "dkv":
        config["TAIL"] = _tile(keys % block_n) if keys % block_n else 0
    if kernel == "forward":
        config["UNROLL"] = not wide and not full and triton.cdiv(keys, block_n) <= MAX_UNROLL
    own = block_n if kernel == "dkv" else block_m
    return dict(config, num_warps=(4 if own > 16 else 2) * (2 if full or block_d == 128 else 1))


@functools.lru_cache(maxsize=256)
def plan(
    q_shape: tuple, q_stride: tuple, kv_shape: tuple, kv_stride: tuple, geometry: Geometry,
    scale: float, scale_position: bool, mask_border: bool, dtype: torch.dtype,
) -> Plan:  # fmt: skip
    """Choose tiles, configurations and grids."""
    B, QH, QW, C = q_shape
    H, W = kv_shape[1:3]
    heads, block, halo, _ = geometry
    side, window = geometry.side, geometry.window
    rows, cols = block_grid((H, W), block)
    DK, DV = C // heads, (kv_shape[3] - C) // heads
    sizes = (*q_stride[:3], *kv_stride[:3], QH, QW, H, W, rows, cols, scale, 1.0 if scale_position else 1.0 / scale)
    block_j, reached = _tile(2 * window + 1), 2 * (window + side - 1)
    meta = dict(
        HEADS=heads, DK=DK, DV=DV, BLOCK_DK=_tile(DK), BLOCK_DV=_tile(DV),
        SIDE=side, BLOCK=block, HALO=halo, BLOCK_J=block_j,
    )  # fmt: skip
    forward, dq, dkv = (_config(kernel, geometry, _tile(max(DK, DV)), dtype) for kernel in ("forward", "dq", "dkv"))
    tiles = rows * cols * triton.cdiv(side * side, forward["BLOCK_M"])  # of queries, the same in the query gradient
    loop = _heads_per_program(heads, B * tiles)
    groups = heads // loop
    masked = -6e4 if dtype == torch.float16 else -1e30
    walk = dict(meta, LOOP=loop, MASK_BORDER=mask_border, MASKED=masked, BLOCK_R=_tile(reached))
    chunk = triton.cdiv(B * tiles * groups, MAX_PARTS)
    programs = triton.cdiv(B * tiles, chunk) * groups
    # Squares of keys that lie across blocks are seen by four blocks while the halo is at most half a block.
    shift = block // 2 if 0 < halo <= block // 2 else 0
    square_rows, square_cols = block_grid((H + shift, W + shift), block)
    squares = square_rows * square_cols * triton.cdiv(block * block, dkv["BLOCK_N"])
    total = dict(SIDE=side, WINDOW=window, D=DK, BLOCK_D=16, BLOCK_P=min(512, _tile(programs)), num_warps=8)
    launches = {
        "forward": ((tiles * groups, B), {**walk, **forward}),
        "dq": ((programs, 1), {**walk, **dq}),
        "dkv": ((squares * heads, B), {**meta, **dkv, "SHIFT": shift}),
        "sum": ((2 * window - 1, 2, triton.cdiv(DK, 16)), total),
    }
    return Plan(sizes, (chunk, B * tiles), block_j, (programs, reached, DK), launches)


def _prepare(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border) -> tuple:
    """Tensors as the kernels take them, and their plan."""
    q, kv = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, kv))
    chosen = plan(
        q.shape, q.stride(), kv.shape, kv.stride(), geometry, scale, scale_position, mask_border, q.dtype
    )  # fmt: skip
    return q, kv, height_rel.contiguous(), width_rel.contiguous(), chosen


def forward(
    q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, geometry: Geometry,
    scale: float, scale_position: bool, mask_border: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel: out [B, QH, QW, M*dv] and log2-sum-exp [B, M, QH, QW]."""
    size = q.shape[:3]
    out = torch.empty((*size, kv.shape[-1] - q.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((size[0], geometry.heads, *size[1:]), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    *inputs, p = _prepare(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border)
    grid, config = p.launches["forward"]
    _halo_forward_kernel[grid](*inputs, out, lse, *p.sizes, **config)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, out: Tensor, lse: Tensor,
    geometry: Geometry, scale: float, scale_position: bool, mask_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: gradients of q, kv and the tables, contiguous and in the dtype of q."""
    dq, dkv, dheight, dwidth = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv, height_rel, width_rel)
    )  # fmt: skip
    if out.numel() == 0:
        return dq, dkv.zero_(), dheight.zero_(), dwidth.zero_()
    q, kv, height_rel, width_rel, p = _prepare(
        q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border
    )  # fmt: skip
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    relative = torch.empty((*lse.shape, p.relative), dtype=q.dtype, device=q.device)
    dtable = torch.empty(p.table, dtype=torch.float32, device=q.device)
    grid, config = p.launches["dq"]
    _halo_dq_kernel[grid](
        q, kv, height_rel, width_rel, out, lse, grad, delta, relative, dq, dtable, *p.sizes, *p.work, **config
    )  # fmt: skip
    grid, config = p.launches["dkv"]
    _halo_dkv_kernel[grid](q, kv, lse, grad, delta, relative, dkv, *p.sizes, **config)
    grid, config = p.launches["sum"]
    _halo_sum_kernel[grid](dtable, dheight, dwidth, p.table[0], **config)
    return dq, dkv, dheight, dwidth
