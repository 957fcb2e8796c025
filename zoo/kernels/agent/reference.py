"""Agent attention in plain PyTorch: the definition of the op, its CPU path and the oracle of its tests.

Paper: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AgentBias(NamedTuple):
    """Position bias between n agents and the tokens of an H x W grid, agents first, M heads.

    Agent j and token (y, x) get resize(block)[j, y, x] + row[j, y] + column[j, x]. Any floating dtype and strides.

    Attributes:
        block: [M, n, h, w], resized to the grid bilinearly (corners not aligned, no antialiasing).
        row: [M, n, H].
        column: [M, n, W].
        extra: [M, n], the bias of one token in front of the grid (a class token), or None without such a token.
    """

    block: Tensor
    row: Tensor
    column: Tensor
    extra: Tensor | None = None


def expand_bias(bias: AgentBias, grid: tuple[int, int]) -> Tensor:
    """The bias of every token [M, n, N], N = H * W or 1 + H * W with an extra token."""
    block = F.interpolate(bias.block, size=grid, mode="bilinear", align_corners=False)  # [M, n, H, W]
    full = (block + bias.row[..., None] + bias.column[..., None, :]).flatten(2)
    return full if bias.extra is None else torch.cat([bias.extra[..., None], full], -1)


def expand_bias_backward(grad: Tensor, bias: AgentBias, grid: tuple[int, int]) -> AgentBias:
    """Gradients of a bias, in its dtypes, from that of `expand_bias`, [M, n, N]."""
    extra = None
    if bias.extra is not None:
        extra, grad = grad[..., 0].to(bias.extra.dtype), grad[..., 1:]
    grad = grad.unflatten(-1, grid)  # [M, n, H, W]
    block = torch.ops.aten.upsample_bilinear2d_backward(grad, grid, bias.block.shape, False)
    return AgentBias(
        block.to(bias.block.dtype), grad.sum(-1).to(bias.row.dtype), grad.sum(-2).to(bias.column.dtype), extra
    )


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, M, N, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """[B, M, N, D] -> [B, N, C]"""
    return x.transpose(1, 2).flatten(2)


def _weights(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(x y^T + bias) over the rows of y; bias broadcasts over the batch."""
    logits = x @ y.transpose(-2, -1)
    return (logits if bias is None else logits + bias.to(logits.dtype)).softmax(-1)


def _both_weights(q, agents, k, grid, key_grid, key_bias, query_bias, scale, query_scale) -> tuple[Tensor, Tensor]:
    """Weights of keys in agents [B, M, n, Nk] and of agents in queries [B, M, N, n], from tensors split in heads."""
    key_full = None if key_bias is None else expand_bias(key_bias, key_grid)
    query_full = None if query_bias is None else expand_bias(query_bias, grid).transpose(-2, -1)
    return _weights(agents * scale, k, key_full), _weights(q * query_scale, agents, query_full)


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    grid: tuple[int, int] | None,
    key_grid: tuple[int, int] | None,
    key_bias: AgentBias | None,
    query_bias: AgentBias | None,
    scale: float,
    query_scale: float,
) -> Tensor:
    """Agents attend to keys, queries attend to agents; see `op.agent_attention`."""
    q, agents, k, v = (_split_heads(x, heads) for x in (q, agents, k, v))
    aggregate, broadcast = _both_weights(
        q, agents, k, grid, key_grid, key_bias, query_bias, scale, query_scale
    )  # fmt: skip
    agent_values = aggregate.to(v.dtype) @ v  # [B, M, n, D]
    return _merge_heads(broadcast.to(v.dtype) @ agent_values)


def agent_attention_backward(
    grad: Tensor,
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    grid: tuple[int, int] | None,
    key_grid: tuple[int, int] | None,
    key_bias: AgentBias | None,
    query_bias: AgentBias | None,
    scale: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, AgentBias | None, AgentBias | None]:
    """Gradients of `agent_attention` with respect to q, agents, k, v, key_bias and query_bias, written out.

    Autograd does not reach inside a registered op; elsewhere it differentiates the forward by itself.
    """
    q, agents, k, v, grad = (_split_heads(x, heads) for x in (q, agents, k, v, grad))
    aggregate, broadcast = _both_weights(
        q, agents, k, grid, key_grid, key_bias, query_bias, scale, query_scale
    )  # fmt: skip
    d_broadcast = grad @ (aggregate @ v).transpose(-2, -1)
    d_query_logits = broadcast * (d_broadcast - (broadcast * d_broadcast).sum(-1, keepdim=True))  # [B, M, N, n]
    d_agent_values = broadcast.transpose(-2, -1) @ grad  # [B, M, n, D]
    d_aggregate = d_agent_values @ v.transpose(-2, -1)
    d_key_logits = aggregate * (d_aggregate - (aggregate * d_aggregate).sum(-1, keepdim=True))  # [B, M, n, Nk]

    dq = query_scale * d_query_logits @ agents
    dk = scale * d_key_logits.transpose(-2, -1) @ agents
    dv = aggregate.transpose(-2, -1) @ d_agent_values
    d_agents = query_scale * d_query_logits.transpose(-2, -1) @ q + scale * d_key_logits @ k
    d_key_bias = d_query_bias = None
    if key_bias is not None:
        d_key_bias = expand_bias_backward(d_key_logits.sum(0), key_bias, key_grid)
    if query_bias is not None:
        d_query_bias = expand_bias_backward(d_query_logits.sum(0).transpose(-2, -1), query_bias, grid)
    return *(_merge_heads(x) for x in (dq, d_agents, dk, dv)), d_key_bias, d_query_bias
