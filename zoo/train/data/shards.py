"""WebDataset: images and labels in tar shards that are read in sequence."""

import glob
import io
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zoo.train.data.base import ImageDataModule
from zoo.train.seeding import ResumableLoader, local_seed, mix_seed, run_seed

_IMAGE_KEYS = "jpg;jpeg;png;webp"


def _webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("WebDatasetData needs webdataset: pip install 'attention-zoo[data]'") from error
    return webdataset


def expand_shards(pattern: str) -> list[str]:
    """Expand ``{0000..0099}`` braces, or a glob of local files."""
    if any(c in pattern for c in "*?["):
        urls = sorted(glob.glob(pattern))
    else:
        urls = _webdataset().shardlists.expand_urls(pattern)
    if not urls:
        raise FileNotFoundError(f"no shard matches {pattern!r}")
    return urls


class ShardDataset(IterableDataset):
    """Samples of the shards of this process and worker.

    Args:
        urls: All shards.
        transform: Image transform.
        quota: Samples a worker yields in an epoch, repeating its shards as often as needed; None reads them once.
        seed: Seed of order and augmentation.
        buffer: Size of the shuffle buffer, 0 keeps the order.
        replicas: (number of processes, index of this one).
    """

    def __init__(
        self, urls: list[str], transform, quota: int | None, seed: int, buffer: int, replicas: tuple[int, int]
    ):
        self.urls = urls
        self.transform = transform
        self.quota = quota
        self.seed = seed
        self.buffer = buffer
        self.replicas = replicas
        # Shared memory, so that persistent workers see the epoch that the main process sets.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next iteration."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        world, rank = self.replicas
        part = (rank * workers + index, world * workers)
        epoch = int(self.epoch)
        for count, (image, label) in enumerate(islice(self._samples(epoch, *part), self.quota)):
            with local_seed(mix_seed(self.seed, epoch, part[0], count)):
                yield self.transform(image), label

    def _samples(self, epoch: int, part: int, parts: int) -> Iterator[tuple[Image.Image, int]]:
        """Decoded samples of one worker: once, or for ever where a quota ends the epoch."""
        wds = _webdataset()
        urls = list(self.urls)
        if self.quota is not None:
            random.Random(mix_seed(self.seed, epoch)).shuffle(urls)
        mine, passes = urls[part::parts], 0
        while mine and (passes == 0 or self.quota is not None):
            # Shards are already divided among processes and workers.
            data = wds.WebDataset(mine, shardshuffle=False, nodesplitter=None, workersplitter=None)
            if self.buffer:
                data = data.shuffle(self.buffer, rng=random.Random(mix_seed(self.seed, epoch, part, passes)))
            for image, label in data.to_tuple(_IMAGE_KEYS, "cls"):
                yield Image.open(io.BytesIO(image)).convert("RGB"), int(label)
            passes += 1


class WebDatasetData(ImageDataModule):
    """Tar shards with members ``KEY.jpg`` (or jpeg, png, webp) and ``KEY.cls`` (the class index as text).

    A resumed run continues exactly at the start of an epoch; within an epoch it starts the epoch's stream again.

    Args:
        train_shards: Pattern of the training shards, such as ``train-{0000..0099}.tar`` or a glob.
        val_shards: Pattern of the validation shards.
        train_samples: Samples of a training epoch; streams do not know their length.
        num_classes: Number of classes.
        test_shards: Pattern of the test shards; the validation shards are used by default.
        class_names: Names of the classes in the order of their index.
        shuffle_buffer: Samples that each worker holds to shuffle.
        **kwargs: Arguments of ``ImageDataModule``.
    """

    def __init__(
        self,
        train_shards: str,
        val_shards: str,
        train_samples: int,
        num_classes: int = 1000,
        test_shards: str | None = None,
        class_names: list[str] | None = None,
        shuffle_buffer: int = 1000,
        **kwargs,
    ):
        super().__init__(num_classes=num_classes, **kwargs)
        if self.hparams.cache or self.hparams.repeats != 1:
            raise ValueError("WebDatasetData streams its images: cache and repeats are not available")
        self.save_hyperparameters()
        self.class_names = class_names

    def load_splits(self) -> dict[str, list[str]]:
        """List the shards."""
        hparams = self.hparams
        patterns = {"train": hparams.train_shards, "val": hparams.val_shards}
        patterns["test"] = hparams.test_shards or hparams.val_shards
        return {split: expand_shards(pattern) for split, pattern in patterns.items()}

    def shard_loader_args(self, split: str) -> dict[str, Any]:
        """Loader arguments with no more workers than there are shards for each process."""
        world, _ = self.replicas
        shards = len(self.splits[split])
        if split == "train" and shards < world:
            raise ValueError(f"{shards} training shards cannot be divided among {world} processes")
        args = self.loader_args()
        args["num_workers"] = min(args["num_workers"], max(1, shards // world))
        return args

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented stream of ``train_samples`` images."""
        args, size = self.shard_loader_args("train"), self.hparams.batch_size
        workers = max(1, args["num_workers"])
        batches = self.hparams.train_samples // (size * workers * self.replicas[0])
        if batches == 0:
            raise ValueError(
                f"train_samples is {self.hparams.train_samples}: less than one batch of {size} for each of "
                f"{self.replicas[0]} x {workers} workers"
            )
        dataset = ShardDataset(
            self.splits["train"],
            self.transform(training=True),
            quota=batches * size,
            seed=run_seed(),
            buffer=self.hparams.shuffle_buffer,
            replicas=self.replicas,
        )
        return ResumableLoader(dataset, batch_size=size, num_batches=batches * workers, position=self.position, **args)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Every sample of a split once."""
        size = self.hparams.val_batch_size or self.hparams.batch_size
        dataset = ShardDataset(
            self.splits[split], self.transform(training=False), None, run_seed(), buffer=0, replicas=self.replicas
        )
        return DataLoader(dataset, batch_size=size, **self.shard_loader_args(split))
