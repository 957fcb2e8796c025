"""When and where tokens merge: phases of the denoising loop, and the state that all blocks of a UNet share."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Timesteps of the noise schedule of Stable Diffusion, where no scheduler says otherwise.
TRAIN_TIMESTEPS = 1000
# Against fused attention merging half of the tokens was reported to gain 1 % at 512 x 512 pixels (4096 tokens) and 10 %
# at 768 x 768 (9216): huggingface/diffusers#2940.
MIN_MERGE_TOKENS = 9216


@dataclass(frozen=True)
class Phase:
    """Settings of a part of the denoising loop.

    Attributes:
        until: Fraction of the steps at which it ends, in (0, 1].
        cell: Height and width of the cells of tokens that get one destination each.
        agent_ratio: Fraction of the tokens that merge into agents. Where the agents would be no fewer than half of the
            tokens of the layer, softmax attention runs instead.
    """

    until: float
    cell: tuple[int, int]
    agent_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"a phase ends at a fraction `until` of the steps in (0, 1], got {self.until}.")
        if len(self.cell) != 2 or min(self.cell) < 1 or max(self.cell) == 1:
            raise ValueError(f"cell must be (height, width) of more than one token, got {self.cell}.")
        if not 0 <= self.agent_ratio <= 1:
            raise ValueError(f"agent_ratio must be a fraction of the tokens in [0, 1], got {self.agent_ratio}.")


# The published setting: agents for the first 20 of 50 steps, then merged softmax attention.
SCHEDULE = (Phase(0.4, (4, 4), 0.95), Phase(1.0, (2, 2), 0.5))


def check_schedule(schedule: Sequence[Phase]) -> tuple[Phase, ...]:
    """The schedule as a tuple; raises ValueError unless its phases follow each other to the last step."""
    schedule = tuple(schedule)
    ends = [phase.until for phase in schedule]
    if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
        raise ValueError(f"phases must end at increasing fractions of the steps, the last one at 1.0, got {ends}.")
    return schedule


class Plan(NamedTuple):
    """What one layer does in one call: its token grid, the cells, and how many tokens merge."""

    grid: tuple[int, int]
    cell: tuple[int, int]
    merged: int
    # Tokens that merge into agents; 0: softmax attention, without agents.
    agent_merged: int
    # Tokens that are no destinations.
    sources: int

    @property
    def ranked(self) -> bool:
        """Whether some sources merge and others do not."""
        return bool({self.merged, self.agent_merged} - {0, self.sources})


def token_grid(latent: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """Height and width of the level of a UNet that has so many tokens; None: no level has.

    Each level halves the one before, odd sizes upwards.
    """
    H, W = latent
    while tokens < H * W > 1:
        H, W = (H + 1) // 2, (W + 1) // 2
    return (H, W) if tokens == H * W else None


@dataclass
class Context:
    """Settings of an installation, and what its blocks must know of the UNet call that is running."""

    ratio: float
    fast: bool
    schedule: tuple[Phase, ...]
    use_rand: bool
    seed: int | None
    min_merge_tokens: int
    k_scale2: float
    k_shortcut: float

    def __post_init__(self) -> None:
        self.phase = self.schedule[0]
        self.latent: tuple[int, int] | None = None
        self.offsets: dict[int, Tensor] = {}
        self._generator: torch.Generator | None = None
        self._last_timestep = float("inf")
        self._pipe = None
        self._timesteps, self._steps = None, []

    def __getstate__(self) -> dict:
        # A copy belongs to no pipeline and draws numbers of its own.
        return self.__dict__ | dict(_pipe=None, _generator=None, _timesteps=None, _steps=[], offsets={})

    def follow(self, pipe) -> None:
        """Take the steps from the scheduler of a pipeline, whichever it has at the time."""
        self._pipe = weakref.ref(pipe)

    def begin(self, sample: Tensor, timestep) -> None:
        """A call of the UNet begins, with latents [B, C, H, W] at a timestep."""
        self.latent = tuple(sample.shape[-2:])
        if len(self.schedule) > 1 or self.use_rand:
            self._locate(timestep)

    # Reading the timestep waits for the device: once a call, outside of what a compiler traces.
    @torch.compiler.disable
    def _locate(self, timestep) -> None:
        timestep = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        progress = self._progress(timestep)
        phase = next((phase for phase in self.schedule if progress < phase.until), self.schedule[-1])
        # Noise that rises again means another run of the loop.
        if phase != self.phase or timestep > self._last_timestep:
            self._generator = None
        self.phase, self._last_timestep = phase, timestep
        self.offsets.clear()

    def _progress(self, timestep: float) -> float:
        """Fraction of the loop that lies behind: of the scheduler's steps if it has this one, else of the noise.

        Steps that a solver evaluates twice count once. An image-to-image loop that starts late in the schedule starts
        in the phase to which that step belongs.
        """
        scheduler = getattr(self._pipe() if self._pipe else None, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and timesteps is not self._timesteps:
            self._timesteps, self._steps = timesteps, list(dict.fromkeys(torch.as_tensor(timesteps).tolist()))
        if timesteps is not None and timestep in self._steps:
            return self._steps.index(timestep) / len(self._steps)
        total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", TRAIN_TIMESTEPS)
        return 1 - timestep / total

    def plan(self, tokens: int) -> Plan | None:
        """What a layer of so many tokens does in this call; None: stock attention."""
        grid = token_grid(self.latent, tokens) if self.latent else None
        if grid is None:
            return None
        (H, W), (cell_h, cell_w) = grid, self.phase.cell
        dst = (H // cell_h) * (W // cell_w)
        if dst == 0:
            return None
        sources = tokens - dst
        merged = min(int(tokens * self.ratio), sources)
        agent_merged = min(int(tokens * self.phase.agent_ratio), sources)
        # Agent attention is linear in the tokens: merging them as well costs more than it saves.
        agents = 2 * (tokens - agent_merged) < tokens - (0 if self.fast else merged)
        if self.fast and (agents or tokens < self.min_merge_tokens):
            merged = 0
        if not agents and not merged:
            return None
        return Plan(grid, self.phase.cell, merged, agent_merged if agents else 0, sources)

    def cell_offsets(self, layer: int, plan: Plan, batch: int, device: torch.device) -> Tensor | None:
        """Random positions of the destinations of a layer in their cells; None: the top left.

        All images of a batch share them, and batches of odd size have none, as in the published method.
        """
        return self._draw(layer, plan, device) if self.use_rand and batch % 2 == 0 else None

    @torch.compiler.disable
    def _draw(self, layer: int, plan: Plan, device: torch.device) -> Tensor:
        # Once a layer and call: a block that gradient checkpointing runs again must choose the same tokens.
        if layer not in self.offsets:
            self._generator = self._generator or self._new_generator(device)
            (H, W), (cell_h, cell_w) = plan.grid, plan.cell
            # [cells down, cells across, 1]; the last axis has the shape of the published draw and its numbers.
            shape = (H // cell_h, W // cell_w, 1)
            drawn = torch.randint(cell_h * cell_w, shape, generator=self._generator, device=self._generator.device)
            self.offsets[layer] = drawn.squeeze(-1).to(device)
        return self.offsets[layer]

    def _new_generator(self, device: torch.device) -> torch.Generator:
        """Seeded, or a fork of torch's own generator that leaves it untouched."""
        cuda = device.type == "cuda"
        generator = torch.Generator(device if cuda else "cpu")
        if self.seed is not None:
            return generator.manual_seed(self.seed)
        return generator.set_state(torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state())
