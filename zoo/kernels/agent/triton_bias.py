"""Triton kernels of the position bias of agent attention, then their launchers: expansion and gradient.

The attention kernels read an expanded bias [M, T, P]: T tokens, agents padded to P, times log2(e). It has no batch
dimension: two of them written and read take 8 M T P bytes (16-bit inputs), against 8 B T C for queries, keys, values
and output, that is P / (B D) of these: a 32nd with 49 agents of 32 channels at batch 64, twice as much at batch 1. It
lives within the forward pass and again within the backward pass. Computing it in the attention kernels instead would
cost six loads per logit and image.
"""

from __future__ import annotations

from typing import NamedTuple

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
def _expand_tile(
    block_ptr, row_ptr, column_ptr, extra_ptr, out_ptr,
    block_stride_m, block_stride_a, block_stride_h, block_stride_w, row_stride_m, row_stride_a, row_stride_h,
    column_stride_m, column_stride_a, column_stride_w, extra_stride_m, extra_stride_a,
    H, W, h, w, ratio_h, ratio_w, tokens, agents, EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    agent = tl.arange(0, PITCH)
    place = token - EXTRA
    y = tl.maximum(place, 0) // W
    x = tl.maximum(place, 0) % W
    inside = (agent < agents)[None, :] & ((place >= 0) & (y < H))[:, None]
    source_y, source_x = _source(y, ratio_h), _source(x, ratio_w)
    top, left = tl.minimum(source_y.to(tl.int32), h - 1), tl.minimum(source_x.to(tl.int32), w - 1)
    bottom, right = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
    down, across = (source_y - top)[:, None], (source_x - left)[:, None]

    at = block_ptr + head * block_stride_m + agent[None, :] * block_stride_a
    top, bottom = at + (top * block_stride_h)[:, None], at + (bottom * block_stride_h)[:, None]
    left, right = (left * block_stride_w)[:, None], (right * block_stride_w)[:, None]
    b00 = tl.load(top + left, mask=inside, other=0.0).to(tl.float32)
    b01 = tl.load(top + right, mask=inside, other=0.0).to(tl.float32)
    b10 = tl.load(bottom + left, mask=inside, other=0.0).to(tl.float32)
    b11 = tl.load(bottom + right, mask=inside, other=0.0).to(tl.float32)
    bias = (b00 * (1 - across) + b01 * across) * (1 - down) + (b10 * (1 - across) + b11 * across) * down
    at = row_ptr + head * row_stride_m + agent[None, :] * row_stride_a + y[:, None] * row_stride_h
    bias += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = column_ptr + head * column_stride_m + agent[None, :] * column_stride_a + x[:, None] * column_stride_w
    bias += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if EXTRA:
        at = extra_ptr + head * extra_stride_m + agent * extra_stride_a
        extra = tl.load(at, mask=agent < agents, other=0.0).to(tl.float32)
        bias = tl.where((token == 0)[:, None], extra[None, :], bias)
    bias *= LOG2E
    if out_ptr.dtype.element_ty == tl.float16:
        bias = tl.minimum(tl.maximum(bias, -65504.0), 65504.0)
    at = out_ptr + head.to(tl.int64) * tokens * PITCH + token[:, None] * PITCH + agent[None, :]
    tl.store(at, bias.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None])


def _both(*names: str) -> list[str]:
    """Names of the arguments of both biases of a kernel."""
    return [f"{side}{name}" for side in ("", "other_") for name in names]


@triton.jit(do_not_specialize=[*_both("H", "W", "h", "w", "tokens"), "agents"])
def _expand_kernel(
    block_ptr, row_ptr, column_ptr, extra_ptr, out_ptr,
    block_stride_m, block_stride_a, block_stride_h, block_stride_w, row_stride_m, row_stride_a, row_stride_h,
    column_stride_m, column_stride_a, column_stride_w, extra_stride_m, extra_stride_a,
    H, W, h, w, ratio_h, ratio_w, tokens,
    other_block_ptr, other_row_ptr, other_column_ptr, other_extra_ptr, other_out_ptr,
    other_block_stride_m, other_block_stride_a, other_block_stride_h, other_block_stride_w,
    other_row_stride_m, other_row_stride_a, other_row_stride_h,
    other_column_stride_m, other_column_stride_a, other_column_stride_w, other_extra_stride_m, other_extra_stride_a,
    other_H, other_W, other_h, other_w, other_ratio_h, other_ratio_w, other_tokens,
    agents, EXTRA: tl.constexpr, OTHER_EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[m, t, j] = log2(e) * (resize(block) + row + column) of BLOCK_T tokens and one head, of one bias of two.

    16-bit outputs are float16 for every 16-bit input: a bias is small, and three more bits of it cost nothing.
    """
    if tl.program_id(2) == 0:
        _expand_tile(
            block_ptr, row_ptr, column_ptr, extra_ptr, out_ptr,
            block_stride_m, block_stride_a, block_stride_h, block_stride_w, row_stride_m, row_stride_a, row_stride_h,
            column_stride_m, column_stride_a, column_stride_w, extra_stride_m, extra_stride_a,
            H, W, h, w, ratio_h, ratio_w, tokens, agents, EXTRA, PITCH, BLOCK_T,
        )  # fmt: skip
    else:
        _expand_tile(
            other_block_ptr, other_row_ptr, other_column_ptr, other_extra_ptr, other_out_ptr,
            other_block_stride_m, other_block_stride_a, other_block_stride_h, other_block_stride_w,
            other_row_stride_m, other_row_stride_a, other_row_stride_h,
            other_column_stride_m, other_column_stride_a, other_column_stride_w,
            other_extra_stride_m, other_extra_stride_a, other_H, other_W, other_h, other_w,
            other_ratio_h, other_ratio_w, other_tokens, agents, OTHER_EXTRA, PITCH, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _reduce_row(
    grad_ptr, strip_ptr, row_ptr, extra_ptr, H, W, w, ratio_w, tokens, chunks, agents,
    EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr,
):  # fmt: skip
    y, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    agent = tl.arange(0, PITCH)
    chunk = heads.to(tl.int64) * tokens * PITCH
    grad_ptr += head.to(tl.int64) * tokens * PITCH
    total = tl.zeros([PITCH], tl.float32)
    if y < H:
        cell = tl.arange(0, BLOCK_CELL)
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
    elif y < H + EXTRA:
        for c in range(chunks):
            total += tl.load(grad_ptr + c * chunk + agent, mask=agent < agents, other=0.0)
        tl.store(extra_ptr + head * agents + agent, total.to(extra_ptr.dtype.element_ty), mask=agent < agents)


@triton.jit(do_not_specialize=[*_both("H", "W", "w", "tokens", "chunks"), "agents"])
def _row_gradient_kernel(
    grad_ptr, strip_ptr, row_ptr, extra_ptr, H, W, w, ratio_w, tokens, chunks,
    other_grad_ptr, other_strip_ptr, other_row_ptr, other_extra_ptr, other_H, other_W, other_w, other_ratio_w,
    other_tokens, other_chunks, agents, EXTRA: tl.constexpr, OTHER_EXTRA: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr,
):  # fmt: skip
    """Sums over one row y of the gradient [chunks, M, T, P] of an expanded bias of two, or its extra token.

    row[m, j, y] = sum over x; strip[m, y, b, j] = sum over x of what cell b of the block contributes to x. The sum
    over chunks replaces chunk 0, for the columns.
    """
    if tl.program_id(2) == 0:
        _reduce_row(
            grad_ptr, strip_ptr, row_ptr, extra_ptr, H, W, w, ratio_w, tokens, chunks, agents,
            EXTRA, PITCH, BLOCK_W, BLOCK_CELL,
        )  # fmt: skip
    else:
        _reduce_row(
            other_grad_ptr, other_strip_ptr, other_row_ptr, other_extra_ptr, other_H, other_W, other_w, other_ratio_w,
            other_tokens, other_chunks, agents, OTHER_EXTRA, PITCH, BLOCK_W, BLOCK_CELL,
        )  # fmt: skip


@triton.jit
def _reduce_column(
    grad_ptr, strip_ptr, block_ptr, column_ptr, H, W, h, w, ratio_h, tokens, agents,
    EXTRA: tl.constexpr, PITCH: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
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
    elif p < W + h * w:
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


@triton.jit(do_not_specialize=[*_both("H", "W", "h", "w", "tokens"), "agents"])
def _column_gradient_kernel(
    grad_ptr, strip_ptr, block_ptr, column_ptr, H, W, h, w, ratio_h, tokens,
    other_grad_ptr, other_strip_ptr, other_block_ptr, other_column_ptr, other_H, other_W, other_h, other_w,
    other_ratio_h, other_tokens, agents, EXTRA: tl.constexpr, OTHER_EXTRA: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sums over y: column[m, j, x] of the gradient, or block[m, j, a, b] of the strips of `_row_gradient_kernel`."""
    if tl.program_id(2) == 0:
        _reduce_column(
            grad_ptr, strip_ptr, block_ptr, column_ptr, H, W, h, w, ratio_h, tokens, agents, EXTRA, PITCH, BLOCK_H
        )
    else:
        _reduce_column(
            other_grad_ptr, other_strip_ptr, other_block_ptr, other_column_ptr, other_H, other_W, other_h, other_w,
            other_ratio_h, other_tokens, agents, OTHER_EXTRA, PITCH, BLOCK_H,
        )  # fmt: skip


class Side(NamedTuple):
    """A bias and the grid of its tokens."""

    bias: AgentBias
    grid: list[int]

    @property
    def lead(self) -> int:
        return 0 if self.bias.extra is None else 1

    @property
    def tokens(self) -> int:
        return self.lead + self.grid[0] * self.grid[1]


def _pair(arguments: list[list]) -> list:
    """Arguments of one or two sides as those of two; kernels take both, a launch less is a few microseconds less."""
    return [*arguments[0], *arguments[-1]]


def expand(sides: list[Side], dtype: torch.dtype, pitch: int) -> list[Tensor]:
    """Launch the expansion of one or two biases for inputs of a dtype: [M, T, pitch] each, times log2(e)."""
    M, n = sides[0].bias.row.shape[:2]
    dtype = dtype if dtype == torch.float32 else torch.float16
    outs, arguments = [], []
    for bias, (H, W) in sides:
        h, w = bias.block.shape[2:]
        tokens = Side(bias, (H, W)).tokens
        out = torch.empty(M, tokens, pitch, dtype=dtype, device=bias.row.device)
        parts = *bias[:3], bias.row[:, :, 0] if bias.extra is None else bias.extra
        strides = [stride for x in parts for stride in x.stride()]
        arguments.append([*parts, out, *strides, H, W, h, w, h / H, w / W, tokens])
        outs.append(out)
    block_t = max(1, 1024 // pitch)
    tokens = max(side.tokens for side in sides)
    _expand_kernel[(triton.cdiv(tokens, block_t), M, len(sides))](
        *_pair(arguments), n, EXTRA=sides[0].lead, OTHER_EXTRA=sides[-1].lead, PITCH=pitch, BLOCK_T=block_t,
        num_warps=4,
    )  # fmt: skip
    return outs


def reduce(sides: list[Side], grads: list[Tensor]) -> list[AgentBias]:
    """Launch the sums over rows and columns of gradients [chunks, M, T, pitch]; overwrites their first chunks."""
    (M, n), pitch = sides[0].bias.row.shape[:2], grads[0].shape[-1]
    outs, row_arguments, column_arguments = [], [], []
    for (bias, (H, W)), grad in zip(sides, grads, strict=True):
        h, w = bias.block.shape[2:]
        block, row, column, extra = out = AgentBias(
            *(None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in bias)
        )
        strip = torch.empty(M, H, w, pitch, dtype=torch.float32, device=grad.device)
        chunks, _, tokens, _ = grad.shape
        row_arguments.append([grad, strip, row, row if extra is None else extra, H, W, w, w / W, tokens, chunks])
        column_arguments.append([grad, strip, block, column, H, W, h, w, h / H, tokens])
        outs.append(out)
    meta = dict(EXTRA=sides[0].lead, OTHER_EXTRA=sides[-1].lead, PITCH=pitch, num_warps=4)
    cells = triton.next_power_of_2(max(side.bias.block.shape[3] for side in sides))
    rows = max(side.grid[0] + side.lead for side in sides)
    _row_gradient_kernel[(rows, M, len(sides))](
        *_pair(row_arguments), n, BLOCK_W=max(16, min(64, 2048 // pitch)), BLOCK_CELL=max(16, cells), **meta
    )  # fmt: skip
    columns = max(side.grid[1] + side.bias.block[0, 0].numel() for side in sides)
    _column_gradient_kernel[(columns, M, len(sides))](
        *_pair(column_arguments), n, BLOCK_H=max(1, 2048 // pitch), **meta
    )  # fmt: skip
    return outs
