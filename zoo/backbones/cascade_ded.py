"""Cascaded dense encoder-decoders on bird's-eye-view maps.

Sources: HEDNet (Zhang et al., NeurIPS 2023, arXiv:2310.20234), as ScatterFormer (arXiv:2401.00912) uses it. Parameters
have the names of the official implementation; `model.to(memory_format=torch.channels_last)` is fastest on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int, device=None, dtype=None) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01, device=device, dtype=dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input; a 1x1 convolution fits that where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False, **dd)
        self.bn1 = _norm(channels, **dd)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False, **dd)
        self.bn2 = _norm(channels, **dd)
        self.downsample_layer = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False, **dd)
            self.downsample_layer = nn.Sequential(conv, _norm(channels, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]"""
        shortcut = x if self.downsample_layer is None else self.downsample_layer(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class DED(nn.Module):
    """Encoder of levels on ever coarser maps and a decoder back to the first level's size, with sums across.

    Args:
        in_channels: Channels of the map.
        channels: Channels of all levels.
        blocks: Blocks of each level besides a first one that changes the shape.
        strides: Stride of each level.
    """

    def __init__(
        self, in_channels: int, channels: int, blocks: Sequence[int], strides: Sequence[int], device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.encoder, self.decoder, self.decoder_norm = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for count, stride in zip(blocks, strides, strict=True):
            changes = stride != 1 or in_channels != channels
            level = [BasicBlock(in_channels, channels, stride, **dd)] if changes else []
            level += [BasicBlock(channels, channels, **dd) for _ in range(count)]
            self.encoder.append(nn.Sequential(*level))
            in_channels = channels
        for stride in reversed(strides[1:]):
            conv = nn.ConvTranspose2d(channels, channels, stride, stride, bias=False, **dd)
            self.decoder.append(nn.Sequential(conv, _norm(channels, **dd)))
            self.decoder_norm.append(_norm(channels, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H, W]"""
        levels = []
        for level in self.encoder:
            x = level(x)
            levels.append(x)
        for conv, norm, skip in zip(self.decoder, self.decoder_norm, reversed(levels[:-1]), strict=True):
            x = norm(F.relu(conv(x)) + skip)
        return x


class CascadeDED(nn.Module):
    """Dense encoder-decoders one after another on a bird's-eye-view map.

    Args:
        input_channels: Channels of the map.
        feature_dim: Channels of the result.
        num_layers: Encoder-decoders.
        num_sbb: Blocks of each level of an encoder, besides the first one of a level that changes the shape.
        down_strides: Stride of each level.
    """

    def __init__(
        self,
        input_channels: int = 128,
        feature_dim: int = 128,
        num_layers: int = 4,
        num_sbb: Sequence[int] = (2, 1, 1),
        down_strides: Sequence[int] = (1, 2, 2),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.stride = 1
        for stride in down_strides:
            self.stride *= stride
        self.layers = nn.ModuleList(
            DED(feature_dim if i else input_channels, feature_dim, num_sbb, down_strides, device, dtype)
            for i in range(num_layers)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming-normal convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H, W].

        Raises:
            ValueError: H or W does not divide by the total stride.
        """
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"height and width must divide by {self.stride}, got a map of shape {tuple(x.shape)}.")
        for layer in self.layers:
            x = layer(x)
        return x
