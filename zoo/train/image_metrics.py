"""Average precision of boxes or masks in images by COCO's rule, on plain tensors.

For runs on machines without pycocotools; `zoo.train.image_detection` measures with torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

# COCO's thresholds of the IoU, recalls at which precision is read, and detections of an image that count.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
_MOST = 100


def mean_average_precision(
    found: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]], num_classes: int, masks: bool = False
) -> dict[str, float]:
    """Mean over classes that occur of the average precision at IoU 0.5 to 0.95, as COCO computes it.

    No crowds and no ranges of area.

    Args:
        found: For each image `boxes` `[N, 4]` or `masks` `[N, H, W]`, `scores` `[N]` and `labels` `[N]`.
        targets: For each image `boxes` or `masks`, and `labels`.
        num_classes: Number of classes.
        masks: Compare masks rather than boxes.

    Returns:
        `map`, `map_50` and `map_75`, of 1; NaN where no target has a class.
    """
    if len(found) != len(targets):
        raise ValueError(f"got results of {len(found)} images and targets of {len(targets)}")
    pairs = [_image(f, t, masks) for f, t in zip(found, targets, strict=True)]
    rows = [_class_precision(pairs, label) for label in range(num_classes)]
    rows = [row for row in rows if row is not None]
    # [T]
    means = np.mean(rows, 0) if rows else np.full(len(THRESHOLDS), np.nan)
    return {"map": float(means.mean()), "map_50": float(means[0]), "map_75": float(means[5])}


def _image(found: dict[str, Tensor], target: dict[str, Tensor], masks: bool) -> tuple[np.ndarray, ...]:
    """IoU `[N, G]`, scores, labels and true labels of an image."""
    overlap = _mask_iou(found["masks"], target["masks"]) if masks else box_iou(found["boxes"], target["boxes"])
    tensors = overlap, found["scores"], found["labels"], target["labels"]
    return tuple(x.detach().float().cpu().numpy() for x in tensors)


def _mask_iou(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1).float(), b.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def _class_precision(pairs: Sequence[tuple[np.ndarray, ...]], label: int) -> np.ndarray | None:
    """Average precision of a class at each threshold, None where no target has it."""
    scores, hits, total = [], [], 0
    for overlap, score, found, true in pairs:
        chosen = np.flatnonzero(found == label)
        chosen = chosen[np.argsort(-score[chosen], kind="stable")][:_MOST]
        wanted = np.flatnonzero(true == label)
        total += len(wanted)
        scores.append(score[chosen])
        hits.append(_match(overlap[np.ix_(chosen, wanted)]))
    if not total:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits = np.concatenate(hits, 1)[:, order]
    right, count = hits.cumsum(1), np.arange(1, hits.shape[1] + 1)
    recall, precision = right / total, right / count
    # The best precision at this recall or a greater one.
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    return np.array([_read(r, p) for r, p in zip(recall, precision, strict=True)])


def _match(overlap: np.ndarray) -> np.ndarray:
    """Whether each result, best first, takes a target that no better one took: `[N, G]` to `[T, N]`."""
    hits = np.zeros((len(THRESHOLDS), len(overlap)), bool)
    for t, threshold in enumerate(THRESHOLDS):
        free = overlap.copy()
        for i in range(len(overlap)):
            place = free[i].argmax() if free.shape[1] else -1
            if place >= 0 and free[i, place] >= threshold:
                hits[t, i] = True
                free[:, place] = -1
    return hits


def _read(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean precision at 101 recalls, 0 beyond the greatest one."""
    place = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(place, len(precision))].mean())


def confusion(found: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of pixels by true class and found class, `[K, K]` int64, of label maps of one shape; 255 is ignored."""
    seen = labels < num_classes
    return torch.bincount(num_classes * labels[seen] + found[seen], minlength=num_classes**2).view(num_classes, -1)


def mean_iou(counts: Tensor) -> float:
    """Mean IoU over the classes that occur, of the counts of `confusion`."""
    hits = counts.diag().double()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits / union)[union > 0].mean())
