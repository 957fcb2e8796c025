"""The ops `flatten_windows` and `flat_window_attention`: references, kernels on a GPU, torch's transformations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import Voxels, flat_window_attention, flatten_windows
from zoo.kernels.flat_window import ORDERS, Flattening, reference
from zoo.kernels.flat_window.op import can_run
from zoo.kernels.flat_window.triton import key_tiles

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
NAMES = ["q", "k", "v"]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]

# (pillars of each sample, side of the grid, rows of padding, window, group, heads, head dim)
PROBLEMS = {
    "waymo": ([1900, 1300], 468, 0, (13, 13), 144, 8, 16),
    "default": ([700], 96, 0, (9, 9), 69, 8, 16),
    "short": ([555, 59, 0, 480], 128, 0, (13, 13), 144, 2, 16),
    "padded": ([300, 0, 41], 40, 107, (5, 7), 48, 2, 16),
    "all_short": ([3, 1, 7], 40, 0, (5, 7), 16, 1, 16),
    "odd_head": ([130, 90], 40, 9, (6, 4), 33, 3, 20),
    "wide_head": ([200], 40, 0, (6, 4), 60, 1, 64),
    "large_group": ([900, 250], 60, 0, (13, 13), 256, 2, 16),
    "full_groups": ([64, 32], 20, 0, (4, 4), 32, 2, 16),
    "single_pillars": ([9], 20, 0, (4, 4), 1, 1, 8),
}


def pillars(counts: list[int], side: int, padding: int = 0, device: str = "cpu", seed: int = 0) -> Voxels:
    """Random occupied cells of a square grid, sorted by (sample, y, x)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for b, n in enumerate(counts):
        cell = torch.randperm(side * side, generator=generator)[:n].sort().values
        rows.append(torch.stack([torch.full_like(cell, b), torch.zeros_like(cell), cell // side, cell % side], 1))
    rows.append(torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4))
    num = torch.tensor(sum(counts), device=device) if padding else None
    return Voxels(torch.cat(rows).int().to(device), num, len(counts), (1, side, side))


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Flattening]:
    """q, k, v as slices of packed projections, an output gradient, the flattening."""
    counts, side, padding, window, group, heads, D = PROBLEMS[name]
    voxels = pillars(counts, side, padding, device)
    # The same numbers on every device.
    generator = torch.Generator().manual_seed(5)
    packed = torch.randn(len(voxels.coords), 4, heads, D, generator=generator).to(device, dtype)
    return [*packed[:, :3].unbind(1)], packed[:, 3], flatten_windows(voxels, window, group)


def snake(cells: list[tuple[int, int]], window: tuple[int, int]) -> list[int]:
    """Order "x" by its description: sort by row of windows, window, column, cell, all odd ones backwards."""

    def sign(a: int) -> int:
        return 1 if a % 2 == 0 else -1

    def key(i: int) -> tuple:
        x, y = cells[i]
        (x1, x2), (y1, y2) = divmod(x, window[0]), divmod(y, window[1])
        return y1, sign(y1) * x1, sign(y1) * x2, sign(y1) * sign(x2) * y2

    return sorted(range(len(cells)), key=key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("side", "window"), [(20, (5, 3)), (26, (13, 13)), (7, (9, 4)), (12, (1, 1))])
def test_orders_are_snakes(side: int, window: tuple[int, int], device: str) -> None:
    voxels = pillars([30, 0, 17], side, device=device)
    order = flatten_windows(voxels, window, 16).order
    assert order.dtype == torch.int32
    for name, row in zip(ORDERS, order, strict=True):
        sx, sy = (window[0] // 2, window[1] // 2) if "shift" in name else (0, 0)
        expected, start = [], 0
        for b in (0, 2):
            cells = [(x + sx, y + sy) for s, _, y, x in voxels.coords.tolist() if s == b]
            swapped = [(y, x) for x, y in cells]
            chosen = snake(cells, window) if name[0] == "x" else snake(swapped, window[::-1])
            expected += [start + i for i in chosen]
            start += len(cells)
        assert row.tolist() == expected, name


@pytest.mark.parametrize("device", DEVICES)
def test_samples_never_interleave_on_full_grids(device: str) -> None:
    """A batch offset of ten times the grid, as published, is too small for this window on this full grid."""
    voxels = pillars([106 * 106] * 2, 106, device=device)
    order = flatten_windows(voxels, (13, 13), 144).order.long()
    assert (voxels.coords[:, 0][order].diff(dim=1) >= 0).all()
    assert (order.sort(1).values == torch.arange(2 * 106 * 106, device=device)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_groups_of_samples(device: str) -> None:
    groups = flatten_windows(pillars([10, 0, 3, 8], 20, 5, device), (4, 4), 4).groups
    expected = [
        *([0, 4, 0], [4, 8, 4], [8, 10, 6]),  # the last attends to two pillars of the one before
        [10, 13, 10],  # fewer pillars than a group
        *([13, 17, 13], [17, 21, 17]),  # full
        *([21, 25, -1], [25, 26, -1]),  # padding
    ]
    assert groups.dtype == torch.int32 and groups[:8].tolist() == expected
    assert len(groups) == 26 // 4 + 4 + 2 and (groups[8:] == 26).all()


def by_loops(q: Tensor, k: Tensor, v: Tensor, voxels: Voxels, order: Tensor, group: int) -> Tensor:
    """The definition, group by group and pillar by pillar."""
    out, start = torch.zeros_like(v), 0
    for b in range(voxels.batch_size):
        mine = order[start : start + int((voxels.coords[:, 0] == b).sum())].long()
        start += len(mine)
        for begin in range(0, len(mine), group):
            end = min(begin + group, len(mine))
            keys = mine[max(0, end - group) : end] if end - begin < group else mine[begin:end]
            for i in mine[begin:end]:
                for m in range(q.shape[1]):
                    logits = k[keys, m] @ q[i, m] * q.shape[2] ** -0.5
                    out[i, m] = logits.softmax(0) @ v[keys, m]
    return out


@pytest.mark.parametrize("name", ["padded", "all_short", "full_groups"])
@pytest.mark.parametrize("which", range(4))
def test_reference_is_the_definition(name: str, which: int) -> None:
    counts, side, padding, _, group, *_ = PROBLEMS[name]
    inputs, _, flattening = make(name, torch.float64, "cpu")
    expected = by_loops(*inputs, pillars(counts, side, padding), flattening.order[which], group)
    torch.testing.assert_close(flat_window_attention(*inputs, flattening, which), expected)


@pytest.mark.parametrize("name", ["padded", "short", "odd_head"])
def test_written_out_gradients_equal_autograd(name: str) -> None:
    inputs, grad, flattening = make(name, torch.float64, "cpu")
    settings = (flattening.order[1], flattening.groups, flattening.group_size, 0.3)
    _, *expected = with_gradients(lambda *x: reference.flat_window_attention(*x, *settings), inputs, grad)
    actual = reference.flat_window_attention_backward(grad, *inputs, *settings)
    torch.testing.assert_close(list(actual), expected)


def test_reference_gradcheck() -> None:
    flattening = flatten_windows(pillars([7, 2], 5, 2), (3, 2), 3)
    inputs = [torch.randn(11, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: flat_window_attention(*x, flattening, 2), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_changes_nothing(device: str) -> None:
    counts, side, _, window, group, *_ = PROBLEMS["padded"]
    inputs, grad, flattening = make("padded", torch.float32, device)
    exact = flatten_windows(pillars(counts, side, 0, device), window, group)
    n = sum(counts)
    for which in range(4):
        assert torch.equal(flattening.order[which, :n], exact.order[which])
        padded = with_gradients(lambda *x, w=which: flat_window_attention(*x, flattening, w), inputs, grad)
        plain = with_gradients(
            lambda *x, w=which: flat_window_attention(*x, exact, w), [x[:n] for x in inputs], grad[:n]
        )
        for a, b in zip(padded, plain, strict=True):
            torch.testing.assert_close(a[:n], b)
            assert (a[n:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_pillars(device: str) -> None:
    for counts in ([0], []):
        voxels = pillars(counts, 20, device=device)
        flattening = flatten_windows(voxels, (4, 4), 8)
        q = torch.zeros(0, 2, 16, device=device, requires_grad=True)
        out = flat_window_attention(q, q, q, flattening)
        assert out.shape == (0, 2, 16)
        out.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_only_padding(device: str) -> None:
    voxels = pillars([0, 0], 20, 30, device)
    q = torch.randn(30, 2, 16, device=device)
    assert (flat_window_attention(q, q, q, flatten_windows(voxels, (4, 4), 8)) == 0).all()


def test_tiles_of_keys() -> None:
    sizes = {1: (16, 0), 16: (16, 0), 17: (32, 0), 33: (32, 16), 69: (64, 16), 100: (64, 64), 128: (128, 0),
             144: (128, 16), 200: (128, 128), 256: (128, 128)}  # fmt: skip
    for group, tiles in sizes.items():
        chosen = key_tiles(group)
        assert sum(chosen) == sum(tiles) >= group and max(chosen) <= 128, group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.randn(50, 2, 8)), r"must be \[V, M, D\]"),
        (dict(q=torch.randn(50, 32)), r"must be \[V, M, D\]"),
        (dict(v=torch.randn(50, 2, 16).half()), "one dtype"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    x = torch.randn(50, 2, 16)
    flattening = flatten_windows(pillars([50], 20), (4, 4), 16)
    with pytest.raises(ValueError, match=message):
        flat_window_attention(**{**dict(q=x, k=x, v=x, flattening=flattening), **change})


def test_a_flattening_of_other_pillars_is_refused() -> None:
    x, flattening = torch.randn(40, 2, 16), flatten_windows(pillars([50], 20), (4, 4), 16)
    with pytest.raises(ValueError, match=r"int32 \[40\], got torch.int32 \(50,\)"):
        flat_window_attention(x, x, x, flattening)
    with pytest.raises(ValueError, match=r"the table of `flatten_windows`"):
        flat_window_attention(x, x, x, flattening._replace(order=flattening.order[:, :40], groups=flattening.order))


def test_wrong_windows_are_named() -> None:
    voxels = pillars([5], 20)
    with pytest.raises(ValueError, match="must be positive"):
        flatten_windows(voxels, (0, 3), 4)
    with pytest.raises(ValueError, match=r"int32 \[V, 4\], got torch.int64"):
        flatten_windows(voxels._replace(coords=voxels.coords.long()), (3, 3), 4)


def test_explicit_triton_explains_its_refusal() -> None:
    inputs, _, flattening = make("padded", torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        flat_window_attention(*inputs, flattening, backend="triton")


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float16) -> None:
        self.x = torch.empty(shape, device="meta", dtype=dtype)

    is_cuda = True

    def __getattr__(self, name: str):
        return getattr(self.x, name)


@pytest.mark.parametrize(
    ("x", "group", "scale", "message"),
    [
        (_OnGpu(9, 2, 80), 144, 1.0, "head dimension of 64, got 80"),
        (_OnGpu(9, 2, 16), 300, 1.0, "group of 256 pillars, got 300"),
        (_OnGpu(9, 2, 32, dtype=torch.float32), 144, 1.0, "in float32 .* 4096, got 144 times 32"),
        (_OnGpu(9, 2, 16, dtype=torch.float64), 144, 1.0, "got torch.float64"),
        (_OnGpu(9, 2, 16), 144, 0.0, "scale must be positive, got 0.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_limits_of_the_kernels_are_explained(x: _OnGpu, group: int, scale: float, message: str) -> None:
    assert not can_run(x, x, x, group, scale)
    with pytest.raises(NotImplementedError, match=message):
        can_run(x, x, x, group, scale, raise_error=True)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    inputs, _, flattening = make("padded", torch.float32, device)
    settings = (flattening.order[2], flattening.groups, flattening.group_size, 0.3)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.zoo.flat_window_attention, (*leaves, *settings))
    coords = pillars([30, 0, 20], 20, 4, device).coords
    torch.library.opcheck(torch.ops.zoo.flatten_windows, (coords, 3, [20, 20], [5, 4], 16))


class Layer(nn.Module):
    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        flattening = flatten_windows(Voxels(coords, None, 2, (1, 30, 30)), (4, 5), 16)
        q, k, v = x.unflatten(-1, (3, 2, 16)).unbind(1)
        return flat_window_attention(q, k, v, flattening, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_full_graph(device: str) -> None:
    coords, layer = pillars([50, 31], 30, device=device).coords, Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, grad = torch.randn(81, 96, device=device), torch.randn(81, 2, 16, device=device)
    actual = with_gradients(lambda y: compiled(y, coords), [x], grad)
    expected = with_gradients(lambda y: layer(y, coords), [x], grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_export_with_padded_rows(device: str) -> None:
    """A fixed number of rows serves any number of pillars up to it."""
    layer = Layer()
    inputs = torch.randn(150, 96, device=device), pillars([50, 31], 30, 69, device).coords
    program = torch.export.export(layer, inputs)
    more = torch.randn(150, 96, device=device), pillars([3, 117], 30, 30, device).coords
    torch.testing.assert_close(program.module()(*more), layer(*more))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    inputs, _, flattening = make("padded", torch.float32, device)
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast(device, dtype=dtype):
        out = flat_window_attention(*inputs, flattening)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), inputs))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, _, flattening = make("full_groups", torch.float32, "cpu")
    meta = [x.to("meta") for x in (*inputs, flattening.order[0], flattening.groups)]
    with FlopCounterMode(display=False) as counter:
        torch.ops.zoo.flat_window_attention(*meta, 32, 1.0)
    assert counter.get_total_flops() == 4 * 96 * 2 * 16 * 32


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    if name == "wide_head" and dtype == torch.float32:
        pytest.skip("in float32 the kernels take narrower heads")
    inputs, grad, flattening = make(name, dtype, "cuda")
    for which in (0, 3):
        assert_as_exact_as_torch(
            lambda *x, w=which: flat_window_attention(*x, flattening, w, backend="triton"),
            lambda *x, w=which: flat_window_attention(*x, flattening, w, backend="reference"),
            inputs,
            grad,
            NAMES,
        )


@gpu
@pytest.mark.parametrize("name", PROBLEMS)
def test_flattening_on_a_gpu_is_the_reference(name: str) -> None:
    counts, side, padding, window, group, *_ = PROBLEMS[name]
    expected = flatten_windows(pillars(counts, side, padding), window, group)
    actual = flatten_windows(pillars(counts, side, padding, "cuda"), window, group)
    assert torch.equal(actual.order.cpu(), expected.order) and torch.equal(actual.groups.cpu(), expected.groups)


@gpu
def test_kernel_is_deterministic() -> None:
    inputs, grad, flattening = make("short", torch.float16, "cuda")
    runs = [with_gradients(lambda *x: flat_window_attention(*x, flattening), inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
def test_cuda_graph_with_another_number_of_pillars() -> None:
    """One capture serves every batch that fits its padded rows."""
    voxels = pillars([300, 100], 60, 112, "cuda")
    x, coords = torch.randn(512, 3, 2, 16, device="cuda", dtype=torch.float16), voxels.coords.clone()

    def run() -> Tensor:
        return flat_window_attention(*x.unbind(1), flatten_windows(voxels._replace(coords=coords), (13, 13), 144), 1)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    coords.copy_(pillars([17, 350], 60, 145, "cuda", seed=1).coords)
    graph.replay()
    torch.testing.assert_close(out, run())
