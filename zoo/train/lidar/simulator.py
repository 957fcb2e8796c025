"""A simulated spinning LiDAR: rays against the bodies of a scene, with occlusion, noise, drop-out and intensity.

Layouts are drawn on the CPU (a few hundred numbers a frame); rays are traced in torch on any device, many frames at
once. A body meets only the columns of rays that its outline covers, so that a frame costs some hundred thousand
intersections rather than rays times bodies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.train.lidar.frames import Frame
from zoo.train.lidar.scenes import BOX, ELLIPSOID, Layout, Parts, draw_layout

# Sensor and layout draw from streams of their own.
_LAYOUT, _SENSOR, _RAYS = range(3)


@dataclass(frozen=True)
class SpinningSensor:
    """A spinning sensor; of each pair every frame draws a value in between.

    Attributes:
        columns: Firings a turn.
        beams: Beams, one above the other at equal angles.
        lowest, highest: Elevation of the lowest and of the highest beam, degrees.
        height: Above the ground, metres.
        max_range: Farthest echo, metres.
        range_noise: Standard deviation of a distance, metres.
        drop: Share of echoes lost, besides those lost with distance.
    """

    columns: int = 1080
    beams: tuple[int, int] = (40, 64)
    lowest: tuple[float, float] = (-26.0, -20.0)
    highest: tuple[float, float] = (1.0, 5.0)
    height: tuple[float, float] = (1.6, 2.1)
    max_range: float = 75.0
    range_noise: float = 0.015
    drop: float = 0.03


# A body that no ray meets, the last one of every batch: rays that hit no other may point at it.
_NOTHING = Parts(
    np.array([BOX]), np.array([[1e3, 0, -1e3]]), np.full((1, 3), 1e-3), np.zeros(1), np.zeros((1, 3)), np.array([-1])
)


class _Batch(NamedTuple):
    """What rays are traced against, on the device. `B` frames, `L` beams, `A` columns, `P` parts of all frames."""

    kind: Tensor  # [P]
    frame: Tensor  # [P]
    number: Tensor  # [P] among the parts of its frame
    centre: Tensor  # [P, 3] relative to the sensor
    half: Tensor  # [P, 3]
    heading: Tensor  # [P, 2] cosine and sine of yaw
    look: Tensor  # [P, 3]
    owner: Tensor  # [P] number among the objects of all frames, the last one for clutter
    part: Tensor  # [K] part of each pair (part, column)
    column: Tensor  # [K]
    directions: Tensor  # [B, A, L, 3]
    present: Tensor  # [B, L] beams that the sensor has
    height: Tensor  # [B]
    slope: Tensor  # [B, 2]
    waves: Tensor  # [B, 3, 4]
    seeds: Tensor  # [B]


class LidarSimulator:
    """Frames of simulated street scenes as a function of a seed and an index.

    The draws do not depend on the device or on which frames are made together; coordinates agree between devices up to
    rounding.

    Args:
        seed: Of the set of frames; different seeds give unrelated scenes.
        extent: Objects stand within this distance of the sensor in x and y, metres.
        sensor: Beams, columns, noise.
        min_points: Objects with fewer echoes are not labelled.
        device: Where rays are traced and frames returned.
    """

    def __init__(
        self,
        seed: int = 0,
        extent: float = 50.0,
        sensor: SpinningSensor | None = None,
        min_points: int = 5,
        device: torch.device | str = "cpu",
    ) -> None:
        if extent <= 5:
            raise ValueError(f"extent must exceed 5 m, the sensor's own vehicle, got {extent}")
        self.seed, self.extent, self.min_points = seed, extent, min_points
        self.sensor = sensor or SpinningSensor()
        self.device = torch.device(device)

    def __getitem__(self, index: int) -> Frame:
        """Frame of an index."""
        return self.frames([index])[0]

    def layout(self, index: int) -> Layout:
        """The scene of an index, with the objects that the sensor does not see."""
        return draw_layout(np.random.default_rng((self.seed, index, _LAYOUT)), self.extent)

    def frames(self, indices: Sequence[int], layouts: Sequence[Layout] | None = None) -> list[Frame]:
        """Frames of several indices, traced together.

        Args:
            indices: Any numbers from 0.
            layouts: What `layout` gives for them, where that has been computed before.

        Returns:
            For each index its frame: points [n, 5] float32 (x, y, z, tanh of intensity, 0; z is 0 at the ground below
            the sensor), boxes [k, 7] of the objects with at least `min_points` echoes, labels [k] (`CLASSES`).
        """
        layouts = [self.layout(index) for index in indices] if layouts is None else layouts
        if not layouts:
            return []
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            points, counts, hits = self._measure(self._batch(layouts, indices))
        boxes = torch.from_numpy(np.concatenate([layout.boxes for layout in layouts])).to(self.device)
        labels = torch.from_numpy(np.concatenate([layout.labels for layout in layouts])).to(self.device)
        sizes = [len(layout.boxes) for layout in layouts]
        seen = hits[: len(boxes)] >= self.min_points
        return [
            Frame(p, b[s], ids[s])
            for p, b, ids, s in zip(
                points.split(counts), boxes.split(sizes), labels.split(sizes), seen.split(sizes), strict=True
            )
        ]

    def _batch(self, layouts: Sequence[Layout], indices: Sequence[int]) -> _Batch:
        sensors = [self._draw_sensor(index) for index in indices]
        count = [*(len(layout.parts.kind) for layout in layouts), 1]
        frame = np.repeat([*range(len(layouts)), 0], count)
        heights = np.array([height for _, height, _ in sensors])
        parts = Parts(
            *(np.concatenate(field) for field in zip(*(layout.parts for layout in layouts), _NOTHING, strict=True))
        )
        centre = parts.centre - np.stack([np.zeros_like(frame), np.zeros_like(frame), heights[frame]], 1)
        objects = np.cumsum([0, *(len(layout.boxes) for layout in layouts)])
        owner = np.where(parts.owner < 0, objects[-1], parts.owner + objects[frame])
        part, column = self._pairs(parts, np.array([offset for _, _, offset in sensors])[frame])
        directions, present = self._directions(sensors)

        def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, dtype)

        return _Batch(
            tensor(parts.kind, torch.int64), tensor(frame, torch.int64),
            tensor(np.concatenate([np.arange(n) for n in count]), torch.int64), tensor(centre), tensor(parts.half),
            tensor(np.stack([np.cos(parts.yaw), np.sin(parts.yaw)], 1)), tensor(parts.look),
            tensor(owner, torch.int64), tensor(part, torch.int64), tensor(column, torch.int64),
            tensor(directions), tensor(present, torch.bool), tensor(heights),
            tensor(np.stack([layout.slope for layout in layouts])),
            tensor(np.stack([layout.waves for layout in layouts])),
            tensor(np.array([self._ray_seed(index) for index in indices]), torch.int64),
        )  # fmt: skip

    def _ray_seed(self, index: int) -> int:
        return int(np.random.SeedSequence((self.seed, index, _RAYS)).generate_state(1)[0])

    def _draw_sensor(self, index: int) -> tuple[np.ndarray, float, float]:
        """Elevations [L] in radians, height, and angle of the first column."""
        rng, sensor = np.random.default_rng((self.seed, index, _SENSOR)), self.sensor
        beams = int(rng.integers(sensor.beams[0], sensor.beams[1] + 1))
        lowest, highest = rng.uniform(*sensor.lowest), rng.uniform(*sensor.highest)
        elevation = np.radians(np.linspace(lowest, highest, beams))
        return elevation, rng.uniform(*sensor.height), rng.uniform(0, 2 * np.pi)

    def _directions(self, sensors: list[tuple[np.ndarray, float, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of rays [B, A, L, 3] and the beams that exist [B, L]."""
        columns, most = self.sensor.columns, self.sensor.beams[1]
        directions = np.zeros((len(sensors), columns, most, 3), np.float32)
        present = np.zeros((len(sensors), most), bool)
        for b, (elevation, _, offset) in enumerate(sensors):
            azimuth = offset + np.arange(columns) * (2 * np.pi / columns)
            flat = np.cos(elevation)
            directions[b, :, : len(elevation), 0] = np.cos(azimuth)[:, None] * flat
            directions[b, :, : len(elevation), 1] = np.sin(azimuth)[:, None] * flat
            directions[b, :, : len(elevation), 2] = np.sin(elevation)
            # Beams that do not exist look along an axis; nothing of them is kept.
            directions[b, :, len(elevation) :, 0] = 1
            present[b, : len(elevation)] = True
        return directions, present

    def _pairs(self, parts: Parts, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each part with each column of rays that its outline covers: indices [K] and [K]."""
        columns = self.sensor.columns
        signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
        local = signs * parts.half[:, None, :2]
        cos, sin = np.cos(parts.yaw)[:, None], np.sin(parts.yaw)[:, None]
        x = local[..., 0] * cos - local[..., 1] * sin + parts.centre[:, None, 0]
        y = local[..., 0] * sin + local[..., 1] * cos + parts.centre[:, None, 1]
        middle = np.arctan2(parts.centre[:, 1], parts.centre[:, 0])
        # [P, 4] angles of the corners from the middle; a body that does not hold the sensor spans less than half a turn
        turn = (np.arctan2(y, x) - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
        step = 2 * np.pi / columns
        first = np.ceil((middle - offset + turn.min(1)) / step).astype(np.int64)
        last = np.floor((middle - offset + turn.max(1)) / step).astype(np.int64)
        width = np.clip(last - first + 1, 0, columns)
        part = np.repeat(np.arange(len(width)), width)
        within = np.arange(len(part)) - np.repeat(np.cumsum(width) - width, width)
        return part, (first[part] + within) % columns

    def _measure(self, batch: _Batch) -> tuple[Tensor, list[int], Tensor]:
        """Points of all frames [N, 5], their number in each, and echoes from each object."""
        frames, columns, beams, _ = batch.directions.shape
        ray = torch.arange(columns * beams, device=self.device).view(1, columns, beams)
        distance, part = self._nearest_part(batch, ray)
        ground = _ground_distance(batch)
        on_ground = ground < distance
        distance = torch.where(on_ground, ground, distance)
        intensity = self._intensity(batch, distance, part, on_ground)
        noise = _normal(batch.seeds.view(-1, 1, 1), ray, 1)
        rough = torch.where(on_ground, 0.0, batch.look[part, 2])
        measured = distance + noise * (self.sensor.range_noise**2 + rough**2).sqrt()
        echo = (measured > 1.0) & (measured < self.sensor.max_range) & batch.present[:, None]
        # Faint echoes get lost more often.
        faint = 0.25 * (measured / self.sensor.max_range) ** 2 * (1 - intensity.clamp(0, 1))
        echo &= _uniform(batch.seeds.view(-1, 1, 1), ray, 3) >= self.sensor.drop + faint
        # [B, A, L, 3]
        xyz = measured[..., None] * batch.directions
        xyz[..., 2] += batch.height.view(-1, 1, 1)
        points = torch.cat([xyz, intensity.tanh()[..., None], torch.zeros_like(intensity)[..., None]], -1)
        owner = torch.where(echo & ~on_ground, batch.owner[part], batch.owner[-1])
        hits = torch.bincount(owner.flatten())
        hits = torch.nn.functional.pad(hits, (0, len(batch.owner)))
        return points[echo], echo.sum((1, 2)).tolist(), hits

    def _nearest_part(self, batch: _Batch, ray: Tensor) -> tuple[Tensor, Tensor]:
        """Distance [B, A, L] to the first body of each ray (infinite where none) and its part."""
        frames, columns, beams, _ = batch.directions.shape
        frame = batch.frame[batch.part]
        # [K, L, 3]
        directions = batch.directions[frame, batch.column]
        near = _intersect(
            directions, batch.centre[batch.part], batch.half[batch.part], batch.heading[batch.part],
            batch.kind[batch.part],
        )  # fmt: skip
        seeds = batch.seeds[frame] ^ (batch.number[batch.part] * 2654435761)
        passing = _uniform(seeds[:, None], ray[0, batch.column], 0) < batch.look[batch.part, 1, None]
        near = torch.where(passing, torch.inf, near)
        # Positive floats sort like their bits; below them the part, so that one minimum finds both.
        key = (near.view(torch.int32).long() << 32) | batch.part[:, None]
        nothing = int(torch.tensor(torch.inf).view(torch.int32)) << 32
        flat = torch.full((frames * columns, beams), nothing, device=self.device)
        place = (frame * columns + batch.column)[:, None].expand_as(key)
        flat = flat.scatter_reduce(0, place, key, "amin")
        distance = (flat >> 32).int().view(torch.float32).view(frames, columns, beams)
        return distance, (flat & 0xFFFFFFFF).view(frames, columns, beams)

    def _intensity(self, batch: _Batch, distance: Tensor, part: Tensor, on_ground: Tensor) -> Tensor:
        """Intensity [B, A, L] in 0..1: reflectivity times cosine of incidence, with speckle."""
        directions = batch.directions
        finite = torch.where(distance.isfinite(), distance, 0.0)
        facing = _facing(directions, finite, batch, part)
        reflectivity = torch.where(on_ground, 0.2, batch.look[part, 0])
        facing = torch.where(on_ground, directions[..., 2].abs().sqrt(), facing)
        ray = torch.arange(directions.shape[1] * directions.shape[2], device=self.device)
        speckle = _uniform(batch.seeds.view(-1, 1, 1), ray.view(1, *directions.shape[1:3]), 4)
        return (reflectivity * (0.2 + 0.8 * facing) * (0.8 + 0.4 * speckle)).clamp(0, 1)


def _to_local(vectors: Tensor, heading: Tensor) -> Tensor:
    """Turn vectors [..., 3] into the frame of a heading [..., 2]."""
    cos, sin = heading.unbind(-1)
    x, y, z = vectors.unbind(-1)
    return torch.stack([x * cos + y * sin, y * cos - x * sin, z], -1)


def _intersect(directions: Tensor, centre: Tensor, half: Tensor, heading: Tensor, kind: Tensor) -> Tensor:
    """Distance at which rays from the origin enter convex bodies, [K, L], infinite where they miss.

    Args:
        directions: [K, L, 3] unit vectors.
        centre, half: [K, 3].
        heading: [K, 2].
        kind: [K].
    """
    # In these coordinates the body is the cube, cylinder or ball of half size 1.
    start = (_to_local(-centre, heading) / half)[:, None]
    step = _to_local(directions, heading[:, None]) / half[:, None]
    step = torch.where(step.abs() < 1e-9, 1e-9, step)
    sides = torch.stack([(-1 - start) / step, (1 - start) / step])
    enter, leave = sides.amin(0), sides.amax(0)
    # Circle of x and y, or ball with z.
    weight = torch.stack([torch.ones_like(half[:, 0])] * 2 + [(kind == ELLIPSOID).to(half)], -1)[:, None]
    a, b = (weight * step * step).sum(-1), (weight * step * start).sum(-1)
    c = (weight * start * start).sum(-1) - 1
    root = b * b - a * c
    missed = root < 0
    root = root.clamp(min=0).sqrt()
    is_box = (kind == BOX)[:, None]
    flat_enter = torch.where(is_box, enter[..., :2].amax(-1), torch.where(missed, torch.inf, (-b - root) / a))
    flat_leave = torch.where(is_box, leave[..., :2].amin(-1), torch.where(missed, -torch.inf, (-b + root) / a))
    near = torch.maximum(flat_enter, enter[..., 2])
    far = torch.minimum(flat_leave, leave[..., 2])
    return torch.where((near < far) & (near > 0), near, torch.inf)


def _facing(directions: Tensor, distance: Tensor, batch: _Batch, part: Tensor) -> Tensor:
    """Cosine between ray and surface normal at the place that was hit, [B, A, L]."""
    half, heading = batch.half[part], batch.heading[part]
    direction = _to_local(directions, heading)
    place = _to_local(distance[..., None] * directions - batch.centre[part], heading) / half
    # A box is hit on the side along which the place is outermost.
    side = torch.nn.functional.one_hot(place.abs().argmax(-1), 3).to(half)
    kind = batch.kind[part]
    # The lid of a cylinder is hit where the place lies at its top.
    lid = (kind != ELLIPSOID) & (place[..., 2].abs() > 0.999)
    up = torch.zeros_like(place)
    up[..., 2] = 1
    round_normal = place / half
    round_normal[..., 2] *= (kind == ELLIPSOID).to(half)
    round_normal = torch.nn.functional.normalize(round_normal, dim=-1)
    normal = torch.where((kind == BOX)[..., None], side, torch.where(lid[..., None], up, round_normal))
    return (normal * direction).sum(-1).abs()


def _ground_distance(batch: _Batch) -> Tensor:
    """Distance to the ground along each ray, [B, A, L], infinite above the horizon."""
    x, y, z = batch.directions.unbind(-1)
    slope, height = batch.slope[:, :, None, None], batch.height.view(-1, 1, 1)
    fall = slope[:, 0] * x + slope[:, 1] * y - z
    down = fall > 1e-3
    fall = torch.where(down, fall, 1.0)
    kx, ky, phase, amplitude = (w[:, :, None, None] for w in batch.waves.unbind(-1))  # [B, 3, 1, 1]
    distance = height / fall
    # The waves are flatter than the rays that reach them, so that this converges.
    for _ in range(4):
        px, py = (distance * x)[:, None], (distance * y)[:, None]
        bump = (amplitude * (torch.sin(kx * px + ky * py + phase) - torch.sin(phase))).sum(1)
        distance = ((height - bump) / fall).clamp(min=0)
    return torch.where(down, distance, torch.inf)


def _hash(x: Tensor) -> Tensor:
    """Mix 32-bit numbers (in int64) so that neighbours become unrelated."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _uniform(seeds: Tensor, rays: Tensor, stream: int) -> Tensor:
    """Numbers in [0, 1) as a function of the frame's seed, the ray and the purpose; shapes broadcast."""
    mixed = _hash(_hash((seeds + stream * 0x9E3779B9) & 0xFFFFFFFF) ^ _hash(rays + 1))
    return (mixed >> 8).float() / 2**24


def _normal(seeds: Tensor, rays: Tensor, stream: int) -> Tensor:
    """Normal numbers, from the streams `stream` and `stream + 1`."""
    radius = (-2 * torch.log1p(-_uniform(seeds, rays, stream))).sqrt()
    return radius * torch.cos(2 * math.pi * _uniform(seeds, rays, stream + 1))
