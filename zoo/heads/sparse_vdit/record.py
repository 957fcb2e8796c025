"""Measuring candidates inside a running model: errors of each head, and what they cost."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.heads.sparse_vdit.decide import paper_losses
from zoo.kernels.tile_sparse import Full, Layout, Pattern, density, tile_sparse_attention


class HeadErrors(NamedTuple):
    """Errors of one attention.

    Attributes:
        mse: `[M, C]`, mean over samples, tokens (text too) and channels of the squared error of each candidate.
        energy: `[M]`, mean of the squared dense output.
    """

    mse: Tensor
    energy: Tensor


class PaperRule(NamedTuple):
    """Which candidate goes on into the model during a search by the paper's algorithm."""

    lam: float
    eps: float
    # [M, C] summed over earlier calls of the same step and layer, and their number.
    earlier: Tensor
    calls: int


def head_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    candidates: Sequence[Pattern],
    text_length: Tensor | None = None,
    rule: PaperRule | None = None,
    backend: str = "auto",
) -> tuple[HeadErrors, Tensor]:
    """Errors of candidate patterns before the output projection, and the output to go on with.

    Candidates are streamed: beside the dense output, one candidate's output is held at a time (and the chosen one,
    with a rule); attention maps never are.

    Args:
        q, k, v: `[B, M, S, D]`.
        layout: The joint sequence.
        candidates: The candidates.
        text_length: `[B]`, valid text tokens.
        rule: With a rule, each head goes on with its chosen candidate (algorithm 1 of the paper); without, dense.
        backend: Of the op.

    Returns:
        Errors, and the output `[B, M, S, D]`.
    """
    patterns = (Full(), *candidates)
    ids = torch.zeros(q.shape[1], dtype=torch.int32, device=q.device)

    def attend(number: int) -> Tensor:
        return tile_sparse_attention(
            q, k, v, ids + number, patterns, layout, text_length=text_length, backend=backend
        )  # fmt: skip

    dense = attend(0)
    mse = []
    chosen, least = (dense.clone(), torch.full_like(ids, torch.inf, dtype=torch.float64)) if rule else (dense, None)
    sparsity = torch.tensor(_sparsity(patterns[1:], layout), device=q.device)
    for c in range(len(candidates)):
        out = attend(c + 1)
        mse.append(_mean_square(out, dense))
        if rule is not None:
            mean = (rule.earlier[:, c].to(q.device) + mse[-1]) / (rule.calls + 1)
            loss = paper_losses(mean[:, None], sparsity[c : c + 1], rule.lam)[:, 0]
            better = loss < least
            chosen[:, better] = out[:, better]
            least = torch.where(better, loss, least)
    if rule is not None:
        keep = least > rule.eps
        chosen[:, keep] = dense[:, keep]
    return HeadErrors(torch.stack(mse, dim=-1), _mean_square(dense)), chosen


@functools.lru_cache(maxsize=16)
def _sparsity(patterns: tuple[Pattern, ...], layout: Layout) -> list[float]:
    return [1 - density(p, layout) for p in patterns]


def _mean_square(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Mean square of `x - y` of each head, `[M]` float64; head by head, as a float32 copy of all would be large."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = []
    for m in range(x.shape[1]):
        head = x[:, m].to(dtype)
        values.append((head if y is None else head - y[:, m]).square().mean(dtype=dtype))
    return torch.stack(values).double()


class Losses:
    """Per-head errors of a search: `[runs][steps]` entries, each `[L, M, C]`.

    Attributes:
        settings: What the errors belong to; a state file of other settings is refused.
        schedule: Noise levels of the steps, falling.
        runs: For each run (a prompt), `{step: (mse [L, M, C], energy [L, M], calls [L])}`, sums over calls.
    """

    def __init__(self, settings: dict, shape: tuple[int, int, int]) -> None:
        self.settings, self.shape = settings, shape
        self.schedule: list[float] = []
        self.calibrated: dict = {}
        self.runs: list[dict[int, tuple[Tensor, Tensor, Tensor]]] = []

    def add(self, step: int, layer: int, errors: HeadErrors) -> None:
        layers, heads, candidates = self.shape
        run = self.runs[-1]
        if step not in run:
            run[step] = (
                torch.zeros(layers, heads, candidates, dtype=torch.float64),
                torch.zeros(layers, heads, dtype=torch.float64),
                torch.zeros(layers, dtype=torch.int64),
            )
        mse, energy, calls = run[step]
        mse[layer] += errors.mse.cpu()
        energy[layer] += errors.energy.cpu()
        calls[layer] += 1

    def total(self, step: int, layer: int) -> tuple[Tensor, int]:
        """Sum of the MSE over all calls of a step and layer, `[M, C]`, and their number."""
        found = [run[step] for run in self.runs if step in run]
        mse = sum((f[0][layer] for f in found), torch.zeros(self.shape[1:], dtype=torch.float64))
        return mse, sum(int(f[2][layer]) for f in found)

    def steps(self) -> list[int]:
        """Steps with measurements, ascending."""
        return sorted({step for run in self.runs for step in run})

    def mse(self, steps: Sequence[int], run: int | None = None) -> Tensor:
        """Mean MSE over the calls of some steps, `[L, M, C]`; of one run or of all."""
        found = [r[s] for r in (self.runs if run is None else [self.runs[run]]) for s in steps if s in r]
        calls = sum(f[2] for f in found).clamp_min(1)
        return sum(f[0] for f in found) / calls[:, None, None]

    def relative(self, steps: Sequence[int], run: int | None = None) -> Tensor:
        """Mean over runs and some steps of the error relative to the mean energy of the layer's heads, `[L, M, C]`.

        Not to the head's own energy: heads of small outputs matter less to the layer that projects them.
        """
        found = [r[s] for r in (self.runs if run is None else [self.runs[run]]) for s in steps if s in r]
        return sum(f[0] / f[1].mean(1).clamp_min(1e-30)[:, None, None] for f in found) / len(found)

    def save(self, path: Path) -> None:
        """Write the state of the search; the file appears complete or not at all."""
        tensors = {}
        for r, run in enumerate(self.runs):
            for s, values in run.items():
                tensors.update(
                    {f"{r}.{s}.{name}": t for name, t in zip(("mse", "energy", "calls"), values, strict=True)}
                )
        record = dict(settings=self.settings, schedule=self.schedule, calibrated=self.calibrated, runs=len(self.runs))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"search": json.dumps(record)})
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a state file.

        Raises:
            ValueError: It belongs to a search with other settings.
        """
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("search", "{}"))
            settings = record.get("settings", {})
            other = sorted(key for key in self.settings if settings.get(key) != self.settings[key])
            if other:
                raise ValueError(
                    f"'{path}' is the state of another search: {', '.join(other)} differ. "
                    "Delete it, or name another file."
                )
            self.schedule, self.calibrated = record["schedule"], record["calibrated"]
            self.runs = [{} for _ in range(record["runs"])]
            for key in file.keys():  # noqa: SIM118  not a dictionary
                run, step, name = key.split(".")
                if name == "mse":
                    self.runs[int(run)][int(step)] = tuple(
                        file.get_tensor(f"{run}.{step}.{part}") for part in ("mse", "energy", "calls")
                    )


class Recorder:
    """Takes the place of attention while a search runs the model.

    Args:
        losses: Where errors go.
        candidates: The candidates.
        find_schedule: Returns the noise levels of all steps, falling, once the run has begun.
        plan_steps: From the schedule, the steps to measure; the others, and dense layers, run the stock processors.
        dense_layers: Number of first layers that stay dense.
        paper: `(lambda, epsilon)` of the paper's algorithm, None for the budget's.
        on_step: Called with (run, step, steps) as a step begins.
        grid: The token grid that is expected; None takes that of the first call.
        backend: Of the op.
    """

    def __init__(
        self,
        losses: Losses,
        candidates: Sequence[Pattern],
        find_schedule: Callable[[], list[float]],
        plan_steps: Callable[[list[float]], set[int]],
        dense_layers: int,
        paper: tuple[float, float] | None,
        on_step: Callable[[int, int, int], None],
        grid: tuple[int, int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        self.losses, self.candidates, self.backend = losses, tuple(candidates), backend
        self.find_schedule, self.plan_steps, self.on_step = find_schedule, plan_steps, on_step
        self.dense_layers, self.paper, self.grid = dense_layers, paper, grid
        self.number = 0

    def begin_call(self, step, layers: int) -> list[bool]:
        """Take note of a forward pass; returns which layers are to be measured.

        Raises:
            ValueError: The call has another token grid than is expected, or than earlier calls.
        """
        self.check_grid(step.layout)
        if not self.losses.schedule:
            self.losses.schedule = self.find_schedule()
        schedule = self.losses.schedule
        # The nearest step: a model may be given its time in bfloat16.
        self.number = min(range(len(schedule)), key=lambda i: abs(schedule[i] - step.sigma))
        self.on_step(len(self.losses.runs) - 1, self.number, len(schedule))
        measured = self.number in self.plan_steps(schedule)
        return [measured and n >= self.dense_layers for n in range(layers)]

    def check_grid(self, layout: Layout) -> None:
        found = self.losses.calibrated
        expected = self.grid or found.get("grid") or layout.grid
        if tuple(expected) != layout.grid:
            raise ValueError(
                f"A call has the token grid {layout.grid}, expected {tuple(expected)}: all prompts need this size."
            )
        text = max(found.get("text_length", 0), layout.text)
        self.losses.calibrated = {"grid": list(layout.grid), "text_length": text}

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step, text_length: Tensor | None) -> Tensor:
        """Measure the candidates; returns the output to go on with."""
        rule = None
        if self.paper is not None:
            rule = PaperRule(*self.paper, *self.losses.total(self.number, layer))
        errors, out = head_errors(q, k, v, step.layout, self.candidates, text_length, rule, self.backend)
        self.losses.add(self.number, layer, errors)
        return out


def measure_costs(
    candidates: Sequence[Pattern],
    layout: Layout,
    heads: int,
    head_dim: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
    repeats: int = 5,
) -> list[float]:
    """Time of each candidate on this device relative to the full pattern, with all heads alike.

    Args:
        candidates: The candidates.
        layout: The joint sequence to time.
        heads, head_dim: Of the model.
        device, dtype: Of the tensors.
        backend: Of the op.
        repeats: The median of so many runs counts.

    Returns:
        One factor a candidate.
    """
    shape = (1, heads, layout.tokens, head_dim)
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    patterns = (Full(), *candidates)

    def seconds(number: int) -> float:
        ids = torch.full((heads,), number, dtype=torch.int32, device=device)
        return median_seconds(
            lambda: tile_sparse_attention(q, k, v, ids, patterns, layout, backend=backend), q, repeats
        )  # fmt: skip

    with torch.no_grad():
        full = seconds(0)
        return [seconds(n + 1) / full for n in range(len(candidates))]


def median_seconds(run: Callable[[], Any], like: Tensor, repeats: int) -> float:
    """Median wall time of some runs on the device of a tensor, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        start = time.perf_counter()
        run()
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
