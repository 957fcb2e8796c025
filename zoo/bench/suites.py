"""Suites: YAML files that say what to run, and where results go.

An op suite has ``ops``, ``shapes``, ``dtypes``, ``modes`` and optionally ``providers``, ``baseline`` (whom speed-ups
refer to) and ``samples`` (fewer than usual, for calls that take long); a model suite has ``models``, ``batch``,
``size``, ``dtypes``, ``modes``, ``compile``, ``channels_last`` and ``accelerate`` (time timm's models under
`zoo.accelerate` too). The sections ``cpu`` and ``quick`` override keys on a machine without a GPU and under
``--quick``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

OP_KEYS = {"ops", "shapes", "dtypes", "modes", "providers", "baseline", "batch", "samples"}
MODEL_KEYS = {"models", "batch", "size", "dtypes", "modes", "compile", "channels_last", "accelerate"}
OP_MODES = ("forward", "forward+backward")
MODEL_MODES = ("inference", "train")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Suite:
    """A suite with its overrides applied."""

    name: str
    kind: str
    settings: dict[str, Any]


def package_root() -> Path:
    """Folder of the package."""
    return Path(__file__).resolve().parents[1]


def suite_folder() -> Path:
    """``benchmarks/suites`` of a checkout, or the copy inside the installed package."""
    checkout = package_root().parent / "benchmarks" / "suites"
    return checkout if checkout.is_dir() else package_root() / "suites"


def results_folder() -> Path:
    """``benchmarks/results`` of a checkout, or the current folder for an installed package."""
    checkout = package_root().parent / "benchmarks"
    return checkout / "results" if checkout.is_dir() else Path.cwd()


def list_suites() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in suite_folder().glob("*.yaml"))


def load(name: str, quick: bool = False, cpu: bool = False) -> Suite:
    """Read a shipped suite by name, or any YAML file by path, and apply its overrides.

    Raises:
        FileNotFoundError: There is no such suite.
        ValueError: The file asks for something unknown.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = suite_folder() / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, list_suites(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise FileNotFoundError(f"no suite {name!r}; {hint}available suites: {', '.join(list_suites())}")
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict) or ("ops" in data) == ("models" in data):
        raise ValueError(f"{path.name} must be a mapping with either ops or models")
    kind = "ops" if "ops" in data else "models"
    for section, wanted in (("cpu", cpu), ("quick", quick)):
        overrides = data.pop(section, None) or {}
        check_keys(path.name, kind, overrides)
        if wanted:
            data.update(overrides)
    check_keys(path.name, kind, data)
    check_values(path.name, kind, data)
    return Suite(path.stem, kind, data)


def check_keys(name: str, kind: str, data: dict[str, Any]) -> None:
    """Refuse keys that nobody reads."""
    known = OP_KEYS if kind == "ops" else MODEL_KEYS
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; known are {sorted(known)}, cpu and quick")


def check_values(name: str, kind: str, data: dict[str, Any]) -> None:
    """Refuse unknown ops, dtypes and modes, and missing keys."""
    from zoo.bench.models import COMPILE_MODES
    from zoo.bench.ops import OPS

    required = {"ops", "shapes"} if kind == "ops" else {"models", "batch", "size"}
    missing = sorted(required - set(data))
    if missing:
        raise ValueError(f"{name} lacks {missing}")
    modes = OP_MODES if kind == "ops" else MODEL_MODES
    allowed = {"dtypes": DTYPES, "modes": modes, **({"ops": OPS} if kind == "ops" else {"compile": COMPILE_MODES})}
    for key, choices in allowed.items():
        for value in data.get(key, ()):
            if value not in choices:
                raise ValueError(f"{name}: {key} must be among {list(choices)}, got {value!r}")
