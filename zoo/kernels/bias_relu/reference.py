"""Bias, sum and ReLU in plain PyTorch: the definition, the CPU path and the test oracle."""

from __future__ import annotations

from torch import Tensor


def bias_relu_(x: Tensor, bias: Tensor, added: Tensor | None, after: bool) -> Tensor:
    """relu(x + bias [+ added]) [+ added], in place; see `op.bias_relu_`."""
    x.add_(bias)
    if added is not None and not after:
        x.add_(added)
    x.relu_()
    return x.add_(added) if added is not None and after else x
