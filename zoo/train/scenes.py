"""Scenes of coloured clothes with questions and answers, composed in batches where the images lie.

A scene is a function of (seed, index) alone, whatever the batch and the device: its draws are a hash of the two. Nine
cells hold up to six garments (grey images, given a colour) on a plain or textured background, which the larger part of
a scene consists of.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.tiny_vlm import (
    ANSWER,
    ANSWER_TOKENS,
    CLASSES,
    COLOURS,
    EOS,
    NUMBERS,
    PAD,
    PLURALS,
    POSITIONS,
    QUESTION,
    TEMPLATES,
    words,
)

ROOT = "/usr/share/datasets/fashion-mnist"
CELLS = len(POSITIONS)
SIDE = 3
TYPES = tuple(TEMPLATES)
RGB = {
    "red": (0.90, 0.12, 0.10),
    "green": (0.12, 0.72, 0.18),
    "blue": (0.12, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.12),
    "purple": (0.66, 0.18, 0.82),
    "white": (0.97, 0.97, 0.97),
}
# Slots of a template; the words of one slot share a table.
SLOTS = {"{class}": CLASSES, "{plural}": PLURALS, "{colour}": COLOURS, "{position}": POSITIONS}
# Share of garments that are of the class, or the colour, which a scene prefers.
REPEATED = 0.35
_MASK = 0xFFFFFFFF


def _hash(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers held in int64 (lowbias32 of C. Wellons' hash prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


class Draws:
    """Uniform draws in [0, 1) that depend on a seed, an index and how many were drawn before.

    Args:
        seed: Of the data set.
        index: `[B]` int64, one for each row of the draws.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        start = _hash(torch.full((), seed & _MASK, device=index.device))
        self.state = _hash(_hash(index & _MASK) ^ start)
        self.count = 0

    def __call__(self, *shape: int) -> Tensor:
        """Draw `[B, *shape]` float32."""
        size = math.prod(shape)
        place = torch.arange(self.count, self.count + size, device=self.state.device)
        self.count += size
        bits = _hash((self.state[:, None] + _hash(place + 1)) & _MASK)
        # 24 bits are what float32 holds below 1.
        return ((bits >> 8).float() / 2**24).view(-1, *shape)


def choose(mask: Tensor, draws: Tensor) -> Tensor:
    """One true place of each row: `[..., N]` bool and draws of that shape to `[...]` int64; 0 where none is true."""
    return (draws + 1).masked_fill(~mask, 0).argmax(-1)


class GarmentPool:
    """Images by class, on a device.

    Args:
        images: `[N, 28, 28]` uint8, black around the garment.
        labels: `[N]` int64, of `CLASSES`.
        device: Where they are kept.

    Raises:
        ValueError: A class has no image.
    """

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device | str = "cpu") -> None:
        counts = torch.bincount(labels, minlength=len(CLASSES))
        if len(counts) != len(CLASSES) or not counts.all():
            raise ValueError(f"needs images of each of {len(CLASSES)} classes, got counts {counts.tolist()}")
        self.images = images[labels.argsort(stable=True)].to(device)
        self.counts = counts.to(device)
        self.starts = (counts.cumsum(0) - counts).to(device)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def pick(self, labels: Tensor, draws: Tensor) -> Tensor:
        """An image of each label, draws of the labels' shape: `[..., 28, 28]` in [0, 1]."""
        counts = self.counts[labels]
        place = torch.minimum((draws * counts).long(), counts - 1)
        return self.images[self.starts[labels] + place].float() / 255


def garment_pool(root: str | Path, split: str, device: torch.device | str) -> GarmentPool:
    """Images of a split of Fashion-MNIST: `train` (55,000), `val` (5,000 others) or `test` (10,000)."""
    from zoo.train.data import FashionMnistData

    images = FashionMnistData(root=str(root)).load_splits()[split]
    return GarmentPool(torch.tensor(images.images), torch.tensor(images.labels, dtype=torch.int64), device)


@dataclass
class Scenes:
    """A batch of scenes of S x S pixels with G x G patches.

    Attributes:
        pixels: `[B, 3, S, S]` in [0, 1], multiples of 1/255.
        present, label, colour: `[B, 9]`: whether a cell holds a garment, its class and its colour.
        coverage: `[B, 9, G * G]` float32, the share of each patch that the garment of each cell covers.
    """

    pixels: Tensor
    present: Tensor
    label: Tensor
    colour: Tensor
    coverage: Tensor

    @property
    def attention_target(self) -> Tensor:
        """`[B, G * G]` that sums to 1: each garment has the same share, spread as it covers the patches."""
        share = self.coverage / self.coverage.sum(-1, keepdim=True).clamp(min=1e-6)
        return share.sum(1) / self.present.sum(1, keepdim=True)

    def patch_targets(self, least: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
        """Class, colour and cell of what each patch shows, `[B, G * G]` int64 each.

        Where a garment covers less than `least` of the patch, the number of classes, colours or cells.
        """
        most, cell = self.coverage.max(1)
        empty = most < least
        label, colour = self.label.gather(1, cell), self.colour.gather(1, cell)
        values = (label, len(CLASSES)), (colour, len(COLOURS)), (cell, CELLS)
        return tuple(value.masked_fill(empty, count) for value, count in values)


def compose(
    pool: GarmentPool,
    seed: int,
    index: Tensor,
    image_size: int = 224,
    patch_size: int = 14,
    scale: tuple[float, float] = (0.38, 0.52),
) -> Scenes:
    """Compose scenes.

    Args:
        pool: The garments.
        seed: Of the data set.
        index: `[B]` int64, on the device of the pool.
        image_size: Height and width in pixels, S.
        patch_size: Height and width of a patch in pixels.
        scale: Range of a garment's size as a share of its cell's side.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}")
    draws = Draws(seed, index)
    # [B, 9]: the cells with the highest draws hold the garments, two to six.
    number = 2 + (draws(1) * 5).long()
    present = draws(CELLS).argsort(1, descending=True).argsort(1) < number
    label = _preferred(draws, len(CLASSES))
    colour = _preferred(draws, len(COLOURS))
    shape = _place(pool.pick(label, draws(CELLS)), draws, image_size // SIDE, scale)
    shape = shape * present[..., None, None]
    alpha = (shape * 5).clamp(max=1)
    pixels = _paint(shape, alpha, colour, draws, image_size)
    coverage = _coverage(alpha, image_size, patch_size)
    return Scenes(pixels, present, label, colour, coverage)


def _preferred(draws: Draws, count: int) -> Tensor:
    """A value below `count` for each cell, `[B, 9]`: one value of the scene comes up more often."""
    favourite, each = (draws(1) * count).long(), (draws(CELLS) * count).long()
    return torch.where(draws(CELLS) < REPEATED, favourite, each)


def _place(garments: Tensor, draws: Draws, cell: int, scale: tuple[float, float]) -> Tensor:
    """Scale, turn, mirror and move garments `[B, 9, 28, 28]` within their cells `[B, 9, cell, cell]`."""
    size = scale[0] + (scale[1] - scale[0]) * draws(CELLS)
    angle = (draws(CELLS) - 0.5) * 0.4
    mirrored = torch.where(draws(CELLS) < 0.5, -1.0, 1.0)
    # Affine maps from a cell to its garment, both over [-1, 1].
    centre = (draws(CELLS, 2) * 2 - 1) * (1 - size).unsqueeze(-1)
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    # [B, 9, 4] -> [B * 9, 2, 2]
    rows = torch.stack([mirrored * cos, mirrored * sin, -sin, cos], -1).view(-1, 2, 2)
    maps = torch.cat([rows, -rows @ centre.view(-1, 2, 1)], -1)
    grid = F.affine_grid(maps, [len(maps), 1, cell, cell], align_corners=False)
    placed = F.grid_sample(garments.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    return placed.view(*garments.shape[:2], cell, cell)


def _paint(shape: Tensor, alpha: Tensor, colour: Tensor, draws: Draws, size: int) -> Tensor:
    """Coloured garments over a background: cells `[B, 9, cell, cell]` to pixels `[B, 3, S, S]`."""
    tint = (_palette(shape.device)[colour] + (draws(CELLS, 3) - 0.5) * 0.12).clamp(0, 1)
    # Shades of grey become shades of the colour.
    shade = (0.25 + 0.75 * shape) * alpha
    garments = _assemble(tint[..., None, None] * shade.unsqueeze(2), size)
    return ((garments + _background(draws, size) * (1 - _assemble(alpha.unsqueeze(2), size))) * 255).round() / 255


@functools.lru_cache(4)
def _palette(device: torch.device) -> Tensor:
    """Colours `[6, 3]`; kept, because a CUDA graph cannot copy them from the host."""
    return torch.tensor([RGB[name] for name in COLOURS], device=device)


def _background(draws: Draws, size: int) -> Tensor:
    """Muted backgrounds `[B, 3, S, S]`: a gradient of two greyish tones, with texture in two of three scenes."""
    base = 0.2 + 0.35 * draws(1, 1, 1) + (draws(3, 2, 2) - 0.5) * 0.16
    smooth = F.interpolate(base, size=(size, size), mode="bilinear", align_corners=True)
    strength = 0.2 * (draws(1, 1, 1) * 1.5 - 0.5).clamp(min=0)
    texture = sum(
        F.interpolate(draws(1, n, n) - 0.5, size=(size, size), mode="bilinear", align_corners=True) for n in (9, 33)
    )
    return (smooth + strength * texture).clamp(0, 1)


def _assemble(cells: Tensor, size: int) -> Tensor:
    """Lay cells `[B, 9, C, cell, cell]` out as `[B, C, S, S]`, in the middle where S is no multiple of three."""
    batch, _, channels, cell, _ = cells.shape
    # [B, 3, 3, C, cell, cell] -> [B, C, 3, cell, 3, cell] -> [B, C, 3 * cell, 3 * cell]
    whole = cells.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, SIDE * cell, -1)
    before = (size - SIDE * cell) // 2
    after = size - SIDE * cell - before
    return F.pad(whole, (before, after, before, after))


def _coverage(alpha: Tensor, size: int, patch: int) -> Tensor:
    """Share of each patch that each cell's garment covers: `[B, 9, cell, cell]` to `[B, 9, G * G]`."""
    cell = alpha.shape[-1]
    # [3, G, cell]: share of a patch's row that a row of pixels of a cell is.
    row = torch.arange(SIDE * cell, device=alpha.device) + (size - SIDE * cell) // 2
    owner = torch.arange(size // patch, device=alpha.device)[:, None] == row // patch
    pool = owner.float().view(-1, SIDE, cell).transpose(0, 1) / patch
    covered = torch.einsum("rph,brchw,cqw->brcpq", pool, alpha.unflatten(1, (SIDE, SIDE)), pool)
    return covered.flatten(1, 2).flatten(2)


@dataclass
class Questions:
    """Q questions about each of B scenes.

    Attributes:
        type: `[B, Q]` int64, of `TYPES`.
        tokens: `[B, Q, 8]` int64, from `<question>` to `<answer>`.
        answer: `[B, Q, 3]` int64, with `</s>` and padding.
    """

    type: Tensor
    tokens: Tensor
    answer: Tensor


class Questioner:
    """Asks about scenes, on a device.

    Args:
        device: Of the scenes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        numbers = {word: number for number, word in enumerate(words())}

        def table(names: tuple[str, ...]) -> Tensor:
            return torch.tensor([numbers[name] for name in names], device=device)

        self.slots = [table(names) for names in SLOTS.values()]
        self.number_words = table(NUMBERS)
        self.pad, self.end = numbers[PAD], numbers[EOS]
        self.nothing, self.yes, self.no = (numbers[word] for word in ("nothing", "yes", "no"))
        slot_codes = {slot: -1 - place for place, slot in enumerate(SLOTS)}
        texts = [[QUESTION, *text.split(), ANSWER] for text in TEMPLATES.values()]
        # [types, 8]: token numbers, and codes below zero for slots.
        self.templates = torch.tensor(
            [[slot_codes.get(word, numbers.get(word)) for word in text] for text in texts], device=device
        )

    def ask(self, scenes: Scenes, seed: int, index: Tensor, types: Tensor) -> Questions:
        """Ask questions of given types.

        A type that needs a garment of which there is only one in the scene is replaced by "what" where none is.

        Args:
            scenes: The scenes.
            seed: Of the data set.
            index: `[B]` int64, of the scenes.
            types: `[B, Q]` int64, of `TYPES`.
        """
        # Other draws than those of the scene.
        draws = Draws(seed ^ 0x5EED, index)
        count = types.shape[1]
        present = scenes.present[:, None].expand(-1, count, -1)  # [B, Q, 9]
        label = scenes.label[:, None].expand(-1, count, -1)
        colour = scenes.colour[:, None].expand(-1, count, -1)
        code = label * len(COLOURS) + colour
        cell, valid = self._cells(draws, types, present, label, code)
        types = torch.where(valid, types, 0)
        asked_label = label.gather(2, cell[..., None])[..., 0]
        asked_colour = colour.gather(2, cell[..., None])[..., 0]
        asked_label, asked_colour = self._absent(draws, types, present, code, (asked_label, asked_colour))
        tokens = self._tokens(types, (asked_label, asked_label, asked_colour, cell))
        hits = {
            "class": present & (label == asked_label[..., None]),
            "colour": present & (colour == asked_colour[..., None]),
        }
        answer = self._answers(types, cell, present, (asked_label, asked_colour), hits)
        return Questions(types, tokens, answer)

    def _cells(
        self, draws: Draws, types: Tensor, present: Tensor, label: Tensor, code: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The cell that each question is about, `[B, Q]`, and whether there is one."""
        kind = types[..., None]
        allowed = torch.where(kind == TYPES.index("where"), _single(code, present), present)
        allowed = torch.where(kind == TYPES.index("colour"), _single(label, present), allowed)
        empty = (kind == TYPES.index("what")) & (draws(types.shape[1], 1) < 0.2)
        allowed = torch.where(empty, ~present, allowed)
        cell_draws = draws(types.shape[1], CELLS)
        cell = choose(allowed, cell_draws)
        valid = allowed.any(-1)
        return torch.where(valid, cell, choose(present, cell_draws)), valid

    def _absent(
        self, draws: Draws, types: Tensor, present: Tensor, code: Tensor, asked: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Ask for what is not there: in half the questions of existence, and in a quarter of the counts."""
        label, colour = asked
        count = types.shape[1]
        there = torch.zeros(*types.shape, len(CLASSES) * len(COLOURS), device=code.device)
        there = there.scatter_add(2, code, present.float()).unflatten(2, (len(CLASSES), len(COLOURS))) > 0
        # [B, Q, colours] of the class, [B, Q, classes] of the colour.
        of_class = there.gather(2, label[..., None, None].expand(-1, -1, 1, len(COLOURS)))[:, :, 0]
        of_colour = there.gather(3, colour[..., None, None].expand(-1, -1, len(CLASSES), 1))[..., 0]
        other_colour = choose(~of_class, draws(count, len(COLOURS)))
        other_label = choose(~of_colour, draws(count, len(CLASSES)))
        chance = draws(count)
        exists = types == TYPES.index("exists")
        change_colour = exists & (chance < 0.25) & ~of_class.all(-1)
        change_label = exists & (chance >= 0.25) & (chance < 0.5)
        change_label |= (types == TYPES.index("count class")) & (chance < 0.25)
        change_colour |= (types == TYPES.index("count colour")) & (chance < 0.25) & ~of_class.all(-1)
        return torch.where(change_label, other_label, label), torch.where(change_colour, other_colour, colour)

    def _tokens(self, types: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        """Fill the templates, `[B, Q, 8]`, with a value for each slot."""
        tokens = self.templates[types]
        for place, (table, value) in enumerate(zip(self.slots, values, strict=True)):
            tokens = torch.where(tokens == -1 - place, table[value][..., None], tokens)
        return tokens

    def _answers(
        self,
        types: Tensor,
        cell: Tensor,
        present: Tensor,
        asked: tuple[Tensor, Tensor],
        hits: dict[str, Tensor],
    ) -> Tensor:
        """Tokens of the answers, `[B, Q, 3]`."""
        label, colour = asked
        class_words, _, colour_words, position_words = self.slots
        occupied = present.gather(2, cell[..., None])[..., 0]
        exists = (hits["class"] & hits["colour"]).any(-1)
        by_type = {
            "what": torch.where(occupied, colour_words[colour], self.nothing),
            "where": position_words[cell],
            "colour": colour_words[colour],
            "count class": self.number_words[hits["class"].sum(-1)],
            "count colour": self.number_words[hits["colour"].sum(-1)],
            "exists": torch.where(exists, self.yes, self.no),
        }
        first = torch.stack([by_type[name] for name in TYPES], -1).gather(-1, types[..., None])[..., 0]
        # Only a garment has a second word.
        two = (types == TYPES.index("what")) & occupied
        second = torch.where(two, class_words[label], self.end)
        third = torch.where(two, self.end, self.pad)
        answer = torch.stack([first, second, third], -1)
        return answer[..., :ANSWER_TOKENS]


def _single(values: Tensor, present: Tensor) -> Tensor:
    """Cells whose value no other garment of the scene has, all `[B, Q, 9]`."""
    same = (values[..., :, None] == values[..., None, :]) & present[..., None, :]
    return present & (same.sum(-1) == 1)
