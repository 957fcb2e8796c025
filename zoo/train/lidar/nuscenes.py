"""nuScenes (arXiv:1903.11027) through its own devkit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.train.lidar.data import PointCloudDataModule, Range
from zoo.train.lidar.frames import Frame

CLASSES = (
    *("car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian"),
    "traffic_cone",
)


def _devkit() -> tuple[Any, Any, Any]:
    """The devkit's NuScenes class, its scene splits and its map of category names."""
    try:
        from nuscenes.eval.detection.utils import category_to_detection_name
        from nuscenes.nuscenes import NuScenes
        from nuscenes.utils.splits import create_splits_scenes
    except ImportError as error:
        raise ImportError("NuScenesData needs the devkit: pip install nuscenes-devkit") from error
    return NuScenes, create_splits_scenes, category_to_detection_name


def rotation_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """Rotation [3, 3] of a unit quaternion (w, x, y, z)."""
    w, x, y, z = np.asarray(quaternion, np.float64) / np.linalg.norm(quaternion)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def _pose(record: dict[str, Any]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation_matrix(record["rotation"]), record["translation"]
    return matrix


class NuScenesFrames(Sequence):
    """Key frames in the LiDAR's own frame (x right, y ahead), read when asked for.

    Args:
        nusc: The devkit's database.
        tokens: Tokens of the key frames' LiDAR data.
        sweeps: Scans put together, the newest being the key frame's.
    """

    def __init__(self, nusc: Any, tokens: Sequence[str], sweeps: int) -> None:
        self.nusc, self.tokens, self.sweeps = nusc, list(tokens), sweeps

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Frame:
        record = self.nusc.get("sample_data", self.tokens[index])
        boxes, labels = self.objects(index)
        return Frame(torch.from_numpy(self._points(record)), torch.from_numpy(boxes), torch.from_numpy(labels))

    def _to_world(self, record: dict[str, Any]) -> np.ndarray:
        """[4, 4] from the sensor at the time of a scan to the world."""
        vehicle = _pose(self.nusc.get("ego_pose", record["ego_pose_token"]))
        return vehicle @ _pose(self.nusc.get("calibrated_sensor", record["calibrated_sensor_token"]))

    def _points(self, record: dict[str, Any]) -> np.ndarray:
        """Points of the scans [n, 5]: x, y, z, intensity in 0..255 (as the official models take it), age in seconds."""
        from_world, now = np.linalg.inv(self._to_world(record)), record["timestamp"]
        parts = []
        for _ in range(self.sweeps):
            raw = np.fromfile(Path(self.nusc.dataroot) / record["filename"], "<f4").reshape(-1, 5)
            # The vehicle itself.
            raw = raw[(np.abs(raw[:, 0]) >= 1) | (np.abs(raw[:, 1]) >= 1)]
            motion = from_world @ self._to_world(record)
            points = np.empty_like(raw)
            points[:, :3] = raw[:, :3] @ motion[:3, :3].T + motion[:3, 3]
            points[:, 3] = raw[:, 3]
            points[:, 4] = (now - record["timestamp"]) * 1e-6
            parts.append(points)
            if not record["prev"]:
                break
            record = self.nusc.get("sample_data", record["prev"])
        return np.concatenate(parts)

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [k, 9] and labels of a key frame; objects without points are left out."""
        _, _, detection_name = _devkit()
        record = self.nusc.get("sample_data", self.tokens[index])
        to_world = self._to_world(record)
        turn = to_world[:3, :3].T
        rows, labels = [], []
        for box in self.nusc.get_boxes(self.tokens[index]):
            name = detection_name(box.name)
            annotation = self.nusc.get("sample_annotation", box.token)
            if name is None or annotation["num_lidar_pts"] < 1:
                continue
            velocity = np.nan_to_num(self.nusc.box_velocity(box.token))
            centre = turn @ (np.asarray(box.center) - to_world[:3, 3])
            ahead = turn @ rotation_matrix(annotation["rotation"])[:, 0]
            width, length, height = box.wlh
            yaw = np.arctan2(ahead[1], ahead[0])
            rows.append([*centre, length, width, height, yaw, *(turn @ velocity)[:2]])
            labels.append(CLASSES.index(name))
        return np.array(rows, np.float32).reshape(-1, 9), np.array(labels, np.int64)


class _Balanced(Sequence):
    """Frames in a list of repeats."""

    def __init__(self, frames: Sequence[Frame], order: np.ndarray) -> None:
        self.frames, self.order = frames, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Frame:
        return self.frames[int(self.order[index])]


def balanced_order(labels: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Repeat frames so that every class is in equally many draws (class-balanced grouping, arXiv:1908.09492).

    Args:
        labels: Labels in each frame.
        classes: Number of classes.

    Returns:
        Indices of frames. Each class that occurs draws, with a fixed seed, the same number of its frames: a
        `classes`-th of the frames counted once for each class in them.
    """
    members = [np.array([i for i, own in enumerate(labels) if c in own], np.int64) for c in range(classes)]
    share = sum(len(own) for own in members) / classes
    rng = np.random.default_rng(0)
    draws = [rng.choice(own, max(1, round(share)), replace=len(own) < share) for own in members if len(own)]
    return np.concatenate(draws) if draws else np.arange(len(labels))


class NuScenesData(PointCloudDataModule):
    """nuScenes detection: ten classes, boxes with velocity, several scans put together.

    Args:
        root: The folder `dataroot` of the devkit.
        num_classes: Number of classes, 10.
        point_range: As in the base.
        version: Version folder: v1.0-trainval, or v1.0-mini.
        sweeps: Scans of a frame.
        balanced: Whether training repeats frames with rare classes (class-balanced grouping and sampling).
        **kwargs: Arguments of ``PointCloudDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 10,
        point_range: Range = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0),
        version: str = "v1.0-trainval",
        sweeps: int = 10,
        balanced: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(num_classes=num_classes, point_range=point_range, **kwargs)
        self.save_hyperparameters(ignore=["augmentation"])
        self.class_names = CLASSES

    def load_splits(self) -> dict[str, Sequence[Frame]]:
        """Open the database and list the key frames of the official splits."""
        NuScenes, scene_splits, _ = _devkit()
        hparams = self.hparams
        if not (Path(hparams.root) / hparams.version).is_dir():
            raise FileNotFoundError(
                f"{hparams.root} has no folder {hparams.version}: no nuScenes of this version there"
            )
        nusc = NuScenes(version=hparams.version, dataroot=hparams.root, verbose=False)
        scenes, prefix = scene_splits(), "mini_" if hparams.version.endswith("mini") else ""
        splits: dict[str, Sequence[Frame]] = {}
        for name in ("train", "val"):
            members = set(scenes[prefix + name])
            tokens = [
                sample["data"]["LIDAR_TOP"]
                for sample in nusc.sample
                if nusc.get("scene", sample["scene_token"])["name"] in members
            ]
            splits[name] = NuScenesFrames(nusc, tokens, hparams.sweeps)
        if hparams.balanced:
            frames = splits["train"]
            order = balanced_order([frames.objects(i)[1] for i in range(len(frames))], len(CLASSES))
            splits["train"] = _Balanced(frames, order)
        return splits
