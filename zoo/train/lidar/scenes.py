"""Layouts of street scenes: what stands where, as boxes, cylinders and ellipsoids for the simulated sensor.

A scene is a straight road with parked and moving cars, perhaps a crossing road, pavements with pedestrians, cyclists,
and behind them walls, trees, poles, hedges and crates. Everything follows from a random generator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zoo.train.lidar.geometry import first_fit

CLASSES = ("car", "pedestrian", "cyclist")
BOX, CYLINDER, ELLIPSOID = 0, 1, 2


class Parts(NamedTuple):
    """Convex bodies, one a row, that rays are tested against.

    Attributes:
        kind: [P] int64: box, upright elliptic cylinder or ellipsoid.
        centre: [P, 3] metres.
        half: [P, 3] half sizes, metres.
        yaw: [P] radians.
        look: [P, 3]: reflectivity in 0..1, share of rays that pass through, roughness (standard deviation of the
            surface along a ray, metres).
        owner: [P] int64: number of the object it belongs to, -1 for clutter.
    """

    kind: np.ndarray
    centre: np.ndarray
    half: np.ndarray
    yaw: np.ndarray
    look: np.ndarray
    owner: np.ndarray


class Layout(NamedTuple):
    """A scene before it is measured.

    Attributes:
        parts: What rays can hit, besides the ground.
        boxes: [K, 7] float32, boxes of the objects as in `Frame`.
        labels: [K] int64, index into `CLASSES`.
        slope: [2], rise of the ground along x and y.
        waves: [3, 4], waves of the ground: wave vector (2), phase, amplitude.
    """

    parts: Parts
    boxes: np.ndarray
    labels: np.ndarray
    slope: np.ndarray
    waves: np.ndarray


def ground_height(x: np.ndarray, y: np.ndarray, slope: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """Height of the ground, metres; zero at the origin."""
    height = slope[0] * x + slope[1] * y
    for kx, ky, phase, amplitude in waves:
        height = height + amplitude * (np.sin(kx * x + ky * y + phase) - np.sin(phase))
    return height


def draw_layout(rng: np.random.Generator, extent: float) -> Layout:
    """Draw a scene around the origin, where the sensor stands.

    Args:
        rng: Source of every draw.
        extent: Objects stand within this distance of the origin in x and y, metres.
    """
    slope = rng.normal(0, 0.006, 2)
    waves = _draw_waves(rng)
    road = _Road(rng, extent)
    boxes, labels = _place_objects(rng, road)
    clutter, kinds = _place_clutter(rng, road)
    # Clutter gives way to objects, and everything to the sensor's own vehicle.
    vehicle = np.array([[0, 0, 0, 6.0, 4.0, 2.0, road.yaw]])
    everything = np.concatenate([vehicle, boxes, clutter])
    margin = np.zeros_like(everything)
    margin[:, 3:5] = 0.3
    kept = first_fit(everything + margin)[1:]
    inside = (np.abs(everything[1:, :2]) < extent).all(1)
    kept[: len(boxes)] &= inside[: len(boxes)]
    boxes, labels = boxes[kept[: len(boxes)]], labels[kept[: len(boxes)]]
    kept = kept[-len(clutter) :] if len(clutter) else kept[:0]
    clutter, kinds = clutter[kept], kinds[kept]
    for group in (boxes, clutter):
        group[:, 2] = ground_height(group[:, 0], group[:, 1], slope, waves) + group[:, 5] / 2
    parts = _Builder(rng)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        (parts.add_car, parts.add_pedestrian, parts.add_cyclist)[label](box, i)
    for box, kind in zip(clutter, kinds, strict=True):
        parts.add_clutter(box, kind)
    return Layout(parts.build(), boxes.astype(np.float32), labels, slope, waves)


def _draw_waves(rng: np.random.Generator) -> np.ndarray:
    length, direction = rng.uniform(20, 60, 3), rng.uniform(0, 2 * np.pi, 3)
    number = 2 * np.pi / length
    # Steeper waves than this would hide ground behind ground, which the sensor model leaves out.
    amplitude = rng.uniform(0, 0.003, 3) / number
    return np.stack([number * np.cos(direction), number * np.sin(direction), rng.uniform(0, 6.28, 3), amplitude], 1)


class _Road:
    """A straight road past the origin, and places along it."""

    def __init__(self, rng: np.random.Generator, extent: float) -> None:
        self.yaw = rng.uniform(0, 2 * np.pi)
        self.half_width = rng.uniform(4.0, 9.0)
        self.offset = rng.uniform(-0.6, 0.6) * self.half_width
        self.extent = extent
        self.length = 1.4 * extent

    def place(self, along: np.ndarray, across: np.ndarray, yaw: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Boxes [k, 7] from road coordinates; `yaw` is relative to the road, `size` [k, 3]."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        across = across - self.offset
        x, y = along * cos - across * sin, along * sin + across * cos
        return np.column_stack([x, y, np.zeros_like(x), size, yaw + self.yaw])

    def spread(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.uniform(-self.length, self.length, count)


def _sides(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.choice([-1.0, 1.0], count)


def _car_sizes(rng: np.random.Generator, count: int) -> np.ndarray:
    van = rng.random(count) < 0.15
    low = np.where(van[:, None], [4.6, 1.85, 1.85], [3.6, 1.6, 1.4])
    high = np.where(van[:, None], [6.0, 2.15, 2.5], [5.0, 1.95, 1.75])
    return rng.uniform(low, high)


def _place_objects(rng: np.random.Generator, road: _Road) -> tuple[np.ndarray, np.ndarray]:
    groups = [*_place_cars(rng, road), *_place_people(rng, road)]
    boxes = np.concatenate([boxes for boxes, _ in groups])
    labels = np.concatenate([np.full(len(boxes), label) for boxes, label in groups])
    order = rng.permutation(len(boxes))
    boxes = boxes[order]
    boxes[:, 6] = (boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    return boxes, labels[order]


def _place_cars(rng: np.random.Generator, road: _Road) -> list[tuple[np.ndarray, int]]:
    def cars(count: int, along: np.ndarray, across: np.ndarray, yaw: np.ndarray) -> tuple[np.ndarray, int]:
        return road.place(along, across, yaw + rng.normal(0, 0.03, count), _car_sizes(rng, count)), 0

    def directions(side: np.ndarray) -> np.ndarray:
        # Traffic keeps to the right.
        return np.where(side < 0, 0.0, np.pi)

    parked, moving, crossing, loose = (int(rng.integers(0, n)) for n in (22, 12, 7, 5))
    side = _sides(rng, parked)
    facing = directions(side) + np.pi * (rng.random(parked) < 0.2)
    groups = [cars(parked, road.spread(rng, parked), side * (road.half_width - 1.2), facing)]
    side = _sides(rng, moving)
    groups.append(cars(moving, road.spread(rng, moving), side * rng.uniform(1.2, 3.0, moving), directions(side)))
    if rng.random() < 0.5:
        junction, side = rng.uniform(-0.7, 0.7) * road.extent, _sides(rng, crossing)
        lane = junction + side * rng.uniform(1.5, 2.5, crossing)
        groups.append(cars(crossing, lane, road.spread(rng, crossing), directions(-side) + np.pi / 2))
    across = _sides(rng, loose) * (road.half_width + rng.uniform(3, 12, loose))
    groups.append(cars(loose, road.spread(rng, loose), across, rng.uniform(0, 2 * np.pi, loose)))
    return groups


def _place_people(rng: np.random.Generator, road: _Road) -> list[tuple[np.ndarray, int]]:
    walkers, riders = int(rng.integers(2, 16)), int(rng.integers(1, 8))
    on_road = rng.random(walkers) < 0.15
    across = np.where(
        on_road,
        rng.uniform(-1, 1, walkers) * road.half_width,
        _sides(rng, walkers) * (road.half_width + rng.uniform(0.4, 4, walkers)),
    )
    yaw = np.where(rng.random(walkers) < 0.6, np.pi * (rng.random(walkers) < 0.5), rng.uniform(0, 2 * np.pi, walkers))
    size = rng.uniform([0.55, 0.5, 1.5], [1.0, 0.8, 1.95], (walkers, 3))
    pedestrians = road.place(road.spread(rng, walkers), across, yaw + rng.normal(0, 0.2, walkers), size)
    side = _sides(rng, riders)
    across = side * (road.half_width - rng.uniform(-2, 2.5, riders))
    yaw = np.where(side < 0, 0.0, np.pi) + rng.normal(0, 0.15, riders)
    size = rng.uniform([1.6, 0.5, 1.6], [1.9, 0.75, 1.9], (riders, 3))
    return [(pedestrians, 1), (road.place(road.spread(rng, riders), across, yaw, size), 2)]


# Kind of clutter: (most of them a scene, distance from the road's edge, smallest size, largest size)
_CLUTTER = {
    "wall": (14, (5.0, 14.0), (6.0, 0.3, 2.5), (28.0, 8.0, 10.0)),
    "fence": (5, (1.0, 5.0), (4.0, 0.08, 0.9), (15.0, 0.15, 2.0)),
    "tree": (14, (0.5, 9.0), (0.2, 0.2, 4.0), (0.6, 0.6, 9.0)),
    "pole": (14, (0.2, 3.0), (0.1, 0.1, 2.2), (0.35, 0.35, 8.0)),
    "hedge": (8, (0.5, 8.0), (0.7, 0.6, 0.4), (6.0, 1.5, 1.8)),
    "crate": (8, (-0.5, 8.0), (0.4, 0.4, 0.4), (2.2, 1.8, 1.6)),
    "container": (3, (2.0, 10.0), (2.5, 2.0, 1.8), (8.0, 2.5, 3.2)),
    "sign": (5, (0.3, 2.0), (0.12, 0.12, 2.2), (0.2, 0.2, 3.2)),
}


def _place_clutter(rng: np.random.Generator, road: _Road) -> tuple[np.ndarray, np.ndarray]:
    boxes, kinds = [], []
    for kind, (most, (near, far), smallest, largest) in _CLUTTER.items():
        count = int(rng.integers(most // 3, most + 1))
        size = rng.uniform(smallest, largest, (count, 3))
        if kind in ("tree", "pole", "sign"):
            size[:, 1] = size[:, 0]
        across = _sides(rng, count) * (road.half_width + rng.uniform(near, far, count) + size[:, 1] / 2)
        turned = kind in ("crate", "container", "hedge")
        yaw = rng.uniform(0, np.pi, count) if turned else rng.normal(0, 0.03, count)
        boxes.append(road.place(road.spread(rng, count), across, yaw, size))
        kinds += [kind] * count
    return np.concatenate(boxes), np.array(kinds, dtype=object)


class _Builder:
    """Collects the parts of objects; each part is given in the frame of its object's box."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.rows: list[list[float]] = []

    def add(
        self,
        kind: int,
        box: np.ndarray,
        owner: int,
        place: tuple[float, float, float],
        size: tuple[float, float, float],
        look: tuple[float, float, float] = (0.4, 0.0, 0.0),
    ) -> None:
        """Add a part.

        Args:
            kind: Shape.
            box: The object's box, [7].
            owner: The object's number.
            place: Centre in shares of the box's half sizes, each in -1..1.
            size: Size in shares of the box's.
            look: As in `Parts`.
        """
        local = np.array(place) * box[3:6] / 2
        cos, sin = np.cos(box[6]), np.sin(box[6])
        x, y = local[0] * cos - local[1] * sin, local[0] * sin + local[1] * cos
        half = np.array(size) * box[3:6] / 2
        self.rows.append([kind, box[0] + x, box[1] + y, box[2] + local[2], *half, box[6], *look, owner])

    def add_car(self, box: np.ndarray, owner: int) -> None:
        """Body above the wheels, cabin behind a bonnet (a van's cabin reaches to the back)."""
        paint = self.rng.uniform(0.1, 0.9)
        waist = self.rng.uniform(0.5, 0.6)
        van = box[5] > 1.8
        rear, front = -0.98 if van else self.rng.uniform(-0.9, -0.65), self.rng.uniform(0.6, 0.8) if van else 0.35
        clearance = 0.1
        body = waist - clearance
        self.add(BOX, box, owner, (0, 0, clearance + waist - 1), (1, 1, body), (paint, 0, 0))
        # Glass lets half of the light through.
        look = (paint if van else 0.3, 0.1 if van else 0.4, 0.0)
        middle, length = (front + rear) / 2, (front - rear) / 2
        self.add(BOX, box, owner, (middle, 0, waist), (length, 0.86, 1 - waist), look)
        for along in (-0.62, 0.62):
            self.add(BOX, box, owner, (along, 0, clearance - 1), (0.13, 0.96, clearance), (0.08, 0, 0))

    def add_pedestrian(self, box: np.ndarray, owner: int) -> None:
        """Trunk, head, legs in a stride and an arm reaching forward."""
        cloth = (self.rng.uniform(0.1, 0.8), 0.0, 0.01)
        stride = self.rng.uniform(0.1, 0.55)
        arm = self.rng.choice([-1.0, 1.0])
        self.add(CYLINDER, box, owner, (0, 0, 0.35), (0.4, 0.75, 0.38), cloth)
        self.add(ELLIPSOID, box, owner, (0.05, 0, 0.85), (0.32, 0.3, 0.15), (0.5, 0, 0))
        for side, swing in ((arm, -stride), (-arm, stride)):
            self.add(CYLINDER, box, owner, (swing, 0.3 * side, -0.45), (0.24, 0.26, 0.55), cloth)
        self.add(CYLINDER, box, owner, (0.6, 0.85 * arm, 0.2), (0.4, 0.15, 0.3), cloth)

    def add_cyclist(self, box: np.ndarray, owner: int) -> None:
        """Two wheels, a frame, handlebars in front, a rider above the middle leaning forward."""
        cloth = (self.rng.uniform(0.1, 0.8), 0.0, 0.01)
        metal = (self.rng.uniform(0.2, 0.9), 0.0, 0.0)
        for along in (-0.62, 0.62):
            self.add(BOX, box, owner, (along, 0, -0.62), (0.38, 0.08, 0.38), (metal[0], 0.5, 0.0))
        self.add(BOX, box, owner, (0, 0, -0.4), (0.5, 0.1, 0.2), metal)
        self.add(BOX, box, owner, (0.45, 0, 0.1), (0.06, 1.0, 0.05), metal)
        self.add(CYLINDER, box, owner, (-0.15, 0, -0.2), (0.2, 0.5, 0.45), cloth)
        self.add(CYLINDER, box, owner, (-0.05, 0, 0.35), (0.25, 0.75, 0.4), cloth)
        self.add(CYLINDER, box, owner, (0.25, 0, 0.3), (0.3, 0.85, 0.1), cloth)
        self.add(ELLIPSOID, box, owner, (0.08, 0, 0.84), (0.14, 0.3, 0.16), (0.5, 0, 0))

    def add_clutter(self, box: np.ndarray, kind: str) -> None:
        """Whatever a detector must not take for an object."""
        shade = self.rng.uniform(0.1, 0.8)
        if kind == "tree":
            crown = np.array([*box[:2], box[2] + box[5] * 0.25, *self.rng.uniform(2, 5, 2), box[5] * 0.6, box[6]])
            self.add(CYLINDER, box, -1, (0, 0, -0.3), (1, 1, 0.7), (shade, 0, 0.01))
            self.add(ELLIPSOID, crown, -1, (0, 0, 0), (1, 1, 1), (0.3, 0.5, 0.3))
        elif kind == "hedge":
            self.add(ELLIPSOID if box[3] < 2 else BOX, box, -1, (0, 0, 0), (1, 1, 1), (0.3, 0.15, 0.1))
        elif kind == "sign":
            board = np.array([*box[:2], box[2] + box[5] / 2, 0.06, *self.rng.uniform(0.5, 0.9, 2), box[6]])
            self.add(CYLINDER, box, -1, (0, 0, 0), (1, 1, 1), (shade, 0, 0))
            self.add(BOX, board, -1, (0, 0, 0), (1, 1, 1), (1.0, 0, 0))
        elif kind == "pole":
            self.add(CYLINDER, box, -1, (0, 0, 0), (1, 1, 1), (shade, 0, 0))
        else:
            self.add(BOX, box, -1, (0, 0, 0), (1, 1, 1), (shade, 0.6 if kind == "fence" else 0.0, 0.0))

    def build(self) -> Parts:
        rows = np.array(self.rows, np.float64).reshape(-1, 12)
        return Parts(
            rows[:, 0].astype(np.int64), rows[:, 1:4], rows[:, 4:7], rows[:, 7], rows[:, 8:11],
            rows[:, 11].astype(np.int64),
        )  # fmt: skip
