"""FaViT: vision transformer with factorized self-attention (FaSA).

Paper: "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost", Qin, Zhou, Xu, Bian
and Li, IEEE TNNLS 2023, arXiv:2312.08614. Its authors publish no weights; checkpoints of the official code convert
with `zoo convert favit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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

from zoo.backbones.layers import DepthwiseConv2d, Mlp
from zoo.backbones.pyramid import Pyramid
from zoo.convert.favit import ORIGIN, convert
from zoo.hub import embedded_cfg
from zoo.kernels import cross_window_pool, factorized_attention
from zoo.kernels._dispatch import cast_for_autocast
from zoo.kernels.factorized.reference import FUSIONS, reflect_index

__all__ = ["Block", "FaViT", "FactorizedSelfAttention"]

# Norms of blocks and stages; those of patch embeddings and of the global keys keep torch's 1e-5.
NORM_EPS = 1e-6


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution of a channels-last map."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__(in_dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C']"""
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchConv2d(nn.Conv2d):
    """Convolution of non-overlapping patches of a channels-last map; rows and columns that fill no patch are cut off.

    A matrix product over patches: as a convolution of few channels it would be slow and need a transposed map.
    """

    def __init__(self, dim: int, patch: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, patch, patch, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H / patch, W / patch, C]"""
        p = self.stride[0]
        B, H, W, C = x.shape
        x = x[:, : H // p * p, : W // p * p].reshape(B, H // p, p, W // p, p, C)
        x = x.transpose(2, 3).flatten(3)  # [B, H / p, W / p, p * p * C]
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class LocalKV(nn.Module):
    """Source of local keys and values: 3x3 depth-wise, then 1x1 convolution, nothing between."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.depth_conv = DepthwiseConv2d(dim, 3, device=device, dtype=dtype)
        self.point_conv = PointwiseConv2d(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))


def _extend(x: Tensor, least: int) -> Tensor:
    """Continue a map of less than `least` rows or columns by reflection, as `cross_window_pool` does."""
    for axis in (1, 2):
        size = x.shape[axis]
        if size < least:
            x = x.index_select(axis, reflect_index(torch.arange(least, device=x.device), size))
    return x


@register_notrace_module
class FactorizedSelfAttention(nn.Module):
    """Factorized self-attention (FaSA) on channels-last maps.

    The channels are cut into a global group (1/8 of them), whose keys are the map reduced by sr_ratio, and local
    groups, whose keys are the positions of one window_size x window_size window for the whole image: all windows of
    the map are fused into one, with neighbouring positions in the first group and positions sr_ratio apart in the
    second. Every token attends to these few keys, so the cost is linear in tokens but for the global group.

    Any map size runs. A window that reaches over the bottom or right edge continues by reflection, repeatedly where the
    map is smaller than the window (there the official code fails); where the map is smaller than sr_ratio it is
    extended in the same way for the global keys. Other sizes give the official result, which with the default fusion
    depends on the number of windows, hence on the map size.

    Args:
        dim: Channels C; a multiple of 16, of 8 with sr_ratio 1, and 7/16 (7/8) of it a multiple of num_heads.
        num_heads: Heads of each local group; the global group is one head.
        qkv_bias: Bias of queries, keys and values. Convolutions and the output projection always have one.
        sr_ratio: Reduction of the global keys, and distance of positions in the second local group, which 1 drops.
        window_size: Positions per side of a window.
        fusion: "official" or "window_mean", see `zoo.kernels.cross_window_pool`.

    Raises:
        ValueError: Arguments that do not fit.

    Source: arXiv:2312.08614.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        sr_ratio: int = 1,
        *,
        window_size: int = 7,
        fusion: str = "official",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        parts = 16 if sr_ratio > 1 else 8
        local_dim = dim // parts * 7
        if dim % parts or local_dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of {parts} with sr_ratio={sr_ratio}, and num_heads must divide {7}/{parts} of "
                f"it, got {dim=}, {num_heads=}."
            )
        if sr_ratio < 1 or window_size < 1:
            raise ValueError(f"sr_ratio and window_size must be positive, got {sr_ratio=}, {window_size=}.")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {FUSIONS}, got {fusion!r}.")
        self.dim, self.num_heads, self.sr_ratio, self.window_size = dim, num_heads, sr_ratio, window_size
        self.fusion = fusion
        self.dilations = (1, sr_ratio) if sr_ratio > 1 else (1,)
        self.global_dim, head_dim = dim - local_dim * len(self.dilations), local_dim // num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = PatchConv2d(self.global_dim, sr_ratio, **dd)
        self.norm = LayerNorm(self.global_dim, eps=1e-5, **dd)
        self.kv_g = nn.Linear(self.global_dim, 2 * self.global_dim, bias=qkv_bias, **dd)
        self.local_conv_g = DepthwiseConv2d(self.global_dim, 3, **dd)
        self.kv_l = LocalKV(dim - self.global_dim, **dd)
        groups = range(len(self.dilations))
        self.fcs = nn.ModuleList(nn.Linear(head_dim, head_dim, bias=qkv_bias, **dd) for _ in groups)
        self.single_heads = nn.ModuleList(nn.Linear(head_dim, 2 * head_dim, bias=qkv_bias, **dd) for _ in groups)
        self.local_convs = nn.ModuleList(DepthwiseConv2d(local_dim, 3, **dd) for _ in groups)
        self.proj = nn.Linear(dim, dim, **dd)

    def global_kv(self, x: Tensor) -> list[Tensor]:
        """The global group's channels of a map -> keys and values [B, H / sr_ratio * W / sr_ratio, Cg]."""
        x = self.norm(self.sr(_extend(x, self.sr_ratio)))
        k, v = self.kv_g(x).chunk(2, -1)  # [B, H / r, W / r, Cg]
        return [k.flatten(1, 2), self.local_conv_g(v, residual=v).flatten(1, 2)]

    def local_kv(self, x: Tensor) -> list[Tensor]:
        """The other channels of a map -> keys and values [B, window_size**2, M, D] of each local group."""
        pooled = cross_window_pool(
            self.kv_l(x), self.num_heads, window=self.window_size, dilations=self.dilations, fusion=self.fusion
        )  # [G, B, P, P, M * D]
        out = []
        for i, y in enumerate(pooled.unbind()):
            y = y.unflatten(-1, (self.num_heads, -1))  # [B, P, P, M, D]
            k, v = self.single_heads[i](self.fcs[i](y)).chunk(2, -1)
            v = v.flatten(3)
            v = self.local_convs[i](v, residual=v).unflatten(-1, (self.num_heads, -1))
            out += [k.flatten(1, 2), v.flatten(1, 2)]
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        # Once for all that read the map; each would cast it for itself.
        (x,) = cast_for_autocast(x)
        q = self.q(x).flatten(1, 2)
        kv_global = self.global_kv(x[..., : self.global_dim])
        kv_local = self.local_kv(x[..., self.global_dim :])
        return self.proj(factorized_attention(q, *kv_global, *kv_local).view(x.shape))


class Block(nn.Module):
    """FaViT block on maps [B, H, W, C]: attention and an MLP with a depth-wise convolution, each with a residual.

    Args:
        dim: Channels C.
        num_heads: Heads of each local group.
        mlp_ratio: Hidden over outer width of the MLP.
        drop_path: Stochastic depth rate, drawn independently for attention and MLP.
        **attn_options: Further arguments of `FactorizedSelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        **attn_options: Any,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = LayerNorm(dim, eps=NORM_EPS, **dd)
        self.attn = FactorizedSelfAttention(dim, num_heads, **attn_options, **dd)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dwconv=True, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patches, from a map [B, C, H, W] to a normalised map [B, H', W', C']."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())


class Stage(nn.Module):
    """Patch embedding, blocks and a norm; maps are [B, C, H, W] outside, channels-last inside."""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block], dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(dim, eps=NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x).permute(0, 3, 1, 2)


class FaViT(Pyramid):
    """FaViT image classifier and feature extractor; any input size of at least 32 x 32 pixels runs.

    Every stage ends in its norm, so that `forward_features` and `features_only` give the maps that the official
    dense-prediction backbone gives.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes; 0 for features.
        global_pool: Pooling before the classifier, "avg" or "".
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads of each local group, per stage.
        mlp_ratios: Hidden over outer width of the MLP, per stage.
        sr_ratios: Reduction of the global keys, per stage.
        qkv_bias: Bias of queries, keys and values.
        window_size: Positions per side of a window.
        fusion: "official" or "window_mean", which does not depend on the image size.
        stem_stride: Stride of the first patch embedding.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Source: arXiv:2312.08614.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        window_size: int = 7,
        fusion: str = "official",
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        per_stage = dict(embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        for name, values in per_stage.items():
            if len(values) != len(depths):
                raise ValueError(f"{name} needs one value for each of {len(depths)} stages, got {values}.")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False
        self.feature_info = []

        options = dict(qkv_bias=qkv_bias, window_size=window_size, fusion=fusion, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            if i == 0:
                embed = PatchEmbed(in_chans, dim, 7, stem_stride, **dd)
            else:
                embed = PatchEmbed(embed_dims[i - 1], dim, 3, 2, **dd)
            blocks = [
                Block(dim, num_heads[i], mlp_ratios[i], rate, sr_ratio=sr_ratios[i], **options) for rate in rates[i]
            ]
            stages.append(Stage(embed, blocks, dim, **dd))
            self.feature_info.append(dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear weights, normal by fan-out for convolutions, zero biases."""
        for module in self.modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.weight.is_meta:
                continue
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
            else:
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^stages\.0\.patch_embed"
        if coarse:
            blocks = [(r"^stages\.(\d+)", None)]
        else:
            blocks = [
                (r"^stages\.(\d+)\.patch_embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ]
        return dict(stem=stem, blocks=[*blocks, (r"^head", (99999,))])

    # Stages begin with their patch embedding and end in their norm.
    tail = None

    def embed(self, x: Tensor) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Tensor:
        return x


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Pass native state dicts through and convert official ones."""
    return convert(state_dict)


def _create_favit(variant: str, pretrained: bool, **kwargs) -> FaViT:
    return build_model_with_cfg(
        FaViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
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
            first_conv="stages.0.patch_embed.proj",
            classifier="head.fc",
            origin_url=ORIGIN,
            paper_name="Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
            paper_ids="arXiv:2312.08614",
        ),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "favit_nano.zoo_clothing10": _cfg(**dict(dict(origin_url=None), **embedded_cfg("favit_nano.zoo_clothing10"))),
        "favit_b0.untrained": _cfg(),
        "favit_b1.untrained": _cfg(),
        "favit_b2.untrained": _cfg(),
        "favit_b3.untrained": _cfg(),
    }
)


@register_model
def favit_nano(pretrained: bool = False, **kwargs) -> FaViT:
    """A FaViT of this zoo for small images, 64 to 160 pixels: B0 on maps of twice its resolution."""
    model_args = dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 8, 2), stem_stride=2)
    return _create_favit("favit_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def favit_b0(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B0."""
    return _create_favit("favit_b0", pretrained, **dict(dict(embed_dims=(32, 64, 128, 256)), **kwargs))


@register_model
def favit_b1(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B1."""
    return _create_favit("favit_b1", pretrained, **kwargs)


@register_model
def favit_b2(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B2."""
    return _create_favit("favit_b2", pretrained, **dict(dict(depths=(2, 3, 18, 3)), **kwargs))


@register_model
def favit_b3(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B3."""
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 3, 14, 3))
    return _create_favit("favit_b3", pretrained, **dict(model_args, **kwargs))
