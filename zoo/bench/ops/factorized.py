"""Factorized self-attention and its pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.bench.ops.base import Op, element_size


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
