"""Plans of `token_select` for tests: several images, every way of sharing a budget, ties and limits."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.token_select import SelectionPlan


def plan_of(
    grids: list[tuple[int, int]], N: int, base: int = 9, rest: int = 20, hits: int = 7, exact: bool = False,
    padded: bool = False, device: str = "cpu",
) -> SelectionPlan:  # fmt: skip
    """A plan of images with these grids of sub-images; `padded` takes patches from the candidates."""
    counts = [gh * gw for gh, gw in grids]
    K, P = max([*counts, 1]), sum(counts) + len(counts)
    candidates = torch.ones(P, N, dtype=torch.bool)
    image, slot, whole, region, capacity = [], [], [], [], []
    for i, count in enumerate(counts):
        first = len(image)
        whole.append(first)
        if padded:
            candidates[first + 1 : first + 1 + count, N // 3 :: 2] = False
        image += [i] * (count + 1)
        slot += range(count + 1)
        region.append((torch.arange(N) * count // N + 1).tolist() if count else [0] * N)
        most = candidates[first + 1 : first + 1 + count].sum(-1).tolist() if padded else [N] * count
        capacity.append(most + [0] * (K - count))
    rests = [min(rest, sum(most)) for most in capacity]
    rows = (image, slot, whole, region, [min(base, N)] * len(counts), rests, [hits] * len(counts), capacity)
    tensors = [torch.tensor(row, dtype=torch.int32, device=device) for row in rows]
    return SelectionPlan(*tensors, candidates.to(device) if padded else None, exact)


GRIDS = [(2, 2), (0, 0), (1, 3)]
PLANS = {
    "official": plan_of(GRIDS, 36),
    "by_score": plan_of(GRIDS, 36, hits=0),
    "uniform": plan_of(GRIDS, 36, hits=-1),
    "clamped": plan_of(GRIDS, 36, base=36, rest=70),
    "nothing": plan_of(GRIDS, 36, base=0, rest=0),
    "no_sub_images": plan_of([(0, 0)], 50),
    "exact": plan_of(GRIDS, 36, rest=71, hits=0, exact=True),
    "exact_padded": plan_of(GRIDS, 36, rest=61, exact=True, padded=True),
    "exact_all": plan_of(GRIDS, 36, base=36, rest=10**4, exact=True, padded=True),
    "many": plan_of([(3, 4), (1, 1)], 40, rest=50, exact=True),
}


def scores_of(plan: SelectionPlan, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Pairs (first, scores) [P, N]: random, with ties, all alike, all on one sub-image."""
    torch.manual_seed(0)
    P, N = len(plan.image), plan.region.shape[1]
    random = torch.rand(2, P, N)
    # Sums of multiples of 1/4 are exact, whatever their order.
    ties = torch.randint(0, 4, (2, P, N)) / 4
    alike = torch.zeros(2, P, N)
    one = torch.zeros(2, P, N)
    one[0, :, 0], one[1] = 1.0, -torch.arange(N).float()
    return [tuple(pair.to(device)) for pair in (random, ties, alike, one)]
