"""Depth-wise convolution."""

from __future__ import annotations

import torch

from zoo.bench.ops.base import Op, element_size, random_views


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
