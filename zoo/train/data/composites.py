"""Scenes for segmentation and detection: real images of clothes pasted on real photographs, with exact masks.

A scene is a function of (seed, index) alone, whatever the batch. Up to six garments of Fashion-MNIST, tinted, turned
and scaled, lie over a crop of a photograph and partly over each other. A pixel belongs to the topmost garment whose
opacity there is above one half, so masks, boxes and classes are exact. Photographs of the training scenes never occur
in those of validation and test, whose garments are from other images too.
"""

from __future__ import annotations

import functools
import math
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from zoo.heads.tiny_vlm import CLASSES
from zoo.train.scenes import Draws, GarmentPool, garment_pool

SAMPLES = Path(__file__).parents[2] / "samples"
# Most garments of a scene.
MOST = 6
# Sides of the stored photographs, pixels.
_PHOTO = 192
# Every so many-th photograph is for validation and test.
_HELD_OUT = 4
# Opacity per intensity: garments are dark at their rims.
_OPACITY = 5.0
# Least share of a garment that must be in sight, and least area as a share of the scene.
_LEAST_VISIBLE, _LEAST_AREA = 0.5, 1 / 640
_SUFFIXES = (".jpg", ".jpeg", ".png")


def photographs(split: str, device: torch.device | str = "cpu", root: str | Path | None = None) -> Tensor:
    """Photographs of a split, squeezed to squares, `[N, 3, 192, 192]` uint8.

    Args:
        split: `train`, or `val` or `test` for those that are held out (every fourth by name).
        device: Where they are kept.
        root: Folder with photographs or with tars of them, searched in depth; None for those of this package.

    Raises:
        FileNotFoundError: Fewer than four photographs.
    """
    root = Path(root or SAMPLES)
    images = _read(root)
    if len(images) < _HELD_OUT:
        raise FileNotFoundError(
            f"needs {_HELD_OUT} photographs ({', '.join(_SUFFIXES)}, or in .tar) in {root}, found {len(images)}"
        )
    held_out = split != "train"
    chosen = [image for i, image in enumerate(images) if (i % _HELD_OUT == _HELD_OUT - 1) == held_out]
    return torch.stack(chosen).to(device)


@functools.lru_cache(1)
def _read(root: Path) -> list[Tensor]:
    images = [_load(path) for path in sorted(root.rglob("*")) if path.suffix.lower() in _SUFFIXES]
    for path in sorted(root.rglob("*.tar")):
        with tarfile.open(path) as tar:
            names = sorted(name for name in tar.getnames() if Path(name).suffix.lower() in _SUFFIXES)
            images += [_load(tar.extractfile(name)) for name in names]
    return images


def _load(source) -> Tensor:
    with Image.open(source) as image:
        return pil_to_tensor(image.convert("RGB").resize((_PHOTO, _PHOTO), Image.Resampling.BOX))


@dataclass
class Composites:
    """A batch of scenes of S x S pixels with up to M garments.

    Attributes:
        pixels: `[B, 3, S, S]` float32 in [0, 1], multiples of 1/255.
        semantic: `[B, S, S]` int64, 0 for the background and k + 1 for class k of `CLASSES`.
        instance: `[B, S, S]` int64, 0 for the background and m + 1 for garment m.
        boxes: `[B, M, 4]` float32, (x1, y1, x2, y2) around what is in sight, pixels; zeros where there is no garment.
        labels: `[B, M]` int64, of `CLASSES`, -1 where there is no garment.
    """

    pixels: Tensor
    semantic: Tensor
    instance: Tensor
    boxes: Tensor
    labels: Tensor

    def targets(self) -> list[dict[str, Tensor]]:
        """For each scene `boxes` `[N, 4]`, `labels` `[N]` and `masks` `[N, S, S]` bool, as detectors take them."""
        found = []
        for boxes, labels, instance in zip(self.boxes, self.labels, self.instance, strict=True):
            place = (labels >= 0).nonzero()[:, 0]
            masks = instance == place[:, None, None] + 1
            found.append(dict(boxes=boxes[place], labels=labels[place], masks=masks))
        return found


class CompositeSource:
    """Scenes of a split.

    Args:
        root: Folder of Fashion-MNIST's IDX files.
        split: `train` (55,000 images of garments), `val` (5,000 others) or `test` (the official 10,000).
        device: Where scenes are made.
        image_size: Height and width in pixels.
        seed: Of the scenes.
        backgrounds: As in `photographs`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        device: torch.device | str = "cpu",
        image_size: int = 160,
        seed: int = 0,
        backgrounds: str | Path | None = None,
    ) -> None:
        self.garments = garment_pool(root, split, device)
        self.photos = photographs(split, device, backgrounds)
        self.image_size, self.seed = image_size, seed

    def __call__(self, index: Tensor) -> Composites:
        """Scenes of numbers `[B]` int64, on the device of the source."""
        return compose(self.garments, self.photos, self.seed, index, self.image_size)


class CompositeScenes(Sequence):
    """A number of scenes as pairs of a PIL image and what `target` makes of the scene, a batch of one."""

    def __init__(self, source: CompositeSource, count: int, target: Callable[[Composites], Any]) -> None:
        self.source, self.count, self.target = source, count, target

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scenes = self.source(torch.tensor([index]))
        return to_pil_image((scenes.pixels[0] * 255).round().byte()), self.target(scenes)


def composite_splits(hparams: Any, image_size: int, target: Callable[[Composites], Any]) -> dict[str, CompositeScenes]:
    """Splits of a data module with the options `root`, `scenes`, `val_scenes`, `backgrounds` and `seed`."""
    counts = dict(train=hparams.scenes, val=hparams.val_scenes, test=hparams.val_scenes)
    options = dict(image_size=image_size, seed=hparams.seed, backgrounds=hparams.backgrounds)
    return {
        split: CompositeScenes(CompositeSource(hparams.root, split, **options), count, target)
        for split, count in counts.items()
    }


def compose(garments: GarmentPool, photos: Tensor, seed: int, index: Tensor, size: int = 160) -> Composites:
    """Compose scenes.

    Args:
        garments: Images by class.
        photos: `[N, 3, P, P]` uint8.
        seed: Of the data set.
        index: `[B]` int64, on the device of both.
        size: Height and width in pixels, S.
    """
    draws = Draws(seed, index)
    present = torch.arange(MOST, device=index.device) < 1 + (draws(1) * MOST).long()
    label = (draws(MOST) * len(CLASSES)).long()
    shapes = _place(garments.pick(label, draws(MOST)), draws, size)
    alpha = (shapes * _OPACITY).clamp(max=1) * present[..., None, None]
    solid = alpha > 0.5  # [B, M, S, S]
    seen = _areas(_stack(solid))
    kept = present & (seen >= _LEAST_VISIBLE * solid.sum((2, 3))) & (seen >= _LEAST_AREA * size * size)
    # What is hidden or tiny is taken away, so that every garment in the picture has a box.
    alpha = alpha * kept[..., None, None]
    instance = _stack(solid & kept[..., None, None])
    padded = torch.cat([torch.zeros_like(label[:, :1]), label + 1], 1)
    semantic = padded.gather(1, instance.flatten(1)).view_as(instance)
    tint = 0.3 + 0.7 * draws(MOST, 3)
    pixels = _paint(_background(photos, draws, size), shapes, alpha, tint)
    boxes = _boxes(instance) * kept[..., None]
    return Composites(pixels, semantic, instance, boxes, label.masked_fill(~kept, -1))


def _place(garments: Tensor, draws: Draws, size: int) -> Tensor:
    """Scale, stretch, turn, mirror and move garments `[B, M, 28, 28]` in scenes, `[B, M, S, S]`."""
    side = 0.2 * torch.exp(draws(MOST) * math.log(0.6 / 0.2))
    stretch = torch.exp((draws(MOST) - 0.5) * 0.4)
    angle = (draws(MOST) - 0.5) * 0.8
    mirrored = torch.where(draws(MOST) < 0.5, -1.0, 1.0)
    # Up to a fifth of a garment's side lies beyond the border.
    centre = (draws(MOST, 2) * 2 - 1) * (1 - 0.6 * side).unsqueeze(-1)
    cos, sin = torch.cos(angle) / side, torch.sin(angle) / side
    # Affine maps from the scene to the garment, both over [-1, 1]: [B, M, 4] -> [B * M, 2, 2]
    rows = torch.stack([mirrored * cos * stretch, mirrored * sin * stretch, -sin / stretch, cos / stretch], -1)
    rows = rows.view(-1, 2, 2)
    maps = torch.cat([rows, -rows @ centre.view(-1, 2, 1)], -1)
    grid = F.affine_grid(maps, [len(maps), 1, size, size], align_corners=False)
    placed = F.grid_sample(garments.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    return placed.view(*garments.shape[:2], size, size)


def _stack(solid: Tensor) -> Tensor:
    """Number of the topmost garment, from 1, of each pixel, 0 for none: `[B, M, S, S]` bool to `[B, S, S]` int64."""
    number = torch.arange(1, solid.shape[1] + 1, device=solid.device).view(1, -1, 1, 1)
    return (solid * number).amax(1)


def _areas(instance: Tensor) -> Tensor:
    """Pixels of each garment: `[B, S, S]` to `[B, M]`."""
    number = torch.arange(1, MOST + 1, device=instance.device).view(1, -1, 1, 1)
    return (instance[:, None] == number).sum((2, 3))


def _boxes(instance: Tensor) -> Tensor:
    """Boxes `[B, M, 4]` around the pixels of each garment."""
    size = instance.shape[-1]
    number = torch.arange(1, MOST + 1, device=instance.device).view(1, -1, 1, 1)
    masks = instance[:, None] == number
    sides = []
    for rows in (masks.any(2), masks.any(3)):
        # The first greatest value of a row is its first true one.
        rows = rows.int()
        sides.append((rows.argmax(-1), size - rows.flip(-1).argmax(-1)))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], -1).float()


def _background(photos: Tensor, draws: Draws, size: int) -> Tensor:
    """Crops of photographs, half of them mirrored, in other light: `[B, 3, S, S]`."""
    photo = photos[(draws(1)[:, 0] * len(photos)).long()].float() / 255
    share = 0.3 + 0.7 * draws(1, 2)
    shift = (draws(1, 2) * 2 - 1) * (1 - share)
    mirrored = torch.where(draws(1, 1) < 0.5, -1.0, 1.0)
    # [B, 2, 3]
    scale = torch.diag_embed(torch.cat([share[..., :1] * mirrored, share[..., 1:]], -1)[:, 0])
    grid = F.affine_grid(torch.cat([scale, shift.view(-1, 2, 1)], -1), [len(photo), 3, size, size], align_corners=False)
    crop = F.grid_sample(photo, grid, padding_mode="border", align_corners=False)
    light = 0.5 + 0.6 * draws(1, 1, 1)
    colour = 0.8 + 0.4 * draws(3, 1, 1)
    return (crop * light * colour).clamp(0, 1)


def _paint(background: Tensor, shapes: Tensor, alpha: Tensor, tint: Tensor) -> Tensor:
    """Lay tinted garments over a background, the last one on top: `[B, 3, S, S]`."""
    pixels = background
    for m in range(shapes.shape[1]):
        # Shades of grey become shades of the tint.
        shade = 0.2 + 0.8 * shapes[:, m : m + 1]
        pixels = torch.lerp(pixels, shade * tint[:, m, :, None, None], alpha[:, m : m + 1])
    return (pixels.clamp(0, 1) * 255).round() / 255
