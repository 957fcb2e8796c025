"""Scattered linear attention over windows of uneven length."""

from __future__ import annotations

import functools

import torch

from zoo.bench.ops.base import Op, element_size


def window_counts(windows: int, rows: int, longest: int) -> list[int]:
    """Rows of each window as in a LiDAR sweep: the counts fall off by a power law from `longest` and sum to `rows`."""
    place = torch.linspace(0, 1, windows, dtype=torch.float64)
    low, high = 0.0, 20.0
    for _ in range(60):
        power = (low + high) / 2
        fraction = (1 - place) ** power
        low, high = (power, high) if 1 + (longest - 1) * fraction.mean() > rows / windows else (low, power)
    counts = (1 + (longest - 1) * fraction).round().long()
    missing = rows - int(counts.sum())
    counts[1 : 1 + abs(missing)] += 1 if missing > 0 else -1
    # Neighbouring windows differ, as they do in a sweep.
    return counts[torch.randperm(windows, generator=torch.Generator().manual_seed(0))].tolist()


@functools.cache
def compiled_plain():
    """The plain formulation as generated Triton code."""
    from zoo.kernels.scatter_linear import reference

    return torch.compile(reference.scatter_linear, dynamic=False)


class ScatterLinear(Op):
    """Scattered linear attention; shape: rows, windows, longest, heads, head_dim.

    Queries, keys and values are views of one packed projection. The peer `padded` is the usual way without a kernel:
    windows padded to the longest, and batched matrix products.
    """

    leaves = ("q", "k", "v")

    def make_inputs(self, shape, dtype, device, seed=0):
        counts = window_counts(shape["windows"], shape["rows"], shape["longest"])
        generator = torch.Generator(device).manual_seed(seed)
        # [V, 3, M, D]
        size = (shape["rows"], 3, shape["heads"], shape["head_dim"])
        qkv = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        inputs = {name: x.detach().requires_grad_() for name, x in zip(self.leaves, qkv.unbind(1), strict=True)}
        offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
        return {**inputs, "offsets": offsets, "longest": max(counts)}

    def providers(self, device):
        providers = {"zoo": self._zoo, "plain": self._plain, "padded": self._padded}
        if device.type == "cuda":
            providers["plain_compiled"] = self._compiled
        return providers

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels import scatter_linear_attention

        tensors = (inputs[name] for name in ScatterLinear.leaves)
        return scatter_linear_attention(*tensors, inputs["offsets"], backend=backend)

    @staticmethod
    def _plain(inputs):
        """Outer products of keys and values summed by index, the definition of the op."""
        return ScatterLinear._zoo(inputs, "reference")

    @staticmethod
    def _compiled(inputs):
        return compiled_plain()(*(inputs[name] for name in ScatterLinear.leaves), inputs["offsets"], None, 1e-6, True)

    @staticmethod
    def _padded(inputs):
        offsets = inputs["offsets"].long()
        place = torch.arange(inputs["longest"], device=offsets.device) + offsets[:-1, None]
        inside = place < offsets[1:, None]  # [R, L]
        row = place.masked_fill(~inside, 0)
        q, k, v = (inputs[name][row].transpose(1, 2) for name in ScatterLinear.leaves)  # [R, M, L, D]
        q, k = q.relu(), k.relu().masked_fill(~inside[:, None, :, None], 0)
        norm = q.float() @ k.float().sum(2)[..., None] + 1e-6
        out = (q @ (k.transpose(2, 3) @ v)).float() / norm
        return out.to(q.dtype).transpose(1, 2)[inside]

    def bytes(self, shape, dtype, backward):
        # Forward: read q, k, v, write out. Backward: read those three and the gradient, write three.
        rows = shape["rows"] * shape["heads"] * shape["head_dim"]
        return (7 if backward else 4) * rows * element_size(dtype)

    def flops(self, shape, backward):
        return (12 if backward else 4) * shape["rows"] * shape["heads"] * shape["head_dim"] ** 2
