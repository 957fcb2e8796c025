"""CenterPoint heads on a bird's-eye-view map: the flavours of FlatFormer and of ScatterFormer.

Center-based 3D Object Detection and Tracking, arXiv:2006.11275. A heat map for each class marks box centres, further
maps hold the box at a centre's cell; both flavours predict the IoU of each box as well, which corrects its score. They
differ in the names and meaning of the maps, the targets, the losses and the decoding, each as published with
FlatFormer (arXiv:2301.08739, after mmdetection3d 0.x) and ScatterFormer (arXiv:2401.00912, after OpenPCDet).

Targets and results are in the convention of `zoo.heads.detections`. FlatFormer's own convention, where yaw turns
clockwise and z is the bottom of a box in results, is reached by `FlatFormerCenterHead.official`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.heads.bev_ops import (
    BatchDetections,
    ClassNMS,
    Grid,
    Objects,
    axis_aligned_diou,
    draw_gaussians,
    gather_cells,
    gather_objects,
    gaussian_focal_loss,
    gaussian_radius,
    within,
)
from zoo.heads.detections import Targets
from zoo.kernels.rotated_iou import rotated_iou_3d

# Objects of a sample that targets have room for.
MAX_OBJECTS = 500
OVERLAP = 0.1
# Probability of an object in a cell at the start: 0.1.
HEAT_BIAS = -2.19


class CenterTargets(NamedTuple):
    """Targets of a batch. K slots a sample.

    Attributes:
        heatmap: [B, C, H, W].
        rows: [B, K, D] regression targets.
        boxes: [B, K, 7], the boxes themselves in the official rotation; where their centres were moved to the map,
            `rows` alone say so.
        index: int64 [B, K], cell y * W + x.
        mask: bool [B, K], which slots hold an object.
    """

    heatmap: Tensor
    rows: Tensor
    boxes: Tensor
    index: Tensor
    mask: Tensor


class CenterHead(nn.Module):
    """What the flavours share; use a subclass.

    Args:
        num_classes: Number of classes.
        grid: Cells of the map.
        limits: Boxes with a centre outside this range (x0, y0, z0, x1, y1, z1), metres, are dropped.
        nms: Suppression.
        score_threshold: Boxes of at most this score are dropped.
        max_candidates: Boxes of the highest scores that decoding goes on with.
        min_radius: Least radius of the Gaussians, cells.
    """

    # Maps that describe a box, in the order of the regression targets, with their channels.
    regression: dict[str, int]
    heat_name: str
    # Whether `rot` is (sine, cosine) and not (cosine, sine).
    sine_first: bool
    # Whether objects take their slots class by class.
    by_class: bool

    def __init__(
        self,
        num_classes: int,
        grid: Grid,
        limits: Sequence[float],
        nms: ClassNMS,
        *,
        score_threshold: float = 0.1,
        max_candidates: int = 500,
        min_radius: int = 1,
    ) -> None:
        super().__init__()
        self.num_classes, self.grid, self.nms = num_classes, grid, nms
        self.score_threshold, self.max_candidates, self.min_radius = score_threshold, max_candidates, min_radius
        self.register_buffer("limits", torch.tensor(limits, dtype=torch.float32), persistent=False)

    @property
    def branches(self) -> dict[str, int]:
        """All maps with their channels, in the order of the official state dict."""
        return {**self.regression, "iou": 1, self.heat_name: self.num_classes}

    @property
    def columns(self) -> int:
        """Columns of a box."""
        return 7 + self.regression.get("vel", 0)

    @property
    def branch_modules(self) -> nn.ModuleDict:
        """The branch of each map: a convolution with norm and ReLU, then one to the map."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] -> raw maps [B, channels, H, W] by name (no sigmoid, no exponential)."""
        x = self.shared_conv(x)
        return {name: branch(x) for name, branch in self.branch_modules.items()}

    def targets(self, targets: Sequence[Targets], size: tuple[int, int]) -> CenterTargets:
        """Targets of a batch for maps of height and width `size`.

        Objects with a label outside the classes or without extent in x or y are left out.
        """
        objects = gather_objects(targets, self.limits.device, self.num_classes, self.by_class)
        objects = objects._replace(boxes=self.public(objects.boxes))
        boxes, labels = objects.boxes, objects.labels
        origin, cell = (boxes.new_tensor(x) for x in self.grid)
        place = (boxes[:, :2] - origin) / cell
        place, valid = self._place(place, size)
        extent = boxes[:, 3:5] / cell
        known = (labels >= 0) & (labels < self.num_classes) & (objects.slot < MAX_OBJECTS)
        valid = valid & known & (extent > 0).all(-1)
        cells = place.int()  # towards zero
        radius = gaussian_radius(extent[:, 0], extent[:, 1], OVERLAP).nan_to_num(0)
        radius = radius.int().clamp(min=self.min_radius)
        channel = torch.where(valid, objects.sample * self.num_classes + labels, -1)
        shape = (len(targets), self.num_classes, *size)
        heatmap = draw_gaussians(shape, channel, cells.long(), radius.long())
        rows = torch.cat([place - cells, self._encode(boxes)], -1)
        return self._fill(objects, heatmap, rows, cells[:, 1] * size[1] + cells[:, 0], valid)

    def _fill(self, objects: Objects, heatmap: Tensor, rows: Tensor, index: Tensor, valid: Tensor) -> CenterTargets:
        B, K = len(heatmap), min(objects.slots, MAX_OBJECTS)
        # The last slot takes those without room; slots of objects that are left out stay empty.
        position = objects.sample * (K + 1) + objects.slot.clamp(max=K)

        def slots(values: Tensor) -> Tensor:
            values = torch.where(valid.view(-1, *[1] * (values.dim() - 1)), values, 0)
            out = values.new_zeros(B * (K + 1), *values.shape[1:])
            return out.index_copy(0, position, values).unflatten(0, (B, K + 1))[:, :K]

        return CenterTargets(
            heatmap, slots(rows), slots(objects.boxes[:, :7]), slots(index.long()), slots(valid.long()).bool()
        )

    def _place(self, place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Centres [M, 2] in cells where they are learned, and which objects are."""
        raise NotImplementedError

    def _encode(self, boxes: Tensor) -> Tensor:
        """Regression targets of boxes [M, 9] after the two of the place."""
        yaw, velocity = boxes[:, 6:7], boxes[:, 7 : 7 + self.regression.get("vel", 0)]
        rotation = (yaw.sin(), yaw.cos()) if self.sine_first else (yaw.cos(), yaw.sin())
        return torch.cat([boxes[:, 2:3], boxes[:, 3:6].log(), *rotation, velocity], -1)

    def boxes(self, rows: Tensor, index: Tensor, width: int) -> Tensor:
        """Boxes in the official rotation, z at the centre, of regression rows [B, K, D] at cells y * W + x."""
        (x0, y0), (cx, cy) = self.grid
        x = (index % width + rows[..., 0]) * cx + x0
        y = (torch.div(index, width, rounding_mode="floor") + rows[..., 1]) * cy + y0
        sin, cos = (rows[..., 6], rows[..., 7]) if self.sine_first else (rows[..., 7], rows[..., 6])
        xyz, yaw = torch.stack([x, y, rows[..., 2]], -1), torch.atan2(sin, cos)
        return torch.cat([xyz, rows[..., 3:6].exp(), yaw[..., None], rows[..., 8:]], -1)

    def public(self, boxes: Tensor) -> Tensor:
        """Between the official rotation and yaw counter-clockwise, either way."""
        return boxes

    def predicted(self, maps: dict[str, Tensor], index: Tensor) -> Tensor:
        """Regression rows [B, K, D] at cells [B, K]."""
        return torch.cat([gather_cells(maps[name], index) for name in self.regression], -1)

    def loss(self, maps: dict[str, Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Losses by name, weights applied, and their sum under "loss"."""
        goal = self.targets(targets, maps[self.heat_name].shape[2:])
        losses = {"loss_heatmap": gaussian_focal_loss(maps[self.heat_name], goal.heatmap)}
        rows = self.predicted(maps, goal.index)
        losses |= self._box_losses(rows, gather_cells(maps["iou"], goal.index)[..., 0], goal)
        return {**losses, "loss": sum(losses.values())}

    def _box_losses(self, rows: Tensor, iou: Tensor, goal: CenterTargets) -> dict[str, Tensor]:
        raise NotImplementedError

    def _iou(self, found: Tensor, goal: CenterTargets, z_bottom: bool) -> Tensor:
        """3D IoU [B, K] of found and true boxes [B, K, 7 or more] in the official rotation."""
        a, b = (self.public(x)[..., :7].flatten(0, 1) for x in (found, goal.boxes))
        iou = rotated_iou_3d(a, b, aligned=True, z_bottom=z_bottom).view(goal.mask.shape)
        # A size beyond float32 has no overlap.
        return iou.nan_to_num(0)

    @torch.no_grad()
    def decode(self, maps: dict[str, Tensor]) -> BatchDetections:
        """Boxes of a batch from raw maps, in tensors of fixed sizes and without waiting for the device."""
        scores, index, labels = self._candidates(maps)
        rows = self.predicted(maps, index)
        boxes = self.public(self.boxes(rows, index, maps[self.heat_name].shape[-1]))
        valid = (scores > self.score_threshold) & within(boxes[..., :3], self.limits)
        return self.nms(boxes, self._final_scores(scores, labels, maps, index), labels, valid)

    def _heat(self, maps: dict[str, Tensor]) -> Tensor:
        """Scores [B, C, H, W] by which candidates are chosen."""
        return maps[self.heat_name].float().sigmoid()

    def _candidates(self, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The best scores [B, N], their cells and their classes."""
        heat = self._heat(maps).flatten(2)  # [B, C, H * W]
        scores, order = heat.flatten(1).topk(min(self.max_candidates, heat[0].numel()))
        return scores, order % heat.shape[2], order // heat.shape[2]

    def _final_scores(self, scores: Tensor, labels: Tensor, maps: dict[str, Tensor], index: Tensor) -> Tensor:
        return scores


class _ConvNorm(nn.Module):
    """Convolution 3 x 3, batch norm, ReLU, under mmcv's names."""

    def __init__(self, channels: int, out_channels: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


def _init_branch(last: nn.Conv2d, bias: float) -> None:
    nn.init.kaiming_normal_(last.weight)
    nn.init.constant_(last.bias, bias)


class FlatFormerCenterHead(CenterHead):
    """The head of FlatFormer: `reg`, `height`, `dim`, `rot` (sine, cosine), `vel`, `iou`, `heatmap`.

    Args:
        in_channels: Channels of the map.
        channels: Channels within the head.
        **settings: See `CenterHead`.
    """

    regression = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
    heat_name = "heatmap"
    sine_first = True
    by_class = True

    def __init__(self, in_channels: int = 256, channels: int = 64, **settings) -> None:
        super().__init__(**settings)
        self.shared_conv = _ConvNorm(in_channels, channels, 1e-3, 0.01)
        # The published head does not pass its norm settings on to the branches.
        branches = {
            name: nn.Sequential(_ConvNorm(channels, channels, 1e-5, 0.1), nn.Conv2d(channels, out, 3, padding=1))
            for name, out in self.branches.items()
        }
        for name, branch in branches.items():
            nn.init.kaiming_normal_(branch[0].conv.weight)
            _init_branch(branch[1], HEAT_BIAS if name == self.heat_name else 0.0)
        self.task_heads = nn.ModuleList([nn.ModuleDict(branches)])
        weights = torch.tensor([1.0] * 8 + [0.0] * 2)  # velocities are not learned
        self.register_buffer("code_weights", weights, persistent=False)

    @property
    def branch_modules(self) -> nn.ModuleDict:
        return self.task_heads[0]

    def public(self, boxes: Tensor) -> Tensor:
        return torch.cat([boxes[..., :6], -boxes[..., 6:7], boxes[..., 7:]], -1)

    @staticmethod
    def official(boxes: Tensor) -> Tensor:
        """Boxes [..., 9] of `decode` as the official code gives them: yaw clockwise, z at the bottom."""
        x, y, z, dx, dy, dz, yaw, *velocity = boxes.unbind(-1)
        return torch.stack([x, y, z - dz / 2, dx, dy, dz, -yaw, *velocity], -1)

    def _place(self, place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        # Towards zero, so that a box up to a cell outside the first row or column is taken.
        cells = place.int()
        return place, ((cells >= 0) & (cells < cells.new_tensor(size[::-1]))).all(-1)

    def _box_losses(self, rows: Tensor, iou: Tensor, goal: CenterTargets) -> dict[str, Tensor]:
        mask, count = goal.mask.float(), goal.mask.sum() + 1e-4
        distance = ((rows - goal.rows).abs() * self.code_weights * mask[..., None]).sum()
        found = self.boxes(rows.detach(), goal.index, goal.heatmap.shape[-1])
        # The published code takes the centre's height for the bottom's, of both boxes.
        true_iou = self._iou(found, goal, z_bottom=True)
        return {
            "loss_bbox": 2 * distance / count,
            "loss_iou": ((iou - true_iou).abs() * mask).sum() / count,
        }

    def _heat(self, maps: dict[str, Tensor]) -> Tensor:
        return super()._heat(maps) * maps["iou"].float().clamp(0, 1).square()


class ScatterFormerCenterHead(CenterHead):
    """The head of ScatterFormer on Waymo: `center`, `center_z`, `dim`, `rot` (cosine, sine), `iou`, `hm`.

    Args:
        in_channels: Channels of the map.
        channels: Channels within the head.
        iou_power: Exponent a of the IoU in a class's scores, score^(1 - a) * iou^a.
        **settings: See `CenterHead`.
    """

    regression = {"center": 2, "center_z": 1, "dim": 3, "rot": 2}
    heat_name = "hm"
    sine_first = False
    by_class = False

    def __init__(self, in_channels: int = 128, channels: int = 64, *, iou_power: Sequence[float], **settings) -> None:
        super().__init__(**settings)
        if len(iou_power) != self.num_classes:
            raise ValueError(f"iou_power needs one value a class, got {len(iou_power)} for {self.num_classes} classes.")
        self.shared_conv = self._layer(in_channels, channels)
        branches = {
            name: nn.Sequential(self._layer(channels, channels), nn.Conv2d(channels, out, 3, padding=1))
            for name, out in self.branches.items()
        }
        for name, branch in branches.items():
            _init_branch(branch[1], HEAT_BIAS if name == self.heat_name else 0.0)
        self.heads_list = nn.ModuleList([nn.ModuleDict(branches)])
        self.register_buffer("iou_power", torch.tensor(iou_power, dtype=torch.float32), persistent=False)

    @staticmethod
    def _layer(channels: int, out_channels: int) -> nn.Sequential:
        conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True))

    @property
    def branch_modules(self) -> nn.ModuleDict:
        return self.heads_list[0]

    def _place(self, place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        # Boxes outside are pulled in.
        last = place.new_tensor(size[::-1]) - 0.5
        return torch.minimum(place.clamp(min=0), last), torch.isfinite(place).all(-1)

    def _box_losses(self, rows: Tensor, iou: Tensor, goal: CenterTargets) -> dict[str, Tensor]:
        mask, count = goal.mask.float(), goal.mask.sum().clamp(min=1)
        distance = ((rows - goal.rows).abs() * mask[..., None]).sum()
        found = self.boxes(rows, goal.index, goal.heatmap.shape[-1])
        true_iou = self._iou(found, goal, z_bottom=False)
        far = 1 - axis_aligned_diou(found, goal.boxes)
        return {
            "loss_bbox": 2 * distance / count,
            "loss_iou": ((iou - (2 * true_iou - 1)).abs() * mask).sum() / count,
            "loss_iou_reg": 2 * torch.where(goal.mask, far, 0).sum() / count,
        }

    def _final_scores(self, scores: Tensor, labels: Tensor, maps: dict[str, Tensor], index: Tensor) -> Tensor:
        iou = ((gather_cells(maps["iou"], index)[..., 0] + 1) / 2).clamp(0, 1)
        power = self.iou_power[labels]
        return scores ** (1 - power) * iou**power
