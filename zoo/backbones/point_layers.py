"""Layers that point-cloud families share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.voxelize import Voxels, group_points, make_grid, point_features, segment_max


class PointLayer(nn.Module):
    """Linear without bias, batch norm over points, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(out_channels, eps=1e-3, momentum=0.01, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, D]"""
        return F.relu(self.norm(self.linear(x)))


class DynamicVFE(nn.Module):
    """Features of voxels from all points within: a layer for each entry of `channels`, and a maximum over the points.

    A point enters with its columns, its offset from the mean of its voxel's points, its offset from the voxel's centre
    and, optionally, its distance. Between layers the maximum of its voxel joins its own features. It runs in float32
    under autocast, since sums of squares of coordinates leave float16.

    Args:
        in_channels: Columns of a point, x, y, z in metres first.
        channels: Widths of the layers; the last is the width of a voxel's features.
        voxel_size: Metres along x, y, z.
        point_range: Minimum of x, y, z, then maximum, in metres.
        clamp: Points outside the range join the border cells; otherwise they are dropped.
        order: Voxels of a sample are sorted by "zyx" (x fastest) or by "xyz" (z fastest).
        half_width: All layers but the last have half their width, and with the voxel's maximum the whole.
        with_distance: Append the distance from the origin.
        layers_name: Name of the list of layers, "vfe_layers" (FlatFormer) or "pfn_layers" (ScatterFormer).

    Source: PointPillars' encoder in its dynamic form, arXiv:1910.06528, as FlatFormer (arXiv:2301.08739) and
    ScatterFormer (arXiv:2401.00912) use it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        voxel_size: Sequence[float],
        point_range: Sequence[float],
        *,
        clamp: bool = True,
        order: str = "zyx",
        half_width: bool = False,
        with_distance: bool = False,
        layers_name: str = "vfe_layers",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.with_distance = in_channels, channels[-1], with_distance
        self.grid = make_grid(voxel_size, point_range, clamp, order)
        self.layers_name = layers_name
        layers, width = nn.ModuleList(), in_channels + 6 + with_distance
        for i, out in enumerate(channels):
            out = out // 2 if half_width and i < len(channels) - 1 else out
            layers.append(PointLayer(width, out, device, dtype))
            width = 2 * out
        self.add_module(layers_name, layers)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, under whichever name they are stored."""
        return getattr(self, self.layers_name)

    def _cloud(self, points: Sequence[Tensor]) -> Tensor:
        """Samples one after another, [N, F]."""
        for i, cloud in enumerate(points):
            if cloud.dim() != 2 or cloud.shape[1] != self.in_channels or cloud.dtype != torch.float32:
                raise ValueError(
                    f"points must be float32 [N, {self.in_channels}], got {cloud.dtype} {tuple(cloud.shape)} "
                    f"for sample {i}."
                )
        if not points:
            return self.layers[0].linear.weight.new_zeros(0, self.in_channels, dtype=torch.float32)
        return points[0] if len(points) == 1 else torch.cat(list(points))

    def forward(self, points: Sequence[Tensor], capacity: int | None = None) -> tuple[Tensor, Voxels]:
        """Voxelise and encode a batch.

        Args:
            points: One float32 cloud [n, F] a sample; n may be 0. Points with a NaN or infinite column are dropped.
            capacity: Rows of the result, of which the unused are padding; None for as many as there are voxels, which
                waits for the device once. Training needs None: batch norm counts every row.

        Returns:
            Features [V, C] and voxels.

        Raises:
            ValueError: A cloud has another dtype or number of columns, or there is a capacity in training.
        """
        if capacity is not None and self.training:
            raise ValueError(f"training takes no capacity, got {capacity}: batch norm would count padding.")
        cloud = self._cloud(points)
        with torch.autocast(cloud.device.type, enabled=False):
            grouping = group_points(cloud, [len(cloud) for cloud in points], self.grid, capacity)
            voxels, _, index, offsets = grouping
            x = point_features(cloud, grouping, self.grid, self.with_distance)
            x, largest = x.to(self.layers[0].linear.weight.dtype), None
            for layer in self.layers:
                x = layer(x if largest is None else torch.cat([x, F.pad(largest, (0, 0, 0, 1))[index]], 1))
                largest = segment_max(x, index, len(voxels.coords), offsets)
        return largest, voxels


class FoldedVFE(nn.Module):
    """A `DynamicVFE` in evaluation mode, made ready for inference: about a third of its passes over the points.

    Norms are folded into the linear layers. Of a layer W x + U m + b, where m is the maximum of the point's voxel, the
    last two terms are computed once a voxel. In the last layer they are added after the maximum over W x.

    Args:
        encoder: Its weights are copied.
    """

    def __init__(self, encoder: DynamicVFE) -> None:
        super().__init__()
        self.grid, self.with_distance = encoder.grid, encoder.with_distance
        self.in_channels, self.depth, width = encoder.in_channels, len(encoder.layers), 0
        for i, layer in enumerate(encoder.layers):
            norm, weight = layer.norm, layer.linear.weight.detach()
            scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
            own, joint = (weight * scale[:, None]).tensor_split([weight.shape[1] - width], 1)
            bias = norm.bias.detach() - norm.running_mean * scale
            for name, value in {"own": own, "joint": joint, "bias": bias}.items():
                self.register_buffer(f"{name}{i}", value.contiguous())
            width = len(weight)

    def forward(self, cloud: Tensor, sizes: Sequence[int], capacity: int | None = None) -> tuple[Tensor, Voxels]:
        """Voxelise and encode a batch.

        Args:
            cloud: float32 [N, F], samples one after another; rows with a NaN or infinite column are dropped, so that
                rows of NaN are padding.
            sizes: Rows of each sample.
            capacity: As in `DynamicVFE.forward`. Then nothing waits for the device.

        Returns:
            Features [V, C], arbitrary but finite in rows of padding, and voxels.
        """
        with torch.autocast(cloud.device.type, enabled=False):
            grouping = group_points(cloud, sizes, self.grid, capacity)
            voxels, _, index, offsets = grouping
            segments = index, len(voxels.coords), offsets
            x = point_features(cloud, grouping, self.grid, self.with_distance).to(self.bias0.dtype)
            largest = None
            for i in range(self.depth - 1):
                own, joint, bias = self._weights(i)
                x = F.linear(x, own, bias if largest is None else None)
                if largest is not None:
                    x = x + F.pad(F.linear(largest, joint, bias), (0, 0, 0, 1))[index]
                x = x.relu_()
                largest = segment_max(x, *segments)
            own, joint, bias = self._weights(self.depth - 1)
            addend = bias if largest is None else F.linear(largest, joint, bias)
            return (segment_max(F.linear(x, own), *segments) + addend).relu_(), voxels

    def _weights(self, i: int) -> list[Tensor]:
        """W [D, C], U [D, C'] and b [D] of a layer."""
        return [getattr(self, f"{name}{i}") for name in ("own", "joint", "bias")]


def scatter_to_map(features: Tensor, voxels: Voxels) -> Tensor:
    """Bird's-eye-view map of pillars, channels-last in memory; empty cells are zero, padding is left out.

    Args:
        features: [V, C].
        voxels: At most one voxel for each x, y of a sample.

    Returns:
        [B, C, Y, X].
    """
    B, (_, Y, X) = voxels.batch_size, voxels.shape
    sample, _, y, x = voxels.coords.long().unbind(1)
    cell = ((sample * Y + y) * X + x).clamp(max=B * Y * X)
    # The last row takes the padding.
    rows = features.new_zeros(B * Y * X + 1, features.shape[1]).index_copy_(0, cell, features)
    return rows[:-1].unflatten(0, (B, Y, X)).permute(0, 3, 1, 2) if B else rows[:-1].view(0, features.shape[1], Y, X)
