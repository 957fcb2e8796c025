"""Time and memory of models over the size of the image: square images, one batch size, from half to several megapixels.

On a GPU the time is that of the GPU under CUDA-graph replay; the columns `eager_*` have wall time with all launches.

A suite has ``sweep`` (models), ``sizes`` (pixels), and optionally ``batch``, ``dtypes``, ``modes``, ``samples`` and
``plain`` (run our models on the references of their ops too). Models of fixed input size are built for each size. A
size that does not fit into memory makes a row of the metric ``out_of_memory`` and nothing else; larger sizes of the
same model and mode are not tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.bench import models, report, suites, timing

if TYPE_CHECKING:
    from zoo.bench.runner import Options, Outcome

MODES = ("inference", "forward+backward")
METRIC = "step_time"
OUT_OF_MEMORY = "out_of_memory"
# A failed allocation by cuDNN, cuBLAS or the driver does not raise torch.OutOfMemoryError.
ALLOCATION_FAILURES = ("out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in ALLOCATION_FAILURES)


def config_of(size: int, batch: int) -> str:
    """Settings of a row as one string."""
    return f"size={size} batch={batch}"


def size_of(row: dict[str, Any]) -> int:
    """Pixels along a side, from a row's settings."""
    return int(dict(part.split("=") for part in row["config"].split())["size"])


def curves(suite: suites.Suite, options: Options) -> Iterator[tuple[str, list[models.Job]]]:
    """Jobs of growing size that share everything else, with their dtype's name, after the filters.

    Raises:
        ValueError: A model is unknown.
    """
    settings = suite.settings
    for model in settings["sweep"]:
        for provider in models.providers_of(model, False, settings.get("plain", False)):
            for dtype in options.dtypes or settings.get("dtypes", ["float32"]):
                for mode in settings.get("modes", MODES):
                    batch = settings.get("batch", 1)
                    yield (
                        dtype,
                        [
                            models.Job(
                                model, batch, size, suites.DTYPES[dtype], mode, "none", True, options.device, provider
                            )
                            for size in sorted(settings["sizes"])
                            if options.wants(suite.name, model, config_of(size, batch), dtype, mode, provider)
                        ],
                    )


def run(suite: suites.Suite, options: Options, outcome: Outcome) -> None:
    """Time every model of a sweep at its sizes."""
    options = dataclasses.replace(options, most_samples=suite.settings.get("samples"))
    try:
        todo = list(curves(suite, options))
    except ValueError as error:
        outcome.fail(f"{suite.name}: {error}")
        return
    for dtype, jobs in todo:
        for job in jobs:
            config = config_of(job.size, job.batch)
            try:
                values = or_out_of_memory(lambda job=job: measure(job, options.samples))
            except Exception as error:  # this job only
                label = f"{job.model} [{config}] {dtype} {job.mode} {job.provider}"
                outcome.fail(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            columns = dict(suite=suite.name, name=job.model, provider=job.provider, config=config)
            outcome.add([report.make_row(options.device, **columns, dtype=dtype, mode=job.mode, **values)])
            if values["metric"] == OUT_OF_MEMORY:
                break


def or_out_of_memory(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Columns that a measurement returns, or those of one that does not fit into memory; other errors pass."""
    try:
        return measure()
    except RuntimeError as error:
        # Tensors of the frames that the error passed through are let go when it is handled.
        if not is_out_of_memory(error):
            raise
    return {"metric": OUT_OF_MEMORY}


def measure(job: models.Job, samples: int) -> dict[str, Any]:
    """Time of a step and peak memory with the model, as columns of a row.

    Raises:
        RuntimeError: The result is not finite.
    """
    memory = timing.SteadyMemory(job.device)
    step = models.build(job)
    # The first pass compiles kernels.
    if not bool(torch.isfinite(step()).all()):
        raise RuntimeError("refused, no time reported: the result is not finite")
    peak = memory.measure(step)
    wall = timing.wall_time([step], job.device, samples, min_seconds=5e-2 if job.device.type == "cuda" else 1e-3)
    best = timing.graph_time([step], samples) if job.device.type == "cuda" else wall
    eager = {f"eager_{key}": value for key, value in wall.scaled(1e3)._asdict().items()}
    return {"metric": METRIC, "unit": "ms", **best.scaled(1e3)._asdict(), **eager, "memory_mib": peak}


def plot(rows: list[dict[str, str]], target: Path) -> Path:
    """Draw time and memory over the size, one row of panels a mode; a cross marks the size that did not fit.

    Args:
        rows: Rows of a sweep, each measurement once.
        target: Image to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    panels = list(dict.fromkeys((row["mode"], row["dtype"], row["device"]) for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 2, squeeze=False)
    subjects = list(dict.fromkeys((row["name"], row["provider"]) for row in rows))
    for pair, panel in zip(axes, panels, strict=True):
        chosen = [row for row in rows if (row["mode"], row["dtype"], row["device"]) == panel]
        for axis, (column, factor, label) in zip(
            pair, (("p50", 1, "time of a step (ms)"), ("memory_mib", 2**-10, "peak memory (GiB)")), strict=True
        ):
            for index, subject in enumerate(subjects):
                curve = sorted((row for row in chosen if (row["name"], row["provider"]) == subject), key=size_of)
                draw_curve(axis, curve, column, factor, f"C{index % 10}")
            axis.set_xlabel("pixels along a side")
            axis.set_ylabel(label)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
            axis.tick_params(axis="y", which="both", labelsize=8)
            axis.set_title(" | ".join(panel), fontsize=9)
        pair[0].legend(fontsize=7)
    figure.savefig(target, dpi=100)
    return target


def draw_curve(axis: Any, curve: list[dict[str, str]], column: str, factor: float, color: str) -> None:
    """One model in one panel; plain formulations are dashed."""
    points = [(size_of(row), float(row[column]) * factor) for row in curve if row[column]]
    if not points:
        return
    style = "--" if curve[0]["provider"] == "plain" else "-"
    label = f"{curve[0]['name']} {curve[0]['provider']}"
    axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=color, label=label)
    lost = [size_of(row) for row in curve if row["metric"] == OUT_OF_MEMORY]
    if lost:
        axis.plot([points[-1][0], lost[0]], [points[-1][1]] * 2, ":", color=color)
        axis.plot(lost[0], points[-1][1], "x", color=color)
