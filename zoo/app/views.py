"""What the tabs of `zoo app` compute: functions of plain values, images and files, without a user interface."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from zoo.hub import HubError

if TYPE_CHECKING:
    from zoo.heads.sparse_vdit.plan import SparsePlan

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
PLAN = ROOT / "weights" / "video_dit_nano.zoo_fashion_mnist" / "plan.json"
# By kind of pattern.
PATTERN_COLOURS = {
    "full": (208, 58, 58),
    "skip": (222, 222, 226),
    "diagonal": (52, 120, 220),
    "multi_diagonal": (52, 168, 96),
    "vertical_stripe": (226, 178, 26),
}
CLASSIFIER = "biformer_nano.zoo_clothing10"
DETECTOR = "flatformer_nano"
SIDE = 384
CELL, GAP, HEADER = 14, 24, 18


def image_models() -> list[str]:
    """Image classifiers whose weights come with this package."""
    import timm

    embedded = {path.parent.name for path in (ROOT / "weights").glob("*/config.json")}
    return sorted(name for name in embedded if timm.is_model(name.partition(".")[0]))


def sample_images() -> list[str]:
    """Photographs that come with this package."""
    return [str(path) for path in sorted(SAMPLES.glob("*.jpg"))]


@functools.lru_cache(maxsize=4)
def _classifier(name: str) -> Any:
    from zoo.cli.predict import Classifier

    return Classifier(name)


def classify(image: Image.Image, model: str, x: float, y: float) -> tuple[dict[str, float], Image.Image, str]:
    """Classify an image and show what a place of it attends to.

    Args:
        image: Any image.
        model: Name with tag, as `zoo.create_model` takes it.
        x: Place from the left, 0 to 1.
        y: Place from the top, 0 to 1.

    Returns:
        Probability by class, a picture of the attention, and what the picture shows.

    Raises:
        ValueError: There is no image, or the place is outside of it.
    """
    if image is None:
        raise ValueError("choose an image first")
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"a place of the image lies in 0 to 1, got {x} and {y}")
    classifier = _classifier(model)
    prepared = classifier.load(image)
    best = next(classifier.predict([prepared], topk=5))
    picture, text = _attention(classifier, prepared, (x, y))
    # Small models see small images.
    factor = max(1, SIDE // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return {item["label"]: item["probability"] for item in best}, picture, text


def _attention(classifier: Any, prepared: Any, place: tuple[float, float]) -> tuple[Image.Image, str]:
    """Picture of the attention of one place, and its description."""
    from zoo.backbones.agent_layers import AgentCore
    from zoo.visualize import agent_maps, routing_maps

    model, seen = classifier.model, _seen(prepared, classifier.config)
    batch = prepared.unsqueeze(0).to(classifier.device)
    if any(isinstance(module, AgentCore) for module in model.modules()):
        return _draw_agents(seen, agent_maps(model, batch), place)
    try:
        maps = routing_maps(model, batch)
    except ValueError:
        return Image.fromarray(seen), "The input of the model: this family has no maps to show."
    return _draw_regions(seen, maps, place)


def _seen(prepared: Any, config: dict[str, Any]) -> np.ndarray:
    """The input of a model [C, H, W] as an RGB image [H, W, 3] of bytes."""
    import torch

    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = ((prepared.cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _cell(grid: tuple[int, int], place: tuple[float, float]) -> int:
    """Number of the cell of a grid at a place (x, y), row by row."""
    row, column = (min(int(at * size), size - 1) for at, size in zip(place[::-1], grid, strict=True))
    return row * grid[1] + column


def _draw_regions(seen: np.ndarray, maps: dict[str, Any], place: tuple[float, float]) -> tuple[Image.Image, str]:
    """Regions that the region at a place selects, in the deepest layer that leaves most out."""
    from zoo.visualize import draw_routing

    sparse = [name for name, routing in maps.items() if routing.index.shape[-1] * 4 <= routing.index.shape[-2]]
    name = (sparse or list(maps))[-1]
    routing = maps[name]
    query = _cell(routing.grid, place)
    selected, weights = routing.index[0, query].tolist(), routing.weight[0, query].tolist()
    picture = draw_routing(seen, routing.grid, query, selected, weights)
    count = routing.grid[0] * routing.grid[1]
    return Image.fromarray(picture), f"{name}: the yellow region attends to {len(selected)} of {count} regions (blue)."


def _draw_agents(seen: np.ndarray, maps: dict[str, Any], place: tuple[float, float]) -> tuple[Image.Image, str]:
    """What the agent at a place gathers, mean of heads, in the deepest layer of many more tokens than agents."""
    from zoo.visualize import draw_attention

    # A class token comes before the grid.
    whole = {name: m for name, m in maps.items() if m.gather.shape[-1] - m.grid[0] * m.grid[1] in (0, 1)}
    if not whole:
        return Image.fromarray(seen), "The input of the model: all of its layers pool their keys."
    many = [key for key, m in whole.items() if m.grid[0] >= 2 * m.agent_grid[0]]
    name = (many or list(whole))[-1]
    layer = whole[name]
    agent = _cell(layer.agent_grid, place)
    weights = layer.gather[0].mean(0)[agent, -layer.grid[0] * layer.grid[1] :].view(layer.grid)
    count = layer.agent_grid[0] * layer.agent_grid[1]
    text = f"{name}: what agent {agent + 1} of {count}, the one at this place, gathers (bright)."
    return Image.fromarray(draw_attention(seen, weights)), text


@functools.lru_cache(maxsize=2)
def _vision_language(folder: str) -> tuple[Any, Any, list[Any]]:
    from zoo.heads.tiny_vlm import load_samples, load_tiny_vlm

    model, processor = load_tiny_vlm(folder or None)
    return model, processor, load_samples(folder or None)


def drop_tokens(folder: str, scene: int, question: str, method: str, budget: float) -> tuple[Any, str]:
    """Let the small vision-language model answer with a share of its visual tokens.

    Args:
        folder: Model folder; empty for the weights that come with this package.
        scene: Number of the sample scene, from 0.
        question: Question; empty for the first one of the scene.
        method: Name of a method of `zoo.heads.token_dropping`.
        budget: Share of the tokens, in (0, 1].

    Returns:
        The scene with dropped patches dark and the answer, or None and what is missing.
    """
    from zoo.cli import vlm_demo

    try:
        model, processor, samples = _vision_language(folder.strip())
    except (FileNotFoundError, ImportError) as error:
        return None, str(error)
    image, asked = samples[int(scene) % len(samples)]
    question = question.strip() or asked[0]["question"]
    answers, _ = vlm_demo._answer(model, processor, [(image, question, "")], method, budget)
    if budget == 1:
        return image, f"{question} {answers[0]} (all tokens)"
    kept = vlm_demo.kept_patches(model, processor, image, method, budget)
    return vlm_demo._shaded(image, kept), f"{question} {answers[0]} ({int(kept.sum())} of {kept.numel()} tokens)"


def show_plan(source: str) -> tuple[Image.Image, str]:
    """Draw the patterns of a sparse plan over layers and heads, and describe it.

    Args:
        source: File, folder or hub repository of a plan; empty for the one of the embedded video model.

    Returns:
        The map, and the report as text.

    Raises:
        FileNotFoundError, ValueError, HubError: There is no such plan, or it is malformed.
    """
    from zoo.heads.sparse_vdit.plan import SparsePlan

    plan = SparsePlan.from_pretrained(source.strip() or PLAN)
    try:
        text = str(plan.report())
    except ValueError as error:
        # A plan may not say which grid it was searched at.
        text = str(error)
    return draw_plan(plan), text


def draw_plan(plan: SparsePlan) -> Image.Image:
    """Map of a plan: a row a layer, a column a head, a block a bin of noise levels, from noise to clean."""
    layers, heads = len(plan.layers), plan.model["heads"]
    width, top = heads * CELL, HEADER
    # Titles of narrow blocks need room too.
    step = max(width, 96) + GAP
    kinds = sorted({pattern["pattern"] for pattern in plan.patterns})
    size = (max(step * plan.num_bins, 150 * len(kinds)), top + layers * CELL + GAP + HEADER)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, b in enumerate(reversed(range(plan.num_bins))):
        left = column * step
        low, high = plan.bins[b : b + 2]
        draw.text((left, 2), f"noise {high:.2f} to {low:.2f}", fill="black")
        for row, ids in enumerate(plan.assign[b]):
            for head, i in enumerate(ids):
                x, y = left + head * CELL, top + row * CELL
                colour = PATTERN_COLOURS[plan.patterns[i]["pattern"]]
                draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour)
    for column, kind in enumerate(kinds):
        x, y = 150 * column, top + layers * CELL + GAP // 2
        draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=PATTERN_COLOURS[kind])
        draw.text((x + CELL + 4, y), kind.replace("_", "-"), fill="black")
    return picture


def point_models() -> list[str]:
    """Detectors in point clouds: those with weights of this package by tag, then all architectures."""
    from zoo import registry

    names = list(registry.entries())
    return [tag for name in names for tag in registry.weights(name)] + names


@functools.lru_cache(maxsize=2)
def _detector(name: str) -> Any:
    from zoo.cli.predict_points import Detector

    return Detector(name)


def detect(file: str | None, scene: int, model: str, score: float) -> tuple[Image.Image, str]:
    """Draw a point cloud from above with the boxes that a detector finds.

    Args:
        file: Point cloud, as `zoo predict` reads it; None for a simulated street scene, whose boxes are drawn white.
        scene: Number of the simulated scene.
        model: Name of a detector.
        score: Least score of a box.

    Returns:
        The picture, and what was found or why nothing was looked for.

    Raises:
        FileNotFoundError, ValueError: The file cannot be read.
    """
    from zoo.visualize_bev import draw_bev

    cloud, truth = _cloud(file, int(scene))
    rows, classes, text = [], (), ""
    try:
        detector = _detector(model)
        classes, rows = detector.classes, detector.predict(cloud, score)["boxes"]
        text = f"{len(rows)} boxes by {model}."
    except HubError as error:
        text = f"Points only, no boxes of {model}: {error}"
    boxes = np.array([[row[key] for key in ("x", "y", "z", "dx", "dy", "dz", "yaw")] for row in rows]).reshape(-1, 7)
    labels = np.array([classes.index(row["label"]) for row in rows], int)
    scores = np.array([row["score"] for row in rows])
    return draw_bev(cloud.points, boxes, labels, scores, classes=classes, truth=truth, size=800), text


def _cloud(file: str | None, scene: int) -> tuple[Any, np.ndarray | None]:
    """A point cloud of a file, or of a simulated scene with its true boxes."""
    from zoo.train.lidar.formats import PointCloud, read_points

    if file:
        return read_points(file), None
    from zoo.train.lidar.simulator import LidarSimulator

    frame = LidarSimulator(seed=0)[scene]
    points = frame.points[:, :4].numpy()
    # Files hold the intensity itself, of which detectors take tanh.
    points[:, 3] = np.arctanh(points[:, 3].clip(0, 0.999))
    return PointCloud(points, ("x", "y", "z", "intensity")), frame.boxes.numpy()
