"""How dense heads read the maps of a backbone: which levels, their channels and strides, and their layout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FeatureReader:
    """Chooses the maps of a backbone that a dense head reads.

    Args:
        backbone: Model of timm's `features_only` kind: a list of maps from its call, `feature_info` with `channels()`
            and `reduction()`.
        finest: Maps of a smaller stride are ignored where coarser ones exist.

    Attributes:
        levels: Places of the chosen maps in the backbone's list, the finest first.
        channels, strides: Channels of each chosen map, and pixels of the image per cell.
        nhwc: Whether the backbone gives `[B, H, W, C]`.

    Raises:
        ValueError: The backbone gives no feature maps.
    """

    def __init__(self, backbone: nn.Module, finest: int) -> None:
        channels, strides = _read_feature_info(backbone)
        finest = min(finest, strides[-1])
        self.levels = [i for i, stride in enumerate(strides) if stride >= finest]
        self.channels, self.strides = [channels[i] for i in self.levels], [strides[i] for i in self.levels]
        self.nhwc = getattr(backbone, "output_fmt", "NCHW") == "NHWC"

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """All maps of the backbone to the chosen ones, `[B, C_i, H_i, W_i]`, the finest first."""
        maps = [maps[i] for i in self.levels]
        # [B, H, W, C] -> [B, C, H, W]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.nhwc else maps


def _read_feature_info(backbone: nn.Module) -> tuple[list[int], list[int]]:
    info = getattr(backbone, "feature_info", None)
    if not hasattr(info, "channels") or not hasattr(info, "reduction"):
        raise ValueError(
            f"{type(backbone).__name__} gives no feature maps: create it with features_only=True, or pass its name"
        )
    channels, strides = list(info.channels()), list(info.reduction())
    if not channels:
        raise ValueError(f"{type(backbone).__name__} was created with empty out_indices: a head needs a map")
    return channels, strides
