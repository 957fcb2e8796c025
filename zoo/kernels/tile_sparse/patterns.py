"""Attention patterns of video diffusion transformers, and the tiles of queries and keys that they keep.

A sequence has V = F * n video tokens, n = H * W a frame, and T text tokens before or after them. Two orders of the
video tokens matter: frame-major, i = f * n + y * W + x, as models hold them, and token-major, where the F tokens of one
place follow each other: rank r(i) = (i mod n) * F + i div n. A pattern says which video keys a video query sees; text
keys are seen by all queries, and text queries see all keys. Tiles cut the video tokens in the order of the pattern
(the last tile may be short), then the text tokens on their own.

Patterns follow Sparse-vDiT, arXiv:2506.03065, section 3.1; widths in frames, tiles and the handling of text are this
package's definition, as the paper leaves them open.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# Queries and keys of a tile, the fastest on an H100.
DEFAULT_TILE = (128, 128)
# Kinds of a pattern in a `PatternTable`, the modes M0 to M4 of the paper.
FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE = range(5)


class Pattern:
    """Base of the patterns: `kind` is the code in a table, `name` the word in a plan."""

    kind: ClassVar[int]
    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read again by `pattern_from_dict`; unset fields are left out."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"pattern": self.name, **{key: value for key, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    kind, name = FULL, "full"


@dataclass(frozen=True)
class Skip(Pattern):
    """The head is left out: its output is zero for all queries, text queries too."""

    kind, name = SKIP, "skip"


@dataclass(frozen=True)
class Diagonal(Pattern):
    """Keys within a window of frame-major positions: |i - j| < max(1, floor(window * n)).

    Args:
        window: Width in frames, so that it means the same at every resolution; 0 leaves the query itself.
    """

    window: float
    kind, name = DIAGONAL, "diagonal"

    def __post_init__(self) -> None:
        _check_window(self.window)


@dataclass(frozen=True)
class MultiDiagonal(Pattern):
    """The same window of token-major ranks: the place of the query and its neighbours, in all frames.

    Args:
        window: Width in frames: window * n ranks, which are window * n / F places.
    """

    window: float
    kind, name = MULTI_DIAGONAL, "multi_diagonal"

    def __post_init__(self) -> None:
        _check_window(self.window)


@dataclass(frozen=True)
class VerticalStripe(Pattern):
    """Some keys, the same for all queries: the union of whole frames, a periodic comb, and blocks.

    Args:
        frames: Frames whose tokens are kept; negative ones count from the end, others out of range are ignored.
        every: (stride, width, offset): key j is kept if (j - offset) mod stride < width.
        blocks: Kept blocks of `block_size` consecutive frame-major tokens; these are bound to one grid.
        block_size: Tokens of a block.
    """

    frames: tuple[int, ...] = ()
    every: tuple[int, int, int] | None = None
    blocks: tuple[int, ...] = ()
    block_size: int = 64
    kind, name = STRIPE, "vertical_stripe"

    def __post_init__(self) -> None:
        for name in ("frames", "every", "blocks"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(int(x) for x in value))
        if self.every is not None and (len(self.every) != 3 or self.every[0] < 1 or self.every[1] < 0):
            raise ValueError(f"every must be (stride > 0, width >= 0, offset), got {self.every}.")
        if self.block_size < 1 or any(block < 0 for block in self.blocks):
            raise ValueError(
                f"block_size must be positive and blocks not negative, got {self.block_size} and {self.blocks}."
            )


PATTERNS = {cls.name: cls for cls in (Full, Skip, Diagonal, MultiDiagonal, VerticalStripe)}


def _check_window(window: float) -> None:
    if not window >= 0:
        raise ValueError(f"window must be a width in frames, 0 or more, got {window}.")


def pattern_from_dict(values: Mapping[str, Any]) -> Pattern:
    """The pattern that `Pattern.to_dict` described.

    Raises:
        ValueError: Unknown pattern or field.
    """
    values = dict(values)
    name = values.pop("pattern", None)
    if name not in PATTERNS:
        raise ValueError(f"pattern must be one of {sorted(PATTERNS)}, got {name!r}.")
    known = {field.name for field in fields(PATTERNS[name])}
    if not set(values) <= known:
        raise ValueError(f"{name} takes {sorted(known)}, got {sorted(values)}.")
    return PATTERNS[name](**values)


@dataclass(frozen=True)
class Layout:
    """How a sequence is made up, and how it is cut into tiles.

    Args:
        grid: Frames, rows and columns of the video tokens (F, H, W), after patching.
        text: Number of text tokens T.
        text_position: "first", "last" or "none": where the text stands in the sequence.
        tile: Queries and keys of a tile (Bq, Bk).
        granularity: "block": all pairs of a tile that holds an allowed pair are attended, which is what kernels run
            fast and what costs count. "element": only the allowed pairs.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_position: str = "none"
    tile: tuple[int, int] = DEFAULT_TILE
    granularity: str = "block"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(int(x) for x in self.grid))
        object.__setattr__(self, "tile", tuple(int(x) for x in self.tile))
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be positive (frames, rows, columns), got {self.grid}.")
        if len(self.tile) != 2 or min(self.tile) < 1:
            raise ValueError(f"tile must be positive (queries, keys), got {self.tile}.")
        if self.text_position not in ("first", "last", "none"):
            raise ValueError(f"text_position must be 'first', 'last' or 'none', got {self.text_position!r}.")
        if self.text < 0 or (self.text and self.text_position == "none"):
            raise ValueError(f"text_position {self.text_position!r} does not fit {self.text} text tokens.")
        if self.granularity not in ("block", "element"):
            raise ValueError(f"granularity must be 'block' or 'element', got {self.granularity!r}.")

    @property
    def frame(self) -> int:
        """Tokens of a frame, n."""
        return self.grid[1] * self.grid[2]

    @property
    def video(self) -> int:
        """Video tokens, V."""
        return self.grid[0] * self.frame

    @property
    def tokens(self) -> int:
        """All tokens, S."""
        return self.video + self.text

    @property
    def text_first(self) -> bool:
        return self.text_position == "first"

    def to_sizes(self) -> list[int]:
        """What the registered op takes: [F, n, T, text first, Bq, Bk, exact]; H and W do not matter to it."""
        return [self.grid[0], self.frame, self.text, int(self.text_first), *self.tile, int(self.granularity != "block")]

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Layout:
        """A layout of the same sequence and tiles as the one that `to_sizes` described."""
        frames, frame, text, text_first, tile_q, tile_k, exact = sizes
        position = ("first" if text_first else "last") if text else "none"
        return cls((frames, 1, frame), text, position, (tile_q, tile_k), "element" if exact else "block")

    @property
    def query_tiles(self) -> tuple[int, int]:
        """Tiles of video queries and of text queries."""
        return -(-self.video // self.tile[0]), -(-self.text // self.tile[0])

    @property
    def key_tiles(self) -> tuple[int, int]:
        """Tiles of video keys and of text keys."""
        return -(-self.video // self.tile[1]), -(-self.text // self.tile[1])

    @property
    def total_tiles(self) -> int:
        return sum(self.query_tiles) * sum(self.key_tiles)

    def width(self, pattern: Diagonal | MultiDiagonal) -> int:
        """The window in tokens, w: positions at a distance below w see each other."""
        return min(self.video, max(1, math.floor(min(pattern.window, self.grid[0]) * self.frame + 1e-9)))


def key_columns(pattern: VerticalStripe, layout: Layout) -> Tensor:
    """Which video keys a stripe keeps: bool [V], frame-major."""
    j = torch.arange(layout.video)
    keep = torch.zeros(layout.video, dtype=torch.bool)
    frames = layout.grid[0]
    for frame in pattern.frames:
        keep |= j // layout.frame == (frame + frames if frame < 0 else frame)
    if pattern.every is not None:
        stride, width, offset = pattern.every
        keep |= (j - offset) % stride < width
    if pattern.blocks:
        keep |= torch.isin(j // pattern.block_size, torch.tensor(pattern.blocks))
    return keep


def stripe_tiles(pattern: VerticalStripe, layout: Layout) -> Tensor:
    """Tiles of video keys that hold a key of a stripe, ascending: int64 [K]."""
    columns = key_columns(pattern, layout).nonzero().flatten()
    return (columns // layout.tile[1]).unique()


def _band_ranges(pattern: Diagonal | MultiDiagonal, layout: Layout) -> tuple[Tensor, Tensor]:
    """First key tile of each tile of video queries, and one past the last: int64 [Q] each.

    Queries [q0, q1) and keys [c0, c1) hold a pair closer than w iff c0 - (q1 - 1) < w and q0 - (c1 - 1) < w.
    """
    (tile_q, tile_k), w, last = layout.tile, layout.width(pattern), layout.video - 1
    q0 = torch.arange(layout.query_tiles[0]) * tile_q
    first = (q0 - w + 1).clamp_min(0) // tile_k
    return first, ((q0 + tile_q - 1).clamp_max(last) + w - 1).clamp_max(last) // tile_k + 1


def active_tiles(pattern: Pattern, layout: Layout) -> int:
    """Number of tiles that are computed, text tiles included."""
    (video_q, text_q), (video_k, text_k) = layout.query_tiles, layout.key_tiles
    if pattern.kind == SKIP:
        return 0
    if pattern.kind == FULL:
        pairs = video_q * video_k
    elif pattern.kind == STRIPE:
        pairs = video_q * len(stripe_tiles(pattern, layout))
    else:
        first, end = _band_ranges(pattern, layout)
        pairs = int((end - first).sum())
    return pairs + video_q * text_k + text_q * (video_k + text_k)


def density(pattern: Pattern, layout: Layout) -> float:
    """Share of the tiles that is computed; the paper's sparsity S is 1 - density."""
    return active_tiles(pattern, layout) / layout.total_tiles


def tile_map(pattern: Pattern, layout: Layout) -> Tensor:
    """Active tiles, video tiles in the order of the pattern, then text tiles: bool [Q, K]."""
    (video_q, text_q), (video_k, text_k) = layout.query_tiles, layout.key_tiles
    active = torch.full((video_q + text_q, video_k + text_k), pattern.kind != SKIP)
    if pattern.kind == STRIPE:
        active[:video_q, :video_k] = False
        active[:video_q, stripe_tiles(pattern, layout)] = True
    elif pattern.kind in (DIAGONAL, MULTI_DIAGONAL):
        first, end = _band_ranges(pattern, layout)
        key = torch.arange(video_k)
        active[:video_q, :video_k] = (key >= first[:, None]) & (key < end[:, None])
    return active


def tile_lists(pattern: Pattern, layout: Layout) -> tuple[Tensor, Tensor]:
    """The tile map as compressed rows: int32 pointers [Q + 1] and int32 key tiles, ascending in a row."""
    active = tile_map(pattern, layout)
    start = torch.zeros(len(active) + 1, dtype=torch.int32)
    start[1:] = active.sum(1).cumsum(0)
    return start, active.nonzero()[:, 1].int()


def video_order(pattern: Pattern, layout: Layout) -> Tensor:
    """Frame-major number of the video token at each position of the pattern's order: int64 [V]."""
    position = torch.arange(layout.video)
    if pattern.kind != MULTI_DIAGONAL:
        return position
    return position % layout.grid[0] * layout.frame + position // layout.grid[0]


def sequence_order(pattern: Pattern, layout: Layout) -> Tensor:
    """Place in the sequence of each position of the pattern's order, text after video: int64 [S]."""
    text_start, video_start = (0, layout.text) if layout.text_first else (layout.video, 0)
    return torch.cat([video_order(pattern, layout) + video_start, torch.arange(layout.text) + text_start])


def attention_mask(pattern: Pattern, layout: Layout) -> Tensor:
    """Which query sees which key, in the order of the sequence: bool [S, S]. For small sizes only.

    Follows the layout's granularity: allowed pairs, or all pairs of active tiles.
    """
    V, S = layout.video, layout.tokens
    if layout.granularity == "block":
        tiles = [_tile_of_position(layout, side) for side in (0, 1)]
        mask = tile_map(pattern, layout)[tiles[0]][:, tiles[1]]
    else:
        mask = torch.full((S, S), pattern.kind != SKIP)
        if pattern.kind == STRIPE:
            mask[:V, :V] = key_columns(pattern, layout)
        elif pattern.kind in (DIAGONAL, MULTI_DIAGONAL):
            position = torch.arange(V)
            mask[:V, :V] = (position[:, None] - position).abs() < layout.width(pattern)
    place = sequence_order(pattern, layout).argsort()
    return mask[place][:, place]


def _tile_of_position(layout: Layout, side: int) -> Tensor:
    """Tile of each position of an order, text after video: int64 [S]; side 0 for queries, 1 for keys."""
    size = layout.tile[side]
    text = torch.arange(layout.text) // size + -(-layout.video // size)
    return torch.cat([torch.arange(layout.video) // size, text])


class PatternTable(NamedTuple):
    """A list of patterns at one layout as tensors, which is what the op and its kernels read.

    Attributes:
        rows: int32 [P, 6]: kind; window in tokens (V where there is none); first entry in `tiles` and number of
            entries; row in `columns` (stripes); active tiles.
        tiles: int32 [L]: key tiles of all stripes, one list after the other.
        columns: int32 [stripes, V]: 1 for the keys of a stripe, frame-major.
    """

    rows: Tensor
    tiles: Tensor
    columns: Tensor


def pattern_table(patterns: Sequence[Pattern], layout: Layout, device: torch.device | str = "cpu") -> PatternTable:
    """Tables of patterns at a layout, built once for each (patterns, layout, device) and kept.

    Building reads data on the host: call it outside of compiled code and hand the result to `tile_sparse_attention`.

    Raises:
        ValueError: No pattern, or something that is not one.
    """
    patterns = tuple(patterns)
    if not patterns or not all(isinstance(p, Pattern) for p in patterns):
        raise ValueError(f"patterns must be a sequence of patterns, at least one, got {patterns}.")
    # Kept for training too, where a tensor of inference mode could not be saved for the backward pass.
    with torch.inference_mode(False):
        return _pattern_table(patterns, layout, torch.device(device))


@functools.lru_cache(maxsize=64)
def _pattern_table(patterns: tuple[Pattern, ...], layout: Layout, device: torch.device) -> PatternTable:
    rows, lists, columns, start = [], [], [], 0
    for p in patterns:
        width = layout.width(p) if p.kind in (DIAGONAL, MULTI_DIAGONAL) else layout.video
        count, stripe = 0, 0
        if p.kind == STRIPE:
            lists.append(stripe_tiles(p, layout))
            count, stripe = len(lists[-1]), len(columns)
            columns.append(key_columns(p, layout))
        rows.append([p.kind, width, start, count, stripe, active_tiles(p, layout)])
        start += count
    tiles = torch.cat(lists) if lists else torch.zeros(0)
    # Kernels are given the address of a first entry even where none is read.
    tiles = torch.cat([tiles, torch.zeros(1)]).to(device, torch.int32)
    columns = torch.stack(columns or [torch.zeros(layout.video)]).to(device, torch.int32)
    return PatternTable(torch.tensor(rows, dtype=torch.int32).to(device), tiles, columns)
