"""Bias, sum and ReLU of a map in place."""

from __future__ import annotations

import torch

from zoo.bench.ops.base import Op, element_size


class BiasReLU(Op):
    """What follows a convolution on a channels-last map; shape: batch, height, width, channels, [added].

    ``added`` is `before` or `after` for a map that joins before the ReLU or behind it. Inference only.
    """

    def make_inputs(self, shape, dtype, device, seed=0):
        size = tuple(shape[name] for name in ("batch", "height", "width", "channels"))
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size):
            return torch.randn(*size, generator=generator, device=device, dtype=torch.float32)

        added = shape.get("added")
        inputs = {"x": randn(*size).to(dtype), "after": added == "after"}
        # Nothing that is added is positive: repeated in place, values stay small.
        inputs["bias"] = -randn(size[-1]).abs().to(dtype)
        inputs["added"] = -randn(*size).abs().to(dtype) if added else None
        return inputs

    def gate_inputs(self, inputs):
        # Each provider must find x as it was made.
        return {**inputs, "keep": True}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain}

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels.bias_relu import bias_relu_

        x = inputs["x"].clone() if inputs.get("keep") else inputs["x"]
        return bias_relu_(x, inputs["bias"], inputs["added"], after=inputs["after"], backend=backend)

    @staticmethod
    def _plain(inputs):
        """Separate in-place operations of torch: the definition of the op."""
        return BiasReLU._zoo(inputs, "reference")

    def bytes(self, shape, dtype, backward):
        # Read x (and what is added), write x.
        size = shape["batch"] * shape["height"] * shape["width"] * shape["channels"] * element_size(dtype)
        return (3 if shape.get("added") else 2) * size + shape["channels"] * element_size(dtype)
