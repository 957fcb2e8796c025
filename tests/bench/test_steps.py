"""Steps of whole video transformers and UNets."""

from __future__ import annotations

import pytest
import torch

from zoo.bench import suites, unet_steps, video_steps

from .tools import CPU, quick, rows_of


def test_video_suite_splits_steps(tmp_path):
    assert quick("video_steps", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "video_steps.csv")
    for name in video_steps.MODELS:
        found = {(row["provider"], row["mode"]): float(row["p50"]) for row in rows if row["name"] == name}
        parts = [(provider, mode) for provider in ("dense", "zoo") for mode in ("step", "attention", "rest")]
        assert set(found) == {("stock", "step"), *parts, ("zoo", "tables")}
        for provider in ("dense", "zoo"):
            assert found[provider, "step"] == pytest.approx(
                found[provider, "attention"] + found[provider, "rest"], rel=1e-3
            )
    assert all("layers=3/60" in row["config"] for row in rows if row["name"] == "hunyuan")


def small_entry(name):
    return next(e for e in suites.load("video_steps", True, True).settings["transformers"] if e["model"] == name)


@pytest.mark.parametrize("name", video_steps.MODELS)
def test_compiled_blocks_of_a_video_model_keep_their_split(name):
    entry = small_entry(name)
    model = video_steps.build_model(entry, torch.float32, CPU)
    inputs, plan = video_steps.make_inputs(model, entry, torch.float32, CPU), video_steps.mixed_plan(model, entry)
    stock = video_steps.run_provider("stock", model, plan, inputs, CPU, 1)
    with video_steps.compiled(model, "default", backend="eager", fullgraph=True):
        dense = video_steps.run_provider("dense", model, plan, inputs, CPU, 2)
    torch.testing.assert_close(dense.out, stock.out, rtol=1e-4, atol=1e-4)
    assert len(dense.attention) == 2
    assert all(0 < part < whole for part, whole in zip(dense.attention, dense.step, strict=True))


def test_steps_in_fp8():
    entry = small_entry("wan_14b")
    model = video_steps.build_model(entry, torch.float32, CPU)
    inputs, plan = video_steps.make_inputs(model, entry, torch.float32, CPU), video_steps.mixed_plan(model, entry)
    exact, rounded = (
        video_steps.run_provider(provider, model, plan, inputs, CPU, 1).out for provider in ("zoo", "zoo_fp8")
    )
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_dense_attention_that_differs_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(video_steps, "dense_attention", lambda q, k, v: q + v)
    assert quick("video_steps", "--out", str(tmp_path), "--filter", "wan") == 1
    assert "off the stock model's" in capsys.readouterr().err
    assert {row["provider"] for row in rows_of(tmp_path / "video_steps.csv")} == {"stock", "zoo"}


@pytest.mark.parametrize("name", video_steps.MODELS)
@pytest.mark.parametrize("target", [None, 0.1, 0.9])
def test_plans_have_the_mean_density(name, target):
    full = next(e for e in suites.load("video_steps").settings["transformers"] if e["model"] == name)
    full = {**full, "density": target or full["density"]}
    # The shape of the released model, on no device.
    model = video_steps.build_model({**full, "layers": 6}, torch.bfloat16, torch.device("meta"))
    densities = video_steps.mixed_plan(model, full).densities()[0]
    assert sum(densities) / len(densities) == pytest.approx(full["density"], abs=0.01)


@pytest.mark.parametrize(("name", "billions"), [("wan_14b", 14.3), ("hunyuan", 12.8), ("cogvideox15_5b", 5.6)])
def test_video_models_have_the_released_size(name, billions):
    model = video_steps.build_model({"model": name}, torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)


def test_unet_suite_times_both_phases(tmp_path):
    assert quick("agent_sd", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "agent_sd.csv")
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in unet_steps.PROVIDERS for mode in (*unet_steps.PHASES, "loop")
    }
    found = {row["mode"]: float(row["p50"]) for row in rows if row["provider"] == "fast"}
    assert found["loop"] == pytest.approx(0.4 * found["first_phase"] + 0.6 * found["second_phase"], rel=1e-3)


def test_unet_providers_do_what_they_say():
    entry = suites.load("agent_sd", True, True).settings["unets"][0]
    unet = unet_steps.build_unet(entry, torch.float32, CPU)
    inputs = unet_steps.make_inputs(unet, 128, 1, torch.float32, CPU)
    seen, outs = {}, {}
    for provider in unet_steps.PROVIDERS:
        with unet_steps.applied(unet, provider):
            for name, (timestep, _) in unet_steps.PHASES.items():
                outs[provider, name] = unet_steps.step_of(unet, inputs, timestep)()
                layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
                context = getattr(getattr(layer, "layer", None), "context", None)
                seen[provider, name] = context and context.plan(16 * 16)
    first, second = unet_steps.PHASES
    assert seen["sdpa", first] is None
    # Merging alone: half of the tokens, never agents.
    assert [(p.merged, p.agent_merged) for p in (seen["merge", first], seen["merge", second])] == [(128, 0)] * 2
    assert seen["official", first].agent_merged > 0 and seen["official", second].agent_merged == 0
    # Few tokens: softmax layers of mode "fast" merge none.
    assert seen["fast", first].agent_merged > 0 and seen["fast", second] is None
    assert torch.equal(outs["fast", second], outs["sdpa", second])


def test_unet_is_that_of_stable_diffusion():
    unet = unet_steps.build_unet({}, torch.float16, torch.device("meta"))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
