"""`zoo predict --task segment|detect`: pictures, JSON and messages."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import zoo
from zoo import hub
from zoo.cli import main
from zoo.cli.predict_dense import Predictor

MODELS = {"segment": "semantic_fpn_biformer_nano", "detect": "retinanet_biformer_nano"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each task, with random weights; every box of the detector counts."""
    root = tmp_path_factory.mktemp("models")
    for task, name in MODELS.items():
        torch.manual_seed(0)
        options = dict(head_kwargs=dict(channels=16, options=dict(score_thresh=0.0))) if task == "detect" else {}
        hub.save_model(zoo.create_model(name, image_size=64, **options), root / task)
    return root


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a [1].png"
    Image.linear_gradient("L").resize((90, 70)).convert("RGB").save(path)
    return path


def run(capsys, *args) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("task", MODELS)
def test_picture_and_json(capsys, folders, photo, tmp_path, task) -> None:
    model, out = f"local-dir:{folders / task}", tmp_path / "found"
    options = "--task", task, "--model", model, "--score", 0.0, "--out", out, "--device", "cpu"
    code, text, _ = run(capsys, "predict", photo, *options, "--json")
    record = json.loads(text)
    assert code == 0 and record == json.loads((out / f"a [1].png.{task}.json").read_text())
    picture = pil_to_tensor(Image.open(record["picture"]))
    assert picture.shape == (3, 70, 90) and not torch.equal(picture, pil_to_tensor(Image.open(photo)))
    if task == "segment":
        assert sum(row["share"] for row in record["segments"]) == pytest.approx(1, abs=1e-3)
    else:
        scores = [row["score"] for row in record["boxes"]]
        assert scores and scores == sorted(scores, reverse=True)
        assert all(0 <= row["x1"] < row["x2"] <= 90 and 0 <= row["y1"] < row["y2"] <= 70 for row in record["boxes"])
    code, text, _ = run(capsys, "predict", photo, *options)
    assert code == 0 and "picture" in text


def test_nothing_found(capsys, folders, photo, tmp_path) -> None:
    """The picture stays as it is."""
    options = "--task", "detect", "--model", f"local-dir:{folders / 'detect'}", "--score", 1.0, "--out", tmp_path
    code, text, _ = run(capsys, "predict", photo, *options)
    assert code == 0 and "nothing" in text
    drawn = pil_to_tensor(Image.open(tmp_path / "a [1].png.detect.png"))
    assert torch.equal(drawn, pil_to_tensor(Image.open(photo)))


def test_masks_are_drawn_in_the_colours_of_their_classes(folders) -> None:
    predictor = Predictor(f"local-dir:{folders / 'segment'}", "segment", "cpu")
    labels = torch.zeros(8, 8, dtype=torch.int64)
    labels[:4] = 3
    grey = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    found, picture = predictor._segments(grey, labels)
    assert [row["label"] for row in found["segments"]] == ["background", "pullover"]
    assert torch.equal(picture[:, 4:], grey[:, 4:]) and not torch.equal(picture[:, :4], grey[:, :4])


def test_messages(capsys, folders, photo, tmp_path) -> None:
    segmenter, detector = (f"local-dir:{folders / task}" for task in MODELS)
    for model, task, message in (
        (segmenter, "detect", "is no model of --task detect: use --task segment"),
        (detector, "classify", "does not classify images: use --task detect"),
        ("biformer_nano.zoo_fashion_mnist", "segment", "is no model of --task segment"),
        ("retinanet_biformer_nano", "detect", "No pretrained weights exist"),
    ):
        if model.startswith("retinanet") and zoo.list_models("retinanet*", pretrained=True):
            continue
        code, _, err = run(capsys, "predict", photo, "--task", task, "--model", model)
        assert code == 1 and message in err
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    options = "--task", "segment", "--model", segmenter, "--out", tmp_path
    code, _, err = run(capsys, "predict", broken, photo, *options)
    assert code == 1 and "'" + str(broken) + "' cannot be read as an image" in err
    assert (tmp_path / "a [1].png.segment.png").is_file()
