"""The op `scatter_linear_attention`: its reference, kernels on a GPU, and life under torch's transformations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import scatter_linear_attention
from zoo.kernels.scatter_linear import reference
from zoo.kernels.scatter_linear.op import can_run

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
NAMES = ["q", "k", "v"]

# (rows of each window, rows behind the last window, heads, channels of a head, whether rows are permuted)
PROBLEMS = {
    "golden": ([1, 33, 70, 5, 64, 150, 32, 2], 0, 4, 32, False),
    "permuted": ([1, 33, 70, 5, 64, 150, 32, 2], 9, 4, 32, True),
    "empty_windows": ([0, 0, 17, 0, 64, 1, 0], 30, 2, 16, True),
    "no_windows": ([], 40, 2, 16, False),
    "narrow": ([13, 40, 2], 3, 3, 12, False),
    "wide": ([13, 100, 2], 3, 1, 64, True),
    "one_row": ([1], 0, 1, 16, False),
    # Longer than the kernels keep in one program, beginning and ending anywhere.
    "long": ([3, 1400, 20, 515, 512, 513, 700], 800, 4, 32, False),
    "long_permuted": ([600, 0, 2100], 1, 2, 32, True),
    "sweep": ([1 + 37 * i % 361 for i in range(130)], 100, 4, 32, False),
}


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor | None]]:
    """Views of a packed projection, an output gradient, offsets and the order of the rows."""
    counts, behind, M, D, permuted = PROBLEMS[name]
    rows = sum(counts) + behind
    # The same numbers on every device.
    generator = torch.Generator().manual_seed(2)
    qkv, grad = (torch.randn(rows, n, M, D, generator=generator).to(device, dtype) for n in (3, 1))
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    order = torch.randperm(rows, generator=generator).to(device) if permuted else None
    return list(qkv.unbind(1)), grad[:, 0], (offsets, order)


def by_windows(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, relu: bool) -> Tensor:
    """The definition, window by window."""
    out = torch.zeros_like(q)
    order = torch.arange(len(q)) if order is None else order
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = order[start:end]
        queries, keys = (x[rows].relu() if relu else x[rows] for x in (q, k))
        weight = torch.einsum("imd,jmd->mij", queries, keys)
        norm = weight.sum(-1, keepdim=True) + 1e-6
        out[rows] = torch.einsum("mij,jmd->imd", weight / norm, v[rows])
    return out


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", ["golden", "permuted", "empty_windows", "no_windows"])
def test_reference_is_the_definition(name: str, relu: bool) -> None:
    inputs, _, index = make(name, torch.float64, "cpu")
    inputs = inputs if relu else [x.abs() for x in inputs]
    actual = scatter_linear_attention(*inputs, *index, relu=relu)
    torch.testing.assert_close(actual, by_windows(*inputs, *index, relu))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", ["permuted", "empty_windows", "no_windows"])
def test_written_out_gradients_equal_autograd(name: str, relu: bool) -> None:
    inputs, grad, index = make(name, torch.float64, "cpu")
    inputs = inputs if relu else [x.abs() + 0.1 for x in inputs]
    _, *expected = with_gradients(lambda *x: reference.scatter_linear(*x, *index, 1e-6, relu), inputs, grad)
    torch.testing.assert_close(
        list(reference.scatter_linear_backward(grad, *inputs, *index, 1e-6, relu)), expected, rtol=1e-6, atol=1e-6
    )


def test_reference_gradcheck() -> None:
    torch.manual_seed(0)
    # Away from zero, where relu has no derivative, and with a positive channel in each query.
    inputs = [(torch.rand(7, 2, 3, dtype=torch.float64) + 0.1).requires_grad_() for _ in range(3)]
    offsets, order = torch.tensor([0, 2, 2, 6]), torch.randperm(7)
    assert torch.autograd.gradcheck(lambda *x: scatter_linear_attention(*x, offsets, order), inputs)


def test_queries_without_a_positive_channel_give_zero() -> None:
    q, k, v = -torch.rand(5, 1, 4).half(), torch.rand(5, 1, 4).half(), torch.rand(5, 1, 4).half()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = scatter_linear_attention(q, k, v, torch.tensor([0, 5]))
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_rows_of_a_window_see_no_other_window() -> None:
    inputs, _, (offsets, _) = make("golden", torch.float32, "cpu")
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[34:104] += 1  # the third window
    a, b = (scatter_linear_attention(*x, offsets) for x in (inputs, changed))
    same = (a == b).flatten(1).all(1)
    assert same[:34].all() and same[104:].all() and not same[34:104].any()


def test_no_rows() -> None:
    q = torch.randn(0, 4, 32)
    assert scatter_linear_attention(q, q, q, torch.zeros(1, dtype=torch.int32)).shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(6, 8)), r"must be \[V, M, D\]"),
        (dict(v=torch.randn(6, 2, 3)), r"of one shape, got \(6, 2, 4\), \(6, 2, 4\) and \(6, 2, 3\)"),
        (dict(k=torch.randn(6, 2, 4).double()), "need one dtype"),
        (dict(offsets=torch.zeros(3)), "offsets must be a vector of int32 or int64, .* torch.float32"),
        (dict(offsets=torch.zeros(0, dtype=torch.int32)), "offsets must hold 0"),
        (dict(order=torch.arange(5)), "each of the 6 rows once, got 5"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    args = dict(zip("qkv", torch.randn(3, 6, 2, 4), strict=True), offsets=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=message):
        scatter_linear_attention(**{**args, **change})


def test_explicit_triton_explains_its_refusal() -> None:
    inputs, _, index = make("narrow", torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        scatter_linear_attention(*inputs, *index, backend="triton")


def test_limits_of_the_kernels_are_explained() -> None:
    class OnGpu:
        is_cuda, device, dtype, shape = True, "cuda", torch.float32, torch.Size((5, 1, 65))

    assert not can_run(OnGpu, OnGpu, OnGpu)
    with pytest.raises(NotImplementedError, match="head dimension of 64, got 65"):
        can_run(OnGpu, OnGpu, OnGpu, raise_error=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("name", ["narrow", "empty_windows"])
def test_opcheck(name: str, device: str) -> None:
    inputs, _, index = make(name, torch.float32, device)
    inputs = [x.contiguous().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.zoo.scatter_linear, (*inputs, *index, 1e-6, True))


class Layer(nn.Module):
    def forward(self, qkv: Tensor, offsets: Tensor) -> Tensor:
        return scatter_linear_attention(*qkv.unflatten(1, (3, 2, 16)).unbind(1), offsets)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compile_full_graph(device: str) -> None:
    x, offsets = torch.randn(40, 96, device=device), torch.tensor([0, 7, 31, 40], device=device)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    grad = torch.randn(40, 2, 16, device=device)
    pairs = [with_gradients(lambda x, f=f: f(x, offsets), [x], grad) for f in (compiled, Layer())]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_export(device: str) -> None:
    def inputs(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 96, device=device), torch.tensor([0, 7, 7, rows - 2], device=device)

    shapes = ({0: torch.export.Dim("rows", min=2, max=4096)}, None)
    program = torch.export.export(Layer(), inputs(40), dynamic_shapes=shapes)
    more = inputs(23)
    torch.testing.assert_close(program.module()(*more), Layer()(*more))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    inputs, _, index = make("narrow", torch.float32, device)
    q, k, v = (x.requires_grad_() for x in inputs)
    with torch.autocast(device, dtype=dtype):
        out = scatter_linear_attention(q.to(dtype), k, v, *index)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, _, (offsets, _) = make("golden", torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        torch.ops.zoo.scatter_linear(*(x.to("meta") for x in inputs), offsets.to("meta"), None, 1e-6, True)
    assert counter.get_total_flops() == 2 * 2 * 357 * 4 * 32 * 32


@gpu
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype, relu: bool) -> None:
    inputs, grad, index = make(name, dtype, "cuda")
    inputs = inputs if relu else [x.abs() for x in inputs]
    assert_as_exact_as_torch(
        lambda *x: scatter_linear_attention(*x, *index, relu=relu, backend="triton"),
        lambda *x: scatter_linear_attention(*x, *index, relu=relu, backend="reference"),
        inputs,
        grad,
        NAMES,
    )


@gpu
@pytest.mark.parametrize("name", ["sweep", "long", "long_permuted"])
def test_kernels_are_deterministic(name: str) -> None:
    inputs, grad, index = make(name, torch.bfloat16, "cuda")
    runs = [with_gradients(lambda *x: scatter_linear_attention(*x, *index), inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
def test_kernel_runs_in_a_cuda_graph_with_other_windows() -> None:
    (q, k, v), _, (offsets, _) = make("sweep", torch.float16, "cuda")
    scatter_linear_attention(q, k, v, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scatter_linear_attention(q, k, v, offsets)
    offsets.copy_(torch.linspace(0, len(q), len(offsets), device="cuda").int())
    graph.replay()
    torch.testing.assert_close(out, scatter_linear_attention(q, k, v, offsets))


@gpu
def test_kernel_copies_nothing() -> None:
    qkv = torch.randn(20000, 3, 4, 32, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(0, 20001, 50, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    out = scatter_linear_attention(*qkv.unbind(1), offsets)
    # The output, and the sums of parts of windows, should they be long.
    assert torch.cuda.max_memory_allocated() - start < 1.5 * out.numel() * out.element_size()
