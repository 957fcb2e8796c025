"""Read point cloud files: KITTI and nuScenes .bin, .npz, .npy and .pcd."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

SUFFIXES = (".bin", ".npz", ".npy", ".pcd")
_XYZI = ("x", "y", "z", "intensity")
_PCD_TYPES = {"F4": "f4", "F8": "f8", "U1": "u1", "U2": "u2", "U4": "u4", "I1": "i1", "I2": "i2", "I4": "i4"}
_PCD_TYPES |= {"U8": "u8", "I8": "i8"}


class PointCloud(NamedTuple):
    """Points as a file has them.

    Attributes:
        points: [n, C] float32.
        columns: C names; the first three are x, y, z.
    """

    points: np.ndarray
    columns: tuple[str, ...]


def read_points(path: str | Path, columns: int | None = None) -> PointCloud:
    """Read a point cloud.

    Args:
        path: `.bin` (float32 records: KITTI's x, y, z, intensity or nuScenes' with the ring added), `.npz` (an array
            `points` [n, C], optionally `columns`, its names), `.npy` ([n, C]) or `.pcd` (ascii or binary).
        columns: Columns of a `.bin` file; None tells them from the file's name, size and content.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is of another kind, or lacks coordinates.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist.")
    readers = {".npz": _read_npz, ".npy": _read_npy, ".pcd": _read_pcd}
    suffix = path.suffix.lower()
    if suffix == ".bin":
        cloud = _read_bin(path, columns)
    elif suffix in readers:
        cloud = readers[suffix](path)
    else:
        raise ValueError(f"'{path}' is no point cloud that can be read: expected {', '.join(SUFFIXES)}.")
    if cloud.columns[:3] != ("x", "y", "z"):
        raise ValueError(f"'{path}' must begin with columns x, y, z, got {', '.join(cloud.columns)}.")
    return cloud


def _read_bin(path: Path, columns: int | None) -> PointCloud:
    raw = path.read_bytes()
    if columns is None:
        columns = _guess_columns(path, raw)
    if columns < 3 or len(raw) % (4 * columns):
        raise ValueError(f"'{path}' of {len(raw)} bytes does not hold rows of {columns} float32 numbers.")
    points = np.frombuffer(raw, "<f4").reshape(-1, columns).copy()
    return PointCloud(points, _names(columns, "ring"))


def _guess_columns(path: Path, raw: bytes) -> int:
    """Columns of a .bin file: nuScenes' files end in .pcd.bin and their last column is a whole number, the beam."""
    if path.name.endswith(".pcd.bin"):
        return 5
    fits = [n for n in (4, 5) if len(raw) % (4 * n) == 0]
    if not fits:
        raise ValueError(f"'{path}' of {len(raw)} bytes holds neither 4 nor 5 float32 numbers a point.")
    if len(fits) == 1 or not raw:
        return fits[0]
    ring = np.frombuffer(raw, "<f4").reshape(-1, 5)[:, 4]
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(ring).all() and (ring == np.floor(ring)).all() and ring.min() >= 0 and ring.max() < 256
    return 5 if whole else 4


def _names(columns: int, fifth: str) -> tuple[str, ...]:
    return (*_XYZI, fifth, *(f"column{i}" for i in range(5, columns)))[:columns]


def _load(path: Path):
    """What numpy reads from a file, which must hold no pickled objects."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"'{path}' is damaged or is no {path.suffix} file: {error}.") from error


def _read_npz(path: Path) -> PointCloud:
    with _load(path) as file:
        key = "points" if "points" in file.files else file.files[0] if len(file.files) == 1 else None
        if key is None:
            raise ValueError(f"'{path}' has no array 'points', only {', '.join(file.files)}.")
        try:
            points, names = file[key], file["columns"] if "columns" in file.files else None
        except (OSError, EOFError, ValueError, BadZipFile, zlib.error) as error:
            raise ValueError(f"'{path}' is damaged: {error}.") from error
    return _from_array(path, points, None if names is None else [str(name).lower() for name in names])


def _read_npy(path: Path) -> PointCloud:
    return _from_array(path, _load(path), None)


def _from_array(path: Path, points: np.ndarray, names: list[str] | None) -> PointCloud:
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu":
        raise ValueError(f"'{path}' must hold numbers [n, 3 or more], got {points.dtype} {points.shape}.")
    names = list(_names(points.shape[1], "column4")) if names is None else names
    if len(names) != points.shape[1]:
        raise ValueError(f"'{path}' names {len(names)} columns of {points.shape[1]}.")
    return PointCloud(points.astype(np.float32), tuple(names))


def _read_pcd(path: Path) -> PointCloud:
    raw = path.read_bytes()
    found = re.search(rb"^DATA\s+(\S+)[^\n]*\n", raw, re.MULTILINE)
    if found is None:
        raise ValueError(f"'{path}' is damaged or is no .pcd file: its header has no line DATA.")
    header = {}
    for line in raw[: found.start()].decode("ascii", "replace").splitlines():
        key, *values = line.split("#")[0].split() or [""]
        header[key] = values
    kind, body = found.group(1).decode("ascii", "replace"), raw[found.end() :]
    try:
        fields = _pcd_fields(header)
        count = int((header.get("POINTS") or [header["WIDTH"][0]])[0])
        if kind == "ascii":
            table = _pcd_ascii(body, fields, count)
        elif kind == "binary":
            table = np.frombuffer(body, np.dtype(fields), count)
        else:
            raise ValueError(f"DATA {kind} is not supported; write the file as ascii or binary")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read as a .pcd file: {error}.") from error
    names = [name for name in table.dtype.names if table[name].ndim == 1 and name != "_"]
    missing = [name for name in ("x", "y", "z") if name not in names]
    if missing:
        raise ValueError(f"'{path}' has no field {missing[0]}; fields: {', '.join(names)}.")
    # Coordinates first, whatever their place in the file.
    names = [
        "x",
        "y",
        "z",
        *sorted(set(names) - {"x", "y", "z"}, key=lambda name: (name != "intensity", names.index(name))),
    ]
    return PointCloud(np.stack([table[name].astype(np.float32) for name in names], 1), tuple(names))


def _pcd_fields(header: dict[str, list[str]]) -> list[tuple]:
    names = [name.lower() for name in header["FIELDS"]]
    sizes, types = header["SIZE"], header["TYPE"]
    counts = header.get("COUNT", ["1"] * len(names))
    fields = []
    for i, (name, size, kind, count) in enumerate(zip(names, sizes, types, counts, strict=True)):
        # Padding is named "_", several times over; names of a record must differ.
        name = f"_{i}" if name == "_" else name
        entry = (name, "<" + _PCD_TYPES[kind + size])
        fields.append(entry if count == "1" else (*entry, (int(count),)))
    return fields


def _pcd_ascii(body: bytes, fields: list[tuple], count: int) -> np.ndarray:
    values = np.array(body.split(), np.float64)
    widths = [field[2][0] if len(field) > 2 else 1 for field in fields]
    if len(values) != count * sum(widths):
        raise ValueError(f"{len(values)} numbers for {count} points of {sum(widths)}")
    rows = values.reshape(count, sum(widths))
    table = np.empty(count, np.dtype(fields))
    start = 0
    for field, width in zip(fields, widths, strict=True):
        table[field[0]] = rows[:, start] if width == 1 else rows[:, start : start + width]
        start += width
    return table


def ground_level(points: np.ndarray) -> float:
    """Height of the ground around the sensor, metres: the most frequent lowest height of cells 3 to 30 m away.

    Args:
        points: [n, 3 or more].

    Returns:
        0 where there are no such points.
    """
    points = points[np.isfinite(points[:, :3]).all(1)]
    distance = np.hypot(points[:, 0], points[:, 1])
    points = points[(distance > 3) & (distance < 30)]
    if not len(points):
        return 0.0
    # Lowest points of cells, because a wall has more points than the ground but covers fewer cells.
    cell = np.floor(points[:, :2]).astype(np.int64)
    lowest = np.full(64 * 64, np.inf)
    np.minimum.at(lowest, (cell[:, 0] + 32) * 64 + cell[:, 1] + 32, points[:, 2])
    z = lowest[np.isfinite(lowest)]
    step = 0.1
    bins = np.floor(z / step).astype(np.int64)
    values, counts = np.unique(bins, return_counts=True)
    # A bin with its neighbours, as the ground is not flat.
    smooth = [counts[np.abs(values - value) <= 1].sum() for value in values]
    middle = values[int(np.argmax(smooth))]
    return float(np.median(z[np.abs(bins - middle) <= 1]))


def model_columns(cloud: PointCloud, features: Sequence[str]) -> np.ndarray:
    """Arrange points as a detector takes them.

    Detectors made for Waymo take tanh of an intensity in 0..1, those made for nuScenes (with a column `time`) an
    intensity in 0..255; the file's is scaled. Elongation and time, 0 for the newest scan, are zeros.

    Args:
        cloud: As read.
        features: Columns of the detector, `x, y, z, intensity` first.

    Returns:
        [n, len(features)] float32.
    """
    out = np.zeros((len(cloud.points), len(features)), np.float32)
    out[:, :3] = cloud.points[:, :3]
    if "intensity" in cloud.columns:
        intensity = cloud.points[:, cloud.columns.index("intensity")]
        finite = intensity[np.isfinite(intensity)]
        if len(finite) and finite.max() > 1.5:
            intensity = intensity / 255
        out[:, 3] = intensity * 255 if "time" in features else np.tanh(intensity)
    return out
