"""HaloNet: residual networks with blocked local self-attention.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", Vaswani, Ramachandran, Srinivas, Parmar,
Hechtman and Shlens, CVPR 2021, arXiv:2103.12731. The paper's code and weights were never published; timm's
`halonet*` models are a related design with weights, which `zoo.create_model` runs on this package's op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    ConvNormAct,
    DropPath,
    SEModule,
    calculate_drop_path_rates,
    use_fused_attn,
)
from timm.layers.halo_attn import HaloAttn, PosEmbedRel
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from zoo.backbones.pyramid import Pyramid
from zoo.hub import embedded_cfg
from zoo.kernels import halo_attention

__all__ = ["HaloAttention", "HaloNet", "resize_relative_table"]


def _check_halo(dim_out: int, num_heads: int, stride: int, block_size: int, halo_size: int) -> None:
    if num_heads < 1 or dim_out % num_heads:
        raise ValueError(f"num_heads must divide dim_out, got dim_out={dim_out}, num_heads={num_heads}.")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}.")
    if block_size < 1 or halo_size < 0:
        raise ValueError(f"block_size must be positive and halo_size not negative, got {block_size} and {halo_size}.")


def _legal_sides(side: int, block: int) -> str:
    """The multiples of the block next to a side."""
    below = side // block * block
    return f"{below} or {below + block}" if below else str(block)


def _project(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of a channels-last map, [B, C, H, W] -> [B, H', W', C'].

    As a linear map of its pixels: the gradients of cuDNN's convolution take several times as long. Hooks, and modules
    in the convolution's place (adapters, parametrisations), get their call.
    """
    if (
        type(conv) is not nn.Conv2d
        or conv._forward_hooks
        or conv._forward_pre_hooks
        or conv._backward_hooks
        or conv._backward_pre_hooks
    ):
        return conv(x).permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    if conv.stride != (1, 1):
        x = x[:, :: conv.stride[0], :: conv.stride[1]]
    return F.linear(x, conv.weight.flatten(1), conv.bias)


@register_notrace_module
class HaloAttention(HaloAttn):
    """Blocked local self-attention: queries of a block attend to the block and a halo around it.

    A drop-in for timm's `HaloAttn`, with its arguments, state-dict keys and numbers, on the fused op
    `zoo.kernels.halo_attention`: memory is linear in the map. A map that blocks do not divide is padded with zeros at
    the bottom and right after the projections, and the result is cut to ceil(side / stride). Zero keys, of the halo
    around the map as of this padding, take part in the softmax as in timm, unless `mask_border` leaves them out.
    There is no output projection.

    Queries of stride 2 are those of every second pixel. Where the stride does not divide the block, or with `avg_down`,
    attention runs at stride 1 and is average-pooled; there, as in timm, a map of an odd number of odd blocks
    loses its last row or column.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the output, `dim` by default.
        feat_size: Ignored; other attention layers of timm take it.
        stride: 1 or 2.
        num_heads: Heads.
        dim_head: Channels of queries and keys per head; by default `dim_out * qk_ratio`, rounded to 8, over the heads.
        block_size: Side of a block.
        halo_size: Width of the halo; the window is block_size + 2 * halo_size wide.
        qk_ratio: See `dim_head`.
        qkv_bias: Bias of the projections.
        avg_down: Downsample by average pooling instead of strided queries.
        scale_pos_embed: Scale the position logits like the content logits.
        half_rel: Tables of half the head's channels: rows use the first half, columns the second, as in the paper.
        mask_border: Leave keys outside the map out of the softmax. Weights trained without it expect them.
        padding: Pad maps that blocks do not divide; False refuses them.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Arguments do not fit, or `padding=False` and the map is no multiple of the block.

    Source: arXiv:2103.12731.
    """

    # On the class, so that a module of timm that changes its class to this one has them.
    mask_border = False
    padding = True

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        device=None,
        dtype=None,
        *,
        half_rel: bool = False,
        mask_border: bool = False,
        padding: bool = True,
    ) -> None:
        _check_halo(dim_out or dim, num_heads, stride, block_size, halo_size)
        super().__init__(
            dim, dim_out, feat_size, stride, num_heads, dim_head, block_size, halo_size, qk_ratio,
            qkv_bias, avg_down, scale_pos_embed, device=device, dtype=dtype,
        )  # fmt: skip
        self.mask_border, self.padding = mask_border, padding
        if half_rel:
            if self.dim_head_qk % 2:
                raise ValueError(f"half_rel needs an even number of channels per head, got {self.dim_head_qk}.")
            self.pos_embed = PosEmbedRel(
                self.block_size_ds, self.win_size, self.dim_head_qk // 2, self.scale, device=device, dtype=dtype
            )
            self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim_out, ceil(H / stride), ceil(W / stride)], in the memory format of x"""
        if not self.padding:
            self._check_map(*x.shape[2:])
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            # One copy of x; otherwise the op makes one of each projection.
            x = x.contiguous(memory_format=torch.channels_last)
        q, kv = _project(self.q, x), _project(self.kv, x)
        pooled = isinstance(self.pool, nn.AvgPool2d)
        out = self._pooled(q, kv) if pooled else self._attend(q, kv).permute(0, 3, 1, 2)
        return out if channels_last else out.contiguous()

    def _attend(self, q: Tensor, kv: Tensor) -> Tensor:
        return halo_attention(
            q, kv, *self._tables(), heads=self.num_heads, block=self.block_size, halo=self.halo_size,
            stride=self.block_stride, scale=self.scale, scale_position=self.scale_pos_embed,
            mask_border=self.mask_border, backend="auto" if use_fused_attn() else "reference",
        )  # fmt: skip

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Tables of the head's full width; zeros stand for the half that an axis does not use."""
        height, width = self.pos_embed.height_rel, self.pos_embed.width_rel
        other = self.dim_head_qk - height.shape[1]
        return (F.pad(height, (0, other)), F.pad(width, (other, 0))) if other else (height, width)

    def _pooled(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attention at stride 1, then 2x2 means, [B, C, H, W]."""
        height, width = q.shape[1:3]
        if self.mask_border:
            # Only pixels of the map exist, so only they are averaged.
            return F.avg_pool2d(self._attend(q, kv).permute(0, 3, 1, 2), 2, ceil_mode=True)
        # Means at the edge take in the outputs of padding, as in the padded map that this stands for.
        rows, cols = -height % self.block_size, -width % self.block_size
        if rows or cols:
            q, kv = (F.pad(t, (0, 0, 0, cols, 0, rows)) for t in (q, kv))
        out = self.pool(self._attend(q, kv).permute(0, 3, 1, 2))
        return out[:, :, : math.ceil(height / 2), : math.ceil(width / 2)]

    def _check_map(self, height: int, width: int) -> None:
        block = self.block_size
        if height % block or width % block:
            raise ValueError(
                f"a map of {height} x {width} does not divide into blocks of {block} x {block}; the nearest legal "
                f"sizes are {_legal_sides(height, block)} by {_legal_sides(width, block)}. padding=True takes any size."
            )


class Bottleneck(nn.Module):
    """1x1 convolution to `dim`, a spatial layer, 1x1 convolution to `dim_out`, with a projected shortcut.

    Subclasses name and apply the spatial layer, which carries the stride.
    """

    def __init__(
        self, dim_in: int, dim: int, dim_mixed: int, dim_out: int, stride: int, drop_path: float, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        conv = partial(ConvNormAct, act_layer=nn.SiLU, **dd)
        self.shortcut = nn.Identity()
        if dim_in != dim_out or stride != 1:
            self.shortcut = conv(dim_in, dim_out, 1, stride=stride, apply_act=False)
        self.conv1_1x1 = conv(dim_in, dim, 1)
        self.conv3_1x1 = conv(dim_mixed, dim_out, 1, apply_act=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act = nn.SiLU()

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim_in, H, W] -> [B, dim_out, ceil(H / stride), ceil(W / stride)]"""
        out = self.conv3_1x1(self.mix(self.conv1_1x1(x)))
        return self.act(self.drop_path(out) + self.shortcut(x))


class ConvBlock(Bottleneck):
    """Bottleneck with a 3x3 convolution and squeeze-and-excitation, as in the paper's hybrids."""

    def __init__(self, dim_in: int, dim: int, dim_out: int, stride: int, drop_path: float, dd: dict[str, Any]) -> None:
        super().__init__(dim_in, dim, dim, dim_out, stride, drop_path, dd)
        self.conv2_kxk = ConvNormAct(dim, dim, 3, stride=stride, act_layer=nn.SiLU, **dd)
        self.attn = SEModule(dim, rd_ratio=1 / 8, **dd)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(self.conv2_kxk(x))


class HaloBlock(Bottleneck):
    """Bottleneck with halo attention; values have `dim_mixed` channels, queries and keys `dim`."""

    def __init__(
        self, dim_in: int, dim: int, dim_mixed: int, dim_out: int, stride: int, drop_path: float, dd: dict[str, Any],
        **attention,
    ) -> None:  # fmt: skip
        super().__init__(dim_in, dim, dim_mixed, dim_out, stride, drop_path, dd)
        self.self_attn = HaloAttention(dim, dim_mixed, stride=stride, **attention, **dd)
        self.post_attn = BatchNormAct2d(dim_mixed, act_layer=nn.SiLU, **dd)

    def mix(self, x: Tensor) -> Tensor:
        return self.post_attn(self.self_attn(x))


class Stage(nn.Sequential):
    """Blocks of one resolution; the first may have stride 2."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        return super().forward(x)


def _stem(in_chans: int, dims: Sequence[int], dd: dict[str, Any]) -> nn.Sequential:
    """One 7x7 convolution and max-pooling as in a ResNet, or 3x3 convolutions; stride 4 either way."""
    conv = partial(ConvNormAct, act_layer=nn.SiLU, **dd)
    stem = nn.Sequential()
    if len(dims) == 1:
        stem.add_module("conv1", conv(in_chans, dims[0], 7, stride=2))
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        return stem
    for i, (dim_in, dim) in enumerate(zip((in_chans, *dims), dims, strict=False)):
        stem.add_module(f"conv{i + 1}", conv(dim_in, dim, 3, stride=2 if i in (0, len(dims) - 1) else 1))
    return stem


def _check_layout(layout: Sequence[str], dims: Sequence[int], num_heads: Sequence[int]) -> None:
    if not layout or not all(stage and set(stage) <= {"c", "h"} for stage in layout):
        raise ValueError(f'layout needs a string of "c" (convolution) and "h" (halo) per stage, got {tuple(layout)}.')
    for name, values in (("dims", dims), ("num_heads", num_heads)):
        if len(values) != len(layout):
            raise ValueError(f"{name} needs one value for each of {len(layout)} stages, got {tuple(values)}.")


class HaloNet(Pyramid):
    """HaloNet.

    The paper leaves two points open. Its equations show no factor on the logits: here content and position logits are
    both scaled by head_dim**-0.5. Strided queries index the relative tables on their own coarse grid, as timm's do.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: "avg", or "" for an unpooled map.
        layout: Blocks of each stage: "h" attends, "c" convolves. The paper's hybrids have "ccc" in early stages.
        dims: Channels of queries and keys in each stage, and of 3x3 convolutions.
        num_heads: Heads of each stage.
        value_ratio: Channels of the values over `dims` (r_v in the paper).
        out_ratio: Channels between blocks over `dims` (r_b in the paper).
        block_size, halo_size, mask_border: See `HaloAttention`.
        stem_dims: One number for the paper's 7x7 convolution with max-pooling, several for a chain of 3x3 convolutions.
        final_dim: Channels of a last 1x1 convolution; 0 for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Source: arXiv:2103.12731.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        layout: Sequence[str] = ("hhh", "hhh", "hhhhhhh", "hhh"),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 8, 8, 8),
        value_ratio: float = 1.0,
        out_ratio: float = 1.0,
        block_size: int = 8,
        halo_size: int = 3,
        mask_border: bool = False,
        stem_dims: Sequence[int] = (64,),
        final_dim: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        _check_layout(layout, dims, num_heads)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = []

        self.stem = _stem(in_chans, stem_dims, dd)
        rates = calculate_drop_path_rates(drop_path_rate, [len(kinds) for kinds in layout], stagewise=True)
        stages, dim_in = [], stem_dims[-1]
        for i, (kinds, dim, heads) in enumerate(zip(layout, dims, num_heads, strict=True)):
            dim_mixed, dim_out = round(dim * value_ratio), round(dim * out_ratio)
            attention = dict(
                num_heads=heads, dim_head=dim // heads, block_size=block_size, halo_size=halo_size,
                scale_pos_embed=True, half_rel=True, mask_border=mask_border,
            )  # fmt: skip
            blocks = []
            for j, kind in enumerate(kinds):
                stride = 2 if i and not j else 1
                if kind == "c":
                    block = ConvBlock(dim_in, dim, dim_out, stride, rates[i][j], dd)
                else:
                    block = HaloBlock(dim_in, dim, dim_mixed, dim_out, stride, rates[i][j], dd, **attention)
                blocks.append(block)
                dim_in = dim_out
            stages.append(Stage(*blocks))
            self.feature_info.append(dict(num_chs=dim_out, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = final_dim or dim_in
        self.final_conv = ConvNormAct(dim_in, final_dim, 1, act_layer=nn.SiLU, **dd) if final_dim else nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal convolutions (fan-out) and classifier (0.01), zero last norm of every block, timm's attention."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3_1x1.bn.weight)
            elif isinstance(module, HaloAttention):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(TABLES)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return dict(stem=r"^stem", blocks=[(block, None), (r"^(?:final_conv|head)", (99999,))])

    tail = "final_conv"

    def finish(self, x: Tensor) -> Tensor:
        return self.final_conv(x)


TABLES = ("pos_embed.height_rel", "pos_embed.width_rel")


def resize_relative_table(table: Tensor, source: tuple[int, int], target: tuple[int, int], stride: int = 1) -> Tensor:
    """Interpolate a relative table linearly for another block and halo, as the paper does to fine-tune.

    The rows that some query and key reach are stretched over those of the new window, so that a pixel's row for itself
    stays one. The rows that no pair reaches become zero.

    Args:
        table: [2 * w - 1, D], where the window w is block + 2 * halo.
        source: Block and halo that the table was trained with.
        target: Block and halo that it is for.
        stride: Stride of the queries.

    Returns:
        [2 * w' - 1, D] in the dtype of `table`.

    Raises:
        ValueError: The table does not fit `source`.

    Source: arXiv:2103.12731.
    """

    def rows(block: int, halo: int) -> tuple[int, int]:
        """All rows, and those in reach."""
        window = block + 2 * halo
        return 2 * window - 1, window + block // stride - 1

    (total, reached), (new_total, new_reached) = rows(*source), rows(*target)
    if table.dim() != 2 or table.shape[0] != total:
        raise ValueError(
            f"a table of block {source[0]} and halo {source[1]} has {total} rows, got shape {tuple(table.shape)}."
        )
    # [R, D] -> [1, D, R]
    values = table[total - reached :].float().t()[None]
    values = F.interpolate(values, size=new_reached, mode="linear", align_corners=True)[0].t()
    return F.pad(values, (0, 0, new_total - new_reached, 0)).to(table.dtype)


def _trained_window(rows: int, layer: HaloAttention, variant: str | None) -> tuple[int, int]:
    """Block and halo of a table of so many rows: the variant's own if they fit, else the layer's halo."""
    window = (rows + 1) // 2
    default = VARIANTS.get(variant, {})
    block, halo = default.get("block_size", 8), default.get("halo_size", 3)
    if window != block + 2 * halo:
        halo = layer.halo_size
        block = window - 2 * halo
    if block < 1:
        raise ValueError(f"a window of {window} pixels, from a table of {rows} rows, has no room for a halo of {halo}.")
    return block, halo


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Unwrap training checkpoints and interpolate relative tables of another block or halo."""
    state_dict = state_dict.get("state_dict", state_dict.get("model", state_dict))
    variant = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    out = {}
    for name, value in state_dict.items():
        if name.endswith(TABLES):
            layer = model.get_submodule(name.rpartition(".pos_embed.")[0])
            target = layer.block_size, layer.halo_size
            if value.shape[0] != 2 * layer.win_size - 1:
                source = _trained_window(value.shape[0], layer, variant)
                value = resize_relative_table(value, source, target, layer.block_stride)
        out[name] = value
    return out


def _paper(third: int, **kwargs) -> dict[str, Any]:
    """Arguments of a model of the paper with so many blocks in its third stage."""
    return dict(layout=("hhh", "hhh", "h" * third, "hhh"), **kwargs)


VARIANTS: dict[str, dict[str, Any]] = {
    "halo_nano": dict(
        layout=("cc", "ch", "chch", "ch"), dims=(48, 96, 192, 256), num_heads=(3, 6, 12, 8), out_ratio=1.5,
        block_size=4, halo_size=2, mask_border=True, stem_dims=(24, 32, 64),
    ),
    "halo_h0": _paper(7, out_ratio=0.5),
    "halo_h1": _paper(10),
    "halo_h2": _paper(11, out_ratio=1.25),
    "halo_h3": _paper(12, out_ratio=1.5, block_size=10, halo_size=3, final_dim=1024),
    "halo_h4": _paper(12, out_ratio=3.0, block_size=12, halo_size=2, final_dim=1280),
    "halo_h5": _paper(23, value_ratio=2.5, out_ratio=2.0, block_size=14, halo_size=2, final_dim=1536),
    "halo_h6": _paper(24, value_ratio=3.0, out_ratio=2.75, block_size=8, halo_size=4, final_dim=1536),
    "halo_h7": _paper(26, value_ratio=4.0, out_ratio=3.5, block_size=10, halo_size=3, final_dim=2048),
}  # fmt: skip


def _create_halo(variant: str, pretrained: bool, **kwargs) -> HaloNet:
    return build_model_with_cfg(
        HaloNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(VARIANTS[variant], **kwargs),
    )


def _cfg(size: int, **kwargs) -> dict[str, Any]:
    # Every stride rounds up, so the last map has ceil(size / 32) pixels a side.
    side = math.ceil(size / 32)
    return dict(
        dict(
            input_size=(3, size, size),
            min_input_size=(3, 32, 32),
            num_classes=1000,
            pool_size=(side, side),
            crop_pct=0.95,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="stem.conv1.conv",
            classifier="head.fc",
            license="apache-2.0",
            paper_name="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
            paper_ids="arXiv:2103.12731",
        ),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "halo_nano.zoo_clothing10": _cfg(128, **embedded_cfg("halo_nano.zoo_clothing10")),
        "halo_h0.untrained": _cfg(256),
        "halo_h1.untrained": _cfg(256),
        "halo_h2.untrained": _cfg(256),
        "halo_h3.untrained": _cfg(320),
        "halo_h4.untrained": _cfg(384),
        "halo_h5.untrained": _cfg(448),
        "halo_h6.untrained": _cfg(512),
        "halo_h7.untrained": _cfg(600),
    }
)


@register_model
def halo_nano(pretrained: bool = False, **kwargs) -> HaloNet:
    """A HaloNet of this zoo for small images: convolutions first, keys outside the map masked."""
    return _create_halo("halo_nano", pretrained, **kwargs)


@register_model
def halo_h0(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H0."""
    return _create_halo("halo_h0", pretrained, **kwargs)


@register_model
def halo_h1(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H1."""
    return _create_halo("halo_h1", pretrained, **kwargs)


@register_model
def halo_h2(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H2."""
    return _create_halo("halo_h2", pretrained, **kwargs)


@register_model
def halo_h3(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H3. The paper prints 12.3 M parameters and a last convolution of 1024 channels, which do not go together:
    these 1024 channels give 11.8 M parameters, `final_dim=1280` gives 12.3 M.
    """
    return _create_halo("halo_h3", pretrained, **kwargs)


@register_model
def halo_h4(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H4."""
    return _create_halo("halo_h4", pretrained, **kwargs)


@register_model
def halo_h5(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H5."""
    return _create_halo("halo_h5", pretrained, **kwargs)


@register_model
def halo_h6(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H6."""
    return _create_halo("halo_h6", pretrained, **kwargs)


@register_model
def halo_h7(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7."""
    return _create_halo("halo_h7", pretrained, **kwargs)
