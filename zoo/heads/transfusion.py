"""TransFusion head on a bird's-eye-view map, LiDAR only, with local cross-attention, as ScatterFormer uses it.

TransFusion: Robust LiDAR-Camera Fusion for 3D Object Detection with Transformers, arXiv:2203.11496; ScatterFormer,
arXiv:2401.00912. The cells of the highest scores become proposals; each attends to the cells around it (one decoder
layer) and gives one box. Boxes are matched to the ground truth by the Hungarian algorithm.

A proposal forms a batch of its own in the published code, hence "self-attention" sees a single token and proposals do
not exchange anything; this is kept, because the weights were trained so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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

BRANCHES = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}
# Weights of the losses and of the costs of matching.
LOSS_WEIGHTS = {"bbox": 0.25, "iou": 0.5, "iou_reg": 0.5}
COSTS = {"class": 0.15, "distance": 0.25, "iou": 0.25}
GAMMA, ALPHA = 2.0, 0.25
OVERLAP, MIN_RADIUS = 0.1, 2
HEAT_BIAS = -2.19


class TransFusionTargets(NamedTuple):
    """Targets of a batch. P proposals a sample.

    Attributes:
        heatmap: [B, C, H, W].
        labels: int64 [B, P], C for no object.
        rows: [B, P, 10] regression targets, zero where unmatched.
        boxes: [B, P, 7], the matched boxes.
        matched: bool [B, P].
    """

    heatmap: Tensor
    labels: Tensor
    rows: Tensor
    boxes: Tensor
    matched: Tensor


class PositionEmbedding(nn.Module):
    """Positions in cells to channels: convolution, batch norm, ReLU, convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Conv1d(2, channels, 1), nn.BatchNorm1d(channels), nn.ReLU(inplace=True), nn.Conv1d(channels, channels, 1)
        )

    def forward(self, positions: Tensor, weight: Tensor | None = None) -> Tensor:
        """[N, 2] -> [N, C]; a position counts `weight` [N] times in the statistics of training."""
        first, norm, activate, last = self.position_embedding_head
        x = F.linear(positions, first.weight[..., 0], first.bias)
        x = norm(x) if weight is None or not self.training else _weighted_norm(norm, x, weight)
        return F.linear(activate(x), last.weight[..., 0], last.bias)


def _weighted_norm(norm: nn.BatchNorm1d, x: Tensor, weight: Tensor) -> Tensor:
    """Batch norm in training of rows [N, C] that occur `weight` [N] times, without repeating them."""
    x, total = x.float(), weight.sum()
    share = (weight / total)[:, None]
    mean = (x * share).sum(0)
    variance = ((x - mean).square() * share).sum(0)
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * total / (total - 1).clamp(min=1), norm.momentum)
    return (x - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias


class DecoderLayer(nn.Module):
    """Attention of each proposal to the cells around it, with post-norms.

    Args:
        channels: Width.
        heads: Attention heads.
        ffn_channels: Hidden width of the feed-forward network.
        radius: Cells on each side of a proposal that it attends to.
        dropout: Rate of dropout.
    """

    def __init__(self, channels: int, heads: int, ffn_channels: int, radius: int, dropout: float) -> None:
        super().__init__()
        self.radius = radius
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(channels, ffn_channels), nn.Linear(ffn_channels, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.self_posembed, self.cross_posembed = PositionEmbedding(channels), PositionEmbedding(channels)
        for parameter in (self.self_attn.in_proj_weight, self.multihead_attn.in_proj_weight):
            nn.init.xavier_uniform_(parameter)

    def forward(self, query: Tensor, cells: Tensor, feature: Tensor) -> Tensor:
        """Update proposals.

        Args:
            query: [B, P, C].
            cells: int64 [B, P], y * W + x of each proposal.
            feature: [B, C, H, W].
        """
        W = feature.shape[-1]
        place = torch.stack([cells % W, torch.div(cells, W, rounding_mode="floor")], -1)  # [B, P, 2], x and y
        position = self.self_posembed((place + 0.5).to(query.dtype).flatten(0, 1)).view(query.shape)
        query = self.norm1(query + self.dropout(self._attend_itself(query + position)))
        query = self.norm2(query + self.dropout(self._attend_around(query + position, place, feature)))
        hidden = self.dropout(F.relu(self.linear1(query)))
        return self.norm3(query + self.dropout(self.linear2(hidden)))

    def _attend_itself(self, x: Tensor) -> Tensor:
        """Attention of a token to itself alone: the softmax is one, or zero where dropped out."""
        C, attention = x.shape[-1], self.self_attn
        value = F.linear(x, attention.in_proj_weight[2 * C :], attention.in_proj_bias[2 * C :])
        one = F.dropout(x.new_ones(*x.shape[:-1], attention.num_heads, 1), attention.dropout, self.training)
        value = (value.unflatten(-1, (attention.num_heads, -1)) * one).flatten(-2)
        return attention.out_proj(value)

    def _attend_around(self, query: Tensor, place: Tensor, feature: Tensor) -> Tensor:
        """Cells outside the map are replaced by the nearest on its border, as often as they occur."""
        (B, C, H, W), P, attention = feature.shape, query.shape[1], self.multihead_attn
        step = torch.arange(-self.radius, self.radius + 1, device=query.device)
        x = (place[..., 0, None] + step).clamp(0, W - 1)  # [B, P, S]
        y = (place[..., 1, None] + step).clamp(0, H - 1)
        index = (y[..., :, None] * W + x[..., None, :]).flatten(2)  # [B, P, S * S]
        key, value = self._keys(feature, index)
        sample = torch.arange(B, device=index.device)[:, None, None] * (H * W)
        index = (index + sample).flatten(0, 1)  # [B * P, S * S]
        # A cell is projected once, not once for each proposal that sees it.
        key, value = (z[index].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for z in (key, value))
        query = F.linear(query, attention.in_proj_weight[:C], attention.in_proj_bias[:C])
        query = query.reshape(B * P, 1, attention.num_heads, -1).transpose(1, 2)  # [B * P, M, 1, D]
        dropout = attention.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return attention.out_proj(out.reshape(B, P, C))

    def _keys(self, feature: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B * H * W, C] of all cells; `index` [B, P, L] says which are seen how often."""
        (_, C, H, W), attention = feature.shape, self.multihead_attn
        cells = torch.arange(H * W, device=feature.device)
        place = torch.stack([cells % W, torch.div(cells, W, rounding_mode="floor")], -1) + 0.5
        weight = None
        if self.training:
            seen = index.flatten()
            weight = place.new_zeros(H * W).index_add_(0, seen, place.new_ones(()).expand(len(seen)))
        position = self.cross_posembed(place.to(feature.dtype), weight)  # [H * W, C]
        memory = feature.flatten(2).transpose(1, 2) + position
        projected = F.linear(memory, attention.in_proj_weight[C:], attention.in_proj_bias[C:])
        return projected.flatten(0, 1).chunk(2, -1)


class _HeatConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class TransFusionHead(nn.Module):
    """Proposals from a heat map, refined by attention to the map around them.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        grid: Cells of the map.
        extent: Range of the point cloud, (x0, y0, z0, x1, y1, z1) metres.
        limits: Boxes with a centre outside this range are dropped.
        nms: Suppression.
        small: Classes whose objects cover about one cell: their heat is not suppressed beside a higher one.
        num_proposals: Proposals, P.
        radius: Cells on each side of a proposal that it attends to.
        channels: Width of the head.
        heads: Attention heads.
        ffn_channels: Hidden width of the feed-forward network.
        dropout: Rate of dropout.
        score_threshold: Boxes of at most this score, before the IoU corrects it, are dropped.
    """

    # Columns of a box.
    columns = 9

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        grid: Grid,
        extent: Sequence[float],
        limits: Sequence[float],
        nms: ClassNMS,
        *,
        small: Sequence[int] = (8, 9),
        num_proposals: int = 200,
        radius: int = 20,
        channels: int = 128,
        heads: int = 8,
        ffn_channels: int = 256,
        dropout: float = 0.1,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.grid, self.nms = num_classes, grid, nms
        self.num_proposals, self.score_threshold = num_proposals, score_threshold
        self.shared_conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.heatmap_head = nn.Sequential(_HeatConv(channels), nn.Conv2d(channels, num_classes, 3, padding=1))
        self.class_encoding = nn.Conv1d(num_classes, channels, 1)
        self.decoder = DecoderLayer(channels, heads, ffn_channels, radius, dropout)
        branches = {**BRANCHES, "heatmap": num_classes}
        self.prediction_head = nn.ModuleDict({name: _branch(channels, out) for name, out in branches.items()})
        for last in (self.heatmap_head[1], self.prediction_head["heatmap"][1]):
            nn.init.constant_(last.bias, HEAT_BIAS)
        constants = {
            "extent": torch.tensor(extent, dtype=torch.float32),
            "limits": torch.tensor(limits, dtype=torch.float32),
            "small": torch.tensor([c in small for c in range(num_classes)]),
            "code_weights": torch.tensor([1.0] * 8 + [0.2] * 2),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] -> raw predictions of the proposals by name, [B, channels, P], and what they came from:
        `dense_heatmap` logits [B, C, H, W], `query_heatmap_score` [B, C, P], `query_labels` and `query_cells` [B, P].
        """
        feature = self.shared_conv(x)
        logits = self.heatmap_head(feature)
        heat = self._peaks(logits.detach().float().sigmoid()).flatten(2)  # [B, C, H * W]
        order = heat.flatten(1).topk(min(self.num_proposals, heat[0].numel())).indices
        labels, cells = order // heat.shape[2], order % heat.shape[2]
        # [C', C, 1] -> a row of channels for each class; bias included.
        encoding = self.class_encoding.weight[..., 0].t()[labels] + self.class_encoding.bias
        query = gather_cells(feature, cells).to(feature.dtype) + encoding
        query = self.decoder(query, cells, feature).transpose(1, 2)  # [B, C, P]
        maps = {name: branch(query) for name, branch in self.prediction_head.items()}
        W = feature.shape[-1]
        place = torch.stack([cells % W, torch.div(cells, W, rounding_mode="floor")], 1) + 0.5  # [B, 2, P]
        maps["center"] = maps["center"].float() + place
        maps["query_heatmap_score"] = heat.gather(2, cells[:, None].expand(-1, heat.shape[1], -1))
        return {**maps, "dense_heatmap": logits, "query_labels": labels, "query_cells": cells}

    def _peaks(self, heat: Tensor) -> Tensor:
        """Heat that no neighbour exceeds; none on the border, but all of classes of small objects."""
        largest = F.pad(F.max_pool2d(heat, 3, 1), (1, 1, 1, 1))
        return torch.where((heat == largest) | self.small[:, None, None], heat, 0)

    def rows(self, maps: dict[str, Tensor]) -> Tensor:
        """[B, P, 10]: place in cells, height, log sizes, sine, cosine, velocity."""
        names = ("center", "height", "dim", "rot", "vel")
        return torch.cat([maps[name].float() for name in names], 1).transpose(1, 2)

    def boxes(self, rows: Tensor) -> Tensor:
        """Boxes [..., 9] of regression rows [..., 10]."""
        (x0, y0), (cx, cy) = self.grid
        x, y = rows[..., 0:1] * cx + x0, rows[..., 1:2] * cy + y0
        yaw = torch.atan2(rows[..., 6:7], rows[..., 7:8])
        return torch.cat([x, y, rows[..., 2:3], rows[..., 3:6].exp(), yaw, rows[..., 8:]], -1)

    def _encode(self, boxes: Tensor) -> Tensor:
        origin, cell = (boxes.new_tensor(x) for x in self.grid)
        yaw = boxes[:, 6:7]
        place = (boxes[:, :2] - origin) / cell
        return torch.cat([place, boxes[:, 2:3], boxes[:, 3:6].log(), yaw.sin(), yaw.cos(), boxes[:, 7:]], -1)

    @torch.no_grad()
    def targets(self, maps: dict[str, Tensor], targets: Sequence[Targets]) -> TransFusionTargets:
        """Match proposals with the ground truth, which runs on the CPU, and draw the heat map."""
        objects = gather_objects(targets, self.limits.device, self.num_classes, by_class=False)
        heatmap = self._heatmap(objects, maps["dense_heatmap"].shape)
        rows = self.rows(maps)
        (B, P, _), C = rows.shape, self.num_classes
        labels = torch.full((B, P), C, device=rows.device)
        goal, boxes = torch.zeros_like(rows), rows.new_zeros(B, P, 7)
        cost = self._costs(maps["heatmap"], self.boxes(rows), objects)
        for b, (cost_b, own) in enumerate(zip(cost, self._own(objects, B), strict=True)):
            proposal, truth = _hungarian(cost_b)
            found = own[truth]
            labels[b, proposal] = objects.labels[found]
            goal[b, proposal], boxes[b, proposal] = self._encode(objects.boxes[found]), objects.boxes[found, :7]
        return TransFusionTargets(heatmap, labels, goal, boxes, labels < C)

    def _own(self, objects: Objects, samples: int) -> list[Tensor]:
        """Positions of each sample's objects that can be learned."""
        labels, sizes = objects.labels, objects.boxes[:, 3:6]
        valid = (labels >= 0) & (labels < self.num_classes) & (sizes > 0).all(-1)
        return [((objects.sample == b) & valid).nonzero()[:, 0] for b in range(samples)]

    def _heatmap(self, objects: Objects, shape: torch.Size) -> Tensor:
        origin, cell = (objects.boxes.new_tensor(x) for x in self.grid)
        extent = objects.boxes[:, 3:5] / cell
        cells = ((objects.boxes[:, :2] - origin) / cell).int()
        inside = ((cells >= 0) & (cells < cells.new_tensor([shape[3], shape[2]])) & (extent > 0)).all(-1)
        inside &= (objects.labels >= 0) & (objects.labels < self.num_classes)
        radius = gaussian_radius(extent[:, 0], extent[:, 1], OVERLAP).nan_to_num(0).int().clamp(min=MIN_RADIUS)
        channel = torch.where(inside, objects.sample * self.num_classes + objects.labels, -1)
        return draw_gaussians(tuple(shape), channel, cells.long(), radius.long())

    def _costs(self, logits: Tensor, boxes: Tensor, objects: Objects) -> list[Tensor]:
        """Cost [P, K] of each pair of proposal and object, for each sample."""
        low, size = self.extent[:2], self.extent[3:5] - self.extent[:2]
        p = logits.float().sigmoid().transpose(1, 2)  # [B, P, C]
        negative = -(1 - p + 1e-12).log() * (1 - ALPHA) * p**GAMMA
        positive = -(p + 1e-12).log() * ALPHA * (1 - p) ** GAMMA
        focal, costs = positive - negative, []
        for b, own in enumerate(self._own(objects, len(boxes))):
            true = objects.boxes[own]
            distance = torch.cdist((boxes[b, :, :2] - low) / size, (true[:, :2] - low) / size, p=1)
            # The published code takes the centre's height for the bottom's, of both boxes.
            iou = rotated_iou_3d(boxes[b, :, :7], true[:, :7], z_bottom=True)
            cost = COSTS["class"] * focal[b][:, objects.labels[own]] + COSTS["distance"] * distance
            costs.append(cost - COSTS["iou"] * iou)
        return costs

    def loss(self, maps: dict[str, Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Losses by name, weights applied, their sum under "loss", and the mean IoU of matched boxes."""
        goal = self.targets(maps, targets)
        rows, count = self.rows(maps), goal.matched.sum().clamp(min=1)
        losses = {"loss_heatmap": gaussian_focal_loss(maps["dense_heatmap"], goal.heatmap)}
        losses["loss_cls"] = self._class_loss(maps["heatmap"], goal.labels) / count
        distance = ((rows - goal.rows).abs() * goal.matched[..., None] * self.code_weights).sum()
        losses["loss_bbox"] = LOSS_WEIGHTS["bbox"] * distance / count
        boxes = self.boxes(rows)[..., :7]
        iou = self._iou(boxes, goal, z_bottom=False)
        losses |= self._iou_losses(maps["iou"][:, 0].float(), iou, boxes, goal)
        return {**losses, "loss": sum(losses.values()), "matched_ious": self._matched_ious(boxes, goal)}

    def _iou(self, boxes: Tensor, goal: TransFusionTargets, z_bottom: bool) -> Tensor:
        """3D IoU [B, P] of proposals with the objects matched to them, else zero."""
        pairs = boxes.flatten(0, 1), goal.boxes.flatten(0, 1)
        iou = rotated_iou_3d(*pairs, aligned=True, z_bottom=z_bottom).view(goal.matched.shape)
        return torch.where(goal.matched, iou.nan_to_num(0), 0)

    def _matched_ious(self, boxes: Tensor, goal: TransFusionTargets) -> Tensor:
        """Mean over samples of the mean IoU that matching saw."""
        iou = self._iou(boxes, goal, z_bottom=True)
        return (iou.sum(1) / goal.matched.sum(1).clamp(min=1)).mean()

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        from torchvision.ops import sigmoid_focal_loss

        truth = F.one_hot(labels, self.num_classes + 1)[..., :-1]
        return sigmoid_focal_loss(logits.float().transpose(1, 2), truth.float(), ALPHA, GAMMA, "sum")

    def _iou_losses(self, predicted: Tensor, iou: Tensor, boxes: Tensor, goal: TransFusionTargets) -> dict[str, Tensor]:
        """Errors of the predicted IoU where boxes meet, and of boxes by their distance IoU where it is positive."""
        meet = goal.matched & (iou > 0)
        error = torch.where(meet, (predicted - (2 * iou - 1)).abs(), 0).sum() / meet.sum().clamp(min=1)
        near = axis_aligned_diou(boxes, goal.boxes)
        close = goal.matched & (near > 0)
        far = torch.where(close, 1 - near, 0).sum() / close.sum().clamp(min=1)
        return {"loss_iou": LOSS_WEIGHTS["iou"] * error, "loss_iou_reg": LOSS_WEIGHTS["iou_reg"] * far}

    @torch.no_grad()
    def decode(self, maps: dict[str, Tensor]) -> BatchDetections:
        """Boxes of a batch from raw predictions, in tensors of fixed sizes and without waiting for the device."""
        labels, boxes = maps["query_labels"], self.boxes(self.rows(maps))
        own = labels[:, None]
        scores = (
            maps["heatmap"].float().sigmoid().gather(1, own)[:, 0] * maps["query_heatmap_score"].gather(1, own)[:, 0]
        )
        valid = (scores > self.score_threshold) & within(boxes[..., :3], self.limits)
        iou = ((maps["iou"][:, 0].float() + 1) / 2).clamp(0, 1)
        return self.nms(boxes, scores.sqrt() * iou.sqrt(), labels, valid)


def _branch(channels: int, out_channels: int) -> nn.Sequential:
    hidden = 64
    first = nn.Sequential(nn.Conv1d(channels, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
    return nn.Sequential(first, nn.Conv1d(hidden, out_channels, 1))


def _hungarian(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the assignment of the least cost [P, K]."""
    from scipy.optimize import linear_sum_assignment

    # A box beyond float32 is matched last.
    rows, columns = linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())
    return tuple(torch.from_numpy(x).to(cost.device) for x in (rows, columns))
