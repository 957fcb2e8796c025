"""Sites of sparse maps and the tables of their neighbours, built once a stage and shared by its layers.

Nothing here waits for the device once capacities are given: there are no `item`, `nonzero`, `unique` or boolean masks,
and no copies from the host, so that a CUDA graph holds all of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels.sparse_conv.reference import SiteGrid
from zoo.kernels.voxelize import Voxels

# Output sites of a tile of the convolution kernels.
TILE = 64


class Sites(NamedTuple):
    """Sites of a sparse map in ascending order of their cells' numbers; rows from `num` on are padding."""

    keys: Tensor  # int64 [N], ascending
    coords: Tensor  # int32 [N, 4]: sample, z, y, x
    num: Tensor | None  # int64 [], real rows; None where all rows are real
    grid: SiteGrid

    @property
    def voxels(self) -> Voxels:
        """The same rows without their numbers."""
        return Voxels(self.coords, self.num, self.grid.batch_size, self.grid.shape)

    def real(self) -> Tensor:
        """Which rows are real, bool [N]."""
        return self.keys < self.grid.end


class Neighbours(NamedTuple):
    """Which input rows the taps of each output row meet, and back."""

    kernel: tuple[int, int, int]
    table: Tensor  # int32 [K, N_out] input row or -1
    tiles: Tensor  # int32 [T, 1 + K + TILE], see `make_tiles`; empty on a CPU
    # Output row or -1 for each input row. A sub-manifold kernel is its own transpose with the taps reversed, so these
    # are the tensors above. Without taps where no gradients are wanted.
    transposed: Tensor
    transposed_tiles: Tensor
    mirror: bool


class Pillars(NamedTuple):
    """Columns of sites, and the row of each site of a column."""

    voxels: Voxels  # z = 0, shape (1, Y, X)
    rows: Tensor  # int64 [P, Z] row of the site at each height; the number of rows for none


def sort_sites(
    voxels: Voxels, window: tuple[int, int] | None = None, *, is_sorted: bool = False
) -> tuple[Sites, Tensor | None]:
    """Sites in the order of windows, and the voxel at each row.

    Args:
        voxels: Distinct cells, in any order.
        window: Cells of a window along y and x; the whole map by default, which orders by sample, x, y, z.
        is_sorted: The voxels already have that order.

    Returns:
        The sites, and int64 [N] the voxel of each row; None where they are sorted already.
    """
    grid = SiteGrid(voxels.batch_size, voxels.shape, window or voxels.shape[1:])
    keys = _ops().sparse_numbers(voxels.coords, grid.batch_size, list(grid.shape), list(grid.window))
    if is_sorted:
        return Sites(keys, voxels.coords, voxels.num, grid), None
    keys, order = keys.sort(stable=True)
    return Sites(keys, voxels.coords[order], voxels.num, grid), order


def window_offsets(sites: Sites) -> Tensor:
    """int32 [R + 1] first row of each window, all windows of the grid; padding lies behind the last."""
    volume = sites.grid.volume
    starts = torch.arange(0, (sites.grid.count + 1) * volume, volume, device=sites.keys.device)
    return torch.searchsorted(sites.keys, starts, out_int32=True)


def _ops():
    """The registered ops, which need what is defined here."""
    import zoo.kernels.sparse_conv.op  # noqa: F401 (registers them)

    return torch.ops.zoo


def _lookup(sites: Sites, coords: Tensor, kernel, stride, padding, transposed: bool) -> Tensor:
    grid = sites.grid
    return _ops().sparse_neighbours(
        sites.keys, coords, list(kernel), list(stride), list(padding), transposed,
        grid.batch_size, list(grid.shape), list(grid.window),
    )  # fmt: skip


def same_table(sites: Sites, kernels: Sequence[Sequence[int]]) -> Tensor:
    """Neighbours for sub-manifold kernels, one after another: int32 [sum of their taps, N] row or -1.

    Args:
        sites: Input sites, which are the output sites too.
        kernels: Sizes along z, y, x, odd.

    Raises:
        ValueError: A size is even.
    """
    for kernel in kernels:
        if any(size < 1 or size % 2 == 0 for size in kernel):
            raise ValueError(f"a sub-manifold kernel needs odd sizes, got {tuple(kernel)}.")
    ones = (1, 1, 1)
    tables = [_lookup(sites, sites.coords, kernel, ones, [k // 2 for k in kernel], False) for kernel in kernels]
    return tables[0] if len(tables) == 1 else torch.cat(tables)


def same_neighbours(sites: Sites, kernel: tuple[int, int, int]) -> Neighbours:
    """Neighbours for a sub-manifold convolution: output sites are the input sites.

    Raises:
        ValueError: A size of the kernel is even.
    """
    table = same_table(sites, [kernel])
    tiles = make_tiles(table, kernel)
    return Neighbours(tuple(kernel), table, tiles, table, tiles, True)


def downsample(
    sites: Sites,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    window: tuple[int, int] | None = None,
    capacity: int | None = None,
    *,
    gradients: bool = True,
) -> tuple[Sites, Neighbours]:
    """Output sites of a strided convolution, those that meet at least one input site, and its neighbours.

    Args:
        sites: Input sites.
        kernel, stride, padding: Along z, y, x.
        window: Windows of the output's order.
        capacity: Rows of the output. Without it there are as many as sites, which waits for the device once; with it,
            the last sites are lost where it does not suffice.
        gradients: Find the output rows of each input row too, which gradients need and cost about as much again.
    """
    old = sites.grid
    shape = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(old.shape, padding, kernel, stride, strict=True))
    grid = SiteGrid(old.batch_size, shape, window or shape[1:])
    if capacity is None:
        out = Sites(*coarser_sites(sites.coords, kernel, stride, padding, grid, None), None, grid)
    else:
        sizes = list(kernel), list(stride), list(padding), grid.batch_size, list(shape), list(grid.window)
        out = Sites(*_ops().sparse_coarser(sites.coords, *sizes, capacity), grid)
    table = _lookup(sites, out.coords, kernel, stride, padding, False)
    tiles = make_tiles(table, kernel)
    if not gradients:
        nothing = table.new_empty(0, len(sites.keys))
        return out, Neighbours(tuple(kernel), table, tiles, nothing, tiles.new_empty(0), False)
    transposed = _lookup(out, sites.coords, kernel, stride, padding, True)
    return out, Neighbours(tuple(kernel), table, tiles, transposed, make_tiles(transposed, kernel), False)


def coarser_sites(coords: Tensor, kernel, stride, padding, grid: SiteGrid, capacity: int | None) -> tuple[Tensor, ...]:
    """Numbers and cells of the output sites of input sites at `coords`, and with a capacity their number."""
    keys = _sorted(_output_keys(coords, kernel, stride, padding, grid), grid.end)
    first = torch.cat((keys.new_ones(min(1, len(keys)), dtype=torch.bool), keys[1:] != keys[:-1]))
    num = (first & (keys < grid.end)).sum()
    N = int(num) if capacity is None else capacity
    # Equal keys go to one row; the row behind the last takes what finds no room.
    row = (first.cumsum(0) - 1).clamp(max=N)
    keys = keys.new_full((N + 1,), grid.end).scatter(0, row, keys)[:N].clone()
    return (keys, grid.decode(keys)) if capacity is None else (keys, grid.decode(keys), num.clamp(max=N))


def _sorted(keys: Tensor, largest: int) -> Tensor:
    """Ascending keys; a radix sort of 32 bits takes half the passes of one of 64."""
    return keys.int().sort().values.long() if largest < 2**31 else keys.sort().values


def _output_keys(coords: Tensor, kernel, stride, padding, grid: SiteGrid) -> Tensor:
    """Numbers of the output cells that each input site reaches, int64 [N * reached]; `grid.end` for none."""
    cells = []
    for axis in range(3):
        k, s, p = kernel[axis], stride[axis], padding[axis]
        at = coords[:, axis + 1].long()[:, None] + p
        cell = at.div(s, rounding_mode="floor") - torch.arange(-(-k // s), device=at.device)  # [N, reached]
        reached = (at - cell * s < k) & (cell >= 0) & (cell < grid.shape[axis])
        cells.append((cell, reached))
    b, *parts = grid.parts(coords[:, 0], *(cell for cell, _ in cells))
    z, y, x = (part.where(reached, grid.end) for part, (_, reached) in zip(parts, cells, strict=True))
    keys = b[:, None, None, None] + z[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :]
    return keys.clamp(max=grid.end).flatten()


def make_tiles(table: Tensor, kernel: Sequence[int]) -> Tensor:
    """Tiles of output rows that meet the same taps, so that a tile skips the others.

    Rows are sorted by the set of taps that meet a site, the farthest taps first: of 26 taps that some row of a tile
    meets in the order of the sites, 15 remain on LiDAR sweeps, where a row meets 8 of 27.

    Returns:
        int32 [T, 1 + K + TILE]: how many taps a tile meets, these taps first among all K, and its rows, -1 behind the
        last one. Empty on a CPU, where the reference runs.
    """
    return _ops().sparse_tiles(table, list(kernel)) if table.is_cuda else table.new_empty(0)


def build_tiles(table: Tensor, kernel: Sequence[int]) -> Tensor:
    """`make_tiles` in plain PyTorch."""
    K, N = table.shape
    T = -(-N // TILE)
    hit = table >= 0
    taps = list(itertools.product(*(range(k) for k in kernel)))
    near = sorted(range(K), key=lambda t: sum(abs(2 * i - k + 1) for i, k in zip(taps[t], kernel, strict=True)))
    if K < 63:
        dtype = torch.int32 if K < 31 else torch.int64
        shift = torch.arange(K, device=table.device, dtype=dtype)[:, None]
        bits = torch.stack([hit[t] for t in near]).to(dtype) << shift
        rows = bits.sum(0, dtype=dtype).sort(stable=True).indices
    else:
        rows = torch.arange(N, device=table.device)
    fill = T * TILE - N
    met = torch.nn.functional.pad(hit[:, rows], (0, fill)).view(K, T, TILE).any(2).t()  # [T, K]
    order = (~met).sort(dim=1, stable=True).indices
    rows = torch.nn.functional.pad(rows, (0, fill), value=-1).view(T, TILE)
    return torch.cat((met.sum(1, keepdim=True), order, rows), 1).int()


def find_pillars(sites: Sites, capacity: int | None = None) -> Pillars:
    """Columns of sites in the order of the sites.

    Args:
        sites: Sites of a map.
        capacity: Columns of the result. Without it there are as many as needed, which waits for the device once.
    """
    grid = sites.grid
    if capacity is None:
        coords, rows, num = pillars_of(sites.keys, sites.coords, grid, None)
    else:
        sizes = grid.batch_size, list(grid.shape), list(grid.window), capacity
        coords, rows, num = _ops().sparse_pillars(sites.keys, sites.coords, *sizes)
    return Pillars(Voxels(coords, num, grid.batch_size, (1, *grid.shape[1:])), rows)


def pillars_of(
    keys: Tensor, coords: Tensor, grid: SiteGrid, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cells [P, 4] and rows [P, Z] of pillars, and with a capacity their number."""
    Z, N = grid.shape[0], len(keys)
    column = keys // Z  # z runs fastest
    real = keys < grid.end
    first = torch.cat((real[:1], (column[1:] != column[:-1]) & real[1:]))
    num = first.sum()
    P = int(num) if capacity is None else capacity
    pillar = (first.cumsum(0) - 1).where(real, P).clamp(max=P)
    empty = coords.new_zeros(P + 1, 4)
    empty[:, 0] = grid.batch_size
    cells = empty.scatter(0, pillar[:, None].expand(N, 4), coords)[:P]
    cells = torch.cat((cells[:, :1], torch.zeros_like(cells[:, :1]), cells[:, 2:]), 1)
    row = torch.arange(N, device=column.device)
    rows = row.new_full(((P + 1) * Z,), N).scatter(0, pillar * Z + coords[:, 1], row)
    return cells, rows.view(P + 1, Z)[:P].clone(), None if capacity is None else num.clamp(max=P)
