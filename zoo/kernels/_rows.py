"""Rows of channels in Triton: loads and stores of one head's channels at given offsets."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, offset, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[N, BLOCK_D] channels of one head at the given offsets, zero outside."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + offset[:, None] + d[None, :]
    if D < BLOCK_D:
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(ptr, value, offset, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :] if D < BLOCK_D else inside[:, None]
    tl.store(ptr + offset[:, None] + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)
