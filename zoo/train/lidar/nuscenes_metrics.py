"""The nuScenes detection score: average precision by distance of centres, and the errors of what was found.

Follows the definition of the nuScenes detection task (arXiv:1903.11027): predictions match the nearest ground truth
of their class by distance of centres seen from above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.heads.detections import Detections, Targets
from zoo.train.lidar.metrics import _concatenate, angle_difference, assign_greedily

DISTANCES = (0.5, 1.0, 2.0, 4.0)
_ERROR_DISTANCE = 2.0
_LEAST_RECALL, _LEAST_PRECISION = 0.1, 0.1
_ERRORS = ("ate", "ase", "aoe", "ave")
# Metres from the sensor up to which a class is counted.
RANGES = {
    "car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50, "pedestrian": 40, "motorcycle": 40,
    "bicycle": 40, "traffic_cone": 30, "barrier": 30,
}  # fmt: skip
# Errors that have no meaning for a class.
_UNDEFINED = {"traffic_cone": ("aoe", "ave"), "barrier": ("ave",)}


class NuScenesDetectionScore(Metric):
    """Mean average precision, true positive errors and NDS.

    Differs from the official score in three ways. Detectors here predict no attributes, so that the attribute error
    counts as 1 and the NDS is a lower bound of the official one, by up to 0.1. Distances to the range limits are
    measured from the sensor and not from the vehicle. Bicycle racks and objects without points are not taken out:
    data modules give only objects with points.

    Args:
        classes: Names, in the order of the labels; those of `RANGES` are counted up to their range, others everywhere.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, classes: Sequence[str], **kwargs) -> None:
        super().__init__(**kwargs)
        self.classes = tuple(classes)
        for name in ("scores", "labels", "hits", "errors"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("truths", torch.zeros(len(self.classes), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Detections], targets: Sequence[Targets]) -> None:
        """Add samples.

        Args:
            predictions: Boxes found in each sample.
            targets: Ground truth of each; without velocity columns the velocity error is not measured.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} samples of ground truth")
        for found, truth in zip(predictions, targets, strict=True):
            kept = self._counted(truth.boxes, truth.labels)
            boxes, labels = truth.boxes[kept].float().cpu(), truth.labels[kept].cpu()
            self.truths += torch.bincount(labels, minlength=len(self.classes)).to(self.truths)
            self._add(found, boxes, labels)

    def _counted(self, boxes: Tensor, labels: Tensor) -> Tensor:
        limit = torch.tensor([RANGES.get(name, torch.inf) for name in self.classes], device=boxes.device)
        return boxes[:, :2].norm(dim=1) < limit[labels]

    def _add(self, found: Detections, truth: Tensor, truth_labels: Tensor) -> None:
        kept = self._counted(found.boxes, found.labels)
        scores, order = found.scores[kept].float().cpu().sort(descending=True, stable=True)
        boxes, labels = found.boxes[kept].float().cpu()[order], found.labels[kept].cpu()[order]
        closeness = -torch.cdist(boxes[:, :2], truth[:, :2], compute_mode="donot_use_mm_for_euclid_dist")
        closeness = torch.where(labels[:, None] == truth_labels, closeness, -torch.inf)
        taken = torch.stack([self._assign(closeness, -distance) for distance in DISTANCES], 1)
        errors = torch.full((len(boxes), len(_ERRORS)), torch.nan)
        hit = taken[:, DISTANCES.index(_ERROR_DISTANCE)]
        rows = hit >= 0
        errors[rows] = _box_errors(boxes[rows], truth[hit[rows]], self._half_turn(labels[rows]))
        device = self.truths.device
        for name, value in (("scores", scores), ("labels", labels), ("hits", taken >= 0), ("errors", errors)):
            getattr(self, name).append(value.to(device))

    def _assign(self, closeness: Tensor, least: float) -> Tensor:
        if not closeness.numel():
            return torch.full((len(closeness),), -1)
        # The limit itself is no match.
        return assign_greedily(closeness, torch.full((len(closeness),), math.nextafter(least, 0)))

    def _half_turn(self, labels: Tensor) -> Tensor:
        """Classes whose front and back look alike."""
        return torch.tensor([name == "barrier" for name in self.classes])[labels]

    def compute(self) -> dict[str, Tensor]:
        """`map`, `nds`, `ap/CLASS`, and the errors `mate` (m), `mase`, `maoe` (rad), `mave` (m/s); NaN if undefined."""
        scores, labels = _concatenate(self.scores), _concatenate(self.labels)
        hits, errors = _concatenate(self.hits), _concatenate(self.errors)
        precisions, class_errors = [], {name: [] for name in _ERRORS}
        for label, name in enumerate(self.classes):
            own = labels == label
            order = scores[own].argsort(descending=True, stable=True)
            truths = int(self.truths[label])
            hit = hits[own][order].double() if len(hits) else torch.zeros(0, len(DISTANCES), dtype=torch.float64)
            precisions.append(torch.stack([_precision(hit[:, i], truths) for i in range(len(DISTANCES))]).mean())
            found = hit[:, DISTANCES.index(_ERROR_DISTANCE)]
            for i, key in enumerate(_ERRORS):
                if key not in _UNDEFINED.get(name, ()) and truths:
                    own_errors = errors[own][order][:, i].double() if len(hits) else found
                    class_errors[key].append(_mean_error(own_errors, found, scores[own][order].double(), truths))
        means = {f"m{key}": _nanmean(values) for key, values in class_errors.items()}
        result = {f"ap/{name}": value for name, value in zip(self.classes, precisions, strict=True)}
        result["map"] = _nanmean(precisions)
        quality = sum(1 - torch.nan_to_num(value, nan=1.0).clamp(max=1) for value in means.values())
        return {**result, **means, "nds": (5 * result["map"] + quality) / 10}


def _nanmean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).nanmean() if values else torch.tensor(torch.nan, dtype=torch.float64)


def _box_errors(boxes: Tensor, truth: Tensor, half_turn: Tensor) -> Tensor:
    """Errors of place, size, heading and velocity of matched boxes, [n, 4]."""
    place = (boxes[:, :2] - truth[:, :2]).norm(dim=1)
    # Overlap of the boxes laid on each other.
    common = torch.minimum(boxes[:, 3:6], truth[:, 3:6]).prod(1)
    size = 1 - common / (boxes[:, 3:6].prod(1) + truth[:, 3:6].prod(1) - common)
    full, half = (angle_difference(boxes[:, 6], truth[:, 6], turn * math.pi) for turn in (2, 1))
    heading = torch.where(half_turn, half, full)
    velocity = torch.full_like(place, torch.nan)
    if boxes.shape[1] == 9 and truth.shape[1] == 9:
        velocity = (boxes[:, 7:9] - truth[:, 7:9]).norm(dim=1)
    return torch.stack([place, size, heading, velocity], 1)


def _recall_grid() -> Tensor:
    return torch.linspace(0, 1, 101, dtype=torch.float64)


def _interpolate(at: Tensor, x: Tensor, y: Tensor, right: float | None = None) -> Tensor:
    """Values at places `at` of the line through (x, y), x rising; beyond its end `right`, or the last value."""
    return torch.from_numpy(np.interp(at.numpy(), x.numpy(), y.numpy(), right=right))


def _precision(hit: Tensor, truths: int) -> Tensor:
    """Average of precision above 0.1 over recall above 0.1, rescaled to 0..1; NaN without ground truth."""
    if not truths:
        return torch.tensor(torch.nan, dtype=torch.float64)
    if not hit.sum():
        return torch.tensor(0.0, dtype=torch.float64)
    found = hit.cumsum(0)
    precision = found / torch.arange(1, len(hit) + 1, dtype=torch.float64)
    curve = _interpolate(_recall_grid(), found / truths, precision, right=0.0)
    first = round(100 * _LEAST_RECALL) + 1
    return (curve[first:] - _LEAST_PRECISION).clamp(min=0).mean() / (1 - _LEAST_PRECISION)


def _mean_error(errors: Tensor, hit: Tensor, scores: Tensor, truths: int) -> Tensor:
    """Mean over recall of the running mean of an error, from recall 0.1 to the highest; 1 if that is not reached."""
    found = hit.cumsum(0)
    highest = int(100 * float(found[-1]) / truths + 1e-9) if len(found) else 0
    first = round(100 * _LEAST_RECALL) + 1
    if highest < first:
        return torch.tensor(1.0, dtype=torch.float64)
    own, own_scores = errors[hit > 0], scores[hit > 0]
    if own.isnan().all():
        return torch.tensor(torch.nan, dtype=torch.float64)
    known = (~own.isnan()).double()
    running = torch.nan_to_num(own).cumsum(0) / known.cumsum(0).clamp(min=1)
    # From recall to score, and from score to the error of what scores higher.
    confidence = _interpolate(_recall_grid(), found / truths, scores, right=0.0)
    curve = _interpolate(confidence.flip(0), own_scores.flip(0), running.flip(0)).flip(0)
    return curve[first : highest + 1].mean()
