"""HiRED: budgets of sub-images by the first layer's CLS attention, tokens by that of the feature layer.

Paper: HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models,
arXiv:2408.10945.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.heads.token_dropping.base import Budget, Probes, TokenSelector, Vision, check_budget, each_budget, total_tokens
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.spatial import regular_patches
from zoo.heads.token_dropping.towers import Tower
from zoo.kernels.token_select import SelectionPlan, token_select

ALLOCATIONS = ("official", "paper", "paper_exact", "uniform")


class Rule(NamedTuple):
    """What budgets follow from besides the images.

    Attributes:
        allocation: How the budget of sub-images is shared, of `ALLOCATIONS`.
        alpha: Share of the whole image.
        exact: Whether counts are exact.
    """

    allocation: str
    alpha: float
    exact: bool


class Hired(TokenSelector):
    """HiRED as a token selector.

    Args:
        budget: Fraction of the tokens of all partitions, padding included (of those that show no padding if `exact`);
            or a number of tokens; or one of these for each image.
        allocation: How the sub-images share what the whole image leaves.
            "official", as in the published code: by how many of the N * (1 - alpha) most attended patches of the whole
            image fall in the i-th of k equal runs of its patches, in reading order. These are horizontal strips, also
            where the sub-images lie side by side.
            "paper": by the attention in the part of the whole image that lies under the sub-image.
            "paper_exact": the same, with the padding and the aspect ratio of the sub-images taken into account.
            "uniform": alike.
        alpha: Share of the whole image in the budget, 0 to 1.
        exact: Keep exactly the budget: padding is left out before tokens are chosen, shares are rounded by largest
            remainders, and what a sub-image cannot take goes to the others. The number of tokens then follows from
            the size of an image, without a read back from the device. As published (False) the budget is a bound.
        budget_layer: Vision layer of the content scores.
        select_layer: Vision layer of the importance scores; the block that makes the features by default.
        spatial_budget: Fraction of the patches of each partition that a regular grid adds to the selection.
    """

    name: ClassVar[str] = "hired"

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        allocation: str = "official",
        alpha: float = 0.5,
        exact: bool = False,
        budget_layer: int = 0,
        select_layer: int | None = None,
        spatial_budget: float = 0.0,
    ) -> None:
        self.budget = check_budget(budget, self.default_budget)
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {ALLOCATIONS}, got {allocation!r}.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be a share in [0, 1], got {alpha}.")
        if not 0 <= spatial_budget < 1:
            raise ValueError(f"spatial_budget must be a fraction in [0, 1), got {spatial_budget}.")
        if exact and spatial_budget:
            raise ValueError("exact counts and spatial_budget exclude each other: the latter exceeds the budget.")
        self.rule = Rule(allocation, float(alpha), exact)
        self.budget_layer, self.select_layer, self.spatial_budget = budget_layer, select_layer, spatial_budget

    @property
    def is_identity(self) -> bool:
        """Whether the budget is everything."""
        budgets = self.budget if isinstance(self.budget, list) else [self.budget]
        return all(map(_is_all, budgets))

    def probes(self, tower: Tower) -> Probes:
        """Scores of the two layers."""
        self._layers = self._resolve(tower)
        return Probes(scores=tuple(dict.fromkeys(self._layers)))

    def _resolve(self, tower: Tower) -> tuple[int, int]:
        select = tower.last_feature_block if self.select_layer is None else tower.resolve(self.select_layer)
        return tower.resolve(self.budget_layer), select

    def select(self, vision: Vision, packer: Packer) -> Tensor:
        """Tokens by HiRED, and those of the regular grid."""
        plan = self.plan(vision.images, packer, vision.features.device)
        first, scores = (vision.scores[layer] for layer in self._layers)
        mask, _ = token_select(first, scores, plan)
        if self.spatial_budget:
            mask = mask | regular_patches(mask.shape[1], self.spatial_budget, mask.device)
        return mask

    def plan(self, images: list[ImageGrid], packer: Packer, device: torch.device) -> SelectionPlan:
        """Everything that follows from the sizes of the images."""
        return _plan(tuple(images), tuple(each_budget(self.budget, len(images))), self.rule, packer.legacy, device)

    def lengths(self, images: list[ImageGrid], packer: Packer) -> list[int] | None:
        """Number of tokens of each image with exact counts."""
        if not self.rule.exact or packer.newline == "nonempty_rows":
            return None
        plan = self.plan(images, packer, torch.device("cpu"))
        newlines = packer.newline_counts(images)
        return [sum(counts) for counts in zip(plan.base.tolist(), plan.rest.tolist(), newlines, strict=True)]


def _totals(image: ImageGrid, budget: float | int, rule: Rule, capacity: list[int]) -> tuple[int, int]:
    """Tokens of the whole image and of the sub-images together."""
    tokens = image.patches + sum(capacity)
    total = total_tokens(budget, tokens)
    if not capacity:
        return total, 0
    if _is_all(budget):
        # Without exact counts, more than there is for each sub-image, so that rounding keeps no patch back.
        return image.patches, sum(capacity) if rule.exact else len(capacity) * (image.patches + 1)
    base = min(int(total * rule.alpha), image.patches)
    rest = min(total - base, sum(capacity))
    # Exactly: what the sub-images cannot take goes back to the whole image.
    return (total - rest if rule.exact else base), rest


def _is_all(budget: float | int) -> bool:
    return isinstance(budget, float) and budget == 1


def _hits(image: ImageGrid, budget: float | int, rule: Rule) -> int:
    if _is_all(budget):
        return -1
    if rule.allocation == "official":
        # Nothing to count at alpha = 1: sub-images are alike.
        return int(image.patches * (1 - rule.alpha)) or -1
    return -1 if rule.allocation == "uniform" else 0


def regions(image: ImageGrid, allocation: str) -> Tensor:
    """[N] int32: number, from 1, of the sub-image that each patch of the whole image belongs to; 0 for none."""
    (gh, gw), S = image.grid, image.side
    if not gh * gw:
        return torch.zeros(S * S, dtype=torch.int32)
    if allocation in ("official", "uniform"):
        return (1 + torch.arange(S * S) * (gh * gw) // (S * S)).int()
    y, x = torch.arange(S)[:, None].expand(S, S), torch.arange(S)[None].expand(S, S)
    if allocation == "paper":
        return (1 + y * gh // S * gw + x * gw // S).flatten().int()
    height, width = resized(image)
    # In pixels of the canvas, twice to stay with integers at the centres of patches.
    top, left = (gh * image.pixels - height) // 2, (gw * image.pixels - width) // 2
    row = (top + (y + 0.5) / S * height).div(image.pixels, rounding_mode="floor").clamp(0, gh - 1)
    column = (left + (x + 0.5) / S * width).div(image.pixels, rounding_mode="floor").clamp(0, gw - 1)
    return (1 + row * gw + column).flatten().int()


def resized(image: ImageGrid) -> tuple[int, int]:
    """(H, W) in pixels to which an image is resized before it is padded and cut into sub-images."""
    (gh, gw), (H, W) = image.grid, image.size
    target = gh * image.pixels, gw * image.pixels
    by_height, by_width = target[0] / H, target[1] / W
    if by_width < by_height:
        return min(math.ceil(H * by_width), target[0]), target[1]
    return target[0], min(math.ceil(W * by_height), target[1])


@functools.lru_cache(64)
def _plan(
    images: tuple[ImageGrid, ...], each: tuple[float | int, ...], rule: Rule, legacy: bool, device: torch.device
) -> SelectionPlan:
    packer = Packer("legacy" if legacy else "fixed")
    candidates = packer.candidates(images, torch.device("cpu"))
    most = max(max(image.partitions for image in images) - 1, 1)
    rows = {name: [] for name in ("image", "slot", "whole", "region", "base", "rest", "hits", "capacity")}
    first = 0
    for i, (image, budget) in enumerate(zip(images, each, strict=True)):
        capacity = [image.patches] * (image.partitions - 1)
        if rule.exact or image.shrunk:
            capacity = candidates[first + 1 : first + image.partitions].sum(-1).tolist()
        base, rest = _totals(image, budget, rule, capacity)
        rows["image"] += [i] * image.partitions
        rows["slot"] += range(image.partitions)
        rows["whole"].append(first)
        rows["region"].append(regions(image, rule.allocation).tolist())
        rows["base"].append(base)
        rows["rest"].append(rest)
        rows["hits"].append(_hits(image, budget, rule))
        rows["capacity"].append(capacity + [0] * (most - len(capacity)))
        first += image.partitions
    tensors = {name: torch.tensor(values, dtype=torch.int32).to(device) for name, values in rows.items()}
    restrict = rule.exact or any(image.shrunk for image in images)
    return SelectionPlan(**tensors, candidates=candidates.to(device) if restrict else None, exact=rule.exact)
