"""Average precision of boxes and the nuScenes score, on cases counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.heads.detections import Detections, Targets
from zoo.train.lidar.metrics import BoxAveragePrecision, angle_difference, assign_greedily, average_precision
from zoo.train.lidar.nuscenes_metrics import NuScenesDetectionScore


def box(x: float, y: float = 0.0, z: float = 0.0, yaw: float = 0.0, size=(4.0, 2.0, 1.5)) -> list[float]:
    return [x, y, z, *size, yaw]


def found(*rows: tuple[list[float], float, int]) -> Detections:
    width = len(rows[0][0]) if rows else 7
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, width)
    return Detections(boxes, torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows], dtype=torch.long))


def truth(*rows: tuple[list[float], int]) -> Targets:
    width = len(rows[0][0]) if rows else 7
    return Targets(
        torch.tensor([r[0] for r in rows]).reshape(-1, width), torch.tensor([r[1] for r in rows], dtype=torch.long)
    )


def measure(predictions, targets, thresholds=0.7, **kwargs) -> dict[str, float]:
    metric = BoxAveragePrecision(("car", "person"), thresholds, **kwargs)
    metric.update(predictions, targets)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize(
    ("points", "expected"), [("11", (6 * 1 + 5 * 2 / 3) / 11), ("40", (20 + 20 * 2 / 3) / 40), ("all", (1 + 2 / 3) / 2)]
)
def test_interpolation(points, expected) -> None:
    """Two cars; right, a duplicate of it, right: precision is 1 up to recall 1/2 and 2/3 up to 1."""
    cars = truth((box(0), 0), (box(10), 0))
    rows = found((box(0), 0.9, 0), (box(0), 0.8, 0), (box(10), 0.7, 0))
    result = measure([rows], [cars], points=points)
    assert result["ap/car"] == pytest.approx(expected)
    assert math.isnan(result["ap/person"]) and result["map"] == pytest.approx(expected)


def test_views_and_thresholds() -> None:
    # Shifted along by 0.4: overlap 3.6 / 4.4 = 0.82 from above; 0.5 up: times 1 / 2, 0.43 in volume.
    rows, cars = found((box(0.4, z=0.5), 0.9, 0)), truth((box(0), 0))
    assert measure([rows], [cars], 0.8, view="bev")["ap/car"] == 1
    assert measure([rows], [cars], 0.85, view="bev")["ap/car"] == 0
    overlap = 3.6 * 2 * 1.0 / (2 * 12 - 3.6 * 2 * 1.0)
    assert measure([rows], [cars], overlap - 0.01)["ap/car"] == 1
    assert measure([rows], [cars], overlap + 0.01)["ap/car"] == 0
    # A threshold of its own for each class; other classes do not match.
    mixed = found((box(0.4), 0.9, 0), (box(20.4), 0.8, 1), (box(40), 0.7, 0))
    result = measure([mixed], [truth((box(0), 0), (box(20), 1), (box(40), 1))], (0.85, 0.5), view="bev", points="all")
    assert result["ap/car"] == 0 and result["ap/person"] == pytest.approx(0.5)


def test_samples_are_apart_and_order_is_by_score() -> None:
    metric = BoxAveragePrecision(("car",), 0.5, points="all")
    metric.update([found((box(0), 0.2, 0))], [truth((box(0), 0))])
    # The same place in another sample is wrong, and it ranks first.
    metric.update([found((box(0), 0.9, 0)), found()], [truth((box(50), 0)), truth()])
    assert float(metric.compute()["ap/car"]) == pytest.approx(0.5 * 0.5)
    metric.reset()
    metric.update([found()], [truth((box(0), 0))])
    assert float(metric.compute()["ap/car"]) == 0


def test_heading_weights() -> None:
    rows = found((box(0, yaw=math.pi / 2), 0.9, 0), (box(10), 0.8, 0))
    square = (2.0, 2.0, 2.0)
    rows = rows._replace(boxes=torch.tensor([box(0, yaw=math.pi / 2, size=square), box(10, size=square)]))
    result = measure([rows], [truth((box(0, size=square), 0), (box(10, size=square), 0))], points="all")
    assert result["ap/car"] == pytest.approx(1.0)
    # A quarter turn counts a half; precision (0.5 + 1) / 2 at recall 1 lifts that at recall 1/2.
    assert result["aph/car"] == pytest.approx(0.75)


def test_an_oriented_overlap() -> None:
    """A quarter turn of a 4 x 2 box overlaps by 4 / 12."""
    rows, cars = found((box(0, yaw=math.pi / 2), 0.9, 0)), truth((box(0), 0))
    assert measure([rows], [cars], 0.32, view="bev")["ap/car"] == 1
    assert measure([rows], [cars], 0.35, view="bev")["ap/car"] == 0


def test_assignment() -> None:
    closeness = torch.tensor([[0.9, 0.8], [0.95, 0.1], [0.0, 0.6]])
    assert assign_greedily(closeness, torch.tensor([0.5, 0.5, 0.5])).tolist() == [0, -1, 1]
    assert average_precision(torch.zeros(0), torch.zeros(0), 3, "all") == 0
    torch.testing.assert_close(
        angle_difference(torch.tensor([3.0, 0.1]), torch.tensor([-3.0, -0.1])), torch.tensor([2 * math.pi - 6, 0.2])
    )


def test_agreement_with_sklearn() -> None:
    """Without a maximum over higher recalls the area is sklearn's average precision; ours is at least that."""
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    hits = (torch.rand(200) < torch.linspace(0.95, 0.1, 200)).double()
    scores = torch.linspace(1, 0, 200)
    ours = float(average_precision(hits, hits, int(hits.sum()), "all"))
    theirs = sklearn.average_precision_score(hits.numpy(), scores.numpy())
    assert theirs <= ours < theirs + 0.03


def test_bad_arguments() -> None:
    for kwargs, message in (
        (dict(thresholds=[0.5]), "1 thresholds for 2 classes"),
        (dict(thresholds=1.5), "between 0 and 1"),
        (dict(thresholds=0.5, view="side"), "view must be"),
        (dict(thresholds=0.5, points="12"), "points '11', '40' or 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            BoxAveragePrecision(("car", "person"), **kwargs)
    with pytest.raises(ValueError, match="1 predictions for 2 samples"):
        measure([found()], [truth(), truth()])
    with pytest.raises(ValueError, match="1 predictions for 2 samples"):
        NuScenesDetectionScore(("car",)).update([found()], [truth(), truth()])


def score(predictions, targets, classes=("car", "barrier", "traffic_cone")) -> dict[str, float]:
    metric = NuScenesDetectionScore(classes)
    metric.update(predictions, targets)
    return {name: float(value) for name, value in metric.compute().items()}


def test_nuscenes_perfect() -> None:
    rows = [([*box(5.0 * i), 1.0, 0.0], i % 3) for i in range(6)]
    result = score([found(*((b, 0.9 - 0.1 * i, label) for i, (b, label) in enumerate(rows)))], [truth(*rows)])
    assert result["map"] == pytest.approx(1.0)
    for error in ("mate", "mase", "maoe", "mave"):
        assert result[error] == pytest.approx(0, abs=1e-6)
    # The attribute error counts as 1.
    assert result["nds"] == pytest.approx((5 + 4) / 10)


def test_nuscenes_distances_and_errors() -> None:
    """1.5 m beside: a match at 2 and 4 m only; half as long; turned by 0.3; 1 m/s too fast."""
    cars = truth(([*box(0.0), 2.0, 0.0], 0))
    rows = found(([*box(0.0, 1.5, yaw=0.3, size=(2.0, 2.0, 1.5)), 3.0, 0.0], 0.9, 0))
    result = score([rows], [cars])
    assert result["ap/car"] == pytest.approx(0.5)
    assert result["mate"] == pytest.approx(1.5) and result["mase"] == pytest.approx(0.5)
    assert result["maoe"] == pytest.approx(0.3, abs=1e-6) and result["mave"] == pytest.approx(1.0)
    # Two of the classes have no ground truth and take no part; errors above 1 count as 1.
    assert result["nds"] == pytest.approx((5 * 0.5 + 0 + 0.5 + 0.7 + 0) / 10)


def test_nuscenes_precision_curve() -> None:
    """A wrong box first: precision rises linearly from (0, 0) to (1, 1/2), as the score interpolates it."""
    cars = truth((box(0), 0))
    result = score([found((box(40, 20), 0.9, 0), (box(0), 0.5, 0))], [cars])
    curve = [max(0.0, recall / 200 - 0.1) / 0.9 for recall in range(11, 101)]
    assert result["ap/car"] == pytest.approx(sum(curve) / 90)


def test_nuscenes_special_classes() -> None:
    # A barrier has no front: turned around it is right; a cone has no heading at all.
    targets = truth((box(0), 1), (box(10), 2))
    result = score([found((box(0, yaw=math.pi), 0.9, 1), (box(10, yaw=1.0), 0.9, 2))], [targets])
    assert result["maoe"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(result["mave"])
    # Beyond the range of its class nothing counts, neither as ground truth nor as a mistake.
    far = score([found((box(0), 0.9, 1), (box(35), 0.95, 1))], [truth((box(0), 1), (box(35), 1))])
    near = score([found((box(0), 0.9, 1))], [truth((box(0), 1))])
    assert far["ap/barrier"] == near["ap/barrier"] == pytest.approx(1.0)


def test_nuscenes_nothing_found() -> None:
    result = score([found()], [truth((box(0), 0))])
    assert result["map"] == 0 and result["mate"] == 1 and result["nds"] == 0
