"""Small video diffusion transformers: the architecture of Wan at sizes that train on one GPU in minutes.

They are plain `diffusers.WanTransformer3DModel`s, so saving, loading, caches, adapters and sparse plans
(`zoo.heads.sparse_vdit`) work as on the large ones. Three choices make them small: they see pixels instead of the
latents of an autoencoder, a class label takes the place of the prompt, and the networks are narrow. The label is given
as a one-hot "text" of one token, whose projection thereby is a learned embedding; one class more than there are stands
for "no label", which classifier-free guidance (arXiv:2207.12598) needs.

Architecture: Wan: Open and Advanced Large-Scale Video Generative Models, arXiv:2503.20314, after Scalable Diffusion
Models with Transformers, arXiv:2212.09748. These are no timm models, hence not in `zoo.list_models()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SHARED = dict(patch_size=(1, 2, 2), freq_dim=256, rope_max_seq_len=64, cross_attn_norm=True)
_SIZES = {
    "video_dit_nano": dict(num_attention_heads=6, attention_head_dim=32, ffn_dim=768, num_layers=6),
    "video_dit_small": dict(num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, num_layers=12),
}


def create_video_dit(name: str, num_classes: int = 10, channels: int = 1, **changes: Any):
    """Build a video DiT with random weights.

    Args:
        name: `video_dit_nano` (3.9 M parameters) or `video_dit_small` (30 M).
        num_classes: Number of classes; the model has one more input for "no label".
        channels: Channels of a frame, 1 (grey) or 3.
        **changes: Other arguments of `diffusers.WanTransformer3DModel`, such as `num_layers`.

    Returns:
        A `diffusers.WanTransformer3DModel`. It predicts the velocity `noise - clip` of flow matching from noisy clips
        `[B, C, F, H, W]`, times `[B]` in 0..1000 and `label_embeds`.

    Raises:
        ValueError: An unknown name, or no class.
    """
    from diffusers import WanTransformer3DModel

    if name not in _SIZES:
        raise ValueError(f"unknown video DiT {name!r}; there are {', '.join(_SIZES)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    settings = dict(in_channels=channels, out_channels=channels, text_dim=num_classes + 1)
    model = WanTransformer3DModel(**{**_SHARED, **_SIZES[name], **settings, **changes})
    # The first prediction is zero, the mean of all velocities.
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def video_dit_nano(num_classes: int = 10, channels: int = 1, **changes: Any):
    """Six layers of six heads, width 192; see `create_video_dit`."""
    return create_video_dit("video_dit_nano", num_classes, channels, **changes)


def video_dit_small(num_classes: int = 10, channels: int = 1, **changes: Any):
    """Twelve layers of six heads, width 384; see `create_video_dit`."""
    return create_video_dit("video_dit_small", num_classes, channels, **changes)


def label_embeds(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The `encoder_hidden_states` of labels.

    Args:
        labels: `[B]` int64; `num_classes` stands for "no label".
        num_classes: Number of classes.
        dtype: Of the result.

    Returns:
        `[B, 1, num_classes + 1]`, one-hot.
    """
    return nn.functional.one_hot(labels, num_classes + 1).unsqueeze(1).to(dtype)
