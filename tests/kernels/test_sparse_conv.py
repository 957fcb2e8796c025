"""Sparse convolution: sites and neighbours, the ops' references, their kernels on a GPU, torch's transformations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.sparse_conv import (
    Neighbours,
    SiteGrid,
    Sites,
    downsample,
    find_pillars,
    pillar_attention,
    pillar_max,
    same_neighbours,
    same_table,
    sort_sites,
    sparse_conv,
    sparse_depthwise_conv,
    window_offsets,
)
from zoo.kernels.sparse_conv import reference as sparse_reference
from zoo.kernels.sparse_conv.op import can_run, can_run_depthwise
from zoo.kernels.sparse_conv.sites import TILE, build_tiles, make_tiles
from zoo.kernels.voxelize import Voxels

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
SHAPE = (5, 9, 11)
# Strided convolutions of ScatterFormer, and one whose taps leave gaps.
STRIDED = {
    "height": ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
    "all": ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "gaps": ((1, 2, 2), (1, 3, 2), (0, 1, 0)),
}


def make_voxels(counts=(90, 0, 40), padding: int = 0, shape=SHAPE, device: str = "cpu", seed: int = 0) -> Voxels:
    """Distinct random cells in random order, rows of padding behind them."""
    generator = torch.Generator().manual_seed(seed)
    Z, Y, X = shape
    rows = []
    for b, count in enumerate(counts):
        cell = torch.randperm(Z * Y * X, generator=generator)[:count]
        rows.append(torch.stack((cell * 0 + b, cell // (Y * X), cell // X % Y, cell % X), 1))
    rows.append(torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4))
    num = torch.tensor(sum(counts), device=device) if padding else None
    return Voxels(torch.cat(rows).int().to(device), num, len(counts), shape)


def to_dense(x: Tensor, sites: Sites) -> Tensor:
    """[N, C] -> [B, C, Z, Y, X]"""
    real = sites.real()
    b, z, y, x_ = sites.coords[real].long().unbind(1)
    dense = x.new_zeros(sites.grid.batch_size, *sites.grid.shape, x.shape[1])
    return dense.index_put((b, z, y, x_), x[real]).permute(0, 4, 1, 2, 3)


def at_sites(dense: Tensor, sites: Sites) -> Tensor:
    b, z, y, x = sites.coords.long().unbind(1)
    return dense.permute(0, 2, 3, 4, 1)[b, z, y, x]


@pytest.mark.parametrize("window", [(9, 11), (4, 3), (1, 1), (20, 20)])
def test_keys_number_cells_window_by_window(window: tuple[int, int]) -> None:
    grid = SiteGrid(2, SHAPE, window)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (2, *SHAPE)))
    keys = grid.encode(cells)
    assert torch.equal(grid.decode(keys).long(), cells) and len(keys.unique()) == len(keys)
    order = [
        (b, y // window[0], x // window[1], x, y, z) for b, z, y, x in cells[keys.argsort()].tolist()
    ]  # fmt: skip
    assert order == sorted(order)
    assert grid.encode(torch.tensor([[2, 0, 0, 0]])).item() == grid.end > keys.max()
    assert grid.decode(torch.tensor([grid.end])).tolist() == [[2, 0, 0, 0]]


def test_sites_are_sorted_and_known_by_their_voxels() -> None:
    voxels = make_voxels(padding=5)
    sites, order = sort_sites(voxels, (4, 3))
    assert (sites.keys[1:] >= sites.keys[:-1]).all() and torch.equal(sites.coords, voxels.coords[order])
    assert sites.real().sum() == 130 and not sites.real()[130:].any()
    again, none = sort_sites(sites.voxels, (4, 3), is_sorted=True)
    assert none is None and torch.equal(again.keys, sites.keys)


def test_window_offsets_count_the_sites_of_windows() -> None:
    sites, _ = sort_sites(make_voxels(padding=5), (4, 3))
    offsets = window_offsets(sites)
    rows, cols = sites.grid.windows
    assert (rows, cols) == (3, 4) and len(offsets) == 3 * 12 + 1 and offsets[-1] == 130
    b, _, y, x = sites.coords[:130].long().unbind(1)
    expected = torch.bincount((b * rows + y // 4) * cols + x // 3, minlength=36)
    assert torch.equal(offsets.diff().long(), expected)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 5), (1, 5, 1), (3, 1, 1)])
@pytest.mark.parametrize("window", [None, (4, 3)])
def test_submanifold_convolution_is_dense_convolution_at_its_sites(kernel: tuple, window: tuple | None) -> None:
    sites, _ = sort_sites(make_voxels(), window)
    x, weight, bias = torch.randn(130, 6).double(), torch.randn(4, *kernel, 6).double(), torch.randn(4).double()
    out = sparse_conv(x, weight, bias, same_neighbours(sites, kernel))
    dense = F.conv3d(to_dense(x, sites), weight.permute(0, 4, 1, 2, 3), bias, padding=[k // 2 for k in kernel])
    torch.testing.assert_close(out, at_sites(dense, sites))


@pytest.mark.parametrize("window", [None, (2, 3)])
@pytest.mark.parametrize("name", STRIDED)
def test_strided_convolution_is_dense_convolution_where_a_tap_meets_a_site(name: str, window: tuple | None) -> None:
    kernel, stride, padding = STRIDED[name]
    sites, _ = sort_sites(make_voxels((25, 0, 8)))
    out_sites, neighbours = downsample(sites, kernel, stride, padding, window)
    x, weight = torch.randn(33, 6).double(), torch.randn(4, *kernel, 6).double()
    out = sparse_conv(x, weight, None, neighbours)
    arguments = dict(stride=stride, padding=padding)
    dense = F.conv3d(to_dense(x, sites), weight.permute(0, 4, 1, 2, 3), **arguments)
    assert out_sites.grid.shape == tuple(dense.shape[2:]) and out_sites.num is None
    torch.testing.assert_close(out, at_sites(dense, out_sites))
    met = F.conv3d(to_dense(torch.ones(33, 1), sites), torch.ones(1, 1, *kernel), **arguments) > 0
    assert met.sum() == len(out) and at_sites(met, out_sites).all()
    assert (out_sites.keys[1:] > out_sites.keys[:-1]).all()
    torch.testing.assert_close(out_sites.grid.encode(out_sites.coords), out_sites.keys)


@pytest.mark.parametrize("name", STRIDED)
def test_transposed_table_is_the_inverse(name: str) -> None:
    sites, _ = sort_sites(make_voxels())
    _, neighbours = downsample(sites, *STRIDED[name])
    for table, other in ((neighbours.table, neighbours.transposed), (neighbours.transposed, neighbours.table)):
        tap, place = (table >= 0).nonzero().unbind(1)
        assert len(tap) and torch.equal(other[tap, table[tap, place].long()].long(), place)
    assert (neighbours.table >= 0).sum() == (neighbours.transposed >= 0).sum()


@pytest.mark.parametrize("name", STRIDED)
def test_neighbours_without_gradients(name: str) -> None:
    sites, _ = sort_sites(make_voxels())
    out, expected = downsample(sites, *STRIDED[name])
    same, neighbours = downsample(sites, *STRIDED[name], gradients=False)
    assert torch.equal(same.keys, out.keys) and torch.equal(neighbours.table, expected.table)
    x, weight = torch.randn(len(sites.keys), 3), torch.randn(4, *neighbours.kernel, 3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(sparse_conv(x, weight, None, neighbours), sparse_conv(x, weight, None, expected))
    with pytest.raises(ValueError, match=r"downsample\(..., gradients=True\)"):
        sparse_conv(x, weight, None, neighbours)


def test_padding_changes_no_real_row() -> None:
    plain, padded = make_voxels(), make_voxels(padding=40)
    x = torch.randn(130, 6)
    results = []
    for voxels, capacity in ((plain, None), (padded, 200)):
        sites, order = sort_sites(voxels, (4, 3))
        features = torch.cat((x, torch.full((voxels.coords.shape[0] - 130, 6), torch.nan)))[order]
        same = sparse_conv(features, torch.ones(4, 3, 3, 3, 6), None, same_neighbours(sites, (3, 3, 3)))
        out, neighbours = downsample(sites, *STRIDED["all"], (4, 3), capacity)
        strided = sparse_conv(features, torch.ones(4, 3, 3, 3, 6), None, neighbours)
        pillars = find_pillars(out, None if capacity is None else 150)
        results.append((sites, same, out, strided, pillars))
    (sites, same, out, strided, pillars), padded = results
    n, p = len(out.keys), len(pillars.rows)
    assert padded[2].num == n and padded[4].voxels.num == p and not padded[2].real()[n:].any()
    torch.testing.assert_close(padded[1][:130], same)
    torch.testing.assert_close(padded[3][:n], strided)
    assert torch.equal(padded[2].coords[:n], out.coords) and (padded[2].coords[n:, 0] == 3).all()
    assert torch.equal(padded[4].voxels.coords[:p], pillars.voxels.coords)
    assert torch.equal(padded[4].rows[:p] == len(padded[2].keys), pillars.rows == n)
    assert torch.equal(window_offsets(padded[0]), window_offsets(sites))


def test_too_small_a_capacity_keeps_the_first_sites() -> None:
    sites, _ = sort_sites(make_voxels())
    everything, _ = downsample(sites, *STRIDED["all"])
    some, neighbours = downsample(sites, *STRIDED["all"], capacity=20)
    assert torch.equal(some.keys, everything.keys[:20]) and some.num == 20
    assert neighbours.transposed.max() == 19


def test_pillars_name_the_sites_of_each_column() -> None:
    sites, _ = sort_sites(make_voxels(), (4, 3))
    pillars = find_pillars(sites)
    columns = {tuple(c) for c in sites.coords[:, [0, 2, 3]].tolist()}
    assert {(b, y, x) for b, _, y, x in pillars.voxels.coords.tolist()} == columns
    assert len(pillars.rows) == len(columns) and pillars.voxels.shape == (1, 9, 11)
    p, z = (pillars.rows < 130).nonzero().unbind(1)
    cells = torch.cat((pillars.voxels.coords[p, :1], z[:, None], pillars.voxels.coords[p, 2:]), 1)
    assert len(p) == 130 and torch.equal(sites.coords[pillars.rows[p, z]], cells.int())


def test_no_sites() -> None:
    sites, _ = sort_sites(make_voxels((0, 0)))
    out, neighbours = downsample(sites, *STRIDED["all"])
    assert sparse_conv(torch.zeros(0, 6), torch.ones(4, 3, 3, 3, 6), None, neighbours).shape == (0, 4)
    assert find_pillars(out).rows.shape == (0, 3) and (window_offsets(sites) == 0).all()
    same = sparse_conv(torch.zeros(0, 6), torch.ones(4, 3, 3, 3, 6), None, same_neighbours(sites, (3, 3, 3)))
    assert same.shape == (0, 4)


def test_tiles_hold_every_row_once_and_every_tap_they_meet() -> None:
    sites, _ = sort_sites(make_voxels(padding=3))
    table = same_table(sites, [(3, 3, 3)])
    tiles = build_tiles(table, (3, 3, 3))
    rows = tiles[:, 28:]
    assert tiles.shape == (-(-133 // TILE), 28 + TILE)
    assert sorted(rows.flatten().tolist()) == [-1] * (rows.numel() - 133) + list(range(133))
    for tile, own in zip(tiles, rows, strict=True):
        met = (table[:, own[own >= 0].long()] >= 0).any(1).nonzero()[:, 0]
        assert tile[0] == len(met) and torch.equal(tile[1 : 1 + len(met)].long(), met)


def test_sorted_tiles_meet_fewer_taps() -> None:
    """A flat scene: most rows have no neighbour above or below."""
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.rand(2, 3000, generator=generator) * 60).long().unique(dim=1)
    z = 2 + (torch.rand(len(y), generator=generator) > 0.95).long()
    voxels = Voxels(torch.stack((z * 0, z, y, x), 1).int(), None, 1, (5, 60, 60))
    table = same_table(sort_sites(voxels)[0], [(3, 3, 3)])
    fill = -table.shape[1] % TILE
    unsorted = F.pad(table, (0, fill), value=-1).view(27, -1, TILE).amax(2) >= 0
    assert build_tiles(table, (3, 3, 3))[:, 0].sum() < 0.75 * unsorted.sum()


BRANCHES = [(3, 3, 3), (1, 1, 5), (1, 5, 1)]


def depthwise_problem(dtype: torch.dtype, device: str, D: int = 4, groups: int = 4) -> tuple[list[Tensor], Tensor]:
    sites, _ = sort_sites(make_voxels(padding=3, device=device), (4, 3))
    generator = torch.Generator(device).manual_seed(1)
    sizes = [(133, groups * D), *((*kernel, D) for kernel in BRANCHES)]
    inputs = [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]
    return inputs, same_table(sites, BRANCHES)


def test_depthwise_convolution_is_dense_convolution_at_its_sites() -> None:
    (x, *weights), table = depthwise_problem(torch.float64, "cpu")
    sites, _ = sort_sites(make_voxels(padding=3), (4, 3))
    dense, outs = to_dense(x, sites), []
    for g, w in enumerate(weights):
        w = w.permute(3, 0, 1, 2)[:, None]
        outs.append(F.conv3d(dense[:, 4 * g : 4 * g + 4], w, padding=[k // 2 for k in w.shape[2:]], groups=4))
    expected = torch.cat((*outs, dense[:, 12:]), 1)[:, :, :, :, :]
    real = Sites(sites.keys[:130], sites.coords[:130], None, sites.grid)
    out = sparse_depthwise_conv(x, weights, table)
    torch.testing.assert_close(out[:130], at_sites(expected, real))
    torch.testing.assert_close(sparse_depthwise_conv(x, weights, table, residual=True), out + x)
    assert torch.equal(out[:, 12:], x[:, 12:])


def conv_problem(name: str, dtype: torch.dtype, device: str, channels: tuple) -> tuple[list[Tensor], Neighbours]:
    sites, _ = sort_sites(make_voxels((300, 0, 90), 7, (5, 17, 13), device), (4, 3))
    if name == "same":
        kernel, neighbours = (3, 3, 3), same_neighbours(sites, (3, 3, 3))
    else:
        kernel = STRIDED[name][0]
        _, neighbours = downsample(sites, *STRIDED[name], (4, 3))
    generator = torch.Generator(device).manual_seed(1)
    cin, cout = channels
    sizes = [(397, cin + 8), (cout, *kernel, cin), (cout,)]
    x, weight, bias = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
    return [x[:, 8:], weight, bias], neighbours


@pytest.mark.parametrize("name", ["same", *STRIDED])
def test_written_out_gradients_equal_autograd(name: str) -> None:
    inputs, neighbours = conv_problem(name, torch.float64, "cpu", (3, 5))
    grad = torch.randn(neighbours.table.shape[1], 5, dtype=torch.float64)
    expected = with_gradients(lambda *x: sparse_conv(*x, neighbours), inputs, grad)
    _, *tables = neighbours
    tables, mirror = tables[:-1], tables[-1]

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.zoo.sparse_conv(x, weight.flatten(1, 3), bias, *tables, mirror)

    torch.testing.assert_close(with_gradients(op, inputs, grad), expected)


def test_depthwise_gradients_equal_autograd() -> None:
    (x, *weights), table = depthwise_problem(torch.float64, "cpu")
    inputs, taps = [x, torch.cat([w.flatten(0, 2) for w in weights])], [27, 5, 5]
    grad = torch.randn_like(x)
    expected = with_gradients(
        lambda x, w: sparse_reference.sparse_depthwise_conv(x, w, table, taps, True), inputs, grad
    )
    actual = with_gradients(
        lambda x, w: torch.ops.zoo.sparse_depthwise_conv(x, w, table, taps, True, False), inputs, grad
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(130, 5)), r"weight \[Cout, KZ, KY, KX, Cin\], got \(130, 5\)"),
        (dict(x=torch.randn(131, 6)), "neighbours are of 130 input sites"),
        (dict(weight=torch.randn(4, 3, 3, 1, 6)), r"a kernel \(3, 3, 3\)"),
        (dict(bias=torch.randn(5)), r"bias must be \[4\]"),
        (dict(x=torch.randn(130, 6).double()), "need one dtype"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    neighbours = same_neighbours(sort_sites(make_voxels())[0], (3, 3, 3))
    args = dict(x=torch.randn(130, 6), weight=torch.randn(4, 3, 3, 3, 6), bias=None, neighbours=neighbours)
    with pytest.raises(ValueError, match=message):
        sparse_conv(**{**args, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=[]), r"weights \[KZ, KY, KX, D\]"),
        (dict(weights=[torch.randn(3, 3, 2, 4)]), "odd sizes"),
        (dict(weights=[torch.randn(3, 3, 3, 5)]), "divide 16 channels"),
        (dict(weights=[torch.randn(3, 3, 3, 4)]), r"table must be \[27, 133\]"),
        (dict(x=torch.randn(133, 16).double()), "need one dtype"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_depthwise_arguments_are_named(change: dict, message: str) -> None:
    (x, *weights), table = depthwise_problem(torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        sparse_depthwise_conv(**{**dict(x=x, weights=weights, table=table), **change})


def test_even_kernels_have_no_centre() -> None:
    with pytest.raises(ValueError, match=r"odd sizes, got \(2, 3, 3\)"):
        same_neighbours(sort_sites(make_voxels())[0], (2, 3, 3))


def test_explicit_triton_explains_its_refusal() -> None:
    inputs, neighbours = conv_problem("same", torch.float32, "cpu", (8, 8))
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        sparse_conv(*inputs, neighbours, backend="triton")
    assert not can_run(inputs[0], neighbours)
    (x, *_), _ = depthwise_problem(torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        can_run_depthwise(x, x, [27], raise_error=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("name", ["same", "all"])
def test_opcheck(name: str, device: str) -> None:
    (x, weight, bias), neighbours = conv_problem(name, torch.float32, device, (16, 16))
    leaves = [y.contiguous().requires_grad_() for y in (x, weight.flatten(1, 3), bias)]
    torch.library.opcheck(torch.ops.zoo.sparse_conv, (*leaves, *neighbours[1:]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_opcheck_depthwise_and_neighbours(device: str) -> None:
    (x, *weights), table = depthwise_problem(torch.float32, device)
    weight = torch.cat([w.flatten(0, 2) for w in weights]).requires_grad_()
    arguments = (x.requires_grad_(), weight, table, [27, 5, 5], True, False)
    torch.library.opcheck(torch.ops.zoo.sparse_depthwise_conv, arguments)
    sites, _ = sort_sites(make_voxels(device=device), (4, 3))
    sizes = ([3, 3, 3], [1, 1, 1], [1, 1, 1], False, 3, list(SHAPE), [4, 3])
    torch.library.opcheck(torch.ops.zoo.sparse_neighbours, (sites.keys, sites.coords, *sizes))
    neighbours = same_table(sites, [(3, 3, 3)])
    torch.library.opcheck(torch.ops.zoo.sparse_tiles, (neighbours, [3, 3, 3]))


def pillar_problem(dtype: torch.dtype, device: str = "cpu", Z: int = 5, C: int = 16) -> tuple[list[Tensor], Tensor]:
    """q, k, v (slices of one projection) and place; rows of pillars, of which two are padding."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(30 * Z, generator=generator).view(30, Z)
    N = 12 * Z
    rows = rows.clamp(max=N)
    rows[-2:] = N
    q, kv, place = (torch.randn(*shape, generator=generator) for shape in ((30, C), (N, 2 * C), (Z, C)))
    return [x.to(device, dtype) for x in (q, *kv.chunk(2, 1), place)], rows.to(device)


def test_pillar_attention_is_the_definition() -> None:
    (q, k, v, place), rows = pillar_problem(torch.float64)
    out, largest = pillar_attention(q, k, v, place, rows, 4), pillar_max(k, rows)
    for p, own in enumerate(rows):
        z = (own < len(k)).nonzero()[:, 0]
        assert torch.equal(largest[p], torch.cat([k[own[z]], k.new_zeros(1, 16)]).max(0).values)
        for c in (slice(0, 4), slice(12, 16)):
            share = ((k[own[z], c] + place[z, c]) @ q[p, c] / 2).softmax(0)
            torch.testing.assert_close(out[p, c], share @ v[own[z], c])
    inputs = [x.requires_grad_() for x in (q, k, v, place)]
    assert torch.autograd.gradcheck(lambda *x: pillar_attention(*x, rows, 4), inputs, fast_mode=True)
    with pytest.raises(ValueError, match=r"place must be .* \[5, C\]"):
        pillar_attention(q, k, v, place[:4], rows, 4)
    with pytest.raises(NotImplementedError, match="needs CUDA tensors"):
        pillar_max(k, rows, backend="triton")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_opcheck_pillars(device: str) -> None:
    (q, k, v, place), rows = pillar_problem(torch.float32, device)
    torch.library.opcheck(torch.ops.zoo.sparse_pillar_max, (k, rows))
    torch.library.opcheck(torch.ops.zoo.sparse_pillar_attention, (q, k, v, place, rows, 4))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("Z", "C", "heads"), [(8, 128, 8), (10, 128, 8), (5, 16, 1), (2, 16, 8)])
@torch.no_grad()
def test_pillar_kernels_are_as_exact_as_torch(Z: int, C: int, heads: int, dtype: torch.dtype) -> None:
    inputs, rows = pillar_problem(dtype, "cuda", Z, C)
    exact = pillar_attention(*(x.double() for x in inputs), rows, heads, backend="reference")
    plain, actual = (pillar_attention(*inputs, rows, heads, backend=name) for name in ("reference", "triton"))
    error, allowed = ((x.double() - exact).abs().max() for x in (actual, plain))
    assert error <= 2 * allowed + 1e-5 * exact.abs().max()
    a, b = (pillar_max(inputs[1], rows, backend=name) for name in ("triton", "reference"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_opcheck_sites(device: str) -> None:
    sites, _ = sort_sites(make_voxels(device=device), (4, 3))
    size = (3, list(SHAPE), [4, 3])
    torch.library.opcheck(torch.ops.zoo.sparse_numbers, (sites.coords, *size))
    torch.library.opcheck(torch.ops.zoo.sparse_pillars, (sites.keys, sites.coords, *size, 100))
    coarse = ([3, 3, 3], [2, 2, 2], [1, 1, 1], 3, [(n + 1) // 2 for n in SHAPE], [4, 3])
    torch.library.opcheck(torch.ops.zoo.sparse_coarser, (sites.coords, *coarse, 100))


@gpu
@pytest.mark.parametrize("capacity", [1, 300, 20000])
@pytest.mark.parametrize("name", STRIDED)
def test_sites_on_a_gpu_are_the_definition(name: str, capacity: int) -> None:
    for voxels in (make_voxels(), make_voxels(padding=40)):
        found = []
        for device in ("cpu", "cuda"):
            num = None if voxels.num is None else voxels.num.to(device)
            sites, _ = sort_sites(voxels._replace(coords=voxels.coords.to(device), num=num), (4, 3))
            coarse, _ = downsample(sites, *STRIDED[name], (2, 3), capacity)
            pillars = find_pillars(sites, capacity)
            found.append([sites.keys, coarse.keys, coarse.coords, coarse.num, *pillars.voxels[:2], pillars.rows])
        assert all(torch.equal(a, b.cpu()) for a, b in zip(*found, strict=True))


@gpu
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 13, 1), (5, 5, 3)], ids=str)
def test_tiles_on_a_gpu_are_the_definition(kernel: tuple[int, int, int]) -> None:
    for padding in (0, 4000):
        table = torch.randint(-3, 3, (torch.Size(kernel).numel(), 5000), dtype=torch.int32, device="cuda")
        table[:, 5000 - padding :] = -1
        assert torch.equal(make_tiles(table, kernel), build_tiles(table, kernel))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compile_full_graph_from_voxels_on(device: str) -> None:
    def function(x: Tensor, weight: Tensor, coords: Tensor, num: Tensor) -> Tensor:
        sites, order = sort_sites(Voxels(coords, num, 3, SHAPE), (4, 3))
        x = sparse_conv(x[order], weight, None, same_neighbours(sites, (3, 3, 3)))
        out, neighbours = downsample(sites, *STRIDED["all"], (4, 3), 100)
        x = sparse_conv(x, weight, None, neighbours)
        pillars = find_pillars(out, 60)
        return x[pillars.rows.clamp(max=99)].sum(1)

    voxels = make_voxels(padding=5, device=device)
    x, weight = torch.randn(135, 8, device=device), torch.randn(8, 3, 3, 3, 8, device=device) / 10
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = function(x, weight, voxels.coords, voxels.num)
    torch.testing.assert_close(compiled(x, weight, voxels.coords, voxels.num), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    (x, weight, bias), neighbours = conv_problem("same", torch.float32, device, (8, 8))
    weight.requires_grad_()
    with torch.autocast(device, dtype=dtype):
        out = sparse_conv(x.to(dtype), weight, bias, neighbours)
    assert out.dtype == dtype and torch.autograd.grad(out.float().sum(), weight)[0].dtype == torch.float32


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    (x, weight, bias), neighbours = conv_problem("same", torch.float32, "cpu", (8, 16))
    tensors = [y.to("meta") for y in (x, weight.flatten(1, 3), bias, *neighbours[1:5])]
    with FlopCounterMode(display=False) as counter:
        torch.ops.zoo.sparse_conv(*tensors, True)
    assert counter.get_total_flops() == 2 * 397 * 27 * 8 * 16


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(64, 128), (128, 128), (24, 40), (16, 160)], ids=str)
@pytest.mark.parametrize("name", ["same", *STRIDED])
def test_kernel_is_as_exact_as_torch(name: str, channels: tuple, dtype: torch.dtype) -> None:
    inputs, neighbours = conv_problem(name, dtype, "cuda", channels)
    grad = torch.randn(neighbours.table.shape[1], channels[1], device="cuda").to(dtype)
    assert_as_exact_as_torch(
        lambda *x: sparse_conv(*x, neighbours, backend="triton"),
        lambda *x: sparse_conv(*x, neighbours, backend="reference"),
        inputs, grad, ["x", "weight", "bias"],
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [32, 12])
def test_depthwise_kernel_is_as_exact_as_torch(D: int, dtype: torch.dtype) -> None:
    inputs, table = depthwise_problem(dtype, "cuda", D)
    assert_as_exact_as_torch(
        lambda x, *w: sparse_depthwise_conv(x, w, table, residual=True, backend="triton"),
        lambda x, *w: sparse_depthwise_conv(x, w, table, residual=True, backend="reference"),
        inputs, torch.randn_like(inputs[0]), ["x", *map(str, BRANCHES)],
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("name", ["same", *STRIDED])
def test_neighbours_on_a_gpu_equal_the_reference(name: str) -> None:
    tables = [conv_problem(name, torch.float32, device, (8, 8))[1] for device in ("cpu", "cuda")]
    assert torch.equal(tables[0].table, tables[1].table.cpu())
    assert torch.equal(tables[0].transposed, tables[1].transposed.cpu())


@gpu
@pytest.mark.parametrize("name", ["same", "all"])
def test_kernels_are_deterministic(name: str) -> None:
    inputs, neighbours = conv_problem(name, torch.bfloat16, "cuda", (64, 128))
    grad = torch.randn(neighbours.table.shape[1], 128, device="cuda").bfloat16()
    runs = [with_gradients(lambda *x: sparse_conv(*x, neighbours), inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
def test_one_cuda_graph_serves_other_sites() -> None:
    """Sites, tables and convolutions of other voxels by replay: nothing waits for the device or depends on the host."""
    weight = torch.randn(32, 3, 3, 3, 32, device="cuda", dtype=torch.float16) / 30
    coords, x = torch.zeros(200, 4, dtype=torch.int32, device="cuda"), torch.randn(200, 32, device="cuda").half()

    def function() -> tuple[Tensor, Tensor]:
        sites, order = sort_sites(Voxels(coords, (coords[:, 0] < 3).sum(), 3, SHAPE), (4, 3))
        y = sparse_conv(x[order], weight, None, same_neighbours(sites, (3, 3, 3)))
        out, neighbours = downsample(sites, *STRIDED["all"], (4, 3), 150)
        return sparse_conv(y, weight, None, neighbours), find_pillars(out, 100).rows

    coords.copy_(make_voxels((30, 20, 10), 140, device="cuda").coords)
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    coords.copy_(make_voxels((90, 0, 40), 70, device="cuda", seed=5).coords)
    graph.replay()
    torch.testing.assert_close(captured, function())


@gpu
def test_kernel_gathers_nothing_in_memory() -> None:
    voxels = make_voxels((6000,), shape=(8, 100, 100), device="cuda")
    neighbours = same_neighbours(sort_sites(voxels)[0], (3, 3, 3))
    x, weight = torch.randn(6000, 128, device="cuda"), torch.randn(128, 3, 3, 3, 128, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    sparse_conv(x, weight, None, neighbours)
    assert torch.cuda.max_memory_allocated() - start < 1.2 * x.numel() * 4
