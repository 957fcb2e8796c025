"""Choice of visual tokens: CLS rows of two layers, budgets, top-k."""

from __future__ import annotations

import functools

import torch

from zoo.bench.ops.base import Op, element_size


@functools.lru_cache(8)
def _plan(images: int, side: int, budget: float, device: torch.device):
    """A selection plan of images with 2 x 2 sub-images, by the published rule with half of the budget for the whole."""
    from zoo.kernels.token_select import SelectionPlan

    k, N = 4, side * side
    total = int((1 + k) * N * budget)
    base = min(total // 2, N)
    rows = {
        "image": [i for i in range(images) for _ in range(1 + k)],
        "slot": list(range(1 + k)) * images,
        "whole": [i * (1 + k) for i in range(images)],
        "region": [[1 + n * k // N for n in range(N)]] * images,
        "base": [base] * images,
        "rest": [total - base] * images,
        "hits": [N // 2] * images,
        "capacity": [[N] * k] * images,
    }
    tensors = {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in rows.items()}
    return SelectionPlan(**tensors, candidates=None, exact=False)


class TokenSelect(Op):
    """Scores of two vision layers, then the selection; shape: images, side, heads, head_dim, budget.

    The result is the second layer's score of each kept patch, 0 for the others, so that it has gradients.
    """

    leaves = ("q", "k")

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        partitions, tokens, channels = 5 * shape["images"], 1 + shape["side"] ** 2, shape["heads"] * shape["head_dim"]

        def randn(*size):
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        inputs = {f"first_{name}": randn(partitions, tokens, channels) for name in "qk"}
        inputs |= {name: randn(partitions, tokens, channels).requires_grad_() for name in "qk"}
        plan = _plan(shape["images"], shape["side"], shape["budget"], device)
        return {**inputs, "heads": shape["heads"], "plan": plan}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain, "full_map": self._full_map}

    @staticmethod
    def _kept(inputs, first, scores, select):
        """Scores of the kept patches; the gate fixes which ones these are."""
        mask = inputs["mask"] if "mask" in inputs else select(first.detach(), scores.detach(), inputs["plan"])[0]
        return scores * mask

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels.token_select import cls_attention, token_select

        def score(q, k):
            return cls_attention(q[:, 0], k, inputs["heads"]).sum(1)[:, 1:]

        first, scores = score(inputs["first_q"], inputs["first_k"]), score(inputs["q"], inputs["k"])
        return TokenSelect._kept(inputs, first, scores, token_select)

    @staticmethod
    def _plain(inputs):
        """One row of the map, sorted with torch: the definition of the op."""
        from zoo.kernels.token_select import reference

        def score(q, k):
            return reference.cls_attention(q[:, 0], k, inputs["heads"], (k.shape[-1] // inputs["heads"]) ** -0.5).sum(
                1
            )[:, 1:]

        first, scores = score(inputs["first_q"], inputs["first_k"]), score(inputs["q"], inputs["k"])
        return TokenSelect._kept(inputs, first, scores, reference.token_select)

    @staticmethod
    def _full_map(inputs):
        """All rows of the map, of which the first is read, as the published code does."""
        from zoo.kernels.token_select import reference

        def score(q, k):
            # [P, T, C] -> [P, M, T, D]
            q, k = (x.unflatten(-1, (inputs["heads"], -1)).transpose(1, 2) for x in (q, k))
            maps = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(
                -1, dtype=torch.promote_types(q.dtype, torch.float32)
            )
            return maps[:, :, 0].sum(1)[:, 1:]

        first, scores = score(inputs["first_q"], inputs["first_k"]), score(inputs["q"], inputs["k"])
        return TokenSelect._kept(inputs, first, scores, reference.token_select)

    def gate_inputs(self, inputs):
        # Near ties may fall either way, so everyone keeps what we chose; `invariants` judges the choice itself.
        return dict(inputs, mask=(self._zoo(inputs) > 0).detach())

    def invariants(self, inputs):
        from zoo.kernels.token_select import reference

        plan = inputs["plan"]
        q, k = (inputs[name].detach() for name in "qk")
        scores = reference.cls_attention(
            q[:, 0].double(), k.double(), inputs["heads"], (k.shape[-1] // inputs["heads"]) ** -0.5
        )
        scores, mask = scores.sum(1)[:, 1:], inputs["mask"]
        totals = torch.zeros_like(plan.base).index_add_(0, plan.image, mask.sum(1).to(plan.base.dtype))
        if (totals > plan.base + plan.rest).any() or (mask[plan.whole.long()].sum(1) != plan.base).any():
            return "the budget is missed"
        kept = scores.masked_fill(~mask, torch.inf).amin(1)
        left = scores.masked_fill(mask, -torch.inf).amax(1)
        if (kept < left - 1e-5 * scores.abs().amax()).any():
            return f"a token that was left out scores {(left - kept).max().item():.2e} more than one that was kept"
        return None

    def bytes(self, shape, dtype, backward):
        # Forward: read the keys of two layers. Backward: read those of one again and write their gradient, and as much
        # for the queries, of which all rows but the first are zero.
        keys = 5 * shape["images"] * (1 + shape["side"] ** 2) * shape["heads"] * shape["head_dim"] * element_size(dtype)
        return (5 if backward else 2) * keys

    def flops(self, shape, backward):
        return 0
