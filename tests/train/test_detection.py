"""Training of 3D detectors: the Lightning module, its schedules and metrics, and the trainer on resident scenes."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tiny_detector import TinyDetector

import zoo
from zoo.cli import main
from zoo.train import detection
from zoo.train.detection import PointCloudDetector, parameter_groups
from zoo.train.lidar import resident
from zoo.train.lidar.augment import LidarAugmentation
from zoo.train.lidar.data import SimulatedLidarData
from zoo.train.lidar.frames import Frame
from zoo.train.lidar.resident import Recipe, Training, batches, evaluate, learning_rate, simulate, train
from zoo.train.lidar.simulator import LidarSimulator, SpinningSensor

SENSOR = SpinningSensor(columns=240, beams=(24, 24))
RANGE = (-10.0, -10.0, -2.0, 10.0, 10.0, 4.0)


def tiny(**kwargs) -> TinyDetector:
    return TinyDetector(reach=10.0, cell=0.5, width=8, **kwargs)


@pytest.fixture
def tiny_models(monkeypatch):
    monkeypatch.setattr(detection, "create_model", lambda name, pretrained=False, **kwargs: tiny(**kwargs))


def data(**kwargs) -> SimulatedLidarData:
    return SimulatedLidarData(
        train_frames=8, val_frames=2, batch_size=2, num_workers=0, point_range=RANGE, sensor=SENSOR, **kwargs
    )


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def fit(module: PointCloudDetector, epochs: int = 2, **kwargs) -> tuple[Trainer, Losses]:
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[losses], **kwargs,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(augmentation=LidarAugmentation(rotation=180.0)))
    return trainer, losses


def test_fit(tiny_models) -> None:
    torch.manual_seed(0)
    module = PointCloudDetector("tiny", 3, lr=1e-2, iou_thresholds=[0.5, 0.3, 0.3])
    trainer, losses = fit(module, gradient_clip_val=10.0)
    assert np.mean(losses.values[-3:]) < 0.7 * np.mean(losses.values[:2])
    expected = {f"val/{view}/{name}" for view in ("bev", "3d") for name in ("map", "maph", "ap/car", "aph/cyclist")}
    assert expected | {"train/loss", "train/loss_heatmap"} <= trainer.callback_metrics.keys()
    assert "train/loss" in trainer.callback_metrics and not math.isnan(trainer.callback_metrics["val/bev/ap/car"])


def test_cyclic_schedule(tiny_models) -> None:
    """FlatFormer's: 1e-5 to 1e-3 within a tenth of the updates, then to 1e-8; momentum stays."""
    module = PointCloudDetector("tiny", 3, lr=1e-3, pct_start=0.1, div_factor=100.0, final_div_factor=1e3)
    rates, betas = schedule(module, 1000)
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-8)
    assert int(np.argmax(rates)) in (99, 100)
    # Cosines: half-way up and half-way down the rate is the middle.
    assert rates[50] == pytest.approx(5e-4, rel=0.05) and rates[550] == pytest.approx(5e-4, rel=0.02)
    assert set(betas) == {0.9}


def test_onecycle_schedule(tiny_models) -> None:
    """ScatterFormer's: momentum falls from 0.95 to 0.85 while the rate rises."""
    module = PointCloudDetector(
        "tiny", 3, lr=6e-3, betas=(0.9, 0.99), pct_start=0.4, div_factor=10.0, final_div_factor=1e4,
        momentum=(0.95, 0.85),
    )  # fmt: skip
    rates, betas = schedule(module, 500)
    assert rates[0] == pytest.approx(6e-4) and max(rates) == pytest.approx(6e-3) and rates[-1] == pytest.approx(6e-8)
    peak = int(np.argmax(rates))
    assert peak in (199, 200)
    assert betas[0] == pytest.approx(0.95) and betas[peak] == pytest.approx(0.85) and betas[-1] == pytest.approx(0.95)


def schedule(module: PointCloudDetector, steps: int) -> tuple[list[float], list[float]]:
    module.trainer = type("Trainer", (), {"estimated_stepping_batches": steps})()
    settings = module.configure_optimizers()
    optimizer, scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    assert settings["lr_scheduler"]["interval"] == "step"
    rates, betas = [], []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if len(rates) < steps:
            scheduler.step()
    return rates, betas


def test_endless_training_needs_an_end(tiny_models) -> None:
    module = PointCloudDetector("tiny", 3)
    module.trainer = type("Trainer", (), {"estimated_stepping_batches": math.inf})()
    with pytest.raises(ValueError, match="the learning rate schedule needs an end"):
        module.configure_optimizers()


def test_decay_spares_named_parameters() -> None:
    net = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(3), "fc": torch.nn.Linear(3, 2)})
    decayed, exempt = parameter_groups(net, 0.05, ["norm"])
    assert decayed["weight_decay"] == 0.05 and {id(p) for p in decayed["params"]} == {
        id(p) for p in net.fc.parameters()
    }
    assert exempt["weight_decay"] == 0 and {id(p) for p in exempt["params"]} == {id(p) for p in net.norm.parameters()}
    assert len(parameter_groups(net, 0.05, [])) == 1


def test_a_checkpoint_holds_plain_types(tiny_models, tmp_path) -> None:
    module = PointCloudDetector("tiny", 3, no_decay=("norm",), momentum=(0.95, 0.85))
    trainer, _ = fit(module, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model"] == "tiny"
    trainer.validate(module, datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)


def test_nuscenes_evaluation(tiny_models) -> None:
    module = PointCloudDetector("tiny", 3, evaluation="nuscenes")
    trainer, _ = fit(module, epochs=1)
    assert {"val/nuscenes/nds", "val/nuscenes/map", "val/nuscenes/mate"} <= trainer.callback_metrics.keys()


def test_number_of_classes(tiny_models) -> None:
    with pytest.raises(ValueError, match=r"tiny has 3 classes \(car, pedestrian, cyclist\), the data 10"):
        PointCloudDetector("tiny", 10)


def test_learning_rate_of_resident_training() -> None:
    recipe = Recipe(lr=1.0, warm_up=0.1)
    rates = [learning_rate(p / 100, recipe) for p in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.01)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_simulate_keeps_order_with_and_without_processes(monkeypatch) -> None:
    # Without CUDA forking is safe, and faster than importing everything anew.
    monkeypatch.setattr(resident, "_START_METHOD", "fork")
    simulator = LidarSimulator(sensor=SENSOR, extent=12)
    plain, pooled = (simulate(simulator, 3, RANGE, workers) for workers in (0, 1))
    for a, b in zip(plain, pooled, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(frame.points[:, :2].abs().max() <= 10 for frame in plain)


@pytest.fixture
def pool() -> list[Frame]:
    return simulate(LidarSimulator(sensor=SENSOR, extent=12), 4, RANGE, 0)


def test_batches_cover_the_pool(pool) -> None:
    recipe = Recipe(batch_size=2, augmentation=LidarAugmentation(flip_x=0, flip_y=0, rotation=0, scale=(1.0, 1.0)))
    source = batches(pool, recipe, RANGE, 0)
    sizes = sorted(len(p) for _ in range(2) for p in next(source)[0])
    assert sizes == sorted(len(frame.points) for frame in pool)


def test_resident_training_learns_and_keeps_an_average(pool) -> None:
    torch.manual_seed(0)
    training = Training(tiny().train(), Recipe(batch_size=2), amp=False)
    source = batches(pool, training.recipe, RANGE, 0)
    losses = [float(training.step(*next(source), 1e-2)) for _ in range(20)]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:2])
    live, average = training.net.state_dict(), training.average.state_dict()
    assert training.steps == 20 and not training.average.training
    assert not torch.equal(live["body.0.0.weight"], average["body.0.0.weight"])
    assert not torch.equal(average["body.0.1.running_mean"], torch.zeros(8))
    metrics = evaluate(training.average, pool)
    assert metrics.keys() >= {"bev/ap/car", "3d/ap/pedestrian", "bev/map"}


def test_steps_without_finite_gradients_change_nothing(pool, monkeypatch) -> None:
    training = Training(tiny().train(), Recipe(batch_size=2), amp=False)
    source = batches(pool, training.recipe, RANGE, 0)
    training.net.loss = lambda points, targets: {"loss": sum(p.sum() for p in training.net.parameters()) * torch.nan}
    before = {name: value.clone() for name, value in training.net.named_parameters()}
    training.step(*next(source), 1e-2)
    assert training.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in training.net.named_parameters())
    monkeypatch.setattr(resident, "_PATIENCE", 2)
    with pytest.raises(RuntimeError, match="gradients of 2 steps in a row were not finite"):
        training.step(*next(source), 1e-2)


def test_training_ends_in_time_or_by_an_interrupt(pool) -> None:
    training = Training(tiny().train(), Recipe(batch_size=2), amp=False)
    lines = []
    assert train(training, batches(pool, training.recipe, RANGE, 0), 0.5, lines.append)
    assert "step 1," in lines[0] and training.steps > 1

    def interrupted():
        yield from (next(batches(pool, training.recipe, RANGE, 0)) for _ in range(2))
        raise KeyboardInterrupt

    steps = training.steps
    assert not train(training, interrupted(), 60, lines.append)
    assert training.steps == steps + 2 and "the average so far is kept" in lines[-1]


# FlatFormer at a size for tests.
SMALL = dict(
    voxel_size=(0.5, 0.5, 6.0), point_range=RANGE, channels=16, num_heads=2, num_blocks=1, group_size=16,
    map_channels=(8, 8), map_layers=(1, 1), neck_channels=8, head_channels=8,
)  # fmt: skip


def test_export_of_a_real_detector(tmp_path, capsys) -> None:
    module = PointCloudDetector("flatformer_nano", 3, model_kwargs=SMALL)
    trainer, losses = fit(module, epochs=1)
    assert np.isfinite(losses.values).all()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "model")]) == 0
    assert "wrote" in capsys.readouterr().out
    model = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "val/bev/map" in config["metrics"] and "train/loss" not in config["metrics"]


def test_resident_run_of_a_real_detector(tmp_path, capsys, monkeypatch) -> None:
    """A run ended by a signal writes a folder that loads, and measures it."""
    real = zoo.create_model
    monkeypatch.setattr(
        zoo, "create_model", lambda name, **kw: real(name, **(SMALL if "dir" not in name else {}), **kw)
    )
    start, handler = resident.train, signal.getsignal(signal.SIGTERM)

    def two_steps(training, source, *args):
        def interrupted():
            yield from (next(source) for _ in range(2))
            signal.raise_signal(signal.SIGTERM)

        return start(training, interrupted(), *args)

    monkeypatch.setattr(resident, "train", two_steps)
    monkeypatch.setattr(resident, "_STATISTICS_BATCHES", 2)
    try:
        args = ["--frames", "4", "--val-frames", "2", "--workers", "0", "--batch-size", "2", "--minutes", "5"]
        resident.main(["flatformer_nano", "--out", str(tmp_path / "model"), *args])
    finally:
        signal.signal(signal.SIGTERM, handler)
    out = capsys.readouterr().out
    assert "interrupted after 2 steps" in out and "validation car AP (BEV, IoU 0.7)" in out
    model = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert model.point_range == RANGE
    # Statistics of BatchNorm were measured on two batches.
    counts = [int(v) for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts and set(counts) == {2}
    assert model.eval()([torch.zeros(0, 5)])[0].boxes.shape[0] == 0
