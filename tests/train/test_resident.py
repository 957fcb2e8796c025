"""The trainer that keeps its images on the device: augmentation, schedule and a whole small run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from zoo.train import resident
from zoo.train.distillation import Distillation, Distiller
from zoo.train.resident import (
    DeviceImages,
    Recipe,
    fit_teacher,
    jitter_colours,
    learning_rate,
    mix_images,
    random_boxes,
    train,
    training_batches,
)


@pytest.fixture
def images() -> DeviceImages:
    """Bright and dark pictures of different sizes, labelled by their brightness."""
    rng = np.random.default_rng(0)
    sizes = [(12, 16), (16, 10), (9, 9)]
    items = []
    for i in range(48):
        low = 150 * (i % 2)
        items.append((rng.integers(low, low + 60, (*sizes[i % 3], 3), dtype=np.uint8), i % 2))
    return DeviceImages(items, torch.device("cpu"))


def test_crops_stay_inside_their_image(images: DeviceImages) -> None:
    """No crop of a bright image may be darker than the image, whatever lies beside it on its canvas."""
    bright = torch.arange(1, 48, 2)
    crops = images.crops(bright, 8, (0.2, 1.0))
    assert crops.shape == (24, 3, 8, 8)
    assert crops.min() >= 150 / 255 - 1e-5 and crops.max() <= 1


def test_whole_image_is_a_crop(images: DeviceImages) -> None:
    image = DeviceImages([(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), 0)], torch.device("cpu"))
    torch.manual_seed(0)
    crop = image.crops(torch.zeros(16, dtype=torch.long), 8, (100.0, 100.0))  # clipped to the image
    plain = image.pixels[0].float() / 255
    assert all(torch.allclose(c, plain, atol=1e-5) or torch.allclose(c.flip(-1), plain, atol=1e-5) for c in crop)


def test_mixing_keeps_the_share_of_labels() -> None:
    np.random.seed(0)
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    for _ in range(8):
        mixed, target = mix_images(x, torch.eye(2))
        torch.testing.assert_close(target.sum(1), torch.ones(2))
        # The second class is the share of ones, so pixels and labels must agree.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), target[:, 1], rtol=0, atol=1e-5)


def test_boxes_and_colours_stay_in_range() -> None:
    boxes = random_boxes(64, 16, torch.full((64,), 0.25), torch.device("cpu"))
    assert boxes.shape == (64, 1, 16, 16) and 0.05 < boxes.float().mean() < 0.3
    x = torch.rand(4, 3, 8, 8)
    y = jitter_colours(x, 0.4)
    assert y.min() >= 0 and y.max() <= 1 and not torch.equal(x, y)


def test_schedule_warms_up_and_decays() -> None:
    rates = [learning_rate(i, 100, 1.0) for i in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) <= 5 and rates[-1] == pytest.approx(0.01, abs=2e-3)


def test_a_run_learns_and_repeats(images: DeviceImages) -> None:
    data = SimpleNamespace(
        data_config=dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.3] * 3), hparams=SimpleNamespace(num_classes=2)
    )
    recipe = Recipe(epochs=4, batch_size=16, ema=0.5, mix=0.2, erase=0.2, drop_path=0.0)
    (first, finished), (second, _) = (train(recipe, data, images, 0, "test_convnext") for _ in range(2))
    assert finished
    x = (images.crops(torch.arange(48), 32, (0.5, 1.0)) - 0.5) / 0.3
    with torch.no_grad():
        logits = first(x)
        assert torch.equal(logits, second(x))
    assert (logits.argmax(1) == images.labels).float().mean() > 0.9


def test_an_interrupt_keeps_the_average(images: DeviceImages, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(step: int, steps: int, peak: float) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return peak

    monkeypatch.setattr(resident, "learning_rate", interrupt)
    data = SimpleNamespace(
        data_config=dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.3] * 3), hparams=SimpleNamespace(num_classes=2)
    )
    net, finished = train(Recipe(epochs=9, batch_size=16), data, images, 0, "test_convnext")
    assert not finished and net(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert "interrupted after 2 of 27 steps" in capsys.readouterr().out


def test_the_teacher_is_fitted_and_frozen_again(images: DeviceImages, tmp_path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "teacher.pth")
    distiller = Distiller(Distillation("test_efficientnet", str(tmp_path / "teacher.pth")), 8, num_classes=2)
    config = dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.3] * 3)
    distiller.set_input_stats(config["mean"], config["std"])
    batches = training_batches(Recipe(epochs=1, batch_size=16), images, config, 2)
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    fit_teacher(distiller, batches, 40, lr=3e-3)
    x, target = next(batches)
    assert (distiller.probe(distiller.embed(x)).argmax(1) == target.argmax(1)).float().mean() > 0.8
    after = distiller.teacher.state_dict()
    assert not torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert not any(p.requires_grad for p in distiller.teacher.parameters()) and not distiller.teacher.training
