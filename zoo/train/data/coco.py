"""Images with boxes and masks of their objects: COCO's layout, Pascal VOC, and scenes of clothes.

For point clouds see `zoo.train.lidar`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2

from zoo.train.data.base import ImageDataModule
from zoo.train.data.composites import CLASSES, Composites, composite_splits
from zoo.train.data.segmentation import open_voc, photometric_distortion
from zoo.train.seeding import ResumableLoader, SeededSampler, local_seed, run_seed

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

Target = dict[str, Tensor]


class LabelledObjects(Dataset):
    """Pairs of an image and its objects through a joint transform; a key ``(index, seed)`` seeds its randomness.

    Items are a float32 image `[3, H, W]` in [0, 1] and a dict of `boxes` `[N, 4]`, `labels` `[N]`, `iscrowd` `[N]` and,
    where the source has them, `masks` `[N, H, W]` uint8.

    Args:
        source: Sequence of (PIL image, such a dict).
        transform: Joint transform of images, boxes and masks.
        crowds: Whether regions of many objects are kept, which count in evaluation only.
    """

    def __init__(self, source: Sequence, transform: v2.Transform, crowds: bool) -> None:
        self.source, self.transform, self.crowds = source, transform, crowds

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image, target = self.source[index]
        image = v2.functional.to_image(image.convert("RGB"))
        sides = tuple(image.shape[-2:])
        objects = dict(target, boxes=tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=sides))
        if "masks" in objects:
            objects["masks"] = tv_tensors.Mask(objects["masks"])
        with local_seed(seed):
            image, objects = self.transform(image, objects)
        boxes = objects["boxes"]
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if not self.crowds:
            kept &= objects["iscrowd"] == 0
        return image.as_subclass(Tensor), {key: x.as_subclass(Tensor)[kept] for key, x in objects.items()}


def _collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in items], [target for _, target in items]


class DetectionDataModule(ImageDataModule):
    """Images with boxes of their objects. Subclasses implement ``load_splits``, see ``LabelledObjects``.

    Images keep their size: the detector resizes and normalises them. Training mirrors half of the images and may
    distort their colours.

    Args:
        num_classes: Number of classes; the command line passes it on to the model.
        photometric: Whether training distorts brightness, contrast, saturation and hue.
        batch_size: Images per device in a training step.
        val_batch_size: Images per device in validation and test.
        num_workers: Processes that load images; 0 loads in the main process.
    """

    def __init__(
        self,
        num_classes: int,
        photometric: bool = False,
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int = 4,
    ):
        super().__init__(
            num_classes=num_classes, batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers
        )
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Open the data once and check the number of classes."""
        if not self.splits:
            self.splits = self.load_splits()
            self.check_class_count()

    @property
    def data_config(self) -> dict[str, Any]:
        """What a user of the trained model must know: the names of the classes."""
        return {"label_names": None if self.class_names is None else list(self.class_names)}

    def transform(self, training: bool) -> v2.Compose:
        """Joint transform of an image and its objects."""
        steps: list[v2.Transform] = []
        if training:
            steps.append(v2.RandomHorizontalFlip())
            steps += photometric_distortion() if self.hparams.photometric else []
        return v2.Compose([*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented, reproducible; incomplete batches are dropped."""
        world, rank = self.replicas
        dataset = LabelledObjects(self.splits["train"], self.transform(training=True), crowds=False)
        size = self.hparams.batch_size
        sampler = SeededSampler(dataset, run_seed(), num_replicas=world, rank=rank)
        if len(sampler) < size:
            raise ValueError(f"batch_size is {size}, but a training epoch has {len(sampler)} images per device")
        return ResumableLoader(
            dataset, batch_size=size, sampler=sampler, drop_last=True, position=self.position, collate_fn=_collate,
            **self.loader_args(),
        )  # fmt: skip

    def eval_dataloader(self, split: str) -> DataLoader:
        """Images of a split in their order, without augmentation."""
        dataset = LabelledObjects(self.splits[split], self.transform(training=False), crowds=True)
        return DataLoader(dataset, self.hparams.val_batch_size, collate_fn=_collate, **self.loader_args())


class CocoObjects(Sequence):
    """Images of a folder with the objects of one of COCO's annotation files.

    Args:
        folder: Folder of the images.
        annotations: JSON with `images`, `annotations` and `categories`.
        masks: Decode masks, which needs pycocotools.
        skip_empty: Leave out images without objects, as training does.

    Attributes:
        class_names: Names of the categories, in the order of their numbers.

    Raises:
        FileNotFoundError: No such folder or file.
        ValueError: The file is none of this kind.
        ImportError: There is no pycocotools.
    """

    def __init__(self, folder: Path, annotations: Path, masks: bool, skip_empty: bool) -> None:
        for path in (folder, annotations):
            if not path.exists():
                raise FileNotFoundError(f"no {path}: expected {folder}/NAME.jpg and {annotations}")
        content = json.loads(annotations.read_text(encoding="utf-8"))
        missing = {"images", "annotations", "categories"} - set(content)
        if missing:
            raise ValueError(f"{annotations} has no {', '.join(sorted(missing))}: not COCO's format")
        self.folder, self.masks = folder, _mask_tools() if masks else None
        categories = sorted(content["categories"], key=lambda row: row["id"])
        self.class_names = [row["name"] for row in categories]
        # Numbers of categories have gaps.
        self.labels = {row["id"]: label for label, row in enumerate(categories)}
        self.objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in content["annotations"]:
            if row["bbox"][2] > 0 and row["bbox"][3] > 0:
                self.objects[row["image_id"]].append(row)
        self.images = [row for row in content["images"] if not skip_empty or self._has_object(row["id"])]

    def _has_object(self, image: int) -> bool:
        return any(not row.get("iscrowd", 0) for row in self.objects.get(image, ()))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        row = self.images[index]
        image = Image.open(self.folder / row["file_name"])
        objects = self.objects.get(row["id"], [])
        # [N, 4] of (x, y, width, height)
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
        target = {
            "boxes": torch.minimum(boxes.clamp(min=0), limit),
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([o.get("iscrowd", 0) for o in objects], dtype=torch.int64),
        }
        if self.masks is not None:
            masks = [self._mask(o["segmentation"], image.height, image.width) for o in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, image.height, image.width).byte()
        return image, target

    def _mask(self, shape: Any, height: int, width: int) -> Tensor:
        """Mask `[H, W]` uint8 of polygons, or of run lengths as lists or compressed."""
        tools = self.masks
        if isinstance(shape, list):
            shape = tools.merge(tools.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = tools.frPyObjects(shape, height, width)
        return torch.from_numpy(tools.decode(shape))


def _mask_tools():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "masks of COCO need pycocotools: pip install 'attention-zoo[detection]', or set masks to false"
        ) from error
    return mask


class CocoDetectionData(DetectionDataModule):
    """COCO's layout: ``root/train2017/*.jpg``, ``root/annotations/instances_train2017.json``; the same for validation.

    Validation images are the test images. Training leaves out images without objects.

    Args:
        root: Folder of the images' folders and of ``annotations``.
        num_classes: Number of categories.
        masks: Whether to load masks, as Mask R-CNN needs them.
        train_split: Folder of the training images.
        val_split: Folder of the validation images.
        annotations: File of a split's annotations below the root.
        **kwargs: Arguments of ``DetectionDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 80,
        masks: bool = False,
        train_split: str = "train2017",
        val_split: str = "val2017",
        annotations: str = "annotations/instances_{split}.json",
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Read the annotations; both splits must have the same categories."""
        train, val = self._read(self.hparams.train_split, True), self._read(self.hparams.val_split, False)
        if train.class_names != val.class_names:
            different = sorted(set(train.class_names) ^ set(val.class_names))
            raise ValueError(f"training and validation have different categories: {', '.join(different[:10])}")
        self.class_names = train.class_names
        return {"train": train, "val": val, "test": val}

    def _read(self, split: str, skip_empty: bool) -> CocoObjects:
        root = Path(self.hparams.root)
        path = root / self.hparams.annotations.format(split=split)
        return CocoObjects(root / split, path, self.hparams.masks, skip_empty)


class VocObjects(Sequence):
    """Pascal VOC's images and boxes; objects that it calls difficult are left out."""

    def __init__(self, source: VOCDetection) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        image, tree = self.source[index]
        objects = [o for o in tree["annotation"].get("object", []) if o.get("difficult", "0") != "1"]
        corners = [[float(o["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
        # Corners are pixels counted from 1, the last one included.
        boxes[:, :2] -= 1
        labels = torch.tensor([VOC_CLASSES.index(o["name"]) for o in objects], dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "iscrowd": torch.zeros_like(labels)}


class VocDetectionData(DetectionDataModule):
    """Pascal VOC in torchvision's layout (``root/VOCdevkit/VOC2012``): boxes of 20 classes.

    Args:
        root: Folder of ``VOCdevkit``.
        num_classes: Number of classes, 20.
        year: Year of the challenge, 2007 to 2012.
        train_set: Image set to train on: train or trainval.
        val_set: Image set of validation and test.
        **kwargs: Arguments of ``DetectionDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 20,
        year: str = "2012",
        train_set: str = "train",
        val_set: str = "val",
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Open the image sets."""
        self.class_names = list(VOC_CLASSES)
        train, val = (self._read(name) for name in (self.hparams.train_set, self.hparams.val_set))
        return {"train": train, "val": val, "test": val}

    def _read(self, image_set: str) -> VocObjects:
        hparams = self.hparams
        return VocObjects(open_voc(VOCDetection, hparams.root, hparams.year, image_set, ("Annotations", "Main")))


def objects_of(scenes: Composites) -> Target:
    """The objects of a scene."""
    (target,) = scenes.targets()
    return dict(target, masks=target["masks"].byte(), iscrowd=torch.zeros_like(target["labels"]))


class CompositeDetectionData(DetectionDataModule):
    """Scenes of clothes over photographs, see `zoo.train.data.composites`, with boxes and masks.

    Args:
        root: Folder of Fashion-MNIST's IDX files.
        num_classes: Number of classes, 10.
        image_size: Height and width of a scene in pixels.
        scenes: Scenes of an epoch.
        val_scenes: Scenes of validation, and of test.
        backgrounds: Folder of photographs; null for those of this package.
        seed: Of the scenes.
        **kwargs: Arguments of ``DetectionDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 10,
        image_size: int = 160,
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
        self.class_names = list(CLASSES)
        return composite_splits(self.hparams, self.hparams.image_size, objects_of)
