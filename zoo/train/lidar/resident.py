"""Train a small detector on simulated scenes that stay on the GPU.

The scenes are laid out by processes on the CPU and traced on the GPU once; a batch is drawn from them and mirrored,
turned and scaled there. For real data use ``zoo fit``.

    python -m zoo.train.lidar.resident flatformer_nano --out MODEL_FOLDER --minutes 8
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from zoo.heads.detections import Targets
from zoo.train.detection import parameter_groups
from zoo.train.lidar.augment import LidarAugmentation, augment
from zoo.train.lidar.frames import Frame, crop_frame
from zoo.train.lidar.metrics import BoxAveragePrecision
from zoo.train.lidar.simulator import LidarSimulator

# Scenes traced together.
_TRACED = 16
# Seed of the validation scenes, whatever the seed of a run.
_VALIDATION_SEED = 10**6
# Batches that the statistics of BatchNorm are measured on.
_STATISTICS_BATCHES = 50
# Forked processes would share the parent's CUDA context.
_START_METHOD = "spawn"
# Steps whose gradients are not finite, in a row, that end a run.
_PATIENCE = 50


@dataclass(frozen=True)
class Recipe:
    """What a run is made of.

    Attributes:
        batch_size: Frames per step.
        lr, weight_decay: Peak rate and decay of AdamW.
        warm_up: Share of the time until the peak; a cosine to a hundredth of it follows.
        clip: Largest norm of the gradient.
        ema: Decay of the weight average.
        augmentation: Random changes of a frame.
    """

    batch_size: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.02
    warm_up: float = 0.1
    clip: float = 10.0
    ema: float = 0.999
    augmentation: LidarAugmentation = LidarAugmentation(rotation=180.0)


def simulate(simulator: LidarSimulator, count: int, point_range: Sequence[float], workers: int) -> list[Frame]:
    """Frames 0 to `count` of a simulator, cut to a range, on its device.

    Args:
        simulator: What is simulated.
        count: Number of frames.
        point_range: As in `zoo.train.lidar.frames.in_range`.
        workers: Processes that lay out the scenes; 0 does it in this one.
    """
    frames: list[Frame] = []
    with _layouts(simulator, count, workers) as layouts:
        for first in range(0, count, _TRACED):
            indices = range(first, min(first + _TRACED, count))
            traced = simulator.frames(indices, list(itertools.islice(layouts, len(indices))))
            frames += [crop_frame(frame, point_range) for frame in traced]
    return frames


class _layouts:
    """Layouts 0 to `count` in their order, made by processes."""

    def __init__(self, simulator: LidarSimulator, count: int, workers: int) -> None:
        self.simulator, self.count = simulator, count
        context = multiprocessing.get_context(_START_METHOD)
        self.pool = ProcessPoolExecutor(workers, context) if workers else None

    def __enter__(self) -> Iterator:
        if self.pool is None:
            return map(self.simulator.layout, range(self.count))
        return self.pool.map(self.simulator.layout, range(self.count), chunksize=8)

    def __exit__(self, *exception) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def batches(
    frames: Sequence[Frame], recipe: Recipe, point_range: Sequence[float], seed: int
) -> Iterator[tuple[list[Tensor], list[Targets]]]:
    """Endless augmented batches, in a new random order each pass."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(frames))
        for first in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            chosen = order[first : first + recipe.batch_size]
            drawn = [augment(frames[i], recipe.augmentation, rng, point_range) for i in chosen]
            yield [frame.points for frame in drawn], [Targets(frame.boxes, frame.labels) for frame in drawn]


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Rate at a share of the time: by cosines from a tenth of the peak to the peak and to a hundredth of it."""
    if progress < recipe.warm_up:
        share = 0.5 * (1 - math.cos(math.pi * progress / recipe.warm_up))
        return recipe.lr * (0.1 + 0.9 * share)
    progress = min(1.0, (progress - recipe.warm_up) / (1 - recipe.warm_up))
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Training:
    """A network with its optimizer and weight average.

    Args:
        net: Detector in training mode, on its device.
        recipe: What to do.
        amp: Whether the network runs in bfloat16 where autocast allows.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, amp: bool) -> None:
        self.net, self.recipe, self.amp = net, recipe, amp
        self.device = next(net.parameters()).device
        groups = parameter_groups(net, recipe.weight_decay, ("norm", "bn", "bias"))
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True if self.device.type == "cuda" else None
        )
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.steps, self.failures = 0, 0

    def step(self, points: list[Tensor], targets: list[Targets], lr: float) -> Tensor:
        """One update; a step whose gradient is not finite changes nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.net.loss(points, targets)["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, self.recipe.clip)
        if not torch.isfinite(norm):
            self.failures += 1
            if self.failures >= _PATIENCE:
                raise RuntimeError(f"gradients of {self.failures} steps in a row were not finite; try --fp32")
            return loss.detach()
        self.failures = 0
        self.optimizer.step()
        self._follow()
        return loss.detach()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights, fast at first."""
        self.steps += 1
        decay = min(self.recipe.ema, self.steps / (self.steps + 10))
        live, averaged = (list(net.state_dict().values()) for net in (self.net, self.average))
        floats = [(a, b) for a, b in zip(averaged, live, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)


def train(
    training: Training, source: Iterator[tuple[list[Tensor], list[Targets]]], seconds: float, report: Callable = print
) -> bool:
    """Train for a time; return False where an interrupt ended it.

    Args:
        training: State of the run.
        source: Batches.
        seconds: How long.
        report: Takes a line about the progress every tenth of the time.
    """
    start, next_report = time.monotonic(), 0.0
    try:
        for points, targets in source:
            progress = (time.monotonic() - start) / seconds
            if progress >= 1:
                return True
            loss = training.step(points, targets, learning_rate(progress, training.recipe))
            if progress >= next_report:
                next_report += 0.1
                report(f"{progress:4.0%} of the time, step {training.steps}, loss {float(loss):.3f}")
    except KeyboardInterrupt:
        report(f"interrupted after {training.steps} steps; the average so far is kept")
    return False


@torch.no_grad()
def evaluate(net: nn.Module, frames: Sequence[Frame], batch_size: int = 4) -> dict[str, float]:
    """Average precision of a detector on frames: BEV and 3D, at 0.7 for the first class and at 0.5 for the others.

    Classes that do not occur are left out.
    """
    net.eval()
    thresholds = [0.7] + [0.5] * (len(net.classes) - 1)
    metrics = {view: BoxAveragePrecision(net.classes, thresholds, view, "all") for view in ("bev", "3d")}
    for first in range(0, len(frames), batch_size):
        chosen = frames[first : first + batch_size]
        found = net([frame.points for frame in chosen])
        for metric in metrics.values():
            metric.update(found, [Targets(frame.boxes, frame.labels) for frame in chosen])
    return {
        f"{view}/{name}": round(float(value), 4)
        for view, metric in metrics.items()
        for name, value in metric.compute().items()
        if not value.isnan()
    }


def main(argv: list[str] | None = None) -> None:
    """Simulate, train for some minutes, write the averaged weights in the hub layout, and measure them."""
    from zoo import create_model

    parser = argparse.ArgumentParser(prog="python -m zoo.train.lidar.resident", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="flatformer_nano, scatterformer_nano or another detector of three classes")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of the training itself (default: 8)")
    parser.add_argument("--frames", type=int, default=4096, help="scenes to train on (default: 4096)")
    parser.add_argument("--val-frames", type=int, default=128, help="scenes to measure on (default: 128)")
    parser.add_argument("--workers", type=int, default=14, help="processes that lay out scenes (default: 14)")
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of a model to go on from (default: random weights)")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16")
    args = parser.parse_args(argv)
    # A time limit ends processes by this signal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    net = create_model(args.model) if args.start is None else create_model(f"local-dir:{args.start}", pretrained=True)
    net = net.to(device).train()
    recipe = Recipe(batch_size=args.batch_size, lr=args.lr)
    extent = max(abs(net.point_range[i]) for i in (0, 1, 3, 4))
    start = time.monotonic()
    held_out = LidarSimulator(_VALIDATION_SEED, extent, device=device)
    val = simulate(held_out, args.val_frames, net.point_range, 0)
    pool = simulate(LidarSimulator(args.seed, extent, device=device), args.frames, net.point_range, args.workers)
    print(f"{len(pool)} scenes in {time.monotonic() - start:.0f} s", flush=True)
    training = Training(net, recipe, amp=device.type == "cuda" and not args.fp32)
    train(
        training,
        batches(pool, recipe, net.point_range, args.seed),
        60 * args.minutes,
        lambda line: print(line, flush=True),
    )
    save(training.average, args.out)
    print(f"wrote {args.out}", flush=True)
    # The running statistics of BatchNorm lag behind the weights, more so behind averaged ones.
    source = batches(pool, recipe, net.point_range, args.seed)
    update_bn(itertools.islice(source, _STATISTICS_BATCHES), training.average)
    metrics = evaluate(training.average, val)
    car = metrics.get(f"bev/ap/{net.classes[0]}", math.nan)
    print(f"validation {net.classes[0]} AP (BEV, IoU 0.7) {car:.2%}", flush=True)
    print(" ".join(f"{name} {value:.2%}" for name, value in metrics.items()), flush=True)
    save(training.average, args.out, metrics)


def save(net: nn.Module, folder: Path, metrics: dict[str, float] | None = None) -> None:
    """Write a detector in the layout that `zoo.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    from zoo import hub

    hub.save_model(copy.deepcopy(net).cpu(), folder, metrics=metrics)


if __name__ == "__main__":
    main()
