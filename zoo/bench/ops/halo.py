"""Halo attention, and the layer with its projections against timm's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from zoo.bench.ops.base import Op, element_size


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


@functools.lru_cache(maxsize=1)
def _halo_layers(settings: tuple[tuple[str, int], ...], device: torch.device) -> dict[str, nn.Module]:
    """timm's layer, the same layer on our op and timm's compiled; all share their parameters.

    One set serves all input sets of a shape, so that the peer is compiled once.
    """
    from timm.layers.halo_attn import HaloAttn

    from zoo.accelerate import accelerate

    layer = HaloAttn(**dict(settings), device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    # A shallow copy holds the same parameters.
    ours = accelerate(copy.copy(layer))
    return {"zoo": ours, "timm": layer, "timm_compiled": torch.compile(layer)}


class HaloLayer(Op):
    """Halo attention with its projections on a channels-last image map, float32 weights under autocast.

    Shape: batch, height, width, channels, heads, block, halo, [stride]. The float32 rows run without autocast.
    """

    leaves = ("x", "q.weight", "kv.weight", "pos_embed.height_rel", "pos_embed.width_rel")
    baseline = "timm"

    def make_inputs(self, shape, dtype, device, seed=0):
        settings = dict(
            dim=shape["channels"], num_heads=shape["heads"], block_size=shape["block"], halo_size=shape["halo"],
            stride=shape.get("stride", 1),
        )  # fmt: skip
        layers = _halo_layers(tuple(settings.items()), device)
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape["batch"], shape["channels"], shape["height"], shape["width"])
        x = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        return {"x": x, **dict(layers["timm"].named_parameters()), "layers": layers, "dtype": dtype}

    def providers(self, device):
        names = ("zoo", "timm", "timm_compiled") if device.type == "cuda" else ("zoo", "timm")
        return {name: functools.partial(self._run, name) for name in names}

    @staticmethod
    def _run(name: str, inputs: dict[str, Any]) -> torch.Tensor:
        x = inputs["x"]
        with torch.autocast(x.device.type, inputs["dtype"], enabled=inputs["dtype"] != torch.float32):
            return inputs["layers"][name](x)

    def reference(self, inputs):
        parameters = {name: inputs[name] for name in self.leaves if name != "x"}
        return torch.func.functional_call(inputs["layers"]["timm"], parameters, (inputs["x"],))

    @staticmethod
    def _sizes(shape) -> tuple[int, int, int]:
        """Pixels, queries and channels."""
        pixels = shape["batch"] * shape["height"] * shape["width"]
        return pixels, pixels // shape.get("stride", 1) ** 2, shape["channels"]

    def bytes(self, shape, dtype, backward):
        # Forward: read x, write out. Backward: read x and dout, write dx. Weights are read, their gradients written.
        pixels, queries, channels = self._sizes(shape)
        maps = (3 * pixels + 2 * queries if backward else pixels + queries) * channels * element_size(dtype)
        weights = 4 * 3 * channels**2
        return maps + (3 if backward else 1) * weights

    def flops(self, shape, backward):
        # Projections: one product forward, two more backward. Core: two forward, five more backward.
        pixels, queries, channels = self._sizes(shape)
        projections = 2 * channels**2 * (2 * pixels + queries)
        core = 4 * queries * (shape["block"] + 2 * shape["halo"]) ** 2 * channels
        return int(3 * projections + 3.5 * core) if backward else projections + core
