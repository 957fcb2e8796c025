"""What the site shows from outside of docs/: the plots of the front page, README.md, and the tables of models.md."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MODES = ("inference", "train")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the plots under the paths by which README.md links them."""
    from mkdocs.structure.files import File

    for path in sorted(ROOT.glob("benchmarks/results/*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables of models.md."""
    if page.file.src_uri != "models.md":
        return markdown
    return markdown.replace("<!-- models -->", models_table()).replace("<!-- speed -->", speed_table())


def models_table() -> str:
    """Every registered model: size, cost, input, weights."""
    import zoo
    from zoo.cli.list_models import model_cells

    rows = (model_cells(zoo.model_info(name)) for name in zoo.list_models())
    header = ("model", "params (M)", "GMACs", "input", "weights")
    return table(header, ((f"`{name}`", *rest) for name, *rest in rows))


def speed_table() -> str:
    """The last inference and training row of each model in the suite families."""
    with (ROOT / "benchmarks/results/families.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {(row["name"], row["provider"], row["mode"]): row for row in rows}
    gpus = {(row["name"], row["provider"]): row["device"] for row in rows}
    return table(
        ("model", "provider", *MODES, "GPU"),
        (
            (f"`{name}`", provider, *(rate(last.get((name, provider, mode))) for mode in MODES), gpu)
            for (name, provider), gpu in gpus.items()
        ),
    )


def rate(row: dict[str, str] | None) -> str:
    """Images per second, or nothing where it was not measured or did not fit."""
    return f"{float(row['p50']):,.0f}" if row and row["p50"] else ""


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
