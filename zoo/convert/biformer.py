"""Official BiFormer checkpoints to the names of `zoo.backbones.biformer`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

ORIGIN = "github.com/rayleizhu/BiFormer (its README links the checkpoints)"

# In order: the two spellings of blocks, the stem, downsampling, packed projections, MLP and classifier.
_RULES = (
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.0\.", r"stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.attn\.qkv\.qkv\.", r".attn.qkv."),
    (r"\.mlp\.0\.", r".mlp.fc1."),
    (r"\.mlp\.1\.dwconv\.", r".mlp.dwconv."),
    (r"\.mlp\.[23]\.", r".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

_LINEAR = re.compile(r"\.(mlp\.fc[12]|attn\.qkv|attn\.proj)\.weight$")


def convert_name(name: str) -> str:
    """The zoo's name of an official state-dict entry."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def convert(state_dict: dict[str, Any], nchw: bool = False) -> dict[str, Tensor]:
    """Rename an official state dict; a state dict of the zoo passes through.

    Args:
        state_dict: Official checkpoint (the `model` entry is taken out of a training checkpoint, as the
            official loader does; not `model_ema`) or state dict.
        nchw: Whether the target is BiFormer-STL-nchw.

    Raises:
        ValueError: No BiFormer checkpoint, or one of the other attention layer: from legacy to nchw (or back)
            stages 1 to 3 would convert, but stage 4 convolves its input in one and its values in the other.
    """
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    names = list(state_dict)
    if not any(n.startswith("stages.") for n in names):
        raise ValueError(f"This is no BiFormer checkpoint: no entry 'stages.*' among {names[:4]} ...")
    # Both layers have `attn.qkv` in stage 4; stages 1 to 3 tell them apart.
    if any(".attn.qkv_linear." in n for n in names) != nchw:
        has, wants = ("legacy", "nchw") if nchw else ("nchw", "legacy")
        raise ValueError(
            f"The checkpoint has the {has} attention and the model the {wants} one. They do not convert: stage 4 "
            "convolves its input in the legacy layer and its values in the nchw layer. "
            f"Use {'biformer_stl' if nchw else 'biformer_stl_nchw'} for this checkpoint."
        )
    if any(n.startswith("downsample_layers.") for n in names):
        return {convert_name(n): _as_linear(convert_name(n), v) for n, v in state_dict.items()}
    return state_dict


def _as_linear(name: str, value: Tensor) -> Tensor:
    """1x1 convolutions of STL-nchw that are linear layers here: [out, in, 1, 1] -> [out, in]"""
    return value.flatten(1) if _LINEAR.search(name) and value.dim() == 4 else value
