"""From measured errors to an assignment: the paper's rule, and the least error within a budget."""

from __future__ import annotations

import torch
from torch import Tensor


def paper_losses(mse: Tensor, sparsity: Tensor, lam: float) -> Tensor:
    """Equation 2 of the paper, `MSE + lambda * (1 - S)`, over a last dimension of candidates.

    Algorithm 1 of the paper prints `+ lambda * S`, which would favour dense heads; its equation 2 and figure 5 agree on
    this form.
    """
    return mse + lam * (1 - sparsity.to(mse))


def decide_paper(mse: Tensor, sparsity: Tensor, lam: float, eps: float) -> Tensor:
    """Equation 3 of the paper: the candidate of least loss, or the full pattern where every loss exceeds `eps`.

    The MSE is not normalised, so `lam` and `eps` belong to the scale of the activations: the paper's 0.5 and 1 to the
    models that it studied. Where values are small, `eps=1` turns nearly every head to the sparsest candidate.

    Args:
        mse: `[..., C]`, mean squared error of each candidate's outputs.
        sparsity: `[C]`, share of tiles that a candidate leaves out.
        lam: Weight of the cost.
        eps: Largest loss of a sparse head.

    Returns:
        `[...]` int64: 0 for full, c + 1 for candidate c; ties go to the lower one.
    """
    losses = paper_losses(mse, sparsity, lam)
    least, best = losses.min(-1)
    # `min` may return any of several equal minima.
    best = (losses == least[..., None]).int().argmax(-1)
    return torch.where(least > eps, 0, best + 1)


def decide_budget(error: Tensor, cost: Tensor, weight: Tensor, target: float) -> Tensor:
    """The assignment of least summed error whose mean cost stays within a target.

    Lagrange's relaxation separates the heads: each takes the pattern of least `error + mu * cost`, and bisection finds
    the multiplier. What the budget has left is then spent on the upgrades that save most error for their cost.

    Args:
        error: `[G, N, C]`, error of each candidate for each group of steps and each head, >= 0; the full pattern has 0.
        cost: `[C]`, cost of a candidate relative to full attention, which costs 1.
        weight: `[G]`, number of steps of each group.
        target: Mean cost over heads and steps.

    Returns:
        `[G, N]` int64: 0 for full, c + 1 for candidate c.

    Raises:
        ValueError: Even the cheapest candidates cost more than the target.
    """
    # [G, N, 1 + C], the full pattern first
    error = torch.cat([torch.zeros_like(error[..., :1]), error], dim=-1).double() * weight[:, None, None]
    cost = torch.cat([cost.new_ones(1), cost]).double().expand_as(error) * weight[:, None, None]
    limit = target * float(weight.double().sum()) * error.shape[1]
    if float(cost.min(-1).values.sum()) > limit * (1 + 1e-12):
        least = float(cost.min(-1).values.sum() / (weight.double().sum() * error.shape[1]))
        raise ValueError(
            f"No assignment costs only {target:.3f}: the cheapest candidates cost {least:.3f}. Add sparser ones."
        )

    def spent(choice: Tensor) -> float:
        return float(cost.gather(-1, choice[..., None]).sum())

    def choose(mu: float) -> Tensor:
        return (error + mu * cost).argmin(-1)

    low, high = 0.0, 1.0
    while spent(choose(high)) > limit and high < 1e18:
        low, high = high, high * 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(choose(middle)) <= limit else (middle, high)
    choice = choose(high)
    if spent(choice) > limit:
        choice = cost.argmin(-1)
    return _spend_rest(choice, error, cost, limit - spent(choice))


def _spend_rest(choice: Tensor, error: Tensor, cost: Tensor, rest: float) -> Tensor:
    """Upgrade heads, best ratio of saved error to cost first, while the rest of the budget allows."""
    now_error, now_cost = error.gather(-1, choice[..., None]), cost.gather(-1, choice[..., None])
    saved, extra = now_error - error, cost - now_cost
    ratio = torch.where((saved > 0) & (extra > 0), saved / extra.clamp_min(1e-30), 0.0)
    best, pattern = ratio.max(-1)
    flat = choice.flatten().clone()
    extra = extra.gather(-1, pattern[..., None]).flatten().tolist()
    for i in best.flatten().argsort(descending=True).tolist():
        if best.flatten()[i] <= 0:
            break
        if extra[i] <= rest:
            flat[i] = pattern.flatten()[i]
            rest -= extra[i]
    return flat.view_as(choice)
