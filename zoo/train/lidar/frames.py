"""A LiDAR frame with its labelled boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Frame(NamedTuple):
    """One point cloud and what it shows.

    Attributes:
        points: [n, F] float32: x, y, z in metres, then what the sensor adds (tanh of intensity, ...).
        boxes: [k, 7] or [k, 9] float32: centre x, y, z, size along the heading, across it and upwards, yaw
            counter-clockwise from +x in radians[, velocity x, y in m/s].
        labels: [k] int64, 0-based.
    """

    points: Tensor
    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Frame:
        """The same frame on a device."""
        return Frame(*(t.to(device) for t in self))


def in_range(xyz: Tensor, point_range: Sequence[float]) -> Tensor:
    """Tell which places lie in a range (x, y, z minimum, then maximum): [n] bool.

    Args:
        xyz: [n, 3] or [n, 2]; of a place without height only x and y are tested.
        point_range: Six numbers, metres.
    """
    dims = xyz.shape[1]
    low, high = (xyz.new_tensor(list(point_range[i : i + dims])) for i in (0, 3))
    return ((xyz >= low) & (xyz < high)).all(1)


def crop_frame(frame: Frame, point_range: Sequence[float]) -> Frame:
    """Keep the points in a range, and the boxes whose centre lies in it seen from above."""
    kept = in_range(frame.boxes[:, :2], point_range)
    return Frame(frame.points[in_range(frame.points[:, :3], point_range)], frame.boxes[kept], frame.labels[kept])
