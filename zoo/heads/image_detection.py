"""Object detection in images on any backbone that gives feature maps: torchvision's RetinaNet and Mask R-CNN.

Papers: "Focal Loss for Dense Object Detection", Lin, Goyal, Girshick, He and Dollar, ICCV 2017, arXiv:1708.02002;
"Mask R-CNN", He, Gkioxari, Dollar and Girshick, ICCV 2017, arXiv:1703.06870; "Feature Pyramid Networks for Object
Detection", Lin et al., CVPR 2017, arXiv:1612.03144.

Detectors in point clouds are elsewhere, in `zoo.heads.point_detectors`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection._utils import encode_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from zoo.factory import create_model
from zoo.heads.feature_maps import FeatureReader

__all__ = ["HEADS", "ImageDetector", "PaddedRetinaNet", "create_image_detector", "match_anchors"]

# Stride of the finest map that each head reads.
HEADS = {"retinanet": 8, "mask_rcnn": 4}
_RATIOS = (0.5, 1.0, 2.0)
_BACKGROUND, _BETWEEN = -1, -2


class PyramidBackbone(nn.Module):
    """A backbone's maps through a feature pyramid, in the form that torchvision's detectors take.

    Args:
        backbone: Model of timm's `features_only` kind.
        finest: Maps of a smaller stride are ignored where coarser ones exist.
        channels: Width of the pyramid.
        extra: Levels beyond the backbone's: "convs" (P6 and P7 by strided convolutions of the coarsest map), "pool"
            (every other cell of the coarsest level) or "none".

    Attributes:
        out_channels: Width of the pyramid.
        strides: Pixels of the image per cell of each level.
    """

    def __init__(self, backbone: nn.Module, finest: int, channels: int, extra: str) -> None:
        super().__init__()
        self.reader = FeatureReader(backbone, finest)
        self.backbone, self.out_channels = backbone, channels
        self.strides = list(self.reader.strides)
        blocks = None
        if extra == "convs":
            blocks = LastLevelP6P7(self.reader.channels[-1], channels)
            # On the backbone's map, also where that has the pyramid's width.
            blocks.use_P5 = False
            self.strides += [2 * self.strides[-1], 4 * self.strides[-1]]
        elif extra == "pool":
            blocks = LastLevelMaxPool()
            self.strides.append(2 * self.strides[-1])
        elif extra != "none":
            raise ValueError(f'extra levels must be "convs", "pool" or "none", got {extra!r}')
        self.fpn = FeaturePyramidNetwork(self.reader.channels, channels, blocks)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images `[B, 3, H, W]` to maps `[B, channels, H_i, W_i]` by name, the finest first, "0", "1", ..."""
        maps = self.reader(self.backbone(images))
        levels = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        # Anchors take the dtype of the maps: bfloat16 cannot hold their coordinates.
        return OrderedDict((name, x.float()) for name, x in levels.items())


def match_anchors(anchors: Tensor, boxes: Tensor, valid: Tensor, low: float, high: float) -> Tensor:
    """Match anchors to the boxes of a padded batch, by the rule of torchvision's `Matcher`.

    An anchor takes the box that it overlaps most where their IoU is at least `high`, and also where no anchor overlaps
    one of its boxes more.

    Args:
        anchors: `[A, 4]`, corners in pixels.
        boxes: `[B, M, 4]`, M > 0.
        valid: `[B, M]` bool, false for padding.
        low, high: IoU below which an anchor is background, and from which it is a box's.

    Returns:
        `[B, A]` int64: number of the box, -1 for background, -2 for neither.
    """
    # [B * M, A] -> [B, M, A]
    iou = box_iou(boxes.flatten(0, 1), anchors).view(*boxes.shape[:2], -1)
    iou = iou.masked_fill(~valid[..., None], -1)
    best, place = iou.max(1)
    matched = place.masked_fill(best < low, _BACKGROUND).masked_fill((best >= low) & (best < high), _BETWEEN)
    kept = ((iou == iou.amax(2, keepdim=True)) & valid[..., None]).any(1)
    return torch.where(kept, place, matched)


class PaddedRetinaNet(RetinaNet):
    """torchvision's RetinaNet with its loss computed for a whole batch at once.

    The same loss (focal, and L1 of the matched anchors, each divided by the number of an image's matched anchors) with
    no loop over images and no wait for the device, so that it can be recorded in a CUDA graph.
    """

    def anchors(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Anchors `[A, 4]` of a batch `[B, 3, H, W]` with its maps."""
        sizes = [tuple(images.shape[-2:])]
        return self.anchor_generator(ImageList(images[:1], sizes), list(features))[0]

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        boxes = [target["boxes"] for target in targets]
        labels = [target["labels"] for target in targets]
        size = max(1, *(len(x) for x in labels)) if len(labels) > 1 else max(1, len(labels[0]))
        # [B, M, 4] and [B, M]
        padded = torch.stack([F.pad(x, (0, 0, 0, size - len(x))) for x in boxes])
        padded_labels = torch.stack([F.pad(x, (0, size - len(x)), value=-1) for x in labels])
        return self.padded_loss(head_outputs, anchors[0], padded, padded_labels)

    def padded_loss(
        self, head_outputs: dict[str, Tensor], anchors: Tensor, boxes: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            head_outputs: `cls_logits` `[B, A, K]` and `bbox_regression` `[B, A, 4]`.
            anchors: `[A, 4]`, the same for all images.
            boxes: `[B, M, 4]`, corners in pixels.
            labels: `[B, M]` int64, -1 for padding.

        Returns:
            `classification` and `bbox_regression`, scalars in float32.
        """
        logits, deltas = head_outputs["cls_logits"].float(), head_outputs["bbox_regression"].float()
        valid = labels >= 0
        # Boxes of no extent have no logarithm.
        boxes = torch.where(valid[..., None], boxes, torch.arange(4, dtype=boxes.dtype, device=boxes.device))
        matcher = self.proposal_matcher
        matched = match_anchors(anchors, boxes, valid, matcher.low_threshold, matcher.high_threshold)
        foreground = matched >= 0
        count = foreground.sum(1).clamp(min=1)
        place = matched.clamp(min=0)
        label = labels.gather(1, place)
        hot = (label[..., None] == torch.arange(logits.shape[-1], device=label.device)) & foreground[..., None]
        focal = sigmoid_focal_loss(logits, hot.to(logits.dtype)) * (matched != _BETWEEN)[..., None]
        # [B, A, 4]
        chosen = boxes.gather(1, place[..., None].expand(-1, -1, 4))
        # The coder's own method would copy its weights, which are ones, from the host.
        wanted = encode_boxes(chosen.flatten(0, 1), anchors.repeat(len(boxes), 1), anchors.new_ones(4))
        distance = (deltas - wanted.view_as(deltas)).abs() * foreground[..., None]
        return {
            "classification": (focal.sum((1, 2)) / count).mean(),
            "bbox_regression": (distance.sum((1, 2)) / count).mean(),
        }


class ImageDetector(nn.Module):
    """A detector of torchvision on a backbone's feature pyramid.

    Images are `[3, H, W]` in [0, 1], of any sizes; they are resized, normalised and padded to multiples of 32 inside.
    Labels count from 0 and there is none for the background.

    Args:
        backbone: Model of timm's `features_only` kind.
        head: "retinanet" (levels of stride 8 up) or "mask_rcnn" (stride 4 up).
        num_classes: Number of classes.
        channels: Width of the pyramid; that of Mask R-CNN's heads is fixed.
        extra_levels: Add levels beyond the backbone's: P6 and P7 of RetinaNet, P6 of Mask R-CNN.
        min_size, max_size: Shorter side that images are resized to, and limit of the longer side, which wins, in
            pixels. Of several shorter sides training draws one for each image and evaluation takes the last.
        mean, std: Of each channel, for pixels in [0, 1].
        norm_groups: Groups of a GroupNorm after each convolution of RetinaNet's head; 0 for no norm.
        options: Further arguments of torchvision's class, such as `score_thresh` or `box_detections_per_img`.

    Raises:
        ValueError: Unknown head, no class, no feature maps, groups where there is no such norm.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: str,
        num_classes: int,
        *,
        channels: int = 256,
        extra_levels: bool = True,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        norm_groups: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be {' or '.join(repr(name) for name in HEADS)}, got {head!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.head, self.num_classes = head, num_classes
        sides = min_size if isinstance(min_size, int) else tuple(min_size)
        transform = dict(min_size=sides, max_size=max_size, image_mean=list(mean), image_std=list(std))
        extra = {"retinanet": "convs", "mask_rcnn": "pool"}[head] if extra_levels else "none"
        pyramid = PyramidBackbone(backbone, HEADS[head], channels, extra)
        build = self._retinanet if head == "retinanet" else self._mask_rcnn
        self.net = build(pyramid, num_classes, norm_groups, {**transform, **(options or {})})

    @staticmethod
    def _retinanet(pyramid: PyramidBackbone, num_classes: int, groups: int, options: dict[str, Any]) -> RetinaNet:
        sizes = tuple(tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in pyramid.strides)
        generator = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
        norm = partial(nn.GroupNorm, groups) if groups else None
        head = RetinaNetHead(pyramid.out_channels, len(sizes[0]) * len(_RATIOS), num_classes, norm_layer=norm)
        return PaddedRetinaNet(pyramid, num_classes, anchor_generator=generator, head=head, **options)

    @staticmethod
    def _mask_rcnn(pyramid: PyramidBackbone, num_classes: int, groups: int, options: dict[str, Any]) -> MaskRCNN:
        if groups:
            raise ValueError(f"norm_groups is for RetinaNet, got {groups} with Mask R-CNN")
        sizes = tuple((8 * stride,) for stride in pyramid.strides)
        names = [str(i) for i in range(len(pyramid.reader.levels))]
        return MaskRCNN(
            pyramid,
            # The background is its class 0.
            num_classes + 1,
            rpn_anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            **options,
        )

    @property
    def _shift(self) -> int:
        return 1 if self.head == "mask_rcnn" else 0

    def forward(self, images: Sequence[Tensor] | Tensor) -> list[dict[str, Tensor]]:
        """Find objects.

        Args:
            images: `[3, H, W]` each, or a batch `[B, 3, H, W]`, in [0, 1].

        Returns:
            For each image, best first: `boxes` `[N, 4]` (x1, y1, x2, y2, pixels of the image), `scores` `[N]`, `labels`
            `[N]` int64 and, of Mask R-CNN, `masks` `[N, H, W]` bool.

        Raises:
            ValueError: Images of another kind, or a detector in training mode.
        """
        if self.training:
            raise ValueError("a detector finds objects in evaluation mode: call eval() first, or loss() to train")
        found = self.net(_check_images(images))
        for result in found:
            result["labels"] = result["labels"] - self._shift
            if "masks" in result:
                # [N, 1, H, W] -> [N, H, W]
                result["masks"] = result["masks"][:, 0] > 0.5
        return found

    def loss(self, images: Sequence[Tensor] | Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a batch in training mode.

        Args:
            images: As in `forward`.
            targets: For each image `boxes` `[N, 4]` float32, `labels` `[N]` int64 and, for Mask R-CNN, `masks`
                `[N, H, W]`; N may be 0.

        Returns:
            Parts of the loss by name, and their sum, `loss`.

        Raises:
            ValueError: Images or targets of another kind, or a detector in evaluation mode.
        """
        if not self.training:
            raise ValueError("losses need the training mode: call train() first")
        images = _check_images(images)
        targets = [self._check_target(i, target) for i, target in enumerate(targets)]
        if len(images) != len(targets):
            raise ValueError(f"got {len(images)} images and {len(targets)} targets")
        losses = dict(self.net(images, targets))
        return {"loss": sum(losses.values()), **losses}

    def _check_target(self, number: int, target: dict[str, Tensor]) -> dict[str, Tensor]:
        keys = ["boxes", "labels", "masks"] if self.head == "mask_rcnn" else ["boxes", "labels"]
        missing = [key for key in keys if key not in target]
        if missing:
            raise ValueError(f"target {number} has no {' and no '.join(missing)}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.shape != (len(labels), 4):
            raise ValueError(f"target {number} has boxes of shape {tuple(boxes.shape)} for {len(labels)} labels")
        if labels.is_cuda or not len(labels):
            # Values on a device are not waited for.
            return {key: target[key] for key in keys} | {"labels": labels + self._shift}
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"target {number} has labels {labels.min()} to {labels.max()}, but num_classes is {self.num_classes}"
            )
        return {key: target[key] for key in keys} | {"labels": labels + self._shift}


def _check_images(images: Sequence[Tensor] | Tensor) -> list[Tensor]:
    images = list(images)
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                f"image {i} must be floating-point [3, H, W] in [0, 1], got {image.dtype} of shape {tuple(image.shape)}"
            )
    if not images:
        raise ValueError("got no image")
    return images


def create_image_detector(
    backbone: str | nn.Module,
    head: str = "retinanet",
    num_classes: int = 80,
    pretrained_backbone: bool = False,
    *,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> ImageDetector:
    """Create an object detector for images.

    Args:
        backbone: Name of an image model of this package or of timm, as `zoo.create_model` takes it, or a model that was
            created with `features_only=True`.
        head: "retinanet" or "mask_rcnn".
        num_classes: Number of classes.
        pretrained_backbone: Load the backbone's pretrained weights; heads start at random in any case.
        backbone_kwargs: Further arguments of the backbone, such as `drop_path_rate` or, for the models of this package
            that have them, `extra_norms` (a norm for each map) and `n_win`. Backbones of a fixed input size need timm's
            own arguments for another one.
        **kwargs: Arguments of `ImageDetector`, such as `channels` or `min_size`.

    Returns:
        The detector, in training mode.

    Raises:
        ValueError: Unknown backbone or head, arguments that do not fit, a backbone without feature maps.
        zoo.hub.HubError: There are no pretrained weights of the backbone.

    Source: arXiv:1708.02002 (RetinaNet), arXiv:1703.06870 (Mask R-CNN).
    """
    if isinstance(backbone, str):
        options = dict(backbone_kwargs or {}) | dict(features_only=True)
        backbone = create_model(backbone, pretrained=pretrained_backbone, **options)
    elif pretrained_backbone or backbone_kwargs:
        raise ValueError("pretrained_backbone and backbone_kwargs need the name of a backbone, got a model")
    return ImageDetector(backbone, head, num_classes, **kwargs)
