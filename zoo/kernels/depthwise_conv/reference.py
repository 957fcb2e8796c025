"""Depth-wise convolution in plain PyTorch: the definition, the CPU path and the test oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Stride 1, zero padding k // 2, on a map [B, H, W, C]; see `op.depthwise_conv2d`."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 1)  # [B, H, W, C]
    return y if residual is None else residual + y


def depthwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the convolution with respect to x, weight and bias, for use inside a registered op."""
    pad = weight.shape[-1] // 2
    grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    dx, dw, db = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], [pad, pad], [1, 1], False, [0, 0], weight.shape[0], [True] * 3
    )
    return dx.permute(0, 2, 3, 1), dw, db
