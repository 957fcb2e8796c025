"""Agent attention."""

from __future__ import annotations

import torch

from zoo.bench.ops.base import Op, element_size, random_views


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
