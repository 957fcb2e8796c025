"""Detectors in point clouds, from points to boxes: FlatFormer and ScatterFormer with their heads.

    detector = zoo.create_model("flatformer_nano", pretrained=True).eval()
    boxes, scores, labels = detector([points])[0]

Papers: FlatFormer, arXiv:2301.08739; ScatterFormer, arXiv:2401.00912. Parameters have the names of the official
implementations, whose checkpoints `zoo convert` turns into model folders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbones.bev import SECOND, SECONDFPN
from zoo.backbones.cascade_ded import CascadeDED
from zoo.backbones.flatformer import FlatFormer
from zoo.backbones.point_layers import DynamicVFE, scatter_to_map
from zoo.backbones.scatterformer import ScatterFormer
from zoo.heads.bev_ops import Grid
from zoo.heads.center_point import FlatFormerCenterHead, ScatterFormerCenterHead
from zoo.heads.point_base import TASK, PointDetector, class_nms, merge_sweeps
from zoo.heads.transfusion import TransFusionHead
from zoo.kernels.sparse_conv import find_pillars, sort_sites
from zoo.kernels.voxelize import Voxels
from zoo.registry import register

__all__ = ["FlatFormerDetector", "PointDetector", "ScatterFormerDetector", "merge_sweeps"]

WAYMO_COLUMNS = ("x", "y", "z", "intensity", "elongation")
NUSCENES_CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip
# A suppression threshold that no intersection over union exceeds.
KEEP_ALL = 2.0


class FlatFormerDetector(PointDetector, paper_url="https://arxiv.org/abs/2301.08739"):
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
        nms_threshold: Intersection over union at which boxes of a class exclude each other; one a class, or one
            for all.
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
        nms_threshold: float | Sequence[float] = (0.8, 0.55, 0.55),
        nms_before: int | Sequence[int] = (2048, 1024, 1024),
        nms_after: int | Sequence[int] = (300, 100, 100),
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
            nms=class_nms(len(classes), nms_threshold, nms_before, nms_after),
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


class ScatterFormerDetector(PointDetector, paper_url="https://arxiv.org/abs/2401.00912"):
    """ScatterFormer: voxels, linear attention in windows, pillars, 2D encoder-decoders, boxes.

    The defaults are the official model for Waymo. Arguments of `PointDetector`, and:

    Args:
        architecture: Name of the variant.
        vfe_channels: Width of a voxel's features.
        channels: Width of the backbone and of the map.
        num_heads: Attention heads.
        depth: Blocks of each of the two stages.
        cpe_blocks: Residual blocks of convolutions before them.
        window: Cells of a window along each side, even.
        cascades: Encoder-decoders on the map.
        cascade_blocks: Blocks of each of their levels.
        head: "center" (CenterPoint) or "transfusion".
        head_channels: Channels within the head.
        limits: Boxes with a centre outside this range (x0, y0, z0, x1, y1, z1) are dropped; by default the range of
            the points with heights of -10 to 10 m.
        iou_power: Exponent of the predicted IoU in a score, one a class or one for all; of the CenterPoint head.
        score_threshold: Boxes of at most this score are dropped.
        max_candidates: Boxes that enter suppression; of a TransFusion head the number of proposals.
        radius: Cells on each side of a proposal that it attends to; of the TransFusion head.
        small_classes: Classes whose objects cover about a cell; of the TransFusion head.
        nms_threshold: Intersection over union at which boxes of a class exclude each other; one a class, or one
            for all.
        nms_before: Boxes of a class that enter suppression at most.
        nms_after: Boxes of a class that leave it at most.
    """

    def __init__(
        self,
        *,
        architecture: str = "scatterformer_waymo",
        classes: Sequence[str] = ("vehicle", "pedestrian", "cyclist"),
        point_features: Sequence[str] = WAYMO_COLUMNS,
        voxel_size: Sequence[float] = (0.32, 0.32, 0.1875),
        point_range: Sequence[float] = (-76.8, -76.8, -2.0, 76.8, 76.8, 4.0),
        sweeps: int = 1,
        vfe_channels: int = 64,
        channels: int = 128,
        num_heads: int = 4,
        depth: int = 3,
        cpe_blocks: int = 3,
        window: int = 12,
        cascades: int = 4,
        cascade_blocks: Sequence[int] = (2, 1, 1),
        head: str = "center",
        head_channels: int = 64,
        limits: Sequence[float] | None = None,
        iou_power: float | Sequence[float] = (0.68, 0.71, 0.65),
        score_threshold: float = 0.1,
        max_candidates: int = 500,
        radius: int = 20,
        small_classes: Sequence[str] = (),
        nms_threshold: float | Sequence[float] = (0.75, 0.6, 0.55),
        nms_before: int | Sequence[int] = 4096,
        nms_after: int | Sequence[int] = 500,
    ) -> None:
        super().__init__(classes, point_features, voxel_size, point_range, sweeps)
        if head not in ("center", "transfusion"):
            raise ValueError(f"head must be 'center' or 'transfusion', got {head!r}.")
        self.vfe = DynamicVFE(
            len(point_features),
            (vfe_channels, vfe_channels),
            voxel_size,
            point_range,
            clamp=False,
            order="xyz",
            half_width=True,
            layers_name="pfn_layers",
        )
        layers, rows, columns = self.grid_size
        if rows % 8 or columns % 8:
            raise ValueError(f"the grid needs multiples of 8 cells along x and y, got {columns} and {rows}.")
        self.backbone_3d = ScatterFormer(
            vfe_channels, channels, window, (columns, rows, layers), num_heads, depth, cpe_blocks
        )
        self.backbone_2d = CascadeDED(channels, channels, cascades, cascade_blocks)
        settings = dict(
            num_classes=len(classes),
            grid=Grid(tuple(point_range[:2]), (2 * voxel_size[0], 2 * voxel_size[1])),
            limits=limits or (*point_range[:2], -10, *point_range[3:5], 10),
            nms=class_nms(len(classes), nms_threshold, nms_before, nms_after),
            score_threshold=score_threshold,
        )
        if head == "center":
            power = [iou_power] * len(classes) if isinstance(iou_power, (int, float)) else iou_power
            settings |= dict(iou_power=power, max_candidates=max_candidates, min_radius=2)
            self.dense_head = ScatterFormerCenterHead(channels, head_channels, **settings)
        else:
            small = [classes.index(name) for name in small_classes]
            settings |= dict(extent=point_range, small=small, num_proposals=max_candidates, radius=radius)
            self.dense_head = TransFusionHead(channels, channels=head_channels, **settings)

    @property
    def vfe_module(self) -> DynamicVFE:
        return self.vfe

    @property
    def head(self) -> nn.Module:
        return self.dense_head

    @property
    def map_shape(self) -> tuple[int, int, int]:
        _, rows, columns = self.grid_size
        return self.backbone_3d.out_channels, rows // 2, columns // 2

    def encode(self, features: Tensor, voxels: Voxels) -> Tensor:
        return scatter_to_map(*self.backbone_3d.forward_pillars(features, voxels, is_sorted=True))

    def encode_padded(self, features: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        backbone, rows = self.backbone_3d, [math.ceil(g * len(features)) for g in self.backbone_3d.growth]
        sites, _ = sort_sites(voxels._replace(shape=backbone.shape), is_sorted=True)
        x, first = backbone.encode_sites(features, sites, rows[0])
        x, second = backbone.run_stages(x, first, rows[1])
        pillars = find_pillars(second, rows[2])
        numbers = torch.stack([voxels.num, first.num, second.num, pillars.voxels.num])
        full = torch.stack([n >= r for n, r in zip(numbers, [len(features), *rows], strict=True)]).any()
        return scatter_to_map(backbone.app(x, pillars), pillars.voxels), full

    def neck_map(self, x: Tensor) -> Tensor:
        return self.backbone_2d(x)


_FLATFORMER = dict(
    family="flatformer",
    task=TASK,
    paper="FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer (2301.08739)",
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
        map_channels=(64, 96),
        map_layers=(3, 3),
        neck_channels=64,
        head_channels=48,
        max_candidates=1000,
        nms_threshold=0.2,
        nms_before=1000,
        nms_after=200,
    )


_SCATTERFORMER = dict(
    family="scatterformer",
    task=TASK,
    paper="ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention (2401.00912)",
)


@register(ScatterFormerDetector, **_SCATTERFORMER)
def scatterformer_waymo() -> dict[str, Any]:
    """The official model for Waymo, one sweep."""
    return dict(limits=(-80.0, -80.0, -10.0, 80.0, 80.0, 10.0))


@register(ScatterFormerDetector, **_SCATTERFORMER, origin="https://github.com/skyhehe123/ScatterFormer")
def scatterformer_nuscenes() -> dict[str, Any]:
    """The official model for nuScenes, ten sweeps, with a TransFusion head."""
    small = ("pedestrian", "traffic_cone")
    return dict(
        classes=NUSCENES_CLASSES,
        point_features=("x", "y", "z", "intensity", "time"),
        voxel_size=(0.3, 0.3, 0.2),
        point_range=(-54.0, -54.0, -5.0, 54.0, 54.0, 3.0),
        sweeps=10,
        window=20,
        head="transfusion",
        head_channels=128,
        limits=(-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
        score_threshold=0.0,
        max_candidates=200,
        small_classes=small,
        # The published code takes a former radius of 0.175 m for the threshold, and suppresses small classes alone.
        nms_threshold=[0.175 if name in small else KEEP_ALL for name in NUSCENES_CLASSES],
        nms_before=1000,
        nms_after=[100 if name in small else 200 for name in NUSCENES_CLASSES],
    )


@register(ScatterFormerDetector, **{**_SCATTERFORMER, "origin": None})
def scatterformer_nano() -> dict[str, Any]:
    """A small model for one CPU: voxels of 0.4 x 0.4 x 0.25 m within 40 m, half the width."""
    return dict(
        classes=("car", "pedestrian", "cyclist"),
        voxel_size=(0.4, 0.4, 0.25),
        point_range=(-40.0, -40.0, -2.0, 40.0, 40.0, 4.0),
        vfe_channels=32,
        channels=64,
        num_heads=2,
        depth=2,
        cpe_blocks=1,
        window=10,
        cascades=2,
        cascade_blocks=(1, 1, 1),
        head_channels=48,
        iou_power=0.5,
        nms_threshold=0.2,
        nms_after=200,
    )
