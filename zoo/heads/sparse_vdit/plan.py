"""The plan file: which attention pattern each head of a video diffusion transformer uses at which noise level.

A plan is one JSON document without tensors. It travels beside a checkpoint and never changes it.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.hub import HubError, explain_errors
from zoo.kernels.tile_sparse.patterns import DEFAULT_TILE, Layout, Pattern, density, pattern_from_dict

FORMAT = "zoo.sparse_vdit.plan"
VERSION = 1
FILE = "plan.json"
TEXT_POSITIONS = ("first", "last", "none")
GRANULARITIES = ("block", "element")
# Entries of the assignment are bytes.
MAX_PATTERNS = 256
FULL = {"pattern": "full"}

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """A frozen assignment of patterns to heads.

    Attributes:
        model: `class` (name of the transformer class), `layers` (module names of the planned attentions), `heads` and
            `head_dim`.
        text_position: Where text tokens stand in the model's joint sequence: `first`, `last` or `none`.
        tile: Query and key tokens of a tile.
        granularity: `block`: a tile with one allowed pair is attended as a whole; `element`: exact masks.
        bins: Rising edges of the noise levels, from 0 (clean) to 1 (pure noise): bin b covers
            `bins[b] <= sigma < bins[b + 1]`, the last one also sigma = 1.
        patterns: Table of patterns, each a mapping with the key `pattern` and the fields of that pattern.
        assign: `[bins][layers][heads]`, indices into `patterns`.
        calibrated: What the search ran on: `grid` (frames, height, width in tokens), `text_length`, `steps` and
            `guidance`; each may be missing.
        search: Record of the search, for the reader only.

    Raises:
        ValueError: A field is malformed; the message names it.
    """

    model: dict[str, Any]
    text_position: str
    tile: tuple[int, int]
    granularity: str
    bins: tuple[float, ...]
    patterns: tuple[dict[str, Any], ...]
    assign: tuple[tuple[tuple[int, ...], ...], ...]
    calibrated: dict[str, Any] = dataclasses.field(default_factory=dict)
    search: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tile", "bins", "patterns"):
            value = getattr(self, name)
            _check(isinstance(value, (list, tuple)), name, "a list", value)
            object.__setattr__(self, name, tuple(value))
        _check(isinstance(self.assign, (list, tuple)), "assign", "a list [bins][layers][heads]", self.assign)
        _check_model(self.model)
        _check(self.text_position in TEXT_POSITIONS, "text_position", f"one of {TEXT_POSITIONS}", self.text_position)
        _check(self.granularity in GRANULARITIES, "granularity", f"one of {GRANULARITIES}", self.granularity)
        _check(
            len(self.tile) == 2 and all(_is_int(n) and n > 0 for n in self.tile), "tile", "two positive integers",
            self.tile,
        )  # fmt: skip
        _check_bins(self.bins)
        self._check_patterns()
        object.__setattr__(self, "assign", self._checked_assignment())
        _check_calibrated(self.calibrated)
        _check(isinstance(self.search, dict), "search", "an object", self.search)

    def _check_patterns(self) -> None:
        _check(0 < len(self.patterns) <= MAX_PATTERNS, "patterns", f"1 to {MAX_PATTERNS} patterns", len(self.patterns))
        for i, fields in enumerate(self.patterns):
            _check(isinstance(fields, dict), f"patterns[{i}]", "an object", fields)
            try:
                pattern_from_dict(fields)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"The plan's patterns[{i}] is malformed: {error}") from error

    def _checked_assignment(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        heads, layers = self.model["heads"], len(self.model["layers"])
        _check(len(self.assign) == self.num_bins, "assign", f"{self.num_bins} bins", len(self.assign))
        for b, by_layer in enumerate(self.assign):
            _check(
                isinstance(by_layer, (list, tuple)) and len(by_layer) == layers, f"assign[{b}]", f"{layers} layers",
                len(by_layer) if isinstance(by_layer, (list, tuple)) else by_layer,
            )  # fmt: skip
            for n, ids in enumerate(by_layer):
                name = f"assign[{b}][{n}]"
                _check(isinstance(ids, (list, tuple)) and len(ids) == heads, name, f"{heads} heads", ids)
                inside = all(_is_int(i) and 0 <= i < len(self.patterns) for i in ids)
                _check(inside, name, f"indices below {len(self.patterns)}", ids)
        return tuple(tuple(tuple(ids) for ids in by_layer) for by_layer in self.assign)

    @property
    def num_bins(self) -> int:
        return len(self.bins) - 1

    @property
    def layers(self) -> list[str]:
        """Module names of the planned attentions."""
        return list(self.model["layers"])

    def bin_of(self, sigma: float) -> int:
        """The bin of a noise level; levels outside [0, 1] belong to the first or last one."""
        return min(max(bisect.bisect_right(self.bins, sigma) - 1, 0), self.num_bins - 1)

    def parsed(self) -> tuple[Pattern, ...]:
        """The table of patterns as objects."""
        return tuple(pattern_from_dict(fields) for fields in self.patterns)

    def layout(self, grid: Grid, text_length: int) -> Layout:
        """The joint sequence of a token grid (frames, height, width) and a number of text tokens."""
        return Layout(
            grid=tuple(grid),
            text=text_length,
            text_position=self.text_position,
            tile=self.tile,
            granularity=self.granularity,
        )

    def densities(self, grid: Grid | None = None, text_length: int | None = None) -> list[list[float]]:
        """Mean density over the heads, `[bins][layers]`, at a grid and text length (default: the calibrated ones)."""
        layout = self.layout(*self._where(grid, text_length))
        table = [density(p, layout) for p in self.parsed()]
        return [[sum(table[i] for i in ids) / len(ids) for ids in by_layer] for by_layer in self.assign]

    def _where(self, grid: Grid | None, text_length: int | None) -> tuple[Grid, int]:
        grid = grid or self.calibrated.get("grid")
        if grid is None:
            raise ValueError("This plan records no calibrated grid: give grid=(frames, height, width) in tokens.")
        if self.text_position == "none":
            return tuple(grid), 0
        return tuple(grid), self.calibrated.get("text_length") or 0 if text_length is None else text_length

    def report(self, grid: Grid | None = None, text_length: int | None = None, **settings: Any):
        """Describe the plan; see `zoo.heads.sparse_vdit.report.PlanReport`. The result prints as text."""
        from zoo.heads.sparse_vdit.report import PlanReport

        return PlanReport.of(self, *self._where(grid, text_length), **settings)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"format": FORMAT, "version": VERSION, **_plain({f.name: getattr(self, f.name) for f in _FIELDS})}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> SparsePlan:
        """Read and validate a JSON document.

        Raises:
            ValueError: It is no plan, of a newer version, or malformed.
        """
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, Mapping) else type(document).__name__
            raise ValueError(f"This is no sparse attention plan: its format is {found!r}, expected {FORMAT!r}.")
        if document.get("version") != VERSION:
            raise ValueError(
                f"The plan has version {document.get('version')!r}; this package reads version {VERSION}. "
                "Update the package, or search a new plan."
            )
        known = {f.name for f in _FIELDS}
        missing = sorted(f.name for f in _FIELDS if _required(f) and f.name not in document)
        if missing:
            raise ValueError(f"The plan lacks {', '.join(missing)}.")
        unknown = sorted(set(document) - known - {"format", "version"})
        if unknown:
            raise ValueError(f"The plan has unknown fields: {', '.join(unknown)}.")
        return cls(**{name: document[name] for name in known if name in document})

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file, or as `plan.json` into an existing folder; the file appears complete or not at all.

        Returns:
            The file.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(_dumps(self.to_dict()), encoding="utf-8")
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> SparsePlan:
        """Read a plan from a file, or from `plan.json` in a folder.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not JSON, or no valid plan.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no plan '{path}': `zoo vdit search` writes one.")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{path}' is not JSON: {error}.") from error
        try:
            return cls.from_dict(document)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, token: str | None = None) -> SparsePlan:
        """Load a plan from a folder or file, or from a hub repository `org/name[@revision]`.

        Raises:
            zoo.hub.HubError: The repository or its plan cannot be fetched.
            ValueError: The file is no valid plan.
        """
        if Path(name).exists():
            return cls.load(name)
        from huggingface_hub import hf_hub_download

        repo, _, tag = str(name).partition("@")
        if repo.count("/") > 1 or Path(repo).suffix == ".json":
            raise FileNotFoundError(f"'{name}' is neither a file nor a folder nor a repository id (org/name).")
        with explain_errors(repo, revision or tag):
            path = hf_hub_download(repo, FILE, revision=revision or tag or None, token=token)
        return cls.load(path)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload the plan as `plan.json` of a hub repository, creating it where needed.

        Returns:
            The URL of the commit.

        Raises:
            zoo.hub.HubError: The hub refused.
        """
        from huggingface_hub import HfApi

        if repo_id.count("/") != 1:
            raise HubError(f"'{repo_id}' is not a valid repository id (org/name).")
        api = HfApi(token=token)
        with explain_errors(repo_id, revision):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_file(
                path_or_fileobj=_dumps(self.to_dict()).encode(),
                path_in_repo=FILE,
                repo_id=repo_id,
                revision=revision,
                commit_message=f"Upload sparse attention plan of {self.model['class']}",
            )
        return commit.commit_url


_FIELDS = dataclasses.fields(SparsePlan)


def _required(field: dataclasses.Field) -> bool:
    return field.default_factory is dataclasses.MISSING


def uniform_plan(
    model: Mapping[str, Any],
    text_position: str,
    pattern: Mapping[str, Any] = FULL,
    tile: Sequence[int] = DEFAULT_TILE,
    granularity: str = "block",
) -> SparsePlan:
    """A plan that gives every head of a model the same pattern at every noise level.

    Args:
        model: As `SparsePlan.model`; `zoo.sparse_vdit.describe_model` makes it.
        text_position: As `SparsePlan.text_position`.
        pattern: The pattern.
        tile, granularity: As in `SparsePlan`.
    """
    assign = (((0,) * model["heads"],) * len(model["layers"]),)
    return SparsePlan(dict(model), text_position, tuple(tile), granularity, (0.0, 1.0), (dict(pattern),), assign)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(holds: bool, name: str, expected: str, received: Any) -> None:
    if not holds:
        text = repr(received)
        raise ValueError(
            f"The plan's {name} must be {expected}, got {text if len(text) < 120 else text[:117] + '...'}."
        )


def _check_model(model: Any) -> None:
    _check(isinstance(model, dict), "model", "an object", model)
    for key in ("class", "layers", "heads", "head_dim"):
        _check(key in model, "model", f"an object with the key {key!r}", sorted(model))
    layers = model["layers"]
    _check(isinstance(model["class"], str), "model.class", "a class name", model["class"])
    named = isinstance(layers, list) and layers and all(isinstance(n, str) for n in layers)
    _check(bool(named), "model.layers", "a list of module names", layers)
    for key in ("heads", "head_dim"):
        _check(_is_int(model[key]) and model[key] > 0, f"model.{key}", "a positive integer", model[key])


def _check_bins(bins: Sequence[Any]) -> None:
    rising = len(bins) >= 2 and all(map(_is_number, bins)) and all(a < b for a, b in zip(bins, bins[1:], strict=False))
    _check(rising and bins[0] == 0 and bins[-1] == 1, "bins", "rising edges from 0 to 1", bins)


def _check_calibrated(calibrated: Any) -> None:
    _check(isinstance(calibrated, dict), "calibrated", "an object", calibrated)
    grid = calibrated.get("grid")
    fits = grid is None or (
        isinstance(grid, (list, tuple)) and len(grid) == 3 and all(_is_int(n) and n > 0 for n in grid)
    )
    _check(fits, "calibrated.grid", "three positive integers (frames, height, width)", grid)
    text = calibrated.get("text_length")
    _check(text is None or (_is_int(text) and text >= 0), "calibrated.text_length", "a number of tokens", text)


def _plain(value: Any) -> Any:
    """Lists and dictionaries instead of tuples and other mappings."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _dumps(document: dict[str, Any]) -> str:
    """JSON with one line for each field, and one for each layer of the assignment: a diff then shows the layer."""
    lines = []
    for key, value in document.items():
        if key == "assign":
            bins = ",\n".join("  [\n   " + ",\n   ".join(json.dumps(ids) for ids in b) + "\n  ]" for b in value)
            lines.append(f' "assign": [\n{bins}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
