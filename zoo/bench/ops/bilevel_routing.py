"""Bi-level routing attention."""

from __future__ import annotations

import functools

import torch

from zoo.bench.ops.base import Inputs, Op, element_size, random_views


def region_graph(inputs: Inputs) -> torch.Tensor:
    """Region graph [B, G, K]: the one in the inputs, else routed by the plain formulation."""
    if "index" in inputs:
        return inputs["index"]
    from zoo.kernels.bilevel_routing import reference

    region = inputs["region"]
    q, k = inputs["q"].detach(), inputs["k"].detach()
    return reference.route_regions(q, k, region, region, inputs["topk"], inputs["scale"])[0]


def plain_attention(inputs: Inputs) -> torch.Tensor:
    """Explicit gather, matrix product, softmax, matrix product."""
    from zoo.kernels.bilevel_routing import reference

    q, region = inputs["q"], inputs["region"]
    # [B, M, G, T, D], [B, M, G, L, D]
    queries, keys, values, _ = reference.gather_routed(
        q, inputs["k"], inputs["v"], region_graph(inputs), inputs["heads"], region, region
    )
    weights = (queries * inputs["scale"] @ keys.transpose(-1, -2)).softmax(-1)
    # [B, M, G, T, D] -> [B, G, T, C]
    out = (weights @ values).permute(0, 2, 3, 1, 4).flatten(3)
    return reference.from_regions(out, region, tuple(q.shape[1:3]))


def sdpa_attention(inputs: Inputs) -> torch.Tensor:
    """Explicit gather, then torch's fused attention: the definition of the op."""
    from zoo.kernels.bilevel_routing import reference

    maps, region = (inputs[name] for name in "qkv"), inputs["region"]
    return reference.bilevel_attention(*maps, region_graph(inputs), inputs["heads"], region, region, inputs["scale"])


def routed_block_mask(index: torch.Tensor, tokens: int, block: int = 128):
    """FlexAttention's block mask of a region graph over region-major tokens.

    The block lists follow from the graph itself, so no token-level mask is ever materialised.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, regions = index.shape[:2]
    allowed = torch.zeros(batch, regions, regions, dtype=torch.bool, device=index.device)
    allowed.scatter_(2, index.long(), True)
    length = regions * tokens
    blocks = -(-length // block)
    # [blocks, G]: does the region have a token in the block?
    first = torch.arange(blocks, device=index.device)[:, None] * block
    start = torch.arange(regions, device=index.device)[None] * tokens
    member = ((start < first + block) & (start + tokens > first)).float()
    # [B, 1, blocks, blocks]
    active = (member @ allowed.float() @ member.T > 0)[:, None].int()
    order = active.argsort(dim=-1, descending=True, stable=True).int()

    def mask(b, h, q, kv):
        # Tokens that pad the last block are masked by FlexAttention itself, yet they must not index out of range.
        return allowed[b, (q // tokens).clamp(max=regions - 1), (kv // tokens).clamp(max=regions - 1)]

    return BlockMask.from_kv_blocks(
        active.sum(-1).int(), order, BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(length, length)
    )


@functools.cache
def compiled_flex():
    """FlexAttention as generated Triton code, one compilation per shape."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention_routed(inputs: Inputs) -> torch.Tensor:
    """FlexAttention over the whole map under the region graph; its block mask is built on the first call only."""
    from zoo.kernels.bilevel_routing import reference

    q, region, heads = inputs["q"], inputs["region"], inputs["heads"]
    # [B, G, T, C]
    maps = [reference.to_regions(inputs[name], region) for name in "qkv"]
    groups, tokens = maps[0].shape[1:3]
    if "block_mask" not in inputs:
        inputs["block_mask"] = routed_block_mask(inputs["index"], tokens)
    # [B, M, N, D]
    heads_first = [x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in maps]
    out = compiled_flex()(*heads_first, block_mask=inputs["block_mask"], scale=inputs["scale"])
    # [B, M, N, D] -> [B, G, T, C]
    out = out.transpose(1, 2).flatten(2).unflatten(1, (groups, tokens))
    return reference.from_regions(out, region, tuple(q.shape[1:3]))


class BilevelAttention(Op):
    """Token attention for a given region graph; shape: batch, height, width, channels, heads, regions, topk."""

    leaves = ("q", "k", "v")

    def make_inputs(self, shape, dtype, device, seed=0):
        batch, height, width = shape["batch"], shape["height"], shape["width"]
        channels, side = shape["channels"], shape["regions"]
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v = random_views(batch, height, width, channels, dtype, device, generator)
        inputs = {"q": q, "k": k, "v": v, "heads": shape["heads"], "topk": shape["topk"], "scale": channels**-0.5}
        inputs["region"] = (height // side, width // side)
        with torch.no_grad():
            inputs["index"] = region_graph(inputs).int()
        return inputs

    def providers(self, device):
        providers = {"zoo": self._zoo, "plain": plain_attention, "sdpa": sdpa_attention}
        if device.type == "cuda":
            providers["flex"] = flex_attention_routed
        return providers

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels.bilevel_routing import bilevel_attention

        maps = (inputs[name] for name in "qkv")
        options = {name: inputs[name] for name in ("heads", "region", "scale")}
        return bilevel_attention(*maps, inputs["index"], distinct=True, **options)

    def reference(self, inputs):
        return sdpa_attention(inputs)

    def bytes(self, shape, dtype, backward):
        # Forward: read q, k, v, write o. Backward: read q, k, v, o and its gradient, write three gradients.
        size = shape["batch"] * shape["height"] * shape["width"] * shape["channels"] * element_size(dtype)
        index = 4 * shape["batch"] * shape["regions"] ** 2 * shape["topk"]
        return 12 * size + 2 * index if backward else 4 * size + index

    def flops(self, shape, backward):
        # Forward 4 N L C (two products); backward five products, recomputed scores among them.
        tokens = shape["height"] * shape["width"]
        keys = shape["topk"] * tokens // shape["regions"] ** 2
        return (14 if backward else 4) * shape["batch"] * tokens * keys * shape["channels"]


class BilevelRouting(BilevelAttention):
    """The whole op: region means, affinity, top-k, token attention. Same floor: each map read or written once."""

    def make_inputs(self, shape, dtype, device, seed=0):
        inputs = super().make_inputs(shape, dtype, device, seed)
        del inputs["index"]
        return inputs

    def providers(self, device):
        return {"zoo": self._zoo, "plain": plain_attention, "sdpa": sdpa_attention}

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels.bilevel_routing import bilevel_routing

        maps = (inputs[name] for name in "qkv")
        options = {name: inputs[name] for name in ("heads", "region", "topk", "scale")}
        return bilevel_routing(*maps, **options)

    @staticmethod
    def _route(inputs):
        from zoo.kernels.bilevel_routing import route_regions

        return route_regions(inputs["q"], inputs["k"], inputs["region"], inputs["topk"], scale=inputs["scale"])

    def gate_inputs(self, inputs):
        # Near ties may fall either way, so reference and baseline attend to the regions that our routing chose;
        # `invariants` judges the choice itself.
        return dict(inputs, index=self._route(inputs).index)

    def invariants(self, inputs):
        from zoo.kernels.bilevel_routing import reference

        q, k = (reference.region_mean(inputs[name].detach().double(), inputs["region"]) for name in "qk")
        affinity = reference.affinity(q, k, inputs["scale"])
        index = inputs["index"].long()
        if (index.sort(-1).values.diff(dim=-1) == 0).any():
            return "a query region selects the same region twice"
        worst = affinity.gather(2, index).amin(-1)
        bound = affinity.topk(inputs["topk"], dim=-1).values[..., -1]
        slack = 1e-5 * affinity.abs().amax()
        if not bool((worst >= bound - slack).all()):
            return (
                f"a selected region lies {(bound - worst).max().item():.2e} below the top {inputs['topk']} in affinity"
            )
        return None
