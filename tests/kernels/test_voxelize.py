"""Voxels of point clouds, and means and maxima over them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.kernels import segment_max, segment_mean, voxelize
from zoo.kernels.voxelize import group_points, make_grid, point_features

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
SIZE, RANGE = (0.5, 0.25, 1.0), (-4.0, -2.0, -1.0, 4.0, 2.0, 2.0)


def make_points(sizes: list[int], device: str = "cpu", columns: int = 5) -> Tensor:
    """Points within and a little beyond the range, with hostile ones among them."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(sum(sizes), columns, generator=generator) * torch.tensor([10.0, 5.0, 4.0, 1.0, 1.0][:columns])
    points[:, :3] -= torch.tensor([5.0, 2.5, 1.5])
    if len(points) > 20:
        points[3, 4], points[4, 0], points[5, 1] = math.nan, math.inf, -math.inf
        points[6, :3] = torch.tensor([1e30, -1e30, 0.0])
        points[7, :3] = torch.tensor([-4.0, -2.0, -1.0])  # the corner that belongs to the range
        points[8, :3] = torch.tensor([4.0, 2.0, 2.0])  # and the one that does not
    return points.to(device)


def by_loops(points: Tensor, sizes: list[int], clamp: bool, order: str) -> tuple[list, list]:
    """Voxels (b, z, y, x) and each point's voxel, point by point."""
    limit, cells = [16, 16, 3], []
    for i, p in enumerate(points.tolist()):
        b = next(b for b in range(len(sizes)) if i < sum(sizes[: b + 1]))
        cell = None
        if all(map(math.isfinite, p)):
            cell = [math.floor((p[j] - RANGE[j]) / SIZE[j]) for j in range(3)]
            if clamp:
                cell = [min(max(c, 0), n - 1) for c, n in zip(cell, limit, strict=True)]
            elif not all(0 <= c < n for c, n in zip(cell, limit, strict=True)):
                cell = None
        cells.append(cell and (b, *cell))  # b, x, y, z
    key = (lambda c: c) if order == "xyz" else (lambda c: (c[0], *c[:0:-1]))
    voxels = sorted({c for c in cells if c}, key=key)
    return [[c[0], *c[:0:-1]] for c in voxels], [voxels.index(c) if c else len(voxels) for c in cells]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["zyx", "xyz"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("sizes", [[200], [90, 0, 150, 0], [0], [1], []], ids=str)
def test_voxels_are_the_definition(sizes: list[int], clamp: bool, order: str, device: str) -> None:
    points = make_points(sizes, device)
    coords, index = by_loops(points, sizes, clamp, order)
    voxels, row = voxelize(points, sizes, SIZE, RANGE, clamp, order)
    assert voxels.coords.tolist() == coords and row.tolist() == index
    assert voxels.num is None and voxels.batch_size == len(sizes) and voxels.shape == (3, 16, 16)
    assert voxels.coords.dtype == torch.int32 and row.dtype == torch.int64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [400, 50, 1])
def test_capacity_pads_or_cuts(capacity: int, device: str) -> None:
    sizes = [90, 0, 150]
    points = make_points(sizes, device)
    full, index = voxelize(points, sizes, SIZE, RANGE)
    voxels, row = voxelize(points, sizes, SIZE, RANGE, capacity=capacity)
    kept = min(capacity, len(full.coords))
    assert voxels.num.tolist() == kept and voxels.coords.shape == (capacity, 4)
    assert torch.equal(voxels.coords[:kept], full.coords[:kept])
    assert (voxels.coords[kept:, 0] == len(sizes)).all() and voxels.real().sum() == kept
    assert torch.equal(row, index.where(index < kept, capacity))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [None, 300, 40])
def test_grouped_points(capacity: int | None, device: str) -> None:
    sizes = [90, 0, 150]
    points = make_points(sizes, device)
    voxels, row = voxelize(points, sizes, SIZE, RANGE, capacity=capacity)
    grouped = group_points(points, sizes, make_grid(SIZE, RANGE, False, "zyx"), capacity)
    assert torch.equal(grouped.voxels.coords, voxels.coords)
    assert torch.equal(row[grouped.order], grouped.index) and (grouped.index.diff() >= 0).all()
    for v, (begin, end) in enumerate(zip(grouped.offsets[:-1], grouped.offsets[1:], strict=True)):
        assert (grouped.index[begin:end] == v).all() and end - begin == (row == v).sum()
        assert (grouped.order[begin:end].diff() > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(points=torch.zeros(4, 2)), r"float32 \[N, 3 or more\].*\(4, 2\)"),
        (dict(points=torch.zeros(4, 5).double()), "float64"),
        (dict(points=torch.zeros(4, 5).long()), "int64"),
        (dict(sizes=[3]), r"4 in all, got \[3\]"),
        (dict(sizes=[5, -1]), r"got \[5, -1\]"),
        (dict(voxel_size=(1, 1)), "voxel_size takes 3"),
        (dict(voxel_size=(1, 0, 1)), "must be positive"),
        (dict(point_range=(0, 0, 0, 1, 1, 0)), "must be positive"),
        (dict(order="yxz"), "order must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    args = dict(points=torch.zeros(4, 5), sizes=[1, 3], voxel_size=SIZE, point_range=RANGE)
    with pytest.raises(ValueError, match=message):
        voxelize(**{**args, **change})


@pytest.mark.parametrize("device", DEVICES)
def test_mean_and_maximum(device: str) -> None:
    values = torch.randn(60, 5, device=device, dtype=torch.float64)
    index = torch.randint(0, 13, (60,), device=device)  # 12 leaves a row out
    index[index == 4] = 5
    mean, largest = segment_mean(values, index, 12), segment_max(values, index, 12)
    for s in range(12):
        rows = values[index == s]
        expected = (rows.mean(0), rows.max(0).values) if len(rows) else (torch.zeros_like(values[0]),) * 2
        torch.testing.assert_close((mean[s], largest[s]), expected)


@pytest.mark.parametrize("reduce", [segment_mean, segment_max])
@pytest.mark.parametrize("device", DEVICES)
def test_reductions_gradcheck(reduce, device: str) -> None:
    values = torch.randn(20, 3, device=device, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 6, (20,), device=device)
    assert torch.autograd.gradcheck(lambda x: reduce(x, index, 5), values)


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_of_equal_rows_has_the_gradient(device: str) -> None:
    values = torch.tensor([[1.0], [2.0], [2.0], [0.0], [0.0]], device=device, requires_grad=True)
    segment_max(values, torch.tensor([0, 0, 0, 1, 1], device=device), 2).sum().backward()
    assert values.grad.flatten().tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_not_hidden(device: str) -> None:
    values = torch.tensor([[1.0], [math.nan], [3.0]], device=device)
    largest = segment_max(values, torch.tensor([0, 0, 1], device=device), 2)
    assert largest[0].isnan() and largest[1] == 3


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_means_are_summed_in_float32(device: str) -> None:
    values = torch.ones(5000, 1, device=device, dtype=torch.float16)
    assert segment_mean(values, torch.zeros(5000, dtype=torch.int64, device=device), 1).item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [None, 300, 40])
def test_features_of_points(capacity: int | None, device: str) -> None:
    sizes, grid = [90, 0, 150], make_grid(SIZE, RANGE, False, "xyz")
    points = make_points(sizes, device)
    grouped = group_points(points, sizes, grid, capacity)
    features = point_features(points, grouped, grid, True)
    assert features.shape == (len(grouped.order), 12) and torch.isfinite(features).all()
    for row, point, voxel in zip(features, points[grouped.order], grouped.index, strict=True):
        if voxel == len(grouped.voxels.coords):
            continue
        same = points[grouped.order[grouped.index == voxel], :3]
        cell = grouped.voxels.coords[voxel, 1:].flip(0)
        centre = (cell + 0.5) * torch.tensor(SIZE, device=device) + torch.tensor(RANGE[:3], device=device)
        expected = torch.cat([point, point[:3] - same.mean(0), point[:3] - centre, point[:3].norm()[None]])
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sorted_segments(dtype: torch.dtype, device: str) -> None:
    """With offsets a GPU takes its kernel, which gives the same numbers."""
    index = torch.randint(0, 101, (3000,)).sort().values
    offsets = torch.searchsorted(index, torch.arange(101)).to(device)
    values = torch.randn(3000, 70).to(dtype)
    leaf, other = (values.clone().to(d).requires_grad_() for d in (device, "cpu"))
    out, expected = segment_max(leaf, index.to(device), 100, offsets), segment_max(other, index, 100)
    assert torch.equal(out.cpu(), expected)
    grad = torch.randn_like(expected)
    out.backward(grad.to(device))
    expected.backward(grad)
    assert torch.equal(leaf.grad.cpu(), other.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    index = torch.randint(0, 6, (40,), device=device).sort().values
    offsets = torch.searchsorted(index, torch.arange(6, device=device))
    values = torch.randn(40, 7, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.zoo.segment_max, (values, index, offsets))


def test_offsets_are_checked() -> None:
    values, index = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"offsets must be int64 \[3\], got torch.int64 \(2,\)"):
        segment_max(values, index, 2, torch.tensor([0, 2]))
    with pytest.raises(NotImplementedError, match="needs sorted segments"):
        segment_max(values, index, 2, backend="triton")


def test_explicit_triton_explains_its_refusal() -> None:
    points, grid = make_points([30]), make_grid(SIZE, RANGE, False, "zyx")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        group_points(points, [30], grid, backend="triton")


@gpu
def test_kernels_group_as_the_reference_does() -> None:
    sizes, grid = [4000, 0, 9000], make_grid((0.1, 0.1, 0.2), RANGE, True, "zyx")
    points = make_points(sizes)
    for capacity in (None, 20000, 500):
        expected = group_points(points, sizes, grid, capacity)
        actual = group_points(points.cuda(), sizes, grid, capacity)
        assert torch.equal(actual.voxels.coords.cpu(), expected.voxels.coords)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual[1:], expected[1:], strict=True))


@gpu
def test_a_capacity_waits_for_nothing() -> None:
    sizes, grid = [400, 900], make_grid(SIZE, RANGE, True, "zyx")
    points = make_points(sizes, "cuda")
    point_features(points, group_points(points, sizes, grid, 500), grid)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped = group_points(points, sizes, grid, 500)
        point_features(points, grouped, grid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert grouped.voxels.num.item() <= 500
