"""The command line of ``zoo bench`` and the loops over suites."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.bench import detectors, gate, models, report, resolution, suites, timing, unet_steps, video_steps
from zoo.bench.ops import OPS, Inputs, Op, Provider, input_bytes

BASELINE_MODES = {"forward": False, "forward+backward": True}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    device: torch.device
    out: Path | None
    filters: tuple[re.Pattern[str], ...]
    dtypes: tuple[str, ...] | None
    quick: bool
    profile: bool
    # Of the suite; None leaves the default.
    most_samples: int | None = None

    def wants(self, *parts: str) -> bool:
        """Whether every filter matches the description of a measurement."""
        label = " ".join(parts)
        return all(pattern.search(label) for pattern in self.filters)

    @property
    def samples(self) -> int:
        """Samples per measurement."""
        if self.quick:
            return 1
        samples = 20 if self.device.type == "cuda" else 5
        return min(samples, self.most_samples or samples)


class Outcome:
    """Rows of one suite and the number of failures.

    Args:
        path: CSV file that receives rows as they are measured, so that a run that is cut off keeps them; None for none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.failures = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows and write them."""
        self.rows += rows
        if self.path and rows:
            report.append(self.path, rows)

    def fail(self, message: str) -> None:
        """Report a failure that the exit status reflects."""
        self.failures += 1
        note(message)


def note(message: str) -> None:
    """Progress and problems go to stderr, results to stdout."""
    print(message, file=sys.stderr, flush=True)


def summary(error: Exception) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``zoo bench``; see `zoo.bench.main`."""
    args = make_parser().parse_args(argv)
    if args.list:
        print("\n".join(suites.list_suites()))
        return 0
    try:
        if args.plot:
            target = args.out / f"{args.plot.stem}.png" if args.out else None
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
            print(report.plot(args.plot, target))
            return 0
        options = make_options(args)
        chosen = [
            suites.load(name, args.quick, options.device.type == "cpu") for name in args.suite or suites.list_suites()
        ]
    except (OSError, ValueError, ImportError) as error:
        note(f"zoo bench: {error}")
        return 2
    return run(chosen, options)


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="zoo bench", description="Time ops and models against their peers in one run."
    )
    add = parser.add_argument
    add("suite", nargs="*", metavar="SUITE", help="shipped suite or YAML file; all shipped suites by default")
    add("--list", action="store_true", help="list the shipped suites and leave")
    add(
        "--out", type=Path, help="folder for CSV files and plots (default: benchmarks/results of a checkout, else here)"
    )
    add("--filter", action="append", default=[], metavar="REGEX",
        help="only what matches 'suite name config dtype mode provider'; repeat to narrow")  # fmt: skip
    add("--dtype", action="append", choices=list(suites.DTYPES), help="instead of the suite's dtypes; may be repeated")
    add("--device", help="cuda, cuda:1 or cpu (default: the GPU if there is one)")
    add("--quick", action="store_true", help="tiny shapes and one sample, to see that all runs; kept only with --out")
    add("--profile", action="store_true", help="print the top kernels of the model suites instead of timing them")
    add("--plot", type=Path, metavar="CSV", help="draw a results file as PNG and leave")
    return parser


def make_options(args: argparse.Namespace) -> Options:
    """Check the arguments against this machine."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {name}")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    try:
        filters = tuple(re.compile(text) for text in args.filter)
    except re.error as error:
        raise ValueError(f"--filter is no regular expression: {error}") from error
    dtypes = tuple(args.dtype) if args.dtype else None
    return Options(device, args.out, filters, dtypes, args.quick, args.profile)


def run(chosen: Sequence[suites.Suite], options: Options) -> int:
    """Run suites one after the other."""
    failures, measured = 0, 0
    for suite in chosen:
        if options.profile and suite.kind != "models":
            note(f"{suite.name}: --profile is for model suites, skipped")
            continue
        saved = options.out or not options.quick
        path = (options.out or suites.results_folder()) / f"{suite.name}.csv" if saved else None
        outcome = Outcome(path)
        RUNNERS[suite.kind](suite, options, outcome)
        failures += outcome.failures
        measured += len(outcome.rows)
        if outcome.rows:
            report.show(suite.name, outcome.rows)
            if path:
                note(f"{len(outcome.rows)} rows appended to {path}")
    if not measured and not failures and not options.profile:
        note("zoo bench: the filters leave nothing to run")
        return 2
    return 1 if failures else 0


def run_ops(suite: suites.Suite, options: Options, outcome: Outcome) -> None:
    """Gate and time every op, shape and dtype of a suite."""
    settings = suite.settings
    options = dataclasses.replace(options, most_samples=settings.get("samples"))
    batch = {"batch": settings["batch"]} if "batch" in settings else {}
    dtypes = options.dtypes or settings.get("dtypes", ["float32"])
    for name, shape, dtype in itertools.product(settings["ops"], settings["shapes"], dtypes):
        run_case(Case(suite, name, {**shape, **batch}, dtype, options), outcome)


def describe(shape: Mapping[str, Any]) -> str:
    """A shape as one string; its name comes first."""
    rest = (f"{key}={value}" for key, value in shape.items() if key != "name")
    return " ".join([str(shape.get("name", "")), *rest]).strip()


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape and dtype."""

    suite: suites.Suite
    name: str
    shape: Mapping[str, Any]
    dtype: str
    options: Options

    @property
    def op(self) -> Op:
        """Its adapter."""
        return OPS[self.name]

    @functools.cached_property
    def config(self) -> str:
        """The shape as a column of a row."""
        return describe({**self.shape, **self.op.facts(self.shape)})

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.name} [{self.config}] {self.dtype}"

    def wanted(self) -> dict[str, list[str]]:
        """The suite's providers that the filters leave, by mode."""
        allowed = self.suite.settings.get("providers")
        names = [name for name in self.op.providers(self.options.device) if allowed is None or name in allowed]
        wants = functools.partial(self.options.wants, self.suite.name, self.name, self.config, self.dtype)
        modes = self.suite.settings.get("modes", suites.OP_MODES)
        return {mode: [name for name in names if wants(mode, name)] for mode in modes}

    def refused(self, wanted: Mapping[str, list[str]]) -> dict[str, str]:
        """Reasons of the correctness gate. What the filters leave out is not checked either: compiling a peer can take
        longer than all timings."""
        names = dict.fromkeys(name for left in wanted.values() for name in left)
        backward = any(BASELINE_MODES[mode] for mode, left in wanted.items() if left)
        dtype = suites.DTYPES[self.dtype]
        return gate.check(self.op, self.shape, dtype, self.options.device, list(names), backward)

    def row(self, mode: str, provider: str) -> dict[str, Any]:
        """Measure one provider."""
        function = self.op.providers(self.options.device)[provider]
        dtype, backward = suites.DTYPES[self.dtype], BASELINE_MODES[mode]
        values = measure_op(self.op, function, self.shape, dtype, backward, self.options)
        names = dict(suite=self.suite.name, name=self.name, provider=provider, config=self.config)
        return report.make_row(self.options.device, **names, dtype=self.dtype, mode=mode, **values)


def run_case(case: Case, outcome: Outcome) -> None:
    """The correctness gate, then all modes and providers."""
    wanted, ours = case.wanted(), case.op.ours
    if not any(wanted.values()):
        return
    # Compiled peers specialise on the shape; stale entries would count against the recompilation limit.
    torch.compiler.reset()
    try:
        refused = case.refused(wanted)
    except Exception as error:  # a crash costs this case, never the rest of the run
        outcome.fail(f"{case.label}: refused, the correctness check did not run: {summary(error)}")
        return
    mine = [provider for provider in refused if provider in ours]
    if mine:
        reasons = "; ".join(f"{provider}: {refused[provider]}" for provider in mine)
        outcome.fail(f"{case.label}: refused, no time reported: {reasons}")
        return
    for provider, reason in refused.items():
        note(f"{case.label}: peer {provider} left out: {reason}")
    for mode, providers in wanted.items():
        rows = []
        for provider in providers:
            if provider in refused:
                continue
            try:
                rows.append(case.row(mode, provider))
            except Exception as error:  # out of memory or resources, a compiler's failure: this provider only
                message = f"{case.label} {mode} {provider}: {summary(error)}"
                outcome.fail(message) if provider in ours else note(message)
        add_speedups(rows, case.suite.settings.get("baseline", case.op.baseline))
        outcome.add(rows)


def make_call(op: Op, function: Provider, inputs: Inputs, backward: bool, grad: torch.Tensor | None = None):
    """Bind inputs to a provider: forward without autograd, or forward and all gradients."""
    if not backward:

        def forward():
            with torch.no_grad():
                return function(inputs)

        return forward
    leaves = [inputs[name] for name in op.leaves if name in inputs]

    def both():
        nonlocal grad
        out = function(inputs)
        if grad is None:
            # Not with the device's own generator, which a capture that failed leaves unusable.
            generator = torch.Generator(out.device).manual_seed(0)
            grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
        # An alternative to the op may use fewer inputs; the gate has checked all gradients of the others.
        return torch.autograd.grad(out, leaves, grad, allow_unused=True)

    return both


def measure_op(
    op: Op, function: Provider, shape: Mapping[str, Any], dtype: torch.dtype, backward: bool, options: Options
) -> dict[str, Any]:
    """Memory, GPU time under graph replay and eager wall time of one provider, as columns of a row."""
    device = options.device

    def build(seed: int = 0):
        return make_call(op, function, op.make_inputs(shape, dtype, device, seed), backward)

    memory = timing.peak_memory(build, device)
    sets = timing.input_sets(input_bytes(op.make_inputs(shape, dtype, device)), device)
    calls = [build(seed) for seed in range(sets)]
    eager = timing.wall_time(calls, device, options.samples).scaled(1e3)
    best, metric = eager, "wall_time"
    if device.type == "cuda":
        try:
            best, metric = timing.graph_time(calls, options.samples).scaled(1e3), "gpu_time"
        except RuntimeError as error:
            note(f"no CUDA graph, wall time reported: {summary(error)}")
    percent = None
    bandwidth = timing.copy_bandwidth(device)
    if metric == "gpu_time" and bandwidth:
        floor = op.bytes(shape, dtype, backward) / bandwidth
        flops = op.flops(shape, backward)
        if flops:
            floor = max(floor, flops / timing.matmul_rate(dtype, device))
        percent = 100 * floor / (best.p50 / 1e3)
    return {
        "metric": metric,
        "unit": "ms",
        **best._asdict(),
        **{f"eager_{key}": value for key, value in eager._asdict().items()},
        "memory_mib": memory,
        "roofline_percent": percent,
    }


def add_speedups(rows: list[dict[str, Any]], baseline: str) -> None:
    """Speed-up against the plain formulation of the same run, graph against graph or wall against wall."""
    plain = next((row for row in rows if row["provider"] == baseline), None)
    for row in rows if plain else ():
        column = "p50" if row["metric"] == plain["metric"] else "eager_p50"
        row["speedup"] = float(f"{plain[column] / row[column]:.4g}")


def jobs(suite: suites.Suite, options: Options) -> Iterator[tuple[models.Job, str]]:
    """The measurements of a model suite with their dtype's name, after the filters."""
    settings = suite.settings
    for model in settings["models"]:
        providers = models.providers_of(model, settings.get("accelerate", False), settings.get("plain", False))
        for dtype in options.dtypes or settings.get("dtypes", ["float32"]):
            for mode in settings.get("modes", suites.MODEL_MODES):
                for compiled, provider in itertools.product(settings.get("compile", ["none"]), providers):
                    job = models.Job(
                        model,
                        settings["batch"],
                        settings["size"],
                        suites.DTYPES[dtype],
                        mode,
                        compiled,
                        settings.get("channels_last", True),
                        options.device,
                        provider,
                    )
                    if options.wants(suite.name, model, job.config, dtype, mode, provider):
                        yield job, dtype


def run_models(suite: suites.Suite, options: Options, outcome: Outcome) -> None:
    """Time or profile every model of a suite."""
    options = dataclasses.replace(options, most_samples=suite.settings.get("samples"))
    try:
        todo = list(jobs(suite, options))
    except ValueError as error:
        outcome.fail(f"{suite.name}: {error}")
        return
    for job, dtype in todo:
        label = f"{job.model} [{job.config}] {dtype} {job.mode} {job.provider}"
        note(label)
        torch.compiler.reset()
        try:
            if options.profile:
                report.show_profile(label, models.profile(job))
                continue
            values = resolution.or_out_of_memory(lambda job=job: measure_model(job, options))
        except Exception as error:  # a compiler's failure, for instance: this job only
            outcome.fail(f"{label}: {summary(error)}")
            continue
        row = report.make_row(
            options.device,
            suite=suite.name,
            name=job.model,
            provider=job.provider,
            config=job.config,
            dtype=dtype,
            mode=job.mode,
            **values,
        )
        outcome.add([row])


def measure_model(job: models.Job, options: Options) -> dict[str, Any]:
    """Throughput and peak memory of one job, as columns of a row.

    Raises:
        RuntimeError: The model gives non-finite values.
    """
    # The pool of a CUDA graph is reserved, not allocated, memory.
    memory = timing.SteadyMemory(job.device, reserved=job.compile not in ("none", "default"))
    step = models.build(job)
    result = step()
    if not bool(torch.isfinite(result).all()):
        raise RuntimeError("refused, no time reported: the result is not finite")
    del result
    on_gpu = job.device.type == "cuda"
    for _ in range(5 if on_gpu else 0):
        step()
    peak = memory.measure(step)
    samples = options.samples // 2 if options.samples > 1 else 1
    time = timing.wall_time([step], job.device, samples, min_seconds=0.2 if on_gpu else 1e-3)
    return {"metric": "throughput", "unit": "img/s", **time.rate(job.batch)._asdict(), "memory_mib": peak}


RUNNERS = {
    "ops": run_ops,
    "models": run_models,
    "sweep": resolution.run,
    "transformers": video_steps.run,
    "unets": unet_steps.run,
    "detectors": detectors.run,
}
