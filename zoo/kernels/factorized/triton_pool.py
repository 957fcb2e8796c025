"""Triton kernels of cross-window pooling, then their launchers.

Windows are read from the map in place: positions past the edge are reflected by index arithmetic. Divisions go through
float32 reciprocals, exact for numbers up to 2**21.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _divide(x, reciprocal):
    """floor(x / n) of small non-negative integers for reciprocal = 1 / n; the half keeps rounding off the boundary."""
    return ((x.to(tl.float32) + 0.5) * reciprocal).to(tl.int32)


@triton.jit
def _reciprocal(n):
    return 1.0 / n.to(tl.float32)


@triton.jit
def _period(size):
    """Period of an axis that is continued by reflection."""
    return tl.maximum(2 * size - 2, 1)


@triton.jit
def _reflect(position, size):
    """Source index of a position at or past the start of an axis."""
    period = _period(size)
    rest = position - _divide(position, _reciprocal(period)) * period
    return tl.minimum(rest, period - rest)


@triton.jit
def _images(size, covered):
    """How many positions of the `covered` ones can be reflections of one index."""
    return tl.where(covered == size, 1, 2 * tl.cdiv(covered, _period(size)))


@triton.jit
def _image(index, i, size, covered):
    """The i-th position whose reflection is `index`, and whether it exists."""
    period = _period(size)
    mirrored = i % 2
    position = (i // 2 + mirrored) * period + index * (1 - 2 * mirrored)
    # The first and the last index are their own mirror images: these must not count twice.
    edge = (index == 0) | (index == size - 1)
    position += tl.where(edge, mirrored * covered, 0)
    return position, position < covered


@triton.jit
def _locate(position, span, dilation):
    """Window of a position along one axis, number of the position in it, and whether the window samples it."""
    window = _divide(position, _reciprocal(span))
    rest = position - window * span
    number = _divide(rest, _reciprocal(dilation))
    return window, number, rest == number * dilation


@triton.jit(do_not_specialize=["H", "W", "dilation_1", "dilation_2"])
def _window_pool_kernel(
    x_ptr, out_ptr, x_stride_b, x_stride_h, x_stride_w, H, W, dilation_1, dilation_2,
    P: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, OFFICIAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out[c] = mean of R of the R x D values that the R windows hold at one position, for each head.

    OFFICIAL takes the c-th run of the values in the order (window, channel), otherwise channel c of every window. One
    program computes BLOCK_C channels of one position of one group, BLOCK_W of the R values at a time. Bytes: the
    sampled tokens once from HBM (N C b for dilation 1), the result is small. Memory-bound.
    """
    b = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    position = tl.program_id(0) % (P * P)
    channel = (tl.program_id(0) // (P * P)) * BLOCK_C + tl.arange(0, BLOCK_C)
    dilation = tl.where(group == 0, dilation_1, dilation_2)
    span = dilation * (P - 1) + 1
    cols = tl.cdiv(W, span)
    windows = tl.cdiv(H, span) * cols
    y = (position // P) * dilation
    x = (position % P) * dilation
    head = channel // D
    c_out = channel - head * D
    x_ptr += b * x_stride_b + group * (HEADS * D)

    total = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    for start in range(0, windows, BLOCK_W):
        i = start + tl.arange(0, BLOCK_W)
        if OFFICIAL:
            entry = c_out[:, None] * windows + i[None, :]
            window = entry // D
            c = entry - window * D
        else:
            window = i[None, :]
            c = c_out[:, None]
        row = _divide(window, _reciprocal(cols))
        source_row = _reflect(row * span + y, H)
        source_col = _reflect((window - row * cols) * span + x, W)
        offset = source_row * x_stride_h + source_col * x_stride_w + (head * D)[:, None] + c
        mask = (channel < HEADS * D)[:, None] & (i < windows)[None, :]
        total += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / windows.to(tl.float32)
    at = ((group * tl.num_programs(2) + b) * (P * P) + position) * (HEADS * D) + channel
    tl.store(out_ptr + at, mean.to(out_ptr.dtype.element_ty), mask=channel < HEADS * D)


@triton.jit(do_not_specialize=["H", "W", "dilation_1", "dilation_2"])
def _window_pool_grad_kernel(
    grad_ptr, dx_ptr, H, W, dilation_1, dilation_2,
    GROUPS: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, OFFICIAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The transpose of `_window_pool_kernel`: dx[token] = sum over the windows that sample the token of grad / R.

    One program computes BLOCK_T tokens and BLOCK_C channels of one group. It goes through the positions that reflect to
    its tokens, one unless the map is padded, and skips those that no window samples, which are most of a dilated
    group. No atomics. Bytes: dx written once (N C b). Memory-bound.
    """
    b = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(HEADS * D, BLOCK_C)
    group = tl.program_id(1) // blocks
    channel = (tl.program_id(1) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_row = _divide(token, _reciprocal(W))
    token_col = token - token_row * W
    dilation = tl.where(group == 0, dilation_1, dilation_2)
    span = dilation * (P - 1) + 1
    rows = tl.cdiv(H, span)
    cols = tl.cdiv(W, span)
    windows = rows * cols
    head = channel // D
    c = channel - head * D
    grad_ptr += (group * tl.num_programs(2) + b) * (P * P * HEADS * D)

    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for i in range(0, _images(H, rows * span)):
        y, row_inside = _image(token_row, i, H, rows * span)
        row, number_y, sampled = _locate(y, span, dilation)
        row_inside = row_inside & sampled & (token < H * W)
        if tl.max(row_inside.to(tl.int32)) > 0:
            for j in range(0, _images(W, cols * span)):
                x, inside = _image(token_col, j, W, cols * span)
                col, number_x, sampled = _locate(x, span, dilation)
                inside = inside & sampled & row_inside
                if tl.max(inside.to(tl.int32)) > 0:
                    if OFFICIAL:
                        entry = ((row * cols + col) * D)[:, None] + c[None, :]
                        c_out = _divide(entry, _reciprocal(windows))
                    else:
                        c_out = c[None, :]
                    offset = ((number_y * P + number_x) * (HEADS * D))[:, None] + (head * D)[None, :] + c_out
                    mask = inside[:, None] & (channel < HEADS * D)[None, :]
                    total += tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    total = total / windows.to(tl.float32)
    mask = (token < H * W)[:, None] & (channel < HEADS * D)[None, :]
    offset = (token * (GROUPS * HEADS * D))[:, None] + (group * (HEADS * D) + channel)[None, :]
    dx_ptr += b * H * W * (GROUPS * HEADS * D)
    tl.store(dx_ptr + offset, total.to(dx_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, heads: int, window: int, dilations: list[int], fusion: str) -> Tensor:
    """Launch the pooling: [G, B, P, P, C / G] in the dtype of x."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, H, W, C = x.shape
    groups, width = len(dilations), C // len(dilations)
    out = torch.empty(groups, B, window, window, width, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    span = dilations[0] * (window - 1) + 1
    windows = triton.cdiv(H, span) * triton.cdiv(W, span)
    block_c = min(128, triton.next_power_of_2(width))
    block_w = min(triton.next_power_of_2(windows), max(1, 2048 // block_c))
    _window_pool_kernel[(window * window * triton.cdiv(width, block_c), groups, B)](
        x, out, *x.stride()[:3], H, W, dilations[0], dilations[-1],
        P=window, HEADS=heads, D=width // heads, OFFICIAL=fusion == "official",
        BLOCK_C=block_c, BLOCK_W=block_w, num_warps=4 if block_c * block_w >= 1024 else 2,
    )  # fmt: skip
    return out


def backward(grad: Tensor, height: int, width: int, heads: int, dilations: list[int], fusion: str) -> Tensor:
    """Launch its gradient: [B, H, W, C], contiguous, in the dtype of grad."""
    grad = grad.contiguous()
    groups, B, window, _, channels = grad.shape
    dx = torch.empty(B, height, width, groups * channels, dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        return dx
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    block_t = 1024 // block_c
    _window_pool_grad_kernel[(triton.cdiv(height * width, block_t), groups * triton.cdiv(channels, block_c), B)](
        grad, dx, height, width, dilations[0], dilations[-1],
        GROUPS=groups, P=window, HEADS=heads, D=channels // heads, OFFICIAL=fusion == "official",
        BLOCK_T=block_t, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return dx
