"""`zoo predict --task segment|detect`: masks or boxes drawn into the image, and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TASKS = ("segment", "detect")


def run(paths: list[Path], failures: list[str], args: argparse.Namespace) -> int:
    """Predict each image; write FILE.json and FILE.png to `args.out`.

    Args:
        paths: Image files.
        failures: Messages about arguments that named nothing; printed with those about files.
        args: Of the command.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    from zoo.cli.predict import read_image, report

    predictor = Predictor(args.model, args.task, args.device) if paths else None
    results = []
    for path in paths:
        try:
            pixels = pil_to_tensor(read_image(path))
        except (OSError, ValueError, SyntaxError) as error:
            failures.append(f"'{path}' cannot be read as an image: {' '.join(str(error).split())}")
            continue
        found, picture = predictor(pixels, args.score)
        record = {"image": str(path), "model": args.model, "task": args.task, **found}
        record["picture"] = str(args.out / f"{path.name}.{args.task}.png")
        _write(record, picture)
        results.append(record)
    return report(results, failures, args.json, lambda: _table(results, args.task))


class Predictor:
    """A pretrained segmenter or detector of images.

    Args:
        name: What `zoo.create_model` takes.
        task: "segment" or "detect".
        device: Torch device; None means CUDA where present.

    Raises:
        ValueError: The model does something else.
    """

    def __init__(self, name: str, task: str, device: str | None = None) -> None:
        import zoo
        from zoo.cli.arguments import pick_device

        self.device, self.task = pick_device(device), task
        self.model = zoo.create_model(name, pretrained=True).to(self.device).eval()
        does = getattr(self.model, "command", None)
        if does != task:
            hint = f": use --task {does}" if does else ""
            raise ValueError(f"'{name}' is no model of --task {task}{hint}.")

    def __call__(self, pixels, least_score: float):
        """Predict an image.

        Args:
            pixels: `[3, H, W]` uint8.
            least_score: Boxes with a lower score are left out.

        Returns:
            What was found, ready for JSON, and a picture of it, `[3, H, W]` uint8.
        """
        result = self.model.predict((pixels / 255).to(self.device))
        if self.task == "segment":
            return self._segments(pixels, result.cpu())
        return self._boxes(pixels, {key: x.cpu() for key, x in result.items()}, least_score)

    def _segments(self, pixels, labels):
        import torch
        from torchvision.utils import draw_segmentation_masks

        counts = torch.bincount(labels.flatten(), minlength=self.model.num_classes)
        shares = (counts / labels.numel()).tolist()
        present = [k for k in range(self.model.num_classes) if counts[k]]
        segments = [{"index": k, "label": self.model.classes[k], "share": round(shares[k], 4)} for k in present]
        # The background stays as it is.
        drawn = [k for k in present if self.model.classes[k] != "background"]
        if not drawn:
            return {"segments": segments}, pixels
        masks = torch.stack([labels == k for k in drawn])
        return {"segments": segments}, draw_segmentation_masks(pixels, masks, colors=[_colour(k) for k in drawn])

    def _boxes(self, pixels, found, least_score: float):
        from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

        kept = found["scores"] >= least_score
        found = {key: x[kept] for key, x in found.items()}
        scores, labels = found["scores"].tolist(), found["labels"].tolist()
        boxes = [
            {
                "label": self.model.classes[label],
                "score": round(score, 4),
                **dict(zip(("x1", "y1", "x2", "y2"), (round(v, 2) for v in corners), strict=True)),
            }
            for label, score, corners in zip(labels, scores, found["boxes"].tolist(), strict=True)
        ]
        if not boxes:
            return {"boxes": boxes}, pixels
        colours = [_colour(label) for label in labels]
        if "masks" in found:
            pixels = draw_segmentation_masks(pixels, found["masks"], colors=colours, alpha=0.5)
        names = [f"{row['label']} {row['score']:.2f}" for row in boxes]
        return {"boxes": boxes}, draw_bounding_boxes(pixels, found["boxes"], names, colours, width=2)


def _colour(label: int) -> tuple[int, int, int]:
    """A bright colour of a class; neighbours in the list differ most."""
    import colorsys

    # Steps of the golden angle.
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 1.0))


def _write(record: dict, picture) -> None:
    """Write FILE.TASK.json and FILE.TASK.png."""
    from torchvision.transforms.v2.functional import to_pil_image

    path = Path(record["picture"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    to_pil_image(picture).save(path)


def _table(results: list[dict], task: str):
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "found", "picture")
    for record in results:
        if task == "segment":
            found = ", ".join(f"{row['label']} {row['share']:.0%}" for row in record["segments"])
        else:
            found = ", ".join(f"{row['label']} {row['score']:.2f}" for row in record["boxes"])
        # Text objects, because brackets in a file name are markup to rich.
        table.add_row(Text(record["image"]), Text(found or "nothing"), Text(record["picture"]))
    return table
