"""Training of image detectors: data of COCO and VOC, the Lightning module, its schedule and the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader

from zoo.train.checks import read_config
from zoo.train.cli import main
from zoo.train.configs import find_config
from zoo.train.data.coco import CocoDetectionData, CompositeDetectionData, VocDetectionData
from zoo.train.export import read_checkpoint
from zoo.train.image_detection import ObjectDetector

needs_coco = pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="needs pycocotools")
# Numbers of COCO's categories have gaps.
CATEGORIES = {3: (220, 40, 40), 7: (40, 220, 40)}
SMALL = dict(channels=16, min_size=64, max_size=128, norm_groups=4)
RECIPES = sorted(path.stem for path in Path(find_config("detection/biformer_nano_composites")).parent.glob("*.yaml"))


def scene(index: int) -> tuple[Image.Image, list[dict]]:
    """Coloured rectangles on grey, with polygons, and a crowd region in the first image."""
    rng = np.random.default_rng(index)
    height, width = 64 + 4 * index, 80 - 3 * index
    pixels = np.full((height, width, 3), 128, np.uint8)
    rows = []
    # The third image is empty.
    for place in range(0 if index == 2 else 2):
        x, y = int(rng.integers(2, 10)) + place * width // 2, int(rng.integers(2, 20))
        w, h, category = int(rng.integers(16, 24)), int(rng.integers(18, 30)), (3, 7)[place]
        pixels[y : y + h, x : x + w] = CATEGORIES[category]
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        rows.append(dict(bbox=[x, y, w, h], category_id=category, segmentation=[polygon], iscrowd=0, area=w * h))
    if index == 0:
        counts = [0, 5 * height, height * (width - 5)]
        crowd = dict(counts=counts, size=[height, width])
        rows.append(dict(bbox=[0, 0, 5, height], category_id=3, segmentation=crowd, iscrowd=1, area=5 * height))
    return Image.fromarray(pixels), rows


@pytest.fixture
def coco(tmp_path):
    """Five training and three validation images in COCO's layout."""
    (tmp_path / "annotations").mkdir()
    for split, count in (("train2017", 5), ("val2017", 3)):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            image, rows = scene(i)
            image.save(tmp_path / split / f"{i}.png")
            images.append(dict(id=100 + i, file_name=f"{i}.png", height=image.height, width=image.width))
            annotations += [dict(row, image_id=100 + i, id=10 * i + k + 1) for k, row in enumerate(rows)]
        content = dict(
            images=images, annotations=annotations, categories=[dict(id=7, name="green"), dict(id=3, name="red")]
        )
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def data(root, **kwargs) -> CocoDetectionData:
    module = CocoDetectionData(str(root), **(dict(num_classes=2, num_workers=0) | kwargs))
    module.setup()
    return module


def detector(head: str = "retinanet", **kwargs) -> ObjectDetector:
    torch.manual_seed(0)
    options = SMALL if head == "retinanet" else {k: v for k, v in SMALL.items() if k != "norm_groups"}
    return ObjectDetector("resnet10t", 2, head, **(dict(detector_kwargs=options) | kwargs))


def trainer(**kwargs) -> Trainer:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return Trainer(accelerator="cpu", **(quiet | kwargs))


def blank(batches: int) -> DataLoader:
    batch = [torch.zeros(3, 64, 64)], [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))]
    return DataLoader([batch] * batches, batch_size=None)


def test_boxes_follow_the_image(coco) -> None:
    """Mirrored or not, a box holds its class's colour; empty images and crowds are left out in training."""
    module = data(coco)
    assert module.class_names == ["red", "green"]
    seed_everything(0, verbose=False)
    seen, firsts = 0, []
    for images, targets in module.train_dataloader():
        firsts.append(targets[0]["boxes"])
        for image, target in zip(images, targets, strict=True):
            assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
            assert len(target["labels"]) == 2 and not target["iscrowd"].any()
            for box, label in zip(target["boxes"].long().tolist(), target["labels"].tolist(), strict=True):
                x1, y1, x2, y2 = box
                colour = torch.tensor(CATEGORIES[(3, 7)[label]]) / 255
                torch.testing.assert_close(image[:, y1:y2, x1:x2], colour.view(3, 1, 1).expand(-1, y2 - y1, x2 - x1))
                seen += 1
    assert seen == 8
    assert torch.equal(firsts[0], next(iter(module.train_dataloader()))[1][0]["boxes"])


def test_evaluation_keeps_crowds_and_empty_images(coco) -> None:
    targets = [target[0] for _, target in data(coco).val_dataloader()]
    assert [len(target["labels"]) for target in targets] == [3, 2, 0]
    assert targets[0]["iscrowd"].tolist() == [0, 0, 1] and targets[2]["boxes"].shape == (0, 4)


@needs_coco
def test_masks(coco) -> None:
    module = data(coco, masks=True)
    for images, targets in module.val_dataloader():
        assert targets[0]["masks"].shape[1:] == images[0].shape[1:]
        for box, mask in zip(targets[0]["boxes"].long().tolist(), targets[0]["masks"], strict=True):
            x1, y1, x2, y2 = box
            assert mask[y1:y2, x1:x2].all() and mask.sum() == (x2 - x1) * (y2 - y1)


def test_masks_without_pycocotools(coco, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"masks of COCO need pycocotools: pip install 'attention-zoo\[detection\]'"):
        data(coco, masks=True)


def test_metric_without_a_library(monkeypatch) -> None:
    import torchmetrics.detection

    def missing(*args, **kwargs):
        raise ModuleNotFoundError("none")

    monkeypatch.setattr(torchmetrics.detection, "MeanAveragePrecision", missing)
    with pytest.raises(ImportError, match="COCO's metrics need pycocotools"):
        trainer().validate(detector(), blank(1), verbose=False)


def test_wrong_data(coco) -> None:
    with pytest.raises(FileNotFoundError, match="no .*test2017: expected"):
        data(coco, val_split="test2017")
    with pytest.raises(ValueError, match="num_classes is 3, but the data has 2 classes: red, green"):
        data(coco, num_classes=3)
    with pytest.raises(ValueError, match="batch_size is 9, but a training epoch has 4 images"):
        data(coco, batch_size=9).train_dataloader()
    (coco / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(ValueError, match="has no annotations, categories, images: not COCO's format"):
        data(coco)


def test_voc(tmp_path) -> None:
    """torchvision's layout; corners count from 1, difficult objects are left out."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (60, 50)).save(root / "JPEGImages" / "a.jpg")
    row = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>" \
          "<ymax>{}</ymax></bndbox></object>"  # fmt: skip
    objects = row.format("dog", 0, 1, 2, 60, 40) + row.format("cat", 1, 5, 5, 20, 20)
    (root / "Annotations" / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{objects}</annotation>")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    module = VocDetectionData(str(tmp_path), val_set="train", num_workers=0)
    module.setup()
    ((_, (target,)),) = module.val_dataloader()
    assert target["boxes"].tolist() == [[0, 1, 60, 40]] and module.class_names[target["labels"]] == "dog"
    with pytest.raises(FileNotFoundError, match="no Pascal VOC 2012 'val'.*ImageSets/Main/val.txt"):
        VocDetectionData(str(tmp_path)).setup()


class Rates(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer, *args) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedule() -> None:
    """Linear warm-up in updates, a tenth after each milestone in epochs."""
    watch = Rates()
    module = detector(lr=1e-3, warmup_steps=4, warmup_factor=0.2, milestones=(2, 3))
    trainer(max_epochs=4, callbacks=[watch]).fit(module, blank(3))
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0] + [0.1] * 3 + [0.01] * 3
    assert watch.values == pytest.approx([1e-3 * x for x in expected])
    with pytest.raises(ValueError, match="set trainer.max_epochs"):
        trainer(max_epochs=-1, max_steps=2).fit(detector(), blank(1))


@needs_coco
def test_learns(coco) -> None:
    module = detector(lr=3e-3, warmup_steps=3, milestones=(20,))
    run = trainer(max_epochs=20, check_val_every_n_epoch=20)
    run.fit(module, datamodule=data(coco, batch_size=4))
    assert run.callback_metrics["val/map_50"] > 0.3
    found = run.predict(module, data(coco).val_dataloader())[0][0]
    assert found["boxes"].shape[1] == 4 and "masks" not in found


@needs_coco
def test_masks_are_measured(coco) -> None:
    run, module = trainer(), detector("mask_rcnn")
    run.validate(module, data(coco, masks=True).val_dataloader(), verbose=False)
    assert {"val/map", "val/mask_map", "val/mask_map_50"} <= set(run.callback_metrics)


def test_checkpoint(coco, tmp_path) -> None:
    """Plain types only; the module comes back from it."""
    module, run = detector(no_decay=("norm",)), trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, datamodule=data(coco))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["zoo"]["data_config"]["label_names"] == ["red", "green"]
    again = ObjectDetector.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        for a, b in zip(again.eval()(image)[0].values(), module.eval()(image)[0].values(), strict=True):
            torch.testing.assert_close(a, b)


def test_command_line(coco, tmp_path, monkeypatch, capsys) -> None:
    """A shipped recipe, shrunk; random heads are not measured."""
    monkeypatch.chdir(tmp_path)
    small = {
        "data.init_args": dict(root=coco, num_classes=2, batch_size=1, num_workers=0),
        "model.init_args": dict(backbone="biformer_nano", warmup_steps=1),
        "model.init_args.detector_kwargs": dict(min_size=64, max_size=128),
        "trainer": dict(accelerator="cpu", devices=1, precision=32, max_epochs=1, limit_train_batches=2),
    }
    if importlib.util.find_spec("pycocotools") is None:
        small["trainer"]["limit_val_batches"] = 0
    options = [f"--{section}.{key}={value}" for section, values in small.items() for key, value in values.items()]
    recipe = ["--config", "detection/biformer_small_retinanet_coco", *options]
    with pytest.raises(SystemExit):
        main(["validate", *recipe])
    assert "would use random weights" in capsys.readouterr().err
    main(["fit", *recipe])
    assert list(tmp_path.rglob("last.ckpt"))


def test_composites(tmp_path) -> None:
    """Scenes as items: boxes and masks as they were composed."""
    from fashion import write_bars

    write_bars(tmp_path)
    module = CompositeDetectionData(str(tmp_path), image_size=64, scenes=4, val_scenes=2, num_workers=0)
    module.setup()
    scenes = module.splits["val"].source(torch.arange(2))
    for number, (images, (target,)) in enumerate(module.val_dataloader()):
        torch.testing.assert_close(images[0], scenes.pixels[number])
        expected = scenes.targets()[number]
        assert torch.equal(target["boxes"], expected["boxes"]) and torch.equal(target["labels"], expected["labels"])
        assert torch.equal(target["masks"].bool(), expected["masks"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_backbones_and_arguments_that_exist(recipe) -> None:
    options = read_config(find_config(f"detection/{recipe}"))["model"]["init_args"]
    options.pop("pretrained_backbone", None)
    with torch.device("meta"):
        module = ObjectDetector(num_classes=80, **options)
    assert module.net.head == options["head"]
