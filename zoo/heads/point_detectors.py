"""Detectors in point clouds, from points to boxes: FlatFormer and ScatterFormer with their heads.

    detector = zoo.create_model("flatformer_nano", pretrained=True).eval()
    boxes, scores, labels = detector([points])[0]

Papers: FlatFormer, arXiv:2301.08739; ScatterFormer, arXiv:2401.00912. Parameters have the names of the official
implementations, whose checkpoints `zoo convert` turns into model folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from zoo.backbones.bev import SECOND, SECONDFPN
from zoo.backbones.flatformer import FlatFormer
from zoo.backbones.point_layers import DynamicVFE
from zoo.heads.bev_ops import BatchDetections, ClassNMS, Grid
from zoo.heads.center_point import FlatFormerCenterHead
from zoo.heads.detections import Detections, Targets
from zoo.kernels.voxelize import Voxels
from zoo.registry import register

TASK = "object-detection-3d"
WAYMO_COLUMNS = ("x", "y", "z", "intensity", "elongation")
NUSCENES_CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip
# Classes of nuScenes whose objects cover about a cell of the map.
NUSCENES_SMALL = ("pedestrian", "traffic_cone")
# A suppression threshold that no intersection over union exceeds.
KEEP_ALL = 2.0


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
            return self._nothing(len(clouds), features.device)
        maps = self.dense(self.encode(features, voxels))
        return drop_empty(self.head.decode(maps), voxels).split()

    def _nothing(self, samples: int, device: torch.device) -> list[Detections]:
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


class FlatFormerDetector(PointDetector):
    """FlatFormer with a CenterPoint head: pillars, window transformer, 2D convolutions, boxes.

    The defaults are the official model for Waymo. Arguments of `PointDetector`, and:

    Args:
        architecture: Name of the variant.
        clamp: Put points outside the range into the border cells, as the official voxelisation does; the official
            pipeline drops them before.
        channels: Width of a pillar's features; half of it in the encoder's first layer.
        num_heads: Attention heads.
        num_blocks: Blocks of four layers.
        window: Cells of a window along each side.
        group_size: Pillars of a group.
        map_channels: Channels of the two stages of 2D convolutions.
        map_layers: Convolutions of each stage after its first.
        neck_channels: Channels of each stage's map before they are joined.
        head_channels: Channels within the head.
        score_threshold: Boxes of at most this score are dropped.
        max_candidates: Boxes that enter suppression.
        nms_threshold: Intersection over union at which boxes of a class exclude each other, one a class.
        nms_before: Boxes of a class that enter suppression at most.
        nms_after: Boxes of a class that leave it at most.
    """

    def __init__(
        self,
        *,
        architecture: str = "flatformer_waymo",
        classes: Sequence[str] = ("car", "pedestrian", "cyclist"),
        point_features: Sequence[str] = WAYMO_COLUMNS,
        voxel_size: Sequence[float] = (0.32, 0.32, 6.0),
        point_range: Sequence[float] = (-74.88, -74.88, -2.0, 74.88, 74.88, 4.0),
        sweeps: int = 1,
        clamp: bool = False,
        channels: int = 128,
        num_heads: int = 8,
        num_blocks: int = 2,
        window: int = 13,
        group_size: int = 144,
        map_channels: Sequence[int] = (64, 128),
        map_layers: Sequence[int] = (3, 3),
        neck_channels: int = 128,
        head_channels: int = 64,
        score_threshold: float = 0.1,
        max_candidates: int = 4096,
        nms_threshold: Sequence[float] = (0.8, 0.55, 0.55),
        nms_before: Sequence[int] = (2048, 1024, 1024),
        nms_after: Sequence[int] = (300, 100, 100),
    ) -> None:
        super().__init__(classes, point_features, voxel_size, point_range, sweeps)
        vfe_channels = (channels // 2, channels)
        self.voxel_encoder = DynamicVFE(len(point_features), vfe_channels, voxel_size, point_range, clamp=clamp)
        _, rows, columns = self.grid_size
        if rows % 2 or columns % 2:
            raise ValueError(f"the grid needs an even number of cells along x and y, got {columns} and {rows}.")
        self.middle_encoder = FlatFormer(
            channels,
            num_heads,
            num_blocks,
            window_shape=(window, window, 1),
            sparse_shape=(columns, rows, 1),
            group_size=group_size,
        )
        self.backbone = SECOND(channels, map_channels, map_layers, (1, 2))
        self.neck = SECONDFPN(map_channels, [neck_channels] * 2, (1, 2))
        self.bbox_head = FlatFormerCenterHead(
            2 * neck_channels,
            head_channels,
            num_classes=len(classes),
            grid=Grid(tuple(point_range[:2]), tuple(voxel_size[:2])),
            limits=(*point_range[:2], -10, *point_range[3:5], 10),
            nms=ClassNMS(nms_threshold, nms_before, nms_after),
            score_threshold=score_threshold,
            max_candidates=max_candidates,
        )

    @property
    def vfe_module(self) -> DynamicVFE:
        return self.voxel_encoder

    @property
    def head(self) -> FlatFormerCenterHead:
        return self.bbox_head

    @property
    def map_shape(self) -> tuple[int, int, int]:
        return (self.voxel_encoder.out_channels, *self.grid_size[1:])

    def encode(self, features: Tensor, voxels: Voxels) -> Tensor:
        return self.middle_encoder(features, voxels)

    def neck_map(self, x: Tensor) -> Tensor:
        return self.neck(self.backbone(x))


_FLATFORMER = dict(
    family="flatformer",
    task=TASK,
    paper="FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer (2301.08739)",
    license="apache-2.0",
    origin="none published, by Waymo's licence (github.com/mit-han-lab/flatformer)",
)


@register(FlatFormerDetector, **_FLATFORMER)
def flatformer_waymo() -> dict[str, Any]:
    """The official model for Waymo, one sweep."""
    return {}


@register(FlatFormerDetector, **_FLATFORMER)
def flatformer_waymo_2f() -> dict[str, Any]:
    """The official model for Waymo, two sweeps (`merge_sweeps`)."""
    return dict(sweeps=2, point_features=("x", "y", "z", "intensity", "sweep"))


@register(FlatFormerDetector, **_FLATFORMER)
def flatformer_waymo_3f() -> dict[str, Any]:
    """The official model for Waymo, three sweeps (`merge_sweeps`)."""
    return dict(sweeps=3, point_features=("x", "y", "z", "intensity", "sweep"))


@register(FlatFormerDetector, **{**_FLATFORMER, "origin": None})
def flatformer_nano() -> dict[str, Any]:
    """A small model for one CPU: 0.4 m pillars within 40 m, half the width."""
    return dict(
        voxel_size=(0.4, 0.4, 6.0),
        point_range=(-40.0, -40.0, -2.0, 40.0, 40.0, 4.0),
        channels=64,
        num_heads=4,
        window=10,
        group_size=96,
        map_channels=(48, 96),
        map_layers=(2, 2),
        neck_channels=48,
        head_channels=32,
        max_candidates=1000,
        nms_before=(1000, 1000, 1000),
        nms_threshold=(0.2, 0.2, 0.2),
    )
