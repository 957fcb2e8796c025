"""Kernels run on a CPU, through Triton's interpreter, which must be chosen before they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["interpreted.py", "interpreted_points.py"])
def test_kernels_under_the_interpreter(name: str) -> None:
    script = Path(__file__).with_name(name)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=script.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
