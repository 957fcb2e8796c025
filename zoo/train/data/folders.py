"""Images in class folders, in tars of class folders, and torchvision's data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision
from timm.data import create_dataset

from zoo.train.data.base import ImageDataModule


class ImageFolderData(ImageDataModule):
    """ImageNet's layout: ``root/train/CLASS/*.jpg``, ``root/val/CLASS/*.jpg`` and, where present, ``root/test``.

    Args:
        root: Folder of the splits.
        num_classes: Number of class folders.
        train_split: Name of the training folder.
        val_split: Name of the validation folder.
        test_split: Name of the test folder; validation images are the test images where it does not exist.
        **kwargs: Arguments of ``ImageDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 1000,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Read the folders; every split must have the classes of the training split."""
        hparams = self.hparams
        train, val = (self._read(hparams.train_split), self._read(hparams.val_split))
        has_test = (Path(hparams.root) / hparams.test_split).is_dir()
        splits = {"train": train, "val": val, "test": self._read(hparams.test_split) if has_test else val}
        for name, split in splits.items():
            if split.classes != train.classes:
                missing = sorted(set(split.classes) ^ set(train.classes))
                raise ValueError(f"{name} and train have different class folders: {', '.join(missing[:10])}")
        self.class_names = train.classes
        return splits

    def _read(self, split: str) -> torchvision.datasets.ImageFolder:
        folder = Path(self.hparams.root) / split
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: expected {self.hparams.root}/{split}/CLASS/IMAGE")
        return torchvision.datasets.ImageFolder(str(folder))


class TarFolderData(ImageDataModule):
    """One tar a split, class folders inside: ``root/train.tar``, ``root/validation.tar``, ``root/test.tar``.

    Args:
        root: Folder of the tars.
        num_classes: Number of class folders.
        train_split: Name of the training tar without its ending.
        val_split: Name of the validation tar.
        test_split: Name of the test tar; the validation tar is used where it does not exist.
        **kwargs: Arguments of ``ImageDataModule``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Open the tars; labels of every split follow the classes of the training tar."""
        hparams = self.hparams
        train = self._open(hparams.train_split)
        classes = train.reader.class_name_to_idx
        self.class_names = sorted(classes, key=classes.get)
        val = self._open(hparams.val_split, classes)
        has_test = (Path(hparams.root) / f"{hparams.test_split}.tar").is_file()
        return {"train": train, "val": val, "test": self._open(hparams.test_split, classes) if has_test else val}

    def _open(self, split: str, class_map: dict[str, int] | None = None):
        path = Path(self.hparams.root) / f"{split}.tar"
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: {type(self).__name__} expects one tar of class folders a split")
        return create_dataset("", root=str(path), split=split, class_map=class_map)


class TorchvisionData(ImageDataModule):
    """A data set of ``torchvision.datasets`` by class name.

    Args:
        dataset: Class name, such as ``CIFAR10`` or ``Flowers102``.
        num_classes: Number of classes.
        root: First argument of the class; None for data sets without one.
        train_kwargs: Arguments that select the training split, such as ``{train: true}`` or ``{split: train}``.
        val_kwargs: Arguments that select the validation split.
        test_kwargs: Arguments that select the test split; validation images are used by default.
        **kwargs: Arguments of ``ImageDataModule``.
    """

    def __init__(
        self,
        dataset: str,
        num_classes: int,
        root: str | None = None,
        train_kwargs: dict[str, Any] | None = None,
        val_kwargs: dict[str, Any] | None = None,
        test_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        if dataset not in torchvision.datasets.__all__:
            raise ValueError(f"torchvision.datasets has no {dataset!r}")
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Build the data set once a split."""
        hparams = self.hparams
        train = self._build(hparams.train_kwargs or {"train": True})
        val = self._build(hparams.val_kwargs or {"train": False})
        test = val if hparams.test_kwargs is None else self._build(hparams.test_kwargs)
        classes = getattr(train, "classes", None)
        self.class_names = list(classes) if classes else None
        return {"train": train, "val": val, "test": test}

    def _build(self, kwargs: dict[str, Any]) -> Sequence:
        root = () if self.hparams.root is None else (self.hparams.root,)
        return getattr(torchvision.datasets, self.hparams.dataset)(*root, **kwargs)
