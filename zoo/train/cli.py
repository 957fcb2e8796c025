"""``zoo fit|validate|test|predict``: Lightning's command line over this package's modules."""

import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from zoo.train.checks import ConfigError, check_config, check_option, find_class, read_config
from zoo.train.configs import find_config, list_configs
from zoo.train.export import read_checkpoint
from zoo.train.sharding import FullyShardedStrategy

_SUBCOMMANDS = ("fit", "validate", "test", "predict")


class SaveTrainingConfig(SaveConfigCallback):
    """Save the configuration of training runs only; measuring a model leaves no file behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def _last_checkpoints(trainer: Trainer) -> list[Path]:
    """Checkpoints named ``last`` of earlier runs with the same logger name or checkpoint folder, newest first.

    Loggers open a new version folder for every run, so the folder of the coming run has none yet.
    """
    folders = {Path(c.dirpath) for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)}
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            folders.add(Path(logger.save_dir, str(logger.name or "")))
    if not folders:
        folders.add(Path(trainer.default_root_dir))
    name = ModelCheckpoint.CHECKPOINT_NAME_LAST
    found = {path for folder in folders for path in folder.rglob(f"{name}*.ckpt")}
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _best_checkpoint(last: Path) -> Path:
    """The best checkpoint that the callback state in a ``last`` checkpoint points to."""
    for key, state in read_checkpoint(last).get("callbacks", {}).items():
        if key.startswith("ModelCheckpoint") and state.get("best_model_path"):
            # The folder may have moved since.
            for path in (Path(state["best_model_path"]), last.parent / Path(state["best_model_path"]).name):
                if path.is_file():
                    return path
    raise ConfigError(f"ckpt_path: {last} does not point to a best checkpoint that exists; give a path")


def resolve_checkpoint(ckpt_path: str | None, trainer: Trainer) -> str | None:
    """Turn ``last`` and ``best`` into the path of a checkpoint of an earlier run.

    Raises:
        ConfigError: There is no such file. (Lightning alone warns and trains from scratch.)
    """
    if ckpt_path is None:
        return None
    if ckpt_path not in ("last", "best"):
        if "://" not in ckpt_path and not Path(ckpt_path).exists():
            raise ConfigError(f"ckpt_path: no file {ckpt_path!r}")
        return ckpt_path
    found = _last_checkpoints(trainer)
    if not found:
        raise ConfigError(
            f"ckpt_path is {ckpt_path!r}, but no earlier run of this configuration has left a checkpoint; leave "
            "--ckpt_path out to start afresh, or give the path of a .ckpt file. (The configuration must contain "
            "ModelCheckpoint with save_last: true, and the logger the same save_dir and name as before.)"
        )
    return str(found[0] if ckpt_path == "last" else _best_checkpoint(found[0]))


class ZooCLI(LightningCLI):
    """LightningCLI in subclass mode whose data module tells the model its number of classes."""

    def add_arguments_to_parser(self, parser) -> None:
        """Link the number of classes."""
        parser.link_arguments("data.init_args.num_classes", "model.init_args.num_classes")

    def parse_arguments(self, parser, args: list[str]) -> None:
        """Parse without Lightning's warning about a program that passes its own arguments."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # Lightning would overwrite the configuration with the checkpoint's hyper-parameters, so that an option such as
        # --model.init_args.lr had no effect on a resumed run.
        pass

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let ``fsdp`` stand for FSDP2."""
        section = self.config_init[self.subcommand]["trainer"]
        if section.get("strategy") == "fsdp":
            section["strategy"] = FullyShardedStrategy()
        return super().instantiate_trainer(**kwargs)

    def before_instantiate_classes(self) -> None:
        """Allow TF32 in float32 matrix products on a GPU."""
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")

    def after_instantiate_classes(self) -> None:
        """Find the checkpoint; refuse to evaluate random weights."""
        section = self.config_init[self.subcommand]
        section["ckpt_path"] = resolve_checkpoint(section.get("ckpt_path"), self.trainer)
        trained = section["ckpt_path"] or getattr(self.model, "hparams", {}).get("pretrained", True)
        if self.subcommand != "fit" and not trained:
            raise ConfigError(
                f"zoo {self.subcommand} would use random weights: give --ckpt_path last, best or the path of a .ckpt "
                "file, or --model.init_args.pretrained true"
            )


def _prepare(args: list[str]) -> list[str]:
    """Resolve config names to paths and check keys of files and options."""
    prepared, classes = [], {"model": None, "data": None}
    options = iter(_split_equals(args))
    for arg in options:
        prepared.append(arg)
        if arg in ("--config", "-c"):
            name = next(options, None)
            if name is None:
                raise ConfigError(f"{arg} needs a file or one of: {', '.join(list_configs())}")
            path = find_config(name)
            config = read_config(path)
            check_config(config, str(path))
            for key in classes:
                section = config.get(key)
                classes[key] = section.get("class_path", classes[key]) if isinstance(section, dict) else classes[key]
            prepared.append(str(path))
        elif arg.removeprefix("--") in classes:
            value = next(options, None)
            if value is not None:
                if not Path(value).is_file():
                    find_class(value, f"option {arg}")
                    classes[arg.removeprefix("--")] = value
                prepared.append(value)
        elif arg.startswith("--"):
            check_option(arg, classes)
    return prepared


def _split_equals(args: list[str]) -> list[str]:
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]


def _short(message: str) -> str:
    """The telling lines of a parser message: those that are not about types it tried and values it was given."""
    noise = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
    lines = [line.strip() for line in str(message).splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not line.removeprefix("- ").startswith(noise)]
    return " ".join(dict.fromkeys(kept))


# How the parser begins what it says of an error in a constructor.
_WRAPPERS = ("Does not validate against", "Problem with given class_path")


def _raised_by_class(error: ValueError) -> BaseException:
    """What a constructor raised, which the parser wraps in the types that it tried."""
    while str(error).startswith(_WRAPPERS) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return error


def main(args: list[str] | None = None) -> None:
    """Run ``zoo fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: Subcommand and options, ``sys.argv[1:]`` by default.
    """
    args = list(sys.argv[1:] if args is None else args)
    command = args[0] if args and args[0] in _SUBCOMMANDS else "fit"
    # Errors of the parser are raised, not printed below the list of all options.
    quiet: dict[str, Any] = {"exit_on_error": False}
    # Sharding and averaging do not meet: `configure_model` of the classifier refuses it.
    warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
    try:
        ZooCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveTrainingConfig,
            auto_configure_optimizers=False,
            # Reproducible by default, and the same seed when a run is resumed.
            seed_everything_default=0,
            trainer_defaults={
                "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}
            },
            parser_kwargs={**quiet, **{name: dict(quiet) for name in _SUBCOMMANDS}},
            args=_prepare(args),
        )
    except ArgumentError as error:
        hint = "" if any("--config" in arg for arg in args) else f"; configs: {', '.join(list_configs())}"
        _fail(command, f"{_short(error.message)} (options: zoo {command} --help{hint})", 2)
    except ConfigError as error:
        _fail(command, str(error), 2)
    except (FileNotFoundError, ImportError) as error:
        _fail(command, str(error), 1)
    except ValueError as error:
        if not str(error).startswith(_WRAPPERS):
            raise
        cause = _raised_by_class(error)
        if not isinstance(cause, (ValueError, OSError, ImportError)):
            raise
        _fail(command, str(cause), 1)


def _fail(command: str, message: str, code: int) -> None:
    print(f"zoo {command}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
