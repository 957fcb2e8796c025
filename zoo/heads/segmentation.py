"""Semantic segmentation on any backbone that gives feature maps: the Semantic FPN and UPerNet heads.

Papers: "Panoptic Feature Pyramid Networks", Kirillov, Girshick, He and Dollar, CVPR 2019, arXiv:1901.02446 (its
semantic branch); "Unified Perceptual Parsing for Scene Understanding", Xiao, Liu, Zhou, Jiang and Sun, ECCV 2018,
arXiv:1807.10221.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from zoo.factory import create_model
from zoo.heads.feature_maps import FeatureReader

__all__ = ["FCNHead", "SemanticFPNHead", "Segmenter", "UPerNetHead", "create_segmenter"]

# Maps finer than this are left to the backbone, as in the published networks.
_FINEST_STRIDE = 4
_POOL_SIZES = (1, 2, 3, 6)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _conv(in_chs: int, out_chs: int, kernel: int = 3) -> Conv2dNormActivation:
    # Activation apart from the norm, so that the conversion to SyncBatchNorm keeps it.
    return Conv2dNormActivation(in_chs, out_chs, kernel)


class _Classifier(nn.Sequential):
    """Dropout of whole channels and a linear classifier of each pixel."""

    def __init__(self, in_chs: int, num_classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout2d(dropout), nn.Conv2d(in_chs, num_classes, 1))
        nn.init.normal_(self[1].weight, std=0.01)
        nn.init.zeros_(self[1].bias)


class FeaturePyramid(nn.Module):
    """Feature pyramid: 1x1 laterals, nearest-neighbour top-down additions, 3x3 outputs, no norms.

    Args:
        in_chs: Channels of each map, the finest first.
        channels: Channels of each output.

    Source: arXiv:1612.03144.
    """

    def __init__(self, in_chs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(chs, channels, 1) for chs in in_chs)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_chs)
        for conv in (*self.laterals, *self.outputs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps `[B, C_i, H_i, W_i]`, the finest first, to maps `[B, channels, H_i, W_i]`."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[-2:], mode="nearest")
        return [output(x) for output, x in zip(self.outputs, maps, strict=True)]


class SemanticFPNHead(nn.Module):
    """Semantic FPN: a feature pyramid whose levels are convolved up to the finest one and summed.

    Each level takes one 3x3 convolution with norm and ReLU for each halving of its resolution against the finest
    level (at least one), each followed by bilinear doubling.

    Args:
        in_chs: Channels of each map, the finest first.
        strides: Pixels of the image per cell of each map.
        num_classes: Number of classes.
        pyramid_channels: Width of the pyramid.
        channels: Width of what is summed.
        dropout: Rate of channel dropout before the classifier.

    Source: arXiv:1901.02446.
    """

    def __init__(
        self,
        in_chs: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        pyramid_channels: int = 256,
        channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(in_chs, pyramid_channels)
        self.scales = nn.ModuleList()
        for stride in strides:
            steps = max(1, round(math.log2(stride / strides[0])))
            widths = [pyramid_channels] + [channels] * steps
            self.scales.append(nn.ModuleList(_conv(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)))
        self.doubles = [stride > strides[0] for stride in strides]
        self.classifier = _Classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[B, C_i, H_i, W_i]`, the finest first, to logits `[B, num_classes, H_0, W_0]`."""
        total = None
        for x, scale, double in zip(self.pyramid(maps), self.scales, self.doubles, strict=True):
            for conv in scale:
                x = conv(x)
                if double:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            # Maps of odd sizes do not double exactly.
            total = x if total is None else total + _resize(x, total.shape[-2:])
        return self.classifier(total)


class PyramidPooling(nn.Module):
    """Pyramid pooling: the map beside its averages over coarse grids, fused by a 3x3 convolution.

    Args:
        in_chs: Channels of the map.
        channels: Channels of each pooled map and of the output.
        sizes: Cells per side of each grid.

    Source: arXiv:1612.01105.
    """

    def __init__(self, in_chs: int, channels: int, sizes: Sequence[int] = _POOL_SIZES) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.pools = nn.ModuleList(_conv(in_chs, channels, 1) for _ in self.sizes)
        self.fuse = _conv(in_chs + len(self.sizes) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chs, H, W]` to `[B, channels, H, W]`.

        Raises:
            ValueError: One image in training, of which batch norm has no statistics after pooling to one cell.
        """
        if self.training and len(x) == 1 and 1 in self.sizes:
            raise ValueError(
                "UPerNet pools the map to one cell, whose batch norm needs more than one image in training: got a "
                "batch of one; use a larger batch, or eval() to predict"
            )
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(x, size)), x.shape[-2:])
            for size, conv in zip(self.sizes, self.pools, strict=True)
        ]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class UPerNetHead(nn.Module):
    """UPerNet: pyramid pooling on the coarsest map, a feature pyramid with norms, all levels fused at the finest.

    Args:
        in_chs: Channels of each map, the finest first.
        num_classes: Number of classes.
        channels: Width of the head.
        dropout: Rate of channel dropout before the classifier.

    Source: arXiv:1807.10221.
    """

    def __init__(self, in_chs: Sequence[int], num_classes: int, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.pooling = PyramidPooling(in_chs[-1], channels)
        self.laterals = nn.ModuleList(_conv(chs, channels, 1) for chs in in_chs[:-1])
        self.outputs = nn.ModuleList(_conv(channels, channels) for _ in in_chs[:-1])
        self.fuse = _conv(len(in_chs) * channels, channels)
        self.classifier = _Classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[B, C_i, H_i, W_i]`, the finest first, to logits `[B, num_classes, H_0, W_0]`."""
        *fine, coarse = maps
        levels = [lateral(x) for lateral, x in zip(self.laterals, fine, strict=True)] + [self.pooling(coarse)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resize(levels[i], levels[i - 1].shape[-2:])
        # The coarsest level has been convolved by the pooling.
        levels[:-1] = [output(x) for output, x in zip(self.outputs, levels[:-1], strict=True)]
        return self.classifier(self.fuse(torch.cat([_resize(x, levels[0].shape[-2:]) for x in levels], dim=1)))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier on a single map: the auxiliary head of UPerNet's training.

    Args:
        in_chs: Channels of the map.
        num_classes: Number of classes.
        channels: Width of the head.
        dropout: Rate of channel dropout before the classifier.

    Source: arXiv:1411.4038 and, as an auxiliary head, arXiv:1612.01105.
    """

    def __init__(self, in_chs: int, num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = _conv(in_chs, channels)
        self.classifier = _Classifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_chs, H, W]` to logits `[B, num_classes, H, W]`."""
        return self.classifier(self.conv(x))


class Segmenter(nn.Module):
    """A backbone's feature maps through a head, with logits at the resolution of the image.

    Args:
        backbone: Model of timm's `features_only` kind: a list of maps from its call, `feature_info` with `channels()`
            and `reduction()`. Maps of stride below 4 are ignored where coarser ones exist.
        head: "semantic_fpn" or "upernet".
        num_classes: Number of classes.
        auxiliary: Add an `FCNHead` on the last but one map, for training.
        dropout: Rate of channel dropout before the classifiers.
        head_kwargs: Further arguments of the head, such as `channels`.

    Raises:
        ValueError: Unknown head, no class, no feature maps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: str,
        num_classes: int,
        *,
        auxiliary: bool = False,
        dropout: float = 0.1,
        head_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.reader = FeatureReader(backbone, _FINEST_STRIDE)
        channels, strides = self.reader.channels, self.reader.strides
        self.num_classes = num_classes
        self.backbone = backbone
        options = dict(dropout=dropout, **(head_kwargs or {}))
        if head == "semantic_fpn":
            self.head = SemanticFPNHead(channels, strides, num_classes, **options)
        elif head == "upernet":
            self.head = UPerNetHead(channels, num_classes, **options)
        else:
            raise ValueError(f'head must be "semantic_fpn" or "upernet", got {head!r}')
        self.auxiliary_level = max(0, len(channels) - 2)
        chs = channels[self.auxiliary_level]
        self.auxiliary = FCNHead(chs, num_classes, dropout=dropout) if auxiliary else None

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Images `[B, in_chans, H, W]` to the maps that the head reads, `[B, C_i, H_i, W_i]`, the finest first."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating-point [B, C, H, W], got {images.dtype} of shape {tuple(images.shape)}"
            )
        return self.reader(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each pixel.

        Args:
            images: `[B, in_chans, H, W]`, floating point, of any size that the backbone takes.

        Returns:
            `[B, num_classes, H, W]`.

        Raises:
            ValueError: Input of another kind; a batch of one image in training with UPerNet.
        """
        return _resize(self.head(self.forward_features(images)), images.shape[-2:])

    def forward_training(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits as `forward` gives them, and those of the auxiliary head at the same size, None without one."""
        maps, size = self.forward_features(images), images.shape[-2:]
        logits = _resize(self.head(maps), size)
        if self.auxiliary is None:
            return logits, None
        return logits, _resize(self.auxiliary(maps[self.auxiliary_level]), size)


def create_segmenter(
    backbone: str | nn.Module,
    head: str = "semantic_fpn",
    num_classes: int = 150,
    pretrained_backbone: bool = False,
    *,
    auxiliary: bool | None = None,
    dropout: float = 0.1,
    backbone_kwargs: dict[str, Any] | None = None,
    head_kwargs: dict[str, Any] | None = None,
) -> Segmenter:
    """Create a network of semantic segmentation.

    Args:
        backbone: Name of an image model of this package or of timm, as `zoo.create_model` takes it, or a model that was
            created with `features_only=True`.
        head: "semantic_fpn" (256 channels in the pyramid, 128 summed) or "upernet" (512 channels).
        num_classes: Number of classes.
        pretrained_backbone: Load the backbone's pretrained weights; heads start at random in any case.
        auxiliary: Add an auxiliary head for training; None means with UPerNet only, as published.
        dropout: Rate of channel dropout before the classifiers.
        backbone_kwargs: Further arguments of the backbone, such as `drop_path_rate`, `out_indices` or, for the models
            of this package that have them, `extra_norms` (a norm for each map) and `n_win`. Backbones of a fixed input
            size need timm's own arguments for another one, such as `img_size`.
        head_kwargs: Further arguments of the head: `channels`, and `pyramid_channels` of Semantic FPN.

    Returns:
        The network, in training mode: images `[B, 3, H, W]` to logits `[B, num_classes, H, W]`.

    Raises:
        ValueError: Unknown backbone or head, arguments that do not fit, a backbone without feature maps.
        zoo.hub.HubError: There are no pretrained weights of the backbone.

    Source: arXiv:1901.02446 (Semantic FPN), arXiv:1807.10221 (UPerNet).
    """
    if isinstance(backbone, str):
        options = dict(backbone_kwargs or {}) | dict(features_only=True)
        backbone = create_model(backbone, pretrained=pretrained_backbone, **options)
    elif pretrained_backbone or backbone_kwargs:
        raise ValueError("pretrained_backbone and backbone_kwargs need the name of a backbone, got a model")
    auxiliary = head == "upernet" if auxiliary is None else auxiliary
    return Segmenter(backbone, head, num_classes, auxiliary=auxiliary, dropout=dropout, head_kwargs=head_kwargs)
