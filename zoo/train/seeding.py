"""Randomness as a function of (seed, epoch, position), so that an interrupted run continues as if it had not stopped.

Nothing here depends on the state of a global generator: the order of an epoch, the augmentation of each image and the
draws inside a training step follow from the run's seed and from the trainer's own counters, which a checkpoint
restores. The number of workers does not matter either; the number of devices and the batch size do.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def run_seed() -> int:
    """Seed that ``seed_everything`` was called with, 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mix_seed(*parts: int) -> int:
    """Hash integers into one 63-bit seed; unlike a sum, (1, 2) and (2, 1) do not collide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_global(seed: int) -> None:
    """Seed the generators that timm's transforms, Mixup and stochastic layers draw from, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seed the CPU generators within the context and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Only the CPU generator: workers must not touch CUDA, and a training step in the same process keeps its own state.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededSampler(DistributedSampler):
    """Shuffled training order that yields ``(index, seed of this draw)``.

    A ``DistributedSampler``, so that Lightning does not replace it.

    Args:
        dataset: Dataset with a length.
        seed: Seed of the run.
        repeats: Draws of each image in a global batch (repeated augmentation); 1 is plain shuffling.
        num_replicas: Processes that share the epoch.
        rank: Index of this process.
    """

    def __init__(self, dataset: Dataset, seed: int, repeats: int = 1, num_replicas: int = 1, rank: int = 0):
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed % 2**32)
        self.skip = 0
        self.repeater = None
        if repeats > 1:
            self.repeater = RepeatAugSampler(dataset, num_replicas=num_replicas, rank=rank, num_repeats=repeats)

    def __len__(self) -> int:
        return len(self.repeater) if self.repeater else super().__len__()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.repeater:
            self.repeater.set_epoch(mix_seed(self.seed, self.epoch))
            order = list(self.repeater)
        else:
            order = list(super().__iter__())
        skip, self.skip = self.skip, 0
        for position in range(skip, len(order)):
            yield order[position], mix_seed(self.seed, self.epoch, position, self.rank)


class ResumableLoader(DataLoader):
    """DataLoader that asks for its position (epoch, batches already seen) at the moment when iteration starts.

    Lightning creates the iterator before it restores the counters of a checkpoint, and workers prefetch at once.
    Therefore the real iterator is created by the first ``next``.

    Args:
        position: Returns (epoch, batches to skip).
        num_batches: Length to report, for an iterable dataset.
        **kwargs: Arguments of ``DataLoader``.
    """

    def __init__(self, *args, position: Callable[[], tuple[int, int]], num_batches: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.position = position
        self.num_batches = num_batches

    def __len__(self) -> int:
        return super().__len__() if self.num_batches is None else self.num_batches

    def __iter__(self) -> Iterator:
        epoch, batches = self.position()
        if isinstance(self.sampler, SeededSampler):
            self.sampler.set_epoch(epoch)
            self.sampler.skip = batches * self.batch_size
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        yield from super().__iter__()

    def state_dict(self) -> dict:
        """Empty: the trainer's counters say it all. The method tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Accept the empty state."""
