"""The report and the commands: what is drawn, the numbers, and the messages."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch

from zoo import cli
from zoo.cli import vdit
from zoo.heads.sparse_vdit import SparsePlan

from .sparse_vdit_models import GRID, LATENT
from .test_sparse_vdit_search import Pipeline


@pytest.fixture
def plan() -> SparsePlan:
    return SparsePlan(
        model={
            "class": "WanTransformer3DModel",
            "layers": ["blocks.0.attn1", "blocks.1.attn1"],
            "heads": 4,
            "head_dim": 8,
        },
        text_position="none",
        tile=(16, 8),
        granularity="block",
        bins=(0.0, 0.5, 1.0),
        patterns=(
            {"pattern": "full"},
            {"pattern": "skip"},
            {"pattern": "diagonal", "window": 0.5},
            {"pattern": "diagonal", "window": 1.0},
            {"pattern": "multi_diagonal", "window": 0.5},
            {"pattern": "vertical_stripe", "frames": [0]},
        ),
        assign=([[0, 1, 2, 3], [4, 5, 1, 1]], [[0, 0, 0, 0], [0, 0, 1, 1]]),
        calibrated={"grid": list(GRID)},
        search={"bin_steps": [30, 10]},
    )  # fmt: skip


def run(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_map_shows_every_head(plan) -> None:
    text = str(plan.report())
    lines = [line.split() for line in text.splitlines()]
    # From noise to clean, a line a layer.
    maps = [words[1] for words in lines if words and words[0].startswith("blocks.")]
    assert maps == ["####", "##..", "#.ab", "A1.."]
    assert "noise 1.000 to 0.500 (25% of the steps), density 75.0%" in text
    assert "multi-diagonal (window 0.5)" in text and "vertical-stripe (frames [0])" in text
    assert "60 tokens" in text and "measured: not yet" in text


def test_map_of_many_heads_stays_whole_on_a_narrow_terminal(plan, tmp_path, capsys, monkeypatch) -> None:
    model = {"class": "CogVideoXTransformer3DModel", "layers": ["transformer_blocks.41.attn1"]}
    wide = SparsePlan.from_dict(
        {**plan.to_dict(), "model": {**model, "heads": 96, "head_dim": 64}, "assign": [[[3] * 96], [[0] * 96]]}
    )
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = run(capsys, "vdit", "report", wide.save(tmp_path / "plan.json"))
    assert code == 0
    assert "#" * 96 + "  100.0%" in out


def test_numbers(plan) -> None:
    report = plan.report(attention_share=0.5)
    band, wide, many, stripe = report.density[2:]
    first = (1 + 0 + band + wide + many + stripe + 0 + 0) / 8
    assert report.bin_means(report.density) == pytest.approx([first, 0.75])
    mean = 0.75 * first + 0.25 * 0.75
    assert report.attention_speedup == pytest.approx(1 / mean)
    assert report.model_speedup == pytest.approx(1 / (0.5 + 0.5 * mean))
    assert sum(report.shares()) == pytest.approx(1)
    assert report.attention_flops == 4 * 60**2 * 4 * 8 * 2
    assert json.loads(json.dumps(report.to_dict()))["density"] == pytest.approx(mean)
    # Another size, another density.
    assert plan.report((6, 8, 8)).mean(report.density) == pytest.approx(mean)
    assert plan.report((6, 8, 8)).density[2] != band
    with pytest.raises(ValueError, match="attention_share"):
        plan.report(attention_share=2)


def test_measured_costs_hold_at_their_grid_only(plan) -> None:
    costs = [0.01, 0.5, 0.6, 0.7, 0.4]
    timed = SparsePlan.from_dict({**plan.to_dict(), "search": {"costs": costs}})
    assert timed.report().costs == (1.0, *costs)
    assert "by costs measured in the search" in str(timed.report())
    other = timed.report((6, 8, 8))
    assert other.costs == other.density


def test_measure(plan) -> None:
    report = plan.report().measure("cpu", torch.float32, repeats=1)
    measured = report.measured
    assert len(measured["bins_ms"]) == 2 and min(measured["bins_ms"]) > 0 and measured["dense_ms"] > 0
    mean = 0.75 * measured["bins_ms"][0] + 0.25 * measured["bins_ms"][1]
    assert measured["speedup"] == pytest.approx(measured["dense_ms"] / mean)
    assert "measured: attention" in str(report)


def test_report_command(plan, tmp_path, capsys) -> None:
    path = plan.save(tmp_path / "plan.json")
    code, out, _ = run(capsys, "vdit", "report", path)
    assert code == 0 and "#.ab" in out
    code, out, _ = run(capsys, "vdit", "report", path, "--json", "--grid", "6x8x8", "--measure", "--device", "cpu")
    assert code == 0
    report = json.loads(out)
    assert report["grid"] == [6, 8, 8] and report["measured"]["dense_ms"] > 0
    code, _, err = run(capsys, "vdit", "report", tmp_path / "none.json")
    assert code == 1 and "neither a file" in err and err.count("\n") == 1
    path.write_text("{}")
    code, _, err = run(capsys, "vdit", "report", path)
    assert code == 1 and "no sparse attention plan" in err
    assert run(capsys, "vdit", "report", path, "--grid", "6x8")[0] == 2
    assert run(capsys, "vdit")[0] == 2


class VideoPipeline(Pipeline):
    """Its "videos" are latents."""

    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="np", guidance_scale=2.0):
        latents = super().__call__(prompt, num_inference_steps, generator, "latent")
        # [B, C, F, H, W] -> [B, F, H, W, C]
        return types.SimpleNamespace(frames=latents.permute(0, 2, 3, 4, 1).sigmoid().numpy())


@pytest.fixture
def pipeline(monkeypatch):
    pipe, videos = VideoPipeline(), {}
    monkeypatch.setattr(vdit, "load_pipeline", lambda args: pipe)
    monkeypatch.setattr(vdit, "check_video", lambda path: None)
    monkeypatch.setattr(vdit, "save_video", lambda video, path, fps: videos.update({path.name: video}))
    return pipe, videos


def test_search_and_apply_commands(pipeline, tmp_path, capsys) -> None:
    pipe, videos = pipeline
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    out_plan = tmp_path / "plan.json"
    code, out, _ = run(
        capsys, "vdit", "search", "some/model", "--prompts", tmp_path / "prompts.txt", "--out", out_plan,
        "--density", "0.6", "--bins", "2", "--steps", "5", "--state", tmp_path / "state.safetensors",
    )  # fmt: skip
    assert code == 0 and f"wrote {out_plan}" in out and "density" in out
    assert pipe.prompts == ["a cat", "a dog"]
    assert SparsePlan.load(out_plan).calibrated["steps"] == 5
    assert (tmp_path / "state.safetensors").exists()
    apply = ("vdit", "apply", "some/model", out_plan, "--prompt", "a bird", "--steps", "5", "--compare")
    code, out, _ = run(capsys, *apply, "--out", tmp_path / "bird.mp4")
    assert code == 0 and "as fast with the plan" in out and "PSNR" in out
    assert sorted(videos) == ["bird.mp4", "bird_dense.mp4"]
    assert videos["bird.mp4"].shape == (*LATENT, 4)
    assert not np.array_equal(videos["bird.mp4"], videos["bird_dense.mp4"])


def test_commands_say_what_is_wrong(pipeline, tmp_path, capsys) -> None:
    out = ("--out", tmp_path / "plan.json")
    code, _, err = run(capsys, "vdit", "search", "some/model", "--prompt", "a", "--height", "64", *out)
    assert code == 1 and "VideoPipeline takes no height" in err
    assert run(capsys, "vdit", "search", "some/model", *out)[0] == 2
    assert run(capsys, "vdit", "search", "some/model", "--prompt", "a", "--bins", "0", *out)[0] == 2
    for option, value in (("--density", "2"), ("--time", "0"), ("--dense-steps", "1"), ("--dense-layers", "-1")):
        code, _, err = run(capsys, "vdit", "search", "some/model", "--prompt", "a", f"{option}={value}", *out)
        assert code == 2 and f"argument {option}: '{value}' is not a" in err


@pytest.mark.parametrize(("name", "message"), [("a.webm", ".mp4 or .gif, got"), ("a.mp4", "install the extra 'video'")])
def test_a_video_that_cannot_be_written_is_refused_first(name, message, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(vdit, "load_pipeline", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "vdit", "apply", "some/model", "plan.json", "--prompt", "a", "--out", tmp_path / name)
    assert code == 1 and message in err


def test_psnr() -> None:
    assert vdit.psnr([0.0, 0.1], [0.1, 0.0]) == pytest.approx(20)
    assert vdit.psnr([1.0], [1.0]) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "it has no model_index.json"),
        (["some/model", "--device", "nonsense"], "Device 'nonsense' is not available"),
    ],
)
def test_a_pipeline_that_cannot_be_loaded(arguments, message, tmp_path, capsys) -> None:
    out = ("--prompt", "a", "--out", tmp_path / "plan.json")
    code, _, err = run(capsys, "vdit", "search", *arguments, *out)
    assert code == 1 and message in err and err.count("\n") == 1
