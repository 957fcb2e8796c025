"""Suites: YAML files that say what to run, and where results go.

An op suite has ``ops``, ``shapes``, ``dtypes``, ``modes`` and optionally ``providers``, ``baseline`` (whom speed-ups
refer to) and ``samples`` (fewer than usual, for calls that take long); a model suite has ``models``, ``batch``,
``size``, ``dtypes``, ``modes``, ``compile``, ``channels_last``, ``accelerate`` (time timm's models under
`zoo.accelerate` too), ``plain`` (time ours on the references of their ops too) and ``samples``. One with ``sweep``
times models over image sizes, see `zoo.bench.resolution`. Suites with ``transformers`` or ``unets`` time whole models
of diffusers, see `zoo.bench.video_steps` and `zoo.bench.unet_steps`, one with ``detectors`` point cloud models, see
`zoo.bench.detectors`. The sections ``cpu`` and ``quick`` override keys on a machine
without a GPU and under ``--quick``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

OP_KEYS = {"ops", "shapes", "dtypes", "modes", "providers", "baseline", "batch", "samples"}
MODEL_KEYS = {"models", "batch", "size", "dtypes", "modes", "samples"}
MODEL_KEYS |= {"compile", "channels_last", "accelerate", "plain"}
# Kinds of suites by the key that tells them, with the keys that they may have and those that they must.
KINDS = {
    "ops": (OP_KEYS, {"ops", "shapes"}),
    "models": (MODEL_KEYS, {"models", "batch", "size"}),
    "sweep": ({"sweep", "sizes", "batch", "dtypes", "modes", "plain", "samples"}, {"sweep", "sizes"}),
    "transformers": ({"transformers", "dtypes", "compile", "providers", "samples"}, {"transformers"}),
    "unets": ({"unets", "sizes", "batch", "dtypes", "providers"}, {"unets", "sizes"}),
    "detectors": ({"detectors", "scans", "batches", "providers"}, {"detectors"}),
}
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
    kinds = [kind for kind in KINDS if kind in data] if isinstance(data, dict) else []
    if len(kinds) != 1:
        raise ValueError(f"{path.name} must be a mapping with one of {', '.join(KINDS)}")
    kind = kinds[0]
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
    known = KINDS[kind][0]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; known are {sorted(known)}, cpu and quick")


def check_values(name: str, kind: str, data: dict[str, Any]) -> None:
    """Refuse unknown ops, dtypes and modes, and missing keys."""
    from zoo.bench import detectors, models, resolution, unet_steps, video_steps
    from zoo.bench.ops import OPS

    missing = sorted(KINDS[kind][1] - set(data))
    if missing:
        raise ValueError(f"{name} lacks {missing}")
    allowed = {
        "ops": {"ops": OPS, "modes": OP_MODES},
        "models": {"modes": MODEL_MODES, "compile": models.COMPILE_MODES},
        "sweep": {"modes": resolution.MODES},
        "transformers": {"compile": video_steps.COMPILE_MODES, "providers": video_steps.PROVIDERS},
        "unets": {"providers": unet_steps.PROVIDERS},
        "detectors": {"providers": detectors.PROVIDERS},
    }[kind]
    for key, choices in {"dtypes": DTYPES, **allowed}.items():
        for value in data.get(key, ()):
            if value not in choices:
                raise ValueError(f"{name}: {key} must be among {list(choices)}, got {value!r}")
