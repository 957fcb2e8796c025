"""Point clouds, cells and boxes of golden cases, regenerated from their names; dense at the centre, as a scan is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import fill


def _centred(u: np.ndarray) -> np.ndarray:
    """Numbers in [-1, 1) drawn towards zero."""
    return u * np.abs(u)


def _cell(u: np.ndarray, cells: int) -> np.ndarray:
    return np.clip(np.floor((_centred(u) + 1.0) * 0.5 * cells), 0, cells - 1).astype(np.int64)


def _stack(samples: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros((0, 4), np.int64), *samples]))


def pillar_coords(name: str, counts: list[int], nx: int, ny: int) -> Tensor:
    """int64 [N, 4] = (sample, 0, y, x) without repetition, sorted; at most counts[b] rows for sample b."""
    samples = []
    for b, n in enumerate(counts):
        u = fill.uniform(f"{name}:b{b}", 2 * n)
        flat = np.unique(_cell(u[n:], ny) * nx + _cell(u[:n], nx))
        samples.append(np.stack([np.full_like(flat, b), np.zeros_like(flat), flat // nx, flat % nx], 1))
    return _stack(samples)


def voxel_coords(name: str, counts: list[int], nx: int, ny: int, nz: int) -> Tensor:
    """int64 [N, 4] = (sample, z, y, x) without repetition, sorted by (sample, x, y, z)."""
    samples = []
    for b, n in enumerate(counts):
        u = fill.uniform(f"{name}:b{b}", 3 * n)
        z = np.clip(np.floor(u[2 * n :] * u[2 * n :] * nz), 0, nz - 1).astype(np.int64)
        flat = np.unique((_cell(u[:n], nx) * ny + _cell(u[n : 2 * n], ny)) * nz + z)
        samples.append(np.stack([np.full_like(flat, b), flat % nz, flat // nz % ny, flat // (ny * nz)], 1))
    return _stack(samples)


def points(name: str, counts: list[int], pc_range: list[float], num_features: int = 5) -> list[Tensor]:
    """float32 [counts[b], num_features] for each sample: x, y, z within the range, other columns in [0, 1)."""
    x0, y0, z0, x1, y1, z1 = map(float, pc_range)
    clouds = []
    for b, n in enumerate(counts):
        u = fill.uniform(f"{name}:b{b}", num_features * n).reshape(num_features, n)
        columns = [x0 + (x1 - x0) * 0.5 * (_centred(u[0]) + 1.0), y0 + (y1 - y0) * 0.5 * (_centred(u[1]) + 1.0)]
        columns += [z0 + (z1 - z0) * u[2] * u[2], *(0.5 * (row + 1.0) for row in u[3:])]
        clouds.append(torch.from_numpy(np.stack(columns, 1)).float())
    return clouds


def gt_boxes(
    name: str, counts: list[int], pc_range: list[float], num_classes: int, velocity: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes (x, y, z centre, dx, dy, dz, yaw[, vx, vy]), float32, and labels, int64, for each sample."""
    x0, y0, z0, x1, y1, z1 = map(float, pc_range)
    boxes, labels = [], []
    for b, n in enumerate(counts):
        u = fill.uniform(f"{name}:b{b}", 10 * n).reshape(10, n)
        columns = [
            x0 + (x1 - x0) * 0.5 * (u[0] + 1.0),
            y0 + (y1 - y0) * 0.5 * (u[1] + 1.0),
            z0 + (z1 - z0) * 0.25 * (u[2] + 1.0),
            *(2.9 + 2.3 * u[3], 1.45 + 0.95 * u[4], 1.5 + 0.6 * u[5], 3.1 * u[6]),
        ]
        columns += [5.0 * u[7], 5.0 * u[8]] if velocity else []
        boxes.append(torch.from_numpy(np.stack(columns, 1)).float())
        label = np.clip(np.floor((u[9] + 1.0) * 0.5 * num_classes), 0, num_classes - 1)
        labels.append(torch.from_numpy(label.astype(np.int64)))
    return boxes, labels
