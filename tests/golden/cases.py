"""Golden cases: found in this folder and, if the variable ZOO_GOLDEN names one, in that folder too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from . import fill


def find(family: str) -> list[Path]:
    """All case files of a family; the full set may stand in for a shortened one of the same name."""
    folders = [Path(__file__).parent / family]
    if os.environ.get("ZOO_GOLDEN"):
        folders.append(Path(os.environ["ZOO_GOLDEN"]) / family)
    found = {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}
    return list(found.values())


class Case:
    """One case: what to build, its weights and inputs, and the comparison with what is expected."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self.kind, self.model, self.kwargs = self.spec["kind"], self.spec["model"], dict(self.spec["kwargs"])
        self.compared: set[str] = set()

    def weights(self) -> dict[str, Tensor]:
        return fill.state_dict(self.spec["params"], self.spec.get("scale_overrides"))

    def input(self, name: str = "x") -> Tensor:
        spec = self.spec["inputs"][name]
        if spec["fill"] == "image":
            return fill.image(spec["name"], spec["shape"]) * spec.get("scale", 1.0)
        if spec["fill"] == "topk_of_image":
            return fill.image(spec["name"], spec["score_shape"]).topk(spec["topk"], dim=-1).indices
        raise ValueError(f"unknown fill {spec['fill']!r} of input {name!r}")

    def output_gradient(self, shape: tuple[int, ...]) -> Tensor:
        return fill.image("grad:" + self.spec["case"], shape)

    def check(self, name: str, actual: Tensor) -> None:
        """Compare an output with its expected values, if the case holds them, at the case's own tolerance."""
        if name not in self.spec["outputs"]:
            return
        spec = self.spec["outputs"][name]
        assert list(actual.shape) == spec["shape"], f"{name}: shape {tuple(actual.shape)}, expected {spec['shape']}"
        if "slice" in spec:
            actual = actual[_parse_slice(spec["slice"])]
        expected = self.expected[name]
        torch.testing.assert_close(
            actual.detach().to(expected.dtype),
            expected,
            rtol=self.spec["rtol"],
            atol=spec["atol"],
            msg=lambda text: f"{name}: {text}",
        )
        self.compared.add(name)

    def check_routing(self, name: str, index: Tensor) -> None:
        """Compare routed regions as sets; rows with an exact tie are marked by -1 and left out."""
        if name not in self.spec["outputs"]:
            return
        expected = self.expected[name].sort(-1).values
        actual = index.to(expected.dtype).sort(-1).values
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}"
        clear = (expected >= 0).all(-1)
        wrong = (actual != expected).any(-1) & clear
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {clear.sum()} rows route elsewhere"
        self.compared.add(name)

    def finish(self) -> None:
        """Every expected output must have been compared."""
        missing = set(self.spec["outputs"]) - self.compared
        assert not missing, f"outputs never compared: {sorted(missing)}"


def _parse_slice(text: str) -> tuple[slice, ...]:
    """'[:, ::4]' -> (slice(None), slice(None, None, 4))"""
    parts = [[int(n) if n else None for n in part.strip().split(":")] for part in text.strip("[]").split(",")]
    return tuple(np.s_[slice(*part)] for part in parts)
