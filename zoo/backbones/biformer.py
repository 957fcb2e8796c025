"""BiFormer: vision transformer with bi-level routing attention.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu, Wang, Ke, Zhang and Lau, CVPR 2023,
arXiv:2303.08810. Official weights convert with `zoo convert biformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm, calculate_drop_path_rates, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from zoo.backbones.biformer_layers import (
    AttentionLePE,
    BiLevelRoutingAttention,
    BiLevelRoutingAttentionNCHW,
    ChannelsLastBRA,
    ConvMixer,
)
from zoo.backbones.layers import DepthwiseConv2d, Mlp
from zoo.backbones.pyramid import Pyramid
from zoo.convert.biformer import ORIGIN, convert
from zoo.hub import embedded_cfg

__all__ = ["AttentionLePE", "BiFormer", "BiLevelRoutingAttention", "BiLevelRoutingAttentionNCHW", "Block"]

NORM_EPS = 1e-6


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
        layer = ChannelsLastBRA if cfg.nchw else BiLevelRoutingAttention
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
