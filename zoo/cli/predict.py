"""`zoo predict`: classify images, segment them, or find objects in images and point clouds."""

import argparse
import glob
import json
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path

from zoo.cli.arguments import pick_device, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="FILE",
        help="image files, or point clouds (.bin of KITTI or nuScenes, .npz, .npy, .pcd), folders or wildcards",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="arch.tag, hf-hub:org/name or local-dir:FOLDER")
    parser.add_argument("--topk", type=positive, default=5, help="classes to show (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON, one file a line")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where present)")
    parser.add_argument("--batch-size", type=positive, default=32, help="images a step (default: 32)")
    parser.add_argument(
        "--task",
        choices=("classify", "segment", "detect"),
        default="classify",
        help="what to do with images (default: classify); segment and detect draw pictures",
    )
    drawn = parser.add_argument_group("boxes and pictures")
    drawn.add_argument("--score", type=float, default=0.3, help="least score of a box (default: 0.3)")
    drawn.add_argument(
        "--out",
        type=Path,
        default=Path("."),
        help="folder of what was found, FILE.json, and pictures, FILE.png; with --task FILE.TASK.json and .png "
        "(default: .)",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from zoo.cli import predict_dense, predict_points

    if _are_point_clouds(args.images):
        return predict_points.run(*find_files(args.images, predict_points.SUFFIXES, "point cloud"), args)
    paths, failures = find_images(args.images)
    if args.task in predict_dense.TASKS:
        return predict_dense.run(paths, failures, args)
    # Without an image the model need not be fetched.
    classifier = Classifier(args.model, args.device) if paths else None
    results = []
    batches = [paths[i : i + args.batch_size] for i in range(0, len(paths), args.batch_size)]
    progress = Console(stderr=True)
    quiet = len(batches) < 2 or not progress.is_terminal
    for batch in track(batches, "Predicting", console=progress, disable=quiet, transient=True):
        images, good = [], []
        for path in batch:
            try:
                images.append(classifier.load(path))
                good.append(path)
            except (OSError, ValueError, SyntaxError) as error:
                failures.append(f"'{path}' cannot be read as an image: {' '.join(str(error).split())}")
        if images:
            results += zip(good, classifier.predict(images, args.topk), strict=True)
    records = [{"image": str(path), "model": args.model, "predictions": found} for path, found in results]
    return report(records, failures, args.json, lambda: _table(results))


def report(records: list[dict], failures: list[str], as_json: bool, table: Callable) -> int:
    """Print failures, then results: a line of JSON each, or a table. Returns the exit status."""
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if as_json:
        for record in records:
            print(json.dumps(record))
    elif records:
        from rich.console import Console

        Console().print(table())
    return 1 if failures else 0


def read_image(path: Path, mode: str = "RGB"):
    """Read an image, upright, as a PIL image.

    Raises:
        ValueError: It is too large to be one of good faith.
        OSError, SyntaxError: It cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Cameras store the orientation beside the pixels.
            return ImageOps.exif_transpose(image).convert(mode)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _are_point_clouds(patterns: list[str]) -> bool:
    """Tell whether files or folders are point clouds, by the first that shows it."""
    from zoo.cli.predict_points import SUFFIXES

    for pattern in patterns:
        path = Path(pattern)
        if path.suffix.lower() in SUFFIXES:
            return True
        if path.is_dir():
            # Pictures of point clouds, FILE.bin.png, lie beside these.
            images = [p for p in find_images([pattern])[0] if p.with_suffix("").suffix.lower() not in SUFFIXES]
            return not images and bool(find_files([pattern], SUFFIXES, "point cloud")[0])
    return False


def find_images(patterns: list[str]) -> tuple[list[Path], list[str]]:
    """Expand files, folders and wildcards; return the paths and a message for each argument that names nothing."""
    from PIL import Image

    return find_files(patterns, Image.registered_extensions(), "image")


def find_files(patterns: list[str], suffixes: Container[str], kind: str) -> tuple[list[Path], list[str]]:
    """Expand files, folders (only files with one of the suffixes) and wildcards, as `find_images` does."""
    paths: list[Path] = []
    failures = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
        else:
            found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not found:
            failures.append(f"'{pattern}' holds no {kind}." if path.is_dir() else f"'{pattern}' does not exist.")
        paths += found
    return list(dict.fromkeys(paths)), failures


class Classifier:
    """A pretrained model with its own preprocessing and class names.

    Args:
        name: What `zoo.create_model` takes.
        device: Torch device; None means CUDA where present.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        import timm
        import torch

        import zoo

        self.device = pick_device(device)
        self.model = zoo.create_model(name, pretrained=True).to(self.device).eval()
        if hasattr(self.model, "command"):
            raise ValueError(f"'{name}' does not classify images: use --task {self.model.command}.")
        self.config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**self.config)
        self.mode = "L" if self.config["input_size"][0] == 1 else "RGB"
        self.labels = class_names(self.model)
        self._torch = torch

    def load(self, source):
        """Read an image file, or take a PIL image, and return it ready for the model, [C, H, W]."""
        from PIL import Image

        given = isinstance(source, Image.Image)
        return self.transform(source.convert(self.mode) if given else read_image(source, self.mode))

    def predict(self, images: list, topk: int = 5) -> Iterator[list[dict]]:
        """Yield the best classes of each image, best first."""
        torch = self._torch
        with torch.inference_mode():
            # [B, classes]
            probabilities = self.model(torch.stack(images).to(self.device)).float().softmax(-1)
        top = probabilities.topk(min(topk, probabilities.shape[-1]))
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            yield [
                {"index": index, "label": self.labels[index], "probability": round(value, 6)}
                for index, value in zip(indices, values, strict=True)
            ]


def class_names(model) -> list[str]:
    """Return a readable name for each class of a model: its own, ImageNet's, or the index."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = model.pretrained_cfg
    names = cfg.get("label_names")
    if names and len(names) == model.num_classes:
        names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else list(names)
        descriptions = cfg.get("label_descriptions") or {}
        return [str(descriptions.get(name, name)) for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).label_descriptions()
    return [str(index) for index in range(model.num_classes)]


def _table(results: list):
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "class")
    table.add_column("probability", justify="right")
    for path, predictions in results:
        for rank, item in enumerate(predictions):
            # Text objects, because brackets in a file name are markup to rich.
            first = Text(str(path) if rank == 0 else "")
            table.add_row(first, Text(item["label"]), f"{item['probability']:.1%}")
        table.add_section()
    return table
