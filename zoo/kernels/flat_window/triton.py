"""Triton kernels of flattened window attention, then their launchers.

Tensors are [V, M, D] with unit strides within a pillar and any stride between pillars. A group's pillars are found
through the order, so the kernels gather and scatter on the fly. The keys of a group are held on chip as one tile of
BLOCK_N and a TAIL, a power of two each: 144 = 128 + 16 wastes nothing, and the softmax needs no running maximum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, pillar, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D] channels of one head of some pillars, zero outside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :] if D < BLOCK_D else inside[:, None]
    return tl.load(ptr + pillar[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, value, pillar, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :] if D < BLOCK_D else inside[:, None]
    tl.store(ptr + pillar[:, None] * stride + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keys(
    k_ptr, v_ptr, order_ptr, start, end, k_stride, v_stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK, BLOCK_D] of the places from `start`, and whether there is one."""
    n = start + tl.arange(0, BLOCK)
    inside = n < end
    pillar = tl.load(order_ptr + n, mask=inside, other=0)
    k = _load(k_ptr, pillar, inside, k_stride, D, BLOCK_D)
    v = _load(v_ptr, pillar, inside, v_stride, D, BLOCK_D)
    return k, v, inside


@triton.jit
def _queries_at(
    q_ptr, order_ptr, start, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The pillars at BLOCK_M places from `start`, and their queries."""
    m = start + tl.arange(0, BLOCK_M)
    pillar = tl.load(order_ptr + m, mask=m < end, other=0)
    return pillar, _load(q_ptr, pillar, m < end, stride, D, BLOCK_D)


@triton.jit
def _products(q, k, inside):
    return tl.where(inside[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))


@triton.jit
def _logit_gradient(q, do, k, v, inside, lse, delta, factor):
    """dq / scale of the keys in a tile."""
    p = tl.exp2(_products(q, k, inside) * factor - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    return tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, input_precision="ieee")


@triton.jit
def _flat_window_forward_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, groups_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v within a group, and log2-sum-exp.

    One program holds the keys of one head of a group and walks over TILES tiles of BLOCK_M queries. A program reads
    4 D (BLOCK_N + TAIL + TILES BLOCK_M) bytes in half precision, in pieces of 2 D; FLOPs a query and head: 4 G D. It
    wins over gathered tensors by reading each once: bandwidth and launches bound attention in groups this small.
    """
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    row = groups_ptr + tl.program_id(0) // HEADS // PARTS * 3
    begin, end, first = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    q_ptr += head * D
    k_ptr += head * D
    v_ptr += head * D
    out_ptr += head * D
    lse_ptr += head
    tiles = tl.minimum((end - begin + BLOCK_M - 1) // BLOCK_M - part * TILES, TILES)
    # Padding has no keys: its logits are -inf, and its output zero.
    keys_end = tl.where(first < 0, first, end)
    factor = scale * LOG2E
    if tiles > 0:
        k, v, inside = _keys(k_ptr, v_ptr, order_ptr, first, keys_end, k_stride, v_stride, D, BLOCK_D, BLOCK_N)
        if TAIL > 0:
            k_tail, v_tail, inside_tail = _keys(
                k_ptr, v_ptr, order_ptr, first + BLOCK_N, keys_end, k_stride, v_stride, D, BLOCK_D, TAIL
            )
        start = begin + part * TILES * BLOCK_M
        if PREFETCH:
            pillar, q = _queries_at(q_ptr, order_ptr, start, end, q_stride, D, BLOCK_D, BLOCK_M)
        for tile in tl.range(0, tiles):
            at = start + tile * BLOCK_M
            m = at + tl.arange(0, BLOCK_M)
            if PREFETCH:
                # Two reads, one of which needs the other, are under way while this tile is computed.
                next_pillar, next_q = _queries_at(
                    q_ptr, order_ptr, at + BLOCK_M, end, q_stride, D, BLOCK_D, BLOCK_M
                )  # fmt: skip
            else:
                pillar, q = _queries_at(q_ptr, order_ptr, at, end, q_stride, D, BLOCK_D, BLOCK_M)
            s = _products(q, k, inside)
            largest = tl.max(s, 1)
            if TAIL > 0:
                s_tail = _products(q, k_tail, inside_tail)
                largest = tl.maximum(largest, tl.max(s_tail, 1))
            # The factor is positive; applied here, it and the difference are one instruction.
            largest = tl.where(first < 0, 0.0, largest * factor)
            p = tl.exp2(s * factor - largest[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            if TAIL > 0:
                p = tl.exp2(s_tail * factor - largest[:, None])
                total += tl.sum(p, 1)
                out = tl.dot(p.to(v.dtype), v_tail, out, input_precision="ieee")
            total = tl.where(first < 0, 1.0, total)
            _store(out_ptr, out / total[:, None], pillar, m < end, HEADS * D, D, BLOCK_D)
            tl.store(lse_ptr + pillar * HEADS, largest + tl.log2(total), mask=m < end)
            if PREFETCH:
                pillar, q = next_pillar, next_q


@triton.jit
def _flat_window_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, order_ptr, groups_ptr, dq_ptr, delta_ptr,
    q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """delta = sum(do * out) and dq = scale (p * (do v^T - delta)) k, p computed again from the log-sum-exp.

    The same work split as in the forward kernel; FLOPs a query and head: 6 G D.
    """
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    row = groups_ptr + tl.program_id(0) // HEADS // PARTS * 3
    begin, end, first = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    q_ptr += head * D
    k_ptr += head * D
    v_ptr += head * D
    tiles = tl.minimum((end - begin + BLOCK_M - 1) // BLOCK_M - part * TILES, TILES)
    keys_end = tl.where(first < 0, first, end)
    factor = scale * LOG2E
    if tiles > 0:
        k, v, inside = _keys(k_ptr, v_ptr, order_ptr, first, keys_end, k_stride, v_stride, D, BLOCK_D, BLOCK_N)
        if TAIL > 0:
            k_tail, v_tail, inside_tail = _keys(
                k_ptr, v_ptr, order_ptr, first + BLOCK_N, keys_end, k_stride, v_stride, D, BLOCK_D, TAIL
            )
        for tile in tl.range(0, tiles):
            m = begin + (part * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
            pillar = tl.load(order_ptr + m, mask=m < end, other=0)
            q = _load(q_ptr, pillar, m < end, q_stride, D, BLOCK_D)
            do = _load(grad_ptr + head * D, pillar, m < end, HEADS * D, D, BLOCK_D)
            out = _load(out_ptr + head * D, pillar, m < end, HEADS * D, D, BLOCK_D)
            lse = tl.load(lse_ptr + head + pillar * HEADS, mask=m < end, other=0.0)
            delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            dq = _logit_gradient(q, do, k, v, inside, lse, delta, factor)
            if TAIL > 0:
                dq += _logit_gradient(q, do, k_tail, v_tail, inside_tail, lse, delta, factor)
            _store(dq_ptr + head * D, dq * scale, pillar, m < end, HEADS * D, D, BLOCK_D)
            tl.store(delta_ptr + head + pillar * HEADS, delta, mask=m < end)


@triton.jit
def _flat_window_dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, order_ptr, groups_ptr, dk_ptr, dv_ptr,
    q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv = p^T do and dk = scale * ds^T q, summed over the groups that attend to a key.

    One program owns BLOCK_N pillars of one head of a group, each of which belongs to one group only, and walks over
    the queries of the group and of the next one, if that attends back into this. The order is fixed and no atomics are
    used, so the result is the same in every run. FLOPs a key and head: 8 G D.
    """
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    row = groups_ptr + tl.program_id(0) // HEADS // PARTS * 3
    begin, end, first = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    next_begin, next_end, next_first = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    if begin + part * BLOCK_N < end:
        n = begin + part * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < end
        key = tl.load(order_ptr + n, mask=inside, other=0)
        k = _load(k_ptr + head * D, key, inside, k_stride, D, BLOCK_D)
        v = _load(v_ptr + head * D, key, inside, v_stride, D, BLOCK_D)
        factor = scale * LOG2E
        tiles = tl.where(first < 0, 0, (end - begin + BLOCK_M - 1) // BLOCK_M)
        shared = (next_first >= 0) & (next_first < next_begin)
        more = tl.where(shared, (next_end - next_begin + BLOCK_M - 1) // BLOCK_M, 0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for tile in tl.range(0, tiles + more):
            own = tile < tiles
            start = tl.where(own, begin + tile * BLOCK_M, next_begin + (tile - tiles) * BLOCK_M)
            stop = tl.where(own, end, next_end)
            seen = n >= tl.where(own, begin, next_first)
            m = start + tl.arange(0, BLOCK_M)
            pillar = tl.load(order_ptr + m, mask=m < stop, other=0)
            q = _load(q_ptr + head * D, pillar, m < stop, q_stride, D, BLOCK_D)
            do = _load(grad_ptr + head * D, pillar, m < stop, HEADS * D, D, BLOCK_D)
            lse = tl.load(lse_ptr + head + pillar * HEADS, mask=m < stop, other=0.0)
            delta = tl.load(delta_ptr + head + pillar * HEADS, mask=m < stop, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * factor
            # Queries past the end load zeros, which add nothing.
            p = tl.where(seen[:, None], tl.exp2(s - lse[None, :]), 0.0)  # [BLOCK_N, BLOCK_M]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision="ieee")
        _store(dk_ptr + head * D, dk * scale, key, inside, HEADS * D, D, BLOCK_D)
        _store(dv_ptr + head * D, dv, key, inside, HEADS * D, D, BLOCK_D)


def key_tiles(group_size: int) -> tuple[int, int]:
    """BLOCK_N and TAIL, powers of two that hold a group with little waste."""
    whole = max(16, triton.next_power_of_2(group_size))
    if whole <= 16:
        return whole, 0
    tail = max(16, triton.next_power_of_2(group_size - whole // 2))
    return (whole, 0) if tail == whole // 2 <= 64 else (whole // 2, tail)


# Tiles of queries by kernel and kind of problem: BLOCK_M queries, TILES tiles of a program, and the warps that the
# logits of a tile fit. PREFETCH is the forward kernel's.
TUNING = {
    "forward": {
        "narrow": dict(BLOCK_M=64, TILES=3, PREFETCH=True, num_warps=4, num_stages=1),
        "wide": dict(BLOCK_M=32, TILES=2, PREFETCH=False, num_warps=8, num_stages=1),
        "float32": dict(BLOCK_M=16, TILES=3, PREFETCH=False, num_warps=8, num_stages=1),
    },
    "dq": {
        "narrow": dict(BLOCK_M=16, TILES=3, num_warps=1, num_stages=1),
        "wide": dict(BLOCK_M=32, TILES=2, num_warps=8, num_stages=1),
        "float32": dict(BLOCK_M=16, TILES=3, num_warps=8, num_stages=1),
    },
}


class Plan(NamedTuple):
    """Grids and configurations by kernel."""

    forward: tuple[tuple[int], dict]
    dq: tuple[tuple[int], dict]
    dkv: tuple[tuple[int], dict]


def _kind(keys: int, block_d: int, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "float32"
    return "narrow" if block_d <= 32 and keys <= 144 else "wide"


@functools.lru_cache(maxsize=64)
def plan(groups: int, heads: int, head_dim: int, group_size: int, dtype: torch.dtype) -> Plan:
    """Choose tiles, configurations and grids."""
    block_n, tail = key_tiles(group_size)
    block_d = max(16, triton.next_power_of_2(head_dim))
    shared, kind = dict(HEADS=heads, D=head_dim, BLOCK_D=block_d), _kind(block_n + tail, block_d, dtype)
    chosen = []
    for table in (TUNING["forward"], TUNING["dq"]):
        tiles = table[kind]
        parts = triton.cdiv(group_size, tiles["BLOCK_M"] * tiles["TILES"])
        chosen.append({**shared, **tiles, "PARTS": parts, "BLOCK_N": block_n, "TAIL": tail})
    own = min(32 if dtype != torch.float32 and block_d <= 32 else 16, block_n)
    chosen.append(dict(shared, BLOCK_M=own, BLOCK_N=own, PARTS=triton.cdiv(group_size, own), num_warps=2, num_stages=1))
    return Plan(*(((groups * config["PARTS"] * heads,), config) for config in chosen))


def _packed(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose pillars are contiguous within, as the kernels read them."""
    return [x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Tensor, group_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: out [V, M, D] and log2-sum-exp [V, M]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = _packed(q, k, v)
    strides = q.stride(0), k.stride(0), v.stride(0)
    grid, config = plan(len(groups) - 1, *q.shape[1:], group_size, q.dtype).forward
    _flat_window_forward_kernel[grid](q, k, v, order, groups, out, lse, *strides, scale, **config)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, order: Tensor, groups: Tensor,
    group_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: gradients of q, k and v, contiguous and in their dtype."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if out.numel() == 0:
        return dq, dk, dv
    (q, k, v), grad, delta = _packed(q, k, v), grad.contiguous(), torch.empty_like(lse)
    strides = q.stride(0), k.stride(0), v.stride(0)
    chosen = plan(len(groups) - 1, *q.shape[1:], group_size, q.dtype)
    grid, config = chosen.dq
    _flat_window_dq_kernel[grid](q, k, v, out, grad, lse, order, groups, dq, delta, *strides, scale, **config)
    grid, config = chosen.dkv
    _flat_window_dkv_kernel[grid](q, k, v, grad, lse, delta, order, groups, dk, dv, *strides, scale, **config)
    return dq, dk, dv
