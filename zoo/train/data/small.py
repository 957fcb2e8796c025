"""Small data sets that come with packages: scikit-learn's digits and Fashion-MNIST."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.train.data.base import ImageDataModule


class ArrayImages(Sequence):
    """Grey or RGB images in one uint8 array, with labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.images[index], int(self.labels[index])


class DigitsData(ImageDataModule):
    """The 1,797 handwritten digits (8x8 pixels) of scikit-learn; nothing is downloaded.

    A stratified third is held out and serves as both validation and test split.

    Args:
        num_classes: Number of classes, 10.
        image_size: Side in pixels that the digits are enlarged to.
        crop_pct: Share of the shorter side that the centre crop of validation keeps.
        **kwargs: Arguments of ``ImageDataModule``.
    """

    def __init__(self, num_classes: int = 10, image_size: int = 32, crop_pct: float = 1.0, **kwargs):
        super().__init__(num_classes=num_classes, image_size=image_size, crop_pct=crop_pct, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Split the digits the same way whatever the seed, so that results compare."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        # Pixels are 0..16.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        train, held_out = train_test_split(
            np.arange(len(images)), test_size=1 / 3, random_state=0, stratify=digits.target
        )
        self.class_names = [str(digit) for digit in range(10)]
        val = ArrayImages(images[held_out], digits.target[held_out])
        return {"train": ArrayImages(images[train], digits.target[train]), "val": val, "test": val}


class FashionMnistData(ImageDataModule):
    """Fashion-MNIST (70,000 grey images of 28x28 pixels) from its four idx files.

    Debian's package ``dataset-fashion-mnist`` installs them into the default folder.

    Args:
        root: Folder of the files.
        num_classes: Number of classes, 10.
        image_size: Side in pixels that the images are enlarged to.
        crop_pct: Share of the shorter side that the centre crop of validation keeps.
        val_size: Training images held out for validation; with 0 the 10,000 test images validate.
        **kwargs: Arguments of ``ImageDataModule``.
    """

    FILES = {
        "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    }
    CLASSES = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )

    def __init__(
        self,
        root: str = "/usr/share/datasets/fashion-mnist",
        num_classes: int = 10,
        image_size: int = 64,
        crop_pct: float = 1.0,
        val_size: int = 5000,
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, image_size=image_size, crop_pct=crop_pct, **kwargs)
        self.save_hyperparameters()

    def load_splits(self) -> dict[str, Sequence]:
        """Read the files; the held-out images are the same whatever the seed."""
        self._check_files()
        images, labels = (self._read(name) for name in self.FILES["train"])
        test = ArrayImages(*(self._read(name) for name in self.FILES["test"]))
        self.class_names = list(self.CLASSES)
        val_size = self.hparams.val_size
        if not val_size:
            return {"train": ArrayImages(images, labels), "val": test, "test": test}
        if not 0 < val_size < len(labels):
            raise ValueError(f"val_size must lie between 0 and {len(labels)} training images, got {val_size}")
        order = np.random.default_rng(0).permutation(len(labels))
        splits = {"train": order[val_size:], "val": order[:val_size]}
        return {name: ArrayImages(images[part], labels[part]) for name, part in splits.items()} | {"test": test}

    def _check_files(self) -> None:
        root = Path(self.hparams.root)
        missing = [name for names in self.FILES.values() for name in names if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"Fashion-MNIST: {', '.join(missing)} not found in {root}. Install Debian's package "
                "dataset-fashion-mnist (apt-get install dataset-fashion-mnist) or set root to their folder."
            )

    def _read(self, name: str) -> np.ndarray:
        path = Path(self.hparams.root) / name
        data = gzip.decompress(path.read_bytes())
        # idx: two zero bytes, 8 = unsigned byte, number of dimensions, then each size as big-endian int32.
        if len(data) < 4 or data[:3] != b"\0\0\x08":
            raise ValueError(f"{path} is not an idx file of unsigned bytes")
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
        if values.size != np.prod(shape):
            raise ValueError(f"{path} is truncated: {values.size} values for shape {tuple(shape)}")
        return values.reshape(shape)
