"""Stock pipelines of diffusers, searched and run with their plans; text embeddings stand in for text encoders."""

from __future__ import annotations

import diffusers
import pytest
import torch

from zoo.heads import sparse_vdit

from .sparse_vdit_models import BUILDERS, GRID, TEXT, build
from .test_sparse_vdit_search import search

pytest.importorskip("transformers", reason="diffusers' video pipelines need transformers")

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
GUIDED = ("prompt_embeds", "negative_prompt_embeds")


def masks(dtype: torch.dtype, *names: str) -> dict:
    return {name: (torch.arange(TEXT) < n).to(dtype)[None] for name, n in zip(names, (TEXT, 5), strict=False)}


def pipeline(name: str) -> tuple[diffusers.DiffusionPipeline, dict, dict]:
    """A pipeline, its text, and the size of a video that makes the grid of the tests."""
    parts = dict(vae=None, text_encoder=None, tokenizer=None, transformer=build(name).model)
    text = {key: torch.randn(1, TEXT, 16) for key in GUIDED}
    both = ("prompt_attention_mask", "negative_prompt_attention_mask")
    size = dict(height=64, width=80, num_frames=9)
    if name == "wan":
        return diffusers.WanPipeline(scheduler=FLOW(shift=3.0), **parts), text, size
    if name == "ltx":
        text.update(masks(torch.int64, *both))
        return diffusers.LTXPipeline(scheduler=FLOW(), **parts), text, dict(height=128, width=160, num_frames=17)
    if name == "mochi":
        text.update(masks(torch.bool, *both))
        return diffusers.MochiPipeline(scheduler=FLOW(invert_sigmas=True), **parts), text, {**size, "num_frames": 13}
    if name == "hunyuan":
        text = {"prompt_embeds": text["prompt_embeds"], "pooled_prompt_embeds": torch.randn(1, 8)}
        text.update(masks(torch.int64, "prompt_attention_mask"))
        parts.update(text_encoder_2=None, tokenizer_2=None)
        return diffusers.HunyuanVideoPipeline(scheduler=FLOW(shift=7.0), **parts), text, size
    if name.startswith("cogvideox"):
        frames = 21 if name.endswith("1.5") else 9
        scheduler = diffusers.CogVideoXDDIMScheduler()
        return diffusers.CogVideoXPipeline(scheduler=scheduler, **parts), text, {**size, "num_frames": frames}
    raise ValueError(f"unknown pipeline {name!r}")


@pytest.mark.parametrize("name", BUILDERS)
def test_search_and_apply(name) -> None:
    pipe, text, size = pipeline(name)
    call = {**size, "num_inference_steps": 5, "guidance_scale": 4.0}
    plan = search(pipe, [text], call_kwargs=call, bins=2, grid=GRID)
    assert plan.calibrated == {
        "grid": list(GRID),
        "text_length": 0 if plan.text_position == "none" else TEXT,
        "steps": 5,
        "guidance": 4.0,
    }
    # One dense step, then two bins of two steps, from noise to clean: also where the model's time runs backwards.
    assert plan.search["bin_steps"] == [2, 2, 1]
    assert all(i == 0 for ids in plan.assign[-1] for i in ids)
    pipe.set_progress_bar_config(disable=True)

    def video() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**text, **call, generator=generator, output_type="latent").frames

    dense = video()
    with sparse_vdit.use(pipe, plan) as handle:
        sparse = video()
        assert not handle.hook.step.warned
        # Sparse to the end: the last step is the cleanest.
        assert plan.bin_of(handle.hook.step.sigma) == 0
    assert sparse.shape == dense.shape and sparse.isfinite().all()
    assert (sparse - dense).abs().max() > 1e-3
    assert torch.equal(video(), dense)


def test_both_experts_of_wan22() -> None:
    pipe, text, size = pipeline("wan")
    pipe = diffusers.WanPipeline(**{**pipe.components, "transformer_2": build("wan").model}, boundary_ratio=0.8)
    call = {**size, "num_inference_steps": 8}
    plans = {
        part: search(pipe, [text], call_kwargs=call, bins=2, component=part, dense_steps=0.25)
        for part in ("transformer", "transformer_2")
    }
    steps = [sum(plan.search["bin_steps"]) for plan in plans.values()]
    assert sum(steps) == 8 and min(steps) > 0
    # The dense first steps are those of the whole schedule, hence of the expert of high noise.
    assert [plan.search["dense_steps"] for plan in plans.values()] == [2, 0]
    pipe.set_progress_bar_config(disable=True)
    with sparse_vdit.use(pipe, plans) as handles:
        assert pipe(**text, **call, output_type="latent").frames.isfinite().all()
    assert handles["transformer_2"].plan is plans["transformer_2"]
