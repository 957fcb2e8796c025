"""Searching a plan: run the model a few times, measure every candidate in every head, and decide."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.sparse_vdit.context import Step, family_of, noise_level
from zoo.heads.sparse_vdit.decide import decide_budget, decide_paper
from zoo.heads.sparse_vdit.plan import FULL, MAX_PATTERNS, Grid, SparsePlan, uniform_plan
from zoo.heads.sparse_vdit.plugin import _install, describe_model, transformer_of
from zoo.heads.sparse_vdit.record import Losses, Recorder, measure_costs
from zoo.kernels.tile_sparse import DEFAULT_TILE, Pattern, density, pattern_from_dict

METHODS = ("budget", "paper")
WINDOWS = (0.5, 1.0, 1.5, 2.0, 3.0)
# The modes of the paper, at several widths: it names fixed widths as its limitation.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"pattern": "skip"},
    *({"pattern": "diagonal", "window": w} for w in WINDOWS),
    *({"pattern": "multi_diagonal", "window": w} for w in WINDOWS),
    {"pattern": "vertical_stripe", "frames": [0]},
    {"pattern": "vertical_stripe", "frames": [0, -1]},
)

# Steps that stay dense, and groups of the others.
Groups = tuple[list[int], list[list[int]]]


def search(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    method: str = "budget",
    density: float = 0.3,
    time: float | None = None,
    costs: Sequence[float] | None = None,
    lam: float = 0.5,
    eps: float = 1.0,
    candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
    bins: int | str = 5,
    samples_per_bin: int | None = 3,
    dense_steps: float = 0.2,
    dense_layers: int = 0,
    grid: Grid | None = None,
    tile: tuple[int, int] = DEFAULT_TILE,
    granularity: str = "block",
    generator: torch.Generator | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    component: str = "transformer",
    state: str | Path | None = None,
    progress: bool = True,
    backend: str = "auto",
) -> SparsePlan:
    """Search which attention pattern each head of a video diffusion transformer can do with.

    The pipeline generates each prompt once. In the measured steps, every layer computes its dense attention and each
    candidate from the same queries, keys and values; only sums over each head are kept. A prompt costs about
    (1 + sum of the candidates' densities) times its dense attention in the measured steps.

    Two methods decide:

    - `budget`: the error of a candidate is its squared distance from the head's dense output relative to the mean
      energy of the layer's heads. The sum over heads, layers and steps is minimised at a given mean density, or at a
      given share of the dense attention time. The model runs on dense outputs.
    - `paper`: algorithm 1 of the paper with the sign of its equation 2. Each head takes the candidate of least
      `MSE + lam * (1 - S)`, or stays full where all exceed `eps`; the chosen outputs go on into later layers and steps.
      The MSE is not normalised, so `lam` and `eps` must suit the model's activations: the defaults are the paper's, for
      CogVideoX 1.5, HunyuanVideo and Wan 2.1. With small activations `eps=1` skips nearly every head.

    Args:
        pipe: A pipeline, or its transformer alone.
        prompts: Prompts, or mappings of arguments for the pipeline's (or transformer's) call.
        method: `budget` or `paper`.
        density: Of `budget`: mean density over the searched heads and steps; dense steps and layers do not count.
        time: Of `budget`: target share of the dense attention time instead of `density`.
        costs: Time of each candidate relative to full attention, in the order of `candidates`; with `time` and
            without `costs`, they are measured here.
        lam, eps: Of `paper`.
        candidates: Patterns, as in a plan; `calibrate_blocks` makes another one for one size of video.
        bins: Number of groups of consecutive steps that share an assignment; `"steps"` gives each step its own, as in
            the paper. Bins are looked up by noise level, so a plan serves any number of steps.
        samples_per_bin: Of `budget`: measured steps of each bin; None measures all.
        dense_steps: Share of first steps that stay dense.
        dense_layers: Number of first layers that stay dense.
        grid: Frames, height and width in tokens that are expected; another one raises.
        tile, granularity: As in `SparsePlan`.
        generator: Its seed starts the noise: the prompt i begins from seed + i, so that a resumed search repeats.
        call_kwargs: Further arguments of each call, for instance `height`, `num_frames`, `num_inference_steps`.
        component: The transformer's name in the pipeline, for instance `transformer_2` of Wan 2.2.
        state: File to keep the measurements in; a search that finds it goes on after the last complete prompt.
        progress: Show a progress bar.
        backend: Of the op.

    Returns:
        The plan.

    Raises:
        NotImplementedError: A class of transformer that is not supported.
        ValueError: Bad arguments, a budget that no assignment meets, or a state file of another search.
        RuntimeError: The runs never reached the sparse part of the schedule, had an unknown token grid, or gave NaN.
    """
    target = density if time is None else time
    _check_prompts(pipe, prompts)
    _check_settings(method, target, bins, dense_steps)
    if not 1 <= len(candidates) < MAX_PATTERNS:
        raise ValueError(f"candidates must be 1 to {MAX_PATTERNS - 1} patterns, got {len(candidates)}.")
    if costs is not None and (time is None or len(costs) != len(candidates)):
        raise ValueError("costs go with a target time, and are one number for each candidate.")
    model = _plain_transformer(pipe, component)
    family, described = family_of(model), describe_model(model)
    if not 0 <= dense_layers < len(described["layers"]):
        raise ValueError(f"dense_layers must be less than the {len(described['layers'])} layers, got {dense_layers}.")
    parsed = [pattern_from_dict(c) for c in candidates]
    call = dict(call_kwargs or {})
    seed = None if generator is None else generator.initial_seed()
    calls = [_arguments(pipe, prompt, call, None if seed is None else seed + i) for i, prompt in enumerate(prompts)]
    first = uniform_plan(described, family.text_position, FULL, tile, granularity)
    paper = (lam, eps) if method == "paper" else None
    settings = {
        "model": described,
        "method": method if paper is None else [method, lam, eps],
        "candidates": [dict(c) for c in candidates],
        "steps": [bins, samples_per_bin, dense_steps, dense_layers],
        "tile": [*tile, granularity],
        "prompts": _fingerprint(prompts, call),
        "seed": seed,
    }
    settings = json.loads(json.dumps(settings))
    losses = Losses(settings, (len(described["layers"]), described["heads"], len(parsed)))
    groups_of = _grouping(bins, dense_steps, _handled(pipe, component))
    samples = None if paper else samples_per_bin
    path = None if state is None else Path(state)
    if path is not None and path.exists():
        losses.load(path)
    with _progress(pipe, progress, len(calls)) as advance:
        recorder = Recorder(
            losses,
            parsed,
            lambda: _schedule(pipe, calls, family.rising_time),
            lambda schedule: set(_sampled(groups_of(schedule), samples)),
            dense_layers,
            paper,
            advance,
            grid,
            backend,
        )
        _run(pipe, model, first, calls, recorder, path)
    if not losses.steps():
        raise RuntimeError("Nothing was measured: the runs reached no sparse step of a known token grid.")
    rule = _Rule(paper, target, time is not None, costs, backend, model)
    return _plan_of(first, _group(losses, groups_of(losses.schedule)), parsed, rule, call.get("guidance_scale"))


def _check_prompts(pipe: Any, prompts: Any) -> None:
    if not prompts or isinstance(prompts, (str, Mapping)):
        raise ValueError("prompts must be a list of at least one prompt (or mapping of arguments).")
    if isinstance(pipe, nn.Module) and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "A bare transformer takes mappings of its arguments; give the pipeline to search with prompts."
        )


def _check_settings(method: str, target: float, bins: int | str, dense_steps: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    if method == "budget" and not 0 < target <= 1:
        raise ValueError(f"The target density or time must lie in (0, 1], got {target}.")
    if bins != "steps" and (not isinstance(bins, int) or bins < 1):
        raise ValueError(f"bins must be a positive number or 'steps', got {bins!r}.")
    if not 0 <= dense_steps < 1:
        raise ValueError(f"dense_steps must be a share of the steps in [0, 1), got {dense_steps}.")


def _plain_transformer(pipe: Any, component: str) -> nn.Module:
    """The transformer, refused if it or a block of it is compiled, or its work is divided over devices."""
    model = transformer_of(pipe, component)
    wrapped = hasattr(pipe if isinstance(pipe, nn.Module) else getattr(pipe, component), "_orig_mod")
    if wrapped or any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("The transformer is compiled. Search first, then compile: measuring breaks its graphs.")
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            "The transformer is divided over devices (enable_parallelism). Search on one device, where all heads and "
            "tokens are; the plan can be applied to the parallel model."
        )
    return model


class _Rule:
    """How to decide: the paper's numbers or a budget, and the costs of candidates."""

    def __init__(self, paper, target: float, timed: bool, costs, backend: str, model: nn.Module) -> None:
        self.paper, self.target, self.timed, self.costs, self.backend = paper, target, timed, costs, backend
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def decide(
        self, found: _Found, candidates: Sequence[Pattern], layout: Any, described: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The choice of each group, layer and head, int64 [G, L, M], 0 for full attention, and how it was made."""
        losses = found.losses
        if self.paper is not None:
            sparsity = torch.tensor([1 - density(p, layout) for p in candidates], dtype=torch.float64)
            lam, eps = self.paper
            modes = decide_paper(found.errors(losses.mse), sparsity, lam, eps)
            return modes, {"method": "paper", "lambda": lam, "epsilon": eps}
        error = found.errors(losses.relative)  # [G, L, M, C]
        weight = torch.tensor([len(group) for group in found.groups], dtype=torch.float64)
        prices = self.prices(candidates, layout, described)
        modes = decide_budget(error.flatten(1, 2), prices, weight, self.target).view(error.shape[:3])
        record = {"method": "budget", "target": "time" if self.timed else "density", "value": self.target}
        if self.costs is not None:
            record["costs"] = [float(c) for c in self.costs]
        return modes, record

    def prices(self, candidates: Sequence[Pattern], layout, described: Mapping[str, Any]) -> Tensor:
        """Cost of each candidate relative to full attention."""
        if self.costs is None and self.timed:
            self.costs = measure_costs(
                candidates, layout, described["heads"], described["head_dim"], self.device, self.dtype, self.backend
            )
        if self.costs is not None:
            return torch.tensor(list(self.costs), dtype=torch.float64)
        return torch.tensor([density(p, layout) for p in candidates], dtype=torch.float64)


class _Found(NamedTuple):
    """The measurements of a search by groups of steps that share an assignment."""

    losses: Losses
    # Steps of the schedule that stay dense; those of each group, from noise to clean; the measured ones of each.
    dense: list[int]
    groups: list[list[int]]
    measured: list[list[int]]

    @property
    def dense_layers(self) -> int:
        return self.losses.settings["steps"][3]

    def errors(self, kind: Callable[[list[int]], Tensor]) -> Tensor:
        """`Losses.relative` or `Losses.mse` of each group, searched layer, head and candidate, [G, L, M, C]."""
        return torch.stack([kind(steps)[self.dense_layers :] for steps in self.measured])

    def assignment(self, modes: Tensor) -> Tensor:
        """Choices [G, L, M] with full attention for the dense layers and steps; groups rise from clean to noise."""
        assign = F.pad(modes, (0, 0, self.dense_layers, 0))
        return (F.pad(assign, (0, 0, 0, 0, 1, 0)) if self.dense else assign).flip(0)

    def record(self, modes: Tensor) -> dict[str, Any]:
        """What a plan tells of these measurements."""
        return {
            "prompts": len(self.losses.runs),
            "prompts_sha256": self.losses.settings["prompts"],
            "measured_steps": len(self.losses.steps()),
            "bin_steps": [len(group) for group in [*([self.dense] if self.dense else []), *self.groups]][::-1],
            "dense_steps": len(self.dense),
            "dense_layers": self.dense_layers,
            "error": self._summary(modes),
        }

    def _summary(self, modes: Tensor) -> dict[str, Any]:
        """Mean relative error of the chosen patterns: over all, in each bin, and how far prompts lie apart."""
        losses, measured = self.losses, self.measured

        def chosen(group: int, run: int | None = None) -> float:
            error = losses.relative(measured[group], run)[self.dense_layers :]  # [L, M, C]
            error = F.pad(error, (1, 0))  # that of full attention
            return float(error.gather(-1, modes[group][..., None]).mean())

        by_bin = [chosen(g) for g in range(len(measured))]
        complete = [r for r, run in enumerate(losses.runs) if all(any(s in run for s in steps) for steps in measured)]
        by_run = [sum(chosen(g, r) for g in range(len(measured))) / len(measured) for r in complete]
        spread = float(torch.tensor(by_run).std()) if len(by_run) > 1 else None
        return {"mean": sum(by_bin) / len(by_bin), "bins": by_bin[::-1], "prompts": by_run, "spread": spread}


def _group(losses: Losses, groups: Groups) -> _Found:
    """Sort measurements into groups.

    Raises:
        RuntimeError: A group has none, or they are not finite.
    """
    steps = set(losses.steps())
    found = _Found(losses, *groups, [[s for s in group if s in steps] for group in groups[1]])
    if not all(found.measured):
        raise RuntimeError("Some steps were never reached: the runs ended early. Run the whole schedule.")
    if not found.errors(losses.relative).isfinite().all():
        raise RuntimeError(
            "The measured errors are not finite: the model's attention gave NaN or infinity in these runs."
        )
    return found


def _plan_of(
    first: SparsePlan, found: _Found, candidates: Sequence[Pattern], rule: _Rule, guidance: float | None
) -> SparsePlan:
    """Decide from the measurements."""
    schedule, calibrated = found.losses.schedule, found.losses.calibrated
    layout = first.layout(tuple(calibrated["grid"]), calibrated["text_length"])
    modes, decision = rule.decide(found, candidates, layout, first.model)
    record = {
        **decision,
        **found.record(modes),
        "sparsity": [round(1 - density(p, layout), 6) for p in candidates],
        "device": torch.cuda.get_device_name(rule.device) if rule.device.type == "cuda" else rule.device.type,
        "torch": torch.__version__,
    }
    return dataclasses.replace(
        first,
        # Steps run from noise to clean, bins the other way.
        bins=tuple(_edges(schedule, found.dense, found.groups)),
        patterns=(FULL, *(p.to_dict() for p in candidates)),
        assign=tuple(found.assignment(modes).tolist()),
        calibrated={**calibrated, "steps": len(schedule), **({"guidance": guidance} if guidance is not None else {})},
        search=record,
    )


def _run(pipe: Any, model: nn.Module, first: SparsePlan, calls: list, recorder: Recorder, path: Path | None) -> None:
    """Run what the state file does not hold yet."""
    step = Step(recorder.backend)
    step.recorder = recorder
    losses = recorder.losses
    with _install(model, first, step), torch.no_grad():
        for make in calls[len(losses.runs) :]:
            losses.runs.append({})
            pipe(**make())
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                losses.save(path)


def _arguments(pipe: Any, prompt: Any, call: Mapping[str, Any], seed: int | None) -> Callable[[], dict[str, Any]]:
    """Arguments of one call; made anew each time, as a generator is spent by its run."""

    def make() -> dict[str, Any]:
        arguments = {**({"prompt": prompt} if isinstance(prompt, str) else prompt), **call}
        if not isinstance(pipe, nn.Module):
            # Decoding the video would cost time and tell nothing.
            if "output_type" in inspect.signature(type(pipe).__call__).parameters:
                arguments.setdefault("output_type", "latent")
            if seed is not None:
                arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        return arguments

    return make


def _fingerprint(prompts: Sequence[Any], call: Mapping[str, Any]) -> str:
    """SHA-256 of what the runs are given."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value):
                digest.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif isinstance(value, (str, int, float, bool, type(None))):
            digest.update(f"{type(value).__name__}:{value};".encode())
        elif hasattr(value, "tobytes"):
            # Arrays, and the images of image-to-video pipelines.
            digest.update(value.tobytes())

    feed(list(prompts))
    feed(call)
    return digest.hexdigest()


def _schedule(pipe: Any, calls: list, rising_time: bool) -> list[float]:
    """Noise levels of all steps, falling: the scheduler's, or those of the calls of a bare transformer."""
    if isinstance(pipe, nn.Module):
        levels = [float(noise_level(make()["timestep"], rising_time)) for make in calls]
    else:
        levels = [float(noise_level(t, rising_time)) for t in pipe.scheduler.timesteps]
    return sorted(set(levels), reverse=True)


def _handled(pipe: Any, component: str) -> Callable[[float], bool]:
    """Which noise levels a transformer sees: the two experts of Wan 2.2 share the schedule."""
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if isinstance(pipe, nn.Module) or ratio is None:
        return lambda level: True
    return (lambda level: level < ratio) if component == "transformer_2" else (lambda level: level >= ratio)


def _grouping(bins: int | str, dense_steps: float, handled: Callable[[float], bool]) -> Callable[[list[float]], Groups]:
    """From a schedule: the steps that stay dense, and the groups of the others, from noise to clean."""

    def groups_of(schedule: list[float]) -> Groups:
        first = math.ceil(dense_steps * len(schedule) - 1e-9)
        own = [i for i, level in enumerate(schedule) if handled(level)]
        dense, sparse = [i for i in own if i < first], [i for i in own if i >= first]
        if not sparse:
            raise RuntimeError(f"dense_steps={dense_steps} leaves no sparse step of the {len(schedule)}.")
        count = len(sparse) if bins == "steps" else min(int(bins), len(sparse))
        cuts = [round(len(sparse) * i / count) for i in range(count + 1)]
        return dense, [sparse[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

    return groups_of


def _sampled(groups: Groups, samples: int | None) -> Iterator[int]:
    """The steps to measure, evenly within each group."""
    for group in groups[1]:
        count = len(group) if samples is None else min(samples, len(group))
        for i in range(count):
            yield group[(2 * i + 1) * len(group) // (2 * count)]


def _edges(schedule: list[float], dense: list[int], groups: list[list[int]]) -> list[float]:
    """Edges of the bins, rising from 0 to 1, midway between the last step of a group and the first of the next."""
    blocks = ([dense] if dense else []) + groups
    inner = [(schedule[a[-1]] + schedule[b[0]]) / 2 for a, b in zip(blocks, blocks[1:], strict=False)]
    return [0.0, *reversed(inner), 1.0]


@contextlib.contextmanager
def _progress(pipe: Any, show: bool, runs: int) -> Iterator[Callable[[int, int, int], None]]:
    """A bar over the steps of all runs in place of the pipeline's own."""
    if not show:
        yield lambda run, step, steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("searching: prompt {task.fields[run]}/{task.fields[runs]}, step {task.fields[step]}")
    # Standard output belongs to results.
    console, columns = Console(stderr=True), (text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    theirs = getattr(pipe, "_progress_bar_config", None)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None, run=1, runs=runs, step=0)

            def advance(run: int, step: int, steps: int) -> None:
                bar.update(task, total=runs * steps, completed=run * steps + step, run=run + 1, step=step + 1)

            yield advance
    finally:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(**(theirs or {}))
