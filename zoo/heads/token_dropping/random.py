"""Random patches: what any choice has to beat."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from zoo.heads.token_dropping.base import Budget, Vision
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.spatial import BlindSelector


class Random(BlindSelector):
    """Keeps patches drawn uniformly from those of an image that show no padding.

    Args:
        budget: Fraction of these patches, a number of patches, or one of these for each image.
        seed: Seed of the draw, which is then the same in every call; None draws from torch's generator.
    """

    name: ClassVar[str] = "random"

    def __init__(self, budget: Budget | None = None, *, seed: int | None = 0) -> None:
        super().__init__(budget)
        self.seed = seed

    def select(self, vision: Vision, packer: Packer) -> Tensor:
        """Patches with the largest random numbers."""
        device = vision.features.device
        if self.seed is not None:
            return self.plan(vision.images, packer, device)
        draw = torch.rand(vision.features.shape[0], vision.images[0].patches, device=device)
        return _largest(draw, vision.images, self.counts(vision.images, packer), packer)

    def plan(self, images: list[ImageGrid], packer: Packer, device: torch.device) -> Tensor | None:
        """The mask of a seed."""
        if self.seed is None:
            return None
        return _seeded(tuple(images), tuple(self.counts(images, packer)), packer.legacy, self.seed, device)


def _largest(draw: Tensor, images: list[ImageGrid], counts: list[tuple[int, int]], packer: Packer) -> Tensor:
    """[P, N] bool: the patches of each image with the largest numbers of `draw`, none that shows padding."""
    draw = draw.masked_fill(~packer.candidates(images, draw.device), -1)
    masks = []
    for image, (count, _) in zip(draw.split([image.partitions for image in images]), counts, strict=True):
        kept = image.flatten().topk(count).indices
        masks.append(torch.zeros(image.numel(), dtype=torch.bool, device=draw.device).index_fill_(0, kept, True))
    return torch.cat(masks).view_as(draw)


@functools.lru_cache(64)
def _seeded(
    images: tuple[ImageGrid, ...], counts: tuple[tuple[int, int], ...], legacy: bool, seed: int, device: torch.device
) -> Tensor:
    # Drawn on the host, so that a seed means the same everywhere.
    shape = sum(image.partitions for image in images), images[0].patches
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return _largest(draw, list(images), list(counts), Packer("legacy" if legacy else "fixed")).to(device)
