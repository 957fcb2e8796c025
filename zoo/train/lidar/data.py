"""Data modules of labelled point clouds: base, simulated scenes, folders of converted frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.heads.detections import Targets
from zoo.heads.point_detectors import merge_sweeps
from zoo.train.lidar.augment import LidarAugmentation, augment
from zoo.train.lidar.database import ObjectDatabase
from zoo.train.lidar.frames import Frame, crop_frame
from zoo.train.lidar.geometry import points_in_boxes
from zoo.train.lidar.scenes import CLASSES
from zoo.train.lidar.simulator import LidarSimulator, SpinningSensor
from zoo.train.seeding import ResumableLoader, SeededSampler, mix_seed, run_seed

# x, y, z minimum, then maximum, metres.
Range = tuple[float, float, float, float, float, float]


class FrameSampler(SeededSampler):
    """Yields (index, seed of this draw, epoch), because workers keep their copy of the data set over epochs."""

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for index, seed in super().__iter__():
            yield index, seed, self.epoch


class AugmentedFrames(Dataset):
    """Training frames, changed at random as a function of the seed in the key.

    Args:
        frames: Sequence of frames.
        settings: Random changes.
        point_range: What is kept.
        database: Objects to paste, or None.
        paste_epochs: Objects are pasted before this epoch, None for always.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        settings: LidarAugmentation,
        point_range: Range,
        database: ObjectDatabase | None,
        paste_epochs: int | None,
    ) -> None:
        self.frames, self.settings, self.point_range = frames, settings, point_range
        self.database, self.paste_epochs = database, paste_epochs

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: tuple[int, int, int]) -> Frame:
        index, seed, epoch = key
        pasting = self.paste_epochs is None or epoch < self.paste_epochs
        rng = np.random.default_rng(seed)
        database = self.database if pasting else None
        return augment(self.frames[index], self.settings, rng, self.point_range, database)


class PlainFrames(Dataset):
    """Frames as they are, cut to a range."""

    def __init__(self, frames: Sequence[Frame], point_range: Range) -> None:
        self.frames, self.point_range = frames, point_range

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        return crop_frame(self.frames[index], self.point_range)


def collate(frames: Sequence[Frame]) -> tuple[list[Tensor], list[Targets]]:
    """A batch as detectors take it: points [n_i, F] and targets of each sample."""
    return [frame.points for frame in frames], [Targets(frame.boxes, frame.labels) for frame in frames]


class PointCloudDataModule(LightningDataModule):
    """Point clouds with boxes. Subclasses implement ``load_splits`` and set ``class_names``.

    Args:
        num_classes: Number of classes; the command line passes it on to the model.
        point_range: Points and boxes outside are left out: x, y, z minimum, then maximum, metres.
        batch_size: Frames per device in a training step.
        val_batch_size: Frames per device in validation, ``batch_size`` by default.
        num_workers: Processes that load frames; 0 loads in the main process.
        augmentation: Random changes of training frames, None for none.
        database: File (.npz) of the objects to paste; it is made from the training frames where it does not exist.
    """

    def __init__(
        self,
        num_classes: int,
        point_range: Range,
        batch_size: int = 4,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        augmentation: LidarAugmentation | None = None,
        database: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(augmentation, dict):
            augmentation = LidarAugmentation(**augmentation)
        if augmentation is not None and augmentation.paste and database is None:
            raise ValueError("augmentation.paste needs a database: give the path of a .npz file, made where missing")
        # A checkpoint holds plain types only, so that it loads with weights_only=True.
        self.save_hyperparameters(ignore=["augmentation"])
        self.augmentation = augmentation
        self.class_names: tuple[str, ...] = ()
        self.splits: dict[str, Sequence[Frame]] = {}
        self.objects: ObjectDatabase | None = None

    def load_splits(self) -> dict[str, Sequence[Frame]]:
        """Return the splits ``train`` and ``val``, each a sequence of frames on the CPU."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Open the data once and check the classes."""
        if self.splits:
            return
        self.splits = self.load_splits()
        if len(self.class_names) != self.hparams.num_classes:
            raise ValueError(
                f"{type(self).__name__}: num_classes is {self.hparams.num_classes}, but there are "
                f"{len(self.class_names)} classes: {', '.join(self.class_names)}"
            )

    def prepare_data(self) -> None:
        """Make the database of objects to paste, once for all processes, where its file does not exist."""
        path = self.hparams.database
        if path is None or Path(path).is_file() or not (self.augmentation and self.augmentation.paste):
            return
        self.setup()
        frames = self.splits["train"]
        database = ObjectDatabase.build(
            (frames[i] for i in range(len(frames))), self.class_names, self.augmentation.paste_min_points
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        database.save(path)

    def position(self) -> tuple[int, int]:
        """(epoch, batches of it already trained on), from the trainer's counters, which checkpoints restore."""
        if self.trainer is None:
            return 0, 0
        loop = self.trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready

    def _loader_args(self) -> dict[str, Any]:
        workers = self.hparams.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate,
            # The base seed of workers is drawn from here instead of advancing the global generator.
            "generator": torch.Generator().manual_seed(mix_seed(run_seed())),
        }

    def _paste_epochs(self) -> int | None:
        epochs = self.trainer.max_epochs if self.trainer else None
        return epochs - self.augmentation.paste_off_epochs if epochs and epochs > 0 else None

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented, reproducible; incomplete batches are dropped."""
        frames, hparams = self.splits["train"], self.hparams
        settings = self.augmentation or LidarAugmentation(flip_x=0, flip_y=0, rotation=0, scale=(1.0, 1.0))
        if settings.paste and self.objects is None:
            self.prepare_data()
            self.objects = ObjectDatabase.load(hparams.database)
            if self.objects.classes != self.class_names:
                raise ValueError(f"{hparams.database} has classes {self.objects.classes}, not {self.class_names}")
        paste_epochs = self._paste_epochs() if settings.paste else None
        dataset = AugmentedFrames(frames, settings, hparams.point_range, self.objects, paste_epochs)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = FrameSampler(dataset, run_seed(), num_replicas=world, rank=rank)
        if len(sampler) < hparams.batch_size:
            raise ValueError(f"batch_size is {hparams.batch_size}, but an epoch has {len(sampler)} frames per device")
        return ResumableLoader(
            dataset, batch_size=hparams.batch_size, sampler=sampler, drop_last=True, position=self.position,
            **self._loader_args(),
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Validation frames in their order."""
        size = self.hparams.val_batch_size or self.hparams.batch_size
        dataset = PlainFrames(self.splits["val"], self.hparams.point_range)
        return DataLoader(dataset, batch_size=size, **self._loader_args())

    test_dataloader = predict_dataloader = val_dataloader


class _SimulatedFrames(Sequence):
    def __init__(self, simulator: LidarSimulator, count: int) -> None:
        self.simulator, self.count = simulator, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.simulator[index]


class SimulatedLidarData(PointCloudDataModule):
    """Simulated street scenes with cars, pedestrians and cyclists, made while they are used.

    Args:
        num_classes: Number of classes, 3.
        point_range: As in the base; objects stand up to its farthest side.
        train_frames: Frames of an epoch.
        val_frames: Frames held out.
        seed: Of the scenes; the held-out ones are the same for every seed of a run.
        sensor: Beams, columns, noise of the sensor; None for the default of ``LidarSimulator``.
        **kwargs: Arguments of ``PointCloudDataModule``.
    """

    def __init__(
        self,
        num_classes: int = 3,
        point_range: Range = (-40.0, -40.0, -2.0, 40.0, 40.0, 4.0),
        train_frames: int = 2000,
        val_frames: int = 100,
        seed: int = 0,
        sensor: SpinningSensor | None = None,
        **kwargs,
    ) -> None:
        super().__init__(num_classes=num_classes, point_range=point_range, **kwargs)
        self.sensor = SpinningSensor(**sensor) if isinstance(sensor, dict) else sensor
        self.save_hyperparameters(ignore=["sensor", "augmentation"])
        self.class_names = CLASSES

    def load_splits(self) -> dict[str, Sequence[Frame]]:
        """Scenes of two unrelated seeds."""
        hparams = self.hparams
        extent = max(abs(hparams.point_range[i]) for i in (0, 1, 3, 4))
        counts = {"train": hparams.train_frames, "val": hparams.val_frames}
        return {
            name: _SimulatedFrames(LidarSimulator(2 * hparams.seed + i, extent, self.sensor), count)
            for i, (name, count) in enumerate(counts.items())
        }


class FrameFolderData(PointCloudDataModule):
    """Frames converted to .npz files, for data sets whose own format needs their own tools, such as Waymo.

    ``ROOT/train`` and ``ROOT/val`` hold one folder a drive with one file a frame, named so that their order is the
    order in time. A file holds

    - ``points`` [n, F] float32: x, y, z (vehicle frame, ground near z = 0), then further columns as the model takes
      them (Waymo: tanh of intensity, tanh of elongation);
    - ``boxes`` [k, 7 or 9] float32: centre, size along and across the heading and upwards, yaw counter-clockwise
      from +x[, velocity];
    - ``names`` [k] strings: classes; boxes of other classes than ``classes`` are left out;
    - ``pose`` [4, 4] float64 (only needed where ``sweeps`` > 1): vehicle to world.

    Args:
        root: Folder.
        classes: Names, in the order of the labels.
        num_classes: Number of classes.
        point_range: As in the base.
        min_points: Boxes with fewer points are left out.
        sweeps: Frames of a drive whose points are put together: the frame itself and those before it, moved to its
            pose (`zoo.heads.point_detectors.merge_sweeps`); the last column becomes 0, -1, -2 ... by age.
        every: Trains on every so many frames (5 for the "20 %" results of Waymo).
        **kwargs: Arguments of ``PointCloudDataModule``.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str],
        num_classes: int,
        point_range: Range,
        min_points: int = 1,
        sweeps: int = 1,
        every: int = 1,
        **kwargs,
    ) -> None:
        super().__init__(num_classes=num_classes, point_range=point_range, **kwargs)
        if sweeps < 1 or every < 1:
            raise ValueError(f"sweeps and every must be at least 1, got {sweeps} and {every}")
        self.save_hyperparameters(ignore=["augmentation"])
        self.class_names = tuple(classes)

    def load_splits(self) -> dict[str, Sequence[Frame]]:
        """List the files; nothing is read yet."""
        splits = {}
        for name in ("train", "val"):
            folder = Path(self.hparams.root) / name
            drives = [sorted(drive.glob("*.npz")) for drive in sorted(folder.glob("*")) if drive.is_dir()]
            if not any(drives):
                raise FileNotFoundError(f"{folder} has no files DRIVE/FRAME.npz; see FrameFolderData for their content")
            step = self.hparams.every if name == "train" else 1
            splits[name] = FolderFrames(drives, self.class_names, self.hparams.min_points, self.hparams.sweeps, step)
        return splits


class FolderFrames(Sequence):
    """The frames of drives, read when asked for; arguments as in `FrameFolderData`."""

    def __init__(
        self, drives: list[list[Path]], classes: Sequence[str], min_points: int, sweeps: int, step: int
    ) -> None:
        self.drives, self.classes, self.min_points, self.sweeps = drives, tuple(classes), min_points, sweeps
        places = [(i, j) for i, drive in enumerate(drives) for j in range(len(drive))]
        self.places = places[::step]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Frame:
        drive, position = self.places[index]
        path = self.drives[drive][position]
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("points", "boxes", "names") if key not in file.files]
            if missing:
                raise ValueError(f"{path} has no array {missing[0]!r}; see FrameFolderData for its content")
            points, boxes, names = file["points"].astype(np.float32), file["boxes"].astype(np.float32), file["names"]
            pose = file["pose"] if self.sweeps > 1 else None
        known = np.array([str(name) in self.classes for name in names], bool)
        labels = np.array([self.classes.index(str(name)) for name in names[known]], np.int64)
        frame = Frame(torch.from_numpy(points), torch.from_numpy(boxes[known]), torch.from_numpy(labels))
        frame = drop_sparse(frame, self.min_points)
        if self.sweeps == 1:
            return frame
        return frame._replace(points=self._with_past(frame.points, pose, drive, position))

    def _with_past(self, points: Tensor, pose: np.ndarray, drive: int, position: int) -> Tensor:
        clouds, poses = [points], [pose]
        for age in range(1, min(self.sweeps, position + 1)):
            with np.load(self.drives[drive][position - age], allow_pickle=False) as file:
                clouds.append(torch.from_numpy(file["points"].astype(np.float32)))
                poses.append(file["pose"])
        return merge_sweeps(clouds, [torch.from_numpy(np.asarray(p, np.float64)) for p in poses])


def drop_sparse(frame: Frame, min_points: int) -> Frame:
    """Leave out boxes with fewer points inside."""
    if min_points < 1 or not len(frame.boxes):
        return frame
    kept = points_in_boxes(frame.points, frame.boxes).sum(0) >= min_points
    return Frame(frame.points, frame.boxes[kept], frame.labels[kept])
