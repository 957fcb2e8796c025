"""Where the partitions of an image lie, and the order in which their tokens reach the language model.

LLaVA-NeXT and LLaVA-OneVision read the whole image row by row, then one mosaic of all sub-images row by row, cropped
to what the image covers, so that the tokens of neighbouring sub-images alternate.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.token_dropping.base import NEWLINE, Kept, Vision

GRIDS = ("fixed", "legacy")
NEWLINES = ("drop", "all", "nonempty_rows")
# Geometries whose tables stay in memory.
CACHED = 64


@dataclass(frozen=True)
class ImageGrid:
    """One image as its partitions: the whole image, then gh x gw sub-images row by row.

    Attributes:
        grid: (gh, gw) sub-images; (0, 0) where the whole image is the only partition.
        size: (H, W) of the original in pixels.
        side: S, patches along a side of a partition.
        pixels: Pixels along a side of a partition.
        shrunk: (h, w) of a mosaic that the model resamples because it is too large (LLaVA-OneVision). Its places are
            then distributed to partitions in blocks, at most S x S each.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    side: int
    pixels: int
    shrunk: tuple[int, int] | None = None

    @property
    def partitions(self) -> int:
        """Number of partitions, the whole image included."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def patches(self) -> int:
        """N, patches of a partition."""
        return self.side**2

    def mosaic(self, *, legacy: bool = False, crop: bool = True) -> Tensor:
        """[h, w] int64, partition * N + patch at each place of the sub-images' mosaic; [0, 0] without sub-images.

        Args:
            legacy: Swap the rows and columns of the grid, as transformers did before 4.44.
            crop: Leave out the places that show padding.
        """
        return _mosaic(self, legacy, crop)


def unpadded(height: int, width: int, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a mosaic that an image of `size` (H, W) covers; transformers' `unpad_image`."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rows = unpad_image(torch.arange(height)[None, :, None].expand(1, height, width), size)[0]
    columns = unpad_image(torch.arange(width)[None, None].expand(1, height, width), size)[0]
    if not rows.numel():
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0, 0]), int(rows[-1, 0]) + 1), slice(int(columns[0, 0]), int(columns[0, -1]) + 1)


@functools.lru_cache(CACHED)
def _mosaic(image: ImageGrid, legacy: bool, crop: bool) -> Tensor:
    (gh, gw), S = image.grid, image.side
    if not gh * gw:
        return torch.zeros(0, 0, dtype=torch.int64)
    if image.shrunk is not None:
        return _shrunk_mosaic(image)
    index = torch.arange(image.patches, image.partitions * image.patches)
    # [gh, gw, S, S] -> [gh * S, gw * S]
    grid = (gw, gh) if legacy else (gh, gw)
    places = index.view(*grid, S, S).transpose(1, 2).reshape(grid[0] * S, grid[1] * S)
    return places[unpadded(*places.shape, image.size)] if crop else places


def _shrunk_mosaic(image: ImageGrid) -> Tensor:
    (gh, gw), (h, w) = image.grid, image.shrunk
    y, x = torch.arange(h)[:, None], torch.arange(w)[None]
    by, bx = y * gh // h, x * gw // w
    # Block b starts at the first y with y * gh // h == b.
    ly, lx = y - (by * h + gh - 1) // gh, x - (bx * w + gw - 1) // gw
    return (1 + by * gw + bx) * image.patches + ly * image.side + lx


class Layout(NamedTuple):
    """Full order of the tokens of several images, before anything is dropped; tensors of length L.

    Attributes:
        patch: Row of the flattened [P * N] patches; 0 for newline tokens.
        source: partition * N + patch within the image, or NEWLINE.
        image: Image of each token.
        row: Number of the mosaic's row that a token is in, or that a newline token ends, counted over all images.
        rows: Total of these rows.
        newline: Places of newline tokens.
        newlines: Newline tokens of each image.
    """

    patch: Tensor
    source: Tensor
    image: Tensor
    row: Tensor
    rows: int
    newline: Tensor
    newlines: list[int]


@functools.lru_cache(CACHED)
def layout(images: tuple[ImageGrid, ...], legacy: bool, newline: bool, device: torch.device) -> Layout:
    """The order of several images, as tensors on a device."""
    source, patch, owner, row, newlines, rows, first = [], [], [], [], [], 0, 0
    for i, image in enumerate(images):
        mosaic = image.mosaic(legacy=legacy)
        order, lines = torch.arange(image.patches), torch.zeros(image.patches, dtype=torch.int64)
        count = mosaic.shape[0]
        if newline:
            # Behind an image without sub-images it ends the whole image, line 0.
            mosaic = F.pad(mosaic, (0, 1), value=NEWLINE) if count else torch.full((1, 1), NEWLINE)
        line = (torch.arange(1, count + 1) if count else torch.zeros(mosaic.shape[0]).long())[:, None].expand_as(mosaic)
        order, lines = torch.cat((order, mosaic.flatten())), torch.cat((lines, line.flatten()))
        source.append(order)
        patch.append(torch.where(order < 0, 0, order + first))
        owner.append(torch.full_like(order, i))
        row.append(lines + rows)
        newlines.append(int((order < 0).sum()))
        rows += count + 1
        first += image.partitions * image.patches
    source = torch.cat(source)
    tensors = (x.to(device) for x in (torch.cat(patch), source, torch.cat(owner), torch.cat(row)))
    return Layout(*tensors, rows, (source < 0).to(device), newlines)


class Packer:
    """Puts selected patches in the order of the language model.

    Attributes:
        legacy: Whether the grid's rows and columns are swapped, as in the published code.
        newline: What becomes of the newline tokens, of `NEWLINES`.
        has_newline: Whether the stock model puts newline tokens behind the rows.
    """

    def __init__(self, grid: str = "fixed", newline: str = "drop", *, has_newline: bool = True) -> None:
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {GRIDS}, got {grid!r}.")
        if newline not in NEWLINES:
            raise ValueError(f"newline must be one of {NEWLINES}, got {newline!r}.")
        if newline != "drop" and not has_newline:
            raise ValueError(f"newline={newline!r} needs a model with newline tokens; this one has none: use 'drop'.")
        self.legacy, self.newline, self.has_newline = grid == "legacy", newline, has_newline

    def layout(self, images: list[ImageGrid], device: torch.device) -> Layout:
        """Full order of these images."""
        return layout(tuple(images), self.legacy, self.newline != "drop", torch.device(device))

    def candidates(self, images: list[ImageGrid], device: torch.device) -> Tensor:
        """[P, N] bool: patches that reach the language model, because they show no padding."""
        return _candidates(tuple(images), self.legacy, torch.device(device))

    def stock_lengths(self, images: list[ImageGrid]) -> list[int]:
        """Tokens of each image in the stock model: the number of placeholders that its processor emits."""
        return [_stock_length(image, self.has_newline) for image in images]

    def newline_counts(self, images: list[ImageGrid]) -> list[int]:
        """Newline tokens of each image if all are kept."""
        return self.layout(images, torch.device("cpu")).newlines

    def pack(self, vision: Vision, mask: Tensor, lengths: list[int] | None = None) -> Kept:
        """Order the patches in `mask`, [P, N] bool.

        Args:
            vision: Where features and geometry come from.
            mask: Patches to keep; those that show padding are left out.
            lengths: Number of tokens of each image, if it is known. Otherwise it is read back from the device.
        """
        order = self.layout(vision.images, mask.device)
        keep = mask.flatten()[order.patch]  # [L]
        if self.newline == "all":
            keep = keep | order.newline
        elif self.newline == "nonempty_rows":
            patches = (keep & ~order.newline).to(torch.int32)
            kept = torch.zeros(order.rows, dtype=torch.int32, device=mask.device).index_add_(0, order.row, patches)
            keep = torch.where(order.newline, kept[order.row] > 0, keep)
        if lengths is None:
            images = torch.zeros(len(vision.images), dtype=torch.int64, device=mask.device)
            lengths = images.index_add_(0, order.image, keep.long()).tolist()
        total = sum(lengths)
        # Places of the kept tokens, without another read back: the others write to a place that is cut off.
        target = torch.where(keep, keep.cumsum(0) - 1, total)
        places = torch.empty(total + 1, dtype=torch.int64, device=mask.device)
        places = places.scatter_(0, target, torch.arange(len(keep), device=mask.device))[:total]
        patch, N = order.patch[places], mask.shape[1]
        token = patch // N * vision.features.shape[1] + vision.prefix + patch % N
        return Kept(vision.features.flatten(0, 1)[token], lengths, order.source[places])


@functools.lru_cache(CACHED)
def _candidates(images: tuple[ImageGrid, ...], legacy: bool, device: torch.device) -> Tensor:
    patches = layout(images, legacy, False, torch.device("cpu")).patch
    mask = torch.zeros(sum(image.partitions for image in images) * images[0].patches, dtype=torch.bool)
    mask[patches] = True
    return mask.view(-1, images[0].patches).to(device)


@functools.lru_cache(CACHED)
def _stock_length(image: ImageGrid, newline: bool) -> int:
    return len(layout((image,), False, newline, torch.device("cpu")).source)


def shrink(image: ImageGrid, largest: int) -> ImageGrid:
    """The image with its mosaic resampled, if it covers more than `largest` partitions (LLaVA-OneVision's rule)."""
    h, w = image.mosaic().shape
    ratio = math.sqrt(h * w / (largest * image.patches))
    return replace(image, shrunk=(int(h // ratio), int(w // ratio))) if ratio > 1.1 else image
