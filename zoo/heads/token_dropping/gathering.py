"""Small helpers of methods that make new tokens, without copies from the host once they are warm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo.heads.token_dropping.packing import ImageGrid


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, C], [B, K] -> [B, K, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@functools.lru_cache(64)
def first_patches(images: tuple[ImageGrid, ...], device: torch.device) -> Tensor:
    """[P, 1] int64, partition * N within its image."""
    return torch.cat([image.patches * torch.arange(image.partitions) for image in images])[:, None].to(device)


@functools.lru_cache(64)
def leading_rows(counts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Places, in flattened [P, width], of the first `counts[p]` tokens and of the last token of each row p."""
    rows = [row for p, n in enumerate(counts) for row in (*range(p * width, p * width + n), (p + 1) * width - 1)]
    return torch.tensor(rows).to(device)


@functools.lru_cache(64)
def as_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers on a device."""
    return torch.tensor(values, device=device)
