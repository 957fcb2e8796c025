"""Adapters of whole attention layers, projections included, against the layers they stand in for."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from zoo.bench.ops import OPS, Op, element_size


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


OPS["halo_layer"] = HaloLayer()
