"""From a Lightning checkpoint to a timm model."""

import json
import os
import pickle

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from zoo.train.classification import ImageClassifier
from zoo.train.data import TorchvisionData
from zoo.train.distillation import Distillation
from zoo.train.export import load_lightning_checkpoint


def train(folder, callbacks=(), distillation=None):
    fake = {"size": 12, "image_size": [3, 24, 24], "num_classes": 6}
    data = TorchvisionData(
        "FakeData",
        num_classes=6,
        train_kwargs=fake,
        val_kwargs=fake,
        image_size=48,
        batch_size=4,
        num_workers=0,
        mean=(0.4, 0.5, 0.6),
        crop_pct=0.95,
        interpolation="random",
    )
    model = ImageClassifier(
        "test_convnext", 6, model_kwargs={"drop_path_rate": 0.1}, lr=1e-2, distillation=distillation
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data)
    return trainer.checkpoint_callback.best_model_path


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "teacher.pth")
    settings = Distillation("test_efficientnet", str(folder / "teacher.pth"))
    return train(folder, [EMAWeightAveraging(decay=0.9)], settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(("weights", "key"), [("ema", "state_dict"), ("raw", "current_model_state")])
def test_averaged_and_raw_weights(averaged, weights, key):
    model, info = load_lightning_checkpoint(averaged, weights)
    saved = torch.load(averaged, weights_only=True)[key]
    assert info["weights"] == weights and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"net.{name}"])
    # Probe and projection stay behind.
    assert len(model.state_dict()) == sum(name.startswith("net.") for name in saved) < len(saved)


def test_averaged_and_raw_differ(averaged):
    ema, raw = (load_lightning_checkpoint(averaged, weights)[0] for weights in ("ema", "raw"))
    auto, info = load_lightning_checkpoint(averaged)
    weight = "head.fc.weight"
    assert not torch.equal(ema.state_dict()[weight], raw.state_dict()[weight])
    assert torch.equal(ema.state_dict()[weight], auto.state_dict()[weight]) and info["weights"] == "ema"


def test_without_average(plain):
    assert load_lightning_checkpoint(plain)[1]["weights"] == "raw"
    assert load_lightning_checkpoint(plain, "raw")[1]["weights"] == "raw"
    with pytest.raises(ValueError, match="no averaged weights"):
        load_lightning_checkpoint(plain, "ema")
    with pytest.raises(ValueError, match="'auto', 'ema' or 'raw', got 'best'"):
        load_lightning_checkpoint(plain, "best")


def test_info(plain):
    model, info = load_lightning_checkpoint(plain)
    assert info["model"] == "test_convnext" and info["num_classes"] == 6
    assert info["data_config"] == {
        "input_size": [3, 48, 48],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "label_names": None,
    }
    assert {"val/acc", "val/loss", "val/acc5"} <= info["metrics"].keys()
    assert info["global_step"] == 3
    json.dumps(info)
    resolved = timm.data.resolve_model_data_config(model)
    assert resolved["input_size"] == (3, 48, 48) and resolved["mean"] == (0.4, 0.5, 0.6)
    assert resolved["crop_pct"] == 0.95 and resolved["interpolation"] == "bilinear"


def test_round_trip_through_timm(averaged, tmp_path):
    """The exported model, saved in timm's layout, loads and predicts the same."""
    model, _ = load_lightning_checkpoint(averaged)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), again(x))
    assert again.pretrained_cfg["input_size"] == (3, 48, 48) and again.num_classes == 6


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_hostile_checkpoint_is_refused(tmp_path, monkeypatch):
    """Nothing in a foreign file is executed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": Hostile()}, "zip.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip.ckpt", "pickle.ckpt"):
        with pytest.raises(ValueError, match="could run code when loaded"):
            load_lightning_checkpoint(name)
    assert not (tmp_path / "executed").exists()


def test_damaged_and_foreign_files(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_lightning_checkpoint(tmp_path / "none.ckpt")
    path = tmp_path / "bad.ckpt"
    with open(plain, "rb") as file:
        path.write_bytes(file.read(2000))
    with pytest.raises(ValueError, match="bad.ckpt"):
        load_lightning_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="bad.ckpt"):
        load_lightning_checkpoint(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="has no 'state_dict'"):
        load_lightning_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="does not name its model"):
        load_lightning_checkpoint(path)


def test_weights_must_fit(plain, tmp_path):
    checkpoint = torch.load(plain, weights_only=True)
    checkpoint["state_dict"].pop("net.head.fc.weight")
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r'do not fit test_convnext(.|\n)*"head.fc.weight"'):
        load_lightning_checkpoint(tmp_path / "part.ckpt")
