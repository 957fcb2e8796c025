"""BiFormer: vision transformer with bi-level routing attention.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu, Wang, Ke, Zhang and Lau, CVPR 2023,
arXiv:2303.08810. Official weights convert with `zoo convert biformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm, calculate_drop_path_rates, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from zoo.backbones.layers import DepthwiseConv2d, Mlp, global_attention
from zoo.backbones.pyramid import Pyramid
from zoo.convert.biformer import ORIGIN, convert
from zoo.hub import embedded_cfg
from zoo.kernels import Routing, bilevel_attention, route_regions
from zoo.kernels.bilevel_routing import reference

__all__ = ["AttentionLePE", "BiFormer", "BiLevelRoutingAttention", "BiLevelRoutingAttentionNCHW", "Block"]

KV_POOLS = ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool")
NORM_EPS = 1e-6


def _pair(n_win: int | Sequence[int]) -> tuple[int, int]:
    rows, cols = (n_win, n_win) if isinstance(n_win, int) else tuple(n_win)
    if min(rows, cols) < 1:
        raise ValueError(f"n_win must be positive, got {n_win}.")
    return rows, cols


def _check_bra(dim: int, num_heads: int, qk_dim: int, n_win: int | Sequence[int], topk: int) -> None:
    rows, cols = _pair(n_win)
    if dim % num_heads or qk_dim % num_heads:
        raise ValueError(f"num_heads must divide dim and qk_dim, got {dim=}, {qk_dim=}, {num_heads=}.")
    if not 1 <= topk <= rows * cols:
        raise ValueError(f"topk must lie between 1 and the {rows * cols} regions of n_win={n_win}, got {topk}.")


class Router(nn.Module):
    """Trainable region routing: affinities of region descriptors after a shared linear map."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.emb = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, q_region: Tensor, k_region: Tensor) -> tuple[Tensor, Tensor]:
        return self.emb(q_region), self.emb(k_region)


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention (BRA) of BiFormer-T/S/B and STL, on channels-last maps.

    The map is cut into n_win x n_win regions; each region attends to the tokens of the `topk` regions whose
    mean keys fit its mean query best. A map that n_win does not divide is zero-padded at the bottom and right
    BEFORE the projection, so padding carries the bias and takes part, as in the official code; with
    `mask_padding` it is left out everywhere instead.

    Args:
        dim: Channels C.
        num_heads: Heads; the logit scale is qk_dim**-0.5, of the full width, as published.
        n_win: Regions per side, or (rows, columns).
        topk: Regions that each region attends to; all of them where a small map has fewer.
        qk_dim: Channels of queries and keys; `dim` by default.
        side_dwconv: Kernel of the depth-wise convolution on the values (local enhancement); 0 for none.
        kv_downsample_mode: "identity", or pooling of keys and values inside each region: "avgpool" or "maxpool"
            by kv_downsample_ratio, "ada_avgpool" or "ada_maxpool" to kv_per_win x kv_per_win tokens.
        kv_downsample_ratio: Factor of "avgpool" and "maxpool".
        kv_per_win: Tokens per side of "ada_avgpool" and "ada_maxpool".
        param_routing: Pass the region descriptors through a linear map; needs diff_routing.
        diff_routing: Let gradients flow through the routing weights; needs soft_routing.
        soft_routing: Multiply the keys and values of a region by its routing weight.
        param_attention: "qkvo", or "qkv" for no output projection.
        mask_padding: Leave padding out of means, softmax and convolution.

    Raises:
        ValueError, NotImplementedError: Arguments that do not fit, or that the method does not define.

    Source: arXiv:2303.08810.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        side_dwconv: int = 5,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratio: int = 1,
        kv_per_win: int = 1,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        param_attention: str = "qkvo",
        mask_padding: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        qk_dim = qk_dim or dim
        _check_bra(dim, num_heads, qk_dim, n_win, topk)
        if kv_downsample_mode not in KV_POOLS:
            raise ValueError(f"kv_downsample_mode must be one of {KV_POOLS}, got {kv_downsample_mode!r}.")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f'param_attention must be "qkvo" or "qkv", got {param_attention!r}.')
        if diff_routing and not soft_routing:
            raise NotImplementedError("diff_routing needs soft_routing=True: hard routing has no gradient.")
        if param_routing and not diff_routing:
            raise NotImplementedError("param_routing needs diff_routing=True, else its weights would never train.")
        if mask_padding and kv_downsample_mode != "identity":
            raise NotImplementedError("mask_padding does not combine with pooled keys and values.")
        self.dim, self.qk_dim, self.num_heads = dim, qk_dim, num_heads
        self.n_win, self.topk, self.scale = n_win, topk, qk_dim**-0.5
        self.kv_downsample_mode = kv_downsample_mode
        self.kv_downsample_ratio, self.kv_per_win = kv_downsample_ratio, kv_per_win
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self.mask_padding = mask_padding
        self.router = Router(qk_dim, **dd) if param_routing else None
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, **dd)
        self.lepe = DepthwiseConv2d(dim, side_dwconv, **dd) if side_dwconv else None
        self.wo = nn.Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()

    def _pool(self, x: Tensor, region: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Pool a divisible map inside each region: the smaller map and its region size."""
        if self.kv_downsample_mode == "identity":
            return x, region
        B, H, W, C = x.shape
        rows, cols = H // region[0], W // region[1]
        x = reference.to_regions(x, region).reshape(B * rows * cols, *region, C).permute(0, 3, 1, 2)
        if self.kv_downsample_mode.startswith("ada"):
            pool = F.adaptive_avg_pool2d if self.kv_downsample_mode == "ada_avgpool" else F.adaptive_max_pool2d
            x = pool(x, self.kv_per_win)
        else:
            pool = F.avg_pool2d if self.kv_downsample_mode == "avgpool" else F.max_pool2d
            x = pool(x, self.kv_downsample_ratio)
        h, w = x.shape[2:]
        x = x.permute(0, 2, 3, 1).reshape(B, rows * cols, h * w, C)
        return reference.from_regions(x, (h, w), (rows * h, cols * w)), (h, w)

    def _route(self, q: Tensor, k: Tensor, region: tuple[int, int]) -> Routing:
        rows, cols = reference.region_grid((q.shape[1], q.shape[2]), region)
        topk = min(self.topk, rows * cols)
        if not self.diff_routing:
            return route_regions(q, k, region, topk, scale=self.scale)
        q_region, k_region = reference.region_mean(q, region), reference.region_mean(k, region)
        if self.router is not None:
            with reference.without_autocast(q.device.type):
                q_region, k_region = self.router(q_region, k_region)
        logits = reference.affinity(q_region, k_region, self.scale)
        return Routing(*reference.top_regions(logits, topk), (rows, cols))

    def forward(
        self, x: Tensor, n_win: int | Sequence[int] | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Attend.

        Args:
            x: Map [B, H, W, C].
            n_win: Regions per side for this call; the layer's by default.
            return_routing: Also return the `Routing`, whose grid covers the padded map.

        Returns:
            [B, H, W, C], or that and the `Routing`.
        """
        H, W = x.shape[1:3]
        rows, cols = _pair(self.n_win if n_win is None else n_win)
        region = (-(-H // rows), -(-W // cols))
        if not self.mask_padding and (H % rows or W % cols):
            x = F.pad(x, (0, 0, 0, cols * region[1] - W, 0, rows * region[0] - H))
        q, k, v = self.qkv(x).split((self.qk_dim, self.qk_dim, self.dim), dim=-1)
        routing = self._route(q, k, region)
        (keys, kv_region), (values, _) = self._pool(k, region), self._pool(v, region)
        out = bilevel_attention(
            q, keys, values, routing.index, heads=self.num_heads, region=region, kv_region=kv_region,
            scale=self.scale, mask_padding=self.mask_padding, distinct=True,
            weight=routing.weight if self.soft_routing else None,
        )  # fmt: skip
        if self.lepe is not None:
            out = self.lepe(v, residual=out)
        out = self.wo(out)[:, :H, :W]
        return (out, routing) if return_routing else out


@register_notrace_module
class BiLevelRoutingAttentionNCHW(nn.Module):
    """The refactored bi-level routing attention of BiFormer-STL-nchw, on maps [B, C, H, W].

    It equals `BiLevelRoutingAttention` where n_win divides the map. Elsewhere the region size is H // n_win
    and W // n_win, at least 1, so that there can be more than n_win regions per side, and the padding is added
    AFTER the projection: padded keys and values are zero and stay in the softmax, unless `mask_padding`.

    Args:
        dim: Channels C.
        num_heads: Heads; the logit scale is dim**-0.5, of the full width, as published.
        n_win: Regions per side, or (rows, columns).
        topk: Regions that each region attends to; all of them where a small map has fewer.
        side_dwconv: Kernel of the depth-wise convolution on the values; 0 for none.
        mask_padding: Leave padding out of the softmax.

    Source: arXiv:2303.08810.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        *,
        side_dwconv: int = 5,
        mask_padding: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        _check_bra(dim, num_heads, dim, n_win, topk)
        self.num_heads, self.n_win, self.topk = num_heads, n_win, topk
        self.scale = dim**-0.5
        self.mask_padding = mask_padding
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.lepe = DepthwiseConv2d(dim, side_dwconv, **dd) if side_dwconv else None
        self.output_linear = nn.Conv2d(dim, dim, 1, **dd)

    def forward(
        self, x: Tensor, n_win: int | Sequence[int] | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """[B, C, H, W] -> the same, or that and the `Routing` with `return_routing`."""
        H, W = x.shape[2:]
        rows, cols = _pair(self.n_win if n_win is None else n_win)
        region = (max(H // rows, 1), max(W // cols, 1))
        grid = reference.region_grid((H, W), region)
        qkv = self.qkv_linear(x).permute(0, 2, 3, 1).contiguous()  # [B, H, W, 3C]
        q, k, v = qkv.chunk(3, dim=-1)
        # The official affinities are not scaled.
        routing = route_regions(q, k, region, min(self.topk, grid[0] * grid[1]))
        out = bilevel_attention(
            q, k, v, routing.index, heads=self.num_heads, region=region, scale=self.scale,
            mask_padding=self.mask_padding, distinct=True,
        )  # fmt: skip
        if self.lepe is not None:
            out = self.lepe(v, residual=out)
        out = self.output_linear(out.permute(0, 3, 1, 2))
        return (out, routing) if return_routing else out


@register_notrace_module
class AttentionLePE(nn.Module):
    """Global attention plus a depth-wise convolution, as in stage 4, on maps [B, H, W, C].

    Args:
        dim: Channels C.
        num_heads: Heads; the logit scale is (dim / num_heads)**-0.5, per head.
        side_dwconv: Kernel of the depth-wise convolution; 0 for none.
        lepe_on: "input" convolves x (BiFormer-T/S/B, STL), "value" the values (STL-nchw).
    """

    def __init__(
        self, dim: int, num_heads: int = 8, side_dwconv: int = 5, lepe_on: str = "input", device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {dim=}, {num_heads=}.")
        if lepe_on not in ("input", "value"):
            raise ValueError(f'lepe_on must be "input" or "value", got {lepe_on!r}.')
        self.num_heads, self.lepe_on = num_heads, lepe_on
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = DepthwiseConv2d(dim, side_dwconv, **dd) if side_dwconv else None

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x [B, M, N, D]
        out = global_attention(q, k, v, self.scale).transpose(1, 2).reshape(B, H, W, C)
        if self.lepe is not None:
            source = x.to(out.dtype) if self.lepe_on == "input" else qkv[..., 2 * C :]
            out = self.lepe(source, residual=out)
        return self.proj(out)


class ConvMixer(nn.Module):
    """Linear, 5x5 depth-wise convolution, linear: the ablation without attention (topk 0)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, dim, **dd)
        self.dwconv = DepthwiseConv2d(dim, 5, **dd)
        self.fc2 = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dwconv(self.fc1(x)))


@register_notrace_module
class _ChannelsLastBRA(BiLevelRoutingAttentionNCHW):
    """The same on maps [B, H, W, C] for the blocks; both permutations are views."""

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        out, routing = super().forward(x.permute(0, 3, 1, 2), return_routing=True)
        out = out.permute(0, 2, 3, 1)
        return (out, routing) if return_routing else out


class BlockConfig(NamedTuple):
    """What the blocks of one stage share."""

    n_win: int = 7
    mlp_ratio: float = 3.0
    nchw: bool = False  # padding after the projection, and the convolution of global attention on the values
    before_attn_dwconv: int = 3
    side_dwconv: int = 5
    layer_scale_init_value: float = -1.0
    pre_norm: bool = True
    mlp_dwconv: bool = False
    mask_padding: bool = False


def _token_mixer(dim: int, num_heads: int, topk: int, cfg: BlockConfig, options: dict[str, Any], dd: dict) -> nn.Module:
    """The layer that a `topk` stands for: > 0 routed, 0 convolution, -1 and -2 global attention."""
    if topk > 0:
        common = dict(n_win=cfg.n_win, topk=topk, side_dwconv=cfg.side_dwconv, mask_padding=cfg.mask_padding)
        layer = _ChannelsLastBRA if cfg.nchw else BiLevelRoutingAttention
        return layer(dim, num_heads, **common, **options, **dd)
    if topk == 0:
        return ConvMixer(dim, **dd)
    if topk in (-1, -2):
        # Global attention keeps the default of 8 heads; -1 has no convolution in the legacy code.
        side_dwconv = cfg.side_dwconv if cfg.nchw or topk == -2 else 0
        return AttentionLePE(dim, side_dwconv=side_dwconv, lepe_on="value" if cfg.nchw else "input", **dd)
    raise ValueError(f"topk must be positive, 0 (convolution), -1 or -2 (global attention), got {topk}.")


class Block(nn.Module):
    """BiFormer block on maps [B, H, W, C]: position convolution, attention and MLP, each with a residual.

    Args:
        dim: Channels C.
        num_heads: Heads of the routed attention.
        topk: Routed regions; 0 for a convolution, -1 and -2 for global attention without and with convolution.
        drop_path: Stochastic depth rate, drawn independently for attention and MLP.
        config: What the blocks of a stage share.
        attn_options: Further arguments of `BiLevelRoutingAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        drop_path: float = 0.0,
        config: BlockConfig | None = None,
        attn_options: dict[str, Any] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        cfg = config or BlockConfig()
        self.pre_norm = cfg.pre_norm
        self.pos_embed = DepthwiseConv2d(dim, cfg.before_attn_dwconv, **dd) if cfg.before_attn_dwconv else None
        self.norm1 = LayerNorm(dim, eps=NORM_EPS, **dd)
        self.attn = _token_mixer(dim, num_heads, topk, cfg, attn_options or {}, dd)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS, **dd)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio), cfg.mlp_dwconv, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        scaled = cfg.layer_scale_init_value > 0
        self.gamma1 = nn.Parameter(torch.full((dim,), cfg.layer_scale_init_value, **dd)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), cfg.layer_scale_init_value, **dd)) if scaled else None

    def _branch(self, x: Tensor, norm: nn.Module, layer: nn.Module, gamma: Tensor | None) -> Tensor:
        y = layer(norm(x) if self.pre_norm else x)
        x = x + self.drop_path(y if gamma is None else gamma * y)
        return x if self.pre_norm else norm(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = self.pos_embed(x, residual=x)
        x = self._branch(x, self.norm1, self.attn, self.gamma1)
        return self._branch(x, self.norm2, self.mlp, self.gamma2)


class Stage(nn.Module):
    """Downsampling and blocks; maps are [B, C, H, W] outside, channels-last inside."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


def _stem(in_chans: int, dim: int, stl: bool, dd: dict) -> nn.Sequential:
    if stl:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, 4, **dd), nn.BatchNorm2d(dim, **dd))
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def _downsample(in_dim: int, dim: int, stl: bool, dd: dict) -> nn.Sequential:
    if stl:
        return nn.Sequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, 2, **dd))
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd))


def _per_stage(value: Any, stages: int, name: str) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} needs one value or one for each of {stages} stages, got {value}.")
    return values


class BiFormer(Pyramid):
    """BiFormer image classifier and feature extractor; any input size of at least 32 x 32 pixels runs.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes; 0 for features.
        global_pool: Pooling before the classifier, "avg" or "".
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        topks: Routed regions per stage, see `Block`.
        n_win: Regions per side, one number or one a stage.
        mlp_ratios: Hidden over outer width of the MLP, one number or one a stage.
        head_dim: Channels of a head of routed attention.
        stl: The Swin-like layout of the paper's ablation: patch stem, no position convolutions.
        nchw: Routed attention that pads after its projection (`BiLevelRoutingAttentionNCHW`).
        qk_dims, kv_per_wins, kv_downsample_ratios: Per stage, see `BiLevelRoutingAttention`.
        kv_downsample_mode, param_routing, diff_routing, soft_routing, mask_padding: See there.
        before_attn_dwconv, side_dwconv: Kernels of the position and value convolutions; 0 for none.
        layer_scale_init_value: Start of the learned scales of the branches; none unless positive.
        pre_norm: Normalise before (True) or after each branch.
        mlp_dwconv: 3x3 depth-wise convolution inside the MLP.
        extra_norms: One LayerNorm per stage on the features (not on the map that goes on), for dense tasks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Source: arXiv:2303.08810.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        topks: Sequence[int] = (1, 4, 16, -2),
        n_win: int | Sequence[int] = 7,
        mlp_ratios: float | Sequence[float] = 3,
        head_dim: int = 32,
        stl: bool = False,
        nchw: bool = False,
        qk_dims: Sequence[int] | None = None,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratios: int | Sequence[int] = 1,
        kv_per_wins: int | Sequence[int] = 1,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        mask_padding: bool = False,
        before_attn_dwconv: int = 3,
        side_dwconv: int = 5,
        layer_scale_init_value: float = -1.0,
        pre_norm: bool = True,
        mlp_dwconv: bool = False,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        stages = len(depths)
        embed_dims, topks = _per_stage(embed_dims, stages, "embed_dims"), _per_stage(topks, stages, "topks")
        n_win = _per_stage(n_win, stages, "n_win")
        mlp_ratios = _per_stage(mlp_ratios, stages, "mlp_ratios")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False
        self.feature_info = []

        flags = dict(
            kv_downsample_mode=kv_downsample_mode,
            param_routing=param_routing,
            diff_routing=diff_routing,
            soft_routing=soft_routing,
        )
        options = [
            dict(flags, qk_dim=qk, kv_downsample_ratio=ratio, kv_per_win=per_win)
            for qk, ratio, per_win in zip(
                _per_stage(qk_dims, stages, "qk_dims"),
                _per_stage(kv_downsample_ratios, stages, "kv_downsample_ratios"),
                _per_stage(kv_per_wins, stages, "kv_per_wins"),
                strict=True,
            )
        ]
        if nchw:
            if any(flags[k] for k in ("param_routing", "diff_routing", "soft_routing")) or qk_dims:
                raise NotImplementedError("nchw attention has no qk_dims and no trainable or soft routing.")
            if kv_downsample_mode != "identity":
                raise NotImplementedError(f"nchw attention does not pool keys and values, got {kv_downsample_mode!r}.")
            options = [{}] * stages

        self.stem = _stem(in_chans, embed_dims[0], stl, dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        blocks = []
        for i, dim in enumerate(embed_dims):
            config = BlockConfig(
                n_win[i], mlp_ratios[i], nchw, before_attn_dwconv, side_dwconv,
                layer_scale_init_value, pre_norm, mlp_dwconv, mask_padding,
            )  # fmt: skip
            down = _downsample(embed_dims[i - 1], dim, stl, dd) if i else nn.Identity()
            heads = max(dim // head_dim, 1)
            stage = [Block(dim, heads, topks[i], rate, config, options[i], **dd) for rate in rates[i]]
            blocks.append(Stage(down, stage))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*blocks)
        self.extra_norms = None
        if extra_norms:
            self.extra_norms = nn.ModuleList(LayerNorm(dim, eps=NORM_EPS, **dd) for dim in embed_dims)
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear weights, zero biases; the rest keeps torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.device.type != "meta":
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            blocks = [(r"^stages\.(\d+)", None)]
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=[*blocks, (r"^(?:norm|extra_norms|head)", (99999,))])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Pass native state dicts through and convert official ones."""
    return convert(state_dict, nchw=any(isinstance(m, BiLevelRoutingAttentionNCHW) for m in model.modules()))


def _create_biformer(variant: str, pretrained: bool, **kwargs) -> BiFormer:
    # The extra norms are no part of the chain of modules that timm's default extractor walks.
    feature_cls = dict(feature_cls="getter") if kwargs.get("extra_norms") else {}
    return build_model_with_cfg(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True, **feature_cls),
        **kwargs,
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return dict(
        dict(
            input_size=(3, 224, 224),
            min_input_size=(3, 32, 32),
            num_classes=1000,
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="stem.0",
            classifier="head.fc",
            license="mit",
            origin_url=ORIGIN,
            paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
            paper_ids="arXiv:2303.08810",
        ),
        **kwargs,
    )


def _embedded(name: str) -> dict[str, Any]:
    """Config of weights that this package carries."""
    return _cfg(**dict(dict(license="apache-2.0", origin_url=None), **embedded_cfg(name)))


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.untrained": _cfg(),
        "biformer_small.untrained": _cfg(),
        "biformer_base.untrained": _cfg(),
        "biformer_stl.untrained": _cfg(),
        "biformer_stl_nchw.untrained": _cfg(),
        "biformer_nano.zoo_clothing10": _embedded("biformer_nano.zoo_clothing10"),
        "biformer_nano.zoo_fashion_mnist": _embedded("biformer_nano.zoo_fashion_mnist"),
    }
)


@register_model
def biformer_nano(pretrained: bool = False, **kwargs) -> BiFormer:
    """A BiFormer of this zoo for small images: 64 to 160 pixels."""
    model_args = dict(depths=(2, 2, 6, 2), embed_dims=(32, 64, 160, 256), topks=(2, 4, 8, -2), n_win=4)
    return _create_biformer("biformer_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-T."""
    return _create_biformer("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-S."""
    return _create_biformer("biformer_small", pretrained, **dict(dict(depths=(4, 4, 18, 4)), **kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-B."""
    model_args = dict(depths=(4, 4, 18, 4), embed_dims=(96, 192, 384, 768))
    return _create_biformer("biformer_base", pretrained, **dict(model_args, **kwargs))


_STL = dict(depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratios=4, stl=True, before_attn_dwconv=0)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL: Swin-T's layout with bi-level routing attention."""
    return _create_biformer("biformer_stl", pretrained, **dict(_STL, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL with the refactored attention, which pads after its projection."""
    return _create_biformer("biformer_stl_nchw", pretrained, **dict(_STL, nchw=True, topks=(1, 4, 16, -1), **kwargs))
