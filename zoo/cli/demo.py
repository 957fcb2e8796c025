"""`zoo demo`: the whole package in under three minutes on a CPU, without a network."""

import argparse
import sys
import time
from pathlib import Path

MODEL = "biformer_nano.zoo_clothing10"
CONFIG = "digits/biformer_nano"
WANTED_ACCURACY = 0.97
_SAMPLES = Path(__file__).parents[1] / "samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="zoo_demo", help="folder to write (default: zoo_demo)")
    parser.add_argument("--model", default=MODEL, help=f"model that predicts the photographs (default: {MODEL})")


def run(args: argparse.Namespace) -> int:
    import torch

    threads = torch.get_num_threads()
    # Layers this small gain little from a second thread, and threads that wait for each other crawl on a busy machine.
    torch.set_num_threads(1)
    try:
        return _demo(args.model, Path(args.out))
    finally:
        torch.set_num_threads(threads)


def _demo(model: str, out: Path) -> int:
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    _heading("1. The models")
    _show_models()
    _heading("2. Predict photographs and show what the model looks at")
    _predict(model, out)
    _heading("3. Train on handwritten digits")
    checkpoint = _train(out)
    _heading("4. Export, load back through timm, compare")
    good = _export_and_check(checkpoint, out)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Everything is in {out}/")
    return 0 if good else 1


def _heading(text: str) -> None:
    from rich.console import Console

    # Sections are announced before slow work starts, also when the output goes to a file.
    sys.stdout.flush()
    Console().rule(text, align="left")


def _show_models() -> None:
    from rich.console import Console

    import zoo
    from zoo.cli.list_models import model_table

    Console().print(model_table([zoo.model_info(name) for name in zoo.list_models()]))


def sample_photographs() -> dict[str, "object"]:
    """Photographs of clothes that come with this package, then others from scikit-learn and scikit-image.

    Returns:
        PIL images by name; the name of a piece of clothing is its class.
    """
    import skimage.data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    photos = {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    photos |= {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")}
    clothes = {path.stem: Image.open(path) for path in sorted(_SAMPLES.glob("*.jpg"))}
    return clothes | {name: Image.fromarray(image) for name, image in photos.items()}


def _predict(name: str, out: Path) -> None:
    from zoo.cli.predict import Classifier

    classifier = Classifier(name, "cpu")
    print(
        f"{name} knows only these classes: {', '.join(classifier.labels[:20])}.\n"
        "The first photographs show clothes and were not trained on. The others show other things: there the answer\n"
        "is the closest of these classes."
    )
    photos = sample_photographs()
    inputs = [classifier.load(image) for image in photos.values()]
    predictions = list(classifier.predict(inputs, topk=5))
    for title, best in zip(photos, predictions, strict=True):
        print(f"  {title:10s} " + ", ".join(f"{item['label']} {item['probability']:.0%}" for item in best[:3]))
    path = out / "predictions.png"
    draw_predictions(classifier, list(photos), inputs, predictions, path)
    print(f"wrote {path}: photograph, classes, and the regions (blue) that the yellow region attends to")


def draw_predictions(classifier, titles: list[str], inputs: list, predictions: list, path: Path) -> None:
    """Draw one row for each image: what the model sees, its best classes, and the routing of one region."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from zoo.visualize import draw_routing, routing_maps

    batch = torch.stack(inputs)
    layer, routing = _telling_layer(routing_maps(classifier.model, batch))
    rows, cols = routing.grid
    query = (rows // 2) * cols + cols // 2
    # A figure of its own leaves the user's matplotlib state and display alone.
    figure = Figure(figsize=(9, 2.6 * len(titles)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(titles), 3, squeeze=False)
    for i, (title, best) in enumerate(zip(titles, predictions, strict=True)):
        image = _pixels(batch[i], classifier.config)
        picture, bars, regions = axes[i]
        picture.imshow(image)
        picture.set_title(title)
        labels = [item["label"].split(",")[0][:24] for item in best][::-1]
        bars.barh(labels, [item["probability"] for item in best][::-1], color="#007aff")
        bars.set_xlim(0, 1)
        selected, weights = routing.index[i, query].tolist(), routing.weight[i, query].tolist()
        regions.imshow(draw_routing(image, routing.grid, query, selected, weights))
        regions.set_title(f"{layer}: {len(selected)} of {rows * cols} regions", fontsize=8)
        for axis in (picture, regions):
            axis.axis("off")
    figure.savefig(path, dpi=100)


def _telling_layer(maps: dict):
    """Choose the deepest layer that leaves most regions out: where all are selected there is nothing to see."""
    sparse = {name: r for name, r in maps.items() if r.index.shape[-1] * 4 <= r.index.shape[-2]} or maps
    name = list(sparse)[-1]
    return name, sparse[name]


def _pixels(x, config: dict):
    """Turn a normalised input [C, H, W] back into an RGB image [H, W, 3] of bytes."""
    import torch

    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    image = ((x.cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _train(out: Path) -> Path:
    from zoo.train.cli import main

    runs = out / "runs"
    main(["fit", "--config", CONFIG, "--trainer.logger.init_args.save_dir", str(runs)])
    checkpoints = sorted(runs.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise FileNotFoundError(f"The training left no checkpoint in {runs}.")
    return checkpoints[-1]


def _export_and_check(checkpoint: Path, out: Path) -> bool:
    import timm
    import torch

    from zoo.cli.export import export
    from zoo.train.data import DigitsData
    from zoo.train.export import load_lightning_checkpoint

    folder = export(str(checkpoint), str(out / "digits_model"))
    trained, info = load_lightning_checkpoint(checkpoint)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = info["data_config"]
    data = DigitsData(
        image_size=config["input_size"][-1],
        crop_pct=config["crop_pct"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        num_workers=0,
    )
    data.setup("test")
    # The third of the digits that the training did not see.
    right = total = 0
    equal = True
    with torch.inference_mode():
        for images, labels in data.test_dataloader():
            expected, logits = trained(images), loaded(images)
            equal &= bool(torch.equal(expected, logits))
            right += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
    accuracy = right / total
    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"wrote {folder} ({size:.2f} MB): config.json, model.safetensors, README.md")
    print(f"timm.create_model('local-dir:{folder}', pretrained=True): predictions {'equal' if equal else 'DIFFER'}")
    verdict = "reached" if accuracy >= WANTED_ACCURACY else "NOT reached"
    print(f"accuracy on the held-out third ({total} digits): {accuracy:.2%} ({WANTED_ACCURACY:.0%} {verdict})")
    return equal and accuracy >= WANTED_ACCURACY
