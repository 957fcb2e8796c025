"""A transformer block of the UNet under AgentSD: its selection of tokens and its attention processors.

Processors are plain objects, so the UNet's state dict does not change, and they call the projections as modules, so
adapters and quantised layers in them keep working.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.agent_sd.merging import Merge, destinations, match, select
from zoo.heads.agent_sd.schedule import Context
from zoo.kernels import agent_attention
from zoo.kernels.agent.op import can_run


class Selection(NamedTuple):
    """Merges of one call of a block; None where its tokens stay as they are, or where there are no agents."""

    tokens: Merge | None
    agents: Merge | None


class Layer:
    """One transformer block: selects tokens from its input, once a call, for all parts of the block that merge."""

    def __init__(self, block: nn.Module, index: int, context: Context) -> None:
        self.block, self.index, self.context = block, index, context
        self.selection: Selection | None = None
        self._replaced, self._hooks = [], []

    def install(self, crossattn: bool = False, mlp: bool = False) -> None:
        """Put the processors and hooks in place."""
        block = self.block
        self._hooks = [
            block.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_hook(self._end),
        ]
        self._replace(block.attn1, AgentProcessor)
        if crossattn and block.attn2 is not None:
            self._replace(block.attn2, MergedQueriesProcessor)
        if mlp:
            self._hooks += [
                block.ff.register_forward_pre_hook(self._merge_mlp),
                block.ff.register_forward_hook(self._unmerge_mlp),
            ]

    def _replace(self, attn: nn.Module, processor: type) -> None:
        stock = attn.processor
        ours = processor(self, stock)
        attn.set_processor(ours)
        self._replaced.append((attn, ours, stock))

    def uninstall(self) -> None:
        """Take hooks and processors out again; a processor that someone else has set since then stays."""
        for hook in self._hooks:
            hook.remove()
        for attn, ours, stock in self._replaced:
            if attn.processor is ours:
                attn.set_processor(stock)
        self._replaced, self._hooks = [], []

    def _begin(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.selection = self._select(x) if self._installed() else None

    def _installed(self) -> bool:
        if all(attn.processor is ours for attn, ours, _ in self._replaced):
            return True
        warnings.warn(
            "another attention processor has replaced that of AgentSD: apply it again to use it", stacklevel=2
        )
        return False

    def _end(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        self.selection = None

    def _select(self, x: Tensor) -> Selection | None:
        plan = self.context.plan(x.shape[1])
        if plan is None:
            return None
        offsets = self.context.cell_offsets(self.index, plan, x.shape[0], x.device)
        found = match(x, destinations(plan.grid, plan.cell, offsets, x.device), plan.ranked)
        tokens = select(found, plan.merged) if plan.merged else None
        return Selection(tokens, select(found, plan.agent_merged) if plan.agent_merged else None)

    def _merge_mlp(self, ff: nn.Module, args: tuple) -> tuple | None:
        if self.selection is None or self.selection.tokens is None:
            return None
        if self.block._chunk_size is not None:
            raise NotImplementedError(
                f"merge_mlp takes all tokens at once, this feed-forward has chunks of {self.block._chunk_size}: call "
                "block.set_chunk_feed_forward(None), or apply AgentSD without merge_mlp."
            )
        return (self.selection.tokens.merge(args[0]), *args[1:])

    def _unmerge_mlp(self, ff: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.selection is None or self.selection.tokens is None:
            return None
        return self.selection.tokens.unmerge(output)


class AgentProcessor:
    """Self-attention over merged tokens: through agents where there are any, else by the processor that it replaces."""

    def __init__(self, layer: Layer, stock) -> None:
        self.layer, self.stock = layer, stock

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        selection = self.layer.selection
        if selection is None or encoder_hidden_states is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        if attention_mask is not None:
            raise NotImplementedError(
                f"AgentSD merges tokens and takes no mask over them, got attention_mask of shape "
                f"{tuple(attention_mask.shape)}: call the UNet without attention_mask, or remove AgentSD first."
            )
        tokens, agents = selection
        x = hidden_states if tokens is None else tokens.merge(hidden_states)
        if agents is None:
            out = self.stock(attn, x)
        else:
            out = self._attend(attn, x, agents.merge(hidden_states))
        return out if tokens is None else tokens.unmerge(out)

    def _attend(self, attn: nn.Module, x: Tensor, agents: Tensor) -> Tensor:
        """x [B, N, C] attends to itself through agents [B, n, C]."""
        context = self.layer.context
        q, k, v, a = attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.to_q(agents)
        D = q.shape[-1] // attn.heads
        out = attend(q, a, k, v, attn.heads, D**-0.5, D ** (-0.5 * context.k_scale2))
        # Many tokens read the same few agents; their own values keep them apart.
        out = torch.add(out, v, alpha=context.k_shortcut)
        return attn.to_out[1](attn.to_out[0](out))


def attend(q: Tensor, agents: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, query_scale: float) -> Tensor:
    """Agent attention [B, N, C], on the kernel where it takes the problem: it does not hold many or wide agents."""
    if q.is_cuda and not can_run(q, agents, k, v, heads, scale, query_scale):
        return attend_twice(q, agents, k, v, heads, scale, query_scale)
    return agent_attention(q, agents, k, v, heads=heads, scale=scale, query_scale=query_scale)


def attend_twice(
    q: Tensor, agents: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, query_scale: float
) -> Tensor:  # fmt: skip
    """The same as two fused attentions."""
    # [B, tokens, C] -> [B, M, tokens, D]
    q, agents, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, agents, k, v))
    agent_values = F.scaled_dot_product_attention(agents, k, v, scale=scale)
    out = F.scaled_dot_product_attention(q, agents, agent_values, scale=query_scale)
    return out.transpose(1, 2).flatten(2)


class MergedQueriesProcessor:
    """Cross-attention of merged tokens, by the processor that it replaces."""

    def __init__(self, layer: Layer, stock) -> None:
        self.layer, self.stock = layer, stock

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        tokens = None if self.layer.selection is None else self.layer.selection.tokens
        if tokens is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        return tokens.unmerge(self.stock(attn, tokens.merge(hidden_states), encoder_hidden_states, attention_mask))
