"""Train a small segmenter or detector on scenes that are composed on the GPU, with a step that is one CUDA graph.

No scene is seen twice: each batch is made where it is used. The network with the best result on validation scenes is
kept, whenever the run ends. For real data use ``zoo fit``.

    python -m zoo.train.composites_resident segment --root FASHION_MNIST --out MODEL_FOLDER --minutes 8
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.heads.image_models import ImageModel
from zoo.train.data.composites import Composites, CompositeSource
from zoo.train.image_metrics import confusion, mean_average_precision, mean_iou
from zoo.train.resident import Recipe, Step, learning_rate
from zoo.train.segmentation import pixel_cross_entropy

# Seed of the scenes of validation and test, whatever the seed of a run.
_HELD_OUT_SEED = 10**6
_EVALUATED = 64


class Task(ABC):
    """What a network learns from scenes."""

    model: str
    # The result by which networks are compared, in percent.
    metric: str

    @abstractmethod
    def target(self, scenes: Composites) -> Tensor:
        """What the loss needs of a batch, as one tensor."""

    @abstractmethod
    def loss(self, net: ImageModel, images: Tensor, target: Tensor) -> Tensor:
        """Loss of normalised images, in float32."""

    @abstractmethod
    def evaluate(self, net: ImageModel, batches: Iterator[Composites]) -> dict[str, float]:
        """Results on scenes by name, in percent."""


class Segment(Task):
    """The class of each pixel, measured by the mean IoU over the background and ten classes."""

    model, metric = "semantic_fpn_biformer_nano", "miou"

    def target(self, scenes: Composites) -> Tensor:
        return scenes.semantic

    def loss(self, net: ImageModel, images: Tensor, target: Tensor) -> Tensor:
        return pixel_cross_entropy(net.dense(images), target)

    def evaluate(self, net: ImageModel, batches: Iterator[Composites]) -> dict[str, float]:
        counts = sum(confusion(net(x.pixels).argmax(1), x.semantic, net.num_classes) for x in batches)
        accuracy = float(counts.diag().sum() / counts.sum())
        return {"miou": round(100 * mean_iou(counts), 2), "pixel_accuracy": round(100 * accuracy, 2)}


class Detect(Task):
    """Boxes, measured by COCO's mean average precision."""

    model, metric = "retinanet_biformer_nano", "map"

    def target(self, scenes: Composites) -> Tensor:
        # [B, M, 5]
        return torch.cat([scenes.boxes, scenes.labels[..., None].float()], -1)

    def loss(self, net: ImageModel, images: Tensor, target: Tensor) -> Tensor:
        retinanet = net.net.net
        features = list(retinanet.backbone(images).values())
        outputs, anchors = retinanet.head(features), retinanet.anchors(images, features)
        with torch.autocast(images.device.type, enabled=False):
            losses = retinanet.padded_loss(outputs, anchors, target[..., :4], target[..., 4].long())
        return sum(losses.values())

    def evaluate(self, net: ImageModel, batches: Iterator[Composites]) -> dict[str, float]:
        found, targets = [], []
        for scenes in batches:
            found += net(scenes.pixels)
            targets += scenes.targets()
        results = mean_average_precision(found, targets, net.num_classes)
        return {name: round(100 * value, 2) for name, value in results.items()}


TASKS = {"segment": Segment, "detect": Detect}


class TaskStep(Step):
    """The step of `zoo.train.resident` with the loss of a task.

    Args:
        task: What is learned.
        net: Network in training mode, on its device.
        recipe: Of the optimizer.
        batch: Images and target that give the buffers their shapes.
    """

    def __init__(self, task: Task, net: nn.Module, recipe: Recipe, batch: tuple[Tensor, Tensor]) -> None:
        self.task = task
        super().__init__(net, None, recipe, batch)

    def _loss(self) -> Tensor:
        amp = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
            return self.task.loss(self.net, self.x, self.target)


class TrainingBatches(Iterator):
    """Endless batches of new scenes: normalised images and targets, made by one CUDA graph where there is a GPU.

    A batch is overwritten by the next one there.

    Args:
        source: Of the scenes.
        task: Gives the targets.
        net: Gives the normalisation.
        batch_size: Scenes of a batch.

    Attributes:
        count: Batches that were given.
    """

    def __init__(self, source: CompositeSource, task: Task, net: ImageModel, batch_size: int) -> None:
        self.source, self.task, self.count = source, task, 0
        device = source.photos.device
        # A graph cannot copy them from the host.
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (net.mean, net.std))
        self.index = torch.arange(batch_size, device=device)
        self.graph = None
        if device.type == "cuda":
            self._capture()

    @torch.no_grad()
    def _make(self) -> tuple[Tensor, Tensor]:
        scenes = self.source(self.index)
        self.index += len(self.index)
        return (scenes.pixels - self.mean) / self.std, self.task.target(scenes)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._make()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.batch = self._make()

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.count += 1
        if self.graph is None:
            return self._make()
        self.graph.replay()
        return self.batch


@torch.no_grad()
def evaluate(task: Task, net: ImageModel, source: CompositeSource, count: int) -> dict[str, float]:
    """Results of a network on the first `count` scenes of a source."""
    numbers = torch.arange(count, device=source.photos.device).split(_EVALUATED)
    return task.evaluate(net.eval(), (source(index) for index in numbers))


class Keeper:
    """Writes a network whenever its result is the best so far.

    Args:
        task: By whose metric networks are compared.
        folder: Where the model goes.
        measure: Gives the results of a network.
        report: Takes a line about each result.
    """

    def __init__(self, task: Task, folder: Path, measure: Callable[[nn.Module], dict[str, float]], report: Callable):
        self.task, self.folder, self.measure, self.report = task, folder, measure, report
        self.best = -math.inf

    def offer(self, net: ImageModel, note: str) -> None:
        """Measure a network and keep it where it is the best one."""
        results = self.measure(net)
        self.report(f"{note}, validation {' '.join(f'{name} {value:.2f} %' for name, value in results.items())}")
        if results[self.task.metric] > self.best or self.best == -math.inf:
            save(net, self.folder, {f"val_{name}": value for name, value in results.items()})
            self.best = results[self.task.metric]


def train(step: TaskStep, batches: Iterator[tuple[Tensor, Tensor]], seconds: float, lr: float, keeper: Keeper) -> bool:
    """Train for a time; return False where an interrupt ended it.

    The network is measured and kept at each tenth of the time.

    Raises:
        RuntimeError: The loss is not finite.
    """
    start, tenth, i = time.monotonic(), 1, 0
    try:
        for i, (x, target) in enumerate(batches):
            progress = (time.monotonic() - start) / seconds
            loss = step(x, target, learning_rate(int(10**6 * progress), 10**6, lr))
            if i % 50 == 0:
                # Waits for the device, which would otherwise be far behind.
                if not math.isfinite(loss):
                    raise RuntimeError(f"the loss of step {i} is {float(loss)}; try a smaller --lr")
                print(f"step {i}, {time.monotonic() - start:.0f} s, loss {float(loss):.3f}", flush=True)
            if progress >= min(1.0, tenth / 10):
                keeper.offer(step.average, f"{progress:4.0%} of the time, step {i}")
                # Slow machines may pass several tenths in a step.
                tenth = int(10 * progress) + 1
            if progress >= 1:
                return True
    except KeyboardInterrupt:
        print(f"interrupted after {i} steps", flush=True)
        keeper.offer(step.average, "the average so far")
    return False


_DETAILS = """Scenes: up to six garments of Fashion-MNIST (MIT licence), tinted, turned and scaled, over crops of
photographs of {photos} with exact masks (`zoo.train.data.composites`). Training: 55,000 of the training
images of Fashion-MNIST and {train_photos} photographs, no scene twice. Validation: {val} scenes of the 5,000 other
training images, by which the network was chosen among ten averages of the run. Test: {test} scenes of the official
10,000 test images, measured once on the file as it is stored. Validation and test share {held_out} photographs that
training does not use.

Recipe: `python -m zoo.train.composites_resident {task}`, seed {seed}, {steps} steps of {batch} scenes of {size} pixels
in {minutes:.1f} minutes on {device}. The backbone started from {backbone}.
Other seeds have not been trained.

The model knows no clothes but drawn ones of this kind: it is an example of the network and its training, not a tool for
photographs."""


def save(net: ImageModel, folder: Path, metrics: dict[str, float], details: str | None = None) -> None:
    """Write a network in the layout that `zoo.create_model("local-dir:FOLDER", pretrained=True)` loads, in fp16."""
    from zoo import hub

    named = folder.name.startswith(f"{net.architecture}.")
    card = dict(
        name=folder.name if named else net.architecture,
        description=f"`{net.architecture}` trained on scenes of Fashion-MNIST's clothes over photographs.",
        license="mit",
        datasets=["fashion_mnist"],
        results=details,
        **(dict(address=folder.name) if named else {}),
    )
    hub.save_model(copy.deepcopy(net).cpu(), folder, card=card, metrics=metrics, half=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo.train.composites_resident", description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--root", required=True, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of the training itself (default: 8)")
    parser.add_argument("--backgrounds", help="folder of photographs, or of tars of them (default: zoo/samples)")
    parser.add_argument("--model", help="registered name (default: of biformer_nano)")
    parser.add_argument("--image-size", type=int, default=160, help="side of a scene in pixels (default: 160)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--val-scenes", type=int, default=512)
    parser.add_argument("--test-scenes", type=int, default=2048)
    parser.add_argument("--scratch", action="store_true", help="a random backbone instead of the embedded weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _network(args: argparse.Namespace, task: Task, device: torch.device) -> ImageModel:
    from zoo import create_model

    torch.manual_seed(args.seed)
    net = create_model(args.model or task.model, image_size=args.image_size, pretrained_backbone=not args.scratch)
    return net.to(device, memory_format=torch.channels_last).train()


def main(argv: list[str] | None = None) -> None:
    """Train for some minutes, keep the best network on validation scenes, and measure it on test scenes."""
    from zoo import create_model

    args = _arguments(argv)
    # A time limit ends processes by this signal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    task = TASKS[args.task]()
    options = dict(device=device, image_size=args.image_size, backgrounds=args.backgrounds)
    source = CompositeSource(args.root, "train", seed=args.seed, **options)
    val, test = (CompositeSource(args.root, split, seed=_HELD_OUT_SEED, **options) for split in ("val", "test"))
    net = _network(args, task, device)
    recipe = Recipe(epochs=0, batch_size=args.batch_size, lr=args.lr, ema=0.998)
    batches = TrainingBatches(source, task, net, args.batch_size)
    step = TaskStep(task, net, recipe, next(batches))
    keeper = Keeper(task, args.out, lambda x: evaluate(task, x, val, args.val_scenes), lambda x: print(x, flush=True))
    start = time.monotonic()
    train(step, batches, 60 * args.minutes, args.lr, keeper)
    minutes = (time.monotonic() - start) / 60
    stored = create_model(f"local-dir:{args.out}", pretrained=True).to(device)
    metrics = {f"val_{name}": value for name, value in evaluate(task, stored, val, args.val_scenes).items()}
    metrics.update(evaluate(task, stored, test, args.test_scenes))
    details = _DETAILS.format(
        photos=Path(args.backgrounds).name if args.backgrounds else "zoo/samples (CC0)",
        train_photos=len(source.photos), held_out=len(test.photos), val=args.val_scenes,
         test=args.test_scenes, task=args.task, seed=args.seed, steps=batches.count - 1,
        batch=args.batch_size, size=args.image_size, minutes=minutes,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        backbone="random weights" if args.scratch else "weights of this package trained on the same images",
    )  # fmt: skip
    save(stored, args.out, metrics, details)
    print("test " + " ".join(f"{name} {value:.2f} %" for name, value in metrics.items()), flush=True)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    main()
