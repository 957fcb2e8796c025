"""Training in several processes on the CPU: equal curves, whole checkpoints, refusals, and the benchmark script."""

import csv
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

import zoo
from zoo.train import scaling
from zoo.train.classification import ImageClassifier
from zoo.train.distillation import Distillation
from zoo.train.export import load_lightning_checkpoint
from zoo.train.sharding import UNIT_PARAMETERS, FullyShardedStrategy, blocks_of, compile_blocks, units_of

STEPS = 3


def write_config(folder):
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    config = {
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": STEPS, "val_check_interval": 1, "limit_val_batches": 1,
            "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [checkpoint],
        },
        "model": {
            "class_path": "zoo.train.classification.ImageClassifier",
            # No batch norm, whose statistics would be those of a process.
            "init_args": {"model": "agent_nano", "model_kwargs": {"depths": [1, 1, 1, 1]}, "lr": 2e-3},
        },
        "data": {
            "class_path": "zoo.train.data.DigitsData",
            "init_args": {"image_size": 32, "batch_size": 16, "num_workers": 0, "augment": {"no_aug": True}},
        },
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(folder, name, *options):
    """Run ``zoo fit`` as a program; return the validation losses and the checkpoint."""
    command = [sys.executable, "-m", "zoo.train.cli", "fit", "--config", str(write_config(folder))]
    command += ["--trainer.logger.save_dir", str(folder / name), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for key in ("PL_GLOBAL_SEED", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(key, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = (folder / name).rglob("metrics.csv")
    with metrics.open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    (last,) = (folder / name).rglob("last.ckpt")
    return losses, last


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("single"), "single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_as_one(single, strategy, tmp_path):
    pytest.importorskip("sklearn")
    two = ("--trainer.devices=2", f"--trainer.strategy={strategy}", "--data.init_args.batch_size=8")
    losses, last = fit(tmp_path, strategy, *two)
    expected, single_last = single
    assert len(losses) == STEPS
    assert max(expected) - min(expected) > 0.1
    assert losses == pytest.approx(expected, rel=1e-5)
    model, info = load_lightning_checkpoint(last)
    reference, _ = load_lightning_checkpoint(single_last)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-3, atol=1e-4)
    assert info["global_step"] == STEPS
    # Optimizer states are whole too, and an optimizer of one process takes them.
    torch.testing.assert_close(moments(last), moments(single_last), rtol=1e-3, atol=1e-5)


def moments(checkpoint):
    """First moments in the order of the optimizer's groups, which is how a state is loaded."""
    state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    return [state["state"][key]["exp_avg"] for group in state["param_groups"] for key in group["params"]]


def prepared(model, **trainer):
    """A module as the trainer's strategy sees it, on a mesh that nothing reads."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet, **trainer)
    model.trainer = trainer
    model._device_mesh = object()
    return model


def test_averaging_is_refused_where_the_model_is_sharded():
    model = prepared(ImageClassifier("test_vit", 4), callbacks=[EMAWeightAveraging()])
    with pytest.raises(ValueError, match="EMAWeightAveraging cannot average a sharded model"):
        model.configure_model()


def test_distillation_is_refused_where_the_model_is_sharded(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(zoo.create_model("test_efficientnet", num_classes=1000).state_dict(), path)
    settings = Distillation("test_efficientnet", str(path))
    model = prepared(ImageClassifier("test_vit", 10, distillation=settings))
    with pytest.raises(ValueError, match="distillation"):
        model.configure_model()


def test_without_a_mesh_nothing_is_sharded():
    model = ImageClassifier("test_vit", 4)
    names = list(model.state_dict())
    model.configure_model()
    assert list(model.state_dict()) == names
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_strategy_writes_whole_checkpoints_and_divides_data_only():
    strategy = FullyShardedStrategy()
    assert isinstance(strategy, ModelParallelStrategy)
    assert not strategy._save_distributed_checkpoint
    assert strategy._tensor_parallel_size == 1


@pytest.mark.parametrize("name", ["biformer_nano", "agent_nano", "favit_nano", "halo_nano", "agent_deit_tiny"])
def test_blocks_are_found(name):
    model = zoo.create_model(name)
    blocks = blocks_of(model)
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    assert len(blocks) >= 4
    assert inside > 0.6 * sum(p.numel() for p in model.parameters())
    # No block within another: a unit is gathered once.
    assert len({id(p) for block in blocks for p in block.parameters()}) == sum(
        1 for block in blocks for _ in block.parameters()
    )


def test_units_hold_consecutive_blocks_of_some_size():
    model = zoo.create_model("biformer_small")
    units = units_of(model)
    assert [block for unit in units for block in unit] == blocks_of(model)
    sizes = [[sum(p.numel() for p in block.parameters()) for block in unit] for unit in units]
    assert len(units) > 3
    for unit in sizes[:-1]:
        assert sum(unit) >= UNIT_PARAMETERS > sum(unit[:-1])
    assert units_of(torch.nn.Linear(2, 2)) == []


def test_compiled_blocks_compute_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = zoo.create_model("biformer_nano", num_classes=4).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    assert compile_blocks(model) is model
    torch.testing.assert_close(model(images), expected)
    assert all(block._compiled_call_impl is not None for block in blocks_of(model))
    assert "_orig_mod" not in "".join(model.state_dict())


def test_compile_flag_trains(monkeypatch):
    used = []

    def spy(function, **kwargs):
        def call(*args, **kw):
            used.append(1)
            return function(*args, **kw)

        return call

    monkeypatch.setattr(torch, "compile", spy)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    plain, compiled = (ImageClassifier("agent_nano", 4, compile=flag) for flag in (False, True))
    compiled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(compiled(x), plain(x))
    assert used == [1]
    compiled.criterion(compiled(x), y).backward()
    assert all(p.grad is not None for p in compiled.parameters())


@pytest.mark.parametrize("name", ["biformer_nano", "agent_nano", "favit_nano", "halo_nano"])
def test_grad_checkpointing_saves_memory_and_changes_nothing(name):
    def run(flag):
        torch.manual_seed(0)
        model = ImageClassifier(name, 4, grad_checkpointing=flag).train()
        x = torch.randn(2, 3, 64, 64)
        kept = {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.criterion(model(x), torch.tensor([0, 1]))
        loss.backward()
        return sum(kept.values()), loss.detach(), [p.grad for p in model.parameters()]

    (most, loss, gradients), (fewer, same, others) = run(False), run(True)
    assert fewer < 0.8 * most
    torch.testing.assert_close(loss, same)
    torch.testing.assert_close(gradients, others)


def results(throughput, losses, checkpoint=None):
    values = {key: {"p20": rate, "p50": rate, "p80": rate, "memory_mib": None} for key, rate in throughput.items()}
    return {"throughput": values, "losses": losses, "checkpoint": checkpoint}


def test_rows_compare_with_one_device_in_the_same_way_of_running():
    plan = scaling.Plan("agent_nano", 32, 2, 4, 1, 2, (False, True), "cpu", "")
    single = results({"single 0": 10.0, "single 1": 20.0}, {"single": [1.0, 2.0]}, {"difference": 0.25})
    several = results({"ddp 0": 19.0, "ddp 1": 30.0}, {"ddp": [1.0, 2.5]})
    rows = scaling.make_rows(plan, 2, several, single)
    assert [(row["provider"], row["config"].split()[-1], row["speedup"]) for row in rows[:4]] == [
        ("single", "compile=none", 1.0),
        ("single", "compile=blocks", 1.0),
        ("ddp", "compile=none", 1.9),
        ("ddp", "compile=blocks", 1.5),
    ]
    assert [(row["mode"], row["p50"]) for row in rows[4:]] == [("loss", 0.5), ("checkpoint", 0.25)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--devices", "1"], "two devices"),
        (["--device", "cpu", "--devices", "3", "--loss-batch", "8"], "loss-batch 8"),
    ],
)
def test_devices_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        scaling.main(options)


@pytest.mark.slow
def test_script_runs_on_the_cpu(tmp_path):
    size = ["--size", "32", "--batch", "2", "--loss-batch", "4", "--steps", "1", "--loss-steps", "2"]
    assert scaling.main(["--device", "cpu", "--model", "agent_nano", "--eager", "--out", str(tmp_path), *size]) == 0
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["mode"]) for row in rows] == [
        ("single", "train"),
        ("ddp", "train"),
        ("fsdp", "train"),
        ("ddp", "loss"),
        ("fsdp", "loss"),
        ("fsdp", "checkpoint"),
    ]
    assert all(float(row["p50"]) < 1e-4 for row in rows[3:])
