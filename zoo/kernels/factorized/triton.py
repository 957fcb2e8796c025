"""Triton kernels of attention to a few keys of the whole image, then their launchers.

A *branch* is the global group or one head of a local group. A program serves one branch of one image and a chunk of
its tokens: it holds all keys and values (at most 128) and streams queries past them. Branches of one chunk are
neighbours in the grid, so that they share the cache lines of a token's channels. More than 128 global keys are walked
over with a running softmax instead. Images are addressed in int64, tokens within an image in int32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.factorized.op import MAX_HELD_KEYS

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, row, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] channels of one branch, zero outside."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + (row * stride)[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
    )  # fmt: skip


@triton.jit
def _store(ptr, value, row, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = ptr + (row * stride)[:, None] + d[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _stream_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, q_stride, k_stride, v_stride, begin, end, keys,
    C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of the queries begin ... end - 1 to keys that are held."""
    n = tl.arange(0, BLOCK_N)
    k = _load(k_ptr, n, k_stride, n < keys, D, BLOCK_D)
    v = _load(v_ptr, n, v_stride, n < keys, D, BLOCK_D)
    qk_scale = (D**-0.5) * LOG2E
    for start in tl.range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, m, q_stride, m < end, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        s = tl.where((n < keys)[None, :], s * qk_scale, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / tl.sum(p, 1))[:, None]
        _store(out_ptr, out, m, C, m < end, D, BLOCK_D)


@triton.jit
def _walk_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, begin, end, keys,
    C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for any number of keys, BLOCK_N at a time; also writes the log2 of the softmax denominators."""
    qk_scale = (D**-0.5) * LOG2E
    for start in tl.range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, m, q_stride, m < end, D, BLOCK_D)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in tl.range(0, keys, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, n, k_stride, n < keys, D, BLOCK_D)
            v = _load(v_ptr, n, v_stride, n < keys, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            s = tl.where((n < keys)[None, :], s * qk_scale, float("-inf"))
            # Every tile has a key, so the maximum is finite.
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            norm = norm * rescale + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            top = new_top
        _store(out_ptr, acc * (1.0 / norm)[:, None], m, C, m < end, D, BLOCK_D)
        tl.store(lse_ptr + m, top + tl.log2(norm), mask=m < end)


@triton.jit
def _stream_backward(
    grad_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride, dkv_stride, begin, end, keys,
    C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of the queries begin ... end - 1, and their share of dk and dv of the keys that are held.

    The softmax is computed again and delta = rowsum(p dp), so that neither the output nor statistics are read.
    """
    n = tl.arange(0, BLOCK_N)
    k = _load(k_ptr, n, k_stride, n < keys, D, BLOCK_D)
    v = _load(v_ptr, n, v_stride, n < keys, D, BLOCK_D)
    scale = D**-0.5
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        # Queries past the end load zeros, which add nothing.
        q = _load(q_ptr, m, q_stride, m < end, D, BLOCK_D)
        grad = _load(grad_ptr, m, C, m < end, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        s = tl.where((n < keys)[None, :], s * (scale * LOG2E), float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p *= (1.0 / tl.sum(p, 1))[:, None]
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision="ieee")
        ds = ds.to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        _store(dq_ptr, dq, m, C, m < end, D, BLOCK_D)
    _store(dk_ptr, dk * scale, n, dkv_stride, n < keys, D, BLOCK_D)
    _store(dv_ptr, dv, n, dkv_stride, n < keys, D, BLOCK_D)


_SIZES = ["N", "NG", "chunk"]


@triton.jit(do_not_specialize=_SIZES)
def _factorized_attention_kernel(
    q_ptr, kg_ptr, vg_ptr, k1_ptr, v1_ptr, k2_ptr, v2_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_n, kg_stride_b, kg_stride_n, vg_stride_b, vg_stride_n,
    k_stride_b, k_stride_n, k_stride_m, v_stride_b, v_stride_n, v_stride_m, N, NG, chunk,
    L: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, CG: tl.constexpr, D: tl.constexpr,
    BLOCK_CG: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_NG: tl.constexpr, BLOCK_L: tl.constexpr,
    HELD: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T / sqrt(width)) v of one branch and `chunk` tokens.

    HELD: all global keys fit into one tile, else the global branch walks over them and writes lse. Bytes: q read and
    out written once from HBM (2 N C b), keys and values from L2 for each chunk. FLOPs: 4 N C BLOCK_L. Memory-bound; the
    exponentials, BLOCK_L a token and branch, come next.
    """
    C: tl.constexpr = CG + GROUPS * HEADS * D
    # Strides of keys and values come in units of a common factor, which lets the compiler load vectors.
    kg_stride_b, kg_stride_n, vg_stride_b, vg_stride_n = (
        kg_stride_b * UNIT, kg_stride_n * UNIT, vg_stride_b * UNIT, vg_stride_n * UNIT
    )  # fmt: skip
    k_stride_b, k_stride_n, k_stride_m = k_stride_b * UNIT, k_stride_n * UNIT, k_stride_m * UNIT
    v_stride_b, v_stride_n, v_stride_m = v_stride_b * UNIT, v_stride_n * UNIT, v_stride_m * UNIT
    b = tl.program_id(1).to(tl.int64)
    branch = tl.program_id(0) % (1 + GROUPS * HEADS)
    begin = (tl.program_id(0) // (1 + GROUPS * HEADS)) * chunk
    end = tl.minimum(begin + chunk, N)
    q_ptr += b * q_stride_b
    out_ptr += b * N * C
    if branch == 0:
        kg_ptr += b * kg_stride_b
        vg_ptr += b * vg_stride_b
        if HELD:
            _stream_forward(
                q_ptr, kg_ptr, vg_ptr, out_ptr, q_stride_n, kg_stride_n, vg_stride_n, begin, end, NG,
                C, CG, BLOCK_CG, BLOCK_M, BLOCK_NG,
            )  # fmt: skip
        else:
            _walk_forward(
                q_ptr, kg_ptr, vg_ptr, out_ptr, lse_ptr + b * N, q_stride_n, kg_stride_n, vg_stride_n, begin, end, NG,
                C, CG, BLOCK_CG, BLOCK_M, BLOCK_NG,
            )  # fmt: skip
    else:
        group = (branch - 1) // HEADS
        head = (branch - 1) % HEADS
        if group == 1:
            k1_ptr = k2_ptr
            v1_ptr = v2_ptr
        _stream_forward(
            q_ptr + CG + head * (GROUPS * D) + group * D,
            k1_ptr + b * k_stride_b + head * k_stride_m, v1_ptr + b * v_stride_b + head * v_stride_m,
            out_ptr + CG + group * (HEADS * D) + head * D,
            q_stride_n, k_stride_n, v_stride_n, begin, end, L, C, D, BLOCK_D, BLOCK_M, BLOCK_L,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _factorized_attention_grad_kernel(
    grad_ptr, q_ptr, kg_ptr, vg_ptr, k1_ptr, v1_ptr, k2_ptr, v2_ptr,
    dq_ptr, dkg_ptr, dvg_ptr, dk1_ptr, dv1_ptr, dk2_ptr, dv2_ptr,
    q_stride_b, q_stride_n, kg_stride_b, kg_stride_n, vg_stride_b, vg_stride_n,
    k_stride_b, k_stride_n, k_stride_m, v_stride_b, v_stride_n, v_stride_m, N, NG, chunk, split_stride,
    L: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, CG: tl.constexpr, D: tl.constexpr,
    BLOCK_CG: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_NG: tl.constexpr, BLOCK_L: tl.constexpr,
    HELD: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All gradients of one branch and `chunk` tokens; those of keys and values are shares that the caller adds up.

    No atomics: the result is the same in every run. Without HELD only the local branches. Bytes: q and grad read, dq
    written once (3 N C b) and the shares in float32. FLOPs: 10 N C BLOCK_L. Memory-bound.
    """
    C: tl.constexpr = CG + GROUPS * HEADS * D
    FIRST: tl.constexpr = 0 if HELD else 1
    # Strides of keys and values come in units of a common factor, which lets the compiler load vectors.
    kg_stride_b, kg_stride_n, vg_stride_b, vg_stride_n = (
        kg_stride_b * UNIT, kg_stride_n * UNIT, vg_stride_b * UNIT, vg_stride_n * UNIT
    )  # fmt: skip
    k_stride_b, k_stride_n, k_stride_m = k_stride_b * UNIT, k_stride_n * UNIT, k_stride_m * UNIT
    v_stride_b, v_stride_n, v_stride_m = v_stride_b * UNIT, v_stride_n * UNIT, v_stride_m * UNIT
    b = tl.program_id(1).to(tl.int64)
    branch = tl.program_id(0) % (1 - FIRST + GROUPS * HEADS) + FIRST
    split = tl.program_id(0) // (1 - FIRST + GROUPS * HEADS)
    begin = split * chunk
    end = tl.minimum(begin + chunk, N)
    share = split.to(tl.int64) * split_stride
    q_ptr += b * q_stride_b
    grad_ptr += b * N * C
    dq_ptr += b * N * C
    if HELD and branch == 0:
        share += b * NG * CG
        _stream_backward(
            grad_ptr, q_ptr, kg_ptr + b * kg_stride_b, vg_ptr + b * vg_stride_b,
            dq_ptr, dkg_ptr + share, dvg_ptr + share,
            q_stride_n, kg_stride_n, vg_stride_n, CG, begin, end, NG, C, CG, BLOCK_CG, BLOCK_M, BLOCK_NG,
        )  # fmt: skip
    else:
        group = (branch - 1) // HEADS
        head = (branch - 1) % HEADS
        if group == 1:
            k1_ptr = k2_ptr
            v1_ptr = v2_ptr
            dk1_ptr = dk2_ptr
            dv1_ptr = dv2_ptr
        share += b * (L * HEADS * D) + head * D
        q_channel = CG + head * (GROUPS * D) + group * D
        _stream_backward(
            grad_ptr + CG + group * (HEADS * D) + head * D, q_ptr + q_channel,
            k1_ptr + b * k_stride_b + head * k_stride_m, v1_ptr + b * v_stride_b + head * v_stride_m,
            dq_ptr + q_channel, dk1_ptr + share, dv1_ptr + share,
            q_stride_n, k_stride_n, v_stride_n, HEADS * D, begin, end, L, C, D, BLOCK_D, BLOCK_M, BLOCK_L,
        )  # fmt: skip


@triton.jit
def _softmax_gradient(a, b, da, db, lse, delta, qk_scale):
    """p = exp2(a b^T - lse) and ds = p (da db^T - delta) of a tile.

    With a, b, da, db = q, k, do, v the tile is [M, N], with k, q, v, do its transpose.
    """
    p = tl.exp2(tl.dot(a, tl.trans(b), input_precision="ieee") * qk_scale - lse)
    return p, p * (tl.dot(da, tl.trans(db), input_precision="ieee") - delta)


@triton.jit(do_not_specialize=_SIZES)
def _global_attention_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, v_stride_b, v_stride_n, N, NG,
    C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of the global group by a walk over its keys, and delta = rowsum(do out)."""
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + b * q_stride_b, m, q_stride_n, m < N, D, BLOCK_D)
    grad = _load(grad_ptr + b * N * C, m, C, m < N, D, BLOCK_D)
    out = _load(out_ptr + b * N * C, m, C, m < N, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + b * N + m, delta, mask=m < N)
    lse = tl.load(lse_ptr + b * N + m, mask=m < N, other=0.0)
    k_ptr += b * k_stride_b
    v_ptr += b * v_stride_b
    scale = D**-0.5
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, NG, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        # Keys past the end are zero, so that what they give to dq is zero too.
        k = _load(k_ptr, n, k_stride_n, n < NG, D, BLOCK_D)
        v = _load(v_ptr, n, v_stride_n, n < NG, D, BLOCK_D)
        _, ds = _softmax_gradient(q, k, grad, v, lse[:, None], delta[:, None], scale * LOG2E)
        ds = tl.where((n < NG)[None, :], ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    _store(dq_ptr + b * N * C, acc * scale, m, C, m < N, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _global_attention_dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, v_stride_b, v_stride_n, N, NG, chunk, split_stride,
    C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Shares of dk and dv of BLOCK_N keys of the global group, from the queries of one chunk."""
    b = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(NG, BLOCK_N)
    split = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + b * k_stride_b, n, k_stride_n, n < NG, D, BLOCK_D)
    v = _load(v_ptr + b * v_stride_b, n, v_stride_n, n < NG, D, BLOCK_D)
    q_ptr += b * q_stride_b
    grad_ptr += b * N * C
    scale = D**-0.5
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = tl.minimum((split + 1) * chunk, N)
    for start in tl.range(split * chunk, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        # Queries past the end load zeros, which add nothing; keys past the end are not stored.
        q = _load(q_ptr, m, q_stride_n, m < end, D, BLOCK_D)
        grad = _load(grad_ptr, m, C, m < end, D, BLOCK_D)
        lse = tl.load(lse_ptr + b * N + m, mask=m < end, other=0.0)
        delta = tl.load(delta_ptr + b * N + m, mask=m < end, other=0.0)
        p, ds = _softmax_gradient(k, q, v, grad, lse[None, :], delta[None, :], scale * LOG2E)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    share = split.to(tl.int64) * split_stride + b * NG * D
    _store(dk_ptr + share, dk * scale, n, D, n < NG, D, BLOCK_D)
    _store(dv_ptr + share, dv, n, D, n < NG, D, BLOCK_D)


@triton.jit(do_not_specialize=["splits"])
def _add_shares_kernel(
    share_ptr, dkg_ptr, dvg_ptr, dk1_ptr, dv1_ptr, dk2_ptr, dv2_ptr, splits, split_stride, size_global, size_local,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values as sums of their shares over chunks, in float32 and in a fixed order.

    The shares of one chunk are the gradients of this signature one after the other, from number FIRST on.
    """
    which = tl.program_id(1) + FIRST
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.where(which < 2, size_global, size_local)
    before = tl.minimum(which, 2) - FIRST
    share_ptr += before.to(tl.int64) * size_global
    if which >= 2:
        share_ptr += (which - 2).to(tl.int64) * size_local
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        total += tl.load(share_ptr + i, mask=i < size, other=0.0)
        share_ptr += split_stride
    if which == 0:
        out_ptr = dkg_ptr
    elif which == 1:
        out_ptr = dvg_ptr
    elif which == 2:
        out_ptr = dk1_ptr
    elif which == 3:
        out_ptr = dv1_ptr
    elif which == 4:
        out_ptr = dk2_ptr
    else:
        out_ptr = dv2_ptr
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


# Every chunk of the backward writes shares of dk and dv, which cost as much as the queries of some 130 tokens.
LEAST_CHUNK = 384


class Plan(NamedTuple):
    """What the launches of one problem share, computed once for its sizes and strides."""

    held: bool
    strides: tuple[int, ...]  # of q in elements, of keys and values in units
    sizes: tuple[int, int]
    shape: dict[str, int]  # constants of the kernels that serve all branches
    forward: tuple[tuple[int, int], int, dict]  # grid, chunk and configuration
    backward: tuple[tuple[int, int], int, dict]


def _block(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _chunk(tokens: int, block: int, least: int, wanted: int) -> int:
    """Tokens of a chunk, a multiple of the tile: `wanted` chunks, of no fewer than `least` tokens if there are so many."""
    chunks = max(1, min(tokens // least, wanted))
    return triton.cdiv(triton.cdiv(tokens, chunks), block) * block


def _tile(backward: bool, exact: bool, widest: int, tokens: int) -> dict[str, int]:
    """Queries of a tile, warps and stages, such that nothing spills from registers at the published widths."""
    if exact:
        block, warps = 16 if widest > 32 else 32, 8
    elif backward:
        block, warps = (32, 8) if widest > 32 else (64, 4)
    else:
        block, warps = (64, 8) if widest > 64 else (64 if tokens <= 256 else 128, 4)
    return dict(BLOCK_M=block, num_warps=warps, num_stages=1 if exact else 2)


@functools.lru_cache(maxsize=256)
def plan(q_shape: tuple, kg_shape: tuple, k_shape: tuple, groups: int, strides: tuple, exact: bool) -> Plan:
    """Choose tiles and grids; `exact` for float32, whose products take no tensor cores and many registers."""
    B, N, _ = q_shape
    NG, CG = kg_shape[1:]
    L, heads, D = k_shape[1:]
    held = NG <= MAX_HELD_KEYS
    widest = max(_block(CG), _block(D))
    unit = math.gcd(8, *strides[2:])
    strides = (*strides[:2], *(n // unit for n in strides[2:]))
    meta = dict(
        L=L, GROUPS=groups, HEADS=heads, CG=CG, D=D, BLOCK_CG=_block(CG), BLOCK_D=_block(D),
        BLOCK_NG=_block(NG) if held else 64, BLOCK_L=_block(L), HELD=held, UNIT=unit,
    )  # fmt: skip
    launches = []
    for backward in (False, True):
        tile = _tile(backward, exact, widest, N)
        block = tile["BLOCK_M"]
        branches = groups * heads + (held or not backward)
        if backward:
            chunk = _chunk(N, block, LEAST_CHUNK, triton.cdiv(1024, B * branches))
        else:
            chunk = _chunk(N, block, block, triton.cdiv(4096, B * branches))
        grid = (triton.cdiv(N, chunk) * branches, B)
        launches.append((grid, chunk, dict(meta, **tile)))
    return Plan(held, strides, (N, NG), meta, *launches)


def _prepare(q: Tensor, keys: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor], Plan]:
    """Queries, then keys and values as the kernels take them, and their plan."""
    q, *keys = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, *keys))
    groups = 1 if keys[4] is None else 2
    # Both local groups share their strides.
    for i in (2, 3):
        if groups == 2 and keys[i].stride() != keys[i + 2].stride():
            keys[i], keys[i + 2] = keys[i].contiguous(), keys[i + 2].contiguous()
    keys[4:] = keys[4:] if groups == 2 else keys[2:4]
    strides = (*q.stride()[:2], *(n for x in keys[:4] for n in x.stride()[:-1]))
    return q, keys, plan(q.shape, keys[0].shape, keys[2].shape, groups, strides, q.dtype == torch.float32)


def forward(q: Tensor, *keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: out [B, N, C] and, if global keys are walked over, their log2-sum-exp [B, N].

    `keys` are k and v of the global, the local and the dilated group.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    held = keys[0].shape[1] <= MAX_HELD_KEYS
    lse = torch.empty(0 if held else q.shape[:2], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    q, keys, p = _prepare(q, keys)
    grid, chunk, config = p.forward
    _factorized_attention_kernel[grid](q, *keys, out, lse, *p.strides, *p.sizes, chunk, **config)
    return out, lse


def _walk_backward(grad, q, k, v, out, lse, dq, dk, dv, p: Plan) -> None:
    """Gradients of the global group by walks over its keys and over its queries."""
    (N, NG), B, D = p.sizes, q.shape[0], k.shape[2]
    tile = {name: p.backward[2][name] for name in ("BLOCK_M", "num_warps", "num_stages")}
    block = tile["BLOCK_M"]
    meta = dict(C=q.shape[2], D=D, BLOCK_D=p.shape["BLOCK_CG"], BLOCK_N=p.shape["BLOCK_NG"], **tile)
    strides = (*p.strides[:2], *k.stride()[:2], *v.stride()[:2])
    delta = torch.empty_like(lse)
    _global_attention_dq_kernel[(triton.cdiv(N, block), B)](grad, q, k, v, out, lse, delta, dq, *strides, N, NG, **meta)
    tiles = triton.cdiv(NG, p.shape["BLOCK_NG"])
    chunk = _chunk(N, block, LEAST_CHUNK, triton.cdiv(1024, B * tiles))
    splits = triton.cdiv(N, chunk)
    shares = torch.empty(splits, 2, *k.shape, dtype=torch.float32, device=q.device)
    _global_attention_dkv_kernel[(tiles * splits, B)](
        grad, q, k, v, lse, delta, shares[0, 0], shares[0, 1], *strides, N, NG, chunk, 2 * k.numel(), **meta
    )  # fmt: skip
    _add_shares(shares, 0, [dk, dv])


def _add_shares(shares: Tensor, first: int, outs: list[Tensor]) -> None:
    """Sum shares [splits, ...] of consecutive gradients, the first of which has number `first`."""
    sizes = [x.numel() for x in outs]
    size_global, size_local = (sizes[0] if first == 0 else 0), sizes[-1]
    largest = max(sizes)
    pointers = [outs[0]] * first + outs
    pointers += [outs[0]] * (6 - len(pointers))
    _add_shares_kernel[(triton.cdiv(largest, 1024), len(outs))](
        shares, *pointers, shares.shape[0], shares[0].numel(), size_global, size_local,
        FIRST=first, BLOCK=1024, num_warps=4,
    )  # fmt: skip


def backward(grad: Tensor, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """Launch the backward kernels: gradients of q and of the six keys and values, contiguous, in the dtype of q."""
    *keys, out, lse = rest
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkeys = [torch.empty(0 if x is None else x.shape, dtype=q.dtype, device=q.device) for x in keys]
    if q.numel() == 0:
        return dq, *(x.zero_() for x in dkeys)
    q, keys, p = _prepare(q, keys)
    grad = grad.contiguous()
    grid, chunk, config = p.backward
    first, wanted = (0 if p.held else 2), dkeys[: 2 + 2 * p.shape["GROUPS"]]
    if not p.held:
        _walk_backward(grad, q, *keys[:2], out, lse, dq, *dkeys[:2], p)
    splits = triton.cdiv(p.sizes[0], chunk)
    targets, shares, split_stride = list(wanted), None, 0
    if splits > 1:
        split_stride = sum(x.numel() for x in wanted[first:])
        shares = torch.empty(splits, split_stride, dtype=torch.float32, device=q.device)
        targets[first:] = shares[0].split([x.numel() for x in wanted[first:]])
    targets += targets[2:4] if len(targets) == 4 else []
    _factorized_attention_grad_kernel[grid](
        grad, q, *keys, dq, *targets, *p.strides, *p.sizes, chunk, split_stride, **config
    )
    if splits > 1:
        _add_shares(shares, first, wanted[first:])
    return dq, *dkeys
