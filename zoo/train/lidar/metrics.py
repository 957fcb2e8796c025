"""Average precision of 3D boxes by overlap, as KITTI and Waymo count it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.heads.detections import Detections, Targets
from zoo.kernels.rotated_iou import rotated_iou, rotated_iou_3d


class BoxAveragePrecision(Metric):
    """Average precision of each class at a threshold of intersection over union.

    A prediction counts if the ground truth box of its class that it overlaps most, among those that no better
    prediction has taken, overlaps it by the threshold or more. Weighted by heading, a hit counts by how well its yaw
    agrees (1 - error / pi), which is Waymo's APH.

    Args:
        classes: Names, in the order of the labels.
        thresholds: Threshold of each class; one number holds for all.
        view: Overlap of areas seen from above (bev) or of volumes (3d).
        points: Recalls at which precision is read: 11 (0, 0.1 ... 1), 40 (1/40 ... 1), or all (area below the curve).
            Precision at a recall is the highest at this recall or above.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(
        self,
        classes: Sequence[str],
        thresholds: float | Sequence[float],
        view: Literal["bev", "3d"] = "3d",
        points: Literal["11", "40", "all"] = "40",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.classes = tuple(classes)
        values = [thresholds] * len(self.classes) if isinstance(thresholds, (int, float)) else list(thresholds)
        if len(values) != len(self.classes):
            raise ValueError(f"{len(values)} thresholds for {len(self.classes)} classes")
        if not all(0 < value < 1 for value in values):
            raise ValueError(f"thresholds lie between 0 and 1, got {values}")
        if view not in ("bev", "3d") or points not in ("11", "40", "all"):
            raise ValueError(f"view must be 'bev' or '3d' and points '11', '40' or 'all', got {view!r} and {points!r}")
        self.thresholds, self.view, self.points = values, view, points
        for name in ("scores", "labels", "hits", "headings"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("truths", torch.zeros(len(self.classes), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Detections], targets: Sequence[Targets]) -> None:
        """Add samples.

        Args:
            predictions: Boxes found in each sample.
            targets: Ground truth of each.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} samples of ground truth")
        overlap = rotated_iou if self.view == "bev" else rotated_iou_3d
        for found, truth in zip(predictions, targets, strict=True):
            self.truths += torch.bincount(truth.labels, minlength=len(self.classes)).to(self.truths)
            order = found.scores.argsort(descending=True, stable=True)
            boxes, labels = found.boxes[order].float(), found.labels[order]
            taken = boxes.new_full((len(order),), -1, dtype=torch.long)
            if len(boxes) and len(truth.boxes):
                iou = overlap(boxes[:, :7].contiguous(), truth.boxes[:, :7].float().contiguous())
                iou = torch.where(labels[:, None] == truth.labels, iou, -1.0).cpu()
                least = torch.tensor(self.thresholds)[labels.cpu()]
                taken = assign_greedily(iou, least).to(boxes.device)
            hit = taken >= 0
            error = torch.zeros_like(found.scores[order], dtype=torch.float32)
            error[hit] = angle_difference(boxes[hit, 6], truth.boxes[taken[hit], 6].float())
            self.scores.append(found.scores[order].float())
            self.labels.append(labels)
            self.hits.append(hit)
            self.headings.append(1 - error / math.pi)

    def compute(self) -> dict[str, Tensor]:
        """Average precision in 0..1: `ap/CLASS`, `aph/CLASS` (weighted by heading), their means `map` and `maph`.

        A class without ground truth is NaN, and not part of the means.
        """
        scores, labels, hits, headings = (_concatenate(s) for s in (self.scores, self.labels, self.hits, self.headings))
        results: dict[str, list[Tensor]] = {"ap": [], "aph": []}
        for label in range(len(self.classes)):
            own = labels == label
            order = scores[own].argsort(descending=True, stable=True)
            hit = hits[own][order].double()
            truths = int(self.truths[label])
            for key, weight in (("ap", hit), ("aph", hit * headings[own][order].double())):
                results[key].append(average_precision(hit, weight, truths, self.points))
        named = {
            f"{k}/{name}": v for k, values in results.items() for name, v in zip(self.classes, values, strict=True)
        }
        return named | {f"m{k}": torch.stack(values).nanmean() for k, values in results.items()}


def _concatenate(state: list[Tensor] | Tensor) -> Tensor:
    if isinstance(state, Tensor):
        return state.cpu()
    return torch.cat(state).cpu() if state else torch.zeros(0)


def assign_greedily(closeness: Tensor, least: Tensor) -> Tensor:
    """Give each prediction, best first, the closest ground truth that is left.

    Args:
        closeness: [P, T], larger is closer, predictions in order of precedence.
        least: [P] closeness that a prediction needs.

    Returns:
        [P] int64, ground truth of each prediction, -1 for none.
    """
    left = closeness.clone()
    taken = torch.full((len(closeness),), -1, dtype=torch.long)
    for i in range(len(closeness)):
        best, column = left[i].max(0)
        if best >= least[i]:
            taken[i] = column
            left[:, column] = -torch.inf
    return taken


def angle_difference(a: Tensor, b: Tensor, period: float = 2 * math.pi) -> Tensor:
    """Smallest difference of angles that repeat after a period, radians, at least 0."""
    return (torch.remainder(a - b + period / 2, period) - period / 2).abs()


def average_precision(hits: Tensor, weights: Tensor, truths: int, points: str) -> Tensor:
    """Average precision of predictions in order of their scores.

    Args:
        hits: [P], 1 where a prediction is right.
        weights: [P], what a hit counts in precision; `hits` itself for the plain average precision.
        truths: Number of ground truth boxes.
        points: As in `BoxAveragePrecision`.

    Returns:
        Scalar float64, NaN without ground truth.
    """
    if truths == 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    if not len(hits):
        return torch.tensor(0.0, dtype=torch.float64)
    gain = weights.cumsum(0)
    rank = torch.arange(1, len(hits) + 1, dtype=torch.float64)
    recall, precision = hits.cumsum(0) / truths, gain / rank
    # Highest precision at this recall or above.
    precision = precision.flip(0).cummax(0).values.flip(0)
    if points == "all":
        return (torch.diff(recall, prepend=recall.new_zeros(1)) * precision).sum()
    steps = 10 if points == "11" else 40
    wanted = torch.arange(0 if points == "11" else 1, steps + 1, dtype=torch.float64) / steps
    # Recalls are ratios of whole numbers; the tolerance is far below the distance of two of them.
    first = torch.searchsorted(recall, wanted - 1e-9)
    return torch.nn.functional.pad(precision, (0, 1))[first.clamp(max=len(precision))].mean()
