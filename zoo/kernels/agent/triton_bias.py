"""Triton kernels of the position bias of agent attention, then their launchers: expansion and gradient.

The attention kernels read an expanded bias [M, T, P]: T tokens, agents padded to P, times log2(e). It does not depend
on the batch: expanding costs 2 M T P bytes each way (16-bit inputs), against 8 B T C for queries, keys, values and
output, which is P / 2D of these at batch 1 and that over B otherwise. Computing it in the attention kernels
instead would cost six loads per logit and image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.agent.reference import AgentBias

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _source(i, ratio):
    """Where position i of the grid lies between the cells of a block, as bilinear resizing has it."""
    return tl.maximum((i.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)


@triton.jit
def _expanded_tile(
    block_ptr, row_ptr, column_ptr, extra_ptr, block_stride_m, block_stride_a, block_stride_h, block_stride_w,
    row_stride_m, row_stride_a, row_stride_h, column_stride_m, column_stride_a, column_stride_w,
    extra_stride_m, extra_stride_a, head, token, agent, agents, H, W, h, w, ratio_h, ratio_w, EXTRA: tl.constexpr,
):  # fmt: skip
    """[T, P] bias of some tokens, in units of log2."""
    place = token - EXTRA
    y = tl.maximum(place, 0) // W
    x = tl.maximum(place, 0) % W
    inside = (agent < agents)[None, :] & ((place >= 0) & (y < H))[:, None]
    source_y, source_x = _source(y, ratio_h), _source(x, ratio_w)
    top, left = tl.minimum(source_y.to(tl.int32), h - 1), tl.minimum(source_x.to(tl.int32), w - 1)
    bottom, right = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
    low, across = (source_y - top)[:, None], (source_x - left)[:, None]

    at = block_ptr + head * block_stride_m + agent[None, :] * block_stride_a
    top, bottom = at + (top * block_stride_h)[:, None], at + (bottom * block_stride_h)[:, None]
    left, right = (left * block_stride_w)[:, None], (right * block_stride_w)[:, None]
    b00 = tl.load(top + left, mask=inside, other=0.0).to(tl.float32)
    b01 = tl.load(top + right, mask=inside, other=0.0).to(tl.float32)
    b10 = tl.load(bottom + left, mask=inside, other=0.0).to(tl.float32)
    b11 = tl.load(bottom + right, mask=inside, other=0.0).to(tl.float32)
    bias = (b00 * (1 - across) + b01 * across) * (1 - low) + (b10 * (1 - across) + b11 * across) * low
    at = row_ptr + head * row_stride_m + agent[None, :] * row_stride_a + y[:, None] * row_stride_h
    bias += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = column_ptr + head * column_stride_m + agent[None, :] * column_stride_a + x[:, None] * column_stride_w
    bias += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if EXTRA:
        at = extra_ptr + head * extra_stride_m + agent * extra_stride_a
        extra = tl.load(at, mask=agent < agents, other=0.0).to(tl.float32)
        bias = tl.where((token == 0)[:, None], extra[None, :], bias)
    return bias * LOG2E


_SIZES = ["agents", "H", "W", "h", "w", "tokens"]


@triton.jit(do_not_specialize=_SIZES)
def _expand_kernel(
    block_ptr, row_ptr, column_ptr, extra_ptr, out_ptr,
    block_stride_m, block_stride_a, block_stride_h, block_stride_w, row_stride_m, row_stride_a, row_stride_h,
    column_stride_m, column_stride_a, column_stride_w, extra_stride_m, extra_stride_a,
    agents, H, W, h, w, ratio_h, ratio_w, tokens, EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[m, t, j] = log2(e) * (resize(block) + row + column) of BLOCK_T tokens and one head.

    16-bit outputs are float16 for every 16-bit input: a bias is small, and three more bits of it cost nothing.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    agent = tl.arange(0, PITCH)
    bias = _expanded_tile(
        block_ptr, row_ptr, column_ptr, extra_ptr, block_stride_m, block_stride_a, block_stride_h, block_stride_w,
        row_stride_m, row_stride_a, row_stride_h, column_stride_m, column_stride_a, column_stride_w,
        extra_stride_m, extra_stride_a, head, token, agent, agents, H, W, h, w, ratio_h, ratio_w, EXTRA,
    )  # fmt: skip
    if out_ptr.dtype.element_ty == tl.float16:
        bias = tl.minimum(tl.maximum(bias, -65504.0), 65504.0)
    out_ptr += head.to(tl.int64) * tokens * PITCH
    at = out_ptr + token[:, None] * PITCH + agent[None, :]
    tl.store(at, bias.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=[*_SIZES, "chunks"])
def _row_gradient_kernel(
    grad_ptr, row_ptr, extra_ptr, strip_ptr, agents, H, W, w, ratio_w, tokens, chunks,
    EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr,
):  # fmt: skip
    """Sums over one row y of the gradient [chunks, M, T, P] of an expanded bias, or its extra token.

    row[m, j, y] = sum over x; strip[m, y, b, j] = sum over x of what cell b of the block contributes to x. The sum
    over chunks replaces chunk 0, for the columns.
    """
    y, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    agent = tl.arange(0, PITCH)
    chunk = heads.to(tl.int64) * tokens * PITCH
    grad_ptr += head.to(tl.int64) * tokens * PITCH
    if y == H:
        total = tl.zeros([PITCH], tl.float32)
        for c in range(chunks):
            total += tl.load(grad_ptr + c * chunk + agent)
        tl.store(extra_ptr + head * agents + agent, total.to(extra_ptr.dtype.element_ty), mask=agent < agents)
    else:
        cell = tl.arange(0, BLOCK_CELL)
        total = tl.zeros([PITCH], tl.float32)
        strip = tl.zeros([BLOCK_CELL, PITCH], tl.float32)
        for start in range(0, W, BLOCK_W):
            x = start + tl.arange(0, BLOCK_W)
            at = grad_ptr + ((y * W + x + EXTRA) * PITCH)[:, None] + agent[None, :]
            mask = (x < W)[:, None] & (agent < agents)[None, :]
            tile = tl.load(at, mask=mask, other=0.0)
            for c in range(1, chunks):
                tile += tl.load(at + c * chunk, mask=mask, other=0.0)
            if chunks > 1:
                tl.store(at, tile, mask=mask)
            total += tl.sum(tile, 0)
            source = tl.minimum(_source(x, ratio_w), (w - 1).to(tl.float32))
            weight = tl.maximum(1 - tl.abs(source[None, :] - cell[:, None].to(tl.float32)), 0.0)
            strip = tl.dot(weight, tile, strip, input_precision="ieee")
        at = row_ptr + (head * agents + agent) * H + y
        tl.store(at, total.to(row_ptr.dtype.element_ty), mask=agent < agents)
        at = strip_ptr + ((head * H + y) * w + cell)[:, None] * PITCH + agent[None, :]
        tl.store(at, strip, mask=(cell < w)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _column_gradient_kernel(
    grad_ptr, strip_ptr, block_ptr, column_ptr, agents, H, W, h, w, ratio_h, tokens,
    EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sums over y: column[m, j, x] of the gradient, or block[m, j, a, b] of the strips of `_row_gradient_kernel`."""
    p, head = tl.program_id(0), tl.program_id(1)
    agent = tl.arange(0, PITCH)
    total = tl.zeros([PITCH], tl.float32)
    grad_ptr += head.to(tl.int64) * tokens * PITCH
    if p < W:
        for start in range(0, H, BLOCK_H):
            y = start + tl.arange(0, BLOCK_H)
            at = grad_ptr + ((y * W + p + EXTRA) * PITCH)[:, None] + agent[None, :]
            mask = (y < H)[:, None] & (agent < agents)[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        at = column_ptr + (head * agents + agent) * W + p
        tl.store(at, total.to(column_ptr.dtype.element_ty), mask=agent < agents)
    else:
        a, b = (p - W) // w, (p - W) % w
        for start in range(0, H, BLOCK_H):
            y = start + tl.arange(0, BLOCK_H)
            source = tl.minimum(_source(y, ratio_h), (h - 1).to(tl.float32))
            weight = tl.maximum(1 - tl.abs(source - a.to(tl.float32)), 0.0)
            at = strip_ptr + (((head * H + y) * w + b) * PITCH)[:, None] + agent[None, :]
            strip = tl.load(at, mask=(y < H)[:, None] & (weight > 0)[:, None], other=0.0)
            total += tl.sum(strip * weight[:, None], 0)
        at = block_ptr + ((head * agents + agent) * h + a) * w + b
        tl.store(at, total.to(block_ptr.dtype.element_ty), mask=agent < agents)


def expand(bias: AgentBias, grid: list[int], dtype: torch.dtype, pitch: int) -> Tensor:
    """Launch the expansion for inputs of a dtype: [M, T, pitch] times log2(e)."""
    (M, n, h, w), (H, W) = bias.block.shape, grid
    lead = 0 if bias.extra is None else 1
    tokens = lead + H * W
    out = torch.empty(
        M, tokens, pitch, dtype=dtype if dtype == torch.float32 else torch.float16, device=bias.row.device
    )
    extra = bias.row[:, :, 0] if bias.extra is None else bias.extra
    block_t = max(1, 1024 // pitch)
    _expand_kernel[(triton.cdiv(tokens, block_t), M)](
        bias.block, bias.row, bias.column, extra, out,
        *bias.block.stride(), *bias.row.stride(), *bias.column.stride(), *extra.stride(),
        n, H, W, h, w, h / H, w / W, tokens, EXTRA=lead, PITCH=pitch, BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip
    return out


def reduce(grad: Tensor, bias: AgentBias, grid: list[int]) -> AgentBias:
    """Launch the sums over rows and columns of a gradient [chunks, M, T, pitch]; overwrites its first chunk."""
    (M, n, h, w), (H, W) = bias.block.shape, grid
    chunks, _, tokens, pitch = grad.shape
    lead = tokens - H * W
    block, row, column, extra = (
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in bias
    )  # fmt: skip
    strip = torch.empty(M, H, w, pitch, dtype=torch.float32, device=grad.device)
    _row_gradient_kernel[(H + lead, M)](
        grad, row, row if extra is None else extra, strip, n, H, W, w, w / W, tokens, chunks,
        EXTRA=lead, PITCH=pitch, BLOCK_W=16, BLOCK_CELL=max(16, triton.next_power_of_2(w)), num_warps=4,
    )  # fmt: skip
    _column_gradient_kernel[(W + h * w, M)](
        grad, strip, block, column, n, H, W, h, w, h / H, tokens,
        EXTRA=lead, PITCH=pitch, BLOCK_H=max(1, 2048 // pitch), num_warps=4,
    )  # fmt: skip
    return AgentBias(block, row, column, extra)
