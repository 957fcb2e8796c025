"""Triton kernels of token attention over routed regions, then their launchers.

Maps are [B, H, W, C] with unit channel stride and are read in place, also as views of a packed qkv map.
Two designs share the helpers in `triton_tiles.py`. A *tile* kernel holds all keys of a query tile at once (at most 256): addresses
and masks are computed once and serve all heads, and the softmax needs no running maximum. A *walk* kernel
takes any number of keys, a tile at a time.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._rows import load_rows, store_rows
from zoo.kernels.bilevel_routing.reference import region_grid
from zoo.kernels.bilevel_routing.triton_routing import transpose_graph, unit_channels
from zoo.kernels.bilevel_routing.triton_tiles import (
    all_keys,
    has_routed,
    listed_tile,
    locate,
    own_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)


_SIZES = ["H", "W", "KH", "KW", "RH", "RW", "KRH", "KRW", "topk", "regions", "kv_regions"]


@triton.jit
def _softmax_of_tile(q, k, v, keep, inside, qk_scale, DENSE: tl.constexpr, EVEN: tl.constexpr):
    """Attention of a tile that sees all of its keys, and the log2 of its denominators."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if not EVEN:
        s = tl.where(keep, s, float("-inf"))
    top = tl.max(s, 1)
    if DENSE:
        top = tl.where(inside, top, 0.0)  # rows past the last query have no key
    p = tl.exp2(s * qk_scale - (top * qk_scale)[:, None])
    norm = tl.sum(p, 1)
    if DENSE:
        norm = tl.where(inside, norm, 1.0)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / norm[:, None]
    return out, top * qk_scale + tl.log2(norm)


@triton.jit(do_not_specialize=_SIZES)
def _forward_tile_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, index_stride_b, index_stride_m,
    H, W, KH, KW, RH, RW, KRH, KRW, topk, regions, kv_regions, scale,
    HEADS: tl.constexpr, LOOP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DENSE: tl.constexpr, MASK_PADDING: tl.constexpr, EVEN: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k_sel^T) v_sel, and lse = log2 of the softmax denominator, at most 256 keys.

    With DENSE = False a program computes one region: all its queries, LOOP heads, and as keys the tokens of
    its `topk` routed regions. A region of one block of queries loops over heads (ONE_BLOCK); a larger one
    keeps its keys and loops over blocks. With DENSE = True (regions of a few tokens) it computes BLOCK_M
    consecutive queries of all regions and the keys are all tokens under a mask: gathering would fill a
    quarter of each matrix tile and fetch every key `topk` times. EVEN promises full tiles and no padding.
    Bytes: q, k, v read and out written once from HBM (4 N C b), keys and values again from L2 for each tile.
    FLOPs: 4 N BLOCK_N C. Memory-bound at the published sizes; exponentials bound it from 256 keys on.
    """
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) % (HEADS // LOOP)
    tile = tl.program_id(0) // (HEADS // LOOP)
    q_ptr += b * q_stride_b
    k_ptr += b * kv_stride_b
    v_ptr += b * kv_stride_b
    out_ptr += b * H * W * (HEADS * D)
    lse_ptr += b * HEADS * H * W
    index_ptr += b * index_stride_b + group * index_stride_m

    k_region, k_offset, k_inside, keep = all_keys(
        index_ptr + tile * topk, topk, KH, KW, KRH, KRW, kv_regions, kv_stride_h, kv_stride_w,
        DENSE, MASK_PADDING, BLOCK_N,
    )  # fmt: skip
    keep = keep[None, :]

    if ONE_BLOCK:
        q_region, position, q_offset, q_inside, q_valid = own_tile(
            tile, H, W, RH, RW, regions, q_stride_h, q_stride_w, DENSE, BLOCK_M
        )  # fmt: skip
        if DENSE:
            keep = keep & has_routed(index_ptr, q_region, q_valid, k_region, topk, BLOCK_K)
        for i in tl.range(0, LOOP):
            head = group * LOOP + i
            q = load_rows(q_ptr + head * D, q_offset, q_inside, D, BLOCK_D, not EVEN)
            k = load_rows(k_ptr + head * D, k_offset, k_inside, D, BLOCK_D, not EVEN)
            v = load_rows(v_ptr + head * D, k_offset, k_inside, D, BLOCK_D, not EVEN)
            out, lse = _softmax_of_tile(q, k, v, keep, q_inside, scale * LOG2E, DENSE, EVEN)
            store_rows(out_ptr + head * D, out, position * (HEADS * D), q_inside, D, BLOCK_D)
            tl.store(lse_ptr + head * H * W + position, lse, mask=q_inside)
    else:
        k = load_rows(k_ptr + group * D, k_offset, k_inside, D, BLOCK_D, not EVEN)
        v = load_rows(v_ptr + group * D, k_offset, k_inside, D, BLOCK_D, not EVEN)
        for start in tl.range(0, RH * RW, BLOCK_M):
            t = start + tl.arange(0, BLOCK_M)
            row, col = locate(t, tile, W, RH, RW)
            q_inside = (t < RH * RW) & (row < H) & (col < W)
            position, q_offset = row * W + col, row * q_stride_h + col * q_stride_w
            q = load_rows(q_ptr + group * D, q_offset, q_inside, D, BLOCK_D, not EVEN)
            out, lse = _softmax_of_tile(q, k, v, keep, q_inside, scale * LOG2E, DENSE, EVEN)
            store_rows(out_ptr + group * D, out, position * (HEADS * D), q_inside, D, BLOCK_D)
            tl.store(lse_ptr + group * H * W + position, lse, mask=q_inside)


@triton.jit(do_not_specialize=_SIZES)
def _forward_walk_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, index_stride_b, index_stride_m,
    H, W, KH, KW, RH, RW, KRH, KRW, topk, regions, kv_regions, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_PADDING: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The same for any number of keys: BLOCK_M queries of one region and head, BLOCK_N keys at a time."""
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    total = topk * KRH * KRW
    q_ptr += b * q_stride_b + head * D
    k_ptr += b * kv_stride_b + head * D
    v_ptr += b * kv_stride_b + head * D
    index_ptr += b * index_stride_b + head * index_stride_m + (tile // tl.cdiv(RH * RW, BLOCK_M)) * topk

    own_region, position, q_offset, q_inside, own_valid = own_tile(
        tile, H, W, RH, RW, regions, q_stride_h, q_stride_w, False, BLOCK_M
    )  # fmt: skip
    q = load_rows(q_ptr, q_offset, q_inside, D, BLOCK_D, not EVEN)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, total, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_position, k_offset, k_inside, keep = listed_tile(
            n, index_ptr, total, KH, KW, KRH, KRW, kv_stride_h, kv_stride_w
        )  # fmt: skip
        k = load_rows(k_ptr, k_offset, k_inside, D, BLOCK_D, not EVEN)
        v = load_rows(v_ptr, k_offset, k_inside, D, BLOCK_D, not EVEN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_M, BLOCK_N]
        if not EVEN:
            if MASK_PADDING:
                keep = k_inside
            s = tl.where(keep[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row can have met no key yet; subtracting -inf from -inf would give NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(top - shift)
        norm = norm * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    out_ptr += b * H * W * (HEADS * D) + head * D
    store_rows(out_ptr, acc / norm[:, None], position * (HEADS * D), q_inside, D, BLOCK_D)
    tl.store(lse_ptr + (b * HEADS + head) * H * W + position, top + tl.log2(norm), mask=q_inside)


@triton.jit
def _softmax_gradient(a, b, da, db, lse, delta, keep, qk_scale, MASKED: tl.constexpr = True):
    """p = exp2(a b^T - lse) and ds = p (da db^T - delta) of a tile, zero where not kept.

    With a, b, da, db = q, k, do, v the tile is [M, N], with k, q, v, do its transpose.
    """
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    p = tl.exp2(s * qk_scale - lse)
    if MASKED:
        p = tl.where(keep, p, 0.0)
    dp = tl.dot(da, tl.trans(db), input_precision="ieee")
    return p, p * (dp - delta)


@triton.jit(do_not_specialize=_SIZES)
def _dq_tile_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, grad_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, index_stride_b, index_stride_m,
    H, W, KH, KW, RH, RW, KRH, KRW, topk, regions, kv_regions, scale,
    HEADS: tl.constexpr, LOOP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DENSE: tl.constexpr, MASK_PADDING: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq = scale * ds k_sel with ds = p (do v_sel^T - delta), delta = rowsum(do out), p = exp2(s - lse).

    The tiles of `_forward_tile_kernel`; also writes delta for the key and value gradients.
    """
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) % (HEADS // LOOP)
    tile = tl.program_id(0) // (HEADS // LOOP)
    q_ptr += b * q_stride_b
    k_ptr += b * kv_stride_b
    v_ptr += b * kv_stride_b
    out_base = b * H * W * (HEADS * D)
    index_ptr += b * index_stride_b + group * index_stride_m

    q_region, position, q_offset, q_inside, q_valid = own_tile(
        tile, H, W, RH, RW, regions, q_stride_h, q_stride_w, DENSE, BLOCK_M
    )  # fmt: skip
    out_offset = position * (HEADS * D)
    k_region, k_offset, k_inside, keep = all_keys(
        index_ptr + (tile // tl.cdiv(RH * RW, BLOCK_M)) * topk, topk, KH, KW, KRH, KRW, kv_regions,
        kv_stride_h, kv_stride_w, DENSE, MASK_PADDING, BLOCK_N,
    )  # fmt: skip
    keep_pair = keep[None, :] & q_inside[:, None]
    if DENSE:
        keep_pair = keep_pair & has_routed(index_ptr, q_region, q_valid, k_region, topk, BLOCK_K)

    for i in tl.range(0, LOOP):
        head = group * LOOP + i
        q = load_rows(q_ptr + head * D, q_offset, q_inside, D, BLOCK_D, not EVEN)
        k = load_rows(k_ptr + head * D, k_offset, k_inside, D, BLOCK_D, not EVEN)
        v = load_rows(v_ptr + head * D, k_offset, k_inside, D, BLOCK_D, not EVEN)
        grad = load_rows(grad_ptr + out_base + head * D, out_offset, q_inside, D, BLOCK_D, not EVEN)
        out = load_rows(out_ptr + out_base + head * D, out_offset, q_inside, D, BLOCK_D, not EVEN)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        stat = (b * HEADS + head) * H * W + position
        tl.store(delta_ptr + stat, delta, mask=q_inside)
        lse = tl.load(lse_ptr + stat, mask=q_inside, other=0.0)
        _, ds = _softmax_gradient(q, k, grad, v, lse[:, None], delta[:, None], keep_pair, scale * LOG2E)
        dq = tl.dot(ds.to(k.dtype), k, input_precision="ieee") * scale
        store_rows(dq_ptr + out_base + head * D, dq, out_offset, q_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _dq_walk_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, grad_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, index_stride_b, index_stride_m,
    H, W, KH, KW, RH, RW, KRH, KRW, topk, regions, kv_regions, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_PADDING: tl.constexpr,
):  # fmt: skip
    """dq and delta for any number of keys, with the tiles of `_forward_walk_kernel`."""
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    total = topk * KRH * KRW
    out_base = b * H * W * (HEADS * D) + head * D
    k_ptr += b * kv_stride_b + head * D
    v_ptr += b * kv_stride_b + head * D
    index_ptr += b * index_stride_b + head * index_stride_m + (tile // tl.cdiv(RH * RW, BLOCK_M)) * topk

    own_region, position, q_offset, q_inside, own_valid = own_tile(
        tile, H, W, RH, RW, regions, q_stride_h, q_stride_w, False, BLOCK_M
    )  # fmt: skip
    q = load_rows(q_ptr + b * q_stride_b + head * D, q_offset, q_inside, D, BLOCK_D, True)
    out_offset = position * (HEADS * D)
    grad = load_rows(grad_ptr + out_base, out_offset, q_inside, D, BLOCK_D, True)
    out = load_rows(out_ptr + out_base, out_offset, q_inside, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    stat = (b * HEADS + head) * H * W + position
    tl.store(delta_ptr + stat, delta, mask=q_inside)
    lse = tl.load(lse_ptr + stat, mask=q_inside, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, total, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_position, k_offset, k_inside, keep = listed_tile(
            n, index_ptr, total, KH, KW, KRH, KRW, kv_stride_h, kv_stride_w
        )  # fmt: skip
        k = load_rows(k_ptr, k_offset, k_inside, D, BLOCK_D, True)
        v = load_rows(v_ptr, k_offset, k_inside, D, BLOCK_D, True)
        if MASK_PADDING:
            keep = k_inside
        keep_pair = keep[None, :] & q_inside[:, None]
        _, ds = _softmax_gradient(q, k, grad, v, lse[:, None], delta[:, None], keep_pair, scale * LOG2E)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    store_rows(dq_ptr + out_base, acc * scale, out_offset, q_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _dkv_tile_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, index_stride_b, index_stride_m,
    H, W, KH, KW, RH, RW, KRH, KRW, topk, regions, kv_regions, scale,
    HEADS: tl.constexpr, LOOP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dv = p^T do and dk = scale * ds^T q of BLOCK_N consecutive keys and LOOP heads over all (<= 256) queries.

    The counterpart of the tile kernels with DENSE = True.
    """
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) % (HEADS // LOOP)
    q_ptr += b * q_stride_b
    out_base = b * H * W * (HEADS * D)
    kv_base = b * KH * KW * (HEADS * D)
    index_ptr += b * index_stride_b + group * index_stride_m

    k_region, k_position, k_offset, k_inside, k_valid = own_tile(
        tl.program_id(0) // (HEADS // LOOP), KH, KW, KRH, KRW, kv_regions, kv_stride_h, kv_stride_w, True, BLOCK_N
    )  # fmt: skip
    dk_offset = k_position * (HEADS * D)
    q_region, position, q_offset, q_inside, q_valid = own_tile(
        0, H, W, RH, RW, regions, q_stride_h, q_stride_w, True, BLOCK_M
    )  # fmt: skip
    out_offset = position * (HEADS * D)
    routed = has_routed(index_ptr, q_region, q_valid, k_region, topk, BLOCK_K)
    keep_pair = tl.trans(routed) & k_inside[:, None] & q_inside[None, :]  # [BLOCK_N, BLOCK_M]

    for i in tl.range(0, LOOP):
        head = group * LOOP + i
        k = load_rows(k_ptr + b * kv_stride_b + head * D, k_offset, k_inside, D, BLOCK_D, True)
        v = load_rows(v_ptr + b * kv_stride_b + head * D, k_offset, k_inside, D, BLOCK_D, True)
        q = load_rows(q_ptr + head * D, q_offset, q_inside, D, BLOCK_D, True)
        grad = load_rows(grad_ptr + out_base + head * D, out_offset, q_inside, D, BLOCK_D, True)
        stat = (b * HEADS + head) * H * W + position
        lse = tl.load(lse_ptr + stat, mask=q_inside, other=0.0)
        delta = tl.load(delta_ptr + stat, mask=q_inside, other=0.0)
        p, ds = _softmax_gradient(k, q, v, grad, lse[None, :], delta[None, :], keep_pair, scale * LOG2E)
        dv = tl.dot(p.to(grad.dtype), grad, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, input_precision="ieee") * scale
        store_rows(dk_ptr + kv_base + head * D, dk, dk_offset, k_inside, D, BLOCK_D)
        store_rows(dv_ptr + kv_base + head * D, dv, dk_offset, k_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _dkv_walk_kernel(
    q_ptr, k_ptr, v_ptr, reader_ptr, reader_start_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_w, kv_stride_b, kv_stride_h, kv_stride_w, index_stride_b, index_stride_m,
    H, W, KH, KW, RH, RW, KRH, KRW, topk, regions, kv_regions, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INDEX_HEADS: tl.constexpr,
):  # fmt: skip
    """dv = p^T do and dk = scale * ds^T q, summed over the queries that read a key.

    One program owns BLOCK_N keys of one region and head and walks over the tokens of the query regions that
    routed to it, listed by the transposed graph (CSR). The order is fixed and no atomics are used, so the
    result is the same in every run.
    """
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    kv_region = tile // tl.cdiv(KRH * KRW, BLOCK_N)
    out_base = b * H * W * (HEADS * D) + head * D
    stat_base = (b * HEADS + head) * H * W
    q_ptr += b * q_stride_b + head * D

    own_region, k_position, k_offset, k_inside, own_valid = own_tile(
        tile, KH, KW, KRH, KRW, kv_regions, kv_stride_h, kv_stride_w, False, BLOCK_N
    )  # fmt: skip
    k = load_rows(k_ptr + b * kv_stride_b + head * D, k_offset, k_inside, D, BLOCK_D, True)
    v = load_rows(v_ptr + b * kv_stride_b + head * D, k_offset, k_inside, D, BLOCK_D, True)
    graph = b * INDEX_HEADS + (head if INDEX_HEADS > 1 else 0)
    start_ptr = reader_start_ptr + graph * (kv_regions + 1) + kv_region
    begin = tl.load(start_ptr)
    total = (tl.load(start_ptr + 1) - begin) * RH * RW
    reader_ptr += graph * regions * topk + begin

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, total, BLOCK_M):
        position, q_offset, q_inside, q_valid = listed_tile(
            start + tl.arange(0, BLOCK_M), reader_ptr, total, H, W, RH, RW, q_stride_h, q_stride_w
        )  # fmt: skip
        q = load_rows(q_ptr, q_offset, q_inside, D, BLOCK_D, True)
        grad = load_rows(grad_ptr + out_base, position * (HEADS * D), q_inside, D, BLOCK_D, True)
        stat = stat_base + position
        lse = tl.load(lse_ptr + stat, mask=q_inside, other=0.0)
        delta = tl.load(delta_ptr + stat, mask=q_inside, other=0.0)
        # Queries past the end load zeros, which add nothing; keys past the end are not stored.
        p, ds = _softmax_gradient(k, q, v, grad, lse[None, :], delta[None, :], True, scale * LOG2E, False)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    kv_base = b * KH * KW * (HEADS * D) + head * D
    dk_offset = k_position * (HEADS * D)
    store_rows(dk_ptr + kv_base, dk * scale, dk_offset, k_inside, D, BLOCK_D)
    store_rows(dv_ptr + kv_base, dv, dk_offset, k_inside, D, BLOCK_D)


# A tile kernel holds this many keys at most; longer lists are walked over.
MAX_TILE = 256


def is_dense(distinct: bool, topk: int, tokens: int, kv_tokens: int, regions: int, kv_regions: int) -> bool:
    """Whether to mask all keys rather than gather: regions so small that gathering wastes more than masking."""
    if not distinct or kv_regions > 64 or max(regions * tokens, kv_regions * kv_tokens) > MAX_TILE:
        return False
    return kv_regions * kv_tokens <= 1.5 * topk * kv_tokens * max(16 / tokens, 1)


def _block(n: int, limit: int) -> int:
    return min(limit, max(16, triton.next_power_of_2(n)))


def _config(kernel: str, dense: bool, own: int, others: int, heads: int) -> dict:
    """Tiles, warps, stages and looped heads for a kernel whose programs own `own` tokens and read `others`.

    The fastest of those tried on an H100 at head dimension 32 in bfloat16.
    """
    own_block, other_block = _block(own, 64), _block(others, MAX_TILE)
    loop = heads if own <= 64 else 1
    warps, stages = 4, 2
    if dense:
        own_block = 64 if kernel != "dkv" else 16
        warps, stages = {"forward": (4, 2), "dq": (4, 1), "dkv": (2, 2)}[kernel]
    elif kernel == "forward" and own_block == 16 and others > 64:
        # Regions of a few tokens are bound by reads from L2; short tiles keep more of them in flight.
        other_block, warps = 64, 1
    elif kernel == "forward" and others <= MAX_TILE:
        loop = math.gcd(heads, 2) if own_block == 16 else loop
        warps, stages = (1, 2) if own_block == 16 else (4, 3 if other_block <= 64 else 2)
    elif kernel == "dq" and others <= 64:
        warps, stages = (1, 3) if own_block == 16 else (4, 3)
    elif kernel == "dkv":
        other_block, warps = (32, 1) if own_block == 16 else (128, 4)
    else:
        other_block = 32 if kernel == "dq" else 64
        warps = 1 if own_block == 16 else 4
    names = ("BLOCK_N", "BLOCK_M") if kernel == "dkv" else ("BLOCK_M", "BLOCK_N")
    return dict(zip(names, (own_block, other_block), strict=True), LOOP=loop, num_warps=warps, num_stages=stages)


class Plan(NamedTuple):
    """What the launches of one problem share, computed once for its sizes and strides."""

    dense: bool
    kv_regions: int
    sizes: tuple  # the arguments after the pointers
    launches: dict[str, tuple[str, tuple[int, int], dict]]  # design, grid and configuration by kernel


@functools.lru_cache(maxsize=256)
def plan(
    q_shape: tuple, q_stride: tuple, k_shape: tuple, kv_stride: tuple, index_shape: tuple,
    heads: int, region: tuple[int, int], kv_region: tuple[int, int], scale: float, mask_padding: bool, distinct: bool,
) -> Plan:  # fmt: skip
    """Choose kernels, tiles and grids."""
    B, H, W, C = q_shape
    KH, KW, topk = k_shape[1], k_shape[2], index_shape[-1]
    (rows, cols), (kv_rows, kv_cols) = region_grid((H, W), region), region_grid((KH, KW), kv_region)
    regions, kv_regions = rows * cols, kv_rows * kv_cols
    tokens, kv_tokens = region[0] * region[1], kv_region[0] * kv_region[1]
    padded = (kv_rows * kv_region[0], kv_cols * kv_region[1]) != (KH, KW)
    even = not padded and (rows * region[0], cols * region[1]) == (H, W)
    # Unmasked padding enters the softmax as zero keys, of which the mask of real keys knows nothing.
    distinct = distinct and (mask_padding or not padded)
    dense = is_dense(distinct, topk, tokens, kv_tokens, regions, kv_regions)
    index_heads = index_shape[1] if len(index_shape) == 4 else 1
    graph = regions * topk
    sizes = (
        *q_stride[:3], *kv_stride[:3], graph * index_heads, graph if index_heads > 1 else 0,
        H, W, KH, KW, *region, *kv_region, topk, regions, kv_regions, scale,
    )  # fmt: skip
    meta = dict(HEADS=heads, D=C // heads, BLOCK_D=max(16, triton.next_power_of_2(C // heads)))
    keys = kv_regions * kv_tokens if dense else topk * kv_tokens
    launches = {}
    for kernel in ("forward", "dq", "dkv"):
        own, count = (kv_tokens, kv_regions) if kernel == "dkv" else (tokens, regions)
        others = keys if kernel != "dkv" else regions * tokens if dense else topk * tokens
        config = _config(kernel, dense, own, others, heads // index_heads)
        loop = config.pop("LOOP")
        block = config["BLOCK_N" if kernel == "dkv" else "BLOCK_M"]
        tiles = triton.cdiv(count * own, block) if dense else count * triton.cdiv(own, block)
        holds_all = kernel != "dkv" and config["BLOCK_N"] >= keys
        if holds_all or dense:
            config.update(LOOP=loop, BLOCK_K=triton.next_power_of_2(topk))
        if holds_all:
            full = even and not dense and config["BLOCK_N"] == keys and own % block == 0
            config.update(DENSE=dense, MASK_PADDING=mask_padding, EVEN=full)
            if kernel == "forward":
                one_block = dense or own <= block
                config.update(ONE_BLOCK=one_block)
                tiles = tiles if one_block else count
        elif not dense:
            config.update(dict(INDEX_HEADS=index_heads) if kernel == "dkv" else dict(MASK_PADDING=mask_padding))
            if kernel == "forward":
                config.update(EVEN=even and own % block == 0 and keys % config["BLOCK_N"] == 0)
            loop = 1
        design = "tile" if holds_all or dense else "walk"
        launches[kernel] = (design, (tiles * (heads // loop), B), {**meta, **config})
    return Plan(dense, kv_regions, sizes, launches)


def _prepare(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct) -> tuple:
    """Tensors as the kernels take them, and their plan."""
    q, k, v, index = unit_channels(q), unit_channels(k), unit_channels(v), index.contiguous()
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    chosen = plan(
        q.shape, q.stride(), k.shape, k.stride(), index.shape, heads, tuple(region), tuple(kv_region), scale,
        mask_padding, distinct,
    )  # fmt: skip
    return q, k, v, index, chosen


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, heads: int, region: list[int], kv_region: list[int],
    scale: float, mask_padding: bool, distinct: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel: out [B, H, W, C] and log2-sum-exp [B, M, H, W]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], heads, *q.shape[1:3]), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    q, k, v, index, p = _prepare(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct)
    design, grid, config = p.launches["forward"]
    kernel = _forward_tile_kernel if design == "tile" else _forward_walk_kernel
    kernel[grid](q, k, v, index, out, lse, *p.sizes, **config)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Tensor,
    heads: int, region: list[int], kv_region: list[int], scale: float, mask_padding: bool, distinct: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: dq, dk, dv, contiguous and in the dtype of q."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    q, k, v, index, p = _prepare(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct)
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    design, grid, config = p.launches["dq"]
    kernel = _dq_tile_kernel if design == "tile" else _dq_walk_kernel
    kernel[grid](q, k, v, index, out, lse, grad, delta, dq, *p.sizes, **config)
    _, grid, config = p.launches["dkv"]
    if p.dense:
        _dkv_tile_kernel[grid](q, k, v, index, lse, grad, delta, dk, dv, *p.sizes, **config)
    else:
        reader, start = transpose_graph(index, p.kv_regions)
        _dkv_walk_kernel[grid](q, k, v, reader, start, lse, grad, delta, dk, dv, *p.sizes, **config)
    return dq, dk, dv
