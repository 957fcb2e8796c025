"""`zoo predict` on point clouds: boxes as JSON and a picture from above."""

import argparse
import json
from pathlib import Path

# File kinds of `zoo.train.lidar.formats`, here without its imports.
SUFFIXES = (".bin", ".npz", ".npy", ".pcd")
# Height of the ground below nuScenes' sensor, metres.
_NUSCENES_GROUND = -1.84


def run(paths: list[Path], failures: list[str], args: argparse.Namespace) -> int:
    """Detect objects in each file and write what was found.

    Args:
        paths: Point cloud files.
        failures: Messages about arguments that named nothing; printed with those about files.
        args: Of the command.
    """
    from zoo.cli.predict import report
    from zoo.train.lidar.formats import read_points

    detector = Detector(args.model, args.device) if paths else None
    results = []
    for path in paths:
        try:
            cloud = read_points(path)
        except (OSError, ValueError) as error:
            failures.append(" ".join(str(error).split()))
            continue
        record = {"file": str(path), "model": args.model, **detector.predict(cloud, args.score)}
        record["picture"] = str(args.out / f"{path.name}.png")
        _write(record, cloud, detector.classes)
        results.append(record)
    return report(results, failures, args.json, lambda: _table(results, detector.classes))


class Detector:
    """A pretrained point cloud detector.

    Args:
        name: What `zoo.create_model` takes.
        device: Torch device; None means CUDA where present.

    Raises:
        ValueError: The model is no detector of point clouds.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        import zoo
        from zoo.cli.arguments import pick_device

        self.device = pick_device(device)
        self.model = zoo.create_model(name, pretrained=True).to(self.device).eval()
        if not hasattr(self.model, "point_features"):
            raise ValueError(f"'{name}' takes images, not point clouds.")
        self.classes = tuple(self.model.classes)

    def predict(self, cloud, least_score: float) -> dict:
        """Find objects.

        Args:
            cloud: A `zoo.train.lidar.formats.PointCloud`; its ground may lie at any height.
            least_score: Boxes with a lower score are left out.

        Returns:
            `ground`, the height of the ground in the file (metres), and `boxes`, best first, in the file's coordinates.
        """
        import torch

        from zoo.train.lidar.formats import ground_level, model_columns

        points = model_columns(cloud, self.model.point_features)
        ground = ground_level(points)
        # Models of nuScenes see the world from the sensor, the others from the ground.
        shift = ground - (_NUSCENES_GROUND if "time" in self.model.point_features else 0.0)
        points[:, 2] -= shift
        with torch.inference_mode():
            found = self.model([torch.from_numpy(points).to(self.device)])[0]
        order = found.scores.argsort(descending=True, stable=True)
        boxes = []
        for i in order[: int((found.scores >= least_score).sum())].tolist():
            values = [round(float(v), 4) for v in found.boxes[i]]
            values[2] = round(values[2] + shift, 4)
            named = dict(zip(("x", "y", "z", "dx", "dy", "dz", "yaw", "vx", "vy"), values, strict=False))
            label = self.classes[int(found.labels[i])]
            boxes.append({"label": label, "score": round(float(found.scores[i]), 4), **named})
        return {"ground": round(ground, 3), "boxes": boxes}


def _write(record: dict, cloud, classes: tuple[str, ...]) -> None:
    """Write FILE.json and FILE.png."""
    import numpy as np

    from zoo.visualize_bev import draw_bev

    picture = Path(record["picture"])
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.with_suffix(".json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    rows = record["boxes"]
    boxes = np.array([[row[key] for key in ("x", "y", "z", "dx", "dy", "dz", "yaw")] for row in rows]).reshape(-1, 7)
    labels = np.array([classes.index(row["label"]) for row in rows], int)
    scores = np.array([row["score"] for row in rows])
    draw_bev(cloud.points, boxes, labels, scores, classes=classes).save(picture)


def _table(results: list[dict], classes: tuple[str, ...]):
    from rich.table import Table
    from rich.text import Text

    table = Table("point cloud", *classes, "picture")
    for record in results:
        labels = [row["label"] for row in record["boxes"]]
        # Text objects, because brackets in a file name are markup to rich.
        table.add_row(Text(record["file"]), *(str(labels.count(name)) for name in classes), Text(record["picture"]))
    return table
