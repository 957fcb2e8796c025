"""Data modules by source."""

from zoo.train.data.base import ImageDataModule, batch_size
from zoo.train.data.folders import ImageFolderData, TarFolderData, TorchvisionData
from zoo.train.data.shards import WebDatasetData
from zoo.train.data.small import DigitsData, FashionMnistData

__all__ = [
    "DigitsData",
    "FashionMnistData",
    "ImageDataModule",
    "ImageFolderData",
    "TarFolderData",
    "TorchvisionData",
    "WebDatasetData",
    "batch_size",
]
