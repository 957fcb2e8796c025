"""Official FaViT checkpoints to the names of `zoo.backbones.favit`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

ORIGIN = "none published (github.com/q2479036243/FaViT has the code; checkpoints of your own training convert)"

# Stages count from 1 there and from 0 here.
_STAGE = re.compile(r"^(patch_embed|block|norm)([1-4])\.")
_PARTS = {"patch_embed": "patch_embed", "block": "blocks", "norm": "norm"}


def convert_name(name: str) -> str:
    """The zoo's name of an official state-dict entry."""
    name = _STAGE.sub(lambda m: f"stages.{int(m[2]) - 1}.{_PARTS[m[1]]}.", name)
    name = name.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def convert(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Rename an official state dict; a state dict of the zoo passes through.

    Args:
        state_dict: Official checkpoint (the `model` entry is taken out of a training checkpoint) or state dict.

    Raises:
        ValueError: No FaViT checkpoint.
    """
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    names = list(state_dict)
    if any(n.startswith("stages.") and ".attn.kv_g." in n for n in names):
        return state_dict
    if not any(_STAGE.match(n) and ".attn.kv_g." in n for n in names):
        raise ValueError(f"This is no FaViT checkpoint: no entry 'block1.*.attn.kv_g.*' among {names[:4]} ...")
    return {convert_name(n): v for n, v in state_dict.items()}
