"""Latency of whole detectors in point clouds, with random weights, and of their stages.

Providers: ``runtime`` is `zoo.heads.point_runtime.PointRuntime` as it comes, ``compiled`` the same with its
convolutions through `torch.compile`, ``module`` the detector itself in float32. Modes: ``whole`` is wall time from
points on the device to boxes; the stages of ``runtime`` are GPU time under graph replay, or wall time where that is not
possible. On a GPU rows such as ``backbone/attention`` split a stage by the kind of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.bench import models, report, suites, timing

if TYPE_CHECKING:
    from zoo.bench.runner import Options, Outcome
    from zoo.heads.point_base import PointDetector

PROVIDERS = ("runtime", "compiled", "module")
SIMULATED = "simulated"
# Kinds of kernels, before the general ones: the first match wins.
KERNEL_GROUPS = (
    ("attention", r"flat_window_(forward|d)|scatter_linear|pillar_(attention|max)"),
    ("sparse convolution", r"sparse_conv|sparse_depthwise"),
    ("suppression", r"_(pairs|aligned|conflict|greedy)_kernel"),
    ("voxels", r"_(point_features|segment_max|finish)_kernel"),
    (
        "sorting and indices",
        r"sort|radix|_(key|first|table|number|site|pillar|tap_bits|tiles|neighbour)_kernel",
    ),
    *models.KERNEL_GROUPS,
)


def read_scan(scan: str, detector: PointDetector, device: torch.device) -> Tensor:
    """A scan [N, F] with the detector's columns and its ground at height 0: simulated, or from a file."""
    if scan == SIMULATED:
        from zoo.train.lidar.simulator import LidarSimulator

        return LidarSimulator().frames([0])[0].points.to(device)
    from zoo.train.lidar.formats import ground_level, model_columns, read_points

    points = model_columns(read_points(scan), detector.point_features)
    points[:, 2] -= ground_level(points)
    return torch.from_numpy(points).to(device)


def callables(detector: PointDetector, points: list[Tensor], providers: list[str]) -> dict[tuple[str, str], Callable]:
    """What is timed, by provider and mode."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for provider in providers:
        if provider == "module":
            calls[provider, "whole"] = lambda: detector(points)
            continue
        runtime = detector.accelerate(compile=provider == "compiled")
        calls[provider, "whole"] = lambda runtime=runtime: runtime(points)
        if provider == "runtime":
            calls.update({(provider, mode): stage for mode, stage in runtime.stages(points).items()})
    return calls


def measure(call: Callable[[], Any], whole: bool, device: torch.device, samples: int) -> dict[str, Any]:
    """Columns of a row."""
    step = torch.no_grad()(call)
    wall = timing.wall_time([step], device, samples).scaled(1e3)
    row = {"metric": "wall_time", **wall._asdict(), **{f"eager_{key}": value for key, value in wall._asdict().items()}}
    if whole or device.type != "cuda":
        return row
    try:
        return {**row, "metric": "gpu_time", **timing.graph_time([step], samples).scaled(1e3)._asdict()}
    except RuntimeError:
        return row


def measure_all(
    calls: Mapping[tuple[str, str], Callable[[], Any]], options: Options
) -> dict[tuple[str, str], dict[str, Any]]:
    """Columns of the rows of all calls and, on a GPU, of the kinds of kernels of each stage."""
    rows = {}
    for (provider, mode), call in calls.items():
        rows[provider, mode] = measure(call, mode == "whole", options.device, options.samples)
        if mode != "whole" and options.device.type == "cuda":
            kinds = models.profile_step(torch.no_grad()(call), options.device, groups=KERNEL_GROUPS).groups
            rows |= {(provider, f"{mode}/{kind}"): {"metric": "kernel_time", "p50": time} for kind, time in kinds}
    return rows


def run(suite: suites.Suite, options: Options, outcome: Outcome) -> None:
    """Time every detector, scan and batch of a suite."""
    from zoo import create_model

    settings = suite.settings
    for name in settings["detectors"]:
        torch.manual_seed(0)
        detector = create_model(name).eval().to(options.device)
        for scan in settings.get("scans", [SIMULATED]):
            for batch in settings.get("batches", [1]):
                _run_scan(suite, detector, name, {"scan": scan, "batch": batch}, options, outcome)


def _run_scan(
    suite: suites.Suite, detector: PointDetector, name: str, case: Mapping[str, Any], options: Options, outcome: Outcome
) -> None:
    label = f"scan={Path(case['scan']).stem} batch={case['batch']}"
    dtype = "float16" if options.device.type == "cuda" else "float32"
    providers = [
        p
        for p in suite.settings.get("providers", PROVIDERS)
        if options.wants(suite.name, name, label, "float32" if p == "module" else dtype, p)
    ]
    if not providers:
        return
    try:
        points = read_scan(case["scan"], detector, options.device)
        config = f"{label} points={len(points)}"
        calls = callables(detector, [points] * case["batch"], providers)
        rows = [
            report.make_row(
                options.device,
                suite=suite.name,
                name=name,
                provider=provider,
                config=config,
                dtype="float32" if provider == "module" else dtype,
                mode=mode,
                unit="ms",
                **values,
            )
            for (provider, mode), values in measure_all(calls, options).items()
        ]
    except Exception as error:  # this scan only
        outcome.fail(f"{name} [{label}]: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    outcome.add(rows)
