"""Triton kernel of bias, sum and ReLU, then its launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Elements of a program, and most channels of it.
ELEMENTS, CHANNELS = 4096, 1024


@triton.jit(do_not_specialize=["N"])
def _bias_relu_kernel(
    x_ptr, bias_ptr, added_ptr, N, C: tl.constexpr, ADDED: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """x = relu(x + bias [+ added]) [+ added] of ROWS rows of x [N, C] and COLUMNS channels.

    Bytes an element: x read and written, added read. Three passes of PyTorch otherwise, for maps that leave the cache.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        added = tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if not AFTER:
            x += added
    # Written so that NaN stays.
    x = tl.where(x < 0, 0.0, x)
    if ADDED and AFTER:
        x += added
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


def bias_relu_(x: Tensor, bias: Tensor, added: Tensor | None, after: bool) -> None:
    """Launch the kernel on contiguous x [..., C]."""
    C = x.shape[-1]
    if x.numel():
        columns = min(CHANNELS, triton.next_power_of_2(C))
        rows, N = ELEMENTS // columns, x.numel() // C
        _bias_relu_kernel[(triton.cdiv(N, rows), triton.cdiv(C, columns))](
            x, bias.contiguous(), x if added is None else added.contiguous(), N, C=C, ADDED=added is not None,
            AFTER=after, ROWS=rows, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
