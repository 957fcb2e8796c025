"""The op `depthwise_conv2d`: its reference, its kernels on a GPU, and its life under torch's transformations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import depthwise_conv2d
from zoo.kernels.depthwise_conv import reference

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu

# (B, H, W, C, kernel)
PROBLEMS = [(2, 56, 56, 64, 5), (1, 7, 6, 96, 3), (3, 13, 11, 40, 7), (2, 14, 14, 256, 5), (1, 1, 1, 8, 3)]


def make(problem: tuple, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    B, H, W, C, k = problem
    packed = torch.randn(B, H, W, 2 * C, device=device).to(dtype)
    x = packed[..., C:]
    weight, bias = torch.randn(C, 1, k, k, device=device) / k, torch.randn(C, device=device)
    return [x, weight.to(dtype), bias.to(dtype), torch.randn_like(x.contiguous())], torch.randn_like(x.contiguous())


def test_reference_gradcheck() -> None:
    x, weight, bias = torch.randn(1, 4, 3, 2), torch.randn(2, 1, 3, 3), torch.randn(2)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias, torch.randn_like(x))]
    assert torch.autograd.gradcheck(reference.depthwise_conv2d, inputs)


def test_reference_is_a_grouped_convolution() -> None:
    conv = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    x = torch.randn(2, 7, 9, 6)
    expected = x + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(depthwise_conv2d(x, conv.weight, conv.bias, x), expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 4, 8), (8, 1, 3, 3)), "x must be a map"),
        (((1, 4, 4, 8), (8, 1, 4, 4)), "k odd"),
        (((1, 4, 4, 8), (4, 1, 3, 3)), r"weight must be \[8, 1, k, k\]"),
        (((1, 4, 4, 8), (8, 1, 3, 3), (1, 4, 3, 8)), "residual must have the shape of x"),
    ],
)
def test_wrong_arguments_are_named(shapes: tuple, message: str) -> None:
    x, weight, *residual = (torch.randn(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(x, weight, residual=residual[0] if residual else None)


def test_explicit_triton_explains_its_refusal() -> None:
    with pytest.raises(NotImplementedError, match="needs CUDA tensors"):
        depthwise_conv2d(torch.randn(1, 4, 4, 8), torch.randn(8, 1, 3, 3), backend="triton")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("add_input", [False, True])
def test_opcheck(device: str, add_input: bool) -> None:
    x, weight, bias = (
        torch.randn(s, device=device, requires_grad=True) for s in ((2, 5, 6, 16), (16, 1, 3, 3), (16,))
    )  # fmt: skip
    residual = None if add_input else torch.randn(2, 5, 6, 16, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d, (x, weight, bias, residual, add_input))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, None, x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compile_and_export(device: str) -> None:
    layer, x = Layer().to(device), torch.randn(2, 5, 6, 16, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(x)
    for a, b in zip(with_gradients(compiled, [x], grad), with_gradients(layer, [x], grad), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 4, 4, 16, device="cuda"), torch.randn(16, 1, 3, 3, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        assert depthwise_conv2d(x, weight, None, x).dtype == dtype


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_is_as_exact_as_torch(problem: tuple, dtype: torch.dtype) -> None:
    inputs, grad = make(problem, dtype, "cuda")
    names = ["x", "weight", "bias", "residual"]
    assert_as_exact_as_torch(
        lambda *x: depthwise_conv2d(*x, backend="triton"), reference.depthwise_conv2d, inputs, grad, names
    )


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_adds_its_own_input(dtype: torch.dtype) -> None:
    (x, weight, bias, _), grad = make(PROBLEMS[0], dtype, "cuda")
    assert_as_exact_as_torch(
        lambda x, w, b: depthwise_conv2d(x, w, b, x, backend="triton"),
        lambda x, w, b: reference.depthwise_conv2d(x, w, b, x),
        [x, weight, bias], grad, ["x", "weight", "bias"],
    )  # fmt: skip


@gpu
def test_backward_is_deterministic() -> None:
    inputs, grad = make(PROBLEMS[0], torch.bfloat16, "cuda")
    runs = [with_gradients(depthwise_conv2d, inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
