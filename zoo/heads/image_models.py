"""Segmenters and detectors of images that have a name, weights and classes of their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from zoo.heads.image_detection import create_image_detector
from zoo.heads.segmentation import create_segmenter
from zoo.registry import join_card, register

SEGMENTATION, DETECTION = "image-segmentation", "object-detection"
_MEAN, _STD = (0.286,) * 3, (0.353,) * 3
# The background comes first: its pixels have a label too.
_CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_MULTIPLE = 32

_CARD = """
# {name}

{description}

## Model

| | |
| --- | --- |
| architecture | `{architecture}` |
| task | {task} |
| parameters | {params} |
| classes | {classes} |
| input | shorter side resized to {size} pixels |

## Use

```python
import zoo

model = zoo.create_model("{address}", pretrained=True).eval()
result = model.predict(image)  # float32 [3, H, W] in [0, 1]
```

`zoo predict IMAGE --task {command} --model {address}` draws the result.
"""


class ImageModel(nn.Module):
    """What named segmenters and detectors share; use a subclass.

    Args:
        architecture: Registered name.
        backbone: Name of an image model.
        classes: Names of the classes, in the order of the labels.
        image_size: Shorter side that images are resized to, pixels.
        head: Kind of head, see the subclass.
        mean, std: Of each channel, for pixels in [0, 1].
        backbone_kwargs, head_kwargs: Further arguments of the backbone and of the head.
        pretrained_backbone: Start the backbone from pretrained weights; not kept in the configuration.
    """

    task: str
    command: str

    def __init__(
        self,
        architecture: str,
        backbone: str,
        classes: Sequence[str],
        image_size: int,
        *,
        head: str,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
        backbone_kwargs: dict[str, Any] | None = None,
        head_kwargs: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.config = _config(locals())
        self.architecture, self.classes, self.image_size = architecture, tuple(classes), image_size
        self.mean, self.std = tuple(mean), tuple(std)
        if len(set(self.classes)) != len(self.classes) or not self.classes:
            raise ValueError(f"classes must be different names, at least one, got {list(classes)}.")
        self.net = self.build(backbone, head, pretrained_backbone, backbone_kwargs, head_kwargs or {})

    def build(
        self, backbone: str, head: str, pretrained: bool, backbone_kwargs: dict[str, Any] | None, head_kwargs: dict
    ) -> nn.Module:
        """The network."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width that costs are counted at."""
        return 3, self.image_size, self.image_size

    map_shape = input_size

    def dense(self, images: Tensor) -> Any:
        """What the network computes for normalised images `[B, 3, H, W]`, without the search for objects."""
        raise NotImplementedError

    def predict(self, image: Tensor) -> Any:
        """What is in an image `[3, H, W]` in [0, 1]."""
        raise NotImplementedError

    def render_card(self, card: dict[str, Any], metrics: dict[str, float]) -> str:
        """Text of the model card.

        Args:
            card: Fields as of `zoo.hub.render_card`.
            metrics: Measured results by name.
        """
        from huggingface_hub import ModelCardData

        front = ModelCardData(
            license=card.get("license"), library_name="attention-zoo", pipeline_tag=self.task,
            tags=[self.task, *card.get("tags", [])], datasets=card.get("datasets"),
        )  # fmt: skip
        body = _CARD.format(
            name=card.get("name") or self.architecture,
            description=card.get("description") or f"Weights of `{self.architecture}`.",
            architecture=self.architecture,
            task=self.task,
            params=f"{sum(p.numel() for p in self.parameters()) / 1e6:.2f} M",
            classes=", ".join(self.classes),
            size=self.image_size,
            address=card.get("address", "local-dir:FOLDER"),
            command=self.command,
        )
        return join_card(front, body, card, metrics)


class ImageSegmenter(ImageModel):
    """A segmenter of `create_segmenter` with preprocessing and class names; `head` is "semantic_fpn" or "upernet"."""

    task, command = SEGMENTATION, "segment"

    def build(
        self, backbone: str, head: str, pretrained: bool, backbone_kwargs: dict[str, Any] | None, head_kwargs: dict
    ) -> nn.Module:
        """The network."""
        return create_segmenter(
            backbone, head, self.num_classes, pretrained, backbone_kwargs=backbone_kwargs, head_kwargs=head_kwargs
        )

    def dense(self, images: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` to logits `[B, num_classes, H, W]`."""
        return self.net(images)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] to logits `[B, num_classes, H, W]`."""
        return self.dense(normalise(images, self.mean, self.std))

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Class of each pixel of an image.

        Args:
            image: `[3, H, W]` in [0, 1], of any size.

        Returns:
            `[H, W]` int64.
        """
        sides = image.shape[-2:]
        scale = self.image_size / min(sides)
        sizes = [-(-max(1, round(side * scale)) // _MULTIPLE) * _MULTIPLE for side in sides]
        logits = self(resize(image, sizes, antialias=True)[None])
        return nn.functional.interpolate(logits, tuple(sides), mode="bilinear", align_corners=False)[0].argmax(0)


class ImageObjectDetector(ImageModel):
    """A detector of `create_image_detector` with its class names; `head` is "retinanet" or "mask_rcnn".

    The longer side of an image is resized to at most twice `image_size`; `head_kwargs` are those of `ImageDetector`.
    """

    task, command = DETECTION, "detect"

    def build(
        self, backbone: str, head: str, pretrained: bool, backbone_kwargs: dict[str, Any] | None, head_kwargs: dict
    ) -> nn.Module:
        """The network."""
        return create_image_detector(
            backbone, head, self.num_classes, pretrained, backbone_kwargs=backbone_kwargs, min_size=self.image_size,
            max_size=2 * self.image_size, mean=self.mean, std=self.std, **head_kwargs,
        )  # fmt: skip

    def dense(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images `[B, 3, H, W]` to the maps of the first stage's head (RetinaNet: logits and boxes)."""
        features = list(self.net.net.backbone(images).values())
        return self.net.net.head(features) if self.net.head == "retinanet" else self.net.net.rpn.head(features)

    def forward(self, images: Sequence[Tensor] | Tensor) -> list[dict[str, Tensor]]:
        """Find objects in images, as `zoo.heads.image_detection.ImageDetector` does."""
        return self.net(images)

    @torch.no_grad()
    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Objects in an image `[3, H, W]` in [0, 1]: `boxes`, `scores` and `labels`, best first."""
        return self.net([image])[0]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean of each channel of `[B, 3, H, W]` and divide by its standard deviation."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images - mean) / std


def _config(values: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` holds of a constructor's arguments, as plain types."""
    names = [name for name in inspect.signature(type(values["self"])).parameters if name != "pretrained_backbone"]
    return {name: list(x) if isinstance(x := values[name], tuple) else x for name in names}


_BIFORMER = "BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv:2303.08810)"


@register(ImageSegmenter, family="segmentation", task=SEGMENTATION, paper=f"{_BIFORMER}; Panoptic Feature Pyramid "
          "Networks (arXiv:1901.02446)")  # fmt: skip
def semantic_fpn_biformer_nano() -> dict[str, Any]:
    """Semantic FPN of 56 channels on BiFormer-nano; ten kinds of clothes and the background."""
    return dict(
        backbone="biformer_nano.zoo_fashion_mnist", classes=("background", *_CLASSES), image_size=160,
        head="semantic_fpn", head_kwargs=dict(pyramid_channels=56, channels=56),
    )  # fmt: skip


@register(ImageObjectDetector, family="image_detection", task=DETECTION, paper=f"{_BIFORMER}; Focal Loss for Dense "
          "Object Detection (arXiv:1708.02002)")  # fmt: skip
def retinanet_biformer_nano() -> dict[str, Any]:
    """RetinaNet of 56 channels and three levels on BiFormer-nano; ten kinds of clothes."""
    return dict(
        backbone="biformer_nano.zoo_fashion_mnist", classes=_CLASSES, image_size=160,
        head="retinanet", head_kwargs=dict(channels=56, extra_levels=False, norm_groups=8),
    )  # fmt: skip
