"""Spatial sub-sampling: evenly spaced patches, whatever the image shows. The plain baseline of HiRED's paper."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from zoo.heads.token_dropping.base import Budget, TokenSelector, Vision, check_budget, each_budget, total_tokens
from zoo.heads.token_dropping.packing import ImageGrid, Packer


def regular_patches(patches: int, fraction: float, device: torch.device) -> Tensor:
    """[N] bool: every g-th patch in reading order, the last one excepted, with g = N // int(N * fraction)."""
    count = int(patches * fraction)
    index = torch.arange(patches, device=device)
    if not count:
        return torch.zeros_like(index, dtype=torch.bool)
    return (index % (patches // count) == 0) & (index < patches - 1)


class BlindSelector(TokenSelector):
    """A selector whose counts follow from the images' sizes: a share of the patches that show no padding."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = check_budget(budget, self.default_budget)

    @property
    def is_identity(self) -> bool:
        """Whether the budget is everything."""
        return isinstance(self.budget, float) and self.budget == 1

    def counts(self, images: list[ImageGrid], packer: Packer) -> list[tuple[int, int]]:
        """Patches to keep, and patches to choose from, of each image."""
        candidates = packer.candidates(images, torch.device("cpu")).split([image.partitions for image in images])
        each = zip(candidates, each_budget(self.budget, len(images)), strict=True)
        return [(total_tokens(budget, int(mask.sum())), int(mask.sum())) for mask, budget in each]

    def lengths(self, images: list[ImageGrid], packer: Packer) -> list[int] | None:
        """Patches to keep and newlines."""
        if packer.newline == "nonempty_rows":
            return None
        newlines = packer.newline_counts(images)
        return [count + more for (count, _), more in zip(self.counts(images, packer), newlines, strict=True)]


class Spatial(BlindSelector):
    """Keeps evenly spaced patches of every partition, in reading order.

    Args:
        budget: Fraction of the patches that show no padding, a number of patches, or one of these for each image.
    """

    name: ClassVar[str] = "spatial"

    def select(self, vision: Vision, packer: Packer) -> Tensor:
        """Evenly spaced patches."""
        return self.plan(vision.images, packer, vision.features.device)

    def plan(self, images: list[ImageGrid], packer: Packer, device: torch.device) -> Tensor:
        """The mask."""
        return _even(tuple(images), tuple(self.counts(images, packer)), packer.legacy, device)


@functools.lru_cache(64)
def _even(
    images: tuple[ImageGrid, ...], counts: tuple[tuple[int, int], ...], legacy: bool, device: torch.device
) -> Tensor:
    """[P, N] bool: n of the c candidates of each image, at equal distances."""
    mask = Packer("legacy" if legacy else "fixed").candidates(images, torch.device("cpu")).clone()
    for part, (n, c) in zip(mask.split([image.partitions for image in images]), counts, strict=True):
        rank = torch.arange(c)
        part[part.clone()] = (rank + 1) * n // max(c, 1) > rank * n // max(c, 1)
    return mask.to(device)
