"""Composite scenes, the average precision of the resident training, and the training itself."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from fashion import write_bars
from PIL import Image

import zoo
from zoo.train import composites_resident as resident
from zoo.train.data.composites import MOST, CompositeSource, compose, photographs
from zoo.train.image_metrics import confusion, mean_average_precision, mean_iou
from zoo.train.scenes import GarmentPool


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("fashion"))


@pytest.fixture(scope="module")
def scenes(root):
    return CompositeSource(root, image_size=96)(torch.arange(24))


def test_scene_is_a_function_of_seed_and_number(root, scenes) -> None:
    source = CompositeSource(root, image_size=96)
    again = source(torch.tensor([7, 3]))
    for name in ("pixels", "semantic", "instance", "boxes", "labels"):
        assert torch.equal(getattr(again, name), getattr(scenes, name)[[7, 3]]), name
    other = compose(source.garments, source.photos, 1, torch.tensor([7]), 96)
    assert not torch.equal(other.pixels[0], scenes.pixels[7])


def test_masks_boxes_and_classes_agree(scenes) -> None:
    assert scenes.pixels.min() >= 0 and scenes.pixels.max() <= 1
    counts = (scenes.labels >= 0).sum(1)
    assert counts.max() > 3 and counts.float().mean() > 1.5
    for scene, target in enumerate(scenes.targets()):
        assert len(target["boxes"]) == counts[scene]
        union = target["masks"].any(0) if len(target["masks"]) else torch.zeros(96, 96).bool()
        assert torch.equal(union, scenes.semantic[scene] > 0)
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            rows, cols = mask.nonzero().unbind(1)
            assert box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
            assert (scenes.semantic[scene][mask] == label + 1).all() and mask.sum() >= 96 * 96 / 640
    # Unused places hold nothing.
    assert not scenes.boxes[scenes.labels < 0].any()


def test_pixels_are_of_the_topmost_garment(root) -> None:
    """White garments on a black photograph: what is bright is exactly what has a mask."""
    pool = GarmentPool(torch.full((10, 28, 28), 255, dtype=torch.uint8), torch.arange(10))
    scenes = compose(pool, torch.zeros(1, 3, 192, 192, dtype=torch.uint8), 0, torch.arange(8), 96)
    bright = scenes.pixels.amax(1) > 0.5
    masked = scenes.semantic > 0
    # A tint is at least 0.3, and a rim that is half opaque shades it further.
    assert not (bright & ~masked).any()
    assert (scenes.pixels.amax(1)[masked] > 0.03).all()
    assert masked.any() and (scenes.instance <= MOST).all()


def test_photographs(tmp_path) -> None:
    assert len(photographs("train")) == 3 and torch.equal(photographs("val"), photographs("test"))
    for i in range(9):
        Image.new("RGB", (20, 30), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    train, test = photographs("train", root=tmp_path), photographs("test", root=tmp_path)
    assert train.shape == (7, 3, 192, 192) and test[:, 0, 0, 0].tolist() == [60, 140]
    with pytest.raises(FileNotFoundError, match="needs 4 photographs"):
        photographs("train", root=tmp_path / "none")


def results(seed: int, images: int = 12) -> tuple[list, list]:
    """Targets, and results near them with confusions, misses and false alarms; square masks of the boxes."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=rng)

    def masks(boxes: torch.Tensor) -> torch.Tensor:
        place = torch.arange(100)
        inside = [(place >= boxes[:, i, None]) & (place < boxes[:, i + 2, None]) for i in (0, 1)]
        return inside[1][:, :, None] & inside[0][:, None, :]

    found, targets = [], []
    for image in range(images):
        n = image % 5
        corners = (rand(n, 2) * 60).round()
        boxes = torch.cat([corners, corners + 8 + (rand(n, 2) * 30).round()], 1)
        labels = (rand(n) * 3).long()
        near = (boxes + (rand(n, 4) - 0.5) * 4).round()
        corners = (rand(4, 2) * 60).round()
        near = torch.cat([near, torch.cat([corners, corners + 10], 1)])
        guessed = torch.cat([torch.where(rand(n) < 0.8, labels, (rand(n) * 3).long()), (rand(4) * 3).long()])
        targets.append(dict(boxes=boxes, labels=labels, masks=masks(boxes)))
        found.append(
            dict(boxes=near, labels=guessed, scores=torch.cat([0.2 + 0.8 * rand(n), 0.8 * rand(4)]), masks=masks(near))
        )
    return found, targets


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_that_of_coco(kind) -> None:
    pytest.importorskip("pycocotools")
    from zoo.train.image_detection import coco_metric

    found, targets = results(0)
    if kind == "segm":
        # torchmetrics leaves out masks of images without objects.
        kept = [i for i, target in enumerate(targets) if len(target["labels"])]
        found, targets = [found[i] for i in kept], [targets[i] for i in kept]
    metric = coco_metric((kind,))
    metric.update(found, targets)
    expected = metric.compute()
    ours = mean_average_precision(found, targets, 3, masks=kind == "segm")
    assert 0.1 < ours["map"] < 0.9
    for name, value in ours.items():
        assert value == pytest.approx(float(expected[name]), abs=1e-6), name


def test_average_precision_by_hand() -> None:
    """Two targets: the first result hits one, the second misses, the third hits the other. Precision 1, then 2/3."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    targets = [dict(boxes=boxes, labels=torch.zeros(2).long())]
    found = [
        dict(
            boxes=torch.stack([boxes[0], torch.tensor([80.0, 80, 90, 90]), boxes[1]]),
            scores=torch.tensor([0.9, 0.8, 0.7]),
            labels=torch.zeros(3).long(),
        )
    ]
    # 51 of 101 recalls lie up to one half.
    expected = (51 + 50 * 2 / 3) / 101
    assert mean_average_precision(found, targets, 2)["map"] == pytest.approx(expected)
    empty = [dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long())]
    assert mean_average_precision(empty, targets, 2)["map"] == 0
    assert np.isnan(mean_average_precision(empty, [dict(empty[0])], 2)["map"])
    with pytest.raises(ValueError, match="results of 1 images and targets of 2"):
        mean_average_precision(found, targets * 2, 1)


def test_mean_iou() -> None:
    counts = confusion(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    # The third class does not occur.
    assert mean_iou(counts) == pytest.approx(0.5)


def training(task: str, root, device: str = "cpu", size: int = 64):
    torch.manual_seed(0)
    task = resident.TASKS[task]()
    net = zoo.create_model(task.model, image_size=size).to(device).train()
    batches = resident.TrainingBatches(CompositeSource(root, image_size=size, device=device), task, net, 4)
    first = next(batches)
    return resident.TaskStep(task, net, resident.Recipe(epochs=0, batch_size=4), first), batches, first


@pytest.mark.parametrize("task", sorted(resident.TASKS))
def test_step_overfits_a_batch(task, root) -> None:
    step, _, batch = training(task, root)
    losses = [float(step(*batch, 1e-3)) for _ in range(10)]
    assert losses[-1] < 0.75 * losses[0]


def test_batches_are_new_scenes(root) -> None:
    _, batches, first = training("detect", root)
    x, target = next(batches)
    source = CompositeSource(root, image_size=64)
    expected = source(torch.arange(4, 8))
    torch.testing.assert_close(x, (expected.pixels - 0.286) / 0.353)
    assert torch.equal(target[..., :4], expected.boxes) and torch.equal(target[..., 4].long(), expected.labels)
    assert not torch.equal(x, first[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", sorted(resident.TASKS))
def test_graphs_do_what_single_steps_do(task, root) -> None:
    """The captured step learns, and captured batches are those of the CPU."""
    step, batches, batch = training(task, root, "cuda")
    batch = tuple(x.clone() for x in batch)
    losses = [step(*batch, 1e-3).item() for _ in range(20)]
    assert losses[-1] < 0.75 * losses[0]
    numbers = batches.index.clone()
    x, _ = next(batches)
    expected = CompositeSource(root, image_size=64)(numbers.cpu())
    # Rounding may differ by a level, and at the rims of garments.
    assert ((x.cpu() * 0.353 + 0.286 - expected.pixels).abs() > 2 / 255).float().mean() < 1e-3


@pytest.mark.parametrize("task", sorted(resident.TASKS))
def test_run(task, root, tmp_path, capsys, monkeypatch) -> None:
    """A short run writes a model that loads, with its results; an interrupt keeps what there is."""
    handler = signal.getsignal(signal.SIGTERM)
    small = ["--minutes", "0.03", "--batch-size", "2", "--image-size", "64", "--val-scenes", "4", "--test-scenes", "4"]
    folder = tmp_path / "model"
    try:
        resident.main([task, "--root", str(root), "--out", str(folder), *small])
    finally:
        signal.signal(signal.SIGTERM, handler)
    metric = resident.TASKS[task].metric
    metrics = json.loads((folder / "config.json").read_text())["metrics"]
    assert metric in metrics and f"val_{metric}" in metrics
    out = capsys.readouterr().out
    assert "100% of the time" in out or "validation" in out
    assert "seed 0" in (folder / "README.md").read_text()
    model = zoo.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.predict(torch.rand(3, 64, 64))


def test_interrupt_keeps_the_average(root, tmp_path, capsys) -> None:
    step, batches, _ = training("segment", root)
    keeper = resident.Keeper(step.task, tmp_path / "m", lambda net: {"miou": 1.0}, print)

    def interrupted():
        yield next(batches)
        raise KeyboardInterrupt

    assert resident.train(step, interrupted(), 60, 1e-3, keeper) is False
    assert (tmp_path / "m" / "model.safetensors").is_file() and "interrupted" in capsys.readouterr().out


def test_only_a_better_network_is_kept(root, tmp_path) -> None:
    step, _, _ = training("segment", root)
    values = iter([3.0, 2.0, float("nan"), 4.0])
    keeper = resident.Keeper(step.task, tmp_path / "m", lambda net: {"miou": next(values)}, lambda line: None)
    kept = []
    for _ in range(4):
        keeper.offer(step.average, "x")
        kept.append(json.loads((tmp_path / "m" / "config.json").read_text())["metrics"]["val_miou"])
    assert kept == [3.0, 3.0, 3.0, 4.0]


def test_a_loss_that_is_not_finite_ends_the_run(root, tmp_path) -> None:
    step, batches, batch = training("segment", root)
    broken = iter([(batch[0] * float("nan"), batch[1])])
    with pytest.raises(RuntimeError, match="the loss of step 0 is nan; try a smaller --lr"):
        resident.train(step, broken, 60, 1e-3, None)
