"""Pattern sparse attention of video diffusion transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.bench.ops.base import Op, element_size
from zoo.bench.ops.tile_sparse_flex import flex, flex_kernel


def parse_pattern(text: str):
    """A pattern from a suite: "full", "skip", "diagonal 1.5", "multi_diagonal 0.5", or "stripe 0 -1" with frames."""
    from zoo.kernels import tile_sparse

    name, *numbers = text.split()
    if name == "stripe":
        return tile_sparse.VerticalStripe(frames=tuple(int(x) for x in numbers))
    windows = {"window": float(numbers[0])} if numbers else {}
    return tile_sparse.pattern_from_dict({"pattern": name, **windows})


class TileSparseAttention(Op):
    """Attention of which every head has a pattern.

    Shape: batch, frames, height, width (of the token grid), heads, dim, patterns (given to the heads in turn), and
    optionally text, text_position, tile. Queries, keys and values lie in the memory of [B, S, M, D], as projections
    leave them. ``dense_flash`` and ``dense_cudnn`` compute all pairs, the attention that sparse patterns replace.
    ``flex`` is compiled FlexAttention of the same tiles with its gathers of tokens, ``flex_kernel`` without them.
    ``zoo_fp8`` multiplies queries and keys in FP8, with an error of its own. Tables and masks of the patterns are built
    once for all layers and steps of a video, and not counted.
    """

    leaves = ("q", "k", "v")
    alternatives = ("dense_flash", "dense_cudnn", "flex_kernel", "zoo_fp8")

    @staticmethod
    def layout(shape):
        from zoo.kernels.tile_sparse import Layout

        text = shape.get("text", 0)
        grid = (shape["frames"], shape["height"], shape["width"])
        position = shape.get("text_position", "last") if text else "none"
        return Layout(grid, text, position, tuple(shape.get("tile", (128, 64))))

    @staticmethod
    def patterns(shape) -> list:
        return [parse_pattern(text) for text in shape["patterns"]]

    def facts(self, shape):
        from zoo.kernels.tile_sparse import density

        layout, patterns = self.layout(shape), self.patterns(shape)
        share = sum(density(patterns[head % len(patterns)], layout) for head in range(shape["heads"]))
        return {"density": f"{share / shape['heads']:.4f}"}

    def gate_shape(self, shape):
        # Heads do not meet, and float64 attention of all of them would take longer than all timings.
        patterns = list(dict.fromkeys(shape["patterns"]))
        return {**shape, "heads": min(shape["heads"], len(patterns)), "patterns": patterns}

    def make_inputs(self, shape, dtype, device, seed=0):
        from zoo.kernels.tile_sparse import pattern_table

        layout, patterns = self.layout(shape), self.patterns(shape)
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape["batch"], layout.tokens, shape["heads"], shape["dim"])
        inputs = {}
        for name in self.leaves:
            x = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
            inputs[name] = x.to(dtype).transpose(1, 2).requires_grad_()
        ids = torch.arange(shape["heads"], device=device) % len(patterns)
        table = pattern_table(patterns, layout, device)
        return {
            **inputs,
            "pattern_ids": ids,
            "settings": {"patterns": table, "layout": layout},
            "head_patterns": [patterns[head % len(patterns)] for head in range(shape["heads"])],
        }

    def providers(self, device):
        providers = {"zoo": self._zoo, "plain": self._plain}
        if device.type == "cuda":
            providers["zoo_fp8"] = self._fp8
            providers.update(flex=flex, flex_kernel=flex_kernel)
            providers["dense_flash"] = self._flash
            providers["dense_cudnn"] = self._cudnn
        return providers

    @staticmethod
    def _attend(inputs, backend: str, **options):
        from zoo.kernels.tile_sparse import tile_sparse_attention

        tensors = (inputs[name] for name in ("q", "k", "v", "pattern_ids"))
        return tile_sparse_attention(*tensors, **inputs["settings"], **options, backend=backend)

    @staticmethod
    def _zoo(inputs):
        # The kernels, where there is a GPU, whether or not "auto" takes them.
        return TileSparseAttention._attend(inputs, "triton" if inputs["q"].is_cuda else "auto")

    @staticmethod
    def _fp8(inputs):
        return TileSparseAttention._attend(inputs, "triton", qk_dtype=torch.float8_e4m3fn)

    @staticmethod
    def _plain(inputs):
        """Torch's attention, called for each pattern and piece of it."""
        return TileSparseAttention._attend(inputs, "reference")

    @staticmethod
    def _flash(inputs):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])

    @staticmethod
    def _cudnn(inputs):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])

    def bytes(self, shape, dtype, backward):
        # Forward: read q, k, v, write o. Backward: read q, k, v, o and its gradient, write three gradients.
        elements = shape["batch"] * self.layout(shape).tokens * shape["heads"] * shape["dim"]
        return (12 if backward else 4) * elements * element_size(dtype)

    def flops(self, shape, backward):
        # Forward two products over the active tiles, backward five more.
        from zoo.kernels.tile_sparse.patterns import active_tiles

        layout, patterns = self.layout(shape), self.patterns(shape)
        tiles = sum(active_tiles(patterns[head % len(patterns)], layout) for head in range(shape["heads"]))
        products = 7 if backward else 2
        return 2 * products * shape["batch"] * shape["dim"] * tiles * layout.tile[0] * layout.tile[1]
