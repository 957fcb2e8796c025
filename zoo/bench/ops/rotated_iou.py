"""Overlap of rotated boxes seen from above."""

from __future__ import annotations

import math

import torch

from zoo.bench.ops.base import Op, element_size


class RotatedOverlap(Op):
    """Area that each of `first` rectangles shares with each of `second`; shape: first, second, side (metres).

    Rectangles of the sizes of cars lie anywhere on a square, so most pairs do not meet.
    """

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)

        def rectangles(count):
            u = torch.rand(count, 5, generator=generator, device=device, dtype=dtype)
            scale = u.new_tensor([shape["side"], shape["side"], 3.0, 1.5, 2 * math.pi])
            return u * scale + u.new_tensor([0.0, 0.0, 3.0, 1.0, -math.pi])

        return {"a": rectangles(shape["first"]), "b": rectangles(shape["second"])}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain}

    @staticmethod
    def _zoo(inputs):
        from zoo.kernels import rotated_overlap

        return rotated_overlap(inputs["a"], inputs["b"])

    @staticmethod
    def _plain(inputs):
        from zoo.kernels import rotated_overlap

        return rotated_overlap(inputs["a"], inputs["b"], backend="reference")

    def bytes(self, shape, dtype, backward):
        pairs, boxes = shape["first"] * shape["second"], shape["first"] + shape["second"]
        return (pairs + 5 * boxes) * element_size(dtype)
