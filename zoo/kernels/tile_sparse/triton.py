"""Triton kernels of pattern sparse attention, then their launchers.

One launch serves all heads of a layer, whatever their patterns. A program owns a tile of one head and reads the head's
pattern from a table: a band walks a contiguous range of tiles on the other side, a stripe a list of key tiles, and both
then walk the text. Tokens are counted by position in the order of the pattern, video and text apart. In token-major
order position t lies at place (t mod F) * n + t div F, which costs no copy: a row of a head is 2 * D contiguous bytes
wherever it lies. With F = 1 the same formula is the identity, so no head takes a branch.

Only tiles that end before their size need a mask: the last one of the video, and those of the text. Tiles of text are
the heaviest, as they see the whole sequence, and start first; then heads by the number of their tiles. Batch and head
are addressed in int64, places within a head in int32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._rows import load_rows, store_rows
from zoo.kernels.tile_sparse import hopper
from zoo.kernels.tile_sparse.patterns import MULTI_DIAGONAL, SKIP, STRIPE, Layout, PatternTable
from zoo.kernels.tile_sparse.reference import empty_output
from zoo.kernels.tile_sparse.triton_fp8 import round_keys, to_fp8
from zoo.kernels.tile_sparse.triton_walk import LOG2E, load_pattern, own_tile, places, reach

# A width that no two positions are apart.
ALL = tl.constexpr(2**30)
_SKIP, _MULTI_DIAGONAL, _STRIPE = tl.constexpr(SKIP), tl.constexpr(MULTI_DIAGONAL), tl.constexpr(STRIPE)
_SIZES = ["heads", "frames", "frame", "text", "video_start", "text_start"]


@triton.jit
def _key_walk(
    start, of_text, kind, width, first, count, tiles_ptr, video, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles of a tile of queries: range of the walk in steps of BLOCK_N, whether through the list, masked steps.

    The latter cover the tile that ends with the video short of its size, which is left out of the range.
    """
    STEPS: tl.constexpr = TILE_N // BLOCK_N
    listed = (kind == _STRIPE) & (of_text == 0)
    low, end = reach(start, width, video - 1, TILE_M, TILE_N)
    low = tl.where(listed, first, low)
    end = tl.where(listed, first + count, end)
    end = tl.where(kind == _SKIP, low, end)
    filled = end > low
    final = tl.load(tiles_ptr + end - 1, mask=listed & filled, other=0)
    short = filled & (tl.where(listed, final, end - 1) >= video // TILE_N)
    masked = tl.where(short, tl.cdiv(video % TILE_N, BLOCK_N), 0)
    return low * STEPS, (end - short.to(tl.int32)) * STEPS, listed, masked


@triton.jit
def _first_key(i, listed, tiles_ptr, TILE_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Position of the first key of step i of a walk."""
    STEPS: tl.constexpr = TILE_N // BLOCK_N
    tile = tl.load(tiles_ptr + i // STEPS, mask=listed, other=0)
    return tl.where(listed, tile * STEPS + i % STEPS, i) * BLOCK_N


@triton.jit
def _first_last_key(i, masked, video, TILE_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same of step i of the masked walk: video below 0, then text."""
    return i * BLOCK_N + tl.where(i < 0, video // TILE_N * TILE_N + masked * BLOCK_N, 0)


@triton.jit
def _pairs(q_position, k_position, width, columns_ptr, limit):
    """[M, N] bool: positions nearer than `width`, of the keys below `limit` only those of a stripe."""
    column = tl.load(columns_ptr + k_position, mask=k_position < limit, other=1)
    return (tl.abs(q_position[:, None] - k_position[None, :]) < width) & (column != 0)[None, :]


@triton.jit
def _softmax_step(q, k, v, keep, top, norm, acc, qk_scale, MASKED: tl.constexpr, BY_ROW: tl.constexpr):
    """Take a tile of keys into the running maximum, denominator and weighted sum; BY_ROW: a scale for each query."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * qk_scale)
    shift = new_top
    if MASKED:
        # A query can have met no key yet; subtracting -inf from -inf would give NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * (qk_scale[:, None] if BY_ROW else qk_scale) - shift[:, None])
    rescale = tl.exp2(top - shift)
    norm = norm * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
    return new_top, norm, acc


@triton.jit(do_not_specialize=_SIZES)
def _tile_sparse_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ids_ptr, order_ptr, rows_ptr, tiles_ptr, columns_ptr, length_ptr,
    k_scale_ptr, q_stride_b, q_stride_m, q_stride_s, k_stride_b, k_stride_m, k_stride_s, v_stride_b, v_stride_m, v_stride_s,
    out_stride_b, out_stride_m, out_stride_s, heads, frames, frame, text, video_start, text_start, inverse, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T) v over the keys of a pattern, and lse = log2 of the softmax denominator.

    One program computes BLOCK_M queries of one head, over the key tiles that the whole tile of TILE_M queries sees.
    Bytes of a program: its queries and outputs, and the walked keys and values, which neighbouring programs of the
    head share in L2. FLOPs: 4 BLOCK_M D for each walked key. Compute-bound at the lengths of videos at any useful
    density; a skipped head costs its stores.
    With FP8, keys are the rounded ones of `round_keys`, less their mean, and so lse is none that a backward pass could
    use.
    """
    video = frames * frame
    rank, start, of_text = own_tile(heads, video, text, BLOCK_M)
    head = tl.load(order_ptr + rank)
    kind, width, first, count, stripe = load_pattern(ids_ptr, rows_ptr, head)
    token_major = kind == _MULTI_DIAGONAL
    width = tl.where(of_text, video + text, width)
    b, m = tl.program_id(1).to(tl.int64), head.to(tl.int64)
    length = tl.load(length_ptr + b)
    columns_ptr += stripe.to(tl.int64) * video
    k_ptr += b * k_stride_b + m * k_stride_m
    v_ptr += b * v_stride_b + m * v_stride_m

    position = start + tl.arange(0, BLOCK_M)
    inside = position < tl.where(of_text, text, video)
    place = places(position, of_text, token_major, frames, inverse, frame, video_start, text_start)
    q = load_rows(q_ptr + b * q_stride_b + m * q_stride_m, place * q_stride_s, inside, D, BLOCK_D, True)

    if FP8:
        k_scale_ptr += (b * heads + m) * (tl.cdiv(video, TILE_N) + tl.cdiv(text, TILE_N))
        q = q.to(tl.float32)
        q, q_scale = to_fp8(q, tl.max(tl.abs(q), 1)[:, None])
        q = q.to(tl.float8e4nv)
        q_scale = tl.reshape(q_scale, [BLOCK_M]) * (scale * LOG2E)

    low, end, listed, masked = _key_walk(
        start, of_text, kind, width, first, count, tiles_ptr, video, TILE_M, TILE_N, BLOCK_N
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(low, end):
        key = _first_key(i, listed, tiles_ptr, TILE_N, BLOCK_N)
        n = key + tl.arange(0, BLOCK_N)
        at = places(n, False, token_major, frames, inverse, frame, video_start, text_start)
        k = load_rows(k_ptr, (n if FP8 else at) * k_stride_s, n >= 0, D, BLOCK_D, False)
        v = load_rows(v_ptr, at * v_stride_s, n >= 0, D, BLOCK_D, False)
        keep = _pairs(position, n, width, columns_ptr, tl.where(listed, video, 0)) if EXACT else True
        qk_scale = q_scale * tl.load(k_scale_ptr + key // TILE_N) if FP8 else scale * LOG2E
        top, norm, acc = _softmax_step(q, k, v, keep, top, norm, acc, qk_scale, EXACT, FP8)
    # The short tile at the end of the video, then the text.
    for i in tl.range(-masked, tl.where(kind == _SKIP, 0, tl.cdiv(length, BLOCK_N))):
        key = _first_last_key(i, masked, video, TILE_N, BLOCK_N)
        n = key + tl.arange(0, BLOCK_N)
        valid = n < tl.where(i < 0, video, length)
        at = places(n, i >= 0, token_major, frames, inverse, frame, video_start, text_start)
        # Rounded keys are in the order of the pattern, whole tiles of video before the text.
        skipped = tl.where(i < 0, 0, tl.cdiv(video, TILE_N))
        k = load_rows(k_ptr, (n + skipped * TILE_N if FP8 else at) * k_stride_s, valid, D, BLOCK_D, True)
        v = load_rows(v_ptr, at * v_stride_s, valid, D, BLOCK_D, True)
        keep = valid[None, :]
        if EXACT:
            limit = tl.where(listed & (i < 0), video, 0)
            keep = keep & _pairs(position, n, tl.where(i < 0, width, ALL), columns_ptr, limit)
        qk_scale = q_scale * tl.load(k_scale_ptr + key // TILE_N + skipped) if FP8 else scale * LOG2E
        top, norm, acc = _softmax_step(q, k, v, keep, top, norm, acc, qk_scale, True, FP8)

    found = norm > 0
    acc = acc / tl.where(found, norm, 1.0)[:, None]
    store_rows(out_ptr + b * out_stride_b + m * out_stride_m, acc, place * out_stride_s, inside, D, BLOCK_D)
    # Without a key, probabilities are to vanish in the backward pass.
    lse = tl.where(found, top + tl.log2(tl.where(found, norm, 1.0)), float("inf"))
    tl.store(lse_ptr + (b * heads + m) * (video + text) + place, lse, mask=inside)


@triton.jit
def _dq_step(q, k, v, do, lse, delta, keep, dq, qk_scale, MASKED: tl.constexpr):
    """Add ds k of a tile of keys."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    p = tl.exp2(s * qk_scale - lse[:, None])
    if MASKED:
        p = tl.where(keep, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="tf32x3")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")


@triton.jit(do_not_specialize=_SIZES)
def _tile_sparse_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    ids_ptr, order_ptr, rows_ptr, tiles_ptr, columns_ptr, length_ptr,
    q_stride_b, q_stride_m, q_stride_s, k_stride_b, k_stride_m, k_stride_s, v_stride_b, v_stride_m, v_stride_s,
    out_stride_b, out_stride_m, out_stride_s, grad_stride_b, grad_stride_m, grad_stride_s,
    dq_stride_b, dq_stride_m, dq_stride_s, heads, frames, frame, text, video_start, text_start, inverse, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = scale * ds k with ds = p (do v^T - delta), delta = rowsum(do out), p = exp2(logits - lse).

    The programs and walks of the forward kernel; also writes delta for the key and value gradients. FLOPs: 6 BLOCK_M D
    for each walked key.
    """
    video = frames * frame
    rank, start, of_text = own_tile(heads, video, text, BLOCK_M)
    head = tl.load(order_ptr + rank)
    kind, width, first, count, stripe = load_pattern(ids_ptr, rows_ptr, head)
    token_major = kind == _MULTI_DIAGONAL
    width = tl.where(of_text, video + text, width)
    b, m = tl.program_id(1).to(tl.int64), head.to(tl.int64)
    length = tl.load(length_ptr + b)
    columns_ptr += stripe.to(tl.int64) * video
    k_ptr += b * k_stride_b + m * k_stride_m
    v_ptr += b * v_stride_b + m * v_stride_m

    position = start + tl.arange(0, BLOCK_M)
    inside = position < tl.where(of_text, text, video)
    place = places(position, of_text, token_major, frames, inverse, frame, video_start, text_start)
    q = load_rows(q_ptr + b * q_stride_b + m * q_stride_m, place * q_stride_s, inside, D, BLOCK_D, True)
    do = load_rows(grad_ptr + b * grad_stride_b + m * grad_stride_m, place * grad_stride_s, inside, D, BLOCK_D, True)
    out = load_rows(out_ptr + b * out_stride_b + m * out_stride_m, place * out_stride_s, inside, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    stat = (b * heads + m) * (video + text) + place
    tl.store(delta_ptr + stat, delta, mask=inside)
    lse = tl.load(lse_ptr + stat, mask=inside, other=float("inf"))

    low, end, listed, masked = _key_walk(
        start, of_text, kind, width, first, count, tiles_ptr, video, TILE_M, TILE_N, BLOCK_N
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(low, end):
        n = _first_key(i, listed, tiles_ptr, TILE_N, BLOCK_N) + tl.arange(0, BLOCK_N)
        at = places(n, False, token_major, frames, inverse, frame, video_start, text_start)
        k = load_rows(k_ptr, at * k_stride_s, n >= 0, D, BLOCK_D, False)
        v = load_rows(v_ptr, at * v_stride_s, n >= 0, D, BLOCK_D, False)
        keep = _pairs(position, n, width, columns_ptr, tl.where(listed, video, 0)) if EXACT else True
        dq = _dq_step(q, k, v, do, lse, delta, keep, dq, scale * LOG2E, EXACT)
    for i in tl.range(-masked, tl.where(kind == _SKIP, 0, tl.cdiv(length, BLOCK_N))):
        n = _first_last_key(i, masked, video, TILE_N, BLOCK_N) + tl.arange(0, BLOCK_N)
        valid = n < tl.where(i < 0, video, length)
        at = places(n, i >= 0, token_major, frames, inverse, frame, video_start, text_start)
        k = load_rows(k_ptr, at * k_stride_s, valid, D, BLOCK_D, True)
        v = load_rows(v_ptr, at * v_stride_s, valid, D, BLOCK_D, True)
        keep = valid[None, :]
        if EXACT:
            limit = tl.where(listed & (i < 0), video, 0)
            keep = keep & _pairs(position, n, tl.where(i < 0, width, ALL), columns_ptr, limit)
        dq = _dq_step(q, k, v, do, lse, delta, keep, dq, scale * LOG2E, True)
    store_rows(dq_ptr + b * dq_stride_b + m * dq_stride_m, dq * scale, place * dq_stride_s, inside, D, BLOCK_D)


@triton.jit
def _query_walk(
    start, of_text, kind, width, seen, video, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Video queries of a tile of keys: positions of the walk in steps of BLOCK_M, and whether a short step ends it."""
    low, end = reach(start, width, video - 1, TILE_N, TILE_M)
    end = tl.where((kind == _SKIP) | (seen == 0), low, end)
    filled = end > low
    low, end = low * TILE_M, end * TILE_M
    whole = video // BLOCK_M * BLOCK_M
    return low, tl.minimum(end, tl.maximum(whole, low)), filled & (tl.minimum(end, video) > whole)


@triton.jit
def _dkv_step(k, v, q, do, lse, delta, keep, dk, dv, qk_scale, MASKED: tl.constexpr):
    """Add p^T do and ds^T q of a tile of queries."""
    s = tl.dot(k, tl.trans(q), input_precision="tf32x3")  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(s * qk_scale - lse[None, :])
    if MASKED:
        p = tl.where(keep, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="tf32x3")
    dp = tl.dot(v, tl.trans(do), input_precision="tf32x3")
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3"), dv


@triton.jit(do_not_specialize=_SIZES)
def _tile_sparse_dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    ids_ptr, order_ptr, rows_ptr, columns_ptr, length_ptr,
    q_stride_b, q_stride_m, q_stride_s, k_stride_b, k_stride_m, k_stride_s, v_stride_b, v_stride_m, v_stride_s,
    grad_stride_b, grad_stride_m, grad_stride_s, dk_stride_b, dk_stride_m, dk_stride_s,
    dv_stride_b, dv_stride_m, dv_stride_s, heads, frames, frame, text, video_start, text_start, inverse, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv = p^T do and dk = scale * ds^T q, summed over the queries that see a key.

    One program owns BLOCK_N keys of one head and walks, BLOCK_M at a time, over the queries that see the whole tile of
    TILE_N keys. These are a contiguous range for every pattern: bands are symmetric, and a tile of a stripe is seen by
    all queries, any other by those of the text. Sums are of fixed order, without atomics. FLOPs: 8 BLOCK_N D for each
    walked query.
    """
    video = frames * frame
    rank, start, of_text = own_tile(heads, video, text, BLOCK_N)
    head = tl.load(order_ptr + rank)
    kind, width, first, count, stripe = load_pattern(ids_ptr, rows_ptr, head)
    token_major = kind == _MULTI_DIAGONAL
    width = tl.where(of_text, video + text, width)
    b, m = tl.program_id(1).to(tl.int64), head.to(tl.int64)
    length = tl.load(length_ptr + b)
    columns_ptr += stripe.to(tl.int64) * video
    q_ptr += b * q_stride_b + m * q_stride_m
    grad_ptr += b * grad_stride_b + m * grad_stride_m
    stat = (b * heads + m) * (video + text)

    position = start + tl.arange(0, BLOCK_N)
    valid = position < tl.where(of_text, length, video)
    place = places(position, of_text, token_major, frames, inverse, frame, video_start, text_start)
    k = load_rows(k_ptr + b * k_stride_b + m * k_stride_m, place * k_stride_s, valid, D, BLOCK_D, True)
    v = load_rows(v_ptr + b * v_stride_b + m * v_stride_m, place * v_stride_s, valid, D, BLOCK_D, True)

    listed = (kind == _STRIPE) & (of_text == 0)
    tile = start // TILE_N * TILE_N + tl.arange(0, TILE_N)
    limit = tl.where(listed, video, 0)
    seen = tl.max(tl.load(columns_ptr + tile, mask=tile < limit, other=0), 0)
    seen = tl.where(listed, seen, 1)
    column = tl.load(columns_ptr + position, mask=position < limit, other=1)
    low, end, short = _query_walk(start, of_text, kind, width, seen, video, TILE_M, TILE_N, BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in tl.range(low, end, BLOCK_M):
        t = i + tl.arange(0, BLOCK_M)
        at = places(t, False, token_major, frames, inverse, frame, video_start, text_start)
        q = load_rows(q_ptr, at * q_stride_s, t >= 0, D, BLOCK_D, False)
        do = load_rows(grad_ptr, at * grad_stride_s, t >= 0, D, BLOCK_D, False)
        lse, delta = tl.load(lse_ptr + stat + at), tl.load(delta_ptr + stat + at)
        keep = (tl.abs(position[:, None] - t[None, :]) < width) & (column > 0)[:, None] if EXACT else True
        dk, dv = _dkv_step(k, v, q, do, lse, delta, keep, dk, dv, scale * LOG2E, EXACT)
    # The queries at the end of the video that fill no step, then those of the text.
    for i in tl.range(tl.where(short, 0, 1), tl.where(kind == _SKIP, 0, 1 + tl.cdiv(text, BLOCK_M))):
        t = tl.where(i == 0, video // BLOCK_M, i - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = t < tl.where(i == 0, video, text)
        at = places(t, i > 0, token_major, frames, inverse, frame, video_start, text_start)
        q = load_rows(q_ptr, at * q_stride_s, inside, D, BLOCK_D, True)
        do = load_rows(grad_ptr, at * grad_stride_s, inside, D, BLOCK_D, True)
        # An infinite denominator takes queries past the end out.
        lse = tl.load(lse_ptr + stat + at, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + stat + at, mask=inside, other=0.0)
        keep = True
        if EXACT:
            near = tl.abs(position[:, None] - t[None, :]) < tl.where(i == 0, width, ALL)
            keep = near & (column + i > 0)[:, None]
        dk, dv = _dkv_step(k, v, q, do, lse, delta, keep, dk, dv, scale * LOG2E, EXACT)

    # Padded text keys get a gradient of zero.
    inside = position < tl.where(of_text, text, video)
    dk = tl.where(valid[:, None], dk * scale, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    store_rows(dk_ptr + b * dk_stride_b + m * dk_stride_m, dk, place * dk_stride_s, inside, D, BLOCK_D)
    store_rows(dv_ptr + b * dv_stride_b + m * dv_stride_m, dv, place * dv_stride_s, inside, D, BLOCK_D)


class Plan(NamedTuple):
    """What the launches of one layout and dtype share."""

    sizes: tuple  # layout arguments after the strides
    programs: dict[str, int]  # tiles of a head by kernel
    configs: dict[str, dict]


def _config(kernel: str, tile: tuple[int, int], block_d: int, dtype: torch.dtype) -> dict:
    """Blocks, warps and stages of a kernel: such that registers do not spill, and the fastest tried on an H100."""
    wide, full = block_d > 64, dtype == torch.float32
    # Queries and keys of a step, by kernel and whether in float32.
    limits = {
        ("forward", False): (128, 64),
        ("fp8", False): (128, 64),
        ("forward", True): (64, 32) if not wide else (32, 32),
        ("fp8", True): (64, 32) if not wide else (32, 32),
        ("dq", False): (128, 64) if not wide else (64, 64),
        ("dq", True): (32, 32),
        ("dkv", False): (64, 64),
        ("dkv", True): (32, 32),
    }[kernel, full]
    block_m, block_n = min(tile[0], limits[0]), min(tile[1], limits[1])
    warps = 8 if (block_m >= 128 and kernel != "forward") or (wide and (full or block_m >= 64)) else 4
    if block_m == 16 and not wide:
        warps = 1
    stages = 1 if full and wide and kernel in ("dq", "dkv") else 2
    return dict(
        TILE_M=tile[0], TILE_N=tile[1], BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def plan(layout: Layout, head_dim: int, dtype: torch.dtype, scale: float, fp8: bool = False) -> Plan:
    """Choose blocks, configurations and grids."""
    video_start, text_start = (layout.text, 0) if layout.text_first else (0, layout.video)
    frames = layout.grid[0]
    sizes = (frames, layout.frame, layout.text, video_start, text_start, 1.0 / frames, scale)
    # A product in FP8 takes 32 channels at least.
    block_d = max(32 if fp8 else 16, triton.next_power_of_2(head_dim))
    programs, configs = {}, {}
    for kernel in ("forward", "dq", "dkv"):
        config = _config("fp8" if fp8 and kernel == "forward" else kernel, layout.tile, block_d, dtype)
        block = config["BLOCK_N" if kernel == "dkv" else "BLOCK_M"]
        programs[kernel] = triton.cdiv(layout.video, block) + triton.cdiv(layout.text, block)
        configs[kernel] = dict(D=head_dim, BLOCK_D=block_d, EXACT=layout.granularity == "element", **config)
    return Plan(sizes, programs, configs)


def _unit_channels(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _tables(
    q: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout, text_length: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern of each head, heads by falling number of tiles, and valid text keys of each sample."""
    order = table.rows[:, -1][pattern_ids.long()].argsort(descending=True)
    if text_length is None:
        text_length = torch.full((q.shape[0],), layout.text, dtype=torch.int32, device=q.device)
    return pattern_ids.int(), order.int(), text_length.clamp(0, layout.text).int()


def forward(
    q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout,
    text_length: Tensor | None, scale: float, fp8: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel: out [B, M, S, D] in q's order of memory, and log2-sum-exp [B, M, S].

    With `fp8`, products of queries and keys in FP8, and no log-sum-exp of use.
    """
    out, lse = empty_output(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = _unit_channels(q, k, v)
    ids, order, length = _tables(q, pattern_ids, table, layout, text_length)
    if not fp8 and hopper.can_run(layout, q, k, v):
        kernels = hopper.kernel_module()
        kernels.forward(q, k, v, out, lse, ids, order, table.rows, table.tiles, length, layout, scale)
        return out, lse
    p, (B, M) = plan(layout, q.shape[-1], q.dtype, scale, fp8), q.shape[:2]
    k, k_scale = round_keys(k, ids, table, length, layout) if fp8 else (k, lse)
    _tile_sparse_forward_kernel[p.programs["forward"] * M, B](
        q, k, v, out, lse, ids, order, *table, length, k_scale, *_strides(q, k, v, out), M, *p.sizes,
        **p.configs["forward"], FP8=fp8,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern_ids: Tensor, table: PatternTable,
    layout: Layout, text_length: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: gradients of q, k and v, each in its tensor's order of memory."""
    dq, dk, dv = (empty_output(x) for x in (q, k, v))
    if out.numel() == 0:
        return dq, dk, dv
    q, k, v, grad = _unit_channels(q, k, v, grad)
    ids, order, length = _tables(q, pattern_ids, table, layout, text_length)
    p, (B, M) = plan(layout, q.shape[-1], q.dtype, scale), q.shape[:2]
    delta = torch.empty_like(lse)
    _tile_sparse_dq_kernel[p.programs["dq"] * M, B](
        q, k, v, out, grad, lse, delta, dq, ids, order, *table, length,
        *_strides(q, k, v, out, grad, dq), M, *p.sizes, **p.configs["dq"],
    )  # fmt: skip
    _tile_sparse_dkv_kernel[p.programs["dkv"] * M, B](
        q, k, v, grad, lse, delta, dk, dv, ids, order, table.rows, table.columns, length,
        *_strides(q, k, v, grad, dk, dv), M, *p.sizes, **p.configs["dkv"],
    )  # fmt: skip
    return dq, dk, dv
