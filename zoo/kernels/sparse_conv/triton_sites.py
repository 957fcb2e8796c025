"""Triton kernels that number sites, find those of a coarser map and the columns of sites, then their launchers.

Numbers of cells are sorted once; from then on a site is the first of equal numbers, and a running count is its row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.sparse_conv.reference import SiteGrid

BLOCK = 256
_SIZES = ["N", "V", "samples", "end"]


@triton.jit
def _number(
    sample, z, y, x, Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr
):
    """Number of a cell; see `reference.SiteGrid`."""
    window = (sample * ROWS + y // TY) * COLS + x // TX
    return ((window * TX + x % TX) * TY + y % TY) * Z + z


@triton.jit(do_not_specialize=_SIZES)
def _number_kernel(
    coords_ptr, key_ptr, N, samples, end,
    Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers of BLOCK cells, `end` for padding."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = coords_ptr + i * 4
    sample = tl.load(at, mask=i < N, other=0).to(tl.int64)
    z = tl.load(at + 1, mask=i < N, other=0)
    y = tl.load(at + 2, mask=i < N, other=0)
    x = tl.load(at + 3, mask=i < N, other=0)
    key = _number(sample, z, y, x, Z, ROWS, COLS, TY, TX)
    tl.store(key_ptr + i, tl.where(sample < samples, key, end.to(tl.int64)), mask=i < N)


@triton.jit
def _reached(at, inside, tap, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    """An output cell along an axis that an input cell reaches, and whether it does."""
    place = tl.load(at, mask=inside, other=0) + P
    cell = place // S - tap
    return cell, (place - cell * S < K) & (cell >= 0) & (cell < SIZE)


@triton.jit(do_not_specialize=_SIZES)
def _output_key_kernel(
    coords_ptr, key_ptr, N, samples, end,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers of output cells, one for each input site and output cell that it may reach, `end` for none."""
    RZ: tl.constexpr = (KZ + SZ - 1) // SZ
    RY: tl.constexpr = (KY + SY - 1) // SY
    RX: tl.constexpr = (KX + SX - 1) // SX
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    site, which = i // (RZ * RY * RX), (i % (RZ * RY * RX)).to(tl.int32)
    inside = site < N
    at = coords_ptr + site * 4
    sample = tl.load(at, mask=inside, other=0).to(tl.int64)
    z, on_z = _reached(at + 1, inside, which // (RY * RX), KZ, SZ, PZ, Z)
    y, on_y = _reached(at + 2, inside, which // RX % RY, KY, SY, PY, Y)
    x, on_x = _reached(at + 3, inside, which % RX, KX, SX, PX, X)
    key = _number(sample, z, y, x, Z, ROWS, COLS, TY, TX)
    key = tl.where(on_z & on_y & on_x & (sample < samples), key, end.to(tl.int64))
    tl.store(key_ptr + i, key.to(key_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _first_kernel(key_ptr, first_ptr, N, end, DIV: tl.constexpr, BLOCK: tl.constexpr):
    """1 where ascending numbers, divided by DIV, change, and 0 for `end`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + i, mask=i < N, other=0)
    before = tl.load(key_ptr + i - 1, mask=(i > 0) & (i < N), other=-DIV)
    first = (key < end) & (key // DIV != before // DIV)
    tl.store(first_ptr + i, first.to(tl.int32), mask=i < N)


@triton.jit(do_not_specialize=_SIZES)
def _site_kernel(
    key_ptr, first_ptr, count_ptr, keys_ptr, coords_ptr, num_ptr, N, V, samples, end,
    Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of V sites from ascending numbers and the running count of different ones; padding behind the last."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + i, mask=i < N, other=0).to(tl.int64)
    row = tl.load(count_ptr + i, mask=i < N, other=0).to(tl.int64) - 1
    first = (tl.load(first_ptr + i, mask=i < N, other=0) > 0) & (row < V)
    window, cell = key // (Z * TY * TX), key % (Z * TY * TX)
    tl.store(keys_ptr + row, key, mask=first)
    at = coords_ptr + row * 4
    tl.store(at, (window // (ROWS * COLS)).to(tl.int32), mask=first)
    tl.store(at + 1, (cell % Z).to(tl.int32), mask=first)
    tl.store(at + 2, (window // COLS % ROWS * TY + cell // Z % TY).to(tl.int32), mask=first)
    tl.store(at + 3, (window % COLS * TX + cell // (Z * TY)).to(tl.int32), mask=first)

    total = tl.load(count_ptr + N - 1)
    unused = (i >= total) & (i < V)
    tl.store(keys_ptr + i, end.to(tl.int64) + i * 0, mask=unused)
    at = coords_ptr + i * 4
    tl.store(at, samples + i.to(tl.int32) * 0, mask=unused)
    for f in tl.static_range(1, 4):
        tl.store(at + f, i.to(tl.int32) * 0, mask=unused)
    if tl.program_id(0) == 0:
        tl.store(num_ptr, tl.minimum(total, V).to(tl.int64))


@triton.jit(do_not_specialize=_SIZES)
def _pillar_kernel(
    key_ptr, coords_ptr, first_ptr, count_ptr, out_ptr, rows_ptr, num_ptr, N, V, samples, Z: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Cells of V pillars and the row of the site at each height, N for none, from ascending numbers of sites.

    The first site of a pillar looks for the others, which follow it.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pillar = tl.load(count_ptr + i, mask=i < N, other=0).to(tl.int64) - 1
    first = (tl.load(first_ptr + i, mask=i < N, other=0) > 0) & (pillar < V)
    unused = (i >= tl.load(count_ptr + N - 1)) & (i < V)
    column = tl.load(key_ptr + i, mask=first, other=0) // Z
    site = i
    for z in tl.static_range(Z):
        met = first & (tl.load(key_ptr + site, mask=first & (site < N), other=-1) == column * Z + z)
        tl.store(rows_ptr + pillar * Z + z, tl.where(met, site, N), mask=first)
        tl.store(rows_ptr + i * Z + z, N.to(tl.int64) + i * 0, mask=unused)
        site += met.to(tl.int64)
    for f in tl.static_range(4):
        value = tl.load(coords_ptr + i * 4 + f, mask=first, other=0)
        tl.store(out_ptr + pillar * 4 + f, value if f != 1 else value * 0, mask=first)
        tl.store(out_ptr + i * 4 + f, (samples if f == 0 else 0) + i.to(tl.int32) * 0, mask=unused)
    if tl.program_id(0) == 0:
        tl.store(num_ptr, tl.minimum(tl.load(count_ptr + N - 1), V).to(tl.int64))


def _cells(grid: SiteGrid) -> dict:
    (rows, cols), (TY, TX) = grid.windows, grid.window
    return dict(Z=grid.shape[0], ROWS=rows, COLS=cols, TY=TY, TX=TX)


def number_cells(coords: Tensor, grid: SiteGrid) -> Tensor:
    """Launch the numbering: int64 [N]."""
    N = len(coords)
    keys = torch.empty(N, dtype=torch.int64, device=coords.device)
    if N:
        _number_kernel[(triton.cdiv(N, BLOCK),)](
            coords.contiguous(), keys, N, grid.batch_size, grid.end, **_cells(grid), BLOCK=BLOCK, num_warps=4
        )
    return keys


def _running_count(keys: Tensor, end: int, div: int) -> tuple[Tensor, Tensor]:
    """Where ascending numbers change, and how often they did, int32."""
    first = torch.empty(len(keys), dtype=torch.int32, device=keys.device)
    _first_kernel[(triton.cdiv(len(keys), BLOCK),)](keys, first, len(keys), end, DIV=div, BLOCK=BLOCK, num_warps=4)
    return first, first.cumsum(0, dtype=torch.int32)


def coarser_sites(
    coords: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], grid: SiteGrid, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches around a sort and a running sum: keys, coordinates and number of output sites; N and V > 0."""
    device, reach = coords.device, 1
    for k, s in zip(kernel, stride, strict=True):
        reach *= -(-k // s)
    N = len(coords) * reach
    found = torch.empty(N, dtype=torch.int32 if grid.end < 2**31 else torch.int64, device=device)
    axes = ("KZ", "KY", "KX", "SZ", "SY", "SX", "PZ", "PY", "PX", "Y", "X")
    sizes = dict(zip(axes, (*kernel, *stride, *padding, *grid.shape[1:]), strict=True))
    _output_key_kernel[(triton.cdiv(N, BLOCK),)](
        coords.contiguous(), found, len(coords), grid.batch_size, grid.end, **sizes, **_cells(grid),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    found = found.sort().values
    first, count = _running_count(found, grid.end, 1)
    keys = torch.empty(capacity, dtype=torch.int64, device=device)
    out = torch.empty((capacity, 4), dtype=torch.int32, device=device)
    num = torch.empty((), dtype=torch.int64, device=device)
    _site_kernel[(triton.cdiv(max(N, capacity), BLOCK),)](
        found, first, count, keys, out, num, N, capacity, grid.batch_size, grid.end, **_cells(grid),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return keys, out, num


def find_pillars(keys: Tensor, coords: Tensor, grid: SiteGrid, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches around a running sum: coordinates, rows [P, Z] and number of pillars; N and P > 0."""
    N, Z, device = len(keys), grid.shape[0], keys.device
    first, count = _running_count(keys, grid.end, Z)
    out = torch.empty((capacity, 4), dtype=torch.int32, device=device)
    rows = torch.empty((capacity, Z), dtype=torch.int64, device=device)
    num = torch.empty((), dtype=torch.int64, device=device)
    _pillar_kernel[(triton.cdiv(max(N, capacity), BLOCK),)](
        keys, coords.contiguous(), first, count, out, rows, num, N, capacity, grid.batch_size, Z=Z,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out, rows, num
