"""Triton kernels of the depth-wise convolution, then their launchers.

Maps are [B, H, W, C] with unit channel stride, read in place. Weights come transposed, [k, k, C] in float32,
so that the channels of a tap are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["H", "W"])
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    x_stride_b, x_stride_h, x_stride_w, r_stride_b, r_stride_h, r_stride_w, H, W, C,
    KERNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SELF: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = residual + bias + sum over taps of weight[tap] * x[shifted by tap], accumulated in float32.

    One program computes a tile of BLOCK_H x BLOCK_W tokens and BLOCK_C channels. FLIP mirrors the taps, which
    makes it the gradient of the input. Bytes: x (and residual) read and out written once from HBM, x
    KERNEL**2 times from L1. FLOPs: 2 KERNEL**2 a value. Memory-bound.
    """
    pid = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    tiles_w = tl.cdiv(W, BLOCK_W)
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    row = (pid // tiles_w) * BLOCK_H + p // BLOCK_W
    col = (pid % tiles_w) * BLOCK_W + p % BLOCK_W
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    # One set of addresses; each tap shifts it by a scalar.
    centre = x_ptr + b * x_stride_b + (row * x_stride_h + col * x_stride_w)[:, None] + c[None, :]

    acc = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    for i in tl.static_range(KERNEL):
        dy = i - KERNEL // 2
        y_inside = (row + dy >= 0) & (row + dy < H)
        for j in tl.static_range(KERNEL):
            dx = j - KERNEL // 2
            inside = y_inside & (col + dx >= 0) & (col + dx < W)
            x = tl.load(
                centre + (dy * x_stride_h + dx * x_stride_w), mask=inside[:, None] & c_inside[None, :], other=0.0
            ).to(tl.float32)  # fmt: skip
            tap = KERNEL * KERNEL - 1 - i * KERNEL - j if FLIP else i * KERNEL + j
            acc += x * tl.load(weight_ptr + tap * C + c, mask=c_inside, other=0.0)[None, :]
            if SELF and dy == 0 and dx == 0:
                acc += x
    if BIAS:
        acc += tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
    mask = ((row < H) & (col < W))[:, None] & c_inside[None, :]
    if RESIDUAL:
        offset = (row * r_stride_h + col * r_stride_w)[:, None] + c[None, :]
        acc += tl.load(residual_ptr + b * r_stride_b + offset, mask=mask, other=0.0).to(tl.float32)
    offset = (row * W + col) * C
    tl.store(out_ptr + b * H * W * C + offset[:, None] + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "W", "splits", "chunk"])
def _weight_grad_kernel(
    x_ptr, grad_ptr, dw_ptr, db_ptr,
    x_stride_b, x_stride_h, x_stride_w, H, W, C, splits, chunk,
    KERNEL: tl.constexpr, BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums over one chunk of an image: dw[i, j] = sum of grad * x[shifted by (i, j)], db = sum of grad.

    One program handles one row i of taps and BLOCK_C channels and keeps KERNEL running products in
    registers, so that tokens are summed across threads once, at the end. The caller adds the chunks:
    no atomics, the same result in every run.
    """
    part = tl.program_id(0)
    i = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    b = (part // splits).to(tl.int64)
    begin = (part % splits) * chunk
    end = tl.minimum(begin + chunk, H * W)
    dy = i - KERNEL // 2
    x_ptr += b * x_stride_b
    grad_ptr += b * H * W * C
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    a0, a1, a2, a3, a4, a5, a6, bias = zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(begin, end, BLOCK_P):
        t = start + tl.arange(0, BLOCK_P)
        row = ((t.to(tl.float32) + 0.5) / W).to(tl.int32)  # exact up to 2**20 tokens
        col = t - row * W
        g = tl.load(
            grad_ptr + (t * C)[:, None] + c[None, :], mask=(t < end)[:, None] & c_inside[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        if BIAS:
            bias += g
        row += dy
        y_inside = (t < end) & (row >= 0) & (row < H)
        centre = x_ptr + (row * x_stride_h + col * x_stride_w)[:, None] + c[None, :]
        for j in tl.static_range(KERNEL):
            dx = j - KERNEL // 2
            inside = y_inside & (col + dx >= 0) & (col + dx < W)
            x = tl.load(
                centre + dx * x_stride_w, mask=inside[:, None] & c_inside[None, :], other=0.0
            ).to(tl.float32)  # fmt: skip
            if j == 0:
                a0 += g * x
            elif j == 1:
                a1 += g * x
            elif j == 2:
                a2 += g * x
            elif j == 3:
                a3 += g * x
            elif j == 4:
                a4 += g * x
            elif j == 5:
                a5 += g * x
            else:
                a6 += g * x
    out = dw_ptr + ((part * KERNEL + i) * KERNEL).to(tl.int64) * C + c
    for j in tl.static_range(KERNEL):
        if j == 0:
            total = tl.sum(a0, 0)
        elif j == 1:
            total = tl.sum(a1, 0)
        elif j == 2:
            total = tl.sum(a2, 0)
        elif j == 3:
            total = tl.sum(a3, 0)
        elif j == 4:
            total = tl.sum(a4, 0)
        elif j == 5:
            total = tl.sum(a5, 0)
        else:
            total = tl.sum(a6, 0)
        tl.store(out + j * C, total, mask=c_inside)
    if BIAS and i == 0:
        tl.store(db_ptr + part.to(tl.int64) * C + c, tl.sum(bias, 0), mask=c_inside)


def _unit_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _taps(weight: Tensor) -> Tensor:
    """[C, 1, k, k] -> [k, k, C] float32"""
    return weight[:, 0].permute(1, 2, 0).float().contiguous()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, add_input: bool, flip: bool = False
) -> Tensor:
    """Launch the convolution: [B, H, W, C] in the dtype of x."""
    x = _unit_channels(x)
    B, H, W, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    residual = None if residual is None else _unit_channels(residual)
    block_c = min(64, max(16, triton.next_power_of_2(C)))
    block_h, block_w = 2, min(8, triton.next_power_of_2(W))
    grid = (triton.cdiv(H, block_h) * triton.cdiv(W, block_w), triton.cdiv(C, block_c), B)
    r = x if residual is None else residual
    _conv_kernel[grid](
        x, _taps(weight), x if bias is None else bias, r, out, *x.stride()[:3], *r.stride()[:3], H, W, C,
        KERNEL=weight.shape[-1], BIAS=bias is not None, RESIDUAL=residual is not None, SELF=add_input, FLIP=flip,
        BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=2,
    )  # fmt: skip
    return out


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Launch the weight gradient: dw [C, 1, k, k] and db [C] (empty without bias), in the weight's dtype."""
    x, grad = _unit_channels(x), grad.contiguous()
    B, H, W, C = x.shape
    kernel = weight.shape[-1]
    if x.numel() == 0:
        return torch.zeros_like(weight), weight.new_zeros(C if with_bias else 0)
    block_c = min(64, max(16, triton.next_power_of_2(C)))
    # About 512 chunks fill a GPU; fewer than 64 tokens a chunk would cost more in partial sums than they save.
    splits = max(1, min(triton.cdiv(H * W, 64), 512 // (B * triton.cdiv(C, block_c))))
    chunk, parts = triton.cdiv(H * W, splits), B * splits
    dw = torch.empty(parts, kernel, kernel, C, dtype=torch.float32, device=x.device)
    db = torch.empty(parts, C if with_bias else 0, dtype=torch.float32, device=x.device)
    _weight_grad_kernel[(parts, kernel, triton.cdiv(C, block_c))](
        x, grad, dw, db, *x.stride()[:3], H, W, C, splits, chunk,
        KERNEL=kernel, BIAS=with_bias, BLOCK_P=8, BLOCK_C=block_c, num_warps=2,
    )  # fmt: skip
    dw = dw.sum(0).permute(2, 0, 1)[:, None]  # [C, 1, k, k]
    return dw.to(weight.dtype).contiguous(), db.sum(0).to(weight.dtype)
