"""Convolutions on bird's-eye-view maps: the SECOND backbone with residuals, and a pyramid neck.

Sources: SECOND (Yan, Mao, Li, Sensors 2018) and its residual variant in FlatFormer, arXiv:2301.08739. Parameters have
the names of the official implementation; `model.to(memory_format=torch.channels_last)` is fastest on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _norm(channels: int, device=None, dtype=None) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01, device=device, dtype=dtype)


class ResidualUnit(nn.Sequential):
    """3x3 convolution, batch norm, ReLU, added to the input where the shape stays and `residual` is set."""

    def __init__(self, in_channels: int, channels: int, stride: int, residual: bool, device=None, dtype=None) -> None:
        conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False, device=device, dtype=dtype)
        super().__init__(conv, _norm(channels, device, dtype), nn.ReLU())
        self.residual = residual and stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]"""
        out = super().forward(x)
        return x + out if self.residual else out


class SECOND(nn.Module):
    """Stages of 3x3 convolutions, each on a coarser map.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of each stage.
        layer_nums: Convolutions of each stage after its first.
        layer_strides: Stride of each stage's first convolution.
        residual: Add the input of each convolution that keeps its shape.
    """

    def __init__(
        self,
        in_channels: int = 128,
        out_channels: Sequence[int] = (64, 128),
        layer_nums: Sequence[int] = (3, 3),
        layer_strides: Sequence[int] = (1, 2),
        residual: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for channels, layers, stride in zip(out_channels, layer_nums, layer_strides, strict=True):
            units = [ResidualUnit(in_channels, channels, stride, residual, device, dtype)]
            units += [ResidualUnit(channels, channels, 1, residual, device, dtype) for _ in range(layers)]
            self.blocks.append(nn.Sequential(*units))
            in_channels = channels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> a map of each stage."""
        stages = []
        for block in self.blocks:
            x = block(x)
            stages.append(x)
        return stages


class SECONDFPN(nn.Module):
    """Bring maps of several strides to one size by transposed convolutions and concatenate them.

    Args:
        in_channels: Channels of each map.
        out_channels: Channels of each after its convolution.
        upsample_strides: Kernel size and stride of each convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 128),
        out_channels: Sequence[int] = (128, 128),
        upsample_strides: Sequence[int] = (1, 2),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.deblocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(c, out, s, s, bias=False, **dd), _norm(out, **dd), nn.ReLU())
            for c, out, s in zip(in_channels, out_channels, upsample_strides, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, H, W] of several strides -> [B, sum(out_channels), H, W].

        Raises:
            ValueError: The enlarged maps differ in size: H and W must divide by the total stride.
        """
        outs = [block(x) for block, x in zip(self.deblocks, maps, strict=True)]
        sizes = {tuple(x.shape[2:]) for x in outs}
        if len(sizes) > 1:
            raise ValueError(f"maps must have one size after enlargement, got {sorted(sizes)}; pad the finest one.")
        return torch.cat(outs, 1)
