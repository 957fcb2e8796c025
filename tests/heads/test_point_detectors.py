"""Detectors in point clouds: from points to boxes, hostile clouds, saving and loading, fast inference, converters."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import hub, registry
from zoo.cli import main
from zoo.convert import flatformer as flatformer_converter
from zoo.convert import scatterformer as scatterformer_converter
from zoo.heads.detections import Detections, Targets
from zoo.heads.point_base import PointDetector, merge_sweeps
from zoo.heads.point_runtime import ROWS, JointBranches, fold_norms

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RANGE = (-8.0, -8.0, -2.0, 8.0, 8.0, 4.0)
NAMES = ["flatformer_nano", "scatterformer_nano", "scatterformer_fusion"]


def build(name: str, **settings) -> PointDetector:
    """A small detector whose norms are not the identity."""
    torch.manual_seed(0)
    if name == "scatterformer_fusion":
        fusion = dict(head="transfusion", small_classes=("pedestrian",), radius=3, max_candidates=60)
        name, settings = "scatterformer_nano", {**fusion, **settings}
    detector = zoo.create_model(name, point_range=RANGE, **settings).eval()
    for module in detector.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    # Objects everywhere, of a size that makes some of them overlap.
    branches = dict(getattr(detector.head, "branch_modules", None) or detector.head.prediction_head)
    for key, bias in {"heatmap": 0.0, "hm": 0.0, "iou": 0.8, "dim": 0.5}.items():
        if key in branches:
            nn.init.constant_(branches[key][-1].bias, bias)
    return detector


@pytest.fixture(scope="module")
def detectors() -> dict[str, PointDetector]:
    return {name: build(name) for name in NAMES}


def cloud(points: int, seed: int = 0) -> Tensor:
    u = torch.rand(points, 5, generator=torch.Generator().manual_seed(seed))
    xy = (2 * u[:, :2] - 1) * (2 * u[:, :2] - 1).abs() * 7.9
    return torch.cat([xy, u[:, 2:3].square() * 4 - 1, u[:, 3:]], 1)


def assert_same(actual: Detections, expected: Detections, tolerance: float = 1e-4) -> None:
    """Equal boxes of each class, in any order."""
    assert torch.equal(actual.labels.bincount(), expected.labels.bincount())
    for label in expected.labels.unique():
        a, b = (Detections(*(x[found.labels == label] for x in found)) for found in (actual, expected))
        near = torch.cdist(b.boxes[:, :6], a.boxes[:, :6]).argmin(1)
        assert near.unique().numel() == len(near)
        torch.testing.assert_close(a.boxes[near], b.boxes, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a.scores[near], b.scores, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_from_points_to_boxes(detectors: dict, name: str) -> None:
    detector = detectors[name]
    (found,) = detector([cloud(1500)])
    assert isinstance(found, Detections) and len(found.scores) > 3
    assert found.boxes.shape == (len(found.scores), detector.head.columns) and found.boxes.dtype == torch.float32
    assert found.labels.dtype == torch.int64 and found.labels.max() < len(detector.classes)
    assert ((found.scores > 0) & (found.scores <= 1)).all() and not found.boxes.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_samples(detectors: dict, name: str) -> None:
    detector, clouds = detectors[name], [cloud(1500), cloud(40, 1), cloud(0), cloud(700, 2)]
    together = detector(clouds)
    assert len(together[2].scores) == 0
    for found, own in zip(together, clouds, strict=True):
        assert_same(found, detector([own])[0])


@pytest.mark.parametrize("name", NAMES)
def test_order_of_points_does_not_matter(detectors: dict, name: str) -> None:
    points = cloud(1500)
    shuffled = points[torch.randperm(len(points))]
    assert_same(detectors[name]([shuffled])[0], detectors[name]([points])[0])


@pytest.mark.parametrize("name", NAMES)
def test_hostile_clouds(detectors: dict, name: str) -> None:
    detector, points = detectors[name], cloud(800)
    assert detector([]) == []
    far = points + torch.tensor([100.0, 0, 0, 0, 0])
    broken = torch.full((5, 5), float("nan"))
    for empty in (points[:0], far, broken, torch.full((3, 5), float("inf"))):
        (found,) = detector([empty])
        assert found.boxes.shape == (0, detector.head.columns) and found.labels.dtype == torch.int64
    one = detector([points[:1]])[0]
    assert one.boxes.isfinite().all()
    # Points that are nowhere or without a number change nothing.
    assert_same(detector([torch.cat([far, points, broken])])[0], detector([points])[0])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(4, 5), "a list with a tensor"),
        ([torch.zeros(4, 5), torch.zeros(4, 4)], r"sample 1 must be float32 \[N, 5\] \(x, y, z, .*got .*\(4, 4\)"),
        ([torch.zeros(4, 5).double()], "got torch.float64"),
        ([torch.zeros(5)], r"\(5,\)"),
    ],
)
def test_wrong_clouds_are_named(detectors: dict, points, message: str) -> None:
    for detector in detectors.values():
        with pytest.raises(ValueError, match=message):
            detector(points)


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_every_parameter(name: str) -> None:
    detector = build(name).train()
    boxes = torch.tensor([[2.0, 1, 0, 4, 2, 1.5, 0.3], [-3, 2, 0, 1, 1, 2, 0]])
    targets = [Targets(boxes, torch.tensor([0, 1])), Targets(boxes[:0], torch.zeros(0, dtype=torch.int64))]
    losses = detector.loss([cloud(1000), cloud(600, 1)], targets)
    parts = [value for key, value in losses.items() if key.startswith("loss_")]
    torch.testing.assert_close(losses["loss"], torch.stack(parts).sum())
    losses["loss"].backward()
    without = [key for key, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # Queries and keys of an attention to a single token have no influence.
    assert all("self_attn.in_proj" in key for key in without), without
    with pytest.raises(ValueError, match="each sample needs its targets, got 1 clouds and 2"):
        detector.loss([cloud(10)], targets)
    with pytest.raises(ValueError, match="no cloud of the batch has a point in the range"):
        detector.loss([cloud(0)], targets[:1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_fast_inference_gives_the_same_boxes(name: str, device: str, padded: bool) -> None:
    detector, clouds = build(name).to(device), [cloud(1500), cloud(0), cloud(700, 2)]
    runtime = detector.accelerate(dtype=torch.float32, padded=padded)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in (clouds, [cloud(0)], [cloud(1200, 3)], []):
            batch = [c.to(device) for c in batch]
            for found, expected in zip(runtime(batch), detector(batch), strict=True):
                assert_same(found, expected, 2e-3)


def test_fast_inference_grows_and_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = build("flatformer_nano")
    monkeypatch.setattr("zoo.heads.point_runtime.ROWS", 64)
    monkeypatch.setattr("zoo.heads.point_runtime.PATIENCE", 2)
    runtime, small, large = detector.accelerate(padded=True), [cloud(30)], [cloud(2000)]
    for batch in (small, large, large, small, small):
        assert_same(runtime(batch)[0], detector(batch)[0])
        capacity = runtime._rooms[1].capacity
        voxels = len(detector.vfe_module(batch)[1].coords)
        assert voxels < capacity
    assert capacity < 4 * voxels + 2 * 64
    assert ROWS > 64


def test_fast_inference_sees_full_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later stages of ScatterFormer have room of their own."""
    detector, batch = build("scatterformer_nano"), [cloud(300)]
    monkeypatch.setattr("zoo.heads.point_runtime.ROWS", 64)
    expected = detector(batch)[0]
    runtime = detector.accelerate(padded=True)
    assert_same(runtime(batch)[0], expected)
    enough = runtime._rooms[1].rows
    assert len(enough) == 4
    for stage in range(4):
        runtime._rooms[1].rows = tuple(64 if i == stage else n for i, n in enumerate(enough))
        assert_same(runtime(batch)[0], expected)
        assert runtime._rooms[1].rows == enough


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_half_precision_finds_what_float_finds(name: str, device: str) -> None:
    detector, batch = build(name).to(device), [cloud(1500).to(device)]
    runtime = detector.accelerate(dtype=torch.bfloat16, padded=True)
    assert runtime.detector.head.limits.dtype == runtime.detector.head.nms.threshold.dtype == torch.float32
    found, expected = runtime(batch)[0], detector(batch)[0]
    confident = expected.scores > expected.scores.median()
    near = torch.cdist(expected.boxes[confident, :3], found.boxes[:, :3]).min(1).values
    assert found.boxes.dtype == torch.float32 and (near < 0.3).float().mean() > 0.8


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folded_norms_change_nothing(name: str) -> None:
    detector = build(name)
    x = torch.randn(1, *detector.map_shape)
    expected = detector.dense(x)
    folded = fold_norms(build(name))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) < 15
    head = JointBranches(folded.head) if name != "scatterformer_fusion" else folded.head
    maps = head(folded.neck_map(x))
    assert list(maps) == list(expected)
    for key, value in maps.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading(name: str, tmp_path) -> None:
    detector, points = build(name), [cloud(800)]
    expected = detector(points)[0]
    folder = hub.save_model(detector, tmp_path / "saved", metrics={"ap_car": 0.5}, card={"license": "apache-2.0"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = hub.check_folder(folder)
    assert config["architecture"] == detector.config["architecture"] and config["metrics"] == {"ap_car": 0.5}
    detector.save_pretrained(tmp_path / "mixin")
    for loaded in (
        zoo.create_model(f"local-dir:{folder}", pretrained=True),
        zoo.create_model(f"local-dir:{tmp_path / 'mixin'}", pretrained=True),
        type(detector).from_pretrained(tmp_path / "mixin"),
        type(detector).from_pretrained(folder),
    ):
        assert loaded.point_range == RANGE and loaded.classes == detector.classes
        assert_same(loaded.eval()(points)[0], expected, 1e-6)
    half = hub.save_model(detector, tmp_path / "half", half=True)
    loaded = zoo.create_model(f"local-dir:{half}", pretrained=True)
    assert next(loaded.parameters()).dtype == torch.float32
    random = zoo.create_model(f"local-dir:{folder}")
    assert not torch.equal(next(random.parameters()), next(detector.parameters()))


def test_damaged_and_misfit_folders_are_explained(tmp_path) -> None:
    folder = hub.save_model(build("flatformer_nano"), tmp_path / "m")
    with pytest.raises(ValueError, match="do not fit the model"):
        zoo.create_model(f"local-dir:{folder}", pretrained=True, classes=["car"])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] + b"x" * 100)
    with pytest.raises(hub.HubError, match="damaged"):
        zoo.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(ValueError, match="takes no label_names"):
        hub.save_model(build("flatformer_nano"), tmp_path / "n", label_names=["a", "b", "c"])


def test_embedded_weights_are_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = build("flatformer_nano")
    hub.save_model(detector, tmp_path / "flatformer_nano.test", metrics={"ap_car": 0.5})
    monkeypatch.setattr(registry, "EMBEDDED", tmp_path)
    for name in ("flatformer_nano", "flatformer_nano.test"):
        loaded = zoo.create_model(name, pretrained=True)
        assert torch.equal(next(loaded.parameters()), next(detector.parameters()))
    assert "flatformer_nano.test" in zoo.list_models("flatformer*", pretrained=True)
    (weights,) = zoo.model_info("flatformer_nano").weights
    assert (weights.name, weights.source, weights.metrics) == ("flatformer_nano.test", "embedded", {"ap_car": 0.5})
    with pytest.raises(ValueError, match="Unknown tag 'nope' .*Valid tags: test"):
        zoo.create_model("flatformer_nano.nope", pretrained=True)


def test_models_are_listed_and_described() -> None:
    names = zoo.list_models(task="object-detection-3d")
    assert {"flatformer_waymo", "flatformer_waymo_2f", "flatformer_waymo_3f", "scatterformer_waymo"} <= set(names)
    assert set(names) <= set(zoo.list_models()) and not set(names) & set(zoo.list_models(task="image-classification"))
    assert zoo.list_models("scatterformer_n*") == ["scatterformer_nano", "scatterformer_nuscenes"]
    assert "flatformer_nano" not in zoo.list_models(exclude_filters="*_nano")
    # Parameters of the official models.
    params = {"flatformer_waymo": 2_268_110, "scatterformer_waymo": 12_300_908, "scatterformer_nuscenes": 12_603_007}
    for name, count in params.items():
        info = zoo.model_info(name)
        assert (info.params, info.task) == (count, "object-detection-3d") and info.gmacs > 100
        json.dumps(info.to_dict())
    for name in ("flatformer_nano", "scatterformer_nano"):
        assert zoo.model_info(name).params < 4e6
    assert zoo.model_info("flatformer_waymo").input_size == (5, 468, 468)
    assert zoo.model_info("scatterformer_nuscenes").input_size == (5, 360, 360)


def test_official_weights_that_must_be_converted_are_named() -> None:
    with pytest.raises(hub.HubError, match="zoo convert scatterformer FILE --model scatterformer_nuscenes --out DIR"):
        zoo.create_model("scatterformer_nuscenes", pretrained=True)


def test_settings_that_do_not_fit_are_explained() -> None:
    with pytest.raises(ValueError, match="an even number of cells along x and y, got 41 and 40"):
        zoo.create_model("flatformer_nano", point_range=(-8.0, -8.0, -2.0, 8.4, 8.0, 4.0))
    with pytest.raises(ValueError, match="classes must be different names"):
        zoo.create_model("flatformer_nano", classes=["car", "car"])
    assert zoo.create_model("flatformer_nano", classes=["car"]).num_classes == 1


@pytest.mark.parametrize("family", ["flatformer", "scatterformer"])
def test_conversion(family: str, tmp_path, capsys: pytest.CaptureFixture) -> None:
    """Training checkpoints of the official code, as they are saved, become model folders."""
    detector = zoo.create_model(f"{family}_nano")
    state = detector.state_dict()
    if family == "flatformer":
        checkpoint = {"meta": {"epoch": 2}, "state_dict": state, "optimizer": {}}
    else:
        state = {f"module.{name}": value for name, value in state.items()}
        checkpoint = {"model_state": {**state, "module.global_step": torch.zeros(1)}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "official.pth")
    assert main(["convert", family, str(tmp_path / "official.pth"), "--out", str(tmp_path / "out")]) == 0
    assert f"({family}_nano)" in capsys.readouterr().out
    loaded = zoo.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), detector.state_dict(), rtol=0, atol=0)


def test_foreign_checkpoints_are_refused() -> None:
    for converter in (flatformer_converter, scatterformer_converter):
        with pytest.raises(ValueError, match="This is no .*Former checkpoint"):
            converter.convert({"head.weight": torch.zeros(1)})


def test_merged_sweeps() -> None:
    now = torch.tensor([[1.0, 0, 0, 0.5, 0.9], [20, 0, 0, 0.5, 0.9]])
    past = torch.tensor([[3.0, 0, 0, 0.4, 0.9], [10, 0, 0, 0.4, 0.9]])
    ahead = torch.eye(4)
    ahead[0, 3] = 2.0  # the vehicle has moved two metres on
    merged = merge_sweeps([now, past, past], [ahead, torch.eye(4), ahead])
    assert merged[:, 0].tolist() == [1, 20, 8, 10] and merged[:, 4].tolist() == [0, 0, -1, -2]
    assert merge_sweeps([now, past])[:, 0].tolist() == [1, 20, 10]
    with pytest.raises(ValueError, match="at least the current sweep"):
        merge_sweeps([])
