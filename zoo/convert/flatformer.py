"""FlatFormer checkpoints, whose names `zoo.heads.point_detectors.FlatFormerDetector` has kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.convert._points import unwrap

ORIGIN = (
    "none published, by Waymo's licence (github.com/mit-han-lab/flatformer; checkpoints of your own training convert)"
)


def convert(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Take the state dict out of a training checkpoint of mmdetection3d; a state dict of the zoo passes through.

    Args:
        state_dict: Checkpoint or state dict.

    Raises:
        ValueError: No FlatFormer checkpoint.
    """
    state_dict = unwrap(state_dict)
    if not any(name.startswith("middle_encoder.block_list.") for name in state_dict):
        raise ValueError(
            f"This is no FlatFormer checkpoint: no entry 'middle_encoder.block_list.*' among {list(state_dict)[:4]} ..."
        )
    return state_dict
