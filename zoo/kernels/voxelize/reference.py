"""Dynamic voxelisation and reductions over voxels in plain PyTorch: the definition, the CPU path and the test oracle.

A point's cell is floor((p - minimum) / size) in float32. Voxels are the cells that hold a point, sorted by sample and
cell; every point knows its voxel's row. Nothing here is limited in points a voxel or voxels a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Voxels(NamedTuple):
    """Cells of a batch of point clouds, sorted by sample.

    Rows from `num` on are padding, whose sample is `batch_size`, one beyond the last: they sort last and meet no
    real row. A fixed number of rows makes CUDA graphs possible.
    """

    coords: Tensor  # int32 [V, 4]: sample, z, y, x
    num: Tensor | None  # int64 [], real rows; None where all rows are real
    batch_size: int
    shape: tuple[int, int, int]  # cells along z, y, x

    def real(self) -> Tensor:
        """Which rows are real, bool [V]."""
        return self.coords[:, 0] < self.batch_size


class Grid(NamedTuple):
    """What turns points into cells; sequences are in the order x, y, z."""

    voxel_size: tuple[float, float, float]
    minimum: tuple[float, float, float]
    cells: tuple[int, int, int]
    clamp: bool
    order: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Cells along z, y, x."""
        return self.cells[::-1]

    @property
    def count(self) -> int:
        """Cells of a sample."""
        return self.cells[0] * self.cells[1] * self.cells[2]


class Grouping(NamedTuple):
    """Points in the order of their voxels.

    Points without a voxel are left out, or with a capacity, which fixes all shapes, come last and have index V.
    """

    voxels: Voxels
    order: Tensor  # int64 [N], the point at each place of the sorted sequence
    index: Tensor  # int64 [N], its voxel, non-decreasing
    offsets: Tensor  # int64 [V + 1], where a voxel's points begin


def sample_of_points(sizes: list[int], device: torch.device) -> Tensor:
    """Sample of each point, int64 [N], without waiting for the device."""
    parts = [torch.full((n,), b, dtype=torch.int64, device=device) for b, n in enumerate(sizes)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _vector(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers in float32 without a copy from the host."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def point_keys(points: Tensor, sizes: list[int], grid: Grid) -> Tensor:
    """Number of each point's cell within the batch, int64 [N]; beyond all cells for points without one."""
    minimum, size, limit = (_vector(x, points.device) for x in (grid.minimum, grid.voxel_size, grid.cells))
    cell = ((points[:, :3].float() - minimum) / size).floor()  # [N, 3]
    inside = points.isfinite().all(1)
    if grid.clamp:
        cell = torch.minimum(cell.clamp(min=0), limit - 1)
    else:
        inside = inside & ((cell >= 0) & (cell < limit)).all(1)
    x, y, z = cell.nan_to_num().where(inside[:, None], 0).long().unbind(1)
    X, Y, Z = grid.cells
    number = (z * Y + y) * X + x if grid.order == "zyx" else (x * Y + y) * Z + z
    number = number + sample_of_points(sizes, points.device) * grid.count
    return number.where(inside, len(sizes) * grid.count)


def decode_keys(key: Tensor, grid: Grid) -> Tensor:
    """Sample and cell of keys, int32 [V, 4]."""
    X, Y, Z = grid.cells
    sample, cell = key // grid.count, key % grid.count
    if grid.order == "zyx":
        z, y, x = cell // (X * Y), cell // X % Y, cell % X
    else:
        x, y, z = cell // (Y * Z), cell // Z % Y, cell % Z
    return torch.stack([sample, z, y, x], 1).int()


def group_points(points: Tensor, sizes: list[int], grid: Grid, capacity: int | None = None) -> Grouping:
    """Sort points by voxel; see `zoo.kernels.voxelize.group_points`."""
    beyond = len(sizes) * grid.count
    key, order = point_keys(points, sizes, grid).sort(stable=True)
    valid = key < beyond
    first = torch.cat([valid[:1], (key[1:] != key[:-1]) & valid[1:]])
    index, num, V = first.cumsum(0) - 1, first.sum(), capacity
    if capacity is None:
        V, kept = torch.stack([num, valid.sum()]).tolist()
        key, order, index, num = key[:kept], order[:kept], index[:kept], None
    else:
        index, num = index.where(valid, V).clamp(max=V), num.clamp(max=V)
    # The last row takes what no voxel takes.
    cell = key.new_full((V + 1,), beyond).scatter_(0, index, key)[:V]
    offsets = torch.searchsorted(index, torch.arange(V + 1, device=key.device))
    return Grouping(Voxels(decode_keys(cell, grid), num, len(sizes), grid.shape), order, index, offsets)


def segment_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Mean of the rows of each segment [S, C]; zero for an empty one."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    total = values.new_zeros(num_segments + 1, values.shape[1], dtype=dtype).index_add(0, index, values.to(dtype))
    count = total.new_zeros(num_segments + 1).index_add(0, index, total.new_ones(len(index)))
    return (total[:-1] / count[:-1].clamp(min=1)[:, None]).to(values.dtype)


def point_features(points: Tensor, grouping: Grouping, grid: Grid, with_distance: bool) -> Tensor:
    """Columns and offsets of sorted points; see `op.point_features`."""
    (voxels, order, index, _), V = grouping, grouping.voxels.coords.shape[0]
    # Points without a voxel may hold anything.
    points = points[order].where((index < V)[:, None], 0)
    xyz, cells = points[:, :3], voxels.coords.unbind(1)[:0:-1]  # x, y, z
    centre = [c * size + (size / 2 + low) for c, size, low in zip(cells, grid.voxel_size, grid.minimum, strict=True)]
    places = torch.cat([segment_mean(xyz, index, V), torch.stack(centre, 1)], 1)  # [V, 6]
    offset = xyz.repeat(1, 2) - torch.cat([places, places.new_zeros(1, 6)])[index]
    parts = [points, offset, xyz.norm(dim=1, keepdim=True)]
    return torch.cat(parts if with_distance else parts[:2], 1)


def segment_argmax(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Row of each segment's maximum by channel, the lowest of several, int64 [S, C]; N for an empty segment."""
    N, C = values.shape
    index = index[:, None].expand(N, C)
    largest = values.new_full((num_segments + 1, C), -torch.inf).scatter_reduce(0, index, values, "amax")
    best = (values == largest.gather(0, index)) | values.isnan()
    row = torch.arange(N, device=values.device)[:, None].where(best, N)  # [N, C]
    return index.new_full((num_segments + 1, C), N).scatter_reduce(0, index, row, "amin")[:-1]


def segment_max(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Maximum of the rows of each segment [S, C]; zero for an empty one. The first of equal rows has the gradient."""
    row = segment_argmax(values.detach(), index, num_segments)
    return torch.cat([values, values.new_zeros(1, values.shape[1])]).gather(0, row)
