"""Weights and inputs of golden cases, regenerated from their names by exact integer arithmetic (splitmix64)."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, count: int) -> np.ndarray:
    """`count` float64 values in [-1, 1), a pure function of `name`."""
    x = np.arange(count, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1.0


def tensor(name: str, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """float32 tensor `shift + scale * uniform(name)`."""
    values = shift + scale * uniform(name, int(np.prod(shape)))
    return torch.from_numpy(values.reshape(tuple(shape))).float()


def image(name: str, shape: tuple[int, ...]) -> Tensor:
    """Input tensor of unit variance."""
    return tensor("input:" + name, shape, scale=3.0**0.5)


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of the state-dict entry `name`: weights by fan-in, norms near one, biases small."""
    if name.endswith("running_mean"):
        return tensor(name, shape, 0.1)
    if name.endswith("running_var"):
        return torch.from_numpy(1.0 + np.abs(0.5 * uniform(name, int(np.prod(shape)))).reshape(shape)).float()
    if len(shape) >= 2:
        fan_in = max(int(np.prod(shape)) // int(shape[0]), 1)
        return tensor(name, shape, (3.0 / fan_in) ** 0.5)
    return tensor(name, shape, 0.1) if name.endswith("bias") else tensor(name, shape, 0.1, 1.0)


def state_dict(params: list[list], overrides: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Official state dict of a case: its `params` list [name, shape, dtype, ...], then scaled by name pattern."""
    from fnmatch import fnmatchcase

    out = {}
    for name, shape, dtype, *_ in params:
        if not dtype.startswith("float"):
            out[name] = torch.zeros(tuple(shape), dtype=getattr(torch, dtype))
            continue
        out[name] = parameter(name, tuple(shape))
        for pattern, factor in (overrides or {}).items():
            if fnmatchcase(name, pattern):
                out[name] = out[name] * factor
    return out
