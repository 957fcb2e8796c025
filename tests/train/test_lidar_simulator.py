"""Simulated LiDAR: geometry of echoes, occlusion, labels, repeatability."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo.train.lidar import simulator as module
from zoo.train.lidar.geometry import first_fit, overlap_bev, points_in_boxes
from zoo.train.lidar.scenes import BOX, CLASSES, CYLINDER, ELLIPSOID, Layout, Parts, draw_layout, ground_height
from zoo.train.lidar.simulator import LidarSimulator, SpinningSensor

SENSOR = SpinningSensor(columns=360, beams=(24, 32))
EXACT = SpinningSensor(
    columns=720, beams=(48, 48), lowest=(-24, -24), highest=(4, 4), height=(1.8, 1.8), range_noise=0, drop=0
)


def scene(*bodies, boxes=(), slope=(0.0, 0.0)) -> Layout:
    """A scene of (kind, centre, half sizes, yaw[, owner]) on flat ground."""
    rows = [(*body, -1)[:5] for body in bodies]
    parts = Parts(
        np.array([r[0] for r in rows], np.int64), np.array([r[1] for r in rows], float).reshape(-1, 3),
        np.array([r[2] for r in rows], float).reshape(-1, 3), np.array([r[3] for r in rows], float),
        np.array([[0.5, 0, 0]] * len(rows)).reshape(-1, 3), np.array([r[4] for r in rows], np.int64),
    )  # fmt: skip
    boxes = np.array(boxes, np.float32).reshape(-1, 7)
    return Layout(parts, boxes, np.zeros(len(boxes), np.int64), np.array(slope), np.zeros((3, 4)))


def trace(layout: Layout, sensor: SpinningSensor = EXACT, min_points: int = 1):
    return LidarSimulator(sensor=sensor, min_points=min_points).frames([0], [layout])[0]


def surface_distance(points: torch.Tensor, kind: int, centre, half, yaw: float) -> torch.Tensor:
    """Largest coordinate (box), radius in the body's own scale (others): 1 on the surface."""
    x, y, z = (points[:, :3] - torch.tensor(centre)).unbind(1)
    cos, sin = math.cos(yaw), math.sin(yaw)
    local = torch.stack([x * cos + y * sin, y * cos - x * sin, z], 1) / torch.tensor(half)
    if kind == BOX:
        return local.abs().amax(1)
    if kind == CYLINDER:
        return torch.maximum(local[:, :2].norm(dim=1), local[:, 2].abs())
    return local.norm(dim=1)


@pytest.mark.parametrize("kind", [BOX, CYLINDER, ELLIPSOID])
def test_echoes_lie_on_bodies_and_ground(kind) -> None:
    centre, half, yaw = (8.0, 3.0, 1.0), (2.0, 0.9, 0.8), 0.7
    points = trace(scene((kind, centre, half, yaw))).points
    on_ground = points[:, 2].abs() < 1e-3
    body = points[~on_ground]
    assert len(body) > 200
    torch.testing.assert_close(
        surface_distance(body, kind, centre, half, yaw), torch.ones(len(body)), rtol=0, atol=2e-3
    )
    # Only sides that face the sensor are seen: from the sensor, nothing of the body lies in front of an echo.
    eye = torch.tensor([0, 0, 1.8])
    before = eye + (body[:, :3] - eye) * 0.97
    assert (surface_distance(before, kind, centre, half, yaw) > 1).all()


def test_ground_slopes() -> None:
    points = trace(scene(slope=(0.02, -0.01))).points
    assert len(points) > 20_000
    torch.testing.assert_close(points[:, 2], 0.02 * points[:, 0] - 0.01 * points[:, 1], rtol=0, atol=1e-3)


def test_ground_follows_waves() -> None:
    rng = np.random.default_rng(3)
    layout = draw_layout(rng, 40)._replace(
        parts=scene().parts, boxes=np.zeros((0, 7), np.float32), labels=np.zeros(0, int)
    )
    points = trace(layout).points.double().numpy()
    near = np.hypot(points[:, 0], points[:, 1]) < 30
    height = ground_height(points[:, 0], points[:, 1], layout.slope, layout.waves)
    np.testing.assert_allclose(points[near, 2], height[near], atol=0.02)
    assert height[near].std() > 0.02


def test_a_wall_hides_what_stands_behind_it() -> None:
    car = [12.0, 0.0, 0.8, 4.0, 1.8, 1.6, 0.0]
    body = (BOX, car[:3], (2.0, 0.9, 0.8), 0.0, 0)
    wall = (BOX, (6.0, 0.0, 2.0), (0.2, 4.0, 2.0), 0.0)
    alone, hidden = trace(scene(body, boxes=[car])), trace(scene(body, wall, boxes=[car]))
    assert len(alone.boxes) == 1 and int(points_in_boxes(alone.points, alone.boxes).sum()) > 100
    # Neither echoes of the car, nor of the ground behind, nor a label.
    assert len(hidden.boxes) == 0
    assert not points_in_boxes(hidden.points, alone.boxes).any()
    behind = (hidden.points[:, 0] > 6.5) & (hidden.points[:, 1].abs() < 3)
    assert not behind.any()
    # Of two bodies the nearer one returns, whatever their order.
    swapped = trace(scene(wall, (*body[:4], 0), boxes=[car]))
    torch.testing.assert_close(swapped.points, hidden.points)


def test_bodies_across_the_first_column_are_whole() -> None:
    """Azimuths wrap around: a ring of posts gives as many echoes wherever the scan starts."""
    posts = [
        (CYLINDER, (10 * math.cos(a), 10 * math.sin(a), 1.0), (0.5, 0.5, 1.0), 0.0) for a in np.arange(8) * math.pi / 4
    ]
    points = trace(scene(*posts)).points
    counts = torch.stack(
        [
            (points[:, :2] - torch.tensor(p[1][:2])).norm(dim=1).lt(0.55).logical_and(points[:, 2] > 0.1).sum()
            for p in posts
        ]
    )
    assert counts.min() > 50 and counts.max() - counts.min() < 0.2 * counts.max()


def test_noise_lies_along_the_ray_and_echoes_get_lost() -> None:
    wall = (BOX, (10.0, 0.0, 1.5), (0.1, 8.0, 1.5), 0.0)
    clean = trace(scene(wall)).points
    noisy = trace(scene(wall), SpinningSensor(**{**vars(EXACT), "range_noise": 0.05})).points
    on_wall = (noisy[:, 1].abs() < 4) & (noisy[:, 0] > 9) & (noisy[:, 0] < 10.5) & (noisy[:, 2] > 0.2)
    assert 0.03 < float((noisy[on_wall, 0] - 9.9).std()) < 0.07
    lossy = trace(scene(wall), SpinningSensor(**{**vars(EXACT), "drop": 0.3})).points
    assert 0.63 < len(lossy) / len(clean) < 0.77
    assert clean[:, 3].min() >= 0 and clean[:, 3].max() <= math.tanh(1) and clean[:, 3].std() > 0.01
    assert (clean[:, 4] == 0).all()


def test_a_frame_follows_from_seed_and_index() -> None:
    simulator = LidarSimulator(seed=3, sensor=SENSOR, extent=30)
    together, alone = simulator.frames([4, 0, 9]), simulator[9]
    for a, b in zip(together[2], alone, strict=True):
        assert torch.equal(a, b)
    other = LidarSimulator(seed=4, sensor=SENSOR, extent=30)[9]
    assert other.points.shape != alone.points.shape or not torch.equal(other.points, alone.points)
    assert simulator.frames([]) == []


def test_labels_have_points_and_bodies_fill_their_boxes() -> None:
    simulator = LidarSimulator(sensor=SpinningSensor(columns=720, range_noise=0), min_points=8, extent=20)
    fills = {label: [] for label in range(3)}
    for frame in simulator.frames(range(8)):
        # Cloth is rough: echoes may lie outside by some centimetres.
        larger = frame.boxes.clone()
        larger[:, 3:6] += 0.08
        inside = points_in_boxes(frame.points, larger)
        assert (inside.sum(0) >= 8).all()
        assert frame.boxes.shape[1] == 7 and frame.boxes[:, 6].abs().max() <= math.pi + 1e-6
        overlap = overlap_bev(frame.boxes.numpy(), frame.boxes.numpy())
        assert np.array_equal(overlap, np.eye(len(overlap), dtype=bool))
        for box, label, own in zip(frame.boxes, frame.labels.tolist(), inside.T, strict=True):
            own &= frame.points[:, 2] > box[2] - box[5] / 2 + 0.1  # without the ground below
            if own.sum() > 80:
                offset = frame.points[own, :3] - box[:3]
                along = offset[:, 0] * torch.cos(box[6]) + offset[:, 1] * torch.sin(box[6])
                top = float((frame.points[own, 2].max() - box[2]) / (box[5] / 2))
                fills[label].append([float((along.max() - along.min()) / box[3]), top])
    for label, name in enumerate(CLASSES):
        assert len(fills[label]) >= 3, name
        length, top = np.array(fills[label]).max(0)
        assert 0.75 < length < 1.15 and 0.9 < top < 1.15, name


def test_heading_shows_in_the_shape() -> None:
    """Cars have their bonnet ahead: behind the middle they are taller."""
    taller = []
    for frame in LidarSimulator(sensor=SpinningSensor(columns=720), extent=25).frames(range(5)):
        for box in frame.boxes[(frame.labels == 0) & (frame.boxes[:, 5] < 1.8)]:
            own = frame.points[points_in_boxes(frame.points, box[None])[:, 0], :3] - box[:3]
            along = own[:, 0] * torch.cos(box[6]) + own[:, 1] * torch.sin(box[6])
            front, back = own[along > 0.35 * box[3], 2], own[along < -0.1 * box[3], 2]
            if len(front) > 20 and len(back) > 20:
                taller.append(float(back.max() - front.max()))
    assert len(taller) > 5 and min(taller) > 0.2


def test_layouts_keep_clear_of_the_sensor() -> None:
    for seed in range(5):
        layout = draw_layout(np.random.default_rng(seed), 40)
        distance = np.hypot(*layout.boxes[:, :2].T)
        assert distance.min() > 2 and (np.abs(layout.boxes[:, :2]) < 40).all()
        assert set(layout.parts.owner) <= set(range(-1, len(layout.boxes)))


def test_geometry() -> None:
    boxes = np.array([[0, 0, 0, 4, 2, 1, 0.0], [2.9, 0, 0, 4, 2, 1, np.pi / 2], [3.1, 0, 0, 4, 2, 1, np.pi / 2],
                      [2.7, 1.8, 0, 2, 2, 1, np.pi / 4]])  # fmt: skip
    overlap = overlap_bev(boxes, boxes)
    # The corner of the last box points away from the first one: their bounding boxes overlap, they do not.
    expected = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(overlap, expected)
    np.testing.assert_array_equal(first_fit(boxes), [True, False, True, False])
    points = torch.tensor([[1.9, 0.9, 0.4], [2.1, 0, 0], [2.9, 1.9, 0.0], [0, 0, 0.6]])
    inside = points_in_boxes(points, torch.tensor(boxes[:2], dtype=torch.float32))
    assert inside.tolist() == [[True, False], [False, True], [False, True], [False, False]]


def test_random_numbers() -> None:
    seeds, rays = torch.arange(4)[:, None], torch.arange(50_000)[None]
    for stream in (0, 3):
        values = module._uniform(seeds, rays, stream)
        assert values.min() >= 0 and values.max() < 1
        torch.testing.assert_close(values.mean(1), torch.full((4,), 0.5), rtol=0, atol=0.01)
        assert np.abs(np.corrcoef(values.numpy()) - np.eye(4)).max() < 0.02
        assert abs(np.corrcoef(values[0, 1:], values[0, :-1])[0, 1]) < 0.02
    normal = module._normal(seeds, rays, 1)
    assert abs(float(normal.mean())) < 0.01 and abs(float(normal.std()) - 1) < 0.01


def test_bad_extent() -> None:
    with pytest.raises(ValueError, match="extent must exceed 5 m.*got 4"):
        LidarSimulator(extent=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree() -> None:
    ours, theirs = (LidarSimulator(sensor=SENSOR, device=device).frames([0, 1]) for device in ("cuda", "cpu"))
    for a, b in zip(ours, theirs, strict=True):
        # Rounding may move a ray past an edge.
        assert abs(len(a.points) - len(b.points)) < 0.002 * len(b.points)
        assert abs(len(a.boxes) - len(b.boxes)) <= 1
