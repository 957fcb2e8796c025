"""What the plug-in has to know of each family of models in transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.token_dropping.base import NEWLINE, Kept, TokenDropper, TokenSelector, Vision
from zoo.heads.token_dropping.packing import ImageGrid, Packer, shrink
from zoo.heads.token_dropping.towers import Tower

# Model classes that look alike but place their tokens in another way, and why.
REFUSED = {
    "Qwen": "its vision tower has no CLS token, merges patches 2 x 2 behind windowed attention, and its positions have "
    "three axes that follow from the full grid of patches",
    "LlavaNextVideo": "it pools the frames of videos",
    "VipLlava": "it concatenates features of five layers behind a norm",
    "InternVL": "it shuffles pixels of its tower into channels",
}


class Encoded(NamedTuple):
    """Images as the language model reads them.

    Attributes:
        embeddings: [n, D] of each image.
        lengths: n of each image.
        source: [L] int64, see `Kept.source`.
        images: Geometry of the images.
    """

    embeddings: list[Tensor]
    lengths: list[int]
    source: Tensor
    images: list[ImageGrid]


class Family:
    """LLaVA-1.5: an image is one partition.

    Attributes:
        inputs: Names of the arguments that belong to images; the first one holds the pixels.
        has_newline: Whether the model puts newline tokens behind rows.
    """

    inputs: tuple[str, ...] = ("pixel_values",)
    has_newline = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def body(self) -> nn.Module:
        """The model without its head: tower, projector and language model."""
        return self.model.model

    def tower(self, layer: Any = None, strategy: str | None = None) -> Tower:
        """The vision tower, for a feature layer and strategy of a call (default: the configuration's).

        Raises:
            NotImplementedError: A tower or a strategy that is not supported.
        """
        config = self.model.config
        layer = config.vision_feature_layer if layer is None else layer
        strategy = config.vision_feature_select_strategy if strategy is None else strategy
        tower = Tower(self.body.vision_tower, layer)
        expected = "default" if tower.prefix else "full"
        if strategy != expected:
            raise NotImplementedError(
                f"token dropping needs features of patches alone: vision_feature_select_strategy={expected!r} with "
                f"this tower, got {strategy!r}."
            )
        return tower

    def images(self, tower: Tower, pixel_values: Tensor, **inputs: Any) -> tuple[Tensor, list[ImageGrid]]:
        """Partitions [P, 3, H, W] of all images, and the geometry of each."""
        if pixel_values.dim() != 4:
            raise ValueError(f"pixel_values must be [images, 3, H, W], got {tuple(pixel_values.shape)}.")
        side = tower.pixels
        image = ImageGrid((0, 0), (side, side), tower.side, side)
        return pixel_values, [image] * pixel_values.shape[0]

    def encode(self, dropper: TokenDropper, tower: Tower, packer: Packer, pixels: Tensor, images: list) -> Encoded:
        """Run the tower, drop tokens, project the ones that are left."""
        with dropper.inside(tower):
            vision = tower.run(pixels, images, dropper.probes(tower))
        kept = dropper.reduce(vision, packer)
        return self._finish(self.body.multi_modal_projector(kept.features), kept, images)

    def _finish(self, embeddings: Tensor, kept: Kept, images: list[ImageGrid]) -> Encoded:
        if self.has_newline:
            newline = self.body.image_newline.to(embeddings)
            embeddings = torch.where((kept.source == NEWLINE)[:, None], newline, embeddings)
        return Encoded(list(embeddings.split(kept.lengths)), kept.lengths, kept.source, images)


class Next(Family):
    """LLaVA-NeXT: the whole image and a grid of sub-images, newline tokens."""

    inputs = ("pixel_values", "image_sizes")
    has_newline = True

    def images(self, tower: Tower, pixel_values: Tensor, **inputs: Any) -> tuple[Tensor, list[ImageGrid]]:
        """Partitions of all images without the padding of smaller grids."""
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes is missing: pass everything that the processor returns.")
        images = self._geometry(tower, torch.as_tensor(sizes).tolist(), inputs)
        if pixel_values.dim() == 5:
            most = max(image.partitions for image in images)
            if pixel_values.shape[0] != len(images) or pixel_values.shape[1] < most:
                raise ValueError(
                    f"pixel_values must be [{len(images)}, {most} or more, 3, H, W] for image_sizes of "
                    f"{len(images)} images, got {tuple(pixel_values.shape)}."
                )
            if all(image.partitions == pixel_values.shape[1] for image in images):
                return pixel_values.flatten(0, 1), images
            parts = [x[: image.partitions] for x, image in zip(pixel_values, images, strict=True)]
            return torch.cat(parts), images
        partitions = sum(image.partitions for image in images)
        if pixel_values.dim() != 4 or pixel_values.shape[0] != partitions:
            raise ValueError(
                f"pixel_values must be [images, partitions, 3, H, W] or [{partitions}, 3, H, W] for these image_sizes, "
                f"got {tuple(pixel_values.shape)}."
            )
        return pixel_values, images

    def _geometry(self, tower: Tower, sizes: list[list[int]], inputs: dict[str, Any]) -> list[ImageGrid]:
        return [self._image(tower, (H, W)) for H, W in sizes]

    def _image(self, tower: Tower, size: tuple[int, int]) -> ImageGrid:
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size, self.model.config.image_grid_pinpoints)
        # Grids that do not divide count the cut sub-images too, as transformers does.
        grid = -(-height // tower.pixels), -(-width // tower.pixels)
        return ImageGrid(grid, size, tower.side, tower.pixels)


class OneVision(Next):
    """LLaVA-OneVision: large mosaics are resampled; one of several images of a prompt has no sub-images."""

    inputs = ("pixel_values", "image_sizes", "batch_num_images", "vision_aspect_ratio")

    def _geometry(self, tower: Tower, sizes: list[list[int]], inputs: dict[str, Any]) -> list[ImageGrid]:
        counts = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
        cut = [count == 1 for count in counts for _ in range(count)]
        ratio = inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        largest = int(ratio.removeprefix("anyres_max_"))
        images = []
        for (H, W), grid in zip(sizes, cut, strict=True):
            image = self._image(tower, (H, W))
            images.append(shrink(image, largest) if grid else replace(image, grid=(0, 0)))
        return images

    def encode(self, dropper: TokenDropper, tower: Tower, packer: Packer, pixels: Tensor, images: list) -> Encoded:
        """Like the base class; where a mosaic is resampled, tokens are projected before and dropped after that."""
        if not any(image.shrunk for image in images):
            return super().encode(dropper, tower, packer, pixels, images)
        if not isinstance(dropper, TokenSelector):
            raise NotImplementedError(
                f"method {dropper.name!r} makes new tokens, but this model resamples the mosaic of images as large as "
                f"{max(image.size for image in images)}: choose a method that selects tokens ('hired', 'spatial', "
                "'random') or smaller images."
            )
        if packer.legacy:
            raise NotImplementedError("grid='legacy' belongs to LLaVA-NeXT; resampled mosaics need grid='fixed'.")
        with dropper.inside(tower):
            vision = tower.run(pixels, images, dropper.probes(tower))
        kept = dropper.reduce(resample(vision, self.body.multi_modal_projector), packer)
        return self._finish(kept.features, kept, images)


def resample(vision: Vision, projector: nn.Module) -> Vision:
    """Projected features and scores with resampled mosaics, whose places fill the partitions block by block."""
    projected = projector(vision.patches)  # [P, N, D]
    scores = {layer: _resample(x[..., None], vision)[..., 0] for layer, x in vision.scores.items()}
    return replace(vision, features=_resample(projected, vision), prefix=0, scores=scores)


def _resample(x: Tensor, vision: Vision) -> Tensor:
    """[P, N, C] -> [P, N, C]; places without a token of the resampled mosaic are zero."""
    out = []
    for image, part in zip(vision.images, vision.split(x), strict=True):
        if image.shrunk:
            mosaic = replace(image, shrunk=None).mosaic().to(x.device)
            full = part.flatten(0, 1)[mosaic].movedim(-1, 0)[None]  # [1, C, h, w]
            small = F.interpolate(full, list(image.shrunk), mode="bilinear")[0].movedim(0, -1)
            places = image.mosaic().to(x.device).flatten()
            flat = torch.cat((part[0], torch.zeros_like(part[1:]).flatten(0, 1)))
            part = flat.index_copy(0, places, small.flatten(0, 1)).view_as(part)
        out.append(part)
    return torch.cat(out)


FAMILIES = {
    "LlavaForConditionalGeneration": Family,
    "LlavaNextForConditionalGeneration": Next,
    "LlavaOnevisionForConditionalGeneration": OneVision,
}


def family_of(model: nn.Module) -> Family:
    """The adapter of a model.

    Raises:
        NotImplementedError: A model that is not supported, with the reason if it is known.
    """
    model = getattr(model, "_orig_mod", model)
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name](model)
    reason = next((why for start, why in REFUSED.items() if names[0].startswith(start)), None)
    raise NotImplementedError(
        f"token dropping supports {', '.join(FAMILIES)} of transformers; got {names[0]}"
        + (f": {reason}." if reason else ".")
    )
