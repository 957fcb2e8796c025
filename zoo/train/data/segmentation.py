"""Images with a label for each pixel: ADE20K's folders, Pascal VOC and scenes of clothes, transformed together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation
from torchvision.transforms import v2

from zoo.train.data.base import ImageDataModule
from zoo.train.data.composites import CLASSES, Composites, composite_splits
from zoo.train.seeding import ResumableLoader, SeededSampler, local_seed, run_seed

# Label of pixels without a class.
IGNORE = 255
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_CROP_TRIES = 10


def _mask_of(flat_inputs: Sequence[Any]) -> tv_tensors.Mask:
    return next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask))


class BalancedCrop(v2.Transform):
    """Random crop, drawn anew up to ten times while one class covers too much of the labelled pixels.

    Args:
        size: Side of the crop in pixels; an image that is smaller stays as it is on that side.
        max_share: Largest share of one class, 1 to take the first crop.
    """

    def __init__(self, size: int, max_share: float = 0.75) -> None:
        super().__init__()
        self.size, self.max_share = size, max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = _mask_of(flat_inputs)
        sides = [min(side, self.size) for side in mask.shape[-2:]]
        for _ in range(_CROP_TRIES):
            top, left = (
                int(torch.randint(full - side + 1, ())) for full, side in zip(mask.shape[-2:], sides, strict=True)
            )
            labels = mask[..., top : top + sides[0], left : left + sides[1]]
            counts = labels[labels != IGNORE].unique(return_counts=True)[1]
            if self.max_share >= 1 or (len(counts) > 1 and counts.max() < self.max_share * counts.sum()):
                break
        return dict(top=top, left=left, height=sides[0], width=sides[1])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(inpt, **params)


class PadTo(v2.Transform):
    """Pad at the bottom and right: images with 0, which is the mean after normalisation, labels with 255.

    Args:
        size: Least side in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        padding = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        return v2.functional.pad(inpt, padding, fill=IGNORE if isinstance(inpt, tv_tensors.Mask) else 0)


class EvalResize(v2.Transform):
    """Resize images by their shorter side and leave the labels at their own size.

    Args:
        size: Shorter side in pixels.
        max_size: Limit of the longer side, which wins.
        multiple: Both sides are rounded up to a multiple of this.
    """

    def __init__(self, size: int, max_size: int, multiple: int = 1) -> None:
        super().__init__()
        self.size, self.max_size, self.multiple = size, max_size, multiple

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        sides = inpt.shape[-2:]
        scale = min(self.size / min(sides), self.max_size / max(sides))
        sides = [-(-max(1, round(side * scale)) // self.multiple) * self.multiple for side in sides]
        return v2.functional.resize(inpt, sides, antialias=True)


def photometric_distortion() -> list[v2.Transform]:
    """Brightness, contrast, saturation and hue, each with probability 1/2; torchvision's permutes channels too."""
    ranges = dict(brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.1, 0.1))
    return [v2.RandomApply([v2.ColorJitter(**{name: values})], p=0.5) for name, values in ranges.items()]


class LabelledPixels(Dataset):
    """Pairs of an image and its labels through a joint transform; a key ``(index, seed)`` seeds its randomness.

    Items are a float32 image `[3, H, W]` and int64 labels `[H, W]`.

    Args:
        source: Sequence of (image, label map) as PIL images.
        transform: Joint transform of a ``tv_tensors.Image`` and a ``tv_tensors.Mask``.
        num_classes: Number of classes.
        reduce_zero_label: Whether label 0 means no class and label k class k - 1.

    Raises:
        ValueError: From an item, if labels are no map of one number a pixel, have another size than the image, or name
            a class that is not below `num_classes`.
    """

    def __init__(self, source: Sequence, transform: v2.Transform, num_classes: int, reduce_zero_label: bool = False):
        self.source, self.transform = source, transform
        self.num_classes, self.reduce_zero_label = num_classes, reduce_zero_label

    def __len__(self) -> int:
        return len(self.source)

    def _labels(self, name: str, annotation: Image.Image) -> np.ndarray:
        labels = np.asarray(annotation).astype(np.int64)
        if labels.ndim != 2:
            raise ValueError(f"{name} must have one number a pixel (PNG of mode L or P), got mode {annotation.mode}")
        if self.reduce_zero_label:
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        wrong = labels[(labels != IGNORE) & (labels >= self.num_classes)]
        if wrong.size:
            raise ValueError(
                f"{name} has class {wrong.max()}, but num_classes is {self.num_classes} (classes count from 0, "
                f"{IGNORE} is ignored)"
            )
        return labels.astype(np.uint8)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image, annotation = self.source[index]
        name = getattr(annotation, "filename", "") or f"label map {index}"
        labels = self._labels(name, annotation)
        if labels.shape != (image.height, image.width):
            raise ValueError(
                f"{name} has {labels.shape[0]} x {labels.shape[1]} labels, its image {image.height} x {image.width} "
                "pixels"
            )
        pair = v2.functional.to_image(image.convert("RGB")), tv_tensors.Mask(torch.from_numpy(labels))
        with local_seed(seed):
            image, mask = self.transform(*pair)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def _collate(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    if len({(image.shape, labels.shape) for image, labels in items}) > 1:
        raise ValueError("the images of an evaluation batch have different sizes: set val_batch_size to 1")
    return default_collate(items)


class SegmentationDataModule(ImageDataModule):
    """Images with a label for each pixel. Subclasses implement ``load_splits`` with pairs of PIL images.

    Training: random resizing, random crop, flip, photometric distortion, normalisation, padding to the crop.
    Validation: the whole image, resized; labels keep their size, to which predictions are resized.

    Args:
        num_classes: Number of classes; the command line passes it on to the model.
        crop_size: Side of the square training input in pixels.
        short_side: Shorter side of the resized image in pixels, before the random factor in training.
        max_side: Limit of the longer side in validation.
        scale: Least and greatest random factor of the shorter side in training.
        max_share: Largest share of one class in a training crop.
        photometric: Whether training distorts brightness, contrast, saturation and hue.
        size_multiple: Sides of validation images are rounded up to a multiple of this.
        reduce_zero_label: Whether label 0 means no class and label k class k - 1.
        batch_size: Images per device in a training step.
        val_batch_size: Images per device in validation and test; above 1 all must have one size.
        num_workers: Processes that load images; 0 loads in the main process.
        mean: Mean of each channel that is subtracted, for pixels in [0, 1].
        std: Standard deviation of each channel that is divided by.

    Raises:
        ValueError: `num_classes` above 255, which is the label of pixels without a class, or below 2; wrong `scale`.
    """

    def __init__(
        self,
        num_classes: int,
        crop_size: int = 512,
        short_side: int = 512,
        max_side: int = 2048,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        photometric: bool = True,
        size_multiple: int = 1,
        reduce_zero_label: bool = False,
        batch_size: int = 4,
        val_batch_size: int = 1,
        num_workers: int = 4,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__(
            num_classes=num_classes, image_size=crop_size, batch_size=batch_size, val_batch_size=val_batch_size,
            num_workers=num_workers, mean=mean, std=std,
        )  # fmt: skip
        if not 1 < num_classes <= IGNORE:
            raise ValueError(f"num_classes must lie between 2 and {IGNORE}, got {num_classes}")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be the least and the greatest factor, got {tuple(scale)}")
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Open the data once."""
        self.splits = self.splits or self.load_splits()

    @property
    def data_config(self) -> dict[str, Any]:
        """What a user of the trained model must know about its input."""
        size, hparams = self.hparams.crop_size, self.hparams
        return {
            "input_size": [3, size, size],
            "mean": [float(m) for m in hparams.mean],
            "std": [float(s) for s in hparams.std],
            "interpolation": "bilinear",
        }

    def transform(self, training: bool) -> v2.Compose:
        """Joint transform of an image and its labels."""
        hparams = self.hparams
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(hparams.mean), list(hparams.std))]
        if not training:
            return v2.Compose([EvalResize(hparams.short_side, hparams.max_side, hparams.size_multiple), *finish])
        least, greatest = (round(factor * hparams.short_side) for factor in hparams.scale)
        steps = [
            # The upper end is exclusive.
            v2.RandomResize(least, greatest + 1, antialias=True),
            BalancedCrop(hparams.crop_size, hparams.max_share),
            v2.RandomHorizontalFlip(),
        ]
        if hparams.photometric:
            steps += photometric_distortion()
        return v2.Compose([*steps, *finish, PadTo(hparams.crop_size)])

    def _dataset(self, split: str, training: bool) -> LabelledPixels:
        hparams = self.hparams
        transform = self.transform(training)
        return LabelledPixels(self.splits[split], transform, hparams.num_classes, hparams.reduce_zero_label)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented, reproducible; incomplete batches are dropped."""
        world, rank = self.replicas
        dataset, size = self._dataset("train", training=True), self.hparams.batch_size
        sampler = SeededSampler(dataset, run_seed(), num_replicas=world, rank=rank)
        if len(sampler) < size:
            raise ValueError(f"batch_size is {size}, but a training epoch has {len(sampler)} images per device")
        return ResumableLoader(
            dataset, batch_size=size, sampler=sampler, drop_last=True, position=self.position, **self.loader_args()
        )

    def eval_dataloader(self, split: str) -> DataLoader:
        """Whole images of a split in their order, without augmentation."""
        dataset = self._dataset(split, training=False)
        return DataLoader(dataset, self.hparams.val_batch_size, collate_fn=_collate, **self.loader_args())


class ImagePairs(Sequence):
    """Pairs of an image and a label map from two lists of files."""

    def __init__(self, images: Sequence[Path], annotations: Sequence[Path]) -> None:
        self.images, self.annotations = list(images), list(annotations)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        return Image.open(self.images[index]), Image.open(self.annotations[index])


class SegmentationFolderData(SegmentationDataModule):
    """ADE20K's layout: ``root/images/{training,validation}/*.jpg``, ``root/annotations/{training,validation}/*.png``.

    An annotation has the name of its image and the label of each pixel in one channel. Validation images are the test
    images.

    Args:
        root: Folder of ``images`` and ``annotations``.
        num_classes: Number of classes.
        reduce_zero_label: Whether label 0 means no class and label k class k - 1, as in ADE20K.
        train_split: Name of the training folders.
        val_split: Name of the validation folders.
        **kwargs: Arguments of ``SegmentationDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 150,
        reduce_zero_label: bool = True,
        train_split: str = "training",
        val_split: str = "validation",
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, reduce_zero_label=reduce_zero_label, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """List the files; every image must have an annotation."""
        train, val = self._read(self.hparams.train_split), self._read(self.hparams.val_split)
        return {"train": train, "val": val, "test": val}

    def _read(self, split: str) -> ImagePairs:
        root = Path(self.hparams.root)
        folders = root / "images" / split, root / "annotations" / split
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}: expected {root}/images/{split}/NAME.jpg and "
                    f"{root}/annotations/{split}/NAME.png"
                )
        images = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
        if not images:
            raise FileNotFoundError(f"no images ({', '.join(_IMAGE_SUFFIXES)}) in {folders[0]}")
        annotations = [folders[1] / f"{path.stem}.png" for path in images]
        missing = [path.name for path in annotations if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(images)} images have no annotation in {folders[1]}: {', '.join(missing[:5])}"
            )
        return ImagePairs(images, annotations)


class VOCSegmentationData(SegmentationDataModule):
    """Pascal VOC in torchvision's layout (``root/VOCdevkit/VOC2012``): 20 classes and the background.

    Args:
        root: Folder of ``VOCdevkit``.
        num_classes: Number of classes, 21.
        year: Year of the challenge, 2007 to 2012.
        train_set: Image set to train on: train or trainval.
        val_set: Image set of validation and test.
        **kwargs: Arguments of ``SegmentationDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 21,
        year: str = "2012",
        train_set: str = "train",
        val_set: str = "val",
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Open the image sets."""
        hparams = self.hparams
        train, val = (self._read(name) for name in (hparams.train_set, hparams.val_set))
        return {"train": train, "val": val, "test": val}

    def _read(self, image_set: str) -> VOCSegmentation:
        hparams = self.hparams
        return open_voc(VOCSegmentation, hparams.root, hparams.year, image_set, ("SegmentationClass", "Segmentation"))


def open_voc(dataset: type, root: str, year: str, image_set: str, folders: tuple[str, str]) -> Dataset:
    """An image set of Pascal VOC by one of torchvision's classes; folders of annotations and of lists for the error.

    Raises:
        FileNotFoundError: It is not there; the message says which files are expected.
    """
    try:
        return dataset(root, year=year, image_set=image_set)
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"no Pascal VOC {year} '{image_set}' in {root}: expected {root}/VOCdevkit/VOC{year} with JPEGImages, "
            f"{folders[0]} and ImageSets/{folders[1]}/{image_set}.txt"
        ) from error


def label_map(scenes: Composites) -> Image.Image:
    """The label map of a scene."""
    return Image.fromarray(scenes.semantic[0].byte().numpy())


class CompositeSegmentationData(SegmentationDataModule):
    """Scenes of clothes over photographs, see `zoo.train.data.composites`: the background and ten classes.

    Args:
        root: Folder of Fashion-MNIST's IDX files.
        num_classes: Number of classes, 11.
        scene_size: Height and width of a scene in pixels.
        scenes: Scenes of an epoch.
        val_scenes: Scenes of validation, and of test.
        backgrounds: Folder of photographs; null for those of this package.
        seed: Of the scenes.
        **kwargs: Arguments of ``SegmentationDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 11,
        scene_size: int = 160,
        scenes: int = 4096,
        val_scenes: int = 256,
        backgrounds: str | None = None,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Read the garments and the photographs."""
        hparams = self.hparams
        self.class_names = ["background", *CLASSES]
        self.check_class_count()
        return composite_splits(hparams, hparams.scene_size, label_map)
