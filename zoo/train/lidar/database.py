"""Objects cut out of labelled frames, to be pasted into others (ground-truth sampling, SECOND, Sensors 18(10):3337)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from zoo.train.lidar.frames import Frame
from zoo.train.lidar.geometry import first_fit, overlap_bev, points_in_boxes


class ObjectDatabase:
    """Boxes and the points inside them, by class.

    Args:
        classes: Names, in the order of the labels.
        boxes: [K, 7 or 9] float32.
        labels: [K] int64.
        points: All objects' points [N, F] float32, one object after the other.
        counts: [K] points of each object.
    """

    def __init__(
        self, classes: Sequence[str], boxes: np.ndarray, labels: np.ndarray, points: np.ndarray, counts: np.ndarray
    ) -> None:
        self.classes = tuple(classes)
        self.boxes, self.labels, self.points, self.counts = boxes, labels, points, counts
        self.starts = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def build(
        cls, frames: Iterable[Frame], classes: Sequence[str], min_points: dict[str, int] | None = None
    ) -> ObjectDatabase:
        """Cut every object out of labelled frames.

        Args:
            frames: Frames on the CPU.
            classes: Names, in the order of the labels.
            min_points: Objects with fewer points are left out, by class name (5 where not named).
        """
        least = np.array([(min_points or {}).get(name, 5) for name in classes])
        boxes, labels, points, counts = [], [], [], []
        for frame in frames:
            inside = points_in_boxes(frame.points, frame.boxes)
            for i, label in enumerate(frame.labels.tolist()):
                own = frame.points[inside[:, i]]
                if len(own) >= least[label]:
                    boxes.append(frame.boxes[i].numpy())
                    labels.append(label)
                    points.append(own.numpy())
                    counts.append(len(own))
        if not boxes:
            raise ValueError("no labelled object has enough points for the database of objects to paste")
        return cls(classes, np.stack(boxes), np.array(labels), np.concatenate(points), np.array(counts))

    def save(self, path: str | Path) -> None:
        """Write the database as one .npz file."""
        np.savez(
            path, classes=np.array(self.classes), boxes=self.boxes, labels=self.labels, points=self.points,
            counts=self.counts,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> ObjectDatabase:
        """Read a database that `save` has written."""
        with np.load(path, allow_pickle=False) as file:
            return cls(
                [str(name) for name in file["classes"]], file["boxes"], file["labels"], file["points"], file["counts"]
            )

    def paste(self, frame: Frame, wanted: dict[str, int], rng: np.random.Generator) -> Frame:
        """Fill a frame up with objects at their own places, where these overlap no other object.

        Points of the frame inside a pasted box make room for the object's own.

        Args:
            frame: Points must have the columns of the database's.
            wanted: Number of objects of each class to fill up to, by class name.
            rng: Source of the draws.

        Raises:
            ValueError: A class is unknown, or the numbers of columns differ.
        """
        if frame.points.shape[1] != self.points.shape[1] or frame.boxes.shape[1] != self.boxes.shape[1]:
            raise ValueError(
                f"objects of {self.points.shape[1]} point and {self.boxes.shape[1]} box columns cannot be pasted into "
                f"frames of {frame.points.shape[1]} and {frame.boxes.shape[1]}; build the database anew"
            )
        chosen = self._choose(frame, wanted, rng)
        present = frame.boxes.cpu().numpy()
        kept = _fitting(present, self.boxes[chosen])
        chosen = chosen[kept]
        if not len(chosen):
            return frame
        device = frame.points.device
        boxes = torch.from_numpy(self.boxes[chosen]).to(device)
        objects = [self.points[self.starts[i] : self.starts[i] + self.counts[i]] for i in chosen]
        free = ~points_in_boxes(frame.points, boxes).any(1)
        return Frame(
            torch.cat([frame.points[free], torch.from_numpy(np.concatenate(objects)).to(device)]),
            torch.cat([frame.boxes, boxes]),
            torch.cat([frame.labels, torch.from_numpy(self.labels[chosen]).to(device)]),
        )

    def _choose(self, frame: Frame, wanted: dict[str, int], rng: np.random.Generator) -> np.ndarray:
        present = torch.bincount(frame.labels, minlength=len(self.classes)).tolist()
        chosen = []
        for name, count in wanted.items():
            if name not in self.classes:
                raise ValueError(f"cannot paste objects of class {name!r}; classes: {', '.join(self.classes)}")
            label = self.classes.index(name)
            own = np.flatnonzero(self.labels == label)
            missing = min(max(0, count - present[label]), len(own))
            chosen.append(rng.choice(own, missing, replace=False))
        return np.concatenate([*chosen, np.zeros(0, np.int64)]).astype(np.int64)


def _fitting(present: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Which candidates overlap neither a present box nor an earlier candidate."""
    if not len(candidates):
        return np.zeros(0, bool)
    free = ~overlap_bev(candidates, present).any(1) if len(present) else np.ones(len(candidates), bool)
    free[free] = first_fit(candidates[free])
    return free
