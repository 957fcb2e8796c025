"""VisionZip: the patches with the most CLS attention, and what is left of the others merged by the likeness of keys.

Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv:2412.04467.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.token_dropping.base import (
    CLS,
    MERGED,
    Budget,
    Kept,
    Probes,
    TokenDropper,
    Vision,
    check_budget,
    each_budget,
    total_tokens,
)
from zoo.heads.token_dropping.gathering import first_patches, take
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.towers import Tower


class Counts(NamedTuple):
    """Tokens of one partition.

    Attributes:
        dominant: Tokens kept as they are: patches, and the CLS token where there is one.
        contextual: Tokens made by merging.
    """

    dominant: int
    contextual: int


class VisionZip(TokenDropper):
    """VisionZip without training.

    Every partition gets the same number of tokens. The language model reads those of the whole image (CLS token,
    patches in reading order, contextual tokens), then the sub-images' patches in the order of their mosaic, their CLS
    tokens and their contextual tokens. Padding is not cropped, as published, and there are no newlines: the number of
    tokens follows from the budget, without a read back from the device.

    Args:
        budget: Fraction of the patches of all partitions, padding included; or a number of tokens of an image, cut to
            a multiple of its partitions; or one of these for each image. The published 64 of 576 by default.
        contextual: Contextual tokens of a partition: an int, or a float for their share in the budget.

    Raises:
        ValueError: A share outside [0, 1), a negative number. Calls raise it for budgets below two tokens a partition.
    """

    name: ClassVar[str] = "visionzip"
    default_budget: ClassVar[float | None] = 1 / 9

    def __init__(self, budget: Budget | None = None, *, contextual: int | float = 10 / 64) -> None:
        self.budget = check_budget(budget, self.default_budget)
        if contextual < 0 or (isinstance(contextual, float) and contextual >= 1):
            raise ValueError(
                f"contextual must be a number of tokens or a share of the budget in [0, 1), got {contextual}."
            )
        self.contextual = contextual

    @property
    def is_identity(self) -> bool:
        """Whether the budget is everything."""
        return isinstance(self.budget, float) and self.budget == 1

    def probes(self, tower: Tower) -> Probes:
        """Scores and keys of the block that makes the features."""
        self._layer, self._prefix = tower.last_feature_block, tower.prefix
        return Probes(scores=(self._layer,), keys=(self._layer,))

    def counts(self, image: ImageGrid, budget: float | int) -> Counts:
        """Tokens of each partition of an image."""
        tokens = total_tokens(budget, image.partitions * image.patches) // image.partitions
        contextual = round(tokens * self.contextual) if isinstance(self.contextual, float) else self.contextual
        dominant = tokens - contextual
        if dominant <= self._prefix or contextual > image.patches - (dominant - self._prefix):
            raise ValueError(
                f"budget={budget!r} gives {tokens} tokens to each of {image.partitions} partitions, {contextual} of "
                "them contextual; VisionZip needs a patch beside these and the CLS token: raise the budget or lower "
                "contextual."
            )
        return Counts(dominant, contextual)

    def lengths(self, images: list[ImageGrid], packer: Packer) -> list[int]:
        """Tokens of each image."""
        each = zip(images, each_budget(self.budget, len(images)), strict=True)
        return [image.partitions * sum(self.counts(image, budget)) for image, budget in each]

    def reduce(self, vision: Vision, packer: Packer) -> Kept:
        """Dominant and contextual tokens of all images; images with different counts go one by one."""
        if packer.newline != "drop":
            raise NotImplementedError(f"VisionZip has no rows to end: use newline='drop', got {packer.newline!r}.")
        images = vision.images
        counts = [self.counts(*each) for each in zip(images, each_budget(self.budget, len(images)), strict=True)]
        parts = (vision.features, vision.scores[self._layer], vision.keys[self._layer])
        if len(set(counts)) == 1:
            features, source = self._reduce(*parts, vision, images, counts[0], packer.legacy)
        else:
            each = zip(*(vision.split(x) for x in parts), images, counts, strict=True)
            out = [self._reduce(*xs, vision, [image], count, packer.legacy) for *xs, image, count in each]
            features, source = (torch.cat(x) for x in zip(*out, strict=True))
        lengths = [image.partitions * sum(count) for image, count in zip(images, counts, strict=True)]
        return Kept(features, lengths, source)

    def _reduce(
        self, features: Tensor, scores: Tensor, keys: Tensor, vision: Vision, images: Sequence[ImageGrid],
        counts: Counts, legacy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        prefix, kept = vision.prefix, counts.dominant - vision.prefix
        # Of equal scores the earlier patch is kept.
        order = scores.argsort(dim=-1, descending=True, stable=True)  # [P, N]
        dominant, rest = (x.sort(-1).values for x in order.tensor_split([kept], -1))
        # [P, T, C] -> [P, N, D], mean over heads
        metric = keys[:, prefix:].unflatten(-1, (vision.heads, -1)).float().mean(-2)
        patches = features[:, prefix:]
        contextual = merge_rest(take(patches, rest), take(metric, rest), counts.contextual)
        tokens = torch.cat((features[:, :prefix], take(patches, dominant), contextual), 1)  # [P, K, C]
        table = _table(tuple(images), prefix, counts.contextual, legacy, features.device)
        place = torch.cat((table.cls, table.patch.gather(1, dominant), table.contextual), 1)  # [P, K]
        source = torch.cat(
            (table.cls.new_full(table.cls.shape, CLS), dominant + first_patches(tuple(images), dominant.device),
             table.cls.new_full(table.contextual.shape, MERGED)), 1,
        )  # fmt: skip
        sequence = place.flatten().argsort()
        return tokens.flatten(0, 1)[sequence], source.flatten()[sequence]


def merge_rest(features: Tensor, metric: Tensor, count: int) -> Tensor:
    """Contextual tokens: evenly spaced targets, each plus the mean of the tokens that are most like it.

    Args:
        features: [P, R, C] tokens that are not kept, in reading order.
        metric: [P, R, D] what their likeness (cosine) is measured on.
        count: Number of targets.

    Returns:
        [P, count, C].
    """
    if not count:
        return features[:, :0]
    targets, others = _targets(features.shape[1], count, features.device)
    metric = F.normalize(metric, dim=-1)
    nearest = (metric[:, others] @ metric[:, targets].mT).argmax(-1)  # [P, R - count]
    member = (nearest[..., None] == torch.arange(count, device=nearest.device)).float()  # [P, R - count, count]
    mean = member.mT @ features[:, others].float() / member.sum(1).clamp(min=1)[..., None]
    return (features[:, targets] + mean).to(features.dtype)


@functools.lru_cache(64)
def _targets(rest: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of targets, and of all others."""
    target = torch.zeros(rest, dtype=torch.bool)
    target[:: max(1, rest // count)] = True
    target &= target.cumsum(0) <= count
    return target.nonzero()[:, 0].to(device), (~target).nonzero()[:, 0].to(device)


class Table(NamedTuple):
    """Places of tokens in the order of the language model, growing but with gaps.

    Attributes:
        patch: [P, N] of patches.
        cls: [P, prefix] of CLS tokens.
        contextual: [P, K] of contextual tokens.
    """

    patch: Tensor
    cls: Tensor
    contextual: Tensor


@functools.lru_cache(64)
def _table(images: tuple[ImageGrid, ...], prefix: int, contextual: int, legacy: bool, device: torch.device) -> Table:
    N, start, rows = images[0].patches, 0, []
    for image in images:
        subs = image.partitions - 1
        # Sections: CLS, patches and contextual tokens of the whole image, then those of the sub-images.
        bounds = torch.tensor([0, prefix, N, contextual, subs * N, subs * prefix]).cumsum(0) + start
        patch = torch.empty(image.partitions * N, dtype=torch.int64)
        patch[:N] = bounds[1] + torch.arange(N)
        patch[image.mosaic(legacy=legacy, crop=False).flatten()] = bounds[3] + torch.arange(subs * N)
        sections = [
            torch.cat((bounds[a] + torch.arange(n), bounds[b] + torch.arange(subs * n))).view(image.partitions, n)
            for a, b, n in ((0, 4, prefix), (2, 5, contextual))
        ]
        rows.append(Table(patch.view(-1, N), *sections))
        start = int(bounds[5]) + subs * contextual
    return Table(*(torch.cat(x).to(device) for x in zip(*rows, strict=True)))
