"""The command line: configs by name, one clear message for a mistake, checkpoints found or refused."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from zoo.train import configs
from zoo.train.checks import ConfigError, accepted_arguments, check_config, read_config
from zoo.train.cli import main
from zoo.train.configs import find_config, list_configs
from zoo.train.data import ImageFolderData

CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "save_last": True,
                    "monitor": "val/acc",
                    "mode": "max",
                    "auto_insert_metric_name": False,
                },
            },
            {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
            {
                "class_path": "lightning.pytorch.callbacks.ThroughputMonitor",
                "init_args": {"batch_size_fn": "zoo.train.data.batch_size", "window_size": 2},
            },
        ],
    },
    "model": {
        "class_path": "zoo.train.classification.ImageClassifier",
        "init_args": {"model": "test_convnext", "warmup_epochs": 1},
    },
    "data": {
        "class_path": "zoo.train.data.TorchvisionData",
        "init_args": {
            "dataset": "FakeData",
            "num_classes": 7,
            "train_kwargs": {"size": 8, "image_size": [3, 24, 24], "num_classes": 7},
            "val_kwargs": {"size": 8, "image_size": [3, 24, 24], "num_classes": 7, "random_offset": 1},
            "image_size": 32,
            "batch_size": 4,
            "num_workers": 0,
        },
    },
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fake.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def fails(capsys, *args):
    """Run a command that must fail with one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(list(args))
    assert error.value.code not in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def edited(path, *keys, **changes):
    """Write a copy of the configuration with keys of one section renamed (old=new)."""
    content = yaml.safe_load(Path(path).read_text())
    section = content
    for key in keys:
        section = section[key]
    for old, new in changes.items():
        section[new] = section.pop(old)
    copy = Path(path).with_name("edited.yaml")
    copy.write_text(yaml.safe_dump(content))
    return str(copy)


def test_fit_resume_and_evaluate(config, tmp_path, capsys):
    main(["fit", "--config", config])
    first = tmp_path / "runs/lightning_logs/version_0"
    checkpoint = torch.load(first / "checkpoints/last.ckpt", weights_only=True)
    # The data module tells the model its number of classes.
    assert checkpoint["hyper_parameters"]["num_classes"] == 7
    assert "current_model_state" in checkpoint
    with open(first / "metrics.csv", newline="") as file:
        columns = next(csv.reader(file))
    assert {"train/loss", "val/loss", "val/acc", "val/acc5"} <= set(columns)

    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2", "--model.init_args.lr", "0.5"])
    resumed = torch.load(tmp_path / "runs/lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 2 * checkpoint["global_step"]
    # An option given on the command line is not overwritten by what the checkpoint was trained with.
    assert resumed["hyper_parameters"]["lr"] == 0.5

    for which in ("last", "best"):
        main(["test", "--config", config, "--ckpt_path", which])
    assert "test/acc" in capsys.readouterr().out


def test_print_config(config, capsys):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", config, "--model.init_args.lr=0.25", "--print_config"])
    assert error.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["lr"] == 0.25
    assert printed["data"]["init_args"]["image_size"] == 32
    assert printed["seed_everything"] == 0


def test_typo_in_file(config, capsys):
    message = fails(capsys, "fit", "--config", edited(config, "model", "init_args", model="modle"))
    assert "edited.yaml: model.init_args: unknown key 'modle' for ImageClassifier" in message
    assert "closest valid keys: model" in message
    message = fails(capsys, "fit", "--config", edited(config, "data", "init_args", image_size="imagesize"))
    assert "data.init_args: unknown key 'imagesize'" in message and "image_size" in message
    message = fails(capsys, "fit", "--config", edited(config, "trainer", max_epochs="max_epoch"))
    assert "trainer: unknown key 'max_epoch'; closest valid keys: max_epochs" in message
    message = fails(capsys, "fit", "--config", edited(config, "model", init_args="init_arg"))
    assert "model: unknown key 'init_arg'; closest valid keys: init_args" in message
    message = fails(capsys, "fit", "--config", edited(config, trainer="trianer"))
    assert "edited.yaml: unknown key 'trianer'; closest valid keys: trainer" in message
    where = ("trainer", "callbacks", 0, "init_args")
    message = fails(capsys, "fit", "--config", edited(config, *where, decay="dekay"))
    assert "trainer.callbacks[0].init_args: unknown key 'dekay' for EMAWeightAveraging" in message


def test_unknown_class(config, capsys):
    content = yaml.safe_load(Path(config).read_text())
    content["model"]["class_path"] = "zoo.train.classification.ImageClasifier"
    Path(config).write_text(yaml.safe_dump(content))
    message = fails(capsys, "fit", "--config", config)
    assert (
        "fake.yaml: model: no class 'ImageClasifier' in zoo.train.classification; closest: ImageClassifier" in message
    )
    content["model"]["class_path"] = "zoo.trian.classification.ImageClassifier"
    Path(config).write_text(yaml.safe_dump(content))
    message = fails(capsys, "fit", "--config", config)
    assert "no module 'zoo.trian'" in message and "zoo.train.classification.ImageClassifier" in message


def test_typo_in_option(config, capsys):
    message = fails(capsys, "fit", "--config", config, "--model.init_args.modle", "x")
    assert "option --model.init_args.modle: unknown key 'modle' for ImageClassifier" in message
    message = fails(capsys, "fit", "--config", config, "--trainer.max_epoch=3")
    assert "unknown key 'max_epoch'; closest valid keys: max_epochs" in message
    message = fails(capsys, "fit", "--config", config, "--model", "ImageClasifier")
    assert "closest: ImageClassifier" in message
    message = fails(capsys, "fit", "--config", config, "--modle.lr", "3")
    assert "--modle.lr" in message


def test_wrong_value_and_missing_sections(config, capsys):
    message = fails(capsys, "fit", "--config", config, "--model.init_args.lr", "fast")
    assert "lr" in message and "float" in message and "fast" in message
    message = fails(capsys, "fit")
    assert "required" in message and "digits/biformer_nano" in message


def test_errors_of_constructors_come_without_the_parsers_words(config, capsys):
    message = fails(capsys, "fit", "--config", config, "--model.init_args.model", "biformer_nno")
    assert "error: Unknown model 'biformer_nno'" in message and "Subtypes" not in message
    message = fails(capsys, "fit", "--config", config, "--model.init_args.mixup=-1")
    assert message.strip().endswith("error: mixup must be 0 or more, got -1.0")


def test_broken_yaml(config, capsys):
    Path(config).write_text("trainer: [")
    assert "fake.yaml is not valid YAML" in fails(capsys, "fit", "--config", config)
    Path(config).write_text("- trainer")
    assert "expected the sections" in fails(capsys, "fit", "--config", config)


def test_missing_checkpoint(config, capsys):
    """A run that was to be resumed never starts from scratch."""
    for which in ("last", "best"):
        assert "no earlier run" in fails(capsys, "fit", "--config", config, "--ckpt_path", which)
    assert "no file 'a.ckpt'" in fails(capsys, "fit", "--config", config, "--ckpt_path", "a.ckpt")
    assert "random weights" in fails(capsys, "test", "--config", config)


def test_missing_data(config, capsys):
    args = ("--data", "zoo.train.data.FashionMnistData", "--data.init_args.root", "nowhere")
    content = yaml.safe_load(Path(config).read_text())
    del content["data"]
    Path(config).write_text(yaml.safe_dump(content))
    assert "dataset-fashion-mnist" in fails(capsys, "fit", "--config", config, *args)


def test_find_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = find_config("digits/biformer_nano")
    assert path.is_file()
    assert path == find_config("digits/biformer_nano.yaml") == find_config("configs/digits/biformer_nano.yaml")
    with pytest.raises(FileNotFoundError, match="did you mean digits/biformer_nano.*imagenet/biformer_tiny"):
        find_config("digits/biformer_nan")
    (tmp_path / "own.yaml").write_text("{}")
    assert find_config("own.yaml") == Path("own.yaml")


def test_configs_inside_the_package(tmp_path, monkeypatch):
    """In a wheel the configurations lie in the package."""
    (tmp_path / "configs" / "a").mkdir(parents=True)
    (tmp_path / "configs" / "a" / "b.yaml").write_text("{}")
    monkeypatch.setattr(configs, "_FOLDERS", (tmp_path / "configs", tmp_path / "none"))
    assert list_configs() == ["a/b"]
    assert find_config("a/b") == tmp_path / "configs" / "a" / "b.yaml"
    monkeypatch.setattr(configs, "_FOLDERS", (tmp_path / "none",))
    with pytest.raises(FileNotFoundError, match="no configurations found"):
        list_configs()


@pytest.mark.parametrize("name", list_configs())
def test_shipped_config(name, capsys):
    """Every shipped configuration has valid keys, parses, and says what it is for."""
    path = find_config(name)
    check_config(read_config(path), str(path))
    header = path.read_text().split("\nseed_everything")[0]
    for word in ("# Command:", f"zoo fit --config {name}", "# Data:", "# Expected:"):
        assert word in header
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", name, "--print_config"])
    assert error.value.code == 0
    capsys.readouterr()


def test_accepted_arguments_follow_kwargs():
    assert {"root", "num_classes", "image_size", "augment"} <= accepted_arguments(ImageFolderData)
    with pytest.raises(ConfigError, match="class_path must be a string, got 3"):
        check_config({"model": {"class_path": 3}}, "x.yaml")
