"""What detectors in point clouds share, from checking points to losses and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from zoo.backbones.point_layers import DynamicVFE
from zoo.heads.bev_ops import BatchDetections, ClassNMS
from zoo.heads.detections import Detections, Targets
from zoo.kernels.voxelize import Voxels

TASK = "object-detection-3d"


class PointDetector(nn.Module, PyTorchModelHubMixin, library_name="attention-zoo", tags=["lidar", "point-cloud", TASK]):
    """What the detectors share; use a subclass.

    Args:
        classes: Names of the classes, in the order of the labels.
        point_features: Names of the columns of a point, x, y, z first.
        voxel_size: Metres along x, y, z.
        point_range: Minimum of x, y, z, then maximum, metres; points outside are ignored.
        sweeps: Sweeps that the detector was made for; see `merge_sweeps`.
    """

    def __init__(
        self,
        classes: Sequence[str],
        point_features: Sequence[str],
        voxel_size: Sequence[float],
        point_range: Sequence[float],
        sweeps: int,
    ) -> None:
        super().__init__()
        self.classes, self.point_features = tuple(classes), tuple(point_features)
        self.voxel_size, self.point_range, self.sweeps = tuple(voxel_size), tuple(point_range), sweeps
        if len(set(self.classes)) != len(self.classes) or not self.classes:
            raise ValueError(f"classes must be different names, at least one, got {list(classes)}.")

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that the detector was made with, as `config.json` holds them."""
        return dict(self._hub_mixin_config)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Cells along z, y, x."""
        return self.vfe_module.grid.shape

    @property
    def vfe_module(self) -> DynamicVFE:
        """The encoder of voxels."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        """The head, with `decode` and `loss` of the maps that `dense` returns."""
        raise NotImplementedError

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the map between `encode` and `dense`."""
        raise NotImplementedError

    def encode(self, features: Tensor, voxels: Voxels) -> Tensor:
        """Features [V, C] of voxels to the map [B, C, H, W]."""
        raise NotImplementedError

    def encode_padded(self, features: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """`encode` of padded voxels, and whether some place for voxels was full, bool []: then others may be lost."""
        return self.encode(features, voxels), voxels.num >= len(features)

    def neck_map(self, x: Tensor) -> Tensor:
        """The map of `encode` to the one that the head takes."""
        raise NotImplementedError

    def dense(self, x: Tensor) -> dict[str, Tensor]:
        """The map of `encode` to the raw maps of the head."""
        return self.head(self.neck_map(x))

    def check(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Clouds on the detector's device.

        Raises:
            ValueError: Not a sequence of float32 tensors [N, F] with the detector's columns.
        """
        columns = len(self.point_features)
        if isinstance(points, Tensor):
            raise ValueError(f"points must be a list with a tensor [N, {columns}] for each sample, got one tensor.")
        for i, cloud in enumerate(points):
            if not isinstance(cloud, Tensor):
                raise ValueError(f"points of sample {i} must be a tensor [N, {columns}], got {type(cloud).__name__}.")
            if cloud.dim() != 2 or cloud.shape[1] != columns or cloud.dtype != torch.float32:
                raise ValueError(
                    f"points of sample {i} must be float32 [N, {columns}] ({', '.join(self.point_features)}), "
                    f"got {cloud.dtype} {tuple(cloud.shape)}."
                )
        device = next(self.parameters()).device
        return [cloud.to(device) for cloud in points]

    def maps(self, points: Sequence[Tensor]) -> tuple[dict[str, Tensor], Voxels]:
        """Raw maps of the head, and the voxels, of checked clouds."""
        features, voxels = self.vfe_module(points)
        return self.dense(self.encode(features, voxels)), voxels

    @torch.no_grad()
    def forward(self, points: Sequence[Tensor]) -> list[Detections]:
        """Detect objects.

        Args:
            points: One cloud float32 [N, F] a sample, with the columns `point_features`; N may be 0. Points with a NaN
                or infinite column and points outside `point_range` are ignored.

        Returns:
            `Detections` of each sample, none for a sample without points.

        Raises:
            ValueError: A cloud has another dtype or number of columns.
        """
        clouds = self.check(points)
        if not clouds:
            return []
        features, voxels = self.vfe_module(clouds)
        if len(voxels.coords) == 0:
            return self.nothing(len(clouds), features.device)
        maps = self.dense(self.encode(features, voxels))
        return drop_empty(self.head.decode(maps), voxels).split()

    def accelerate(self, **settings: Any):
        """The detector made ready for fast inference, a `zoo.heads.point_runtime.PointRuntime` with these settings."""
        from zoo.heads.point_runtime import PointRuntime

        return PointRuntime(self, **settings)

    def nothing(self, samples: int, device: torch.device) -> list[Detections]:
        """Results of samples without a voxel."""
        boxes, scores = torch.zeros(0, self.head.columns, device=device), torch.zeros(0, device=device)
        return [Detections(boxes, scores, scores.long()) for _ in range(samples)]

    def loss(self, points: Sequence[Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Training losses of a batch.

        Args:
            points: As in `forward`.
            targets: `Targets` of each sample.

        Returns:
            Losses by name, weights applied, and their sum under "loss".

        Raises:
            ValueError: Clouds or targets do not fit, or no cloud has a point in range.
        """
        clouds = self.check(points)
        if len(clouds) != len(targets):
            raise ValueError(f"each sample needs its targets, got {len(clouds)} clouds and {len(targets)} targets.")
        features, voxels = self.vfe_module(clouds)
        if len(voxels.coords) == 0:
            raise ValueError(f"no cloud of the batch has a point in the range {list(self.point_range)}.")
        return self.head.loss(self.dense(self.encode(features, voxels)), targets)


def class_nms(classes: int, *rules: Any) -> ClassNMS:
    """`ClassNMS` of threshold, before and after, each one a class or one for all."""
    return ClassNMS(*([rule] * classes if isinstance(rule, (int, float)) else rule for rule in rules))


def drop_empty(found: BatchDetections, voxels: Voxels) -> BatchDetections:
    """No boxes for samples without a voxel: what heads say of an empty map comes from their biases alone."""
    seen = found.count.new_zeros(voxels.batch_size + 1).index_fill(0, voxels.coords[:, 0].long(), 1)
    return found._replace(count=found.count * seen[: voxels.batch_size])


def merge_sweeps(sweeps: Sequence[Tensor], poses: Sequence[Tensor] | None = None, min_distance: float = 5.0) -> Tensor:
    """One cloud of several sweeps, as FlatFormer's multi-sweep models take it.

    Args:
        sweeps: Clouds float32 [N, 5], the current one first, then the past ones, the last before it first.
        poses: Sensor to world of each sweep, [4, 4]; None if all are in the current sensor's coordinates already.
        min_distance: Points of past sweeps nearer to the sensor than this, in x and y, are left out, metres: they lie
            on the vehicle itself.

    Returns:
        [N, 5] in the current sensor's coordinates; the last column is 0 for the current sweep and -(i + 1) for past
        sweep i.
    """
    if not sweeps:
        raise ValueError("merge_sweeps needs at least the current sweep.")
    merged = []
    for i, cloud in enumerate(sweeps):
        if i:
            cloud = cloud[cloud[:, :2].norm(dim=1) >= min_distance]
        if i and poses is not None:
            relative = torch.linalg.solve(poses[0].double(), poses[i].double())
            xyz = cloud[:, :3].double() @ relative[:3, :3].T + relative[:3, 3]
            cloud = torch.cat([xyz.to(cloud.dtype), cloud[:, 3:]], 1)
        merged.append(torch.cat([cloud[:, :4], torch.full_like(cloud[:, :1], -i)], 1))
    return torch.cat(merged)
