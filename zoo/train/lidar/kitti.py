"""The KITTI object benchmark (CVPR 2012, "Are we ready for autonomous driving?"): files and coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from zoo.train.lidar.augment import wrap_angle
from zoo.train.lidar.data import PointCloudDataModule, Range, drop_sparse
from zoo.train.lidar.frames import Frame


class KittiCalibration(NamedTuple):
    """How a frame's sensors stand to each other.

    Attributes:
        lidar_to_camera: [4, 4], from the LiDAR's frame to that of the rectified camera.
        projection: [3, 4], from there to pixels of the left colour image.
    """

    lidar_to_camera: np.ndarray
    projection: np.ndarray


def read_calibration(path: str | Path) -> KittiCalibration:
    """Read a file of `calib/`.

    Raises:
        ValueError: A line is missing or has the wrong number of values.
    """
    lines = {}
    for line in Path(path).read_text().splitlines():
        key, _, values = line.partition(":")
        if values.strip():
            lines[key.strip()] = np.array([float(value) for value in values.split()])
    shapes = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}
    for key, shape in shapes.items():
        if key not in lines or lines[key].size != math.prod(shape):
            raise ValueError(f"{path} has no line '{key}:' of {math.prod(shape)} numbers")
    rectify, to_camera = np.eye(4), np.eye(4)
    rectify[:3, :3] = lines["R0_rect"].reshape(3, 3)
    to_camera[:3] = lines["Tr_velo_to_cam"].reshape(3, 4)
    return KittiCalibration(rectify @ to_camera, lines["P2"].reshape(3, 4))


def read_labels(path: str | Path, calibration: KittiCalibration) -> tuple[np.ndarray, list[str]]:
    """Read a file of `label_2/` and bring its boxes to the LiDAR's frame; "DontCare" is left out.

    Returns:
        Boxes [k, 7] float32 (`zoo.train.lidar.frames.Frame`), and their types.
    """
    rows, names = [], []
    for line in Path(path).read_text().splitlines():
        fields = line.split()
        if fields and fields[0] != "DontCare":
            if len(fields) < 15:
                raise ValueError(f"{path}: a label has 15 fields, got {len(fields)}: {line!r}")
            names.append(fields[0])
            rows.append([float(value) for value in fields[8:15]])
    return camera_to_lidar(np.array(rows, np.float64).reshape(-1, 7), calibration), names


def camera_to_lidar(boxes: np.ndarray, calibration: KittiCalibration) -> np.ndarray:
    """Turn boxes of labels into boxes of the LiDAR's frame.

    Args:
        boxes: [k, 7]: height, width, length, centre of the bottom x, y, z in the camera's frame (y down), and
            rotation about its y axis.
        calibration: Of the frame.

    Returns:
        [k, 7] float32.
    """
    height, width, length, *_ = boxes.T
    to_lidar = np.linalg.inv(calibration.lidar_to_camera)
    middle = boxes[:, 3:6] - np.stack([np.zeros_like(height), height / 2, np.zeros_like(height)], 1)
    centre = middle @ to_lidar[:3, :3].T + to_lidar[:3, 3]
    # The heading as a vector, because the camera does not look exactly along the LiDAR's x axis.
    rotation = boxes[:, 6]
    ahead = np.stack([np.cos(rotation), np.zeros_like(rotation), -np.sin(rotation)], 1) @ to_lidar[:3, :3].T
    yaw = np.arctan2(ahead[:, 1], ahead[:, 0])
    return np.column_stack([centre, length, width, height, yaw]).astype(np.float32)


def lidar_to_camera(boxes: np.ndarray, calibration: KittiCalibration) -> np.ndarray:
    """The inverse of `camera_to_lidar`, for result files; float64."""
    boxes = np.asarray(boxes, np.float64)
    matrix = calibration.lidar_to_camera
    height = boxes[:, 5]
    bottom = boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    bottom[:, 1] += height / 2
    ahead = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))], 1) @ matrix[:3, :3].T
    return np.column_stack([height, boxes[:, 4], boxes[:, 3], bottom, np.arctan2(-ahead[:, 2], ahead[:, 0])])


def in_camera_view(points: np.ndarray, calibration: KittiCalibration, size: tuple[int, int]) -> np.ndarray:
    """Tell which points [n, 3 or more] the camera sees, [n] bool; `size` is (width, height) in pixels."""
    camera = points[:, :3] @ calibration.lidar_to_camera[:3, :3].T + calibration.lidar_to_camera[:3, 3]
    pixel = camera @ calibration.projection[:, :3].T + calibration.projection[:, 3]
    depth = np.maximum(pixel[:, 2], 1e-6)
    u, v = pixel[:, 0] / depth, pixel[:, 1] / depth
    return (camera[:, 2] > 0) & (u >= 0) & (u < size[0]) & (v >= 0) & (v < size[1])


class KittiFrames(Sequence):
    """Frames of `ROOT/training`, read when asked for; arguments as in `KittiData`."""

    def __init__(
        self, folder: Path, names: Sequence[str], classes: Sequence[str], sensor_height: float, camera_view: bool
    ) -> None:
        self.folder, self.names, self.classes = folder, list(names), tuple(classes)
        self.sensor_height, self.camera_view = sensor_height, camera_view

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Frame:
        name = self.names[index]
        calibration = read_calibration(self.folder / "calib" / f"{name}.txt")
        boxes, names = read_labels(self.folder / "label_2" / f"{name}.txt", calibration)
        raw = np.fromfile(self.folder / "velodyne" / f"{name}.bin", "<f4").reshape(-1, 4)
        if self.camera_view:
            raw = raw[in_camera_view(raw, calibration, self._image_size(name))]
        points = np.zeros((len(raw), 5), np.float32)
        points[:, :3], points[:, 3] = raw[:, :3], np.tanh(raw[:, 3])
        known = np.array([name in self.classes for name in names], bool)
        labels = np.array([self.classes.index(name) for name in names if name in self.classes], np.int64)
        boxes = boxes[known]
        points[:, 2] += self.sensor_height
        boxes[:, 2] += self.sensor_height
        boxes[:, 6] = wrap_angle(torch.from_numpy(boxes[:, 6])).numpy()
        frame = Frame(torch.from_numpy(points), torch.from_numpy(boxes), torch.from_numpy(labels))
        return drop_sparse(frame, 1)

    def _image_size(self, name: str) -> tuple[int, int]:
        path = self.folder / "image_2" / f"{name}.png"
        if not path.is_file():
            return 1242, 375
        from PIL import Image

        with Image.open(path) as image:
            return image.size


class KittiData(PointCloudDataModule):
    """The KITTI object benchmark: ``ROOT/training/{velodyne,label_2,calib}`` and ``ROOT/ImageSets/{train,val}.txt``.

    Without ImageSets every fifth frame is held out. Points are x, y, z, tanh of intensity, 0; labels of other types
    than ``classes`` are left out.

    Args:
        root: Folder.
        num_classes: Number of classes.
        point_range: As in the base.
        classes: KITTI types in the order of the labels.
        sensor_height: Added to z, so that the ground lies near 0, metres.
        camera_view: Whether to keep only points that the camera sees, as nothing else is labelled.
        **kwargs: Arguments of ``PointCloudDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 3,
        point_range: Range = (0.0, -40.0, -1.5, 70.4, 40.0, 3.0),
        classes: Sequence[str] = ("Car", "Pedestrian", "Cyclist"),
        sensor_height: float = 1.73,
        camera_view: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(num_classes=num_classes, point_range=point_range, **kwargs)
        self.save_hyperparameters(ignore=["augmentation"])
        self.class_names = tuple(classes)

    def load_splits(self) -> dict[str, Sequence[Frame]]:
        """List the frames; nothing is read yet."""
        hparams, root = self.hparams, Path(self.hparams.root)
        folder = root / "training"
        names = sorted(path.stem for path in (folder / "velodyne").glob("*.bin"))
        if not names:
            raise FileNotFoundError(f"{folder / 'velodyne'} has no .bin files; KittiData expects KITTI's object layout")
        lists = {split: root / "ImageSets" / f"{split}.txt" for split in ("train", "val")}
        if all(path.is_file() for path in lists.values()):
            splits = {split: path.read_text().split() for split, path in lists.items()}
        else:
            held_out = set(names[4::5])
            splits = {"train": [n for n in names if n not in held_out], "val": sorted(held_out)}
        return {
            split: KittiFrames(folder, chosen, self.class_names, hparams.sensor_height, hparams.camera_view)
            for split, chosen in splits.items()
        }
