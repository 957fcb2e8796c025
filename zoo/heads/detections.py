"""What 3D detectors return and learn from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Detections(NamedTuple):
    """Boxes found in one sample, best first within each class.

    One convention holds for every detector: x forward, y left, z up (right-handed), metres, and yaw in radians
    counter-clockwise from +x to the side of length dx. Heads of another convention convert at their edge.

    Attributes:
        boxes: float32 [K, 7 or 9]: centre x, y, z, sizes dx, dy, dz, yaw, and velocity vx, vy (m/s) where the detector
            predicts it.
        scores: float32 [K] in [0, 1].
        labels: int64 [K], index into `detector.classes`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Targets(NamedTuple):
    """Ground truth of one sample, in the convention of `Detections`.

    Attributes:
        boxes: float32 [K, 7 or 9]; without velocities a detector that learns them takes zero.
        labels: int64 [K], index into `detector.classes`.
    """

    boxes: Tensor
    labels: Tensor
