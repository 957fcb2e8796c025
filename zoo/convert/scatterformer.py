"""ScatterFormer checkpoints, whose names `zoo.heads.point_detectors.ScatterFormerDetector` has kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.convert._points import unwrap

ORIGIN = "https://github.com/skyhehe123/ScatterFormer (nuScenes: Google Drive file 1AJp0EQoXw-8JNI98SkD-k1DqLzKHYNJK)"


def convert(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Take the state dict out of a training checkpoint of OpenPCDet, without its counter of steps.

    Args:
        state_dict: Checkpoint or state dict; one of the zoo passes through.

    Raises:
        ValueError: No ScatterFormer checkpoint.
    """
    state_dict = unwrap(state_dict)
    if not any(name.startswith("backbone_3d.stage1.") for name in state_dict):
        raise ValueError(
            f"This is no ScatterFormer checkpoint: no entry 'backbone_3d.stage1.*' among {list(state_dict)[:4]} ..."
        )
    return {name: value for name, value in state_dict.items() if name != "global_step"}
