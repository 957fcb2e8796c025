"""Pictures of point clouds from above, with boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = (
    *((255, 176, 0), (80, 200, 255), (255, 90, 160), (140, 230, 90), (190, 140, 255)),
    *((255, 120, 60), (60, 220, 190), (230, 230, 90), (150, 170, 255), (220, 150, 110)),
)
TRUTH_COLOUR = (255, 255, 255)
_BACKGROUND = (14, 16, 22)
# Lines are drawn at this multiple of the size and shrunk, which smooths them.
_OVERSAMPLING = 2


def draw_bev(
    points: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None = None,
    *,
    classes: Sequence[str] = (),
    truth: np.ndarray | None = None,
    bounds: tuple[float, float, float, float] | None = None,
    size: int = 1000,
) -> Image.Image:
    """Draw a point cloud from above: x to the right, y up, heights by brightness, a line from each box's centre ahead.

    Args:
        points: [n, 3 or more]: x, y, z, metres; points that are not finite are left out.
        boxes: [k, 7 or more]: centre x, y, z, dx, dy, dz, yaw counter-clockwise from +x.
        labels: [k], colour by class.
        scores: [k], written beside the boxes.
        classes: Names for the legend, those of the labels that occur.
        truth: [j, 7 or more], boxes drawn thin and white below the others.
        bounds: Smallest x and y, largest x and y, metres; None covers 99 % of the points and every box.
        size: Pixels of the longer side.

    Returns:
        RGB image.

    Raises:
        ValueError: Numbers of boxes, labels and scores differ, or the bounds are empty.
    """
    if not len(boxes) == len(labels) == (len(boxes) if scores is None else len(scores)):
        counts = len(boxes), len(labels), None if scores is None else len(scores)
        raise ValueError(f"numbers of boxes, labels and scores differ: {counts}")
    points = np.asarray(points, np.float32)
    points = points[np.isfinite(points[:, :3]).all(1)]
    if bounds is None:
        bounds = _cover(points, boxes)
    canvas = _Canvas(bounds, size * _OVERSAMPLING)
    image = Image.fromarray(canvas.splat(points))
    draw = ImageDraw.Draw(image)
    canvas.rings(draw)
    for box in [] if truth is None else truth:
        canvas.box(draw, box, TRUTH_COLOUR, width=1)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        colour = COLOURS[int(label) % len(COLOURS)]
        canvas.box(draw, box, colour, width=2)
        if scores is not None:
            canvas.text(draw, box, f"{float(scores[i]):.2f}", colour)
    _legend(draw, labels, classes, truth is not None and len(truth) > 0)
    return image.resize((image.width // _OVERSAMPLING, image.height // _OVERSAMPLING), Image.Resampling.BOX)


def _cover(points: np.ndarray, boxes: np.ndarray) -> tuple[float, float, float, float]:
    """Bounds that hold 99 % of the points along each axis, and every box."""
    places = [np.percentile(points[:, :2], q, axis=0) for q in (0.5, 99.5)] if len(points) else []
    places += [np.asarray(box[:2]) + side * max(box[3:5]) for box in boxes for side in (-1, 1)]
    if not places:
        return -10.0, -10.0, 10.0, 10.0
    low, high = np.min(places, axis=0) - 1, np.max(places, axis=0) + 1
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


class _Canvas:
    """From metres to pixels."""

    def __init__(self, bounds: tuple[float, float, float, float], size: int) -> None:
        x0, y0, x1, y1 = bounds
        if not (x1 > x0 and y1 > y0):
            raise ValueError(f"bounds must be (x minimum, y minimum, x maximum, y maximum), got {bounds}")
        self.bounds = bounds
        self.scale = size / max(x1 - x0, y1 - y0)
        self.width, self.height = max(2, round((x1 - x0) * self.scale)), max(2, round((y1 - y0) * self.scale))

    def pixel(self, xy: np.ndarray) -> np.ndarray:
        """Pixel positions (column, row) [..., 2] of places [..., 2]."""
        x0, _, _, y1 = self.bounds
        return np.stack([(xy[..., 0] - x0) * self.scale, (y1 - xy[..., 1]) * self.scale], -1)

    def splat(self, points: np.ndarray) -> np.ndarray:
        """Points as dots, [H, W, 3] uint8; the highest point of a pixel shows."""
        out = np.full((self.height, self.width, 3), _BACKGROUND, np.uint8)
        pixel = np.floor(self.pixel(points[:, :2])).astype(np.int64)
        inside = ((pixel >= 0) & (pixel < (self.width - 1, self.height - 1))).all(1)
        pixel, z = pixel[inside], points[inside, 2]
        if not len(z):
            return out
        low, high = np.percentile(z, 2), np.percentile(z, 98)
        light = np.clip((z - low) / max(high - low, 1e-3), 0, 1)[:, None]
        colour = np.array([70, 80, 105]) * (1 - light) + np.array([205, 215, 225]) * light
        order = np.argsort(z, kind="stable")
        pixel, colour = pixel[order], colour[order]
        for dx in range(_OVERSAMPLING):
            for dy in range(_OVERSAMPLING):
                out[pixel[:, 1] + dy, pixel[:, 0] + dx] = colour
        return out

    def rings(self, draw: ImageDraw.ImageDraw) -> None:
        """Circles around the sensor every 10, 20 or 50 metres, with their radius."""
        x0, y0, x1, y1 = self.bounds
        farthest = max(math.hypot(x, y) for x in (x0, x1) for y in (y0, y1))
        step = next((s for s in (10, 20, 50, 100) if farthest / s <= 8), 200)
        for i in range(1, int(farthest / step) + 1):
            (left, bottom), (right, top) = self.pixel(np.array([[-1.0, -1.0], [1.0, 1.0]]) * i * step)
            draw.ellipse((left, top, right, bottom), outline=(48, 54, 66), width=_OVERSAMPLING)
            draw.text((right + 4, (top + bottom) / 2), f"{i * step} m", fill=(120, 130, 150), font=_font(11))

    def box(self, draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
        """Outline, and a line from the centre past the front."""
        x, y, _, dx, dy, _, yaw = (float(v) for v in box[:7])
        ahead, left = np.array([math.cos(yaw), math.sin(yaw)]), np.array([-math.sin(yaw), math.cos(yaw)])
        centre = np.array([x, y])
        corners = [centre + a * dx / 2 * ahead + b * dy / 2 * left for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
        outline = [tuple(p) for p in self.pixel(np.array([*corners, corners[0]]))]
        draw.line(outline, fill=colour, width=width * _OVERSAMPLING, joint="curve")
        nose = self.pixel(np.stack([centre, centre + (dx / 2 + 0.6) * ahead]))
        draw.line([tuple(p) for p in nose], fill=colour, width=width * _OVERSAMPLING)

    def text(self, draw: ImageDraw.ImageDraw, box: np.ndarray, text: str, colour: tuple[int, int, int]) -> None:
        """Text to the right of a box."""
        reach = float(np.hypot(box[3], box[4])) / 2
        column, row = self.pixel(np.array([float(box[0]) + reach, float(box[1])]))
        draw.text((column + 4, row), text, fill=colour, font=_font(11), anchor="lm")


def _legend(draw: ImageDraw.ImageDraw, labels: np.ndarray, classes: Sequence[str], truth: bool) -> None:
    rows = [
        (classes[label] if label < len(classes) else f"class {label}", COLOURS[label % len(COLOURS)])
        for label in sorted({int(label) for label in labels})
    ]
    if truth:
        rows.append(("ground truth", TRUTH_COLOUR))
    for i, (name, colour) in enumerate(rows):
        top = 12 + 36 * i
        draw.rectangle((12, top, 36, top + 24), fill=colour)
        draw.text((46, top + 12), name, fill=(225, 230, 240), font=_font(13), anchor="lm")


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * _OVERSAMPLING)
