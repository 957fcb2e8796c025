"""Point cloud files, pictures from above, and `zoo predict` on point clouds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detector import TinyDetector

import zoo
from zoo.cli import main
from zoo.heads.detections import Detections
from zoo.train.lidar.formats import ground_level, model_columns, read_points
from zoo.train.lidar.simulator import LidarSimulator, SpinningSensor
from zoo.visualize_bev import COLOURS, TRUTH_COLOUR, draw_bev


@pytest.fixture
def points() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.uniform(-20, 20, (60, 4)) * (1, 1, 0.1, 0)).astype("<f4") + np.array([0, 0, 0, 0.25], "<f4")


def test_bin_files(points, tmp_path) -> None:
    points.tofile(tmp_path / "kitti.bin")
    cloud = read_points(tmp_path / "kitti.bin")
    assert cloud.columns == ("x", "y", "z", "intensity")
    np.testing.assert_array_equal(cloud.points, points)
    # 60 rows of 4 fit 48 rows of 5 as well; there the last column would not be whole numbers.
    rings = np.arange(60, dtype="<f4")[:, None] % 32
    five = np.concatenate([points, rings], 1)
    for name in ("a.bin", "b.pcd.bin"):
        five.tofile(tmp_path / name)
        cloud = read_points(tmp_path / name)
        assert cloud.columns == ("x", "y", "z", "intensity", "ring")
        np.testing.assert_array_equal(cloud.points, five)
    assert read_points(tmp_path / "a.bin", columns=4).points.shape == (75, 4)
    (tmp_path / "empty.bin").write_bytes(b"")
    assert read_points(tmp_path / "empty.bin").points.shape == (0, 4)


def test_numpy_files(points, tmp_path) -> None:
    np.save(tmp_path / "a.npy", points.astype(np.float64))
    np.savez(tmp_path / "b.npz", points=points, columns=["X", "Y", "Z", "intensity"], other=1)
    np.savez(tmp_path / "c.npz", points)
    for name in ("a.npy", "b.npz", "c.npz"):
        cloud = read_points(tmp_path / name)
        assert cloud.columns == ("x", "y", "z", "intensity") and cloud.points.dtype == np.float32
        np.testing.assert_array_equal(cloud.points, points)


PCD = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS intensity x y z _ normal
SIZE 1 8 4 4 1 4
TYPE U F F F U F
COUNT 1 1 1 1 3 2
WIDTH {n}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {n}
DATA {kind}
"""


XYZ = b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 2\n"


def test_pcd_files(points, tmp_path) -> None:
    record = np.dtype([("i", "u1"), ("x", "<f8"), ("y", "<f4"), ("z", "<f4"), ("p", "u1", 3), ("n", "<f4", 2)])
    table = np.zeros(len(points), record)
    table["i"] = np.arange(len(points))
    for i, name in enumerate("xyz"):
        table[name] = points[:, i]
    expected = np.column_stack([points[:, :3], np.arange(len(points))])
    header = PCD.format(n=len(points), kind="binary").encode()
    (tmp_path / "a.pcd").write_bytes(header + table.tobytes())
    lines = [f"{i} {x!r} {y!r} {z!r} 0 0 0 1 2" for i, (x, y, z) in enumerate(points[:, :3].tolist())]
    (tmp_path / "b.pcd").write_text(PCD.format(n=len(points), kind="ascii") + "\n".join(lines) + "\n")
    for name in ("a.pcd", "b.pcd"):
        cloud = read_points(tmp_path / name)
        # Coordinates come first; padding and fields of several numbers are left out.
        assert cloud.columns == ("x", "y", "z", "intensity")
        np.testing.assert_array_equal(cloud.points, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"12345", "holds neither 4 nor 5 float32 numbers"),
        ("a.npz", b"no zip", "damaged or is no .npz"),
        ("a.npy", b"nothing", "damaged or is no .npy"),
        ("a.pcd", b"FIELDS x y z\n", "has no line DATA"),
        ("a.pcd", b"FIELDS x y\nSIZE 4 4\nTYPE F F\nPOINTS 1\nDATA ascii\n1 2\n", "has no field z"),
        ("a.pcd", XYZ + b"DATA ascii\n1 2 3\n", "3 numbers for 2 points of 3"),
        ("a.pcd", XYZ + b"DATA binary\n1234", "cannot be read as a .pcd"),
        ("a.pcd", XYZ + b"DATA binary_compressed\n1", "write the file as ascii"),
        ("a.txt", b"", "is no point cloud that can be read"),
    ],
)  # fmt: skip
def test_damaged_files(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_points(tmp_path / name)


def test_wrong_arrays(points, tmp_path) -> None:
    cases = {
        "shape": (dict(points=points[0]), "must hold numbers"),
        "names": (dict(points=points, columns=["x", "y"]), "names 2 columns of 4"),
        "order": (dict(points=points, columns=["i", "x", "y", "z"]), "must begin with columns x, y, z"),
        "key": (dict(a=points, b=points), "has no array 'points', only a, b"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_points(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_points(tmp_path / "absent.bin")


def test_columns_of_the_model(points, tmp_path) -> None:
    np.savez(
        tmp_path / "a.npz",
        points=points[:, [0, 1, 2, 3, 3]] * (1, 1, 1, 400, 1),
        columns=["x", "y", "z", "intensity", "time"],
    )
    waymo, nuscenes = (("x", "y", "z", "intensity", name) for name in ("elongation", "time"))
    cloud = read_points(tmp_path / "a.npz")
    columns = model_columns(cloud, waymo)
    np.testing.assert_allclose(columns[:, 3], np.tanh(100 / 255), rtol=1e-6)
    assert (columns[:, 4] == 0).all()
    np.testing.assert_array_equal(columns[:, :3], points[:, :3])
    np.testing.assert_allclose(model_columns(cloud, nuscenes)[:, 3], 100, rtol=1e-6)
    np.save(tmp_path / "c.npy", points)
    np.testing.assert_allclose(model_columns(read_points(tmp_path / "c.npy"), nuscenes)[:, 3], 0.25 * 255)
    np.savez(tmp_path / "b.npz", points=points[:, :3])
    assert (model_columns(read_points(tmp_path / "b.npz"), waymo)[:, 3:] == 0).all()


def test_ground_level() -> None:
    frame = LidarSimulator(sensor=SpinningSensor(columns=360)).frames([0])[0].points.numpy()
    assert ground_level(frame) == pytest.approx(0, abs=0.15)
    wall = np.column_stack(
        [np.full(10**5, 10.0), np.tile(np.linspace(-5, 5, 1000), 100), np.repeat(np.linspace(2, 5, 100), 1000)]
    )
    assert ground_level(np.concatenate([frame[:, :3], wall]) - (0, 0, 1.7)) == pytest.approx(-1.7, abs=0.15)
    assert ground_level(np.zeros((0, 3))) == 0
    assert ground_level(np.full((5, 3), np.nan)) == 0


def colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def near(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(image - np.array(colour)) < 40).all(-1)


def test_picture() -> None:
    boxes = np.array([[5.0, 0, 0, 8, 2, 2, np.pi / 2], [-5, -5, 0, 4, 2, 2, 0]])
    points = np.array([[0.0, 8, 1], [np.nan, 0, 0], [100, 0, 0]])
    args = dict(classes=("car", "person"), bounds=(-10, -10, 10, 10), size=200)
    image = colours(draw_bev(points, boxes, np.array([0, 1]), truth=boxes[:1] + 0.01, **args))
    assert image.shape == (200, 200, 3)
    rows, cols = np.nonzero(near(image, COLOURS[0]))
    keep = cols > 100  # the legend lies to the left
    # The first box is long along y, which is up, to the right of the middle; its line sticks out at the top.
    assert 135 <= cols[keep].min() < 145 and rows[keep].min() < 60 and rows[keep].max() < 145
    rows, cols = np.nonzero(near(image, COLOURS[1]))
    assert (rows > 100).any() and cols[rows > 100].max() < 90
    assert near(image, TRUTH_COLOUR).any()
    # The point at (0, 8) is the lightest there.
    assert image[15:25, 95:105].sum(-1).max() > image[30:40, 85:95].sum(-1).max()


def test_picture_of_nothing_and_messages() -> None:
    nothing = np.zeros((0, 7))
    assert draw_bev(np.zeros((0, 3)), nothing, np.zeros(0)).size == (1000, 1000)
    # By itself the picture covers every box.
    far = np.array([[80.0, 0, 0, 4, 2, 2, 0]])
    image = colours(draw_bev(np.random.default_rng(0).normal(size=(99, 3)), far, np.array([0])))
    assert near(image[:, -100:], COLOURS[0]).any()
    with pytest.raises(ValueError, match=r"differ: \(0, 1, None\)"):
        draw_bev(np.zeros((0, 3)), nothing, np.zeros(1))
    with pytest.raises(ValueError, match="bounds must be"):
        draw_bev(np.zeros((0, 3)), nothing, np.zeros(0), bounds=(1, 0, 0, 1))


class Seen(TinyDetector):
    """Finds a car wherever the highest point is, and remembers its input."""

    def forward(self, points):
        self.points = points[0]
        top = points[0][points[0][:, 2].argmax()]
        boxes = torch.tensor([[*top[:3].tolist(), 4.0, 2.0, 1.5, 0.3], [0, 0, 1, 1, 1, 1, 0]])
        return [Detections(boxes, torch.tensor([0.9, 0.2]), torch.tensor([0, 1]))]


@pytest.fixture
def detector(monkeypatch):
    model = Seen()
    real = zoo.create_model
    monkeypatch.setattr(zoo, "create_model", lambda name, **kw: model if name == "tiny" else real(name))
    return model


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_predict(detector, tmp_path, capsys) -> None:
    frame = LidarSimulator(sensor=SpinningSensor(columns=360, beams=(24, 24))).frames([0])[0].points.numpy()[:, :4]
    # A sensor 1.8 m above the ground, as KITTI's.
    (frame - (0, 0, 1.8, 0)).astype("<f4").tofile(tmp_path / "frame.bin")
    out = tmp_path / "found"
    code, text, _ = run(capsys, "predict", tmp_path / "frame.bin", "--model", "tiny", "--out", out, "--json")
    assert code == 0
    record = json.loads(text)
    assert record == json.loads((out / "frame.bin.json").read_text())
    assert record["ground"] == pytest.approx(-1.8, abs=0.2)
    # The detector saw the ground at 0, and five columns; the boxes are in the file's coordinates.
    assert detector.points.shape == (len(frame), 5)
    assert abs(float(detector.points[:, 2].median())) < 0.3
    (box,) = record["boxes"]
    assert box["label"] == "car" and box["score"] == 0.9 and box["yaw"] == 0.3
    assert box["z"] == pytest.approx(frame[:, 2].max() - 1.8, abs=1e-3)
    assert Image.open(record["picture"]).size[0] > 100
    detector.point_features = ("x", "y", "z", "intensity", "time")
    run(capsys, "predict", tmp_path / "frame.bin", "--model", "tiny", "--out", out)
    assert float(detector.points[:, 2].median()) == pytest.approx(-1.84, abs=0.3)
    # Folders work, lower scores on request, and the table counts.
    code, text, _ = run(capsys, "predict", tmp_path, "--model", "tiny", "--out", out, "--score", "0.1")
    assert code == 0 and "pedestrian" in text
    assert len(json.loads((out / "frame.bin.json").read_text())["boxes"]) == 2


def test_predict_messages(detector, tmp_path, capsys) -> None:
    (tmp_path / "broken.bin").write_bytes(b"12345")
    code, _, err = run(
        capsys, "predict", tmp_path / "broken.bin", tmp_path / "absent.pcd", "--model", "tiny", "--out", tmp_path
    )
    assert code == 1
    assert "broken.bin' of 5 bytes holds neither" in err and "absent.pcd' does not exist" in err
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.float32))
    code, _, err = run(capsys, "predict", tmp_path / "a.npy", "--model", "test_convnext", "--out", tmp_path)
    assert code == 1 and "'test_convnext' takes images, not point clouds" in err
