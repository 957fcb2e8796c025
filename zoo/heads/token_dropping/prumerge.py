"""PruMerge: patches whose CLS attention stands out, each joined by the tokens that are most like it.

Paper: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv:2403.15388.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.token_dropping.base import (
    MERGED,
    Budget,
    Kept,
    Probes,
    TokenDropper,
    Vision,
    check_budget,
    each_budget,
)
from zoo.heads.token_dropping.gathering import as_tensor, first_patches, leading_rows, take
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.towers import Tower
from zoo.kernels.token_select import cls_attention

NEIGHBOURS = 32


class PruMerge(TokenDropper):
    """PruMerge and PruMerge+ without training.

    A partition keeps as many patches as there are outliers in the attention of its CLS token: values above the third
    quartile by more than 1.5 interquartile ranges, in the last layer taken as one head. These come in the order of
    falling attention, each with its 32 nearest tokens added to it, weighted by their attention; then one token for the
    weighted sum of all that are dropped. Partitions are concatenated, without a crop and without newlines, as the
    method is run on LLaVA-NeXT. The number of tokens of adaptive settings is read back from the device once.

    Args:
        budget: None for the adaptive number; or a fraction of each partition's patches, to which the token of dropped
            ones is added, as published; or a number of tokens of an image, that token included; or one of these for
            each image.
        plus: PruMerge+: add patches at regular distances, about three for each outlier.
    """

    name: ClassVar[str] = "prumerge"
    default_budget: ClassVar[float | None] = None

    def __init__(self, budget: Budget | None = None, *, plus: bool = False) -> None:
        self.budget, self.plus = check_budget(budget, None), plus

    @property
    def is_identity(self) -> bool:
        """Whether the budget is everything."""
        return isinstance(self.budget, float) and self.budget == 1

    def probes(self, tower: Tower) -> Probes:
        """Queries and keys of the last layer.

        Raises:
            NotImplementedError: A tower without a CLS token.
        """
        if not tower.prefix:
            raise NotImplementedError(
                "PruMerge reads the CLS token's attention, which this tower lacks: use 'hired' or 'visionzip'."
            )
        self._layer = len(tower.layers) - 1
        return Probes(queries=(self._layer,), keys=(self._layer,))

    def _fixed(self, images: list[ImageGrid]) -> list[int] | None:
        """Patches to keep of each partition, or None if they are counted."""
        if self.budget is None:
            return None
        counts = []
        for image, budget in zip(images, each_budget(self.budget, len(images)), strict=True):
            if isinstance(budget, float):
                count = int(image.patches * budget)
            else:
                count = min(budget // image.partitions - 1, image.patches)
            if count < 1:
                raise ValueError(
                    f"budget={budget!r} leaves no patch to an image of {image.partitions} partitions of "
                    f"{image.patches} patches, each of which needs one, and a token for what is dropped."
                )
            counts += [count] * image.partitions
        return counts

    def lengths(self, images: list[ImageGrid], packer: Packer) -> list[int] | None:
        """Tokens of each image with a fixed budget."""
        counts = self._fixed(images)
        if counts is None or self.plus:
            return None
        return _per_image(images, counts)

    def reduce(self, vision: Vision, packer: Packer) -> Kept:
        """Choose, merge and concatenate."""
        if packer.newline != "drop":
            raise NotImplementedError(f"PruMerge has no rows to end: use newline='drop', got {packer.newline!r}.")
        keys, fixed = vision.keys[self._layer], self._fixed(vision.images)
        attention = cls_attention(vision.queries[self._layer][:, 0], keys, 1)[:, 0, vision.prefix :]  # [P, N]
        N, device = attention.shape[1], attention.device
        if fixed is None:
            outliers = outlier_counts(attention)
            count = _cut(N, device)[outliers]
        else:
            count = outliers = as_tensor(tuple(fixed), device)
        order, kept = _order(attention, count, _distance(N, device)[outliers] if self.plus else None)
        counts = fixed if fixed is not None and not self.plus else kept.sum(1).tolist()
        index = order[:, : max(counts)]  # [P, K]
        features = merge_neighbours(vision.patches, keys[:, vision.prefix :], attention, index)
        rest = torch.einsum("pn,pnc->pc", attention * ~kept, vision.patches.float())
        tokens = torch.cat((features, rest[:, None].to(features.dtype)), 1)  # [P, K + 1, C]
        first = first_patches(tuple(vision.images), device)
        source = torch.cat((index + first, torch.full_like(first, MERGED)), 1)
        rows = leading_rows(tuple(counts), tokens.shape[1], device)
        return Kept(tokens.flatten(0, 1)[rows], _per_image(vision.images, counts), source.flatten()[rows])


def _per_image(images: list[ImageGrid], counts: list[int]) -> list[int]:
    parts = torch.tensor(counts).split([image.partitions for image in images])
    return [int(part.sum()) + len(part) for part in parts]


def outlier_counts(attention: Tensor) -> Tensor:
    """[P, N] -> [P] int64, values above the third quartile by more than 1.5 interquartile ranges."""
    low, high = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device), dim=1)
    return (attention > (high + 1.5 * (high - low))[:, None]).sum(1)


@functools.lru_cache(16)
def _cut(patches: int, device: torch.device) -> Tensor:
    """[N + 1] patches kept for a number of outliers: int(N * ratio), which may lose one as published; at least one."""
    return torch.tensor([max(int(patches * (n / patches)), 1) for n in range(patches + 1)], device=device)


@functools.lru_cache(16)
def _distance(patches: int, device: torch.device) -> Tensor:
    """[N + 1] distance of the added patches for a number of outliers."""
    ratios = [max(n, 1) / patches for n in range(patches + 1)]
    return torch.tensor([max(int(int(1 / ratio) / 3), 1) for ratio in ratios], device=device)


def _order(attention: Tensor, count: Tensor, distance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Patches in the order in which they are kept [P, N], and which are kept [P, N] bool."""
    N = attention.shape[1]
    rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = rank < count[:, None]
    if distance is None:
        return rank.argsort(dim=1), kept
    place = torch.arange(N, device=attention.device)
    added = (place % distance[:, None] == 0) & (place < N - 1) & ~kept
    # First those with high attention, then the added ones in reading order.
    key = torch.where(kept, rank, torch.where(added, N + place, 2 * N + place))
    return key.argsort(dim=1), kept | added


def merge_neighbours(features: Tensor, keys: Tensor, attention: Tensor, index: Tensor) -> Tensor:
    """Kept tokens, each plus the attention-weighted sum of those with the most similar keys (cosine).

    Args:
        features: [P, N, C].
        keys: [P, N, D].
        attention: [P, N] weights.
        index: [P, K] kept tokens.

    Returns:
        [P, K, C].
    """
    keys = F.normalize(keys.float(), dim=-1)
    likeness = take(keys, index) @ keys.mT  # [P, K, N]
    likeness = likeness.scatter(2, index[..., None], -torch.inf)
    nearest = likeness.topk(min(NEIGHBOURS, likeness.shape[2] - 1), dim=2).indices
    weight = attention[:, None].expand_as(likeness).gather(2, nearest)
    weight = torch.zeros_like(likeness).scatter(2, nearest, weight)
    return (take(features, index) + weight @ features.float()).to(features.dtype)
