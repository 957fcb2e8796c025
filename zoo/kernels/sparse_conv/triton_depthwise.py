"""Triton kernels of depth-wise sparse convolution, then their launchers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _taps(group, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr):
    """First tap of a group of channels and the one behind its last; none for channels without a kernel."""
    start = tl.where(group == 0, 0, tl.where(group == 1, T0, tl.where(group == 2, T0 + T1, T0 + T1 + T2)))
    end = tl.where(group == 0, T0, tl.where(group == 1, T0 + T1, T0 + T1 + T2))
    return start, end


@triton.jit(do_not_specialize=["N"])
def _sparse_depthwise_kernel(
    x_ptr, weight_ptr, table_ptr, out_ptr, N, x_row,
    C: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    RESIDUAL: tl.constexpr, MIRROR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over the taps t of the channels' group of weight[t] x[table[t, n]] [+ x[n]].

    One program computes one group of D channels of BLOCK_M rows; groups behind the last kernel pass their channels
    on. All groups are one launch and one read of the table; the same kernel with reversed taps (MIRROR) computes the
    gradient of x. Bytes a row: 4 for each tap, D elements for each neighbour and two rows: bound by the latency and the
    bandwidth of L2, where rows stay.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside, channel = row < N, d < D
    start, end = _taps(group, T0, T1, T2)
    x_ptr += group * D + d[None, :]
    own = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row, mask=inside[:, None] & channel[None, :], other=0.0)
    own = own.to(tl.float32)
    acc = tl.where(group < KERNELS, 0.0, own)
    if RESIDUAL:
        acc += own
    table_row = N.to(tl.int64)
    for i in tl.range(start, end, loop_unroll_factor=4):
        at = tl.load(table_ptr + i * table_row + row, mask=inside, other=-1)
        x = tl.load(x_ptr + at.to(tl.int64)[:, None] * x_row, mask=(at >= 0)[:, None] & channel[None, :], other=0.0)
        tap = start + end - 1 - i if MIRROR else i
        weight = tl.load(weight_ptr + tap * D + d, mask=channel, other=0.0)
        acc += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    out_ptr += row.to(tl.int64)[:, None] * C + group * D + d[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & channel[None, :])


@triton.jit(do_not_specialize=["N", "chunk"])
def _sparse_depthwise_weight_kernel(
    x_ptr, grad_ptr, table_ptr, sums_ptr, N, chunk, x_row,
    C: tl.constexpr, D: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight[t] = sum over rows n of dout[n] x[table[t, n]].

    One program computes one tap over `chunk` rows; the caller adds the chunks, in a fixed order.
    """
    tap = tl.program_id(0)
    group = (tap >= T0).to(tl.int32) + (tap >= T0 + T1).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    channel = (d < D)[None, :]
    first = tl.program_id(1) * chunk
    x_ptr += group * D + d[None, :]
    grad_ptr += group * D + d[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(first, tl.minimum(first + chunk, N), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        at = tl.load(table_ptr + tap.to(tl.int64) * N + row, mask=row < N, other=-1)
        hit = (at >= 0)[:, None] & channel
        x = tl.load(x_ptr + at.to(tl.int64)[:, None] * x_row, mask=hit, other=0.0)
        grad = tl.load(grad_ptr + row.to(tl.int64)[:, None] * C, mask=hit, other=0.0)
        acc += x.to(tl.float32) * grad.to(tl.float32)
    sums_ptr += (tl.program_id(1) * (T0 + T1 + T2) + tap) * D + d
    tl.store(sums_ptr, tl.sum(acc, 0), mask=d < D)


# Programs of the weight gradient that fill a GPU.
PROGRAMS = 1024


def _three(taps: Sequence[int]) -> dict:
    return dict(zip(("T0", "T1", "T2"), (*taps, 0, 0)[:3], strict=True))


def convolve(x: Tensor, weight: Tensor, table: Tensor, taps: Sequence[int], residual: bool, mirror: bool) -> Tensor:
    """Launch the convolution: [N, C], contiguous."""
    (N, C), D = x.shape, weight.shape[1]
    out = torch.empty((N, C), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    block_d = max(8, triton.next_power_of_2(D))
    block_m = max(8, 2048 // block_d)
    _sparse_depthwise_kernel[(triton.cdiv(N, block_m), C // D)](
        x, weight.contiguous(), table, out, N, x.stride(0), C=C, D=D, KERNELS=len(taps), **_three(taps),
        RESIDUAL=residual, MIRROR=mirror, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


def weight_gradient(grad: Tensor, x: Tensor, table: Tensor, taps: Sequence[int], D: int) -> Tensor:
    """Launch the weight gradient: [T, D] in float32."""
    (T, N), C = table.shape, x.shape[1]
    if N == 0:
        return x.new_zeros((T, D), dtype=torch.float32)
    x, grad = x if x.stride(-1) == 1 else x.contiguous(), grad.contiguous()
    block_d = max(8, triton.next_power_of_2(D))
    block_m = max(8, 4096 // block_d)
    chunk = block_m * triton.cdiv(N, block_m * max(1, PROGRAMS // T))
    chunks = triton.cdiv(N, chunk)
    sums = torch.empty((chunks, T, D), dtype=torch.float32, device=x.device)
    _sparse_depthwise_weight_kernel[(T, chunks)](
        x, grad, table, sums, N, chunk, x.stride(0), C=C, D=D, **_three(taps),
        BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return sums.sum(0)
