"""Agent-CSWin: cross-shaped windows with agent attention over the whole map in early stages (arXiv:2312.08874)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.agent_layers import (
    AgentStripAttention,
    Block,
    Grid,
    agent_blocks,
    check_heads,
    from_strips,
    softmax_heads,
    to_strips,
)
from zoo.backbones.agent_pyramid import (
    NORM_EPS,
    AgentPyramid,
    ConvNorm,
    build_stages,
    ceil_divide,
    per_stage,
    stage_grids,
)
from zoo.backbones.layers import DepthwiseConv2d


@register_notrace_module
class StripAttention(nn.Module):
    """Softmax attention inside strips of a map plus a convolution of the values (locally enhanced position encoding).

    A map that strips do not divide is padded at the bottom or right; padding is masked out.

    Args:
        dim: Channels C.
        num_heads: Heads.
        strip: Rows and columns of a strip, None for the map's own.
    """

    def __init__(self, dim: int, num_heads: int, strip: tuple[int | None, int | None], device=None, dtype=None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.strip = num_heads, strip
        self.get_v = DepthwiseConv2d(dim, 3, device=device, dtype=dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three maps [B, H, W, C] -> [B, H, W, C]"""
        B, H, W, _ = q.shape
        strip = (self.strip[0] or H, self.strip[1] or W)
        bottom, right = -H % strip[0], -W % strip[1]
        bias = None
        if bottom or right:
            q, k, v = (F.pad(t, (0, 0, 0, right, 0, bottom)) for t in (q, k, v))
            bias = _padding_bias((H, W), (bottom, right), strip, q).repeat(B, 1, 1, 1)
        q, k, v = (to_strips(t, strip) for t in (q, k, v))  # [B * S, h, w, C]
        out = softmax_heads(*(t.flatten(1, 2) for t in (q, k, v)), self.num_heads, bias)
        out = from_strips(self.get_v(v, residual=out.unflatten(1, strip)), (H + bottom, W + right))
        return out[:, :H, :W]


def _padding_bias(grid: Grid, padding: Grid, strip: Grid, like: Tensor) -> Tensor:
    """Logit bias that leaves padded keys out, [strips, 1, 1, h * w]; no strip is all padding."""
    inside = F.pad(like.new_ones(1, *grid, 1, dtype=torch.bool), (0, 0, 0, padding[1], 0, padding[0]))
    bias = torch.zeros_like(inside, dtype=like.dtype).masked_fill(~inside, float("-inf"))
    return to_strips(bias, strip).flatten(1)[:, None, None]


@register_notrace_module
class CrossShapedAttention(nn.Module):
    """Projections around attention in vertical and horizontal strips, each on half of the channels.

    Args:
        dim: Channels C.
        num_heads: Heads, half of them for each direction.
        split: Width of a strip; None for a single branch over the whole map.
        agent: A module of agent attention over the whole map, instead of strips.
        qkv_bias: Bias of the projection to queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split: int | None = None,
        agent: AgentStripAttention | None = None,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        if agent is not None:
            branches = [agent]
        elif split is None:
            branches = [StripAttention(dim, num_heads, (None, None), **dd)]
        else:
            check_heads(dim // 2, num_heads // 2)
            strips = ((None, split), (split, None))
            branches = [StripAttention(dim // 2, num_heads // 2, strip, **dd) for strip in strips]
        self.attns = nn.ModuleList(branches)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        # Each branch takes its share of q, of k and of v.
        shares = zip(*(t.chunk(len(self.attns), dim=-1) for t in (q, k, v)), strict=True)
        out = [attn(*share) for attn, share in zip(self.attns, shares, strict=True)]
        return self.proj(out[0] if len(out) == 1 else torch.cat(out, dim=-1))


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions, each with LayerNorm, [B, C, H, W] -> [B, D, H / 4, W / 4]"""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, 2, 1, **dd)
        self.act = nn.GELU()
        self.conv2 = ConvNorm(dim // 2, dim, 3, 2, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))


def _wide_stem_divide(side: int, factor: int) -> int:
    """Maps behind the 7 x 7 convolution of stride 4, whose padding of 2 lets it miss the last pixels."""
    return (side + 1) // 4 if factor == 4 else ceil_divide(side, factor)


class AgentCSWin(AgentPyramid):
    """Agent-CSWin image classifier and feature extractor; any input size runs.

    Agent blocks attend over the whole map. Softmax blocks attend in vertical and horizontal strips, or over the whole
    map in the last stage and where a strip is as wide as the constructed map.

    Args:
        img_size: Input size that biases are made for; others resize them.
        in_chans: Channels of the input image.
        num_classes: Classes; 0 for features.
        global_pool: Pooling before the classifier, "avg" or "".
        depths: Blocks per stage.
        embed_dims: Channels per stage; one number doubles with each stage.
        num_heads: Heads per stage.
        mlp_ratio: Hidden over outer width of the MLP.
        agent_nums: Agents per stage, square numbers.
        attn_type: A letter a stage: A agent attention, B softmax attention, M mixed; see `agent_blocks`.
        split_sizes: Width of the strips of softmax blocks per stage.
        agent_grids: Agents per stage at run time, (rows, columns), for dense tasks; None for those of `agent_nums`.
        conv_stem: Two 3 x 3 convolutions before the first stage, instead of one of 7 x 7.
        mlp_dwconv: 3 x 3 depth-wise convolution inside the MLP.
        qkv_bias: Bias of the projections.
        extra_norms: One LayerNorm per stage on the features, for dense tasks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 4, 18, 1),
        embed_dims: int | Sequence[int] = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        agent_nums: int | Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AABB",
        split_sizes: int | Sequence[int] = (1, 2, 7, 7),
        agent_grids: Sequence[Sequence[int]] | None = None,
        conv_stem: bool = False,
        mlp_dwconv: bool = False,
        qkv_bias: bool = True,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        count = len(depths)
        if isinstance(embed_dims, int):
            embed_dims = [embed_dims * 2**i for i in range(count)]
        dims, heads = per_stage(embed_dims, count, "embed_dims"), per_stage(num_heads, count, "num_heads")
        agents, splits = per_stage(agent_nums, count, "agent_nums"), per_stage(split_sizes, count, "split_sizes")
        run_grids = per_stage(agent_grids, count, "agent_grids")
        divide = ceil_divide if conv_stem else _wide_stem_divide
        grids = stage_grids(img_size, count, divide)
        agent_depths = agent_blocks(attn_type, depths)

        def attention(i: int, j: int) -> nn.Module:
            agent = split = None
            if j < agent_depths[i]:
                agent = AgentStripAttention(dims[i], heads[i], agents[i], grids[i], agent_grid=run_grids[i], **dd)
            elif i < count - 1 and grids[i] != (splits[i], splits[i]):
                split = splits[i]
            return CrossShapedAttention(dims[i], heads[i], split, agent, qkv_bias, **dd)

        stem = ConvStem(in_chans, dims[0], **dd) if conv_stem else ConvNorm(in_chans, dims[0], 7, 4, 2, **dd)
        super().__init__(
            stem,
            build_stages(
                depths,
                drop_path_rate,
                lambda i: ConvNorm(dims[i - 1], dims[i], 3, 2, 1, **dd),
                lambda i, j, rate: Block(
                    dims[i], attention(i, j), mlp_ratio, rate, NORM_EPS, mlp_dwconv=mlp_dwconv, **dd
                ),
            ),
            dims,
            grids,
            extra_norms=extra_norms,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.divide = divide
