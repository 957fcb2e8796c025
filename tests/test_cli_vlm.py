"""`zoo vlm profile` on a tiny random model."""

from __future__ import annotations

import csv

import pytest

from zoo.cli import main, vlm_profile
from zoo.heads.tiny_vlm import WEIGHTS

TINY = ["vlm", "profile", "--random", "tiny", "--size", "112", "100", "--samples", "1", "--new-tokens", "3"]


def test_profile(capsys, tmp_path) -> None:
    path = tmp_path / "out.csv"
    assert main([*TINY, "--launch", "eager", "static", "graph", "--budgets", "0.3", "--out", str(path)]) == 0
    assert main([*TINY, "--methods", "spatial", "--budgets", "20", "--batch", "2", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "TTFT ms" in out and "hired" in out
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["method"], row["launch"]) for row in rows] == [
        *((method, launch) for launch in ("eager", "static", "graph") for method in ("stock", "hired")),
        ("stock", "eager"),
        ("spatial", "eager"),
    ]
    for row in rows:
        # 16 patches of the whole image and 8 x 8 of the mosaic, with newlines in the stock model.
        assert int(row["visual_tokens"]) == {"stock": 88, "hired": 24, "spatial": 20}[row["method"]]
        assert int(row["prompt_tokens"]) == int(row["visual_tokens"]) + 60 and float(row["ttft_ms"]) > 0
        cached = int(row["prompt_tokens"]) + (3 if row["launch"] == "graph" else 2)
        size = 2 * 4 * 64 * 4 * cached * int(row["batch"]) / 2**20
        assert float(row["kv_mib"]) == pytest.approx(size, rel=0.02)


def test_what_does_not_go_is_said_and_left_out(capsys) -> None:
    assert main([*TINY, "--launch", "graph", "--official", "--budgets", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "hired at 0.3, graph: a graph needs the number of tokens ahead" in out and "stock" in out


def test_messages(capsys) -> None:
    assert main([*TINY, "--image", "x.png"]) == 1 and "belong together" in capsys.readouterr().err
    assert main(["vlm", "profile"]) == 2
    assert main(["vlm", "profile", "--random", "tiny", "--budgets", "half"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "hird"], "method must be one of"),
        (["--budgets", "2.5"], "fraction in (0, 1], got 2.5"),
        (["--allocation", "even"], "allocation"),
    ],
)
def test_wrong_settings_end_before_a_model_is_made(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(vlm_profile, "load_model", None)
    assert main([*TINY, *arguments]) == 1 and message in capsys.readouterr().err


ASK = ["--image", str(WEIGHTS / "samples" / "scene00.jpg"), "--prompt", "is there a coat ?"]


@pytest.mark.parametrize("prompt", [[], ASK], ids=["random", "asked"])
def test_a_model_of_a_folder(prompt: list[str], capsys) -> None:
    """Its vocabulary has less than 200 words."""
    settings = ["--budgets", "0.5", "--samples", "1", "--new-tokens", "2"]
    assert main(["vlm", "profile", str(WEIGHTS), *settings, *prompt]) == 0
    stock, hired = [line.split("│") for line in capsys.readouterr().out.splitlines() if "eager" in line]
    assert (int(stock[5]), int(hired[5])) == (256, 128)
