"""ScatterFormer: a transformer over the voxels of a LiDAR scan, with linear attention in windows of any content.

Paper: ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention, Chenhang He, Ruihuang Li, Guowen
Zhang, Lei Zhang, ECCV 2024, arXiv:2401.00912.

Sites of a stage are kept in the order of its windows, so that attention and convolutions read them where they are; the
tables of neighbours and the windows are built once a stage. Parameters have the names of the official implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.point_layers import scatter_to_map
from zoo.kernels.scatter_linear import scatter_linear_attention
from zoo.kernels.sparse_conv import (
    Neighbours,
    Pillars,
    Sites,
    downsample,
    find_pillars,
    pillar_attention,
    pillar_max,
    same_neighbours,
    same_table,
    sort_sites,
    sparse_conv,
    sparse_depthwise_conv,
    window_offsets,
)
from zoo.kernels.voxelize import Voxels

# Arguments of the official models' backbones, and of a small one for a CPU.
CONFIGS = {
    "waymo": dict(win_size=12, grid_size=(480, 480, 32)),
    "nuscenes": dict(win_size=20, grid_size=(360, 360, 40)),
    "nano": dict(
        input_channels=32, feature_dim=64, num_heads=2, win_size=10, grid_size=(200, 200, 24), depth=2, cpe_blocks=1
    ),
}
# Kernel, stride and padding along z, y, x of the two convolutions that make the map coarser.
HALVE_HEIGHT = (3, 1, 1), (2, 1, 1), (0, 0, 0)
HALVE_ALL = (3, 3, 3), (2, 2, 2), (1, 1, 1)


def _norm(channels: int, device=None, dtype=None) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01, device=device, dtype=dtype)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a norm in evaluation mode."""
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.weight, layer.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))


def _fold_after(layer: SparseConv, norm: nn.BatchNorm1d) -> nn.Identity:
    """Let a convolution do what the norm behind it does."""
    scale, shift = _affine(norm)
    bias = shift if layer.bias is None else layer.bias.detach() * scale + shift
    _set(layer, layer.weight.detach() * scale.view(-1, 1, 1, 1, 1), bias)
    return nn.Identity()


def _fold_before(norm: nn.BatchNorm1d, layer: nn.Linear) -> nn.Identity:
    """Let a linear layer do what the norm before it does."""
    (scale, shift), weight = _affine(norm), layer.weight.detach()
    bias = weight @ shift
    _set(layer, weight * scale, bias if layer.bias is None else bias + layer.bias.detach())
    return nn.Identity()


class SparseConv(nn.Module):
    """Convolution of a sparse map whose neighbours are given; weights as spconv 2 stores them.

    Args:
        in_channels, out_channels: Channels.
        kernel: Size along z, y, x.
        bias: Add a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_channels, *kernel, in_channels, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform by fan-in, as dense convolutions of torch."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, neighbours: Neighbours) -> Tensor:
        """[N_in, C] -> [N_out, D]"""
        return sparse_conv(x, self.weight, self.bias, neighbours)


class ConvNormReLU(nn.Sequential):
    """Sparse convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: tuple[int, int, int], device=None, dtype=None) -> None:
        conv = SparseConv(in_channels, channels, kernel, device=device, dtype=dtype)
        super().__init__(conv, _norm(channels, device, dtype), nn.ReLU())

    def forward(self, x: Tensor, neighbours: Neighbours) -> Tensor:
        """[N_in, C] -> [N_out, D]"""
        return self[2](self[1](self[0](x, neighbours)))


class ResidualBlock(nn.Module):
    """Two sub-manifold convolutions with batch norm, added to the input."""

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.conv1, self.conv2 = (SparseConv(channels, channels, bias=True, **dd) for _ in range(2))
        self.bn1, self.bn2 = _norm(channels, **dd), _norm(channels, **dd)

    def forward(self, x: Tensor, neighbours: Neighbours) -> Tensor:
        """[N, C] -> [N, C]"""
        out = F.relu(self.bn1(self.conv1(x, neighbours)))
        return F.relu(self.bn2(self.conv2(out, neighbours)) + x)


class ScatteredLinearAttention(nn.Module):
    """Linear attention of voxels to all voxels of their window, with relu as the feature map and no scale.

    Args:
        dim: Channels.
        num_heads: Heads, which divide the channels.
    """

    def __init__(self, dim: int, num_heads: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {num_heads} and {dim}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, offsets: Tensor, order: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: [N, C].
            offsets: int32 or int64 [R + 1]; window r holds places offsets[r] to offsets[r + 1] - 1.
            order: [N] the row at each place; rows in order by default.

        Returns:
            [N, C]
        """
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # [N, M, D]
        return self.proj(scatter_linear_attention(q, k, v, offsets, order).flatten(1))


class DepthwiseWeight(nn.Module):
    """Weights of a depth-wise sub-manifold convolution, [KZ, KY, KX, D]."""

    def __init__(self, kernel: tuple[int, int, int], channels: int, device=None, dtype=None) -> None:
        super().__init__()
        bound = 1 / math.sqrt(math.prod(kernel))
        weight = torch.empty(*kernel, channels, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.uniform_(weight, -bound, bound))


def branch_kernels(size: int) -> list[tuple[int, int, int]]:
    """Kernels of the three depth-wise branches: a cube, and bars along x and along y, longer than a window."""
    return [(3, 3, 3), (1, 1, size), (1, size, 1)]


class CrossWindowInteraction(nn.Module):
    """Batch norm, depth-wise convolutions across windows by a quarter of the channels each, and a perceptron.

    The last quarter passes the convolutions unchanged, and is doubled by their residual sum as in the official code.

    Args:
        dim: Channels, which divide by 4.
        conv_size: Length of the bars, odd: one more than the side of a window.
    """

    def __init__(self, dim: int, conv_size: int, device=None, dtype=None) -> None:
        super().__init__()
        if dim % 4 or conv_size % 2 == 0:
            raise ValueError(f"dim must divide by 4 and conv_size be odd, got {dim} and {conv_size}.")
        dd = dict(device=device, dtype=dtype)
        self.bn, self.bn2 = _norm(dim, **dd), _norm(dim, **dd)
        self.conv_k, self.conv_h, self.conv_w = (
            DepthwiseWeight(kernel, dim // 4, **dd) for kernel in branch_kernels(conv_size)
        )
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim, **dd), nn.Linear(2 * dim, dim, **dd)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x [N, C] and int32 [taps, N] neighbours of the branches, one after another -> [N, C]"""
        weights = [branch.weight for branch in (self.conv_k, self.conv_h, self.conv_w)]
        x = sparse_depthwise_conv(self.bn(x), weights, table, residual=True)
        return x + self.fc2(F.relu(self.fc1(self.bn2(x))))


class StageIndex(NamedTuple):
    """What the layers of a stage share."""

    offsets: Tensor  # int32 [R + 1], first row of each window
    table: Tensor  # int32 [taps, N], neighbours of the depth-wise branches


def stage_index(sites: Sites) -> StageIndex:
    """Windows and neighbours of sites that are sorted by window."""
    return StageIndex(window_offsets(sites), same_table(sites, branch_kernels(sites.grid.window[0] + 1)))


class ScatterFormerLayers(nn.Module):
    """Blocks of attention within windows and convolution across them.

    Args:
        dim: Channels.
        num_heads: Heads.
        depth: Blocks.
        win_size: Side of a window in cells, even.
    """

    def __init__(self, dim: int, num_heads: int, depth: int, win_size: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm_layers = nn.ModuleList(_norm(dim, **dd) for _ in range(depth))
        self.attn_layers = nn.ModuleList(ScatteredLinearAttention(dim, num_heads, **dd) for _ in range(depth))
        self.cffn_layers = nn.ModuleList(CrossWindowInteraction(dim, win_size + 1, **dd) for _ in range(depth))

    def forward(self, x: Tensor, index: StageIndex) -> Tensor:
        """[N, C] -> [N, C]"""
        for norm, attention, interaction in zip(self.norm_layers, self.attn_layers, self.cffn_layers, strict=True):
            x = x + attention(norm(x), index.offsets)
            x = interaction(x, index.table)
        return x


class AttentivePillarPooling(nn.Module):
    """One token for each pillar: its maximum attends to its voxels, whose keys know their height.

    The official code pairs a pillar's query with another pillar's voxels, since it takes the rows of a pooled map to be
    sorted; here they are the pillar's own.

    Args:
        dim: Channels.
        pillar_size: Cells of a pillar.
        num_heads: Heads.
    """

    def __init__(self, dim: int, pillar_size: int, num_heads: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, **dd)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True, **dd)
        self.pos_embedding = nn.Embedding(pillar_size, dim, **dd)

    def query(self, x: Tensor, pillars: Pillars) -> Tensor:
        """Maximum of each pillar's voxels and 0 [P, C]."""
        return pillar_max(x, pillars.rows)

    def forward(self, x: Tensor, pillars: Pillars) -> Tensor:
        """Rows of sites [N, C] -> [P, C]; rows of padding are arbitrary but finite where x is."""
        attention, query, C = self.self_attn, self.query(x, pillars), x.shape[1]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        q = F.linear(query, weight[:C], bias[:C])
        k, v = F.linear(x, weight[C:], bias[C:]).chunk(2, 1)
        place = F.linear(self.pos_embedding.weight, weight[C : 2 * C])  # [Z, C]
        out = pillar_attention(q, k, v, place, pillars.rows, attention.num_heads)
        return self.norm(attention.out_proj(out) + query)


class ScatterFormer(nn.Module):
    """Convolutions and transformer stages over voxels, pooled to a dense bird's-eye-view map of half the resolution.

    With padded voxels all shapes are fixed and nothing waits for the device: the whole module can be captured in a
    CUDA graph.

    Args:
        input_channels: Width of a voxel's features.
        feature_dim: Width of the stages and of the result.
        win_size: Side of a window in cells, even.
        grid_size: Cells of the grid along x, y, z. The map has one more along z, as in the official code.
        num_heads: Heads of the attention in windows.
        depth: Blocks of each of the two stages.
        cpe_blocks: Residual blocks of convolutions before the first stage.
        growth: Rows of the first stage, the second and the pillars for each row of padded voxels. LiDAR sweeps need 1
            to 1.4, 0.6 to 1.3 and 0.2 to 0.55, the sparser the more; sites beyond are lost.
    """

    def __init__(
        self,
        input_channels: int = 64,
        feature_dim: int = 128,
        win_size: int = 12,
        grid_size: Sequence[int] = (480, 480, 32),
        num_heads: int = 4,
        depth: int = 3,
        cpe_blocks: int = 3,
        growth: Sequence[float] = (1.5, 1.5, 0.75),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if win_size % 2:
            raise ValueError(f"win_size must be even, so that a kernel one longer has a centre, got {win_size}.")
        dd = dict(device=device, dtype=dtype)
        X, Y, Z = grid_size
        self.shape, self.window, self.growth = (Z + 1, Y, X), (win_size, win_size), tuple(growth)
        self.out_channels = feature_dim
        self.cpe = nn.Sequential(
            ConvNormReLU(input_channels, feature_dim, (3, 3, 3), **dd),
            *(ResidualBlock(feature_dim, **dd) for _ in range(cpe_blocks)),
            ConvNormReLU(feature_dim, feature_dim, HALVE_HEIGHT[0], **dd),
        )
        layers = [ScatterFormerLayers(feature_dim, num_heads, depth, win_size, **dd) for _ in range(2)]
        coarser = SparseConv(feature_dim, feature_dim, HALVE_ALL[0], **dd)
        self.stage1 = nn.ModuleList([layers[0], _norm(feature_dim, **dd), coarser])
        self.stage2 = nn.ModuleList([layers[1], _norm(feature_dim, **dd)])
        self.app = AttentivePillarPooling(feature_dim, (Z + 1) // 4, **dd)

    def _sites(self, features: Tensor, voxels: Voxels, is_sorted: bool) -> tuple[Tensor, Sites]:
        if tuple(voxels.shape[1:]) != self.shape[1:] or voxels.shape[0] not in (self.shape[0] - 1, self.shape[0]):
            raise ValueError(
                f"voxels must lie on a grid of z, y, x = {(self.shape[0] - 1, *self.shape[1:])}, got {voxels.shape}."
            )
        if voxels.num is not None and self.training:
            raise ValueError("training takes no padded voxels: batch norm would count the padding.")
        sites, order = sort_sites(voxels._replace(shape=self.shape), is_sorted=is_sorted)
        return (features if order is None else features[order]), sites

    def fold_norms(self) -> ScatterFormer:
        """Fold norms into the convolutions before and the linear layers behind them, in place; for inference only.

        Those of the depth-wise convolutions and of the stages stay: places without a site are zero behind them.
        """
        first, *blocks, last = self.cpe
        for layers in (first, last):
            layers[1] = _fold_after(layers[0], layers[1])
        for block in blocks:
            block.bn1, block.bn2 = _fold_after(block.conv1, block.bn1), _fold_after(block.conv2, block.bn2)
        for layers in (self.stage1[0], self.stage2[0]):
            for i, (attention, interaction) in enumerate(zip(layers.attn_layers, layers.cffn_layers, strict=True)):
                layers.norm_layers[i] = _fold_before(layers.norm_layers[i], attention.qkv)
                interaction.bn2 = _fold_before(interaction.bn2, interaction.fc1)
        return self

    def _coarser(self, sites: Sites, strided, capacity: int | None = None) -> tuple[Sites, Neighbours]:
        return downsample(sites, *strided, self.window, capacity, gradients=torch.is_grad_enabled())

    @torch.no_grad()
    def count_rows(self, voxels: Voxels) -> tuple[int, int, int]:
        """Rows of the first stage, of the second and of the pillars for voxels sorted by sample, x, y, z, none of them
        padding; waits for the device."""
        sites, _ = self._coarser(sort_sites(voxels._replace(shape=self.shape), is_sorted=True)[0], HALVE_HEIGHT)
        second, _ = self._coarser(sites, HALVE_ALL)
        return len(sites.keys), len(second.keys), len(find_pillars(second).rows)

    def encode_sites(self, features: Tensor, sites: Sites, capacity: int | None = None) -> tuple[Tensor, Sites]:
        """Convolutions before the first stage: [N, Cin] -> [N', C] and the sites of the first stage."""
        first, *blocks, last = self.cpe
        neighbours = same_neighbours(sites, (3, 3, 3))
        x = first(features, neighbours)
        for block in blocks:
            x = block(x, neighbours)
        sites, neighbours = self._coarser(sites, HALVE_HEIGHT, capacity)
        return last(x, neighbours), sites

    def run_stages(self, x: Tensor, sites: Sites, capacity: int | None = None) -> tuple[Tensor, Sites]:
        """Both stages: [N, C] -> [N', C] and the sites of the second."""
        layers, norm, conv = self.stage1
        x = norm(layers(x, stage_index(sites)))
        sites, neighbours = self._coarser(sites, HALVE_ALL, capacity)
        x = conv(x, neighbours)
        layers, norm = self.stage2
        return norm(layers(x, stage_index(sites))), sites

    def forward_pillars(self, features: Tensor, voxels: Voxels, *, is_sorted: bool = False) -> tuple[Tensor, Voxels]:
        """Features of pillars and their cells; arguments and errors as in `forward`."""
        rows = [None if voxels.num is None else math.ceil(g * len(features)) for g in self.growth]
        x, sites = self._sites(features, voxels, is_sorted)
        x, sites = self.encode_sites(x, sites, rows[0])
        x, sites = self.run_stages(x, sites, rows[1])
        pillars = find_pillars(sites, rows[2])
        return self.app(x, pillars), pillars.voxels

    def forward(self, features: Tensor, voxels: Voxels, *, is_sorted: bool = False) -> Tensor:
        """Encode a batch.

        Args:
            features: [V, C].
            voxels: Distinct cells of the grid; padded ones outside of training only.
            is_sorted: They are sorted by sample, x, y, z, as `voxelize(order="xyz")` leaves them; saves a sort.

        Returns:
            [B, C, Y / 2, X / 2] (rounded up), channels-last in memory; empty cells are zero.

        Raises:
            ValueError: The voxels lie on another grid, or are padded in training.
        """
        return scatter_to_map(*self.forward_pillars(features, voxels, is_sorted=is_sorted))
