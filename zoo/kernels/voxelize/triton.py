"""Triton kernels of voxelisation and of maxima over voxels, then their launchers.

Points are sorted by voxel once; from then on a voxel's points are neighbours, so that reductions need no atomics and
give the same result in every run.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.voxelize.reference import Grid, Grouping, Voxels

BLOCK = 256
_SIZES = ["N", "V", "n", "sample", "beyond", "first_key", "nx", "ny", "nz"]


@triton.jit
def _cell(p, minimum, size, cells, CLAMP: tl.constexpr):
    """Cell of a coordinate, and whether there is one; division as the reference rounds it."""
    cell = tl.floor(tl.div_rn(p - minimum, size))
    limit = cells.to(tl.float32)
    if CLAMP:
        cell = tl.minimum(tl.maximum(cell, 0.0), limit - 1)
    return cell.to(tl.int32), (cell >= 0) & (cell < limit)


@triton.jit(do_not_specialize=_SIZES)
def _key_kernel(
    points_ptr, key_ptr, n, first_key, beyond, sx, sy, sz, lx, ly, lz, nx, ny, nz,
    F: tl.constexpr, CLAMP: tl.constexpr, X_FASTEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cell numbers of BLOCK points of one of several samples of n points; `beyond` for points without a cell.

    The cells of the first sample begin at first_key, those of the next behind them.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    sample = tl.program_id(1).to(tl.int64)
    points_ptr += sample * n * F
    key_ptr += sample * n
    finite = inside
    for f in tl.static_range(F):
        value = tl.load(points_ptr + i * F + f, mask=inside, other=0.0)
        finite &= tl.abs(value) < float("inf")
    x = tl.load(points_ptr + i * F, mask=finite, other=lx)
    y = tl.load(points_ptr + i * F + 1, mask=finite, other=ly)
    z = tl.load(points_ptr + i * F + 2, mask=finite, other=lz)
    x, has_x = _cell(x, lx, sx, nx, CLAMP)
    y, has_y = _cell(y, ly, sy, ny, CLAMP)
    z, has_z = _cell(z, lz, sz, nz, CLAMP)
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    if X_FASTEST:
        key = (z.to(dtype) * ny + y) * nx + x
    else:
        key = (x.to(dtype) * ny + y) * nz + z
    key += first_key.to(dtype) + sample.to(dtype) * nx * ny * nz
    key = tl.where(finite & has_x & has_y & has_z, key, beyond.to(dtype))
    tl.store(key_ptr + i, key, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _first_kernel(key_ptr, first_ptr, kept_ptr, N, beyond, BLOCK: tl.constexpr):
    """1 where a voxel's points begin among sorted keys, and the number of points that have a voxel."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + i, mask=i < N, other=0)
    before = tl.load(key_ptr + i - 1, mask=(i > 0) & (i < N), other=-1)
    after = tl.load(key_ptr + i + 1, mask=i + 1 < N, other=beyond)
    valid = (key < beyond) & (i < N)
    tl.store(first_ptr + i, (valid & (key != before)).to(tl.int64), mask=i < N)
    tl.store(kept_ptr + i * 0, i + 1, mask=valid & (after >= beyond))
    # The first point tells of no voxel at all.
    tl.store(kept_ptr + i * 0, i * 0, mask=(i == 0) & (key >= beyond))


@triton.jit(do_not_specialize=_SIZES)
def _finish_kernel(
    key_ptr, count_ptr, kept_ptr, index_ptr, coords_ptr, offsets_ptr, num_ptr, N, V, sample, beyond, nx, ny, nz,
    X_FASTEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of voxels and of their points from sorted keys and the running count of voxels; `sample` marks padding."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + i, mask=i < N, other=0)
    before = tl.load(key_ptr + i - 1, mask=(i > 0) & (i < N), other=-1)
    valid = (key < beyond) & (i < N)
    row = tl.where(valid, tl.minimum(tl.load(count_ptr + i, mask=i < N, other=0) - 1, V), V)
    tl.store(index_ptr + i, row, mask=i < N)

    first = valid & (key != before)
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    nx, ny, nz = nx.to(dtype), ny.to(dtype), nz.to(dtype)
    count = nx * ny * nz
    b = key // count
    cell = key - b * count
    if X_FASTEST:
        z, y, x = cell // (nx * ny), cell // nx % ny, cell % nx
    else:
        x, y, z = cell // (ny * nz), cell // nz % ny, cell % nz
    at = coords_ptr + row * 4
    tl.store(at, b.to(tl.int32), mask=first & (row < V))
    tl.store(at + 1, z.to(tl.int32), mask=first & (row < V))
    tl.store(at + 2, y.to(tl.int32), mask=first & (row < V))
    tl.store(at + 3, x.to(tl.int32), mask=first & (row < V))
    # Voxels beyond the capacity all have row V, of which the least place is wanted: the voxel numbered V.
    own = tl.load(count_ptr + i, mask=i < N, other=0) - 1
    tl.store(offsets_ptr + own, i, mask=first & (own <= V))

    total, kept = tl.load(count_ptr + N - 1), tl.load(kept_ptr)
    unused = i >= total
    tl.store(offsets_ptr + i, kept + i * 0, mask=unused & (i <= V))
    at = coords_ptr + i * 4
    tl.store(at, sample + i.to(tl.int32) * 0, mask=unused & (i < V))
    for f in tl.static_range(1, 4):
        tl.store(at + f, i.to(tl.int32) * 0, mask=unused & (i < V))
    if tl.program_id(0) == 0:
        tl.store(num_ptr, tl.minimum(total, V))


@triton.jit
def _point_features_kernel(
    points_ptr, order_ptr, offsets_ptr, coords_ptr, out_ptr, sx, sy, sz, lx, ly, lz,
    F: tl.constexpr, WIDTH: tl.constexpr, DISTANCE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of the points of one voxel, their offsets from the mean and from the centre, [n, WIDTH].

    One program takes one voxel and reads its points twice; they are few, and the second time they are in the cache.
    """
    v = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + v), tl.load(offsets_ptr + v + 1)
    x_sum = tl.zeros([BLOCK_N], tl.float32)
    y_sum, z_sum = x_sum, x_sum
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = points_ptr + tl.load(order_ptr + n, mask=n < end, other=0) * F
        x_sum += tl.load(at, mask=n < end, other=0.0)
        y_sum += tl.load(at + 1, mask=n < end, other=0.0)
        z_sum += tl.load(at + 2, mask=n < end, other=0.0)
    count = tl.maximum(end - begin, 1).to(tl.float32)
    x_mean, y_mean, z_mean = tl.sum(x_sum, 0) / count, tl.sum(y_sum, 0) / count, tl.sum(z_sum, 0) / count
    x_centre = tl.load(coords_ptr + v * 4 + 3).to(tl.float32) * sx + lx
    y_centre = tl.load(coords_ptr + v * 4 + 2).to(tl.float32) * sy + ly
    z_centre = tl.load(coords_ptr + v * 4 + 1).to(tl.float32) * sz + lz
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        at = points_ptr + tl.load(order_ptr + n, mask=inside, other=0) * F
        out = out_ptr + n * WIDTH
        for f in tl.static_range(F):
            tl.store(out + f, tl.load(at + f, mask=inside, other=0.0), mask=inside)
        x = tl.load(at, mask=inside, other=0.0)
        y = tl.load(at + 1, mask=inside, other=0.0)
        z = tl.load(at + 2, mask=inside, other=0.0)
        tl.store(out + F, x - x_mean, mask=inside)
        tl.store(out + F + 1, y - y_mean, mask=inside)
        tl.store(out + F + 2, z - z_mean, mask=inside)
        tl.store(out + F + 3, x - x_centre, mask=inside)
        tl.store(out + F + 4, y - y_centre, mask=inside)
        tl.store(out + F + 5, z - z_centre, mask=inside)
        if DISTANCE:
            tl.store(out + F + 6, tl.sqrt(x * x + y * y + z * z), mask=inside)


@triton.jit
def _segment_max_kernel(
    values_ptr, offsets_ptr, out_ptr, row_ptr, N, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Maximum of BLOCK_C channels over the rows of one segment, and the first row that has it; a NaN is the maximum."""
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)
    largest = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
    row = tl.zeros([BLOCK_N, BLOCK_C], tl.int32) + N
    # Each place of the tile keeps its own maximum, so that the loop over a crowded voxel has no reduction.
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < end)[:, None] & (c < C)[None, :]
        x = tl.load(values_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        better = mask & ((row == N) | (x > largest) | ((x != x) & (largest == largest)))
        largest = tl.where(better, x, largest)
        row = tl.where(better, n[:, None].to(tl.int32), row)
    is_nan = largest != largest
    nan = tl.max(is_nan.to(tl.int32), 0)
    top = tl.max(tl.where(is_nan, float("-inf"), largest), 0)
    best = tl.where(nan[None, :] > 0, is_nan, largest == top[None, :])
    row = tl.min(tl.where(best, row, N), 0)
    value = tl.where(nan > 0, float("nan"), tl.where(row == N, 0.0, top))
    tl.store(out_ptr + s * C + c, value.to(out_ptr.dtype.element_ty), mask=c < C)
    tl.store(row_ptr + s * C + c, row, mask=c < C)


@triton.jit
def _segment_max_grad_kernel(
    grad_ptr, row_ptr, index_ptr, out_ptr, N, S, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Gradient of BLOCK_N rows: their segment's where the maximum came from them, else zero."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment = tl.load(index_ptr + n, mask=n < N, other=S)
    mask = (segment < S)[:, None] & (c < C)[None, :]
    at = segment[:, None] * C + c[None, :]
    mine = tl.load(row_ptr + at, mask=mask, other=-1) == n[:, None].to(tl.int32)
    grad = tl.load(grad_ptr + at, mask=mask & mine, other=0.0)
    tl.store(out_ptr + n[:, None] * C + c[None, :], grad, mask=(n < N)[:, None] & (c < C)[None, :])


def group_points(points: Tensor, sizes: list[int], grid: Grid, capacity: int | None) -> Grouping:
    """Three launches, of which the first is done for each run of samples of one size, around a sort and a running sum.

    N > 0.
    """
    N, B, device = len(points), len(sizes), points.device
    beyond = B * grid.count
    points = points.contiguous()
    key = torch.empty(N, dtype=torch.int32 if beyond < 2**31 else torch.int64, device=device)
    begin, first, fastest = 0, 0, grid.order == "zyx"
    for n, run in itertools.groupby(sizes):
        samples = len(list(run))
        if n:
            _key_kernel[(triton.cdiv(n, BLOCK), samples)](
                points[begin:], key[begin:], n, first * grid.count, beyond, *grid.voxel_size, *grid.minimum, *grid.cells,
                F=points.shape[1], CLAMP=grid.clamp, X_FASTEST=fastest, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        begin, first = begin + n * samples, first + samples
    key, order = key.sort(stable=True)
    first = torch.empty(N, dtype=torch.int64, device=device)
    kept = torch.empty(1, dtype=torch.int64, device=device)
    _first_kernel[(triton.cdiv(N, BLOCK),)](key, first, kept, N, beyond, BLOCK=BLOCK, num_warps=4)
    count = first.cumsum(0)
    V = capacity
    if V is None:
        V, N = torch.cat([count[-1:], kept]).tolist()
    index = torch.empty(N, dtype=torch.int64, device=device)
    coords = torch.empty((V, 4), dtype=torch.int32, device=device)
    offsets = torch.empty(V + 1, dtype=torch.int64, device=device)
    num = torch.empty((), dtype=torch.int64, device=device)
    if N == 0:
        return Grouping(Voxels(coords, None, B, grid.shape), order[:0], index, offsets.zero_())
    _finish_kernel[(triton.cdiv(max(N, V + 1), BLOCK),)](
        key, count, kept, index, coords, offsets, num, N, V, B, beyond, *grid.cells,
        X_FASTEST=fastest, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return Grouping(Voxels(coords, None if capacity is None else num, B, grid.shape), order[:N], index, offsets)


def point_features(
    points: Tensor, order: Tensor, offsets: Tensor, coords: Tensor, grid: Grid, with_distance: bool
) -> Tensor:
    """Columns and offsets of sorted points, [N, F + 6 (+ 1)]; zero for points without a voxel."""
    F, V = points.shape[1], len(coords)
    width = F + 6 + with_distance
    out = torch.zeros((len(order), width), dtype=torch.float32, device=points.device)
    if V and len(order):
        centre = [size / 2 + low for size, low in zip(grid.voxel_size, grid.minimum, strict=True)]
        _point_features_kernel[(V,)](
            points.contiguous(), order, offsets, coords, out, *grid.voxel_size, *centre,
            F=F, WIDTH=width, DISTANCE=with_distance, BLOCK_N=128, num_warps=4,
        )  # fmt: skip
    return out


def segment_max(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the maximum over sorted segments: values [S, C] and first rows, int32 [S, C]."""
    N, C = values.shape
    S = len(offsets) - 1
    out = torch.empty((S, C), dtype=values.dtype, device=values.device)
    row = torch.empty((S, C), dtype=torch.int32, device=values.device)
    if out.numel():
        block = min(64, triton.next_power_of_2(C))
        _segment_max_kernel[(S, triton.cdiv(C, block))](
            values.contiguous(), offsets, out, row, N, C=C, BLOCK_N=4, BLOCK_C=block, num_warps=1
        )
    return out, row


def segment_max_backward(grad: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """Launch the gradient: [N, C]."""
    N, (S, C) = len(index), grad.shape
    out = torch.empty((N, C), dtype=grad.dtype, device=grad.device)
    if out.numel():
        block = min(128, triton.next_power_of_2(C))
        _segment_max_grad_kernel[(triton.cdiv(N, 16), triton.cdiv(C, block))](
            grad.contiguous(), row, index, out, N, S, C=C, BLOCK_N=16, BLOCK_C=block, num_warps=4
        )
    return out
