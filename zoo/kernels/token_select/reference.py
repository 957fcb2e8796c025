"""Choosing visual tokens in plain PyTorch: the definition, the CPU path and the test oracle.

An image is a whole image and k sub-images, its partitions, of N patches each. Partitions of all images of a call are
rows of one tensor; there are P of them and I images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SelectionPlan(NamedTuple):
    """Everything of a selection that follows from the sizes of the images, as int32 tensors on their device.

    K is the largest number of sub-images of an image; a slot is a partition's place in its image, 0 for the whole
    image and from 1 for the sub-images.

    Attributes:
        image: [P] image of each partition.
        slot: [P] slot of each partition.
        whole: [I] row of each image's slot 0.
        region: [I, N] slot that a patch of the whole image lies on, 0 for none.
        base: [I] tokens of the whole image.
        rest: [I] tokens of all sub-images together.
        hits: [I] how the content of a sub-image is measured: n > 0, by the number of its patches among the n first
            ones of the whole image; 0, by the sum of their scores; -1, every sub-image alike.
        capacity: [I, K] most tokens of each sub-image, 0 where there is none.
        candidates: [P, N] bool patches to choose from, None for all.
        exact: Round budgets by largest remainders and pass on what exceeds a capacity, so that they sum to `rest`;
            otherwise both are lost.
    """

    image: Tensor
    slot: Tensor
    whole: Tensor
    region: Tensor
    base: Tensor
    rest: Tensor
    hits: Tensor
    capacity: Tensor
    candidates: Tensor | None
    exact: bool


def cls_attention(q: Tensor, k: Tensor, heads: int, scale: float) -> Tensor:
    """[B, C], [B, T, C] -> [B, M, T], softmax over T of scale * q . k for each head, at least in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype).unflatten(-1, (heads, -1)), k.to(dtype).unflatten(-1, (heads, -1))  # [B, M, D], [B, T, M, D]
    return (torch.einsum("bmd,btmd->bmt", q, k) * scale).softmax(-1)


def cls_attention_backward(
    grad: Tensor, row: Tensor, q: Tensor, k: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `cls_attention` with respect to q and k, given its output `row`."""
    logits = (row * (grad - (grad * row).sum(-1, keepdim=True))) * scale  # [B, M, T]
    q_heads, k_heads = (x.to(row.dtype).unflatten(-1, (heads, -1)) for x in (q, k))
    dq = torch.einsum("bmt,btmd->bmd", logits, k_heads).flatten(-2)
    dk = torch.einsum("bmt,bmd->btmd", logits, q_heads).flatten(-2)
    return dq.to(q.dtype), dk.to(k.dtype)


def top_mask(scores: Tensor, count: Tensor) -> Tensor:
    """[R, N], [R] -> [R, N] bool: the `count` first places of each row; of equal scores, the earlier place."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < count[:, None]


def content(first: Tensor, plan: SelectionPlan) -> Tensor:
    """[I, K] float32: how much of the whole image's attention lies on each sub-image."""
    scores = first[plan.whole.long()]  # [I, N]
    hits = top_mask(scores, plan.hits)
    weight = torch.where(plan.hits[:, None] > 0, hits.to(scores.dtype), scores)
    slots = torch.arange(1, plan.capacity.shape[1] + 1, device=first.device)
    on_slot = plan.region[:, None] == slots[:, None]  # [I, K, N]
    weight = (weight[:, None] * on_slot).sum(-1).float()
    # Without any content, or if told so, sub-images are alike.
    alike = (plan.hits < 0) | (weight.sum(-1) == 0)
    return torch.where(alike[:, None], (plan.capacity > 0).to(weight.dtype), weight)


def truncated_budgets(weight: Tensor, plan: SelectionPlan) -> Tensor:
    """[I, K] int32 share of `rest` by content, cut to an integer and to the capacity; float32 as published."""
    total = weight.sum(-1, keepdim=True)
    share = weight / torch.where(total == 0, 1, total) * plan.rest[:, None].to(weight.dtype)
    return torch.minimum(share.int(), plan.capacity)


def exact_budgets(weight: Tensor, plan: SelectionPlan) -> Tensor:
    """[I, K] int32 that sum to `rest`: full sub-images pass on what they cannot take, then largest remainders."""
    capacity, rest = plan.capacity.to(weight.dtype), plan.rest[:, None].to(weight.dtype)
    full = capacity == 0

    def quota() -> tuple[Tensor, Tensor]:
        left = rest - (full * capacity).sum(-1, keepdim=True)
        share = torch.where(full, 0, weight)
        # What is left goes to sub-images without content once all others are full.
        share = torch.where(share.sum(-1, keepdim=True) == 0, (~full).to(share.dtype), share)
        total = share.sum(-1, keepdim=True)
        return left * share / torch.where(total == 0, 1, total), left

    for _ in range(capacity.shape[1]):
        full = full | (quota()[0] >= capacity)
    share, left = quota()
    floor = share.floor()
    extra = top_mask(torch.where(full, -1, share - floor), (left - floor.sum(-1, keepdim=True))[:, 0])
    return torch.where(full, capacity, floor + extra).int()


def token_select(first: Tensor, scores: Tensor, plan: SelectionPlan) -> tuple[Tensor, Tensor]:
    """Patches to keep [P, N] bool and how many of each partition [P] int32; see `op.token_select`."""
    weight = content(first, plan)
    shares = exact_budgets(weight, plan) if plan.exact else truncated_budgets(weight, plan)
    budgets = torch.cat((plan.base[:, None], shares), 1)[plan.image.long(), plan.slot.long()]  # [P]
    if plan.candidates is not None:
        scores = scores.masked_fill(~plan.candidates, -torch.inf)
        budgets = torch.minimum(budgets, plan.candidates.sum(-1, dtype=torch.int32))
    return top_mask(scores, budgets), budgets
