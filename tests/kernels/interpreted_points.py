"""Kernels on point clouds and their maps under Triton's interpreter on a CPU; `test_interpreter.py` runs this file."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.kernels.bias_relu import reference as relu_reference
from zoo.kernels.bias_relu import triton as relu_kernels
from zoo.kernels.flat_window import reference as flat_reference
from zoo.kernels.flat_window import triton as flat_kernels
from zoo.kernels.flat_window import triton_order
from zoo.kernels.rotated_iou import reference as rotated_reference
from zoo.kernels.rotated_iou import triton as rotated_kernels
from zoo.kernels.scatter_linear import reference as scatter_reference
from zoo.kernels.scatter_linear import triton as scatter_kernels
from zoo.kernels.sparse_conv import (
    Neighbours,
    downsample,
    same_table,
    sort_sites,
    triton_depthwise,
    triton_neighbours,
    triton_pillars,
    triton_sites,
    triton_tiles,
)
from zoo.kernels.sparse_conv import reference as conv3d_reference
from zoo.kernels.sparse_conv import triton as conv3d_kernels
from zoo.kernels.sparse_conv.reference import SiteGrid
from zoo.kernels.sparse_conv.sites import build_tiles, coarser_sites, pillars_of
from zoo.kernels.voxelize import Voxels, make_grid
from zoo.kernels.voxelize import reference as voxel_reference
from zoo.kernels.voxelize import triton as voxel_kernels


@pytest.mark.parametrize(("n", "side"), [(70, 8.0), (33, 3.0), (5, 1.0)])
def test_rotated_suppression(n: int, side: float) -> None:
    torch.manual_seed(0)
    boxes = torch.rand(2, n, 5) * torch.tensor([side, side, 4, 2, 6])
    count, threshold = torch.tensor([n, n - 3], dtype=torch.int32), torch.tensor([0.3, 0.1])
    keep = rotated_kernels.nms(boxes, count, threshold)
    assert torch.equal(keep, rotated_reference.nms(boxes, count, threshold)) and not keep.all()


def test_rotated_overlap() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(40, 5) * 4, torch.rand(37, 5) * 4
    pairs = rotated_reference.overlap(a[:, None], b)
    torch.testing.assert_close(rotated_kernels.overlap(a, b, False), pairs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotated_kernels.overlap(a[:37], b, True), pairs.diagonal(), rtol=1e-4, atol=1e-5)


# (pillars of each sample, rows of padding, window, group, heads, head dim, dtype): several samples, one empty and some
# shorter than a group, groups with and without a tail, full last groups.
FLAT_PROBLEMS = {
    "samples": ([50, 0, 9, 33], 5, (5, 3), 16, 2, 12, torch.float32),
    "tail": ([61], 0, (4, 4), 24, 1, 16, torch.float32),
    "half": ([40, 3], 40, (5, 5), 20, 2, 16, torch.float16),
    "full": ([32], 0, (12, 12), 16, 1, 8, torch.float32),
    "large_group": ([30, 100], 2, (3, 3), 72, 1, 16, torch.float32),
    "single_pillars": ([9], 0, (4, 4), 1, 1, 8, torch.float32),  # nothing to choose from: gradients of q and k vanish
}


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("name", FLAT_PROBLEMS)
def test_flat_window_attention(name: str, prefetch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles in flat_kernels.TUNING["forward"].values():
        monkeypatch.setitem(tiles, "PREFETCH", prefetch)
    flat_kernels.plan.cache_clear()
    counts, padding, window, group, heads, D, dtype = FLAT_PROBLEMS[name]
    torch.manual_seed(0)
    coords = pillars(counts, 12, padding)
    windows = flat_reference.Windows(len(counts), (12, 12), window, group)
    order, groups = triton_order.flatten_windows(coords, windows)
    expected_order, expected_groups = flat_reference.flatten_windows(coords, windows)
    assert torch.equal(order, expected_order) and torch.equal(groups, expected_groups)
    inputs = [x.unflatten(-1, (heads, D)) for x in torch.randn(len(coords), 3 * heads * D).to(dtype).chunk(3, -1)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    settings = (order[1], groups, group, 0.4)
    expected = flat_reference.flat_window_attention(*leaves, *settings)
    grad = torch.randn_like(expected)
    out, lse = flat_kernels.forward(*inputs, *settings)
    grads = flat_kernels.backward(grad, *inputs, out, lse, *settings)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected.detach(), **tolerance)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad), **tolerance)


def pillars(counts: list[int], side: int, padding: int) -> torch.Tensor:
    """int32 [V, 4] random cells (sample, z, y, x) of a square grid, sorted, then rows of padding."""
    rows = [torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4)]
    for b in reversed(range(len(counts))):
        cell = torch.randperm(side * side)[: counts[b]].sort().values
        rows.insert(0, torch.stack([cell * 0 + b, cell * 0, cell // side, cell % side], 1))
    return torch.cat(rows).int()


def test_flattening_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of many samples do not fit 32 bits."""
    coords = pillars([0] * 5 + [40], 12, 3)
    windows = flat_reference.Windows(6, (12, 12), (5, 3), 16)
    expected = flat_reference.flatten_windows(coords, windows)
    monkeypatch.setattr(flat_reference.Windows, "key_dtype", lambda self: torch.int64)
    order, groups = triton_order.flatten_windows(coords, windows)
    assert torch.equal(order, expected[0]) and torch.equal(groups, expected[1])


# (rows of each window, rows behind the last window, heads, channels of a head, permuted, relu)
SCATTER = {
    "even": ([64, 32], 0, 2, 16, False, True),
    "odd": ([3, 0, 70, 1], 5, 1, 12, True, True),
    # With windows cut at 64 rows: over three pieces, exactly one piece, one row more.
    "long": ([10, 140, 64, 65, 2], 70, 1, 16, False, True),
    "long_permuted": ([150, 0, 90], 1, 2, 16, True, False),
    "one_row": ([1], 0, 1, 16, False, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCATTER)
def test_scatter_linear_attention(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter_kernels, "LONG", 64)
    scatter_kernels.config.cache_clear()
    counts, behind, M, D, permuted, relu = SCATTER[name]
    rows = sum(counts) + behind
    torch.manual_seed(0)
    qkv, grad = torch.randn(rows, 3, M, D).to(dtype), torch.randn(rows, M, D).to(dtype)
    inputs = qkv.unbind(1) if relu else qkv.abs().unbind(1)
    offsets, order = torch.tensor([0, *counts]).cumsum(0), torch.randperm(rows) if permuted else None
    settings = (offsets.int(), order, 1e-6, relu)
    tolerance = dict(rtol=2e-3, atol=2e-4) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    expected = scatter_reference.scatter_linear(*inputs, *settings)
    torch.testing.assert_close(scatter_kernels.forward(*inputs, *settings), expected, **tolerance)
    grads = scatter_reference.scatter_linear_backward(grad, *inputs, *settings)
    torch.testing.assert_close(scatter_kernels.backward(grad, *inputs, *settings), grads, **tolerance)


STRIDED = ((3, 3, 3), (2, 2, 2), (1, 1, 1))


def random_voxels(counts: tuple[int, ...], shape: tuple[int, int, int], padding: int) -> Voxels:
    Z, Y, X = shape
    rows = [torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4)]
    for b, count in enumerate(counts):
        cell = torch.randperm(Z * Y * X)[:count]
        rows.append(torch.stack((cell * 0 + b, cell // (Y * X), cell // X % Y, cell % X), 1))
    return Voxels(torch.cat(rows).int(), torch.tensor(sum(counts)), len(counts), shape)


def neighbours_of(kind: str) -> Neighbours:
    """Neighbours of 110 sites with the tiles that the kernels need."""
    torch.manual_seed(0)
    sites, _ = sort_sites(random_voxels((70, 35), (3, 6, 7), 5), (4, 3))
    if kind == "same":
        table = same_table(sites, [(3, 3, 3)])
        return Neighbours((3, 3, 3), table, build_tiles(table, (3, 3, 3)), table, build_tiles(table, (3, 3, 3)), True)
    n = downsample(sites, *STRIDED, (2, 2), 50)[1]
    tiles = (build_tiles(n.table, n.kernel), build_tiles(n.transposed, n.kernel))
    return n._replace(tiles=tiles[0], transposed_tiles=tiles[1])


@pytest.mark.parametrize("window", [None, (4, 3)])
def test_neighbours(window: tuple | None) -> None:
    torch.manual_seed(0)
    sites, _ = sort_sites(random_voxels((80, 0, 90), (3, 9, 11), 4), window)
    out, neighbours = downsample(sites, *STRIDED, window)
    cases = [
        (sites, sites, (3, 3, 3), (1, 1, 1), (1, 1, 1), False),
        (sites, sites, (1, 5, 1), (1, 1, 1), (0, 2, 0), False),
        (sites, out, *STRIDED, False),
        (out, sites, *STRIDED, True),
    ]
    for keys, queries, *settings in cases:
        arguments = (keys.keys, queries.coords, *settings, keys.grid)
        table = triton_neighbours.neighbour_table(*arguments)
        assert torch.equal(table, conv3d_reference.neighbour_table(*arguments)) and (table >= 0).any()


@pytest.mark.parametrize(
    ("kind", "cin", "cout", "dtype"),
    [("same", 16, 24, torch.float32), ("same", 72, 16, torch.float16), ("strided", 5, 40, torch.float32)],
)
def test_sparse_convolution(kind: str, cin: int, cout: int, dtype: torch.dtype, monkeypatch) -> None:
    # Several partial sums of the weight gradient.
    monkeypatch.setattr(conv3d_kernels, "PROGRAMS", 60)
    kernel, table, tiles, transposed, transposed_tiles, mirror = neighbours_of(kind)
    x = torch.randn(110, cin + 3)[:, 3:].to(dtype)
    weight, bias = (torch.randn(cout, 27, cin) / 8).to(dtype), torch.randn(cout).to(dtype)
    grad = torch.randn(table.shape[1], cout).to(dtype)
    out = conv3d_kernels.convolve(x, weight, bias, table, tiles, False, False)
    dx, dweight, _ = conv3d_kernels.backward(grad, x, weight, table, tiles, transposed, transposed_tiles, mirror)
    exact = [y.double() for y in (grad, x, weight, bias)]
    expected = conv3d_reference.sparse_conv(*exact[1:], table)
    gradients = conv3d_reference.sparse_conv_backward(*exact[:3], table)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
    for actual, wanted in zip((out, dx, dweight), (expected, *gradients), strict=True):
        torch.testing.assert_close(actual.double(), wanted, **tolerance)


@pytest.mark.parametrize(
    ("D", "groups", "residual", "dtype"), [(8, 4, True, torch.float32), (6, 2, False, torch.float16)]
)
def test_sparse_depthwise_convolution(
    D: int, groups: int, residual: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_depthwise, "PROGRAMS", 100)
    torch.manual_seed(0)
    kernels = [(3, 3, 3), (1, 1, 5), (1, 5, 1)][: max(2, groups - 1)]
    sites, _ = sort_sites(random_voxels((400, 350), (3, 15, 20), 5), (4, 3))
    table, taps = same_table(sites, kernels), [27, 5, 5][: len(kernels)]
    x, grad = torch.randn(2, 755, groups * D).to(dtype).unbind(0)
    weight = torch.randn(sum(taps), D).to(dtype)
    exact = [y.double() for y in (x, weight, grad)]
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
    for mirror in (False, True):
        out = triton_depthwise.convolve(x, weight, table, taps, residual, mirror)
        expected = conv3d_reference.sparse_depthwise_conv(*exact[:2], table, taps, residual, mirror)
        torch.testing.assert_close(out.double(), expected, **tolerance)
    dweight = triton_depthwise.weight_gradient(grad, x, table, taps, D)
    expected = conv3d_reference.sparse_depthwise_weight_gradient(exact[2], exact[0], table, taps, D)
    torch.testing.assert_close(dweight.double(), expected, **tolerance)


@pytest.mark.parametrize("capacity", [40, 500])
@pytest.mark.parametrize("strided", [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0))], ids=str)
def test_sites(strided: tuple, capacity: int) -> None:
    for voxels in (random_voxels((70, 0, 35), (7, 6, 9), 5), random_voxels((0,), (7, 6, 9), 3)):
        sites, _ = sort_sites(voxels, (4, 3))
        assert torch.equal(triton_sites.number_cells(sites.coords, sites.grid), sites.keys)
        coarse = SiteGrid(voxels.batch_size, (3, 3, 5), (2, 3))
        if strided[0][1] == 1:
            coarse = coarse._replace(shape=(3, 6, 9))
        expected = coarser_sites(sites.coords, *strided, coarse, capacity)
        actual = triton_sites.coarser_sites(sites.coords, *strided, coarse, capacity)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        expected = pillars_of(sites.keys, sites.coords, sites.grid, capacity)
        actual = triton_sites.find_pillars(sites.keys, sites.coords, sites.grid, capacity)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("Z", "heads", "C"), [(8, 2, 16), (10, 4, 32), (3, 1, 8), (2, 4, 8)])
def test_pillars(Z: int, heads: int, C: int) -> None:
    torch.manual_seed(0)
    rows = torch.randperm(20 * Z).view(20, Z)
    N = 9 * Z
    rows[-2:] = N  # as padding has it
    rows = rows.clamp(max=N)
    q, kv, place = torch.randn(20, C), torch.randn(N, 2 * C), torch.randn(Z, C)
    k, v = kv.chunk(2, 1)
    assert torch.equal(triton_pillars.pillar_max(k, rows), conv3d_reference.pillar_max(k, rows))
    expected = conv3d_reference.pillar_attention(q, k, v, place, rows, heads)
    actual = triton_pillars.pillar_attention(q, k, v, place, rows, heads)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual[-2:] == 0).all() and (expected[-2:] == 0).all()


@pytest.mark.parametrize("channels", [40, 1100])
@pytest.mark.parametrize(("with_sum", "after"), [(False, False), (True, False), (True, True)])
def test_bias_and_relu(with_sum: bool, after: bool, channels: int) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, 270, channels), torch.randn(channels)
    added = torch.randn(270, channels) if with_sum else None
    expected = relu_reference.bias_relu_(x[0].clone(), bias, added, after)
    relu_kernels.bias_relu_(x[0], bias, added, after)
    torch.testing.assert_close(x[0], expected)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 5, 2), (3, 3, 4)], ids=str)
def test_tiles(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for N in (0, 1, 64, 150):
        table = torch.randint(-2, 3, (math.prod(kernel), N), dtype=torch.int32)
        table[:, N // 2 :] = -1  # as padding has it
        assert torch.equal(triton_tiles.build_tiles(table, kernel, 64), build_tiles(table, kernel))


@pytest.mark.parametrize("capacity", [None, 100, 20])
@pytest.mark.parametrize(("order", "clamp"), [("zyx", True), ("xyz", False)])
@pytest.mark.parametrize("sizes", [[30, 0, 50], [40, 40]], ids=str)
def test_grouped_points(sizes: list[int], order: str, clamp: bool, capacity: int | None) -> None:
    torch.manual_seed(0)
    points = torch.rand(80, 5) * 10 - 5
    points[3, 4], points[60, 0], points[35:40] = torch.nan, torch.inf, torch.nan
    grid = make_grid((0.5, 0.25, 1.0), (-4.0, -2.0, -1.0, 4.0, 2.0, 2.0), clamp, order)
    expected = voxel_reference.group_points(points, sizes, grid, capacity)
    actual = voxel_kernels.group_points(points, sizes, grid, capacity)
    assert all(torch.equal(a, e) for a, e in zip(actual[1:], expected[1:], strict=True))
    assert torch.equal(actual.voxels.coords, expected.voxels.coords) and actual.voxels.num == expected.voxels.num
    V = len(actual.voxels.coords)
    features = voxel_kernels.point_features(
        points, actual.order, actual.offsets, actual.voxels.coords, grid, True
    )  # fmt: skip
    known = expected.index < V
    wanted = voxel_reference.point_features(points, expected, grid, True)
    torch.testing.assert_close(features[known], wanted[known])
    assert torch.isfinite(features).all()


def test_maximum_over_segments() -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 13, (90,)).sort().values
    index[index == 4] = 5
    offsets = torch.searchsorted(index, torch.arange(13))
    values = torch.randn(90, 20).round(decimals=1)  # with ties
    values[7, 3], values[11, 4] = torch.nan, -torch.inf
    leaf = values.clone().requires_grad_()
    expected = voxel_reference.segment_max(leaf, index, 12)
    out, row = voxel_kernels.segment_max(values, offsets)
    torch.testing.assert_close(out, expected.detach(), equal_nan=True)
    grad = torch.randn_like(expected)
    actual = voxel_kernels.segment_max_backward(grad, row, index)
    torch.testing.assert_close(actual, *torch.autograd.grad(expected, leaf, grad))
