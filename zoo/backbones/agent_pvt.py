"""Agent-PVT: the pyramid vision transformer with agent attention (arXiv:2312.08874)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm, resample_abs_pos_embed, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.agent_layers import (
    Block,
    Grid,
    SpatialReductionAgentAttention,
    SpatialReductionAttention,
    agent_blocks,
)
from zoo.backbones.agent_pyramid import NORM_EPS, AgentPyramid, build_stages, floor_divide, per_stage, stage_grids

# The norms of blocks; those of embeddings and spatial reductions have NORM_EPS.
BLOCK_NORM_EPS = 1e-6


@register_notrace_module
class PositionedPatchEmbed(nn.Module):
    """Patches by a convolution, LayerNorm and a learned position embedding, [B, C, H, W] -> [B, C', H / p, W / p].

    The convolution leaves out a border that does not fill a patch. On another map than the constructed one the position
    embedding is resized bilinearly.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: int, grid: Grid, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.grid = grid
        self.proj = nn.Conv2d(in_dim, dim, patch_size, patch_size, **dd)
        self.norm = LayerNorm(dim, eps=NORM_EPS, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, **dd))
        if self.pos_embed.device.type != "meta":
            trunc_normal_(self.pos_embed, std=0.02)

    def set_grid(self, grid: Grid) -> None:
        """Resize the position embedding bicubically, for fine-tuning."""
        resized = resample_abs_pos_embed(self.pos_embed.detach(), grid, self.grid, num_prefix_tokens=0, antialias=False)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))  # [B, H, W, C]
        grid, pos_embed = tuple(x.shape[1:3]), self.pos_embed
        if grid != self.grid:
            pos_embed = resample_abs_pos_embed(
                pos_embed, grid, self.grid, num_prefix_tokens=0, interpolation="bilinear", antialias=False
            )
        return (x + pos_embed.unflatten(1, grid)).permute(0, 3, 1, 2)


class AgentPVT(AgentPyramid):
    """Agent-PVT image classifier and feature extractor; any input size of at least 32 x 32 pixels runs.

    There is no norm before the classifier.

    Args:
        img_size: Input size that position embeddings and biases are made for; others resize them.
        in_chans: Channels of the input image.
        num_classes: Classes; 0 for features.
        global_pool: Pooling before the classifier, "avg" or "".
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden over outer width of the MLP per stage.
        agent_nums: Agents per stage, square numbers.
        attn_type: A letter a stage: A agent attention, B softmax attention, M mixed; see `agent_blocks`.
        sr_ratios: Reduction of keys and values in softmax stages.
        agent_sr_ratios: The same in agent stages.
        agent_grids: Agents per stage at run time, (rows, columns), for dense tasks; None for those of `agent_nums`.
        qkv_bias: Bias of the projections.
        extra_norms: One LayerNorm per stage on the features, for dense tasks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
    """

    divide = staticmethod(floor_divide)

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: float | Sequence[float] = (8, 8, 4, 4),
        agent_nums: int | Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AAAA",
        sr_ratios: int | Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: int | Sequence[int] = 1,
        agent_grids: Sequence[Sequence[int]] | None = None,
        qkv_bias: bool = True,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        count = len(depths)
        dims, heads = per_stage(embed_dims, count, "embed_dims"), per_stage(num_heads, count, "num_heads")
        ratios, agents = per_stage(mlp_ratios, count, "mlp_ratios"), per_stage(agent_nums, count, "agent_nums")
        sr, agent_sr = per_stage(sr_ratios, count, "sr_ratios"), per_stage(agent_sr_ratios, count, "agent_sr_ratios")
        run_grids = per_stage(agent_grids, count, "agent_grids")
        grids = stage_grids(img_size, count, self.divide)
        agent_depths = agent_blocks(attn_type, depths)

        def attention(i: int, j: int) -> nn.Module:
            if j >= agent_depths[i]:
                return SpatialReductionAttention(dims[i], heads[i], sr[i], qkv_bias, **dd)
            options = dict(sr_ratio=agent_sr[i], agent_grid=run_grids[i], qkv_bias=qkv_bias)
            return SpatialReductionAgentAttention(dims[i], heads[i], agents[i], grids[i], **options, **dd)

        super().__init__(
            PositionedPatchEmbed(in_chans, dims[0], 4, grids[0], **dd),
            build_stages(
                depths,
                drop_path_rate,
                lambda i: PositionedPatchEmbed(dims[i - 1], dims[i], 2, grids[i], **dd),
                lambda i, j, rate: Block(dims[i], attention(i, j), ratios[i], rate, BLOCK_NORM_EPS, **dd),
            ),
            dims,
            grids,
            final_norm=False,
            extra_norms=extra_norms,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
