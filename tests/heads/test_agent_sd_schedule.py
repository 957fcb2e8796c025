"""When AgentSD merges, and when it runs agents: token grids, phases and levels."""

from __future__ import annotations

import diffusers
import pytest
import torch

import zoo
from zoo.heads.agent_sd import Phase
from zoo.heads.agent_sd.schedule import token_grid

from .agent_sd_unets import Watch, denoise, latents, make_pipeline, phases


@pytest.mark.parametrize(
    "latent, tokens, expected",
    [
        ((16, 16), 256, (16, 16)),
        ((15, 9), 40, (8, 5)),
        ((17, 23), 30, (5, 6)),
        ((1, 3), 2, (1, 2)),
        ((1, 1), 0, None),
        ((16, 16), 77, None),
    ],
)
def test_token_grid(latent, tokens, expected) -> None:
    assert token_grid(latent, tokens) == expected


@pytest.mark.parametrize(
    "scheduler, steps, calls",
    [
        ("DDIMScheduler", 10, [4, 6]),
        ("DDIMScheduler", 7, [3, 4]),
        ("DDIMScheduler", 1, [1, 0]),
        # The second step is evaluated twice.
        ("PNDMScheduler", 10, [5, 6]),
        ("EulerDiscreteScheduler", 5, [2, 3]),
        # All timesteps but the first one are evaluated twice.
        ("HeunDiscreteScheduler", 5, [3, 6]),
        ("UniPCMultistepScheduler", 6, [3, 3]),
    ],
)
def test_phase_changes_at_two_fifths_of_the_steps(scheduler, steps, calls) -> None:
    pipe = make_pipeline(scheduler)
    zoo.agent_sd.apply(pipe, mode="official", seed=0)
    expected = [True] * calls[0] + [False] * calls[1]
    assert phases(pipe, steps) == expected


def test_runs_follow_each_other_and_the_scheduler_may_change() -> None:
    pipe = make_pipeline()
    zoo.agent_sd.apply(pipe, mode="official")
    assert sum(phases(pipe, 5)) == 2
    # By the noise level it would be two of these.
    assert sum(phases(pipe, 7)) == 3
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert sum(phases(pipe, 10)) == 4


def test_image_to_image_starts_in_the_phase_of_its_first_step() -> None:
    pipe = make_pipeline()
    zoo.agent_sd.apply(pipe, mode="official")
    assert phases(pipe, 10, strength=0.8) == [True] * 2 + [False] * 6


@pytest.mark.parametrize("as_timestep", [int, float, torch.tensor, lambda t: torch.full((2,), t)])
def test_unet_alone_goes_by_the_noise_level(unet, as_timestep) -> None:
    watch = Watch(unet)
    zoo.agent_sd.apply(unet, mode="official")
    # The published loop of 50 steps: agents until timestep 601, merging from 581 on.
    for timestep, agents in ((601, 16), (581, 0)):
        denoise(unet, latents(), as_timestep(timestep))
        assert [row[1] for row in watch.take()] == [agents, 0, agents, agents]


def test_fast_mode_merges_for_softmax_alone_and_for_many_tokens_alone(unet) -> None:
    watch, x = Watch(unet), latents()
    zoo.agent_sd.apply(unet, min_merge_tokens=256)
    denoise(unet, x, 900)
    assert watch.take() == [(256, 16), (64, 0), (256, 16), (256, 16)]
    denoise(unet, x, 100)
    assert watch.take() == [(154, 0), (64, 0), (154, 0), (154, 0)]
    zoo.agent_sd.apply(unet)
    denoise(unet, x, 100)
    assert watch.take() == [(256, 0), (64, 0), (256, 0), (256, 0)]


def test_too_many_agents_leave_softmax(unet) -> None:
    watch = Watch(unet)
    zoo.agent_sd.apply(unet, ratio=0.5, mode="official", schedule=[Phase(1.0, (2, 2), 0.8)])
    denoise(unet, latents())
    assert watch.take()[0] == (128, 0)


def test_max_downsample(unet) -> None:
    watch = Watch(unet)
    zoo.agent_sd.apply(unet, mode="official", max_downsample=2)
    denoise(unet, latents())
    assert watch.take() == [(154, 16), (64 - 25, 4), (154, 16), (154, 16)]
