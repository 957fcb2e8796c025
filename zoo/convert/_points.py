"""What the converters of both point cloud families share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict in a training checkpoint, without the prefix of data-parallel training."""
    for key in ("model_state", "state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    return {name.removeprefix("module."): value for name, value in checkpoint.items()}
