"""Agent-DeiT: the plain vision transformer with agent attention (arXiv:2312.08874)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.backbones.agent_layers import AgentAttention, Block, Grid, SoftmaxAttention, init_linear
from zoo.backbones.agent_pyramid import record_input_size

NORM_EPS = 1e-6
# Which of the four agent numbers each pair of blocks takes; further blocks take the last.
_AGENTS_OF_PAIR = (0, 1, 2, 2, 2, 3)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Non-overlapping patches, [B, C, H, W] -> [B, H / p, W / p, D]; an incomplete border is filled with zeros."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = (-side % self.patch_size for side in x.shape[2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.proj(x).permute(0, 2, 3, 1)


# FX wraps functions whose name has no leading underscore.
@register_notrace_function
def add_position(x: Tensor, cls_token: Tensor, pos_embed: Tensor, made_for: Grid) -> Tensor:
    """Tokens of a map behind the class token, with positions; those of another map are resized bicubically."""
    grid = (x.shape[1], x.shape[2])
    if grid != made_for:
        pos_embed = resample_abs_pos_embed(pos_embed, grid, made_for, antialias=False)
    return torch.cat((cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1) + pos_embed


class AgentDeiT(nn.Module):
    """Agent-DeiT image classifier and feature extractor; any input size runs.

    Args:
        img_size: Input size that position embedding and biases are made for; others resize them.
        patch_size: Side of a patch.
        in_chans: Channels of the input image.
        num_classes: Classes; 0 for features.
        global_pool: What the classifier sees: the class token ("token"), the mean of the others ("avg"), or all ("").
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        mlp_ratio: Hidden over outer width of the MLP.
        agent_nums: Four square numbers of agents, for blocks 1-2, 3-4, 5-10 and the rest; or one for all.
        agent_depth: Number of leading blocks with agent attention, the others have softmax attention; all by default.
        agent_grid: Agents at run time, (rows, columns), where they differ from `agent_nums`.
        qkv_bias: Bias of the projection to queries, keys and values.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Source: arXiv:2312.08874.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        agent_nums: int | Sequence[int] = 49,
        agent_depth: int | None = None,
        agent_grid: Sequence[int] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        agents = [agent_nums] * 4 if isinstance(agent_nums, int) else list(agent_nums)
        if len(agents) != 4:
            raise ValueError(f"agent_nums needs one number or four, got {agent_nums}.")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self._set_pool(global_pool)
        self.grid = self._grid_of(img_size, patch_size)

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim, **dd))
        rates = calculate_drop_path_rates(drop_path_rate, depth)

        def attention(i: int) -> nn.Module:
            if agent_depth is not None and i >= agent_depth:
                return SoftmaxAttention(embed_dim, num_heads, qkv_bias, **dd)
            number = agents[_AGENTS_OF_PAIR[min(i // 2, len(_AGENTS_OF_PAIR) - 1)]]
            options = dict(class_token=True, agent_grid=agent_grid, qkv_bias=qkv_bias)
            return AgentAttention(embed_dim, num_heads, number, self.grid, **options, **dd)

        self.blocks = nn.Sequential(
            *(Block(embed_dim, attention(i), mlp_ratio, rates[i], NORM_EPS, **dd) for i in range(depth))
        )
        self.norm = LayerNorm(embed_dim, eps=NORM_EPS, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear weights, class token and position embedding, zero biases."""
        init_linear(self)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter.device.type != "meta":
                trunc_normal_(parameter, std=0.02)

    @staticmethod
    def _grid_of(img_size: int | Sequence[int], patch_size: int) -> Grid:
        return tuple(-(-side // patch_size) for side in to_2tuple(img_size))

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("token", "avg", ""):
            raise ValueError(f'global_pool must be "token", "avg" or "", got {global_pool!r}.')
        self.global_pool = global_pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^blocks\.(\d+)", None), (r"^(?:norm|head)", (99999,))]
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes for none, global_pool="" for all tokens."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        like = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        init_linear(self.head)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make another input size the constructed one: position tables are resized, as for fine-tuning.

        Args:
            img_size: Side, or (height, width).
        """
        old, self.grid = self.grid, self._grid_of(img_size, self.patch_embed.patch_size)
        resized = resample_abs_pos_embed(self.pos_embed.detach(), self.grid, old, antialias=False)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        for module in self.blocks.modules():
            if isinstance(module, AgentAttention):
                module.set_grid(self.grid)
        record_input_size(self, img_size)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Images -> tokens [B, 1 + N, C] with their positions, and the grid."""
        x = self.patch_embed(x)  # [B, H, W, C]
        grid = (x.shape[1], x.shape[2])
        return add_position(x, self.cls_token, self.pos_embed, self.grid), grid

    def _block(self, i: int, x: Tensor, grid: Grid) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.blocks[i], x, grid)
        return self.blocks[i](x, grid)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Outputs of blocks, and the output of `forward_features`.

        Args:
            x: Images [B, in_chans, H, W].
            indices: Blocks to return: None for all, a number for the last n, or a list.
            return_prefix_tokens: Return pairs of patches and class token [B, 1, C].
            norm: Apply the final norm to all of them.
            stop_early: Stop after the last block asked for.
            output_fmt: "NCHW" for maps or "NLC" for patch tokens.
            intermediates_only: Return only the list.

        Raises:
            ValueError: Unknown output format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC", got {output_fmt!r}.')
        take, max_index = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        found = []
        for i in range(max_index + 1 if stop_early else len(self.blocks)):
            x = self._block(i, x, grid)
            if i in take:
                found.append(self.norm(x) if norm else x)
        intermediates = [y[:, 1:] for y in found]
        if output_fmt == "NCHW":
            intermediates = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if return_prefix_tokens:
            intermediates = [(y, tokens[:, :1]) for y, tokens in zip(intermediates, found, strict=True)]
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given blocks do not need; returns the block numbers."""
        take, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> normalised tokens [B, 1 + N, C], the class token first"""
        x, grid = self._embed(x)
        for i in range(len(self.blocks)):
            x = self._block(i, x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
