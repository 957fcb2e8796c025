"""Layers that several families share. Maps are channels-last, [B, H, W, C]."""

from __future__ import annotations

import torch
from timm.layers import use_fused_attn
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.kernels import depthwise_conv2d


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """Depth-wise convolution of a channels-last map, optionally added to a residual in the same pass.

    The parameters are those of ``nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)``.
    """

    def __init__(self, dim: int, kernel_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual [B, H, W, C] -> [B, H, W, C]"""
        return depthwise_conv2d(x, self.weight, self.bias, residual)


class Mlp(nn.Module):
    """Linear, optional 3x3 depth-wise convolution, exact GELU, linear, on a map [B, H, W, C]."""

    def __init__(self, dim: int, hidden_dim: int, dwconv: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv2d(hidden_dim, 3, **dd) if dwconv else None
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x)
        if self.training and torch.compiler.is_compiling():
            # Inductor would keep both sides of the activation, the widest maps of a block, for the backward pass. One
            # can be computed again from the other.
            return self.fc2(checkpoint(self.act, x, use_reentrant=False, preserve_rng_state=False))
        return self.fc2(self.act(x))


def global_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v for [B, M, N, D], fused unless timm's switch for exportable models is on."""
    if use_fused_attn():
        bias = None if bias is None else bias.to(q.dtype)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    logits = (q * scale) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(-1) @ v
