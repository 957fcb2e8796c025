"""Random changes of LiDAR frames: points, boxes, headings and velocities stay together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo.train.lidar.augment import LidarAugmentation, Motion, augment, wrap_angle
from zoo.train.lidar.database import ObjectDatabase
from zoo.train.lidar.frames import Frame, crop_frame, in_range
from zoo.train.lidar.geometry import corners_bev, overlap_bev, points_in_boxes
from zoo.train.lidar.simulator import LidarSimulator, SpinningSensor

RANGE = (-30.0, -30.0, -2.0, 30.0, 30.0, 4.0)
SIMULATOR = LidarSimulator(sensor=SpinningSensor(columns=360, beams=(24, 32)), extent=25)


def with_velocity(frame: Frame) -> Frame:
    """Objects drive ahead at 2 m/s."""
    yaw = frame.boxes[:, 6:7]
    return frame._replace(boxes=torch.cat([frame.boxes, 2 * yaw.cos(), 2 * yaw.sin()], 1))


MOTIONS = [
    Motion(mirror=(-1.0, 1.0)),
    Motion(mirror=(1.0, -1.0)),
    Motion(mirror=(-1.0, -1.0), angle=0.5),
    Motion(angle=-2.5),
    Motion(mirror=(-1.0, 1.0), angle=1.0, scale=1.2, shift=(1.0, -2.0, 0.5)),
]


@pytest.mark.parametrize("motion", MOTIONS)
def test_boxes_move_with_their_points(motion) -> None:
    frame = with_velocity(SIMULATOR[0])
    moved = motion(frame)
    assert torch.equal(moved.labels, frame.labels) and torch.equal(moved.points[:, 3:], frame.points[:, 3:])
    # A box holds the same points, and points into its heading come out into its heading.
    assert torch.equal(points_in_boxes(moved.points, moved.boxes), points_in_boxes(frame.points, frame.boxes))
    ahead = torch.cat([frame.boxes[:, 6:7].cos(), frame.boxes[:, 6:7].sin(), torch.zeros(len(frame.boxes), 1)], 1)
    noses = Frame(torch.cat([frame.boxes[:, :3] + ahead, torch.zeros(len(ahead), 2)], 1), frame.boxes, frame.labels)
    nose = (motion(noses).points[:, :3] - moved.boxes[:, :3]) / motion.scale
    torch.testing.assert_close(nose[:, 0], moved.boxes[:, 6].cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(nose[:, 1], moved.boxes[:, 6].sin(), rtol=0, atol=1e-4)
    # Velocities keep pointing ahead.
    torch.testing.assert_close(moved.boxes[:, 7:9], 2 * motion.scale * nose[:, :2], rtol=0, atol=1e-3)
    assert moved.boxes[:, 6].abs().max() <= math.pi + 1e-6


def test_draws_stay_within_their_settings() -> None:
    settings = LidarAugmentation(flip_x=1.0, flip_y=0.0, rotation=10.0, scale=(0.9, 1.1), translation=0.5)
    rng = np.random.default_rng(0)
    motions = [settings.draw(rng) for _ in range(200)]
    assert {m.mirror for m in motions} == {(1.0, -1.0)}
    angles = np.degrees([m.angle for m in motions])
    assert -10 <= angles.min() < -8 and 8 < angles.max() <= 10
    scales = np.array([m.scale for m in motions])
    assert 0.9 <= scales.min() < 0.92 and 1.08 < scales.max() <= 1.1
    np.testing.assert_allclose(np.std([m.shift for m in motions], 0), 0.5, atol=0.1)


def test_no_change() -> None:
    frame = SIMULATOR[1]
    still = LidarAugmentation(flip_x=0, flip_y=0, rotation=0, scale=(1.0, 1.0))
    for a, b in zip(augment(frame, still, np.random.default_rng(0), RANGE), crop_frame(frame, RANGE), strict=True):
        torch.testing.assert_close(a, b)


def test_range() -> None:
    points = torch.tensor([[0.0, 0, 0, 1, 0], [30, 0, 0, 1, 0], [-30, 0, 0, 1, 0], [0, 0, 5, 1, 0], [torch.nan] * 5])
    boxes = torch.tensor([[29.0, 0, 9, 4, 2, 2, 0], [31, 0, 0, 4, 2, 2, 0]])
    frame = crop_frame(Frame(points, boxes, torch.tensor([0, 1])), RANGE)
    assert torch.equal(frame.points, points[[0, 2]])
    assert torch.equal(frame.boxes, boxes[:1]) and frame.labels.tolist() == [0]
    assert in_range(torch.zeros(0, 3), RANGE).shape == (0,)


def test_angles() -> None:
    angles = wrap_angle(torch.tensor([0.0, 3.5, -3.5, 7.0, math.pi]))
    torch.testing.assert_close(
        angles, torch.tensor([0, 3.5 - 2 * math.pi, 2 * math.pi - 3.5, 7 - 2 * math.pi, -math.pi])
    )


@pytest.fixture(scope="module")
def database() -> ObjectDatabase:
    frames = SIMULATOR.frames(range(6))
    return ObjectDatabase.build(frames, ("car", "pedestrian", "cyclist"), {"car": 20})


def test_database_holds_the_points_of_its_objects(database, tmp_path) -> None:
    assert len(database) > 10 and set(database.labels) == {0, 1, 2}
    assert database.counts[database.labels == 0].min() >= 20 and database.counts.min() >= 5
    for i in range(len(database)):
        own = torch.from_numpy(database.points[database.starts[i] : database.starts[i] + database.counts[i]])
        assert points_in_boxes(own, torch.from_numpy(database.boxes[i : i + 1])).all()
    database.save(tmp_path / "objects.npz")
    again = ObjectDatabase.load(tmp_path / "objects.npz")
    assert again.classes == database.classes
    for name in ("boxes", "labels", "points", "counts", "starts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(database, name))


def test_pasted_objects_fit(database) -> None:
    frame = SIMULATOR[50]
    wanted = {"car": 12, "pedestrian": 6, "cyclist": 0}
    pasted = database.paste(frame, wanted, np.random.default_rng(0))
    added = len(pasted.boxes) - len(frame.boxes)
    assert added >= 3
    assert torch.equal(pasted.boxes[: len(frame.boxes)], frame.boxes)
    counts = torch.bincount(pasted.labels, minlength=3)
    present = torch.bincount(frame.labels, minlength=3)
    for label, most in enumerate(wanted.values()):
        assert counts[label] <= max(most, int(present[label]))
    overlap = overlap_bev(pasted.boxes.numpy(), pasted.boxes.numpy())
    assert np.array_equal(overlap, np.eye(len(overlap), dtype=bool))
    # A pasted box holds its own points and none of the scene's.
    inside = points_in_boxes(pasted.points, pasted.boxes[-added:])
    scene = len(pasted.points) - int(inside.any(1).sum())
    assert not inside[:scene].any() and inside[scene:].any(1).all()
    keys = {tuple(box.tolist()): int(count) for box, count in zip(database.boxes, database.counts, strict=True)}
    for box, count in zip(pasted.boxes[-added:], inside.sum(0), strict=True):
        assert keys[tuple(box.tolist())] == int(count)


def test_pasting_depends_on_the_generator_only(database) -> None:
    frame = SIMULATOR[50]
    settings = LidarAugmentation(paste={"car": 10})
    a, b, c = (augment(frame, settings, np.random.default_rng(seed), RANGE, database) for seed in (1, 1, 2))
    assert torch.equal(a.points, b.points) and torch.equal(a.boxes, b.boxes)
    assert a.points.shape != c.points.shape or not torch.equal(a.points, c.points)
    # Into an empty scene, too.
    empty = Frame(frame.points[:0], frame.boxes[:0], frame.labels[:0])
    assert len(database.paste(empty, {"car": 5}, np.random.default_rng(0)).boxes) >= 1


def test_messages(database) -> None:
    frame = SIMULATOR[0]
    with pytest.raises(ValueError, match="class 'truck'; classes: car, pedestrian, cyclist"):
        database.paste(frame, {"truck": 3}, np.random.default_rng(0))
    with pytest.raises(ValueError, match="of 5 point and 7 box columns cannot be pasted into frames of 5 and 9"):
        database.paste(with_velocity(frame), {"car": 3}, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no labelled object has enough points"):
        ObjectDatabase.build(
            [frame], ("car", "pedestrian", "cyclist"), dict.fromkeys(("car", "pedestrian", "cyclist"), 10**6)
        )
    for wrong, message in (
        (dict(flip_x=2.0), "probabilities"),
        (dict(scale=(0.0, 1.0)), "scale must be"),
        (dict(paste={"car": 1}, paste_min_points={"bus": 5}), "not in paste: bus"),
    ):
        with pytest.raises(ValueError, match=message):
            LidarAugmentation(**wrong)


def test_corners() -> None:
    corners = corners_bev(np.array([[1.0, 2, 0, 4, 2, 1, np.pi / 2]]))[0]
    np.testing.assert_allclose(corners, [[0, 4], [0, 0], [2, 0], [2, 4]], atol=1e-9)
