"""Data modules of point clouds: KITTI's and nuScenes' coordinates, converted frames, simulated ones."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch

from zoo.train.lidar.augment import LidarAugmentation
from zoo.train.lidar.data import FrameFolderData, SimulatedLidarData, collate
from zoo.train.lidar.frames import Frame
from zoo.train.lidar.geometry import points_in_boxes
from zoo.train.lidar.kitti import (
    KittiData,
    camera_to_lidar,
    in_camera_view,
    lidar_to_camera,
    read_calibration,
    read_labels,
)
from zoo.train.lidar.nuscenes import CLASSES, NuScenesData, balanced_order, rotation_matrix
from zoo.train.lidar.simulator import SpinningSensor

# A camera that looks along the LiDAR's x axis, 0.27 m ahead and 0.08 m below it.
CALIBRATION = """P0: 1 0 0 0 0 1 0 0 0 0 1 0
P2: 700 0 600 0 0 700 180 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27
Tr_imu_to_velo: 1 0 0 0 0 1 0 0 0 0 1 0

"""
LABELS = """Car 0.00 0 -1.57 614 181 727 284 1.50 1.80 4.00 2.00 1.65 20.00 -1.57
Pedestrian 0.00 0 0.2 712 143 810 307 1.70 0.60 0.80 -3.00 1.60 10.00 0.00
Van 0.00 0 0.2 712 143 810 307 2.00 1.90 5.00 8.00 1.60 30.00 1.00
DontCare -1 -1 -10 503 169 590 190 -1 -1 -1 -1000 -1000 -1000 -10
"""


@pytest.fixture
def kitti(tmp_path):
    folder = tmp_path / "training"
    for name in ("calib", "label_2", "velodyne"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        (folder / "calib" / f"{i:06}.txt").write_text(CALIBRATION)
        (folder / "label_2" / f"{i:06}.txt").write_text(LABELS)
        # Points around the car, the pedestrian and anywhere.
        points = rng.uniform(-1, 1, (300, 4)) * (60, 30, 1, 0)
        points[:50, :3] = (20.27, -2.0, -0.98) + rng.uniform(-0.3, 0.3, (50, 3))
        points[50:80, :3] = (10.27, 3.0, -0.83) + rng.uniform(-0.2, 0.2, (30, 3))
        points[:, 3] = 0.5
        points.astype("<f4").tofile(folder / "velodyne" / f"{i:06}.bin")
    return tmp_path


def test_kitti_coordinates(kitti) -> None:
    calibration = read_calibration(kitti / "training" / "calib" / "000000.txt")
    boxes, names = read_labels(kitti / "training" / "label_2" / "000000.txt", calibration)
    assert names == ["Car", "Pedestrian", "Van"]
    # The car 20 m ahead of the camera, 2 m to the right, driving ahead; its bottom 1.65 m below the camera.
    expected = [20.27, -2.0, -1.65 - 0.08 + 0.75, 4.0, 1.8, 1.5, 1.57 - math.pi / 2]
    np.testing.assert_allclose(boxes[0], expected, atol=1e-3)
    # Rotation 0 about the camera's y axis points to its right, the LiDAR's -y.
    np.testing.assert_allclose(boxes[1], [10.27, 3.0, -1.6 - 0.08 + 0.85, 0.8, 0.6, 1.7, -math.pi / 2], atol=1e-3)


def test_kitti_coordinates_there_and_back() -> None:
    rng = np.random.default_rng(0)
    turn = rotation_matrix(rng.normal(size=4))
    # Any camera that stands upright: turned about the vertical only.
    angle = 0.02
    turn = np.array([[math.sin(angle), -math.cos(angle), 0], [0, 0, -1], [math.cos(angle), math.sin(angle), 0]])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, (0.1, -0.08, -0.3)
    calibration = types.SimpleNamespace(lidar_to_camera=matrix)
    boxes = np.column_stack([rng.uniform(1, 4, (20, 3)), rng.uniform(-20, 20, (20, 3)), rng.uniform(-3.1, 3.1, 20)])
    np.testing.assert_allclose(lidar_to_camera(camera_to_lidar(boxes, calibration), calibration), boxes, atol=1e-4)
    # Length lies along the heading: yaw decreases as the rotation about the downward axis grows.
    yaw = camera_to_lidar(np.array([[1, 1, 1, 0, 0, 9, 0.3], [1, 1, 1, 0, 0, 9, 0.5]]), calibration)[:, 6]
    assert yaw[1] - yaw[0] == pytest.approx(-0.2, abs=1e-4)


def test_kitti_frames(kitti) -> None:
    data = KittiData(str(kitti), num_classes=3, batch_size=2, num_workers=0)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "val")] == [8, 2]
    frame = data.splits["val"][0]
    assert frame.labels.tolist() == [0, 1]
    assert points_in_boxes(frame.points, frame.boxes).sum(0).tolist() == [50, 30]
    # The ground lies near 0, intensity went through tanh, and only what the camera sees is left.
    assert frame.boxes[0, 2] - frame.boxes[0, 5] / 2 == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(frame.points[:, 3], torch.full((len(frame.points),), math.tanh(0.5)))
    assert frame.points[:, 0].min() > 0 and (frame.points[:, 1].abs() < frame.points[:, 0]).all()
    everything = KittiData(str(kitti), num_classes=3, num_workers=0, camera_view=False)
    everything.setup()
    assert len(everything.splits["val"][0].points) == 300
    (kitti / "ImageSets").mkdir()
    (kitti / "ImageSets" / "train.txt").write_text("000000\n000003\n")
    (kitti / "ImageSets" / "val.txt").write_text("000001\n")
    data = KittiData(str(kitti), num_classes=3)
    data.setup()
    assert [data.splits[s].names for s in ("train", "val")] == [["000000", "000003"], ["000001"]]


def test_kitti_messages(kitti, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="expects KITTI's object layout"):
        KittiData(str(tmp_path / "none")).setup()
    with pytest.raises(ValueError, match="num_classes is 2, but there are 3 classes: Car, Pedestrian, Cyclist"):
        KittiData(str(kitti), num_classes=2).setup()
    (tmp_path / "calib.txt").write_text("P2: 1 2 3\n")
    with pytest.raises(ValueError, match="no line 'P2:' of 12 numbers"):
        read_calibration(tmp_path / "calib.txt")
    calibration = read_calibration(kitti / "training" / "calib" / "000000.txt")
    (tmp_path / "label.txt").write_text("Car 1 2\n")
    with pytest.raises(ValueError, match="a label has 15 fields, got 3"):
        read_labels(tmp_path / "label.txt", calibration)
    (tmp_path / "empty.txt").write_text("")
    assert read_labels(tmp_path / "empty.txt", calibration)[0].shape == (0, 7)
    assert in_camera_view(np.zeros((0, 4)), calibration, (1242, 375)).shape == (0,)


class FakeDevkit:
    """Two scenes of one drive along the world's y axis at 10 m/s; a car ahead of the vehicle, at rest."""

    version_folder = "v1.0-mini"

    def __init__(self, version: str, dataroot: str, verbose: bool) -> None:
        self.dataroot = dataroot
        half = math.sqrt(0.5)
        self.tables = {"calibrated_sensor": {"c": dict(rotation=[half, 0, 0, -half], translation=[1.0, 0, 1.8])}}
        # The vehicle looks along the world's y axis.
        self.tables["ego_pose"] = {
            str(i): dict(rotation=[half, 0, 0, half], translation=[0, i * 1.0, 0]) for i in range(3)
        }
        self.tables["sample_data"] = {
            str(i): dict(
                ego_pose_token=str(i), calibrated_sensor_token="c", filename=f"{i}.pcd.bin", timestamp=100_000 * i,
                prev="" if i == 0 else str(i - 1),
            )
            for i in range(3)
        }  # fmt: skip
        self.tables["scene"] = {"a": dict(name="scene-a"), "b": dict(name="scene-b")}
        self.tables["sample_annotation"] = {
            "car": dict(num_lidar_pts=9, rotation=[half, 0, 0, half]),
            "rack": dict(num_lidar_pts=9, rotation=[1, 0, 0, 0]),
            "unseen": dict(num_lidar_pts=0, rotation=[1, 0, 0, 0]),
        }  # fmt: skip
        self.sample = [dict(scene_token="a", data={"LIDAR_TOP": "2"}), dict(scene_token="b", data={"LIDAR_TOP": "0"})]

    def get(self, table: str, token: str) -> dict:
        return self.tables[table][token]

    def get_boxes(self, token: str) -> list:
        def entry(token, name, x, y):
            return types.SimpleNamespace(token=token, name=name, center=[x, y, 0.8], wlh=[1.9, 4.5, 1.6])

        return [
            entry("car", "vehicle.car", 3.0, 20.0), entry("rack", "static_object.bicycle_rack", 0, 9),
            entry("unseen", "vehicle.car", 0, 5),
        ]  # fmt: skip

    def box_velocity(self, token: str) -> np.ndarray:
        return np.array([0.0, 4.0, np.nan])


@pytest.fixture
def devkit(monkeypatch, tmp_path):
    names = ("nuscenes", "nuscenes.nuscenes", "nuscenes.utils", "nuscenes.utils.splits", "nuscenes.eval",
             "nuscenes.eval.detection", "nuscenes.eval.detection.utils")  # fmt: skip
    modules = {name: types.ModuleType(name) for name in names}
    modules["nuscenes.nuscenes"].NuScenes = FakeDevkit
    modules["nuscenes.utils.splits"].create_splits_scenes = lambda: {"mini_train": ["scene-a"], "mini_val": ["scene-b"]}
    known = {"vehicle.car": "car"}
    modules["nuscenes.eval.detection.utils"].category_to_detection_name = known.get
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "v1.0-mini").mkdir()
    # A post that stands at (3, 12, 1) in the world, as each scan sees it, and a point of the vehicle.
    for i in range(3):
        # Sensor at (0, i + 1, 1.8), x to the right (the world's x), y ahead (the world's y).
        post = [3.0, 12.0 - (i + 1), 1.0 - 1.8, 40.0, 7.0]
        np.array([post, [0.2, -0.5, 0, 1, 0]], "<f4").tofile(tmp_path / f"{i}.pcd.bin")
    return tmp_path


def test_nuscenes(devkit) -> None:
    data = NuScenesData(str(devkit), version="v1.0-mini", sweeps=10, num_workers=0)
    data.setup()
    frame = data.splits["train"][0]
    # Three scans of the post fall onto each other; the vehicle's own points are gone.
    expected = torch.tensor([[3.0, 9.0, -0.8, 40.0, age] for age in (0, 0.1, 0.2)])
    torch.testing.assert_close(frame.points, expected, rtol=0, atol=1e-4)
    # The car drives along the world's y axis, which is the sensor's.
    assert frame.labels.tolist() == [CLASSES.index("car")]
    expected = torch.tensor([[3.0, 17.0, -1.0, 4.5, 1.9, 1.6, math.pi / 2, 0.0, 4.0]])
    torch.testing.assert_close(frame.boxes, expected, rtol=0, atol=1e-4)
    assert len(data.splits["val"][0].points) == 1


def test_nuscenes_messages(devkit, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="no folder v1.0-trainval"):
        NuScenesData(str(devkit)).setup()
    monkeypatch.setitem(sys.modules, "nuscenes.nuscenes", None)
    with pytest.raises(ImportError, match="pip install nuscenes-devkit"):
        NuScenesData(str(devkit), version="v1.0-mini").setup()


def test_quaternions() -> None:
    half = math.sqrt(0.5)
    np.testing.assert_allclose(rotation_matrix([half, 0, 0, half]) @ [1, 0, 0], [0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(rotation_matrix([half, half, 0, 0]) @ [0, 1, 0], [0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(rotation_matrix([half, 0, half, 0]) @ [0, 0, 1], [1, 0, 0], atol=1e-9)


def test_balanced_order() -> None:
    """One frame in ten holds the rare class; after balancing it is in half of the draws."""
    labels = [np.array([0, 1]) if i % 10 == 0 else np.array([0]) for i in range(100)]
    order = balanced_order(labels, 3)
    rare = np.mean([i % 10 == 0 for i in order])
    assert len(order) == 74 and 0.45 < rare < 0.65


def folder(tmp_path):
    for split, drives in (("train", 2), ("val", 1)):
        for d in range(drives):
            place = tmp_path / split / f"drive{d}"
            place.mkdir(parents=True)
            for f in range(4):
                # The vehicle drives ahead by 2 m a frame; a post stands at x = 30 of the world.
                points = np.array(
                    [[30.0 - 2 * f, 1, 1, 0.5, 0.7], [3, 0, 0, 0.5, 0.7], [8, 0, 0, 0.5, 0.7]], np.float32
                )
                boxes = np.array([[30.0 - 2 * f, 1, 1, 4, 2, 2, 0.1], [50, 0, 1, 4, 2, 2, 0], [8, 0, 0, 1, 1, 1, 0]])
                pose = np.eye(4)
                pose[0, 3] = 2 * f
                np.savez(
                    place / f"{f:03}.npz", points=points, boxes=boxes, names=["Vehicle", "Vehicle", "Sign"], pose=pose
                )
    return tmp_path


def test_folder_of_frames(tmp_path) -> None:
    args = dict(
        root=str(folder(tmp_path)), classes=["Vehicle", "Cyclist"], num_classes=2, point_range=(-40, -40, -2, 40, 40, 4)
    )
    data = FrameFolderData(**args, num_workers=0)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "val")] == [8, 4]
    frame = data.splits["val"][3]
    # The box without points and the unknown class are left out.
    assert frame.labels.tolist() == [0] and frame.boxes[0, 0] == 24 and len(frame.points) == 3
    three = FrameFolderData(**args, sweeps=3, every=4, num_workers=0)
    three.setup()
    assert len(three.splits["train"]) == 2
    points = three.splits["val"][3].points
    # The post is in one place, with the ages 0, -1, -2; what was close to the vehicle is taken from no past frame.
    post = points[points[:, 1] == 1]
    torch.testing.assert_close(post[:, :3], torch.tensor([[24.0, 1, 1]] * 3))
    assert post[:, 4].tolist() == [0, -1, -2]
    near = points[points[:, 1] == 0]
    assert near[:, 0].tolist() == [3, 8, 6, 4]
    # The first frame of a drive has no past.
    assert len(three.splits["val"][0].points) == 3


def test_folder_messages(tmp_path) -> None:
    args = dict(classes=["Vehicle"], num_classes=1, point_range=(-40, -40, -2, 40, 40, 4))
    with pytest.raises(FileNotFoundError, match="has no files DRIVE/FRAME.npz"):
        FrameFolderData(root=str(tmp_path), **args).setup()
    with pytest.raises(ValueError, match="sweeps and every must be at least 1, got 0 and 1"):
        FrameFolderData(root=str(tmp_path), sweeps=0, **args)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        np.savez(tmp_path / split / "a" / "0.npz", points=np.zeros((1, 5)))
    data = FrameFolderData(root=str(tmp_path), **args)
    data.setup()
    with pytest.raises(ValueError, match="has no array 'boxes'"):
        data.splits["train"][0]


SIMULATED = dict(
    train_frames=6, val_frames=2, batch_size=2, num_workers=0, sensor=SpinningSensor(columns=180, beams=(16, 16)),
    point_range=(-20.0, -20.0, -2.0, 20.0, 20.0, 4.0),
)  # fmt: skip


def test_simulated_frames_repeat() -> None:
    def epoch(seed: int = 0) -> list:
        data = SimulatedLidarData(**SIMULATED, seed=seed, augmentation=LidarAugmentation())
        data.setup()
        return list(data.train_dataloader())

    first, second, other = epoch(), epoch(), epoch(seed=1)
    assert len(first) == 3
    for (points, targets), (again, same), (unlike, _) in zip(first, second, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(points, again, strict=True))
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(targets, same, strict=True))
        assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(points, unlike, strict=True))
        assert all(p[:, :2].abs().max() <= 20 for p in points)
    data = SimulatedLidarData(**SIMULATED)
    data.setup()
    ((points, targets),) = data.val_dataloader()
    assert len(points) == len(targets) == 2
    with pytest.raises(IndexError):
        data.splits["val"][2]


def test_objects_are_pasted_until_the_last_epochs(tmp_path) -> None:
    augmentation = LidarAugmentation(
        flip_x=0, flip_y=0, rotation=0, scale=(1.0, 1.0), paste={"car": 25}, paste_off_epochs=1
    )
    path = tmp_path / "new" / "objects.npz"
    data = SimulatedLidarData(**SIMULATED, augmentation=augmentation, database=str(path))
    data.prepare_data()
    assert path.is_file()
    data.setup()
    loader = data.train_dataloader()
    loader.dataset.paste_epochs = 1
    plain = sum(len(data.splits["train"][i].labels) for i in range(6))

    def objects(epoch: int) -> int:
        loader.position = lambda: (epoch, 0)
        return sum(len(t.labels) for _, targets in loader for t in targets)

    assert objects(1) <= plain < objects(0)
    with pytest.raises(ValueError, match="augmentation.paste needs a database"):
        SimulatedLidarData(**SIMULATED, augmentation=augmentation)


def test_messages_and_collate() -> None:
    data = SimulatedLidarData(**{**SIMULATED, "batch_size": 9})
    data.setup()
    with pytest.raises(ValueError, match="batch_size is 9, but an epoch has 6 frames"):
        data.train_dataloader()
    points, targets = collate([Frame(torch.zeros(3, 5), torch.zeros(1, 7), torch.tensor([2]))])
    assert points[0].shape == (3, 5) and targets[0].labels.tolist() == [2]
