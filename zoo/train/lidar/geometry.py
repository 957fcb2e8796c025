"""Boxes seen from above: corners, overlap, points inside."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def corners_bev(boxes: np.ndarray) -> np.ndarray:
    """Corners of boxes seen from above, counter-clockwise from the front left.

    Args:
        boxes: [k, 7 or more]: x, y, z, dx, dy, dz, yaw.

    Returns:
        [k, 4, 2].
    """
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = signs * boxes[:, None, 3:5]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return np.stack([x, y], -1) + boxes[:, None, :2]


def overlap_bev(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tell which boxes overlap seen from above, by the separating axis theorem.

    Args:
        a: [n, 7 or more].
        b: [m, 7 or more].

    Returns:
        [n, m] bool. Boxes that only touch do not overlap.
    """
    corners = corners_bev(a), corners_bev(b)
    apart = np.zeros((len(a), len(b)), bool)
    for owner, boxes in enumerate((a, b)):
        for turn in (0.0, np.pi / 2):
            # [k, 2]: an edge direction of each box of the owner.
            axes = np.stack([np.cos(boxes[:, 6] + turn), np.sin(boxes[:, 6] + turn)], -1)
            own = np.einsum("kcd,kd->kc", corners[owner], axes)
            other = np.einsum("mcd,kd->kmc", corners[1 - owner], axes)
            # [k, m]
            gap = (own.max(1)[:, None] <= other.min(2)) | (own.min(1)[:, None] >= other.max(2))
            apart |= gap if owner == 0 else gap.T
    return ~apart


def first_fit(boxes: np.ndarray) -> np.ndarray:
    """Keep each box that overlaps none of those kept before it: [k] bool.

    Args:
        boxes: [k, 7 or more], in order of precedence.
    """
    overlap = overlap_bev(boxes, boxes)
    kept = np.zeros(len(boxes), bool)
    for i in range(len(boxes)):
        kept[i] = not (overlap[i] & kept).any()
    return kept


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Tell which points lie in which boxes.

    Args:
        points: [n, 3 or more].
        boxes: [k, 7 or more], on the same device.

    Returns:
        [n, k] bool.
    """
    # [n, k, 3]
    offset = points[:, None, :3] - boxes[None, :, :3]
    cos, sin = torch.cos(boxes[:, 6]), torch.sin(boxes[:, 6])
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    half = boxes[:, 3:6] / 2
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1]) & (offset[..., 2].abs() <= half[:, 2])
