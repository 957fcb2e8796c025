"""Triton kernels that reduce the sites of pillars, then their launchers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sites_of(rows_ptr, N, Z: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Rows of the sites of one pillar at BLOCK_Z heights, and at which there is one."""
    z = tl.arange(0, BLOCK_Z)
    row = tl.load(rows_ptr + tl.program_id(0).to(tl.int64) * Z + z, mask=z < Z, other=N)
    return row, row < N


@triton.jit(do_not_specialize=["N"])
def _pillar_max_kernel(
    x_ptr, rows_ptr, out_ptr, N, stride, C: tl.constexpr, Z: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Z: tl.constexpr
):  # fmt: skip
    """Maximum of a pillar's sites and 0. One program computes one pillar."""
    row, met = _sites_of(rows_ptr, N, Z, BLOCK_Z)
    c = tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + row[:, None] * stride + c[None, :], mask=met[:, None] & (c < C)[None, :], other=0.0)
    # A pillar with a site at every height has no other zero.
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.maximum(tl.max(x, 0), 0.0), mask=c < C)


@triton.jit(do_not_specialize=["N"])
def _pillar_attention_kernel(
    q_ptr, k_ptr, v_ptr, place_ptr, rows_ptr, out_ptr, N, k_stride, v_stride, scale,
    HEADS: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """out = softmax over the sites of a pillar of (scale q (k + place)) v, for each head.

    One program computes one pillar: a single query is too little for a matrix product. Bytes a pillar: C elements of q
    and out, 2 C of each site. Nothing is gathered in memory, which costs 2 Z C elements a pillar otherwise, several
    times.
    """
    C: tl.constexpr = HEADS * D
    row, met = _sites_of(rows_ptr, N, Z, BLOCK_Z)
    c = tl.arange(0, C)
    pillar = tl.program_id(0).to(tl.int64) * C
    q = tl.load(q_ptr + pillar + c).to(tl.float32)
    k = tl.load(k_ptr + row[:, None] * k_stride + c[None, :], mask=met[:, None], other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row[:, None] * v_stride + c[None, :], mask=met[:, None], other=0.0).to(tl.float32)
    z = tl.arange(0, BLOCK_Z)
    k += tl.load(place_ptr + z[:, None] * C + c[None, :], mask=met[:, None], other=0.0).to(tl.float32)
    logits = tl.sum(tl.reshape(k * q[None, :], [BLOCK_Z, HEADS, D]), 2) * scale  # [BLOCK_Z, HEADS]
    logits = tl.where(met[:, None], logits, float("-inf"))
    largest = tl.max(logits, 0)
    # Padding has no site, and its result is zero.
    p = tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
    total = tl.sum(p, 0)
    share = p / tl.where(total == 0, 1.0, total)[None, :]
    out = tl.sum(share[:, :, None] * tl.reshape(v, [BLOCK_Z, HEADS, D]), 0)  # [HEADS, D]
    tl.store(out_ptr + pillar + c, tl.reshape(out, [C]).to(out_ptr.dtype.element_ty))


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def pillar_max(x: Tensor, rows: Tensor) -> Tensor:
    """Launch the maximum: [P, C]."""
    (P, Z), (N, C) = rows.shape, x.shape
    out = x.new_empty(P, C)
    if out.numel():
        x = _dense_channels(x)
        _pillar_max_kernel[(P,)](
            x, rows.contiguous(), out, N, x.stride(0), C=C, Z=Z, BLOCK_C=triton.next_power_of_2(C),
            BLOCK_Z=triton.next_power_of_2(Z), num_warps=1,
        )  # fmt: skip
    return out


def pillar_attention(q: Tensor, k: Tensor, v: Tensor, place: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Launch the attention: [P, C]; C and the channels of a head are powers of two."""
    (P, Z), (N, C) = rows.shape, k.shape
    out = q.new_empty(P, C)
    if out.numel():
        k, v = _dense_channels(k), _dense_channels(v)
        _pillar_attention_kernel[(P,)](
            q.contiguous(), k, v, place.contiguous(), rows.contiguous(), out, N, k.stride(0), v.stride(0),
            (C // heads) ** -0.5, HEADS=heads, D=C // heads, Z=Z, BLOCK_Z=triton.next_power_of_2(Z), num_warps=2,
        )  # fmt: skip
    return out
