"""Heads and whole detectors of the point cloud families equal their official implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import point_detectors as runners
from .cases import find

RUNNERS = {
    ("flatformer", "head"): runners.run_flatformer_head,
    ("flatformer", "detector"): runners.run_flatformer_detector,
    ("scatterformer", "center"): runners.run_scatterformer_center,
    ("scatterformer", "transfusion"): runners.run_transfusion,
    ("scatterformer", "detector"): runners.run_scatterformer_detector,
}
# Kinds of the families' own test files, test_flatformer.py and test_scatterformer.py, which fail for unknown ones.
DETECTOR_KINDS = {"head", "detector", "center", "transfusion"}


def cases() -> list[tuple[str, Path]]:
    found = [(family, path) for family in ("flatformer", "scatterformer") for path in find(family)]
    return [(family, path) for family, path in found if json.loads(path.read_text())["kind"] in DETECTOR_KINDS]


@pytest.mark.parametrize(("family", "path"), cases(), ids=lambda x: x.stem if isinstance(x, Path) else "")
def test_golden(family: str, path: Path) -> None:
    case = runners.DetectorCase(path)
    RUNNERS[family, case.kind](case)
    case.finish()


def test_cases_are_found() -> None:
    assert cases()
