"""Official Agent Attention checkpoints to the names of `zoo.backbones.agent`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

ORIGIN = "github.com/LeapLabTHU/Agent-Attention (its README links the checkpoints)"

# Buffers that follow from the input size and are made anew.
_DROPPED = re.compile(r"\.(attn_mask|relative_position_index)$")


def _stage(match: re.Match, offset: int) -> str:
    """Our prefix for the number that a pattern found.

    Stages count from 1 in Agent-PVT and Agent-CSWin, and a stage of Agent-Swin ends with its downsampling; here stages
    count from 0 and begin with it.
    """
    return f"stages.{int(match['stage']) + offset}"


_RULES: tuple[tuple[str, Any], ...] = (
    # Agent-PVT
    (r"^patch_embed1\.", "patch_embed."),
    (r"^pos_embed1$", "patch_embed.pos_embed"),
    (r"^patch_embed(?P<stage>\d)\.", lambda m: f"{_stage(m, -1)}.downsample."),
    (r"^pos_embed(?P<stage>\d)$", lambda m: f"{_stage(m, -1)}.downsample.pos_embed"),
    (r"^block(?P<stage>\d)\.", lambda m: f"{_stage(m, -1)}.blocks."),
    # Agent-Swin
    (r"^layers\.(?P<stage>\d)\.downsample\.", lambda m: f"{_stage(m, 1)}.downsample."),
    (r"^layers\.", "stages."),
    (r"^norm(\d)\.", r"extra_norms.\1."),
    # Agent-CSWin
    (r"^stage1_conv_embed\.0\.", "patch_embed.proj."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj."),
    (r"^merge(\d)\.", r"stages.\1.downsample."),
    (r"^stage(?P<stage>\d)\.(\d+)\.(qkv|proj|attns)\.", lambda m: f"{_stage(m, -1)}.blocks.{m[2]}.attn.{m[3]}."),
    (r"^stage(?P<stage>\d)\.", lambda m: f"{_stage(m, -1)}.blocks."),
)


def convert_name(name: str) -> str:
    """The zoo's name of an official state-dict entry, the classifier's left aside."""
    for pattern, replacement in _RULES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def convert(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Rename an official state dict of any of the four backbones; a state dict of the zoo passes through.

    Args:
        state_dict: Official checkpoint or state dict. Of a training checkpoint the averaged weights are taken where it
            has them (`state_dict_ema`, Agent-CSWin: the published accuracy is theirs), else `model`.

    Raises:
        ValueError: No checkpoint with agent attention.
    """
    for key in ("state_dict_ema", "model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    names = list(state_dict)
    if not any(n.endswith(".an_bias") for n in names):
        raise ValueError(f"This is no Agent Attention checkpoint: no entry '*.an_bias' among {names[:4]} ...")
    if any(n.startswith("stages.") for n in names):
        return state_dict
    converted = {convert_name(n): v for n, v in state_dict.items() if not _DROPPED.search(n)}
    if "cls_token" not in converted:  # Agent-DeiT keeps its classifier's name
        converted = {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", n): v for n, v in converted.items()}
    return converted
