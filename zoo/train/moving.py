"""Clips of moving images, made where the images lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def moving_images(images: Tensor, frames: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Let each image fly over a black background: it bounces off the borders, turns, grows and shrinks.

    Place, speed, angle, turn and size are drawn anew for each image.

    Args:
        images: `[B, C, h, w]` in [-1, 1].
        frames: Frames of a clip, F.
        size: Height and width of a frame, S, pixels.
        generator: Of the draws, on the device of the images.

    Returns:
        `[B, C, F, S, S]` in [-1, 1], dtype of the images.
    """
    if images.ndim != 4 or frames < 1 or size < 1:
        raise ValueError(f"needs images [B, C, h, w], frames and a size, got {tuple(images.shape)}, {frames}, {size}")
    # Places in half precision would be off by a fraction of a pixel.
    with torch.autocast(images.device.type, enabled=False):
        return _render(images.float(), frames, size, generator).to(images.dtype)


def _render(images: Tensor, frames: int, size: int, generator: torch.Generator | None) -> Tensor:
    batch, channels = images.shape[:2]
    # [B, F, 2, 3]
    places = _places(batch, frames, images.device, generator)
    # [B, F, 2, 3] -> [B * F, S, S, 2]
    grid = nn.functional.affine_grid(places.flatten(0, 1), [batch * frames, channels, size, size], align_corners=False)
    # Sampling fills with 0, which has to be black.
    repeated = (images + 1).repeat_interleave(frames, dim=0)
    clips = nn.functional.grid_sample(repeated, grid, align_corners=False) - 1
    # [B * F, C, S, S] -> [B, C, F, S, S]
    return clips.unflatten(0, (batch, frames)).transpose(1, 2)


def _places(batch: int, frames: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Affine maps from a frame to its image, both over [-1, 1], `[B, F, 2, 3]` float32."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    time = torch.arange(frames, device=device, dtype=torch.float32)
    mean, swing = draw(0.6, 0.75, 1), draw(0, 0.1, 1)
    scale = mean + swing * torch.sin(draw(0, 2 * math.pi, 1) + draw(0.2, 0.6, 1) * time)  # [B, F]
    angle = draw(-0.35, 0.35, 1) + draw(-0.06, 0.06, 1) * time  # [B, F] radians
    # An image of half-width `scale` touches the border when its centre is `1 - scale` away from the middle.
    room = (1 - scale).unsqueeze(-1)  # [B, F, 1]
    path = draw(-1, 1, 1, 2) + draw(-0.7, 0.7, 1, 2) * time[:, None]  # [B, F, 2]
    centre = room * _bounce(path)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack([cos, sin, -sin, cos], dim=-1).unflatten(-1, (2, 2))  # [B, F, 2, 2]
    return torch.cat([rows, -rows @ centre.unsqueeze(-1)], dim=-1)


def _bounce(x: Tensor) -> Tensor:
    """Reflect a straight path at -1 and 1."""
    return 1 - (torch.remainder(x + 1, 4) - 2).abs()
