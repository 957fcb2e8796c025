"""Where results go: CSV rows, a table on the terminal, a plot."""

from __future__ import annotations

import csv
import datetime
import functools
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

COLUMNS = (
    "suite", "name", "provider", "config", "dtype", "mode", "metric", "unit", "p20", "p50", "p80",
    "eager_p20", "eager_p50", "eager_p80", "memory_mib", "roofline_percent", "speedup",
    "device", "torch", "triton", "zoo", "commit", "timestamp",
)  # fmt: skip
KEY = ("suite", "name", "provider", "config", "dtype", "mode", "device")


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """Device, versions and commit of this run."""
    import zoo

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "zoo": zoo.__version__,
        "commit": commit(Path(zoo.__file__).resolve().parent.parent),
    }


def commit(root: Path) -> str:
    """Short hash of a checkout, marked if there are changes; empty outside git."""
    if not (root / ".git").exists():
        return ""

    def git(*args: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        short = git("rev-parse", "--short", "HEAD")
        return short and short + ("-dirty" if git("status", "--porcelain", "--", "zoo") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def make_row(device: torch.device, **values: Any) -> dict[str, Any]:
    """One result with the run's environment and the time; numbers are rounded to five significant digits."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    row = {**dict.fromkeys(COLUMNS, ""), **values, **environment(device), "timestamp": now}
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.5g}")
        elif value is None:
            row[name] = ""
    return row


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with a header if the file is new.

    Raises:
        ValueError: The file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; choose another --out folder")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("name", "config", "dtype", "mode"):
        table.add_column(column, overflow="fold")
    table.add_column("provider", no_wrap=True)
    for column in ("p50", "p20-p80", "unit", "eager", "MiB", "roofline", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        config = short(row["config"])
        table.add_row(
            row["name"],
            config,
            *(row[key] for key in ("dtype", "mode", "provider")),
            number(row["p50"]),
            f"{number(row['p20'])}-{number(row['p80'])}",
            row["unit"],
            number(row["eager_p50"]),
            number(row["memory_mib"]),
            f"{number(row['roofline_percent'])} %" if row["roofline_percent"] != "" else "",
            f"{row['speedup']:.2f}x" if row["speedup"] != "" else "",
        )
    console = Console()
    # A pipe has no width of its own; wrapping would tear the rows apart there.
    Console(width=max(console.width, 160)).print(table)


def short(config: str) -> str:
    """A named shape is told by its name, every other configuration by all its settings."""
    first = config.split(" ")[0]
    return config if "=" in first else first


def number(value: Any) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if value == "":
        return ""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show_profile(title: str, profile: Any, top: int = 20) -> None:
    """Print a profile: shares of the groups, then the largest kernels."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    total = sum(time for _, time in profile.groups) or 1.0
    groups = Table(title=escape(f"{title}: {total:.3g} ms of kernels a step"))
    kernels = Table(title=f"top {top}")
    for table, columns in ((groups, ("group", "ms", "share")), (kernels, ("kernel", "group", "ms", "share", "calls"))):
        for column in columns:
            table.add_column(column, justify="left" if column in ("group", "kernel") else "right")
    for group, time in profile.groups:
        groups.add_row(group, f"{time:.3f}", f"{time / total:.1%}")
    for name, group, time, calls in profile.kernels[:top]:
        kernels.add_row(escape(name[:90]), group, f"{time:.3f}", f"{time / total:.1%}", f"{calls:g}")
    console = Console(width=max(Console().width, 140))
    console.print(groups, kernels)


def plot(source: Path, target: Path | None = None) -> Path:
    """Draw a results file as bars, one panel per op or model suite, dtype, mode and device.

    Where a measurement was repeated the last row counts.

    Args:
        source: CSV file written by `append`.
        target: Image to write; by default the CSV's name with the suffix ``.png``.

    Raises:
        ValueError: There is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from zoo.bench import resolution

    with source.open(newline="") as file:
        latest = {tuple(row.get(key, "") for key in KEY): row for row in csv.DictReader(file)}
    rows = [row for row in latest.values() if row.get("p50")]
    if not rows:
        raise ValueError(f"{source} holds no results")
    target = target or source.with_suffix(".png")
    if all(row["metric"] == resolution.METRIC for row in rows):
        return resolution.plot(list(latest.values()), target)
    panels: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        # Models of a suite share a panel, so that they can be compared.
        subject = row["suite"] if row["unit"] == "img/s" else row["name"]
        panels.setdefault((subject, row["dtype"], row["mode"], row["device"]), []).append(row)
    figure = Figure(figsize=(11, sum(1.2 + 0.32 * len(panel) for panel in panels.values())), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1.2 + 0.32 * len(panel) for panel in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    subjects = list(dict.fromkeys((row["name"], row["config"]) for row in rows))
    for panel in panels.values():
        # Peers stand together, also where they were measured at different times.
        panel.sort(key=lambda row: (subjects.index((row["name"], row["config"])), providers.index(row["provider"])))
    for axis, (titles, panel) in zip(axes, panels.items(), strict=True):
        draw_panel(axis, " | ".join(titles), panel, providers)
    figure.savefig(target, dpi=120)
    return target


def draw_panel(axis: Any, title: str, rows: list[dict[str, str]], providers: list[str]) -> None:
    """Horizontal bars of the medians with 20 to 80 percent whiskers; providers keep their colour in all panels."""
    medians = [float(row["p50"]) for row in rows]
    spread = [
        # A row may hold a median alone.
        [median - float(row["p20"] or median) for median, row in zip(medians, rows, strict=True)],
        [float(row["p80"] or median) - median for median, row in zip(medians, rows, strict=True)],
    ]
    subjects = ("name", "provider") if rows[0]["unit"] == "img/s" else ("provider",)
    metric = rows[0]["metric"]
    labels = ["  ".join([short(row["config"]), *(row[key] for key in subjects)]) for row in rows]
    # What cannot be captured has wall times among the GPU times of the others.
    notes = [f" ({row['metric'].replace('_', ' ')})" if row["metric"] != metric else "" for row in rows]
    colors = [f"C{providers.index(row['provider']) % 10}" for row in rows]
    bars = axis.barh(
        range(len(rows)), medians, xerr=[[max(value, 0) for value in side] for side in spread], color=colors
    )
    values = [number(median) + note for median, note in zip(medians, notes, strict=True)]
    axis.bar_label(bars, values, padding=4, fontsize=8)
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(title, fontsize=10)
    unit = rows[0]["unit"]
    axis.set_xlabel(f"{metric.replace('_', ' ')} ({unit}), {'higher' if unit == 'img/s' else 'lower'} is better")
