"""Triton kernel of bias, sum and ReLU, then its launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit(do_not_specialize=["N"])
def _bias_relu_kernel(
    x_ptr, bias_ptr, added_ptr, N, C: tl.constexpr, ADDED: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x = relu(x + bias [+ added]) [+ added] of BLOCK elements, channels fastest.

    Bytes an element: x read and written, added read. Three passes of PyTorch otherwise, for maps that leave the cache.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + i % C, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        added = tl.load(added_ptr + i, mask=inside, other=0.0).to(tl.float32)
        if not AFTER:
            x += added
    # Written so that NaN stays.
    x = tl.where(x < 0, 0.0, x)
    if ADDED and AFTER:
        x += added
    tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty), mask=inside)


def bias_relu_(x: Tensor, bias: Tensor, added: Tensor | None, after: bool) -> None:
    """Launch the kernel on contiguous x [..., C]."""
    if x.numel():
        added_or_x = x if added is None else added.contiguous()
        _bias_relu_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, bias.contiguous(), added_or_x, x.numel(), C=x.shape[-1], ADDED=added is not None, AFTER=after,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
