"""Triton kernels that choose visual tokens, then their launchers.

Both are far below a microsecond of work on the memory side (a CLS row reads the keys of a layer once, 47 MB for forty
partitions of a ViT-L; a selection reads some kilobytes); what counts is that they are one launch each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.token_select.reference import SelectionPlan

LOWEST = tl.constexpr(-(2**31))
# Elements of the keys that a program holds at a time.
TILE = 16384


@triton.jit
def _cls_kernel(
    q_ptr, k_ptr, out_ptr, T, stride_qb, stride_kb, stride_kt, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, m, :] = softmax over T of scale * q[b, m] . k[b, :, m]; one program an image and head.

    Reads T * D keys and does 2 * T * D FLOPs. All logits of a row stay in registers while channels pass by.
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_qb + head * D
    k_ptr += batch * stride_kb + head * D
    logits = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        channel = start + d
        q = tl.load(q_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
        mask = (t < T)[:, None] & (channel < D)[None, :]
        k = tl.load(k_ptr + t[:, None] * stride_kt + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        logits += tl.sum(k * q[None, :], 1)
    logits = tl.where(t < T, logits * scale, -float("inf"))
    row = tl.exp(logits - tl.max(logits, 0))
    tl.store(out_ptr + (batch * HEADS + head) * T + t, row / tl.sum(row, 0), mask=t < T)


@triton.jit
def _top(scores, inside, count):
    """Mask of the `count` largest scores among those inside; of equal ones, the earlier.

    The last score to keep is found bit by bit from the top, with one sum over the row for each bit, in an order of
    integers that is the order of the floats.
    """
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = tl.where(tl.sum((inside & (order >= 0)).to(tl.int32), 0) >= count, 0, LOWEST)
    for i in range(31):
        trial = last | (1 << (30 - i))
        last = tl.where(tl.sum((inside & (order >= trial)).to(tl.int32), 0) >= count, trial, last)
    above, equal = inside & (order > last), (inside & (order == last)).to(tl.int32)
    missing = count - tl.sum(above.to(tl.int32), 0)
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= missing))


@triton.jit
def _divide(x, total):
    """x / total, rounded as on the host, where `/` may be off by a bit and floors would differ; 0 / 0 is 0."""
    return tl.div_rn(x, x * 0.0 + tl.where(total == 0, 1.0, total))


@triton.jit
def _quota(weight, full, capacity, rest):
    """Shares of what full sub-images leave of `rest`, and that rest."""
    left = rest - tl.sum(tl.where(full, capacity, 0.0), 0)
    share = tl.where(full, 0.0, weight)
    share = tl.where(tl.sum(share, 0) == 0, tl.where(full, 0.0, 1.0), share)
    return _divide(left * share, tl.sum(share, 0)), left


@triton.jit
def _exact(weight, capacity, rest, SLOTS: tl.constexpr):
    """Integer budgets that sum to `rest`, [SLOTS] float32."""
    full = capacity == 0
    for _ in range(SLOTS):
        share, left = _quota(weight, full, capacity, rest)
        full = full | (share >= capacity)
    share, left = _quota(weight, full, capacity, rest)
    floor = tl.floor(share)
    remainder = tl.where(full, -1.0, share - floor)
    index = tl.arange(0, SLOTS)
    ahead = (remainder[None, :] > remainder[:, None]) | (
        (remainder[None, :] == remainder[:, None]) & (index[None, :] < index[:, None])
    )
    rank = tl.sum(ahead.to(tl.float32), 1)
    return tl.where(full, capacity, floor + tl.where(rank < left - tl.sum(floor, 0), 1.0, 0.0))


@triton.jit
def _select_kernel(
    first_ptr, scores_ptr, image_ptr, slot_ptr, whole_ptr, region_ptr, base_ptr, rest_ptr, hits_ptr, capacity_ptr,
    candidates_ptr, mask_ptr, budgets_ptr, N, K, stride_f, stride_s,
    EXACT: tl.constexpr, CANDIDATES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a partition: the budgets of its image's sub-images, then the first patches of its own.

    Every partition of an image computes the budgets again: a few sums over N numbers instead of another launch.
    """
    row = tl.program_id(0)
    image, slot = tl.load(image_ptr + row), tl.load(slot_ptr + row)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    budget = tl.load(base_ptr + image)
    if slot > 0:
        whole = tl.load(whole_ptr + image).to(tl.int64)
        first = tl.load(first_ptr + whole * stride_f + n, mask=inside, other=0.0)
        region = tl.load(region_ptr + image * N + n, mask=inside, other=0)
        hits = tl.load(hits_ptr + image)
        patch = first
        if hits > 0:
            patch = tl.where(_top(first, inside, hits), 1.0, 0.0)
        s = tl.arange(0, SLOTS)
        capacity = tl.load(capacity_ptr + image * K + s, mask=s < K, other=0)
        weight = tl.zeros([SLOTS], tl.float32)
        for j in range(K):
            weight = tl.where(s == j, tl.sum(tl.where(region == j + 1, patch, 0.0), 0), weight)
        if (hits < 0) | (tl.sum(weight, 0) == 0):
            weight = tl.where(capacity > 0, 1.0, 0.0)
        rest = tl.load(rest_ptr + image).to(tl.float32)
        if EXACT:
            shares = _exact(weight, capacity.to(tl.float32), rest, SLOTS).to(tl.int32)
        else:
            # Quotient and product are rounded each on its own, as published.
            shares = tl.minimum((_divide(weight, tl.sum(weight, 0)) * rest).to(tl.int32), capacity)
        budget = tl.sum(tl.where(s == slot - 1, shares, 0), 0)
    scores = tl.load(scores_ptr + row.to(tl.int64) * stride_s + n, mask=inside, other=0.0)
    offset = row.to(tl.int64) * N + n
    if CANDIDATES:
        inside = inside & (tl.load(candidates_ptr + offset, mask=inside, other=0) != 0)
        budget = tl.minimum(budget, tl.sum(inside.to(tl.int32), 0))
    tl.store(mask_ptr + offset, _top(scores, inside, budget).to(tl.int8), mask=n < N)
    tl.store(budgets_ptr + row, budget)


def cls_attention(q: Tensor, k: Tensor, heads: int, scale: float) -> Tensor:
    """Launch the CLS row; q [B, C] and k [B, T, C] have unit channel stride."""
    B, T, C = k.shape
    out = torch.empty(B, heads, T, dtype=torch.float32, device=k.device)
    if B:
        block = max(triton.next_power_of_2(T), 16)
        width = min(triton.next_power_of_2(C // heads), max(TILE // block, 4))
        _cls_kernel[(heads, B)](
            q, k, out, T, q.stride(0), k.stride(0), k.stride(1), scale,
            HEADS=heads, D=C // heads, BLOCK_T=block, BLOCK_D=width, num_warps=8 if block >= 1024 else 4,
        )  # fmt: skip
    return out


def token_select(first: Tensor, scores: Tensor, plan: SelectionPlan) -> tuple[Tensor, Tensor]:
    """Launch a selection; first and scores [P, N] are float32 with unit stride along N."""
    P, N = scores.shape
    mask = torch.empty(P, N, dtype=torch.bool, device=scores.device)
    budgets = torch.empty(P, dtype=torch.int32, device=scores.device)
    if P:
        K = plan.capacity.shape[1]
        candidates = plan.candidates
        block = max(triton.next_power_of_2(N), 32)
        _select_kernel[(P,)](
            first, scores, plan.image, plan.slot, plan.whole, plan.region, plan.base, plan.rest, plan.hits,
            plan.capacity, mask.view(torch.int8) if candidates is None else candidates.view(torch.int8),
            mask.view(torch.int8), budgets, N, K, first.stride(0), scores.stride(0),
            EXACT=plan.exact, CANDIDATES=candidates is not None, SLOTS=triton.next_power_of_2(max(K, 2)),
            BLOCK_N=block, num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return mask, budgets
