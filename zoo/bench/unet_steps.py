"""Steps of Stable Diffusion's UNet with random weights: stock, with merged tokens alone, and under AgentSD.

Providers:

- ``sdpa``: the UNet as diffusers runs it.
- ``merge``: half of the tokens merged in every step, in cells of 2 x 2 with random destinations, as Token Merging for
  Stable Diffusion (arXiv:2303.17604) does by default; softmax attention.
- ``official``, ``fast``: the modes of `zoo.agent_sd.apply`.

AgentSD works in two phases: agents in the first 40 % of the steps, merging after. A step of each is timed, and ``loop``
is their mean over a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.bench import models, report, suites, timing

if TYPE_CHECKING:
    from zoo.bench.runner import Options, Outcome

PROVIDERS = ("sdpa", "merge", "official", "fast")
BASELINE = "sdpa"
# A noise level of each phase of AgentSD, and the share of the steps that the phase has.
PHASES = {"first_phase": (800, 0.4), "second_phase": (300, 0.6)}
# Stable Diffusion 1.x, where it differs from the defaults of diffusers.
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
LATENT = 8


def build_unet(entry: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A UNet of random weights in eval mode."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with device:
        unet = UNet2DConditionModel(**{**SD15, **entry.get("config", {})})
    return unet.to(dtype).eval().requires_grad_(False)


def make_inputs(unet: nn.Module, size: int, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Latents of images of `size` pixels and text embeddings; an image is two of a batch, for guidance."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    side = size // LATENT
    return {
        "sample": randn(2 * batch, unet.config.in_channels, side, side),
        "encoder_hidden_states": randn(2 * batch, 77, unet.config.cross_attention_dim),
    }


@contextlib.contextmanager
def applied(unet: nn.Module, provider: str) -> Iterator[None]:
    """A provider at work on a UNet."""
    from zoo.heads import agent_sd

    if provider == "merge":
        # Without agents every phase merges.
        schedule = (agent_sd.Phase(1.0, (2, 2), 0.0),)
        handle = agent_sd.apply(unet, 0.5, mode="official", schedule=schedule, seed=0)
    elif provider in ("official", "fast"):
        handle = agent_sd.apply(unet, mode=provider, seed=0)
    else:
        handle = contextlib.nullcontext()
    with handle:
        yield


def step_of(unet: nn.Module, inputs: dict[str, Tensor], timestep: int) -> Callable[[], Tensor]:
    """A forward pass at a timestep, which stays on the host as AgentSD reads it there."""

    def step() -> Tensor:
        with torch.no_grad():
            return unet(**inputs, timestep=timestep, return_dict=False)[0]

    return step


def measure(step: Callable[[], Tensor], device: torch.device, samples: int) -> dict[str, Any]:
    """Wall time of a step and, on a GPU, the sum of its kernels and its peak memory, as columns of a row.

    Raises:
        RuntimeError: The output is not finite.
    """
    if not bool(step().isfinite().all()):
        raise RuntimeError("refused, no time reported: the result is not finite")
    on_gpu = device.type == "cuda"
    memory = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        timing.synchronize(device)
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    wall = timing.wall_time([step], device, samples, min_seconds=0.1 if on_gpu else 1e-3).scaled(1e3)
    columns = {f"eager_{key}": value for key, value in wall._asdict().items()}
    if not on_gpu:
        return {"metric": "wall_time", **wall._asdict(), **columns, "memory_mib": None}
    kernels = sum(time for _, time in models.profile_step(step, device).groups)
    return {"metric": "kernel_time", "p50": kernels, **columns, "memory_mib": memory}


def mean_of_phases(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of a run of the loop: times in proportion to the steps, memory of the larger one."""
    first = next(iter(phases.values()))
    row = {"metric": first["metric"]}
    for key in ("p20", "p50", "p80", "eager_p20", "eager_p50", "eager_p80"):
        if key in first:
            row[key] = sum(PHASES[name][1] * values[key] for name, values in phases.items())
    memory = [values["memory_mib"] for values in phases.values()]
    return {**row, "memory_mib": None if None in memory else max(memory)}


def describe(entry: Mapping[str, Any], size: int, batch: int) -> str:
    """An entry as one string."""
    return " ".join([f"size={size} batch={2 * batch}", *(f"{k}={v}" for k, v in entry.get("config", {}).items())])


def run(suite: suites.Suite, options: Options, outcome: Outcome) -> None:
    """Time every UNet, size and dtype of a suite."""
    settings = suite.settings
    batch = settings.get("batch", 1)
    for entry in settings["unets"]:
        for dtype in options.dtypes or settings.get("dtypes", ["float16"]):
            unet = None
            for size in settings["sizes"]:
                config = describe(entry, size, batch)
                chosen = [
                    p
                    for p in settings.get("providers", PROVIDERS)
                    if options.wants(suite.name, entry["name"], config, dtype, "step", p)
                ]
                if not chosen:
                    continue
                if unet is None:
                    unet = build_unet(entry, suites.DTYPES[dtype], options.device)
                inputs = make_inputs(unet, size, batch, suites.DTYPES[dtype], options.device)
                columns = dict(suite=suite.name, name=entry["name"], config=config, dtype=dtype)
                _run_size(unet, inputs, chosen, columns, options, outcome)


def _run_size(
    unet: nn.Module, inputs: dict[str, Tensor], providers: list[str], columns: dict[str, Any], options: Options,
    outcome: Outcome,
) -> None:  # fmt: skip
    """Time the providers at one size."""
    rows = []
    for provider in providers:
        try:
            with applied(unet, provider):
                phases = {
                    name: measure(step_of(unet, inputs, timestep), options.device, options.samples)
                    for name, (timestep, _) in PHASES.items()
                }
        except Exception as error:  # out of memory: this provider only
            label = f"{columns['name']} [{columns['config']}] {columns['dtype']} {provider}"
            outcome.fail(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        for mode, values in {**phases, "loop": mean_of_phases(phases)}.items():
            row = {**columns, **values, "provider": provider, "mode": mode, "unit": "ms"}
            rows.append(report.make_row(options.device, **row))
    base = {row["mode"]: row["p50"] for row in rows if row["provider"] == BASELINE}
    for row in rows:
        if row["mode"] in base:
            row["speedup"] = float(f"{base[row['mode']] / row['p50']:.4g}")
    outcome.add(rows)
