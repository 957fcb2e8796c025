"""Agent Attention: DeiT, PVT, Swin and CSWin with agent attention.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han, Ye, Han, Xia, Pan, Wan, Song and
Huang, ECCV 2024, arXiv:2312.08874. Official weights convert with `zoo convert agent`.

The attention is in `agent_layers`, one file a backbone (`agent_deit`, `agent_pvt`, `agent_swin`, `agent_cswin`) builds
the models, and `agent_pyramid` holds what the last three share. Here are the variants and the loading of weights.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.agent_cswin import AgentCSWin, CrossShapedAttention, StripAttention
from zoo.backbones.agent_deit import AgentDeiT
from zoo.backbones.agent_layers import (
    LENGTH_DIM,
    AgentAttention,
    AgentStripAttention,
    Block,
    SpatialReductionAgentAttention,
    resize_bias,
    without_leading_axis,
)
from zoo.backbones.agent_pvt import AgentPVT
from zoo.backbones.agent_swin import AgentSwin, WindowAttention
from zoo.convert.agent import ORIGIN, convert
from zoo.hub import embedded_cfg

__all__ = [
    "AgentAttention",
    "AgentCSWin",
    "AgentDeiT",
    "AgentPVT",
    "AgentStripAttention",
    "AgentSwin",
    "Block",
    "CrossShapedAttention",
    "SpatialReductionAgentAttention",
    "StripAttention",
    "WindowAttention",
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert official state dicts, and resize what depends on the input size to the model's.

    Row and column biases are resized linearly, position embeddings, relative position tables and patch projections
    bicubically; the block biases always have the same size.
    """
    state_dict = convert(state_dict)
    wanted = model.state_dict()
    return {
        name: _resized(name, value, model, wanted[name])
        if name in wanted and value.shape != wanted[name].shape
        else value
        for name, value in state_dict.items()
    }


def _resized(name: str, value: Tensor, model: nn.Module, wanted: Tensor) -> Tensor:
    """A weight at the model's size; whatever else differs is left for loading to report."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    if kind in LENGTH_DIM:
        value, length = without_leading_axis(value), wanted.shape[LENGTH_DIM[kind]]
        same = value.dim() != wanted.dim() or value.shape[LENGTH_DIM[kind]] == length
        return value if same else resize_bias(kind, value, length)
    if kind == "pos_embed" and value.shape[-1] == wanted.shape[-1]:
        prefix = getattr(module, "num_prefix_tokens", 0)
        return resample_abs_pos_embed(value, module.grid, num_prefix_tokens=prefix, antialias=False)
    if kind == "relative_position_bias_table" and value.shape[1] == wanted.shape[1]:
        return resize_rel_pos_bias_table_simple(value, (module.window,) * 2, wanted.shape).contiguous()
    if name == "patch_embed.proj.weight" and value.shape[:2] == wanted.shape[:2]:
        return F.interpolate(value.float(), size=wanted.shape[2:], mode="bicubic").to(value.dtype)
    return value


def _create(cls: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> Any:
    if cls is AgentDeiT:
        # Blocks give tokens, so that features are maps only where the model makes them itself.
        features = dict(out_indices=3, feature_cls="getter")
    else:
        # The extra norms are no part of the chain of modules that timm's default extractor walks.
        feature_cls = dict(feature_cls="getter") if kwargs.get("extra_norms") else {}
        features = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True, **feature_cls)
    return build_model_with_cfg(
        cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **kwargs
    )


def _cfg(size: int = 224, **kwargs) -> dict[str, Any]:
    return dict(
        dict(
            input_size=(3, size, size),
            min_input_size=(3, 32, 32),
            num_classes=1000,
            pool_size=(size // 32, size // 32),
            # Both sides are resized to int(size * 256 / 224), whatever the aspect ratio, then the centre is cut out.
            crop_pct=0.875,
            crop_mode="squash",
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj",
            classifier="head.fc",
            # The official repository states no license.
            license=None,
            origin_url=ORIGIN,
            paper_name="Agent Attention: On the Integration of Softmax and Linear Attention",
            paper_ids="arXiv:2312.08874",
        ),
        **kwargs,
    )


def _deit_cfg(size: int = 224) -> dict[str, Any]:
    return _cfg(size, pool_size=None, classifier="head")


def _nano_cfg(name: str) -> dict[str, Any]:
    """Config of weights that this package carries."""
    return _cfg(128, **dict(dict(license="apache-2.0", origin_url=None), **embedded_cfg(name)))


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.untrained": _deit_cfg(),
        "agent_deit_small.untrained": _deit_cfg(),
        "agent_deit_small_448.untrained": _deit_cfg(448),
        "agent_deit_base.untrained": _deit_cfg(),
        "agent_pvt_tiny.untrained": _cfg(),
        "agent_pvt_small.untrained": _cfg(),
        "agent_pvt_medium.untrained": _cfg(),
        "agent_pvt_medium_256.untrained": _cfg(256),
        "agent_pvt_large.untrained": _cfg(),
        "agent_swin_tiny.untrained": _cfg(),
        "agent_swin_small.untrained": _cfg(),
        "agent_swin_small_288.untrained": _cfg(288, crop_pct=1.0),
        "agent_swin_base.untrained": _cfg(),
        "agent_swin_base_384.untrained": _cfg(384, crop_pct=1.0),
        "agent_cswin_tiny.untrained": _cfg(),
        "agent_cswin_small.untrained": _cfg(),
        "agent_cswin_base.untrained": _cfg(),
        "agent_cswin_base_384.untrained": _cfg(384),
        "agent_nano.zoo_clothing10": _nano_cfg("agent_nano.zoo_clothing10"),
    }
)


@register_model
def agent_nano(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """An Agent-CSWin of this zoo for small photographs: 96 to 160 pixels."""
    model_args = dict(
        img_size=128, depths=(2, 2, 6, 2), embed_dims=(32, 64, 160, 256), num_heads=(1, 2, 5, 8), mlp_ratio=3.0,
        agent_nums=(9, 16, 16, 16), attn_type="AAAB", conv_stem=True, mlp_dwconv=True,
    )  # fmt: skip
    return _create(AgentCSWin, "agent_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-T."""
    return _create(AgentDeiT, "agent_deit_tiny", pretrained, **kwargs)


_DEIT_SMALL = dict(embed_dim=384, num_heads=6)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-S."""
    return _create(AgentDeiT, "agent_deit_small", pretrained, **dict(_DEIT_SMALL, **kwargs))


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-S for 448 pixels."""
    model_args = dict(_DEIT_SMALL, img_size=448)
    return _create(AgentDeiT, "agent_deit_small_448", pretrained, **dict(model_args, **kwargs))


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-B: four blocks of agent attention, then eight of softmax attention."""
    model_args = dict(embed_dim=768, num_heads=12, agent_nums=81, agent_depth=4)
    return _create(AgentDeiT, "agent_deit_base", pretrained, **dict(model_args, **kwargs))


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-T."""
    return _create(AgentPVT, "agent_pvt_tiny", pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-S."""
    return _create(AgentPVT, "agent_pvt_small", pretrained, **dict(dict(depths=(3, 4, 6, 3)), **kwargs))


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-M."""
    return _create(AgentPVT, "agent_pvt_medium", pretrained, **dict(dict(depths=(3, 4, 18, 3)), **kwargs))


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-M for 256 pixels."""
    model_args = dict(depths=(3, 4, 18, 3), img_size=256)
    return _create(AgentPVT, "agent_pvt_medium_256", pretrained, **dict(model_args, **kwargs))


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-L."""
    return _create(AgentPVT, "agent_pvt_large", pretrained, **dict(dict(depths=(3, 8, 27, 3)), **kwargs))


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-T."""
    return _create(AgentSwin, "agent_swin_tiny", pretrained, **kwargs)


_SWIN_SMALL = dict(depths=(2, 2, 18, 2), attn_type="AABB")


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-S."""
    return _create(AgentSwin, "agent_swin_small", pretrained, **dict(_SWIN_SMALL, **kwargs))


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-S for 288 pixels."""
    model_args = dict(_SWIN_SMALL, img_size=288)
    return _create(AgentSwin, "agent_swin_small_288", pretrained, **dict(model_args, **kwargs))


_SWIN_BASE = dict(depths=(2, 2, 18, 2), embed_dim=128, num_heads=(4, 8, 16, 32), attn_type="AAMB2")


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-B."""
    return _create(AgentSwin, "agent_swin_base", pretrained, **dict(_SWIN_BASE, **kwargs))


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-B for 384 pixels."""
    model_args = dict(_SWIN_BASE, img_size=384)
    return _create(AgentSwin, "agent_swin_base_384", pretrained, **dict(model_args, **kwargs))


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-T."""
    return _create(AgentCSWin, "agent_cswin_tiny", pretrained, **kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-S."""
    return _create(AgentCSWin, "agent_cswin_small", pretrained, **dict(dict(depths=(3, 6, 29, 2)), **kwargs))


_CSWIN_BASE = dict(depths=(3, 6, 29, 2), embed_dims=96, num_heads=(4, 8, 16, 32))


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-B."""
    return _create(AgentCSWin, "agent_cswin_base", pretrained, **dict(_CSWIN_BASE, **kwargs))


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-B for 384 pixels."""
    model_args = dict(_CSWIN_BASE, img_size=384, split_sizes=(1, 2, 12, 12))
    return _create(AgentCSWin, "agent_cswin_base_384", pretrained, **dict(model_args, **kwargs))
