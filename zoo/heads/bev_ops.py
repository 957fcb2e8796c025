"""What the heads on bird's-eye-view maps share: Gaussian targets, focal loss, box distances, suppression by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.heads.detections import Detections, Targets
from zoo.kernels.rotated_iou import rectangles, rotated_nms


class Grid(NamedTuple):
    """Cells of a map: the first cell begins at `origin`."""

    origin: tuple[float, float]  # x, y, metres
    cell: tuple[float, float]  # metres


class BatchDetections(NamedTuple):
    """Boxes of a batch in tensors whose sizes do not depend on what is found.

    Attributes:
        boxes: [B, K, 7 or 9], zero beyond `count`.
        scores: [B, K].
        labels: int64 [B, K].
        count: int32 [B].
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor

    def split(self) -> list[Detections]:
        """One `Detections` a sample; reads the counts, which waits for the device."""
        parts = zip(*self[:3], self.count.tolist(), strict=True)
        return [Detections(boxes[:n], scores[:n], labels[:n]) for boxes, scores, labels, n in parts]


class Objects(NamedTuple):
    """Targets of a batch in one list. M objects.

    Attributes:
        boxes: float32 [M, 9]; velocities are zero where they were not given.
        labels: int64 [M].
        sample: int64 [M].
        slot: int64 [M], number within the sample.
        slots: Number of slots of a sample.
    """

    boxes: Tensor
    labels: Tensor
    sample: Tensor
    slot: Tensor
    slots: int


def gather_objects(targets: Sequence[Targets], device: torch.device, num_classes: int, by_class: bool) -> Objects:
    """Concatenate the targets of a batch, in their order, or class by class within a sample.

    Raises:
        ValueError: Boxes without 7 or 9 columns, or labels that do not fit.
    """
    boxes, labels = [], []
    for i, (box, label) in enumerate(targets):
        if box.dim() != 2 or box.shape[1] not in (7, 9) or label.shape != box.shape[:1]:
            raise ValueError(
                f"targets of sample {i} must be boxes [K, 7 or 9] and labels [K], "
                f"got {tuple(box.shape)} and {tuple(label.shape)}."
            )
        box = box.to(device, torch.float32)
        boxes.append(torch.nn.functional.pad(box, (0, 9 - box.shape[1])))
        labels.append(label.to(device, torch.int64))
    counts = [len(box) for box in boxes]
    boxes, labels = (torch.cat(parts) if parts else None for parts in (boxes, labels))
    if not counts:
        raise ValueError("targets of no sample were given.")
    sample = torch.arange(len(counts), device=device).repeat_interleave(
        torch.tensor(counts, device=device), output_size=sum(counts)
    )
    if by_class:
        order = (sample * num_classes + labels).argsort(stable=True)
        boxes, labels = boxes[order], labels[order]
    first = torch.tensor(counts, device=device).cumsum(0) - torch.tensor(counts, device=device)
    slot = torch.arange(sum(counts), device=device) - first[sample]
    return Objects(boxes, labels, sample, slot, max(counts))


def gaussian_radius(width: Tensor, length: Tensor, overlap: float) -> Tensor:
    """Radius within which a box's corners may move while the overlap with it stays above `overlap`.

    As published with CornerNet, arXiv:1808.01244, in the form of which the roots are not divided by 2a.
    """
    b, area = width + length, width * length
    c = area * (1 - overlap) / (1 + overlap)
    both_inside = (b + (b * b - 4 * c).sqrt()) / 2
    b = 2 * (width + length)
    one_inside = (b + (b * b - 16 * (1 - overlap) * area).sqrt()) / 2
    b = -overlap * b
    both_outside = (b + (b * b - 16 * overlap * (overlap - 1) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(both_inside, one_inside), both_outside)


def draw_gaussians(shape: tuple[int, int, int, int], channel: Tensor, cells: Tensor, radius: Tensor) -> Tensor:
    """Maps [B, C, H, W] with a Gaussian of the given radius at each object, the largest where they overlap.

    Args:
        shape: B, C, H, W.
        channel: int64 [M], sample * C + class; negative for none.
        cells: int64 [M, 2], column and row.
        radius: int64 [M], cells; the standard deviation is a sixth of the diameter 2 * radius + 1.
    """
    heat = torch.zeros(shape, device=cells.device)
    if len(cells) == 0:
        return heat
    B, C, H, W = shape
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=cells.device)
    x, y = cells[:, 0, None] + step, cells[:, 1, None] + step  # [M, S]
    sigma = (2 * radius + 1).float() / 6
    weight = torch.exp(-step.float().square() / (2 * sigma[:, None].square()))
    weight = torch.where(step.abs() <= radius[:, None], weight, 0)
    value = weight[:, :, None] * weight[:, None, :]  # [M, S, S], rows first
    inside = ((y >= 0) & (y < H))[:, :, None] & ((x >= 0) & (x < W))[:, None, :] & (channel >= 0)[:, None, None]
    index = (channel[:, None, None] * H + y[:, :, None]) * W + x[:, None, :]
    # The largest of several; what lies outside adds zero to the first cell.
    heat.view(-1).scatter_reduce_(0, torch.where(inside, index, 0).flatten(), (value * inside).flatten(), "amax")
    return heat


def gaussian_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of a heat map, divided by the number of its peaks (cells of 1), at least one.

    CornerNet, arXiv:1808.01244, equation 1 with alpha = 2 and beta = 4; probabilities are kept off 0 and 1 by 1e-4.
    """
    p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    positive = -p.log() * (1 - p).square() * peak
    negative = -(1 - p).log() * p.square() * (1 - target).pow(4) * ~peak
    return (positive.sum() + negative.sum()) / peak.sum().clamp(min=1)


def axis_aligned_diou(a: Tensor, b: Tensor) -> Tensor:
    """Distance IoU (arXiv:1911.08287) of pairs of boxes [..., 7] taken as unrotated: [...]."""
    low_a, high_a = a[..., :3] - a[..., 3:6] / 2, a[..., :3] + a[..., 3:6] / 2
    low_b, high_b = b[..., :3] - b[..., 3:6] / 2, b[..., :3] + b[..., 3:6] / 2
    inter = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = a[..., 3:6].prod(-1) + b[..., 3:6].prod(-1) - inter
    diagonal = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).square().sum(-1)
    distance = (a[..., :3] - b[..., :3]).square().sum(-1)
    return (inter / union.clamp(min=1e-6) - distance / diagonal.clamp(min=1e-6)).clamp(-1, 1)


def gather_cells(feature: Tensor, index: Tensor) -> Tensor:
    """Rows of a map [B, C, H, W] at cells y * W + x, int64 [B, K]: float32 [B, K, C]."""
    return feature.flatten(2).gather(2, index[:, None].expand(-1, feature.shape[1], -1)).transpose(1, 2).float()


def within(points: Tensor, limits: Tensor) -> Tensor:
    """Whether points [..., 3] lie in the range (x0, y0, z0, x1, y1, z1), borders included."""
    return ((points >= limits[:3]) & (points <= limits[3:])).all(-1)


class ClassNMS(torch.nn.Module):
    """Rotated suppression within each class, then the classes' results one after the other, best first.

    Args:
        threshold: Intersection over union above which the box of the lower score goes, for each class; a value of 1
            or more keeps every box.
        before: Only the best so many of a class take part.
        after: At most so many of a class are kept.
    """

    def __init__(self, threshold: Sequence[float], before: Sequence[int], after: Sequence[int]) -> None:
        super().__init__()
        if not len(threshold) == len(before) == len(after):
            raise ValueError(
                f"threshold, before and after need one value a class, got {len(threshold)}, {len(before)}, {len(after)}"
            )
        # Buffers, so that nothing is copied to the device while a CUDA graph is captured.
        for name, values in (("threshold", threshold), ("before", before), ("after", after)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.largest_input, self.largest_output, self.total = max(before), max(after), sum(after)

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> BatchDetections:
        """Suppress candidates.

        Args:
            boxes: [B, N, 7 or 9], yaw counter-clockwise.
            scores: [B, N].
            labels: int64 [B, N].
            valid: bool [B, N]; the others are absent.
        """
        (B, N), C = scores.shape, len(self.threshold)
        own = valid[:, None] & (labels[:, None] == torch.arange(C, device=labels.device)[:, None])
        own_scores = torch.where(own, scores[:, None], -torch.inf)  # [B, C, N]
        flat = rectangles(boxes).float()[:, None].expand(B, C, N, 5)
        index, count = rotated_nms(
            flat,
            own_scores,
            self.threshold.expand(B, C),
            max_output=min(N, self.largest_output),
            limit=self.largest_input,
            group_limit=self.before.expand(B, C),
        )
        return self._join(boxes, scores, labels, index, torch.minimum(count, self.after))

    def _join(self, boxes: Tensor, scores: Tensor, labels: Tensor, index: Tensor, count: Tensor) -> BatchDetections:
        """Put the classes' results [B, C, K] one after the other."""
        size = min(self.total, boxes.shape[1])
        place = torch.arange(index.shape[2], device=index.device)
        first = count.cumsum(-1) - count
        # One place more takes what lies beyond the counts.
        target = torch.where(place < count[..., None], first[..., None] + place, size).flatten(1)
        kept = index.new_zeros(len(index), size + 1).scatter_(1, target, index.flatten(1))[:, :size]
        total = count.sum(-1, dtype=torch.int32)
        present = torch.arange(size, device=index.device) < total[:, None]
        boxes = boxes.gather(1, kept[..., None].expand(-1, -1, boxes.shape[-1])) * present[..., None]
        return BatchDetections(boxes, scores.gather(1, kept) * present, labels.gather(1, kept) * present, total)
