"""One adapter per op: inputs, providers (ours first, then the peers), the float64 reference and the roofline's counts.

Floors count every tensor once: what a perfect kernel reads and writes. ``N`` tokens of all images together, ``C``
channels, ``b`` bytes per element, ``G`` regions, ``K`` regions kept, ``L`` keys per query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

Inputs = dict[str, Any]
Provider = Callable[[Inputs], torch.Tensor]


class Op:
    """Adapter of one op. Subclasses are registered in ``OPS`` under the name that suites use."""

    # Names of the inputs that receive a gradient.
    leaves: tuple[str, ...] = ()
    # Providers held to the correctness gate as ours; a wrong peer only loses its own rows.
    ours: tuple[str, ...] = ("zoo",)
    # The provider that speed-ups and error bounds refer to.
    baseline = "plain"
    # Peers that compute another function for the same purpose: timed, but not compared with the reference.
    alternatives: tuple[str, ...] = ()

    def make_inputs(self, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs of one shape; tensors named in ``leaves`` require a gradient."""
        raise NotImplementedError

    def providers(self, device: torch.device) -> dict[str, Provider]:
        """Callables of the op by provider name, ours first."""
        raise NotImplementedError

    def reference(self, inputs: Inputs) -> torch.Tensor:
        """The definition, evaluated on float64 inputs."""
        return self.providers(torch.device("cpu"))[self.baseline](inputs)

    def gate_inputs(self, inputs: Inputs) -> Inputs:
        """Inputs of the correctness gate; an op with discrete decisions fixes them here."""
        return inputs

    def invariants(self, inputs: Inputs) -> str | None:
        """What is wrong beyond the numbers (a bad choice of regions, say); ``None`` if all is well."""
        return None

    def bytes(self, shape: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
        """Least traffic to device memory."""
        raise NotImplementedError

    def flops(self, shape: Mapping[str, Any], backward: bool) -> int:
        """FLOPs of matrix products, which run on tensor cores; 0 for an op without any."""
        return 0


def element_size(dtype: torch.dtype) -> int:
    """Bytes per element."""
    return torch.empty((), dtype=dtype).element_size()


def input_bytes(inputs: Inputs) -> int:
    """Bytes of all tensors among the inputs."""
    return sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, torch.Tensor))


def upcast(inputs: Inputs, leaves: tuple[str, ...]) -> Inputs:
    """Float64 copy of the inputs with fresh leaves; integer tensors and numbers stay."""
    copy = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().double().requires_grad_(name in leaves)
        copy[name] = value
    return copy


def random_views(batch, height, width, channels, dtype, device, generator) -> list[torch.Tensor]:
    """Query, key and value maps as a linear layer leaves them: three strided views of one packed tensor."""
    # [B, H, W, 3C]
    packed = torch.randn(batch, height, width, 3 * channels, generator=generator, device=device, dtype=torch.float32)
    return [view.detach().requires_grad_() for view in packed.to(dtype).chunk(3, dim=-1)]


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


class AgentAttention(Op):
    """Attention through agents with position biases; shape: batch, height, width, channels, heads, agents.

    ``flash`` is the attention that agents replace, over all pairs of tokens: another function of the same q, k and v.
    """

    leaves = (
        *("q", "agents", "k", "v", "key_block", "key_row", "key_column"),
        *("query_block", "query_row", "query_column"),
    )
    alternatives = ("flash",)

    def make_inputs(self, shape, dtype, device, seed=0):
        batch, height, width, heads = (shape[name] for name in ("batch", "height", "width", "heads"))
        channels, agents = shape["channels"], shape["agents"]
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size):
            values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
            return values.to(dtype).requires_grad_()

        views = random_views(batch, height, width, channels, dtype, device, generator)
        q, k, v = (view.detach().flatten(1, 2).requires_grad_() for view in views)
        inputs = {"q": q, "agents": randn(batch, agents, channels), "k": k, "v": v, "heads": heads}
        for side in ("key", "query"):
            inputs[f"{side}_block"] = randn(heads, agents, 7, 7)
            inputs[f"{side}_row"] = randn(heads, agents, height)
            inputs[f"{side}_column"] = randn(heads, agents, width)
        return {**inputs, "grid": (height, width), "scale": (channels // heads) ** -0.5}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain, "flash": self._flash}

    @staticmethod
    def _biases(inputs):
        from zoo.kernels import AgentBias

        parts = ("block", "row", "column")
        return (AgentBias(*(inputs[f"{side}_{part}"] for part in parts)) for side in ("key", "query"))

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels import agent_attention

        key_bias, query_bias = AgentAttention._biases(inputs)
        tokens = (inputs[name] for name in ("q", "agents", "k", "v"))
        return agent_attention(
            *tokens, heads=inputs["heads"], grid=inputs["grid"], key_bias=key_bias, query_bias=query_bias
        )

    @staticmethod
    def _plain(inputs):
        """Both attentions with weights and expanded biases in memory: the definition of the op."""
        from zoo.kernels.agent import reference

        tokens = (inputs[name] for name in ("q", "agents", "k", "v"))
        grid, scale = inputs["grid"], inputs["scale"]
        return reference.agent_attention(
            *tokens, inputs["heads"], grid, grid, *AgentAttention._biases(inputs), scale, scale
        )

    @staticmethod
    def _flash(inputs):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # [B, N, C] -> [B, M, N, D]
        q, k, v = (inputs[name].unflatten(-1, (inputs["heads"], -1)).transpose(1, 2) for name in "qkv")
        backends = [SDPBackend.FLASH_ATTENTION] + ([] if q.is_cuda else [SDPBackend.MATH])
        with sdpa_kernel(backends):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def bytes(self, shape, dtype, backward):
        # Forward: read q, k, v, write o. Backward: read q, k, v and the gradient of o, write three gradients. Agents
        # and biases: read, and in the backward pass read again and their gradients written.
        tokens = shape["batch"] * shape["height"] * shape["width"] * shape["channels"]
        agents = shape["batch"] * shape["agents"] * shape["channels"]
        biases = 2 * shape["heads"] * shape["agents"] * (49 + shape["height"] + shape["width"])
        return ((11 if backward else 4) * tokens + (3 if backward else 1) * (agents + biases)) * element_size(dtype)

    def flops(self, shape, backward):
        # Forward 8 N n C, two products of agents with queries and two with keys; backward five of either.
        products = shape["batch"] * shape["height"] * shape["width"] * shape["agents"] * shape["channels"]
        return (28 if backward else 8) * products


class DepthwiseConv(Op):
    """Depth-wise convolution on a channels-last map; shape: batch, height, width, channels, kernel, [packed, residual].

    ``packed`` takes the input as a strided third of a packed tensor; ``residual`` adds a map of its own (``map``) or
    the input itself (``self``) to the result.
    """

    leaves = ("x", "weight", "bias", "residual")

    def make_inputs(self, shape, dtype, device, seed=0):
        batch, height, width, channels = (shape[name] for name in ("batch", "height", "width", "channels"))
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size, scale=1.0):
            values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32) * scale
            return values.to(dtype).requires_grad_()

        if shape.get("packed"):
            x = random_views(batch, height, width, channels, dtype, device, generator)[2]
        else:
            x = randn(batch, height, width, channels)
        side = shape["kernel"]
        inputs = {"x": x, "weight": randn(channels, 1, side, side, scale=1 / side), "bias": randn(channels)}
        if shape.get("residual") == "map":
            inputs["residual"] = randn(batch, height, width, channels)
        elif shape.get("residual") == "self":
            inputs["add_input"] = True
        return inputs

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain}

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels.depthwise_conv import depthwise_conv2d

        return depthwise_conv2d(*DepthwiseConv._arguments(inputs))

    @staticmethod
    def _plain(inputs):
        """torch's convolution (cuDNN on a GPU) on the channels-last view: the definition of the op."""
        from zoo.kernels.depthwise_conv import reference

        return reference.depthwise_conv2d(*DepthwiseConv._arguments(inputs))

    @staticmethod
    def _arguments(inputs):
        residual = inputs["x"] if inputs.get("add_input") else inputs.get("residual")
        return inputs["x"], inputs["weight"], inputs["bias"], residual

    def bytes(self, shape, dtype, backward):
        # Forward: read x (and a residual map), write y. Backward: read x and dy, write dx; a residual's gradient is dy.
        size = shape["batch"] * shape["height"] * shape["width"] * shape["channels"] * element_size(dtype)
        weights = shape["channels"] * (shape["kernel"] ** 2 + 1) * element_size(dtype)
        maps = (3 if shape.get("residual") == "map" else 2) + (3 if backward else 0)
        return maps * size + (3 if backward else 1) * weights


@functools.cache
def compiled_halo():
    """The plain formulation of halo attention as generated Triton code."""
    from zoo.kernels.halo import reference

    return torch.compile(reference.halo_attention, dynamic=False)


class HaloAttention(Op):
    """Halo attention without its projections; shape: batch, height, width, channels, heads, block, halo, [stride].

    Queries, keys and values have ``channels`` each; keys and values are interleaved by head, as one projection leaves
    them.
    """

    leaves = ("q", "kv", "height_rel", "width_rel")

    def make_inputs(self, shape, dtype, device, seed=0):
        heads, block, halo, stride = (shape.get(name, 1) for name in ("heads", "block", "halo", "stride"))
        batch, height, width, channels = (shape[name] for name in ("batch", "height", "width", "channels"))
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size, scale=1.0):
            values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32) * scale
            return values.to(dtype).requires_grad_()

        rows, key = 2 * (block + 2 * halo) - 1, channels // heads
        return {
            "q": randn(batch, -(-height // stride), -(-width // stride), channels),
            "kv": randn(batch, height, width, 2 * channels),
            "height_rel": randn(rows, key, scale=key**-0.5),
            "width_rel": randn(rows, key, scale=key**-0.5),
            "settings": {"heads": heads, "block": block, "halo": halo, "stride": stride},
        }

    def providers(self, device):
        providers = {"zoo": self._zoo, "plain": self._plain}
        if device.type == "cuda":
            providers["plain_compiled"] = self._compiled
        return providers

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels.halo import halo_attention

        tensors = (inputs[name] for name in HaloAttention.leaves)
        return halo_attention(*tensors, **inputs["settings"], backend=backend)

    @staticmethod
    def _plain(inputs):
        """Windows unfolded, explicit position logits, softmax, matrix product: the definition of the op."""
        return HaloAttention._zoo(inputs, "reference")

    @staticmethod
    def _compiled(inputs):
        from zoo.kernels.halo import reference

        tensors = [inputs[name] for name in HaloAttention.leaves]
        geometry = reference.Geometry(**inputs["settings"])
        return compiled_halo()(*tensors, geometry, tensors[2].shape[-1] ** -0.5)

    @staticmethod
    def _sizes(shape) -> tuple[int, int, int, int]:
        """Pixels, queries, channels and side of the window."""
        stride = shape.get("stride", 1)
        queries = -(-shape["height"] // stride) * -(-shape["width"] // stride)
        window = shape["block"] + 2 * shape["halo"]
        return shape["batch"] * shape["height"] * shape["width"], shape["batch"] * queries, shape["channels"], window

    def bytes(self, shape, dtype, backward):
        # Forward: read q and kv, write o. Backward: read q, kv, o and its gradient, write the gradients of q and kv.
        pixels, queries, channels, window = self._sizes(shape)
        maps = (6 * queries + 6 * pixels if backward else 2 * queries + 2 * pixels) * channels
        tables = (6 if backward else 2) * (2 * window - 1) * channels // shape["heads"]
        return (maps + tables) * element_size(dtype)

    def flops(self, shape, backward):
        # Forward two products, and a row of each table for each row and column of the window; backward five.
        _, queries, channels, window = self._sizes(shape)
        keys, positions = window**2, 2 * window
        return 2 * queries * channels * (7 * keys + 4 * positions if backward else 2 * keys + positions)


class FactorizedAttention(Op):
    """Attention to global, local and dilated keys; shape: batch, height, width, channels, heads, ratio.

    ``ratio`` reduces the global keys, one in ratio**2 tokens; 1 leaves out the dilated group, as in FaViT's last stage.
    """

    leaves = ("q", "k_global", "v_global", "k_local", "v_local", "k_dilated", "v_dilated")
    positions = 49

    @staticmethod
    def split(shape) -> tuple[int, int, int]:
        """Channels of the global group, local groups, channels of one of their heads."""
        groups = 2 if shape["ratio"] > 1 else 1
        width = shape["channels"] // (8 * groups) * 7
        return shape["channels"] - groups * width, groups, width // shape["heads"]

    def make_inputs(self, shape, dtype, device, seed=0):
        batch, heads = shape["batch"], shape["heads"]
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size):
            values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
            return values.to(dtype).requires_grad_()

        channels, groups, width = self.split(shape)
        reduced = (shape["height"] // shape["ratio"]) * (shape["width"] // shape["ratio"])
        inputs = {"q": randn(batch, shape["height"] * shape["width"], shape["channels"])}
        inputs.update((name, randn(batch, reduced, channels)) for name in self.leaves[1:3])
        for name in self.leaves[3 : 3 + 2 * groups]:
            inputs[name] = randn(batch, self.positions, heads, width)
        return inputs

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain, "sdpa": self.reference}

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels.factorized import factorized_attention

        return factorized_attention(**inputs)

    @staticmethod
    def _plain(inputs):
        """Matrix product, softmax, matrix product for each group of channels."""
        q, k_global, heads = inputs["q"], inputs["k_global"], inputs["k_local"].shape[2]
        groups = ["local", "dilated"] if "k_dilated" in inputs else ["local"]
        # [B, N, M, G, D]
        local = q[..., k_global.shape[2] :].unflatten(-1, (heads, len(groups), -1))
        weights = (q[..., : k_global.shape[2]] @ k_global.transpose(1, 2) * k_global.shape[2] ** -0.5).softmax(-1)
        out = [weights @ inputs["v_global"]]
        for i, name in enumerate(groups):
            # [B, M, N, D], [B, M, L, D]
            x, k, v = (y.transpose(1, 2) for y in (local[:, :, :, i], inputs[f"k_{name}"], inputs[f"v_{name}"]))
            weights = (x @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
            out.append((weights @ v).transpose(1, 2).flatten(2))
        return torch.cat(out, -1)

    def reference(self, inputs):
        from zoo.kernels.factorized import reference

        return reference.factorized_attention(**inputs)

    def bytes(self, shape, dtype, backward):
        # Forward: read q and the keys and values, write o. Backward: read q, dO and keys again, write dq, dk, dv.
        channels, groups, width = self.split(shape)
        tokens = shape["height"] * shape["width"]
        keys = tokens // shape["ratio"] ** 2 * channels + self.positions * groups * shape["heads"] * width
        units = 5 * tokens * shape["channels"] + 6 * keys if backward else 2 * tokens * shape["channels"] + 2 * keys
        return units * shape["batch"] * element_size(dtype)

    def flops(self, shape, backward):
        # Forward two products; backward five, recomputed scores among them.
        channels, groups, width = self.split(shape)
        tokens = shape["height"] * shape["width"]
        products = tokens // shape["ratio"] ** 2 * channels + self.positions * groups * shape["heads"] * width
        return 2 * (7 if backward else 2) * shape["batch"] * tokens * products


class CrossWindowPool(Op):
    """Fusion of all 7 x 7 windows of a map into one; shape: batch, height, width, channels, heads, ratio.

    ``channels`` are those of the map, in two groups with dilations 1 and ``ratio``, in one group if that is 1.
    """

    leaves = ("x",)
    window = 7

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        size = [shape[name] for name in ("batch", "height", "width", "channels")]
        x = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        dilations = [1, shape["ratio"]] if shape["ratio"] > 1 else [1]
        return {"x": x.requires_grad_(), "heads": shape["heads"], "dilations": dilations}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain}

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels.factorized import cross_window_pool

        return cross_window_pool(inputs["x"], inputs["heads"], window=7, dilations=inputs["dilations"])

    @staticmethod
    def _plain(inputs):
        """Reflection padding, strided views of the windows, mean over runs of the (window, channel) axis."""
        out, heads, window = [], inputs["heads"], CrossWindowPool.window
        for x, dilation in zip(inputs["x"].chunk(len(inputs["dilations"]), -1), inputs["dilations"], strict=True):
            span = dilation * (window - 1) + 1
            x = x.permute(0, 3, 1, 2)
            x = F.pad(x, (0, -x.shape[3] % span, 0, -x.shape[2] % span), mode="reflect")
            # [B, C, rows, span, cols, span] -> [B, C, rows, 7, cols, 7]
            x = x.unflatten(3, (-1, span)).unflatten(2, (-1, span))[:, :, :, ::dilation, :, ::dilation]
            # [B, M, D, rows, 7, cols, 7] -> [B, 7, 7, M, windows, D]
            x = x.unflatten(1, (heads, -1)).permute(0, 4, 6, 1, 3, 5, 2).flatten(4, 5)
            out.append(x.reshape(*x.shape[:4], x.shape[5], x.shape[4]).mean(-1).flatten(3))
        return torch.stack(out)

    def reference(self, inputs):
        from zoo.kernels.factorized import reference

        return reference.cross_window_pool(inputs["x"], inputs["heads"], self.window, inputs["dilations"], "official")

    def bytes(self, shape, dtype, backward):
        # Forward: read the sampled tokens, all of them in the first group, write the result. Backward: write dx.
        tokens, channels, ratio = shape["height"] * shape["width"], shape["channels"], shape["ratio"]
        sampled = tokens * channels
        if ratio > 1:
            sampled = tokens * channels // 2 + tokens * channels // (2 * ratio**2)
        pooled = self.window**2 * channels
        total = sampled + pooled + (tokens * channels + pooled if backward else 0)
        return shape["batch"] * total * element_size(dtype)


OPS: dict[str, Op] = {
    "agent_attention": AgentAttention(),
    "bilevel_attention": BilevelAttention(),
    "bilevel_routing": BilevelRouting(),
    "cross_window_pool": CrossWindowPool(),
    "depthwise_conv": DepthwiseConv(),
    "halo_attention": HaloAttention(),
    "factorized_attention": FactorizedAttention(),
}
