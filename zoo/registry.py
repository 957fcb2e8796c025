"""Models that are not timm's: detectors in point clouds, segmenters and detectors of images.

`zoo.create_model`, `list_models`, `model_info`, `zoo convert` and `zoo.hub` ask here first. The modules that register
models are imported at the first question, not with the package.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

MODULES = ("zoo.heads.point_detectors", "zoo.heads.image_models")
EMBEDDED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Entry:
    """A registered model.

    Attributes:
        name: Architecture name.
        cls: Class of the model; its `__init__` takes what `config.json` holds.
        build: Builds the model; keyword arguments replace settings.
        family: Name of its converter in `zoo.convert`.
        task: Hub task name.
        paper: Title and identifiers.
        origin: Where official weights are; None for models without.
    """

    name: str
    cls: type[nn.Module]
    build: Callable[..., nn.Module]
    family: str
    task: str
    paper: str
    origin: str | None = None


_entries: dict[str, Entry] = {}


def register(cls: type[nn.Module], **fields: Any) -> Callable:
    """Decorate the function of a variant; it returns the variant's settings, which become a builder."""

    def decorate(function: Callable[[], dict[str, Any]]) -> Callable[..., nn.Module]:
        name = function.__name__

        def build(**changes: Any) -> nn.Module:
            return cls(**{"architecture": name, **function(), **changes})

        build.__name__, build.__doc__ = name, function.__doc__
        _entries[name] = Entry(name, cls, build, **fields)
        return build

    return decorate


def entries() -> dict[str, Entry]:
    """All registered models by architecture name."""
    for module in MODULES:
        import_module(module)
    return _entries


def find(name: str) -> Entry | None:
    """The entry of `arch` or `arch.tag`, None for a model of timm or an unknown one."""
    return entries().get(name.partition(".")[0])


def weights(arch: str) -> dict[str, Path]:
    """Folders of embedded weights by `arch.tag`."""
    folders = sorted(EMBEDDED.glob(f"{arch}.*"))
    return {folder.name: folder for folder in folders if (folder / "config.json").is_file()}


def settings(cls: type[nn.Module], config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model class among the entries of a `config.json`."""
    return {key: value for key, value in config.items() if key in inspect.signature(cls).parameters}


def load(folder: str | Path, pretrained: bool = True, **changes: Any) -> nn.Module:
    """Build the model of a folder in the hub layout, and load its weights.

    Args:
        folder: `config.json` and `model.safetensors`.
        pretrained: Load the weights.
        **changes: Settings to replace.

    Raises:
        ValueError: The weights do not fit, as after a change of classes.
    """
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    cls = entries()[config["architecture"]].cls
    model = cls(**{**settings(cls, config), **changes})
    if pretrained:
        try:
            model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"The weights in '{folder}' do not fit the model: {error}") from error
    return model


def is_registered(model: nn.Module) -> bool:
    """Whether a model is of a registered class, compiled or not."""
    return any(type(model) is entry.cls for entry in entries().values())


_CARD = """
# {name}

{description}

## Model

| | |
| --- | --- |
| architecture | `{architecture}` |
| parameters | {params} |
| classes | {classes} |
| columns of a point | {columns} |
| range, m | {range} |

## Use

```python
import zoo

detector = zoo.create_model("{address}", pretrained=True).eval()
boxes, scores, labels = detector([points])[0]  # points: float32 [N, {width}]
```
"""


def describe(
    model: nn.Module, folder: Path, card: dict[str, Any] | str, metrics: dict[str, float], checksums: dict[str, str]
) -> None:
    """Write `config.json` and the model card of a registered model.

    Args:
        model: The model.
        folder: Where to.
        card: Fields as of `zoo.hub.render_card`, or the whole text.
        metrics: Measured results by name.
        checksums: SHA-256 of the other files, by name.
    """
    fields = card if isinstance(card, dict) else {}
    config = {**model.config, "metrics": metrics, "sha256": checksums}
    if fields.get("license"):
        config["license"] = fields["license"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    text = card if isinstance(card, str) else _render_card(model, fields, metrics)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _render_card(model: nn.Module, card: dict[str, Any], metrics: dict[str, float]) -> str:
    from huggingface_hub import ModelCardData

    if hasattr(model, "render_card"):
        return model.render_card(card, metrics)
    entry = entries()[model.config["architecture"]]
    front = ModelCardData(
        license=card.get("license"),
        library_name="attention-zoo",
        tags=["lidar", "point-cloud", entry.task, *card.get("tags", [])],
        datasets=card.get("datasets"),
    )
    body = _CARD.format(
        name=card.get("name") or entry.name,
        description=card.get("description") or f"Weights of `{entry.name}`.",
        architecture=entry.name,
        params=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        classes=", ".join(model.classes),
        columns=", ".join(model.point_features),
        range=", ".join(f"{value:g}" for value in model.point_range),
        address=card.get("address", "local-dir:FOLDER"),
        width=len(model.point_features),
    )
    return join_card(front, body, card, metrics)


def join_card(front: Any, body: str, card: dict[str, Any], metrics: dict[str, float]) -> str:
    """Text of a model card: front matter, body, results, and what else the fields hold.

    Args:
        front: `huggingface_hub.ModelCardData`.
        body: Title, model and use.
        card: Fields as of `zoo.hub.render_card`.
        metrics: Measured results by name.
    """
    parts = [f"---\n{front.to_yaml()}\n---", body.strip()]
    if metrics or card.get("results"):
        rows = [f"| {key} | {value:g} |" for key, value in metrics.items()]
        table = "\n".join(["| metric | value |", "| --- | --- |", *rows]) if rows else ""
        parts.append("\n\n".join(filter(None, ["## Results", card.get("results"), table])))
    parts += [f"## {key.capitalize()}\n\n{card[key]}" for key in ("details", "citation") if card.get(key)]
    return "\n\n".join(parts) + "\n"
