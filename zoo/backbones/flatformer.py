"""FlatFormer: a transformer over pillars of a LiDAR scan, with attention in groups of equal size.

Paper: FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer, Zhijian Liu, Xinyu Yang, Haotian
Tang, Shang Yang, Song Han, CVPR 2023, arXiv:2301.08739.

Pillars are sorted by window, once in each of four orders, and cut into groups of equal size: the work is as balanced
as in a dense transformer, whatever the density of points. Parameters have the names of the official implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.point_layers import scatter_to_map
from zoo.kernels.flat_window import ORDERS, Flattening, flat_window_attention, flatten_windows
from zoo.kernels.voxelize import Voxels

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


def sine_table(size: int, channels: int, temperature: float, normalize: bool) -> Tensor:
    """Sines (even channels) and cosines (odd channels) of cells 0 ... size - 1, float32 [size, channels]."""
    channel = torch.arange(channels, dtype=torch.float32)
    frequency = temperature ** (2 * (channel // 2) / channels)
    # The published factor of the unused normalisation has four decimals.
    cell = torch.arange(size, dtype=torch.float32) * (2 * 3.1415 / size if normalize else 1.0)
    angle = cell[:, None] / frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


class PositionEmbedding(nn.Module):
    """Sine and cosine embedding of a pillar's cell, x in the first half of the channels and y in the second.

    Args:
        channels: Width; what does not divide by 4 is filled with zeros.
        cells: Cells along x and y.
        temperature: Of the frequencies.
        normalize: Let a period span the map.
    """

    def __init__(
        self, channels: int, cells: Sequence[int], temperature: float = 10000, normalize: bool = False
    ) -> None:
        super().__init__()
        self.channels = channels
        for name, size in zip("xy", cells, strict=False):
            self.register_buffer(name, sine_table(size, channels // 4 * 2, temperature, normalize), persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """int32 [V, 4] (sample, z, y, x) -> [V, C]"""
        pe = torch.cat([F.embedding(coords[:, 3], self.x), F.embedding(coords[:, 2], self.y)], 1)
        return F.pad(pe, (0, self.channels - pe.shape[1])) if pe.shape[1] < self.channels else pe


class FlattenedWindowAttention(nn.Module):
    """Multi-head attention of pillars within the groups of one order; positions go to queries and keys.

    Args:
        dim: Channels.
        num_heads: Heads, which divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Holds and initialises the parameters under their official names; the products are done below.
        self.attn = nn.MultiheadAttention(dim, num_heads, device=device, dtype=dtype)

    def forward(self, x: Tensor, pe: Tensor, flattening: Flattening, which: int) -> Tensor:
        """x, pe [V, C] -> [V, C]"""
        weight, bias, C = self.attn.in_proj_weight, self.attn.in_proj_bias, x.shape[1]
        qk = F.linear(x + pe, weight[: 2 * C], bias[: 2 * C])
        v = F.linear(x, weight[2 * C :], bias[2 * C :])
        q, k = qk.unflatten(1, (2, self.num_heads, -1)).unbind(1)  # [V, M, D]
        out = flat_window_attention(q, k, v.unflatten(1, (self.num_heads, -1)), flattening, which)
        return self.attn.out_proj(out.flatten(1))


class FlatFormerLayer(nn.Module):
    """Attention and a perceptron of twice the width, each followed by a residual sum and layer norm.

    Args:
        dim: Channels.
        num_heads: Heads.
        activation: "gelu" or "relu".
    """

    def __init__(self, dim: int, num_heads: int, activation: str = "gelu", device=None, dtype=None) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}.")
        dd = dict(device=device, dtype=dtype)
        self.attn = FlattenedWindowAttention(dim, num_heads, **dd)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim, **dd), nn.Linear(2 * dim, dim, **dd)
        self.norm1, self.norm2 = nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor, pe: Tensor, flattening: Flattening, which: int) -> Tensor:
        """x, pe [V, C] -> [V, C]"""
        x = self.norm1(x + self.attn(x, pe, flattening, which))
        return self.norm2(x + self.fc2(self.act(self.fc1(x))))


class FlatFormerBlock(nn.Module):
    """Four layers, one for each order of the pillars."""

    def __init__(self, dim: int, num_heads: int, activation: str = "gelu", device=None, dtype=None) -> None:
        super().__init__()
        self.block = nn.ModuleList(FlatFormerLayer(dim, num_heads, activation, device, dtype) for _ in ORDERS)

    def forward(self, x: Tensor, pe: Tensor, flattening: Flattening) -> Tensor:
        """x, pe [V, C] -> [V, C]"""
        for which, layer in enumerate(self.block):
            x = layer(x, pe, flattening, which)
        return x


class FlatFormer(nn.Module):
    """Transformer over pillars, then a dense bird's-eye-view map.

    Nothing here waits for the device, and with padded voxels all shapes are fixed: the whole module can be captured
    in a CUDA graph (`zoo.backbones.padded_graphs`).

    Args:
        in_channels: Width of a pillar's features.
        num_heads: Heads of attention.
        num_blocks: Blocks of four layers.
        activation: "gelu" or "relu".
        window_shape: Cells of a window along x, y (and z, which is ignored).
        sparse_shape: Cells of the grid along x, y (and z).
        output_shape: Cells of the map along y, x; the grid's by default.
        pos_temperature, normalize_pos: Of the position embedding.
        group_size: Pillars of a group.
    """

    def __init__(
        self,
        in_channels: int = 128,
        num_heads: int = 8,
        num_blocks: int = 2,
        activation: str = "gelu",
        window_shape: Sequence[int] = (9, 9, 1),
        sparse_shape: Sequence[int] = (468, 468, 1),
        output_shape: Sequence[int] | None = None,
        pos_temperature: float = 10000,
        normalize_pos: bool = False,
        group_size: int = 69,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if in_channels % num_heads:
            raise ValueError(f"num_heads must divide in_channels, got {num_heads} and {in_channels}.")
        self.cells = (sparse_shape[0], sparse_shape[1])
        if output_shape is not None and tuple(output_shape) != self.cells[::-1]:
            raise ValueError(f"output_shape must be the grid's {self.cells[::-1]}, got {tuple(output_shape)}.")
        self.window, self.group_size = tuple(window_shape[:2]), group_size
        self.pos_embed = PositionEmbedding(in_channels, self.cells, pos_temperature, normalize_pos)
        self.block_list = nn.ModuleList(
            FlatFormerBlock(in_channels, num_heads, activation, device, dtype) for _ in range(num_blocks)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier-uniform matrices, as in the official training."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def encode(self, features: Tensor, voxels: Voxels) -> Tensor:
        """Features of pillars after all blocks.

        Args:
            features: [V, C].
            voxels: Pillars sorted by sample, on a grid of `sparse_shape`.

        Returns:
            [V, C] in the rows of `features`; rows of padding are arbitrary.

        Raises:
            ValueError: The voxels lie on another grid.
        """
        if voxels.shape[:0:-1] != self.cells:
            raise ValueError(f"voxels must lie on a grid of x, y = {self.cells}, got {voxels.shape[:0:-1]}.")
        flattening = flatten_windows(voxels, self.window, self.group_size)
        pe = self.pos_embed(voxels.coords).to(features.dtype)
        for block in self.block_list:
            features = block(features, pe, flattening)
        return features

    def forward(self, features: Tensor, voxels: Voxels) -> Tensor:
        """[V, C] -> [B, C, Y, X], channels-last in memory; empty cells are zero."""
        return scatter_to_map(self.encode(features, voxels), voxels)
