"""Random patches: what any choice has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from zoo.heads.token_dropping.base import Budget, Vision
from zoo.heads.token_dropping.packing import Packer
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
        device, generator = vision.features.device, None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        # Drawn on the host, so that a seed means the same everywhere.
        draw = torch.rand(vision.features.shape[0], vision.images[0].patches, generator=generator)
        draw = draw.masked_fill(~packer.candidates(vision.images, torch.device("cpu")), -1)
        masks = []
        for image, (count, _) in zip(vision.split(draw), self.counts(vision.images, packer), strict=True):
            flat = torch.zeros(image.numel(), dtype=torch.bool)
            flat[image.flatten().topk(count).indices] = True
            masks.append(flat.view_as(image))
        return torch.cat(masks).to(device)
