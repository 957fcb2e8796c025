"""Check the keys and class paths of a training configuration before it is parsed.

The parser's own complaint about a misspelt key nests the errors of every type it tried. The checks here find the key
first and name it, its place and what it may have meant. Values and missing keys remain the parser's business.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

# Modules that a class may be named from without its path.
_SHORT_NAMES = (
    "zoo.train.classification",
    "zoo.train.data",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_TOP_KEYS = (
    "seed_everything",
    "trainer",
    "model",
    "data",
    "ckpt_path",
    "weights_only",
    "verbose",
    "return_predictions",
)


class ConfigError(ValueError):
    """A mistake in a configuration file or in a command line option."""


def _closest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known)


@cache
def accepted_arguments(cls: type) -> frozenset[str]:
    """Names that the parser takes for a class, which includes those that ``**kwargs`` hands on to others."""
    names = ArgumentParser().add_class_arguments(cls, "init", fail_untyped=False)
    return frozenset(name.removeprefix("init.") for name in names)


def find_class(class_path: str, where: str) -> type:
    """Import a class by dotted path or by the bare name of one that is commonly used.

    Raises:
        ConfigError: There is no such class; the message has the closest names.
    """
    if not isinstance(class_path, str):
        raise ConfigError(f"{where}: class_path must be a string, got {class_path!r}")
    module_name, _, name = class_path.rpartition(".")
    modules = [module_name] if module_name else list(_SHORT_NAMES)
    known: set[str] = set()
    for candidate in modules:
        try:
            module = importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if not candidate.startswith(error.name or "?"):
                raise
            raise ConfigError(
                f"{where}: no module {error.name!r} for class_path {class_path!r}; classes of this project: "
                f"{_closest(name, _project_classes())}"
            ) from error
        if inspect.isclass(getattr(module, name, None)):
            return getattr(module, name)
        known |= {key for key, value in vars(module).items() if inspect.isclass(value) and not key.startswith("_")}
    place = f"in {module_name}" if module_name else "known by its bare name"
    raise ConfigError(f"{where}: no class {name!r} {place}; closest: {_closest(name, known)}")


def _project_classes() -> set[str]:
    modules = [importlib.import_module(name) for name in _SHORT_NAMES[:2]]
    return {
        f"{module.__name__}.{key}"
        for module in modules
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__.startswith(module.__name__)
    }


def _check_keys(given: Iterable[str], known: Iterable[str], where: str, owner: str = "") -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{owner}; closest valid keys: {_closest(str(key), known)}")


def _check_class(node: dict[str, Any], where: str) -> None:
    """Check a ``{class_path, init_args}`` section and those nested in it."""
    _check_keys(node, _CLASS_KEYS, where)
    cls = find_class(node["class_path"], where)
    init_args = node.get("init_args") or {}
    _check_keys(init_args, accepted_arguments(cls), f"{where}.init_args", f" for {cls.__name__}")
    _check_nested(init_args, f"{where}.init_args")


def _check_nested(section: dict[str, Any], where: str) -> None:
    for key, value in section.items():
        for i, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, dict) and "class_path" in item:
                _check_class(item, f"{where}.{key}" if i is None else f"{where}.{key}[{i}]")


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected the sections {', '.join(_TOP_KEYS[:4])}, got {type(config).__name__}")
    return config


def check_config(config: dict[str, Any], source: str) -> None:
    """Check the keys of a whole configuration.

    Args:
        config: Sections of the file.
        source: Name of the file for messages.

    Raises:
        ConfigError: A key or class path is unknown.
    """
    _check_keys(config, _TOP_KEYS, source)
    for name in ("trainer", "model", "data"):
        section = config.get(name)
        if not isinstance(section, dict):
            continue
        where = f"{source}: {name}"
        if name == "trainer":
            _check_keys(section, accepted_arguments(Trainer), where)
            _check_nested(section, where)
        elif "class_path" in section:
            _check_class(section, where)
        else:
            _check_keys(section, _CLASS_KEYS, where)


def check_option(option: str, classes: dict[str, str | None]) -> None:
    """Check a command line option such as ``--model.init_args.lr`` or ``--trainer.max_epochs``.

    Args:
        option: The option without its value.
        classes: Class paths of ``model`` and ``data`` as far as they are known.
    """
    head, *rest = option.removeprefix("--").removesuffix("+").split(".")
    if not rest:
        return
    where = f"option {option}"
    if head == "trainer":
        _check_keys(rest[:1], accepted_arguments(Trainer), where)
    elif head in classes and rest[0] not in ("class_path", "dict_kwargs", "help"):
        # Both --model.init_args.lr and --model.lr are valid.
        names = rest[1:] if rest[0] == "init_args" else rest
        if classes[head] and names:
            cls = find_class(classes[head], where)
            _check_keys(names[:1], accepted_arguments(cls), where, f" for {cls.__name__}")


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check numbers that a class was given.

    Args:
        values: Its arguments; None is left out.
        ranges: Least and greatest value of some of them.

    Raises:
        ValueError: One is outside; the message names it.
    """
    for name, (low, high) in ranges.items():
        if values[name] is not None and not low <= values[name] <= high:
            limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {limits}, got {values[name]}")
