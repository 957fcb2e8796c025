"""The plan file: what is written is read again, and what is wrong is said clearly."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from tests import hub_server
from zoo import hub
from zoo.heads.sparse_vdit import SparsePlan, uniform_plan

MODEL = {"class": "WanTransformer3DModel", "layers": ["blocks.0.attn1", "blocks.1.attn1"], "heads": 3, "head_dim": 64}
PATTERNS = [
    {"pattern": "full"},
    {"pattern": "skip"},
    {"pattern": "diagonal", "window": 1.5},
    {"pattern": "vertical_stripe", "frames": [0, -1], "every": [5, 1, 2], "blocks": [1, 2], "block_size": 64},
]


def document(**changes) -> dict:
    plan = {
        "format": "zoo.sparse_vdit.plan",
        "version": 1,
        "model": MODEL,
        "text_position": "none",
        "tile": [128, 64],
        "granularity": "block",
        "bins": [0, 0.5, 1],
        "patterns": PATTERNS,
        "assign": [[[0, 1, 2], [3, 0, 0]], [[0, 0, 0], [1, 1, 1]]],
        "calibrated": {"grid": [21, 45, 80], "text_length": 0, "steps": 50, "guidance": 5.0},
        "search": {"method": "budget", "value": 0.3},
    }
    plan.update(changes)
    return plan


def test_round_trip(tmp_path) -> None:
    plan = SparsePlan.from_dict(document())
    assert plan.to_dict() == document()
    path = plan.save(tmp_path / "new" / "a.json")
    assert SparsePlan.load(path) == plan
    assert json.loads(path.read_text()) == document()
    assert plan.save(tmp_path) == tmp_path / "plan.json"
    assert SparsePlan.load(tmp_path) == plan == SparsePlan.from_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["plan.json"]


def test_bins_cover_every_level() -> None:
    plan = SparsePlan.from_dict(document())
    assert [plan.bin_of(s) for s in (-1, 0, 0.49, 0.5, 0.99, 1, 2)] == [0, 0, 0, 1, 1, 1, 1]


def test_densities() -> None:
    plan = SparsePlan.from_dict(document())
    densities = plan.densities()
    # Band of 1.5 frames on Wan's 75,600 tokens, and (full + skip + band) / 3.
    assert densities[0][0] == pytest.approx((1 + 0 + 0.140) / 3, abs=1e-3)
    assert densities[1] == [1, 0]
    full = uniform_plan(MODEL, "none")
    assert full.densities((2, 4, 4)) == [[1, 1]]
    with pytest.raises(ValueError, match="records no calibrated grid"):
        full.densities()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format="other"), "no sparse attention plan: its format is 'other'"),
        (dict(version=2), "version 2; this package reads version 1"),
        (dict(extra=1), "unknown fields: extra"),
        (dict(model=1), "model must be an object"),
        (dict(model={**MODEL, "heads": 0}), "model.heads must be a positive integer, got 0"),
        (dict(model={"class": "X", "layers": [], "heads": 1, "head_dim": 1}), "model.layers must be a list"),
        (dict(model={"class": "X", "heads": 1, "head_dim": 1}), "with the key 'layers'"),
        (dict(text_position="middle"), "text_position must be one of"),
        (dict(granularity="row"), "granularity must be one of"),
        (dict(tile=[128]), "tile must be two positive integers"),
        (dict(tile="128"), "tile must be a list"),
        (dict(bins=[0, 1, 1]), "bins must be rising edges from 0 to 1"),
        (dict(bins=[0.1, 0.5, 1]), "bins must be rising edges from 0 to 1"),
        (dict(bins=[0, float("nan"), 1]), "bins must be rising edges from 0 to 1"),
        (dict(patterns=[]), "patterns must be 1 to 256 patterns"),
        (dict(patterns=[{"pattern": "full"}] * 257), "patterns must be 1 to 256 patterns"),
        (dict(patterns=["full"] * 4), r"patterns\[0\] must be an object"),
        (dict(patterns=[*PATTERNS[:3], {"pattern": "spiral"}]), r"patterns\[3\] is malformed: pattern must be one of"),
        (dict(patterns=[*PATTERNS[:3], {"pattern": "diagonal", "window": -1}]), r"patterns\[3\] is malformed: window"),
        (dict(patterns=[*PATTERNS[:3], {"pattern": "diagonal", "window": "1"}]), r"patterns\[3\] is malformed"),
        (dict(patterns=[*PATTERNS[:3], {"pattern": "diagonal"}]), r"patterns\[3\] is malformed"),
        (dict(patterns=[*PATTERNS[:3], {"pattern": "vertical_stripe", "frames": 0}]), r"patterns\[3\] is malformed"),
        (dict(assign=[[[0, 0, 0]] * 2]), "assign must be 2 bins, got 1"),
        (dict(assign=[[[0, 0, 0]]] * 2), r"assign\[0\] must be 2 layers"),
        (dict(assign=[[[0, 0]] * 2] * 2), r"assign\[0\]\[0\] must be 3 heads"),
        (dict(assign=[[[0, 0, 4]] * 2] * 2), r"assign\[0\]\[0\] must be indices below 4"),
        (dict(assign=[[[0, 0, True]] * 2] * 2), r"assign\[0\]\[0\] must be indices below 4"),
        (dict(assign={}), "assign must be a list"),
        (dict(calibrated={"grid": [1, 2]}), "calibrated.grid must be three positive integers"),
        (dict(calibrated={"text_length": -1}), "calibrated.text_length must be a number"),
        (dict(search=[]), "search must be an object"),
    ],
)
def test_malformed_plans(changes, message, tmp_path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ValueError, match=message) as error:
        SparsePlan.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_fields_and_files(tmp_path) -> None:
    broken = document()
    del broken["bins"], broken["tile"]
    with pytest.raises(ValueError, match="lacks bins, tile"):
        SparsePlan.from_dict(broken)
    with pytest.raises(ValueError, match="its format is 'list'"):
        SparsePlan.from_dict([])
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        SparsePlan.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        SparsePlan.load(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        SparsePlan.from_pretrained(tmp_path / "no.json")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.serve() as running:
        # The client's settings are read from the environment at import, hence the patches.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield running


def test_hub(server) -> None:
    plan = SparsePlan.from_dict(document())
    plan.push_to_hub("org/plan", token="hf_test")
    assert SparsePlan.from_pretrained("org/plan") == plan
    plan.push_to_hub("org/other", token="hf_test", revision="v2")
    assert SparsePlan.from_pretrained("org/other@v2") == plan == SparsePlan.from_pretrained("org/other", revision="v2")
    assert json.loads(server.repos["org/plan"].branches["main"]["plan.json"]) == document()


def test_hub_errors_are_one_line(server) -> None:
    server.repos["org/empty"] = hub_server.Repo({"README.md": b"x"})
    for name, message in (("org/none", "does not exist"), ("org/empty", "no file 'plan.json'")):
        with pytest.raises(hub.HubError, match=message):
            SparsePlan.from_pretrained(name)
    with pytest.raises(hub.HubError, match="not a valid repository id"):
        SparsePlan.from_dict(document()).push_to_hub("plan")
