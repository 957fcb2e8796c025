"""Random changes of a LiDAR frame: mirrored, turned, scaled, shifted, objects pasted in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoo.train.lidar.frames import Frame, crop_frame

if TYPE_CHECKING:
    from zoo.train.lidar.database import ObjectDatabase


@dataclass(frozen=True)
class LidarAugmentation:
    """Settings of the random changes of a training frame, all of points and boxes together.

    Attributes:
        flip_x: Probability of mirroring y, across the x axis.
        flip_y: Probability of mirroring x, across the y axis.
        rotation: Largest turn about the vertical axis, degrees.
        scale: Smallest and largest factor of all lengths.
        translation: Standard deviation of a shift along each axis, metres.
        paste: Objects of each class that a frame is filled up to with those of other frames, by class name.
        paste_min_points: Pasted objects have at least so many points, by class name (5 where not named).
        paste_off_epochs: Last epochs of a training without pasted objects.
    """

    flip_x: float = 0.5
    flip_y: float = 0.5
    rotation: float = 45.0
    scale: tuple[float, float] = (0.95, 1.05)
    translation: float = 0.0
    paste: dict[str, int] | None = None
    paste_min_points: dict[str, int] | None = None
    paste_off_epochs: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.flip_x <= 1 and 0 <= self.flip_y <= 1):
            raise ValueError(f"flip_x and flip_y are probabilities, got {self.flip_x} and {self.flip_y}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (smallest, largest) factor above 0, got {self.scale}")
        unknown = set(self.paste_min_points or {}) - set(self.paste or {})
        if unknown:
            raise ValueError(f"paste_min_points names classes that are not in paste: {', '.join(sorted(unknown))}")

    def draw(self, rng: np.random.Generator) -> Motion:
        """Draw one change of a frame."""
        mirror = (-1.0 if rng.random() < self.flip_y else 1.0, -1.0 if rng.random() < self.flip_x else 1.0)
        angle = math.radians(self.rotation) * rng.uniform(-1, 1)
        shift = tuple(float(s) for s in rng.normal(0, 1, 3) * self.translation)
        return Motion(mirror, angle, float(rng.uniform(*self.scale)), shift)


@dataclass(frozen=True)
class Motion:
    """A similarity of space: mirror, then turn about the vertical axis, then scale, then shift.

    Attributes:
        mirror: Signs of x and y.
        angle: Turn, radians counter-clockwise.
        scale: Factor of all lengths.
        shift: Metres, x, y, z.
    """

    mirror: tuple[float, float] = (1.0, 1.0)
    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def _turn(self, xy: Tensor) -> Tensor:
        """Mirror, turn and scale vectors [n, 2]."""
        cos, sin = math.cos(self.angle) * self.scale, math.sin(self.angle) * self.scale
        mx, my = self.mirror
        x, y = xy[:, 0] * mx, xy[:, 1] * my
        return torch.stack([x * cos - y * sin, x * sin + y * cos], 1)

    def _place(self, xyz: Tensor) -> Tensor:
        return torch.cat([self._turn(xyz[:, :2]), xyz[:, 2:] * self.scale], 1) + xyz.new_tensor(self.shift)

    def __call__(self, frame: Frame) -> Frame:
        """Apply to points and boxes (velocities turn and scale with them)."""
        points, boxes, labels = frame
        points = torch.cat([self._place(points[:, :3]), points[:, 3:]], 1)
        mx, my = self.mirror
        # Heading of a mirrored box: mirroring y turns yaw around, mirroring x turns it about the y axis.
        yaw = boxes[:, 6] * (mx * my) + (math.pi if mx < 0 else 0.0) + self.angle
        columns = [self._place(boxes[:, :3]), boxes[:, 3:6] * self.scale, wrap_angle(yaw)[:, None]]
        if boxes.shape[1] == 9:
            columns.append(self._turn(boxes[:, 7:9]))
        return Frame(points, torch.cat(columns, 1), labels)


def wrap_angle(angle: Tensor) -> Tensor:
    """Bring angles in radians to [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def augment(
    frame: Frame,
    settings: LidarAugmentation,
    rng: np.random.Generator,
    point_range: Sequence[float],
    database: ObjectDatabase | None = None,
) -> Frame:
    """Paste objects, move everything at random, and keep what lies in range.

    Args:
        frame: On any device.
        settings: What may happen.
        rng: Source of every draw.
        point_range: As in `zoo.train.lidar.frames.in_range`.
        database: Objects to paste; None pastes none.
    """
    if database is not None and settings.paste:
        frame = database.paste(frame, settings.paste, rng)
    return crop_frame(settings.draw(rng)(frame), point_range)
