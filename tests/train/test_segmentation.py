"""Training of segmentation networks: data from folders, joint transforms, the Lightning module and its schedules."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fashion import write_bars
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from zoo.train.checks import read_config
from zoo.train.cli import main
from zoo.train.configs import find_config
from zoo.train.data.segmentation import (
    BalancedCrop,
    CompositeSegmentationData,
    EvalResize,
    PadTo,
    SegmentationFolderData,
    VOCSegmentationData,
)
from zoo.train.export import read_checkpoint
from zoo.train.segmentation import SemanticSegmenter, pixel_cross_entropy

RECIPES = sorted(path.stem for path in Path(find_config("segmentation/biformer_nano_composites")).parent.glob("*.yaml"))

# ADE20K's labels: 0 for none, then the classes.
COLOURS = {0: (128, 128, 128), 1: (220, 30, 30), 2: (30, 220, 30), 3: (30, 30, 220)}
SMALL = dict(num_classes=3, crop_size=64, short_side=64, batch_size=4, num_workers=0)
HEADS = {"semantic_fpn": dict(pyramid_channels=16, channels=16), "upernet": dict(channels=16)}


def scene(index: int, height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """Four quadrants, each of one label and its colour."""
    labels = np.zeros((height, width), np.uint8)
    for k, label in enumerate(np.random.default_rng(index).permutation(4)):
        rows = slice(0, height // 2) if k < 2 else slice(height // 2, None)
        labels[rows, slice(0, width // 2) if k % 2 else slice(width // 2, None)] = label
    return Image.fromarray(np.array([COLOURS[k] for k in range(4)], np.uint8)[labels]), labels


@pytest.fixture
def ade(tmp_path):
    """Eight training and three validation scenes of different sizes in ADE20K's layout."""
    for split, count in (("training", 8), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            image, labels = scene(i, 70 + 3 * i, 90 - 5 * i)
            image.save(tmp_path / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{i}.png")
    return tmp_path


def data(root, **kwargs) -> SegmentationFolderData:
    module = SegmentationFolderData(str(root), **(SMALL | kwargs))
    module.setup()
    return module


def segmenter(head: str = "semantic_fpn", backbone: str = "resnet10t", **kwargs) -> SemanticSegmenter:
    torch.manual_seed(0)
    return SemanticSegmenter(backbone, 3, head, head_kwargs=HEADS[head], **kwargs)


def trainer(**kwargs) -> Trainer:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return Trainer(accelerator="cpu", **(quiet | kwargs))


def blank(batches: int) -> DataLoader:
    batch = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    return DataLoader([batch] * batches, batch_size=None)


def pair(height: int, width: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    labels = torch.arange(height * width).view(height, width) % 251
    return tv_tensors.Image(labels.expand(3, -1, -1).to(torch.uint8)), tv_tensors.Mask(labels.to(torch.uint8))


def test_training_items(ade) -> None:
    module = data(ade)
    seed_everything(3, verbose=False)
    batches = list(module.train_dataloader())
    images, labels = batches[0]
    assert len(batches) == 2
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    assert labels.shape == (4, 64, 64) and labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
    assert all(torch.equal(a, b) for a, b in zip(images, next(iter(module.train_dataloader()))[0], strict=True))


def test_image_and_labels_move_together(ade) -> None:
    """Whatever the crop, a pixel has its class's colour, those near the borders of classes aside."""
    module = data(ade, photometric=False)
    mean, std = (torch.tensor(module.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
    colours = torch.tensor([COLOURS[k] for k in range(4)]).float()
    for images, labels in module.train_dataloader():
        for image, found in zip(images, labels, strict=True):
            pixels = ((image * std + mean) * 255).permute(1, 2, 0)
            nearest = torch.cdist(pixels.reshape(-1, 3), colours).argmin(1).view(64, 64)
            seen = found != 255
            # JPEG blurs the borders.
            assert (nearest[seen] - 1 == found[seen]).float().mean() > 0.9


def test_evaluation_items(ade) -> None:
    """Images are resized to multiples, labels keep the size of the file; label 0 is ignored, others count from 0."""
    for i, (image, labels) in enumerate(data(ade, size_multiple=32).val_dataloader()):
        raw = torch.from_numpy(scene(i, 70 + 3 * i, 90 - 5 * i)[1]).long()
        torch.testing.assert_close(labels[0], torch.where(raw == 0, 255, raw - 1))
        assert image.shape == (1, 3, 64, 96)
    (image, _), *_ = data(ade).val_dataloader()
    assert image.shape == (1, 3, 64, 82)


def test_voc(tmp_path) -> None:
    """torchvision's layout, with palettes; label 0 is a class and 255 is ignored."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    image, labels = scene(0, 70, 90)
    labels = np.where(labels == 3, 255, labels).astype(np.uint8)
    image.save(root / "JPEGImages" / "a.jpg")
    annotation = Image.fromarray(labels)
    annotation.putpalette([value for k in range(256) for value in (k, 255 - k, k)])
    annotation.save(root / "SegmentationClass" / "a.png")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    module = VOCSegmentationData(str(tmp_path), val_set="train", batch_size=1, num_workers=0)
    module.setup()
    assert module.hparams.num_classes == 21
    (_, found), *_ = module.val_dataloader()
    torch.testing.assert_close(found[0], torch.from_numpy(labels).long())
    with pytest.raises(FileNotFoundError, match="no Pascal VOC 2012 'val'.*ImageSets/Segmentation/val.txt"):
        VOCSegmentationData(str(tmp_path)).setup()


def test_composites(tmp_path) -> None:
    """Scenes as items: the label maps are those of the composed scenes."""
    write_bars(tmp_path)
    sizes = dict(scene_size=64, crop_size=64, short_side=64)
    module = CompositeSegmentationData(str(tmp_path), scenes=4, val_scenes=2, num_workers=0, **sizes)
    module.setup()
    scenes = module.splits["val"].source(torch.arange(2))
    found = torch.cat([labels for _, labels in module.val_dataloader()])
    assert torch.equal(found, scenes.semantic) and module.class_names[0] == "background"
    with pytest.raises(ValueError, match="num_classes is 5, but the data has 11 classes"):
        CompositeSegmentationData(str(tmp_path), num_classes=5).setup()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_backbones_and_arguments_that_exist(recipe) -> None:
    options = read_config(find_config(f"segmentation/{recipe}"))["model"]["init_args"]
    options.pop("pretrained_backbone", None)
    with torch.device("meta"):
        SemanticSegmenter(num_classes=150, **options)


def test_wrong_folders(ade, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*annotations/test: expected"):
        (ade / "images" / "test").mkdir()
        data(ade, val_split="test")
    (ade / "annotations" / "training" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 images have no annotation in .*: 2.png"):
        data(ade)


def test_wrong_labels(ade) -> None:
    module = data(ade, num_classes=2)
    with pytest.raises(ValueError, match=r"validation/0.png has class 2, but num_classes is 2"):
        next(iter(module.val_dataloader()))
    with pytest.raises(ValueError, match="different sizes: set val_batch_size to 1"):
        next(iter(data(ade, val_batch_size=2).val_dataloader()))
    path = ade / "annotations" / "validation" / "0.png"
    Image.new("RGB", (90, 70)).save(path)
    with pytest.raises(ValueError, match="0.png must have one number a pixel .* got mode RGB"):
        next(iter(data(ade).val_dataloader()))
    Image.new("L", (70, 90)).save(path)
    with pytest.raises(ValueError, match="0.png has 90 x 70 labels, its image 70 x 90 pixels"):
        next(iter(data(ade).val_dataloader()))
    with pytest.raises(ValueError, match="batch_size is 9, but a training epoch has 8 images"):
        data(ade, batch_size=9).train_dataloader()
    with pytest.raises(ValueError, match="num_classes must lie between 2 and 255, got 300"):
        data(ade, num_classes=300)


def test_crop_and_pad() -> None:
    image, mask = pair(20, 70)
    torch.manual_seed(0)
    found, labels = BalancedCrop(32)(image, mask)
    assert found.shape == (3, 20, 32) and torch.equal(found[0], labels)
    padded, padded_labels = PadTo(32)(found, labels)
    assert padded.shape == (3, 32, 32) and torch.equal(padded[:, :20], found) and not padded[:, 20:].any()
    assert torch.equal(padded_labels[:20], labels) and (padded_labels[20:] == 255).all()


def test_crop_avoids_one_class() -> None:
    """Class 1 fills all but a stripe of a tenth of the width: most crops of a tenth would see nothing else."""
    mask = torch.ones(10, 100, dtype=torch.uint8)
    mask[:, 45:50] = 2
    image = tv_tensors.Image(mask.expand(3, -1, -1).clone())
    torch.manual_seed(0)

    def mixed(max_share: float) -> int:
        crop = BalancedCrop(10, max_share)
        return sum(len(crop(image, tv_tensors.Mask(mask))[1].unique()) == 2 for _ in range(60))

    assert mixed(0.75) > 2 * mixed(1.0) > 0


def test_eval_resize_limits_the_longer_side() -> None:
    image, mask = EvalResize(64, 128)(*pair(20, 80))
    assert image.shape == (3, 32, 128) and mask.shape == (20, 80)


def test_loss_ignores_pixels_without_label() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[:, :2] = 255
    expected = nn.functional.cross_entropy(logits[:, :, 2:], labels[:, 2:])
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), expected)
    assert pixel_cross_entropy(logits, torch.full_like(labels, 255)) == 0


def test_metrics_at_the_size_of_the_labels(ade) -> None:
    """Mean IoU as counted by hand, labels of 255 left out."""
    module, loader = segmenter().eval(), data(ade).val_dataloader()
    run = trainer()
    run.validate(module, loader, verbose=False)
    counts = torch.zeros(3, 3)
    for image, labels in loader:
        with torch.no_grad():
            logits = nn.functional.interpolate(module(image), labels.shape[-2:], mode="bilinear")
        seen = labels != 255
        counts += torch.bincount(3 * labels[seen] + logits.argmax(1)[seen], minlength=9).view(3, 3)
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    assert run.callback_metrics["val/miou"] == pytest.approx(float((counts.diag() / union).mean()), abs=1e-5)
    assert run.callback_metrics["val/acc"] == pytest.approx(float(counts.diag().sum() / counts.sum()), abs=1e-5)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_learns(ade, head) -> None:
    module = segmenter(head, lr=5e-3, warmup_steps=2)
    run = trainer(max_epochs=10, check_val_every_n_epoch=10)
    run.fit(module, datamodule=data(ade, scale=(1.0, 1.2), photometric=False))
    assert run.global_step == 20
    # Chance is about 0.17 for one class everywhere.
    assert run.callback_metrics["val/miou"] > 0.5
    assert ("train/auxiliary_loss" in run.callback_metrics) == (head == "upernet")
    found = run.predict(module, data(ade).val_dataloader())[0]
    assert found.shape == (1, 64, 82) and found.dtype == torch.int64


class Rates(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer, *args) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedules() -> None:
    """Counted in updates: linear warm-up, then the polynomial or the cosine over all updates."""

    def rates(**kwargs) -> list[float]:
        watch, module = Rates(), segmenter(lr=1.0, warmup_steps=4, warmup_lr=0.2, **kwargs)
        run = trainer(max_steps=10, max_epochs=-1, callbacks=[watch])
        run.fit(module, blank(3))
        return watch.values

    warm = [0.2, 0.4, 0.6, 0.8]
    assert rates(power=2.0) == pytest.approx(warm + [(1 - k / 10) ** 2 for k in range(4, 10)])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(4, 10)]
    assert rates(scheduler="cosine", min_lr=0.1) == pytest.approx(warm + cosine)


def test_no_decay() -> None:
    module = segmenter(backbone="biformer_nano", no_decay=["norm"], weight_decay=0.01)
    run = trainer(max_steps=1)
    run.fit(module, blank(1))
    groups = run.optimizers[0].param_groups
    exempt = [p for name, p in module.net.named_parameters() if "norm" in name]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in exempt}


def test_checkpoint(ade, tmp_path) -> None:
    """Plain types only; the module comes back from it."""
    run = trainer(max_steps=1)
    module = segmenter("upernet", no_decay=("norm",))
    run.fit(module, datamodule=data(ade))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint["zoo"]["data_config"]["input_size"] == [3, 64, 64]
    again = SemanticSegmenter.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again.eval()(x), module.eval()(x))


def test_command_line(ade, tmp_path, monkeypatch, capsys) -> None:
    """The shipped recipe, shrunk; random heads are not measured."""
    monkeypatch.chdir(tmp_path)
    small = {
        "data.init_args": dict(root=ade, num_classes=3, crop_size=64, short_side=64, batch_size=2, num_workers=0),
        "model.init_args": dict(backbone="biformer_nano", warmup_steps=1),
        "trainer": dict(
            accelerator="cpu", devices=1, precision=32, max_steps=2, limit_val_batches=1, val_check_interval=2
        ),
    }
    options = [f"--{section}.{key}={value}" for section, values in small.items() for key, value in values.items()]
    recipe = ["--config", str(find_config("segmentation/biformer_small_fpn_ade20k")), *options]
    with pytest.raises(SystemExit):
        main(["validate", *recipe])
    assert "would use random weights" in capsys.readouterr().err
    main(["fit", *recipe, "--trainer.limit_train_batches=2"])
    main(["validate", *recipe, "--ckpt_path=last"])
    assert "val/miou" in capsys.readouterr().out


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="head must be"):
        SemanticSegmenter("resnet10t", 3, "fcn")
    with pytest.raises(ValueError, match="Unknown model"):
        SemanticSegmenter("resnet10tt", 3)
    with pytest.raises(ValueError, match="schedule needs an end"):
        trainer(max_epochs=-1).fit(segmenter(), blank(1))
