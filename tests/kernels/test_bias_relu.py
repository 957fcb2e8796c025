"""The op `bias_relu_`: bias, sum and ReLU in one pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.kernels.bias_relu import bias_relu_
from zoo.kernels.bias_relu.op import can_run

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def expected(x: Tensor, bias: Tensor, added: Tensor | None, after: bool) -> Tensor:
    other = 0 if added is None else added.double()
    if after:
        return (x.double() + bias.double()).clamp(min=0) + other
    return (x.double() + bias.double() + other).clamp(min=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("with_sum", "after"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(2, 9, 7, 24), (5, 128), (0, 8), (3000, 1)], ids=str)
def test_values(shape: tuple[int, ...], with_sum: bool, after: bool, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(shape).to(device, dtype), torch.randn(shape[-1]).to(device, dtype)
    added = torch.randn(shape).to(device, dtype) if with_sum else None
    exact = expected(x, bias, added, after)
    out = bias_relu_(x, bias, added, after=after)
    assert out.data_ptr() == x.data_ptr() and out.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_maps_and_rows_of_other_strides(device: str) -> None:
    x = torch.randn(2, 6, 5, 4, device=device).contiguous(memory_format=torch.channels_last)
    bias, added = torch.randn(6, device=device), torch.randn(2, 6, 5, 4, device=device)
    exact = expected(x.movedim(1, -1), bias, added.movedim(1, -1), False)
    bias_relu_(x.permute(0, 2, 3, 1), bias, added.permute(0, 2, 3, 1))
    torch.testing.assert_close(x.movedim(1, -1).double(), exact, rtol=1e-6, atol=1e-6)
    rows = torch.randn(5, 12, device=device)
    exact = expected(rows[:, :6], bias, None, False)
    bias_relu_(rows[:, :6], bias)
    torch.testing.assert_close(rows[:, :6].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_not_hidden(device: str) -> None:
    x = torch.tensor([[float("nan"), 1.0]], device=device)
    assert bias_relu_(x, torch.zeros(2, device=device)).isnan().tolist() == [[True, False]]


def test_wrong_arguments_are_named() -> None:
    x, bias = torch.randn(4, 3), torch.randn(3)
    with pytest.raises(ValueError, match=r"bias \[C\] and added as x, got \(4, 3\), \(2,\)"):
        bias_relu_(x, bias[:2])
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        bias_relu_(x, bias, x[:3])
    with pytest.raises(ValueError, match="one dtype, got torch.float32 and torch.float16"):
        bias_relu_(x, bias.half())
    with pytest.raises(ValueError, match="has no gradients"):
        bias_relu_(x, bias.requires_grad_())
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        bias_relu_(x, bias.detach(), backend="triton")
    assert not can_run(x)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    x, bias = torch.randn(4, 3, device=device), torch.randn(3, device=device)
    torch.library.opcheck(torch.ops.zoo.bias_relu_, (x, bias, torch.randn_like(x), True))
