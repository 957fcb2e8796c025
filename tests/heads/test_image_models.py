"""Named segmenters and detectors of images: creation by name, weights in a folder, prediction."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo import hub

NAMES = ["semantic_fpn_biformer_nano", "retinanet_biformer_nano"]


def build(name: str, **kwargs):
    torch.manual_seed(0)
    return zoo.create_model(name, **kwargs).eval()


def plain(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result.values())


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path) -> None:
    """The folder holds all that the model needs, with changed settings too."""
    model = build(name, classes=("a", "b"), image_size=64)
    folder = hub.save_model(model, tmp_path / "m", metrics={"score": 1.5}, half=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name and config["classes"] == ["a", "b"] and config["metrics"] == {"score": 1.5}
    card = (folder / "README.md").read_text()
    assert f"zoo predict IMAGE --task {model.command}" in card and "| score | 1.5 |" in card
    again = build(f"local-dir:{folder}", pretrained=True)
    image = torch.rand(3, 70, 90)
    for a, b in zip(plain(again.predict(image)), plain(model.half().float().predict(image)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="do not fit the model"):
        zoo.create_model(f"local-dir:{folder}", pretrained=True, classes=("a", "b", "c"))


@pytest.mark.parametrize("size", [(33, 47), (160, 160), (20, 200)])
def test_sizes(size) -> None:
    image = torch.rand(3, *size)
    labels = build(NAMES[0]).predict(image)
    assert labels.shape == size and labels.dtype == torch.int64 and labels.max() < 11
    found = build(NAMES[1], head_kwargs=dict(channels=16, options=dict(score_thresh=0.0))).predict(image)
    assert len(found["boxes"]) and (found["boxes"][:, 2:] <= torch.tensor([size[1], size[0]])).all()


def test_pretrained_backbone() -> None:
    """The backbone of the embedded classifier of the same clothes; not asked for when a saved model is loaded."""
    model = build(NAMES[1], pretrained_backbone=True)
    classifier = zoo.create_model("biformer_nano.zoo_fashion_mnist", pretrained=True)
    found = {key.replace("_", "."): x for key, x in model.net.net.backbone.backbone.state_dict().items()}
    wanted = {key.replace("_", "."): x for key, x in classifier.state_dict().items()}
    common = found.keys() & wanted.keys()
    assert len(common) == len(found) and all(torch.equal(found[key], wanted[key]) for key in common)
    assert "pretrained_backbone" not in model.config


def test_listed_and_described() -> None:
    assert zoo.list_models(task="image-segmentation") and zoo.list_models(task="object-detection")
    for name in NAMES:
        info = zoo.model_info(name)
        assert info.params < 4e6 and info.input_size == (3, 160, 160) and "arXiv" in info.paper


def test_messages() -> None:
    with pytest.raises(ValueError, match="classes must be different names"):
        zoo.create_model(NAMES[0], classes=("a", "a"))
    with pytest.raises(ValueError, match="takes no label_names"):
        hub.save_model(build(NAMES[0]), "nowhere", label_names=["a"])
