"""Token merging: in every block of the vision tower the most similar tokens become one.

Paper: Token Merging: Your ViT But Faster, arXiv:2210.09461.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.token_dropping.base import (
    MERGED,
    Budget,
    Kept,
    Probes,
    TokenDropper,
    Vision,
    check_budget,
    total_tokens,
)
from zoo.heads.token_dropping.gathering import first_patches, take
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.towers import Tower


class Match(NamedTuple):
    """Which tokens merge. Tokens at even places look for one at an odd place.

    Attributes:
        stay: [B, U] even tokens (counted among themselves) that stay alone.
        move: [B, r] even tokens that move.
        target: [B, r] odd tokens that they move into.
    """

    stay: Tensor
    move: Tensor
    target: Tensor


def match(metric: Tensor, r: int, *, class_token: bool = False) -> Match:
    """The r pairs of tokens with the most similar metric (cosine).

    Args:
        metric: [B, T, D].
        r: Tokens to remove; at most half of those that may merge.
        class_token: The first token never merges.
    """
    T = metric.shape[1]
    r = min(r, (T - class_token) // 2)
    metric = F.normalize(metric.float(), dim=-1)
    likeness = metric[:, ::2] @ metric[:, 1::2].mT
    if class_token:
        likeness[:, 0] = -torch.inf
    best, target = likeness.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    move, stay = order[:, :r], order[:, r:]
    if class_token:
        # It has to stay the first.
        stay = stay.sort(-1).values
    return Match(stay, move, target.gather(1, move))


def merge_sum(x: Tensor, match: Match) -> Tensor:
    """Sum of the tokens that merge: [B, T, C] -> [B, T - r, C], even tokens that stay and then the odd ones."""
    even, odd = x[:, ::2], x[:, 1::2]
    # A product with the assignment, not a scatter, so that sums have one order.
    member = (match.target[..., None] == torch.arange(odd.shape[1], device=x.device)).to(x.dtype)  # [B, r, T / 2]
    return torch.cat((take(even, match.stay), odd + member.mT @ take(even, match.move)), 1)


def merge_mean(x: Tensor, size: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that merge by size, [B, T, C], and sizes [B, T, 1] float32."""
    total = merge_sum(size, match)
    return (merge_sum(x.float() * size, match) / total).to(x.dtype), total


def unmerge(x: Tensor, match: Match) -> Tensor:
    """Give every token of before a merge what it became: [B, T - r, C] -> [B, T, C]."""
    alone = match.stay.shape[1]
    even, odd = x[:, :alone], x[:, alone:]
    out = x.new_empty(x.shape[0], x.shape[1] + match.move.shape[1], x.shape[2])
    out[:, 1::2] = odd
    for index, values in ((match.stay, even), (match.move, take(odd, match.target))):
        out.scatter_(1, 2 * index[..., None].expand_as(values), values)
    return out


def parse_r(layers: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """Tokens to remove in each block.

    Args:
        layers: Number of blocks.
        r: A number for all blocks; or (r, inflection), a line from r * (1 - inflection) to r * (1 + inflection); or a
            list, followed by zeros.
    """
    if isinstance(r, list):
        return r[:layers] + [0] * (layers - len(r))
    r, inflection = r if isinstance(r, tuple) else (r, 0)
    first = int(r * (1 - inflection))
    step = (2 * (r - first)) / max(layers - 1, 1)
    return [int(first + step * i) for i in range(layers)]


def schedule(layers: int, tokens: int, keep: int) -> list[int]:
    """Tokens to remove in each block, about alike, so that `keep` of `tokens` are left.

    Raises:
        ValueError: A block can remove half of its tokens only.
    """
    least = -(-tokens // 2**layers)
    if keep < least:
        raise ValueError(f"merging in {layers} blocks cannot leave {keep} of {tokens} tokens: {least} at least.")
    out, left = [], tokens
    for later in reversed(range(layers)):
        # An equal share, but enough that halving in all later blocks gets there.
        out.append(min(max(-((keep - left) // (later + 1)), left - keep * 2**later), left // 2))
        left -= out[-1]
    return out


class _Merging:
    """State of one run through the tower."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.size: Tensor | None = None
        self.first: Tensor | None = None


class ToMe(TokenDropper):
    """Token merging in the vision tower, before its features reach the projector.

    In each block, between attention and MLP, tokens with similar keys (the mean over heads) merge into their mean by
    size; the CLS token does not. Attention counts a merged token as often as it holds patches. The tower becomes
    faster too. The language model reads the tokens of each partition by their first patch; partitions are
    concatenated, without a crop and without newlines, so that the number of tokens is known ahead.

    Args:
        budget: Fraction, or number, of the tokens of each partition that are left.
        r: Tokens to remove in each block instead, see `parse_r`.

    Raises:
        ValueError: Both, or a budget for each image: all partitions of a call merge alike.
    """

    name: ClassVar[str] = "tome"

    def __init__(
        self, budget: Budget | None = None, *, r: int | tuple[int, float] | Sequence[int] | None = None
    ) -> None:
        if r is not None and budget is not None:
            raise ValueError(f"give a budget or r, not both; got budget={budget!r} and r={r!r}.")
        self.budget, self.r = check_budget(budget, self.default_budget), r
        if isinstance(self.budget, list):
            raise ValueError("ToMe merges all partitions of a call alike: give one budget, not a sequence.")
        self._state = _Merging()

    @property
    def is_identity(self) -> bool:
        """Whether nothing merges."""
        return self.r is None and isinstance(self.budget, float) and self.budget == 1

    def probes(self, tower: Tower) -> Probes:
        """None; checks the tower.

        Raises:
            NotImplementedError: Features of several layers, or an attention implementation without additive masks.
        """
        if len(tower.feature_layers) > 1:
            raise NotImplementedError(
                f"tokens merge from block to block: ToMe needs one feature layer, got {tower.feature_layers}."
            )
        implementation = tower.module.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise NotImplementedError(
                f"ToMe adds the logarithm of sizes to attention: the vision tower needs attn_implementation 'sdpa' or "
                f"'eager', got {implementation!r}."
            )
        self._removed = self._schedule(tower)
        return Probes()

    def _schedule(self, tower: Tower) -> list[int]:
        blocks, patches = tower.feature_layers[0], tower.side**2
        if self.r is None:
            return schedule(blocks, patches, total_tokens(self.budget, patches))
        removed, left = [], patches
        for r in parse_r(blocks, self.r):
            removed.append(min(r, left // 2))
            left -= removed[-1]
        return removed

    def lengths(self, images: list[ImageGrid], packer: Packer) -> list[int]:
        """Tokens of each image."""
        return [image.partitions * (image.patches - sum(self._removed)) for image in images]

    @contextlib.contextmanager
    def inside(self, tower: Tower) -> Iterator[None]:
        """The blocks up to the features, merging."""
        self.probes(tower)
        self._state, saved, hooks = _Merging(), [], []
        try:
            for block, r in zip(tower.layers, self._removed, strict=False):
                saved.append((block, block.__dict__.get("forward")))
                hooks.append(block.self_attn.k_proj.register_forward_hook(self._keep_key))
                block.__dict__["forward"] = functools.partial(self._block, block, r, tower)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block, forward in saved:
                block.__dict__.pop("forward")
                if forward is not None:
                    block.__dict__["forward"] = forward

    def _keep_key(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self._state.key = out

    def _block(
        self, block: nn.Module, r: int, tower: Tower, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        state = self._state
        if state.size is not None:
            attention_mask = state.size.log().to(hidden_states.dtype).mT[:, None]  # [P, 1, 1, T]
        out = block.self_attn(block.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)[0]
        hidden_states = self._merge(hidden_states + out, r, tower)
        return hidden_states + block.mlp(block.layer_norm2(hidden_states))

    def _merge(self, x: Tensor, r: int, tower: Tower) -> Tensor:
        state = self._state
        if state.first is None:
            place = torch.arange(x.shape[1], device=x.device) - tower.prefix
            state.first = place.expand(x.shape[:2])
        if not r:
            return x
        size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if state.size is None else state.size
        # [P, T, C] -> [P, T, D], mean over heads
        metric = state.key.unflatten(-1, (tower.heads, -1)).float().mean(-2)
        pairs = match(metric, r, class_token=bool(tower.prefix))
        even, odd = state.first[:, ::2], state.first[:, 1::2]
        odd = odd.scatter_reduce(1, pairs.target, even.gather(1, pairs.move), "amin")
        state.first = torch.cat((even.gather(1, pairs.stay), odd), 1)
        x, state.size = merge_mean(x, size, pairs)
        return x

    def reduce(self, vision: Vision, packer: Packer) -> Kept:
        """Tokens of each partition by their first patch."""
        if packer.newline != "drop":
            raise NotImplementedError(f"ToMe has no rows to end: use newline='drop', got {packer.newline!r}.")
        state, self._state = self._state, _Merging()
        first, order = state.first[:, vision.prefix :].sort(1)  # [P, K]
        source = first + first_patches(tuple(vision.images), first.device)
        if state.size is not None:
            alone = state.size[:, vision.prefix :, 0].gather(1, order) == 1
            source = torch.where(alone, source, MERGED)
        lengths = self.lengths(vision.images, packer)
        return Kept(take(vision.patches, order).flatten(0, 1), lengths, source.flatten())
