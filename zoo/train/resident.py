"""Train a small classifier on images that stay on the GPU, with a training step that is one CUDA graph.

A network of a few million parameters leaves a GPU idle while Python launches its kernels and workers decode
images. Here the decoded images lie on the device, a batch is augmented there, and forward, backward, optimizer and
weight average are replayed as one graph: the weights that this package carries were trained this way in a minute
each. For anything larger use ``zoo fit``. Without a GPU the same steps run one by one.

    python -m zoo.train.resident clothing10 --root FOLDER --out MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from zoo.train.classification import _logits_and_embedding
from zoo.train.data import FashionMnistData, TarFolderData
from zoo.train.data.base import ImageDataModule
from zoo.train.distillation import Distillation, Distiller


@dataclass(frozen=True)
class Recipe:
    """What a run is made of.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr, weight_decay: Peak rate of AdamW after a warm-up of 5 % of the steps (then cosine to 1 % of it), and decay.
        scale: Range of the area of a random crop.
        jitter: Largest relative change of brightness, contrast and saturation.
        erase: Probability that a rectangle of an image is replaced by noise.
        mix: Probability that a batch is mixed with itself, by mixup and CutMix in equal shares.
        label_smoothing: Share of the target spread over all classes.
        drop_path: Stochastic depth of the last block.
        ema: Decay of the weight average.
        distillation: Teacher, or None.
        teacher_epochs: Passes that fit the teacher to the classes before the student starts; 0 leaves it as it is.
        data: Arguments of the data module.
    """

    epochs: int
    batch_size: int
    lr: float = 2e-3
    weight_decay: float = 0.05
    scale: tuple[float, float] = (0.35, 1.0)
    jitter: float = 0.0
    erase: float = 0.0
    mix: float = 0.0
    label_smoothing: float = 0.1
    drop_path: float = 0.05
    ema: float = 0.998
    distillation: Distillation | None = None
    teacher_epochs: int = 0
    data: dict = field(default_factory=dict)


RECIPES = {
    "clothing10": Recipe(
        epochs=300, batch_size=128, lr=1.5e-3, weight_decay=0.1, scale=(0.25, 1.0), jitter=0.4, erase=0.1, mix=0.9,
        drop_path=0.1, ema=0.995,
        distillation=Distillation(alpha=0.7, temperature=2.0, feature_weight=3.0), teacher_epochs=12,
        data=dict(num_classes=10, image_size=128, crop_pct=0.9, num_workers=0),
    ),
    "fashion_mnist": Recipe(
        epochs=30, batch_size=256, scale=(0.7, 1.0), erase=0.15, mix=0.25, ema=0.998, lr=2e-3,
        data=dict(mean=(0.286,) * 3, std=(0.353,) * 3, interpolation="bilinear", num_workers=0),
    ),
}  # fmt: skip


class DeviceImages:
    """Decoded images on a device, each in the corner of a square canvas.

    Args:
        images: Sequence of (image, label).
        device: Where they are kept, as bytes.
    """

    def __init__(self, images, device: torch.device) -> None:
        from PIL import Image

        arrays, labels = [], []
        for image, label in (images[i] for i in range(len(images))):
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            arrays.append(np.asarray(image.convert("RGB")))
            labels.append(label)
        self.side = max(max(a.shape[:2]) for a in arrays)
        canvas = np.empty((len(arrays), 3, self.side, self.side), np.uint8)
        for i, array in enumerate(arrays):
            # Repeated edges, because interpolation reads half a pixel beyond an image.
            margin = ((0, self.side - array.shape[0]), (0, self.side - array.shape[1]), (0, 0))
            canvas[i] = np.pad(array, margin, mode="edge").transpose(2, 0, 1)
        self.pixels = torch.from_numpy(canvas).to(device)
        self.sizes = torch.tensor([a.shape[:2] for a in arrays], dtype=torch.float32, device=device)
        self.labels = torch.tensor(labels, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def crops(self, index: Tensor, out_size: int, scale: tuple[float, float]) -> Tensor:
        """Random resized crops, half of them mirrored: [B, 3, out_size, out_size] in [0, 1]."""
        n, device = len(index), index.device
        h, w = self.sizes[index].unbind(1)
        area = h * w * torch.empty(n, device=device).uniform_(*scale)
        ratio = torch.exp(torch.empty(n, device=device).uniform_(-1, 1) * math.log(4 / 3))
        height, width = torch.minimum((area / ratio).sqrt(), h), torch.minimum((area * ratio).sqrt(), w)
        top, left = torch.rand(n, device=device) * (h - height), torch.rand(n, device=device) * (w - width)
        steps = (torch.arange(out_size, device=device) + 0.5) / out_size
        mirrored = (torch.rand(n, 1, device=device) < 0.5).float()
        x_steps = steps + mirrored * (1 - 2 * steps)  # [B, out_size]
        y = (top[:, None] + steps * height[:, None]) * (2 / self.side) - 1
        x = (left[:, None] + x_steps * width[:, None]) * (2 / self.side) - 1
        grid = torch.stack((x[:, None, :].expand(-1, out_size, -1), y[:, :, None].expand(-1, -1, out_size)), -1)
        pixels = self.pixels[index].float() / 255
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def jitter_colours(x: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of each image by up to `strength`."""
    factors = torch.empty(3, len(x), 1, 1, 1, device=x.device).uniform_(1 - strength, 1 + strength)
    x = (x * factors[0]).clamp(0, 1)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, factors[1]).clamp(0, 1)
    return torch.lerp(x.mean(1, keepdim=True), x, factors[2]).clamp(0, 1)


def random_boxes(n: int, size: int, area: Tensor, device: torch.device) -> Tensor:
    """[n, 1, size, size] bool: inside a square box of the given share of the image around a random centre."""
    half = area.sqrt() * size / 2
    centre = torch.rand(2, n, device=device) * size
    steps = torch.arange(size, device=device) + 0.5
    rows, cols = ((steps - c[:, None]).abs() < half[:, None] for c in centre)
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def mix_images(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup (0.8) or CutMix (1.0) of a batch with its reverse."""
    if np.random.rand() < 0.5:
        share = float(np.random.beta(0.8, 0.8))
        return torch.lerp(x.flip(0), x, share), torch.lerp(target.flip(0), target, share)
    area = torch.rand(1, device=x.device)
    box = random_boxes(1, x.shape[-1], area, x.device)
    kept = 1 - box.float().mean()
    return torch.where(box, x.flip(0), x), target * kept + target.flip(0) * (1 - kept)


def training_batches(
    recipe: Recipe, images: DeviceImages, data_config: dict, classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented and normalised batches with their soft targets, in a new random order each epoch."""
    device, size = images.labels.device, data_config["input_size"][-1]
    mean, std = (torch.tensor(data_config[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    targets = torch.eye(classes, device=device) * (1 - recipe.label_smoothing) + recipe.label_smoothing / classes
    while True:
        for index in torch.randperm(len(images), device=device).split(recipe.batch_size):
            if len(index) < recipe.batch_size:
                break
            x, target = images.crops(index, size, recipe.scale), targets[images.labels[index]]
            if recipe.jitter:
                x = jitter_colours(x, recipe.jitter)
            x = (x - mean) / std
            if recipe.erase:
                chosen = (torch.rand(len(x), device=device) < recipe.erase) * torch.rand(len(x), device=device) * 0.3
                x = torch.where(random_boxes(len(x), size, chosen, device), torch.randn_like(x), x)
            if recipe.mix and np.random.rand() < recipe.mix:
                x, target = mix_images(x, target)
            yield x, target


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.float().log_softmax(-1)).sum(-1).mean()


def fit_teacher(distiller: Distiller, batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float = 3e-4) -> None:
    """Fine-tune the teacher and its probe on the student's task; statistics of BatchNorm stay those of ImageNet.

    A probe on frozen features caps what the student can learn from it.
    """
    distiller.embed(next(batches)[0])  # moves the teacher to the device of the data
    teacher = distiller.teacher.requires_grad_(True)
    params = [*teacher.parameters(), *distiller.probe.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    for i, (x, target) in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, steps, lr)
        loss = soft_cross_entropy(distiller.probe(distiller.features(x)), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    teacher.requires_grad_(False)


class Step:
    """One training step on buffers `x` and `target`: a CUDA graph on a GPU, plain calls elsewhere."""

    def __init__(
        self, net: nn.Module, distiller: Distiller | None, recipe: Recipe, batch: tuple[Tensor, Tensor]
    ) -> None:
        self.net, self.distiller, self.recipe, self.device = net, distiller, recipe, batch[0].device
        device = self.device
        self.x = batch[0].to(memory_format=torch.channels_last, copy=True)
        self.target = batch[1].clone()
        modules = nn.ModuleList([net] if distiller is None else [net, distiller])
        on_gpu = device.type == "cuda"
        self.lr = torch.tensor(0.0, device=device)
        groups = param_groups_weight_decay(modules, recipe.weight_decay)
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, capturable=on_gpu, fused=on_gpu)
        self.average = copy.deepcopy(net)
        self.live = [t for t in net.state_dict().values() if t.is_floating_point()]
        self.averaged = [t for t in self.average.state_dict().values() if t.is_floating_point()]
        self.graph = None
        if on_gpu:
            self._capture()

    def _loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            logits, embedding = _logits_and_embedding(self.net, self.x)
            label = soft_cross_entropy(logits, self.target)
            if self.distiller is None:
                return label
            soft, feature, probe_logits = self.distiller.losses(self.x, logits, embedding)
        probe = soft_cross_entropy(probe_logits, self.target)
        settings = self.distiller.settings
        return (1 - settings.alpha) * label + settings.alpha * soft + settings.feature_weight * feature + probe

    def _run(self) -> Tensor:
        loss = self._loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.averaged, self.live, 1 - self.recipe.ema)
        return loss.detach()

    def _capture(self) -> None:
        """Warm up with a learning rate of zero, then record; weights, statistics and moments start afresh."""
        start = copy.deepcopy(self.net.state_dict())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._run()
        with torch.no_grad():
            self.net.load_state_dict(start)
            self.average.load_state_dict(start)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def __call__(self, x: Tensor, target: Tensor, lr: float) -> Tensor:
        self.x.copy_(x)
        self.target.copy_(target)
        self.lr.fill_(lr)
        if self.graph is not None:
            self.graph.replay()
            return self.loss
        self.optimizer.zero_grad(set_to_none=True)
        return self._run()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then cosine to 1 % of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(recipe: Recipe, data: ImageDataModule, images: DeviceImages, seed: int, model: str) -> tuple[nn.Module, bool]:
    """Train from scratch; return the averaged network and whether the run ended without an interrupt.

    Args:
        recipe: What to do.
        data: Data module, for the normalisation.
        images: Training images on the device of the run.
        seed: Of weights, order and augmentation.
        model: timm name of the network.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    device = images.labels.device
    config, classes = data.data_config, data.hparams.num_classes
    net = timm.create_model(model, num_classes=classes, drop_path_rate=recipe.drop_path).to(device)
    net = net.to(memory_format=torch.channels_last).train()
    per_epoch = len(images) // recipe.batch_size
    batches = training_batches(recipe, images, config, classes)
    distiller = None
    if recipe.distillation is not None:
        distiller = Distiller(recipe.distillation, net.num_features, classes).to(device)
        distiller.set_input_stats(config["mean"], config["std"])
        fit_teacher(distiller, batches, per_epoch * recipe.teacher_epochs)
    step = Step(net, distiller, recipe, next(batches))
    steps, start = per_epoch * recipe.epochs, time.time()
    try:
        for i, (x, target) in enumerate(itertools.islice(batches, steps)):
            loss = step(x, target, learning_rate(i, steps, recipe.lr))
            if (i + 1) % (per_epoch * max(1, recipe.epochs // 10)) == 0:
                seconds = time.time() - start
                print(f"seed {seed} epoch {(i + 1) // per_epoch} loss {float(loss):.3f} {seconds:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted after {i} of {steps} steps; the average so far is kept", flush=True)
        return step.average.eval(), False
    return step.average.eval(), True


@torch.no_grad()
def accuracy(net: nn.Module, data: ImageDataModule, split: str, device: torch.device) -> float:
    """Share of the images of a split that a network classifies correctly."""
    hits = [(net(x.to(device)).argmax(1) == y.to(device)).float() for x, y in data.eval_dataloader(split)]
    return torch.cat(hits).mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train with each seed and write the models in the hub layout, `OUT-SEED`."""
    from zoo import hub

    parser = argparse.ArgumentParser(prog="python -m zoo.train.resident", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--out", required=True, help="folder of the model; the seed is appended")
    parser.add_argument("--model", default="biformer_nano", help="timm name (default: biformer_nano)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="other than the recipe's")
    args = parser.parse_args(argv)
    # A time limit ends processes by this signal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    recipe = RECIPES[args.recipe]
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    module = TarFolderData if args.recipe == "clothing10" else FashionMnistData
    data = module(root=args.root, **recipe.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.setup("fit")
    images = DeviceImages(data.splits["train"], device)
    data_config = dict(data.data_config)
    label_names = data_config.pop("label_names")
    for seed in args.seeds:
        net, finished = train(recipe, data, images, seed, args.model)
        print(f"seed {seed} validation accuracy {accuracy(net, data, 'val', device):.2%}", flush=True)
        folder = Path(f"{args.out}-{seed}")
        hub.save_model(net.cpu(), folder, label_names=label_names, data_config=data_config, half=True)
        print(f"wrote {folder}", flush=True)
        if not finished:
            break


if __name__ == "__main__":
    main()
