"""Triton kernels that sort pillars by window, then their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.flat_window.reference import ORDERS, Windows

BLOCK = 512


@triton.jit
def _mirror(value, size, mirrored):
    return tl.where(mirrored, size - 1 - value, value)


@triton.jit
def _snake(sample, a, b, wa, wb, na, nb, dtype: tl.constexpr):
    """Place of a cell in the order that walks along `a` within a row of windows; see `reference.window_keys`."""
    row, window = b // wb, a // wa
    line = a - window * wa
    odd = row % 2 == 1
    key = (sample.to(dtype) * nb + row) * na + _mirror(window, na, odd)
    key = key * wa + _mirror(line, wa, odd)
    return key * wb + _mirror(b - row * wb, wb, (row + line) % 2 == 1)


@triton.jit(do_not_specialize=["V", "samples", "wx", "wy", "nx", "ny", "stride"])
def _key_kernel(coords_ptr, key_ptr, starts_ptr, V, samples, wx, wy, nx, ny, stride, BLOCK: tl.constexpr):
    """Keys [4, V] of BLOCK pillars, and the row at which each sample, and the padding, begins."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < V
    at = coords_ptr + i.to(tl.int64) * 4
    sample = tl.load(at, mask=inside, other=samples + 1)
    before = tl.load(at - 4, mask=(i > 0) & (i <= V), other=-1)
    # The last row of starts closes the padding.
    for b in range(samples + 2):
        tl.store(starts_ptr + b + i * 0, i, mask=(before < b) & (b <= sample) & (i <= V))

    y = tl.load(at + 2, mask=inside, other=0)
    x = tl.load(at + 3, mask=inside, other=0)
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    for shifted in tl.static_range(2):
        a, b = x + shifted * (wx // 2), y + shifted * (wy // 2)
        along_x = _snake(sample, a, b, wx, wy, nx, ny, dtype)
        along_y = _snake(sample, b, a, wy, wx, ny, nx, dtype)
        out = key_ptr + shifted * V.to(tl.int64) + i
        # Keys of one order lie above those of the orders before: one sort serves all.
        tl.store(out, along_x + stride.to(dtype) * shifted, mask=inside)
        tl.store(out + 2 * V.to(tl.int64), along_y + stride.to(dtype) * (2 + shifted), mask=inside)


@triton.jit(do_not_specialize=["V", "rows", "samples"])
def _table_kernel(
    sorted_ptr, starts_ptr, order_ptr, groups_ptr, V, rows, samples, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Orders in int32 from sorted places of the flat keys, and rows of the group table."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(sorted_ptr + i, mask=i < 4 * V, other=0)
    tl.store(order_ptr + i, (place - i // V * V).to(tl.int32), mask=i < 4 * V)
    if tl.program_id(0) * BLOCK < rows:
        g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        begin = tl.zeros([BLOCK], tl.int32) + V
        end, first = begin, begin
        total = 0
        for b in range(samples + 1):
            start, stop = tl.load(starts_ptr + b), tl.load(starts_ptr + b + 1)
            count = (stop - start + GROUP - 1) // GROUP
            mine = (g >= total) & (g < total + count)
            own = start + (g - total) * GROUP
            last = tl.minimum(own + GROUP, stop)
            begin = tl.where(mine, own, begin)
            end = tl.where(mine, last, end)
            attended = tl.minimum(own, tl.maximum(last - GROUP, start))
            first = tl.where(mine, tl.where(b == samples, -1, attended), first)
            total += count
        tl.store(groups_ptr + g * 3, begin, mask=g < rows)
        tl.store(groups_ptr + g * 3 + 1, end, mask=g < rows)
        tl.store(groups_ptr + g * 3 + 2, first, mask=g < rows)


def flatten_windows(coords: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Orders [4, V] and groups [R + 1, 3]: two launches around one sort of all four orders."""
    V, samples, device = len(coords), windows.samples, coords.device
    rows = windows.table_rows(V)
    order = torch.empty((len(ORDERS), V), dtype=torch.int32, device=device)
    groups = torch.empty((rows, 3), dtype=torch.int32, device=device)
    if V == 0:
        return order, groups.zero_()
    key = torch.empty(len(ORDERS) * V, dtype=windows.key_dtype(), device=device)
    starts = torch.empty(samples + 2, dtype=torch.int32, device=device)
    grid = (triton.cdiv(V + 1, BLOCK),)
    stride = (samples + 1) * windows.places
    sizes = (V, samples, *windows.window, *windows.counts, stride)
    _key_kernel[grid](coords.contiguous(), key, starts, *sizes, BLOCK=BLOCK, num_warps=4)
    place = key.sort(stable=True).indices
    grid = (triton.cdiv(max(len(key), rows), BLOCK),)
    _table_kernel[grid](
        place, starts, order, groups, V, rows, samples, GROUP=windows.group_size, BLOCK=BLOCK, num_warps=4
    )
    return order, groups
