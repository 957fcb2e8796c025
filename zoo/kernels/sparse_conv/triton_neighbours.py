"""Triton kernel that looks neighbours up, then its launcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.sparse_conv.reference import SiteGrid


@triton.jit
def _cell(coords_ptr, at, inside, axis, tap, KERNEL, STRIDE, PADDING, SIZE, TRANSPOSED: tl.constexpr):
    """The cell that a tap meets along an axis, and whether it is on the map; see `reference.neighbour_table`."""
    cell = tl.load(coords_ptr + at * 4 + axis + 1, mask=inside, other=0)
    if TRANSPOSED:
        cell = cell + PADDING - tap
        met = (cell >= 0) & (cell % STRIDE == 0)
        cell = cell // STRIDE
    else:
        cell = cell * STRIDE - PADDING + tap
        met = cell >= 0
    return cell.to(tl.int64), met & (cell < SIZE)


@triton.jit(do_not_specialize=["V", "N", "samples"])
def _neighbour_kernel(
    keys_ptr, coords_ptr, table_ptr, V, N, samples,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, TRANSPOSED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table[k, n] = the place of tap k's cell among the ascending keys, or -1.

    One program computes one tap of BLOCK sites: it numbers their cells and halves the keys STEPS times. Reads are of
    L2, which holds the keys.
    """
    COLS: tl.constexpr = (X + TX - 1) // TX
    ROWS: tl.constexpr = (Y + TY - 1) // TY
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1)
    inside = n < N
    at = n.to(tl.int64)
    sample = tl.load(coords_ptr + at * 4, mask=inside, other=0)
    z, on_z = _cell(coords_ptr, at, inside, 0, tap // (KY * KX), KZ, SZ, PZ, Z, TRANSPOSED)
    y, on_y = _cell(coords_ptr, at, inside, 1, tap // KX % KY, KY, SY, PY, Y, TRANSPOSED)
    x, on_x = _cell(coords_ptr, at, inside, 2, tap % KX, KX, SX, PX, X, TRANSPOSED)
    met = inside & on_z & on_y & on_x & (sample < samples)
    window = (sample.to(tl.int64) * ROWS + y // TY) * COLS + x // TX
    key = ((window * TX + x % TX) * TY + y % TY) * Z + z
    place = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        further = place + (1 << (STEPS - 1 - step))
        below = met & (further <= V)
        before = tl.load(keys_ptr + further - 1, mask=below, other=0)
        place = tl.where(below & (before < key), further, place)
    met = met & (place < V)
    found = tl.load(keys_ptr + place, mask=met, other=-1) == key
    tl.store(table_ptr + tap.to(tl.int64) * N + n, tl.where(met & found, place, -1), mask=inside)


def neighbour_table(
    keys: Tensor, coords: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    transposed: bool, grid: SiteGrid,
) -> Tensor:  # fmt: skip
    """Launch the kernel: int32 [K, N] row of `keys` that each tap of each site meets, or -1."""
    V, N, K = len(keys), len(coords), kernel[0] * kernel[1] * kernel[2]
    table = torch.empty((K, N), dtype=torch.int32, device=coords.device)
    if N == 0:
        return table
    sizes = dict(zip(("KZ", "KY", "KX", "SZ", "SY", "SX", "PZ", "PY", "PX", "Z", "Y", "X", "TY", "TX"),
                     (*kernel, *stride, *padding, *grid.shape, *grid.window), strict=True))  # fmt: skip
    _neighbour_kernel[(triton.cdiv(N, 256), K)](
        keys, coords.contiguous(), table, V, N, grid.batch_size,
        **sizes, TRANSPOSED=transposed, STEPS=V.bit_length(), BLOCK=256, num_warps=4,
    )  # fmt: skip
    return table
