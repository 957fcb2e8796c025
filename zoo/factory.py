"""Create, list and describe models.

Image models live in timm's registry, so everything here is a thin layer over timm: it names what is wrong when a name,
a tag or a weights file does not exist, and never hands out a random model where pretrained weights were asked for.
Detectors in point clouds are kept by `zoo.registry`.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_name, get_pretrained_cfg, is_model, model_entrypoint, parse_model_name
from torch import nn

from zoo import costs, hub, registry
from zoo.accelerate import accelerate, can_accelerate

IMAGE_TASK = "image-classification"
# Any of these in `pretrained_cfg` or its overlay says where the weights are.
_SOURCES = ("url", "file", "hf_hub_id", "state_dict")


@dataclass
class WeightsInfo:
    """One set of pretrained weights.

    Attributes:
        name: What `create_model` takes, `arch.tag`.
        source: `embedded` (inside this package), `hub`, `url` or `file`.
        num_classes: Number of classes of the head.
        metrics: Measured results, for instance `{"top1": 91.2}`, in percent where they are rates.
        license: License of the weights.
    """

    name: str
    source: str
    num_classes: int
    metrics: dict[str, float] = field(default_factory=dict)
    license: str | None = None


@dataclass
class ModelInfo:
    """What is known about a model without loading weights.

    Attributes:
        name: Architecture name.
        family: Family, the name of its module.
        task: Hub task name.
        params: Number of parameters.
        gmacs: Multiply-accumulates of one forward pass at `input_size`, in billions; of a detector in point clouds
            those on its map, as those before depend on the points.
        input_size: Default input, (channels, height, width); of a detector in point clouds the columns of a point and
            the cells of its grid along y and x.
        weights: Pretrained weights that `create_model` can load.
        license: License of the default weights, or of the code they came from.
        paper: Paper name and identifiers.
        get_weights: How to obtain weights where none are at hand.
    """

    name: str
    family: str
    task: str
    params: int
    gmacs: float
    input_size: tuple[int, ...]
    weights: list[WeightsInfo] = field(default_factory=list)
    license: str | None = None
    paper: str | None = None
    get_weights: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready data."""
        return asdict(self)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model by name.

    timm's halo attention models (`halonet50ts.a1h_in1k` with weights from the hub, `halonet26t`, `sehalonet33ts`,
    `eca_halonext26ts`, `haloregnetz_b`, `halo2botnet50ts_256`, `lamhalobotnet50ts_256`, `halonet_h1`) come out of
    `zoo.accelerate`: on this package's op, equal to rounding, the halo layers for maps of any size. `zoo.restore` gives
    timm's layers back.

    Args:
        name: `arch`, `arch.tag`, `hf-hub:org/name[@revision]` or `local-dir:path`. timm's own names work too.
        pretrained: Load pretrained weights. Never yields a random model: without weights this raises.
        **kwargs: Passed to `timm.create_model` (`num_classes`, `in_chans`, `drop_path_rate`, `features_only`, ...), or
            settings of a detector (`classes`, `point_range`, ...) to replace.

    Returns:
        The model, in training mode as timm leaves it.

    Raises:
        ValueError: Unknown name or tag, or a malformed name.
        zoo.hub.HubError: The weights do not exist, cannot be fetched or cannot be read.
    """
    source, location = parse_model_name(name)
    if source is None:
        config = {"architecture": name.partition(".")[0]}
    elif source == "local-dir":
        config = hub.read_config(location)
    else:
        config = hub.fetch_config(location, kwargs.get("cache_dir"))
    detector = registry.find(config["architecture"])
    if detector is not None:
        return _create_detector(detector, name, pretrained, kwargs)
    if source is None:
        _check_name(name)
        if pretrained:
            _check_weights(name, kwargs)
    else:
        _check_arch(config, location)
        if source == "local-dir" and pretrained:
            _check_local(location)
    with hub.explain_errors(name):
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    return accelerate(model) if can_accelerate(model) else model


def list_models(
    filter: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    include_tags: bool | None = None,
    task: str | None = None,
) -> list[str]:
    """List the models of this package, naturally sorted.

    Args:
        filter: Wildcard filter(s), for instance `biformer*`.
        pretrained: Only models with weights; the names then carry their tags.
        exclude_filters: Wildcard filter(s) of names to leave out.
        include_tags: Add tags to the names. None means the value of `pretrained`.
        task: Only models of this task: `image-classification`, `image-segmentation`, `object-detection` or
            `object-detection-3d`.
    """
    names = timm.list_models(filter, pretrained=pretrained, exclude_filters=exclude_filters, include_tags=include_tags)
    names = [name for name in names if model_entrypoint(name).__module__.startswith("zoo.")]
    if task not in (None, IMAGE_TASK):
        names = []
    tagged = pretrained if include_tags is None else include_tags
    for arch, entry in registry.entries().items():
        if task in (None, entry.task):
            own = list(registry.weights(arch))
            # Tags name weights: a model without any is listed by its bare name, as timm does.
            listed = own if pretrained or (tagged and own) else [arch]
            if pretrained and not tagged:
                listed = [arch] if own else []
            names += [name for name in listed if _matches(name, filter, exclude_filters)]
    return sorted(names, key=_natural_key)


def model_info(name: str) -> ModelInfo:
    """Describe a registered model; builds it on the meta device, so nothing is allocated or downloaded.

    Args:
        name: `arch` or `arch.tag`; timm's own names work too.

    Raises:
        ValueError: Unknown name or tag.
    """
    _check_name(name)
    arch = get_arch_name(name)
    if registry.find(name) is not None:
        return _detector_info(name)
    cfg = get_pretrained_cfg(name) or get_pretrained_cfg(arch)
    input_size = tuple(cfg.input_size) if cfg else (3, 224, 224)
    params, macs = costs.of(name, input_size)
    return ModelInfo(
        name=name,
        family=_family(arch),
        task=IMAGE_TASK,
        params=params,
        gmacs=round(macs / 1e9, 3),
        input_size=input_size,
        weights=[_weights_info(full) for full in _names_with_tag(arch) if name in (arch, full) and _has_weights(full)],
        license=cfg.license if cfg else None,
        paper=_paper(cfg),
        get_weights=_origin(arch),
    )


def _natural_key(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _matches(name: str, filter: str | Iterable[str], exclude_filters: str | Iterable[str]) -> bool:
    """Whether wildcard filters take a name."""
    include, exclude = ([f] if isinstance(f, str) else list(f) for f in (filter, exclude_filters))
    wanted = not any(include) or any(fnmatch(name, f) or fnmatch(name, f"{f}.*") for f in include if f)
    return wanted and not any(fnmatch(name, f) for f in exclude if f)


def _create_detector(entry: registry.Entry, name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    source, location = parse_model_name(name)
    cache_dir = kwargs.pop("cache_dir", None)
    if source == "local-dir":
        if pretrained:
            hub.check_folder(location)
        return registry.load(location, pretrained, **kwargs)
    if source is not None:
        return registry.load(hub.fetch_model(location, cache_dir, pretrained), pretrained, **kwargs)
    _check_name(name)
    if not pretrained:
        return entry.build(**kwargs)
    folders = registry.weights(entry.name)
    if not folders:
        hint = f" {_detector_origin(entry)}" if entry.origin else ""
        raise hub.HubError(f"No pretrained weights exist for '{name}'.{hint} Use pretrained=False for random weights.")
    folder = folders.get(name) or next(iter(folders.values()))
    hub.check_folder(folder)
    return registry.load(folder, **kwargs)


def _detector_origin(entry: registry.Entry) -> str | None:
    if entry.origin is None:
        return None
    command = f"`zoo convert {entry.family} FILE --model {entry.name} --out DIR`"
    return f"Official weights: {entry.origin}; convert them with {command} and load 'local-dir:DIR'."


def _detector_info(name: str) -> ModelInfo:
    entry = registry.find(name)
    input_size = costs.detector_input(entry.name)
    params, macs = costs.of(entry.name, input_size)
    weights = []
    for full, folder in registry.weights(entry.name).items():
        config = hub.read_config(folder)
        found = WeightsInfo(full, "embedded", len(config["classes"]), config.get("metrics", {}), config.get("license"))
        weights += [found] if name in (entry.name, full) else []
    return ModelInfo(
        name=name,
        family=entry.family,
        task=entry.task,
        params=params,
        gmacs=round(macs / 1e9, 3),
        input_size=input_size,
        weights=weights,
        license=weights[0].license if weights else None,
        paper=entry.paper,
        get_weights=_detector_origin(entry),
    )


def _check_name(name: str) -> None:
    arch, _, tag = name.partition(".")
    if not is_model(arch) and registry.find(arch) is None:
        known = timm.list_models()
        close = difflib.get_close_matches(arch, list_models(), n=3) or difflib.get_close_matches(arch, known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"Unknown model '{arch}'.{hint} `zoo list` shows all models.")
    names = list(registry.weights(arch)) if registry.find(arch) else _names_with_tag(arch)
    tags = [full.partition(".")[2] for full in names]
    if tag and tag not in tags:
        valid = [t for t in tags if t]
        hint = f"Valid tags: {', '.join(valid)}." if valid else f"'{arch}' has no tags."
        raise ValueError(f"Unknown tag '{tag}' of model '{arch}'. {hint}")


def _check_arch(config: dict[str, Any], place: str) -> None:
    if not is_model(config["architecture"]):
        raise ValueError(f"'{place}' holds a '{config['architecture']}', which is no model of this package or of timm.")


def _check_local(folder: str) -> None:
    # timm also reads other kinds of weights file, without running code from them; those are left to it.
    others = any(path.suffix in (".pth", ".bin") for path in Path(folder).iterdir())
    if (Path(folder) / hub.WEIGHTS).exists() or not others:
        hub.check_folder(folder)


def _check_weights(name: str, kwargs: dict[str, Any]) -> None:
    given = [kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")]
    if isinstance(given[0], str):
        name = f"{get_arch_name(name)}.{given[0]}"
        _check_name(name)
    for cfg in given:
        if cfg and not isinstance(cfg, str):
            # A user who says where the weights are is not second-guessed here.
            cfg = cfg if isinstance(cfg, dict) else asdict(cfg)
            if any(cfg.get(key) for key in _SOURCES):
                return
    if _has_weights(name):
        return
    arch = get_arch_name(name)
    available = [full for full in _names_with_tag(arch) if _has_weights(full)]
    if available:
        hint = f" Weights exist under {', '.join(available)}."
    else:
        hint = f" {_origin(arch)}" if _origin(arch) else ""
    raise hub.HubError(f"No pretrained weights exist for '{name}'.{hint} Use pretrained=False for random weights.")


def _names_with_tag(arch: str) -> list[str]:
    return timm.list_models([arch, f"{arch}.*"], include_tags=True)


def _has_weights(name: str) -> bool:
    cfg = get_pretrained_cfg(name)
    return bool(cfg and cfg.has_weights)


def _family(arch: str) -> str:
    return model_entrypoint(arch).__module__.rpartition(".")[2]


def _weights_info(name: str) -> WeightsInfo:
    cfg = get_pretrained_cfg(name)
    metrics = {}
    if cfg.file and hub.is_embedded(cfg.file):
        source = "embedded"
        metrics = json.loads((Path(cfg.file).parent / "config.json").read_text(encoding="utf-8")).get("metrics", {})
    else:
        source = "file" if cfg.file else "hub" if cfg.hf_hub_id else "url"
    return WeightsInfo(name, source, cfg.num_classes, metrics, cfg.license)


def _paper(cfg: Any) -> str | None:
    if cfg is None or not (cfg.paper_name or cfg.paper_ids):
        return None
    ids = [cfg.paper_ids] if isinstance(cfg.paper_ids, str) else list(cfg.paper_ids or ())
    return " ".join(filter(None, [cfg.paper_name, f"({', '.join(ids)})" if ids else None]))


def _origin(arch: str) -> str | None:
    """Say where official weights come from and how to convert them; None for models without official weights."""
    module = model_entrypoint(arch).__module__
    cfg = get_pretrained_cfg(arch)
    if not module.startswith("zoo.") or not (cfg and cfg.origin_url):
        return None
    command = f"`zoo convert {_family(arch)} FILE --model {arch} --out DIR`"
    return f"Official weights: {cfg.origin_url}; convert them with {command} and load 'local-dir:DIR'."
