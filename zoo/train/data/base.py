"""Base of the image data modules: timm transforms, seeded order, loaders."""

import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torch.utils.data import DataLoader, Dataset

from zoo.train.checks import check_ranges
from zoo.train.seeding import ResumableLoader, SeededSampler, local_seed, mix_seed, run_seed

# Set by the arguments of the data module itself.
_OWN_TRANSFORM_ARGS = {"input_size", "is_training", "interpolation", "mean", "std", "crop_pct", "crop_mode"}


def check_keys(given: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise a ValueError that names the first unknown key and those that look like it."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3) or sorted(known)
            raise ValueError(f"unknown key {key!r} in {what}; closest valid keys: {', '.join(close)}")


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits else Image.new(image.mode, image.size)


def _accept_zero_bits(transform):
    """Let timm's strongest posterization, 0 bits, give the black image that it stands for; Pillow 13 refuses it."""
    for step in transform.transforms:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", [])]
        for op in (op for ops in policies for op in ops):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


def batch_size(batch: Any) -> int:
    """Images in a batch, for Lightning's ``ThroughputMonitor(batch_size_fn=...)``."""
    return len(batch[0])


class TransformedDataset(Dataset):
    """Images as RGB through a transform; a key ``(index, seed)`` makes its randomness a function of that seed."""

    def __init__(self, source: Sequence, transform):
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image, label = self.source[index]
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        with local_seed(seed):
            return self.transform(image.convert("RGB")), int(label)


class DecodedImages(Sequence):
    """Decoded images of a dataset held in memory at their stored size (uint8)."""

    def __init__(self, source: Sequence):
        self.items = [(np.asarray(image), label) for image, label in (source[i] for i in range(len(source)))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


RANGES = {
    **dict.fromkeys(("num_classes", "image_size", "batch_size", "val_batch_size", "repeats"), (1, math.inf)),
    "num_workers": (0, math.inf),
    "crop_pct": (0.01, 1),
}


class ImageDataModule(LightningDataModule):
    """Images with one label each. Subclasses implement ``load_splits``.

    Args:
        num_classes: Number of classes; the command line passes it on to the model.
        image_size: Side of the square input in pixels.
        batch_size: Images per device in a training step.
        val_batch_size: Images per device in validation and test, ``batch_size`` by default.
        num_workers: Processes that load images; 0 loads in the main process.
        mean: Mean of each channel that is subtracted, for pixels in [0, 1].
        std: Standard deviation of each channel that is divided by.
        interpolation: Resampling filter: bicubic, bilinear, nearest or random (training only).
        crop_pct: Share of the shorter side that the centre crop of validation keeps.
        augment: Further arguments of ``timm.data.create_transform`` for training, such as ``auto_augment``,
            ``color_jitter``, ``re_prob``, ``scale``, ``ratio``, ``hflip``, ``train_crop_mode`` or ``no_aug``.
        repeats: Draws of each image in a batch (repeated augmentation); 1 switches it off.
        cache: Whether to hold all decoded images in memory (small data sets whose decoding is the bottleneck).
        crop_mode: How validation makes images square: center (crop), squash (ignoring the aspect ratio) or border.

    Raises:
        ValueError: A number is outside of its range, or `augment` has an unknown key.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int = 224,
        batch_size: int = 128,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        augment: dict[str, Any] | None = None,
        repeats: int = 1,
        cache: bool = False,
        crop_mode: str = "center",
    ):
        check_ranges(locals(), RANGES)
        super().__init__()
        self.save_hyperparameters()
        known = set(inspect.signature(create_transform).parameters) - _OWN_TRANSFORM_ARGS
        check_keys(augment or {}, known, "augment (arguments of timm.data.create_transform)")
        self.splits: dict[str, Sequence] = {}
        self.class_names: list[str] | None = None

    def load_splits(self) -> dict[str, Sequence]:
        """Return the splits ``train``, ``val`` and ``test``, each a sequence of (image, label).

        Sets ``self.class_names`` where names are known. Images are PIL images or uint8 arrays.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Open the data once and check it against the arguments."""
        if self.splits:
            return
        splits = self.load_splits()
        self.check_class_count()
        if self.hparams.cache:
            # Splits may be one and the same object (val is test); decode it once.
            decoded = {id(split): DecodedImages(split) for split in splits.values()}
            splits = {name: decoded[id(split)] for name, split in splits.items()}
        self.splits = splits

    def check_class_count(self) -> None:
        """Compare ``num_classes`` with the classes found in the data."""
        if self.class_names is not None and len(self.class_names) != self.hparams.num_classes:
            raise ValueError(
                f"{type(self).__name__}: num_classes is {self.hparams.num_classes}, but the data has "
                f"{len(self.class_names)} classes: {', '.join(self.class_names[:20])}"
            )

    @property
    def data_config(self) -> dict[str, Any]:
        """What a user of the trained model must know about its input, in the words of timm's ``PretrainedCfg``."""
        size, hparams = self.hparams.image_size, self.hparams
        return {
            "input_size": [3, size, size],
            "mean": [float(m) for m in hparams.mean],
            "std": [float(s) for s in hparams.std],
            # "random" is a training augmentation; validation falls back to bilinear.
            "interpolation": self.eval_interpolation,
            "crop_pct": float(hparams.crop_pct),
            "crop_mode": hparams.crop_mode,
            "label_names": None if self.class_names is None else [str(name) for name in self.class_names],
        }

    @property
    def eval_interpolation(self) -> str:
        return "bilinear" if self.hparams.interpolation == "random" else self.hparams.interpolation

    def transform(self, training: bool):
        """Build timm's transform for training or evaluation."""
        hparams = self.hparams
        size = (3, hparams.image_size, hparams.image_size)
        norm = {"mean": tuple(hparams.mean), "std": tuple(hparams.std)}
        if training:
            augment = dict(hparams.augment or {})
            return _accept_zero_bits(
                create_transform(size, is_training=True, interpolation=hparams.interpolation, **norm, **augment)
            )
        crop = {"crop_pct": hparams.crop_pct, "crop_mode": hparams.crop_mode}
        return create_transform(size, interpolation=self.eval_interpolation, **crop, **norm)

    @property
    def replicas(self) -> tuple[int, int]:
        """(number of processes, index of this one)."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def position(self) -> tuple[int, int]:
        """(epoch, batches of it already trained on), from the trainer's counters, which checkpoints restore."""
        if self.trainer is None:
            return 0, 0
        fit_loop = self.trainer.fit_loop
        return fit_loop.epoch_progress.current.processed, fit_loop.epoch_loop.batch_progress.current.ready

    def loader_args(self) -> dict[str, Any]:
        """Arguments shared by all loaders."""
        workers = self.hparams.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # The base seed of workers is drawn from here instead of advancing the global generator.
            "generator": torch.Generator().manual_seed(mix_seed(run_seed())),
        }

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented, reproducible; incomplete batches are dropped."""
        world, rank = self.replicas
        images, size = self.splits["train"], self.hparams.batch_size
        sampler = SeededSampler(images, run_seed(), self.hparams.repeats, num_replicas=world, rank=rank)
        if len(sampler) < size:
            raise ValueError(f"batch_size is {size}, but a training epoch has {len(sampler)} images per device")
        dataset = TransformedDataset(images, self.transform(training=True))
        return ResumableLoader(
            dataset, batch_size=size, sampler=sampler, drop_last=True, position=self.position, **self.loader_args()
        )

    def eval_dataloader(self, split: str) -> DataLoader:
        """Images of a split in their order, without augmentation."""
        size = self.hparams.val_batch_size or self.hparams.batch_size
        dataset = TransformedDataset(self.splits[split], self.transform(training=False))
        return DataLoader(dataset, batch_size=size, **self.loader_args())

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Test images, for ``zoo predict``."""
        return self.eval_dataloader("test")
