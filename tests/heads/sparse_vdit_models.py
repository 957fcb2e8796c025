"""Small video transformers of diffusers, with random weights, and calls that suit them."""

from __future__ import annotations

import dataclasses

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from zoo.heads import sparse_vdit

GRID, TEXT, HEADS = (3, 4, 5), 9, 4
TILE = (16, 8)
# Latent frames, height and width of the grid in patches of (1, 2, 2).
LATENT = (3, 8, 10)

PATTERNS = [
    {"pattern": "full"},
    {"pattern": "skip"},
    {"pattern": "diagonal", "window": 0.4},
    {"pattern": "multi_diagonal", "window": 0.4},
    {"pattern": "vertical_stripe", "frames": [0]},
]


@dataclasses.dataclass
class Tiny:
    model: nn.Module
    inputs: dict

    def __call__(self, **changes) -> Tensor:
        with torch.no_grad():
            return self.model(**{**self.inputs, **changes}, return_dict=False)[0]

    def plan(self, bins: int = 1, **changes) -> sparse_vdit.SparsePlan:
        """Patterns of all kinds, another in each layer, head and bin."""
        model = sparse_vdit.describe_model(self.model)
        assign = [
            [[(1 + b + n + m) % len(PATTERNS) for m in range(model["heads"])] for n in range(len(model["layers"]))]
            for b in range(bins)
        ]
        edges = [b / bins for b in range(bins + 1)]
        position = TEXT_POSITIONS[model["class"]]
        fields = dict(model=model, text_position=position, tile=TILE, granularity="block", bins=edges)
        return sparse_vdit.SparsePlan(**{**fields, "patterns": PATTERNS, "assign": assign, **changes})

    def full_plan(self) -> sparse_vdit.SparsePlan:
        model = sparse_vdit.describe_model(self.model)
        return sparse_vdit.uniform_plan(model, TEXT_POSITIONS[model["class"]], tile=TILE)


TEXT_POSITIONS = {
    "CogVideoXTransformer3DModel": "first",
    "HunyuanVideoTransformer3DModel": "last",
    "LTXVideoTransformer3DModel": "none",
    "MochiTransformer3DModel": "last",
    "WanTransformer3DModel": "none",
}


def _mask(dtype: torch.dtype) -> Tensor:
    return (torch.arange(TEXT) < torch.tensor([[TEXT], [5]])).to(dtype)


def wan(**changes) -> Tiny:
    config = dict(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, 4, *LATENT), timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, TEXT, 16),
    )  # fmt: skip
    return Tiny(diffusers.WanTransformer3DModel(**{**config, **changes}), inputs)


def hunyuan() -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, 4, *LATENT), timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, TEXT, 16), encoder_attention_mask=_mask(torch.int64),
        pooled_projections=torch.randn(2, 8), guidance=torch.tensor([6000.0, 6000.0]),
    )  # fmt: skip
    return Tiny(model, inputs)


def cogvideox(version: str = "1.5") -> Tiny:
    patch_t = 2 if version == "1.5" else None
    # Version 1.5 has patches of two frames; its pipeline pads to a multiple of them.
    frames = GRID[0] * (patch_t or 1)
    config = dict(patch_size_t=patch_t, patch_bias=patch_t is None)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=2, sample_width=10, sample_height=8, sample_frames=9, patch_size=2,
        max_text_seq_length=TEXT, use_rotary_positional_embeddings=True, **config,
    )  # fmt: skip
    rotary = get_3d_rotary_pos_embed(
        embed_dim=16, crops_coords=None if patch_t else ((0, 0), GRID[1:]), grid_size=GRID[1:], temporal_size=GRID[0],
        grid_type="slice" if patch_t else "linspace", max_size=GRID[1:],
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, frames, 4, *LATENT[1:]), timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, TEXT, 16), image_rotary_emb=rotary,
    )  # fmt: skip
    return Tiny(model, inputs)


def ltx() -> Tiny:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=16, cross_attention_dim=64,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, 60, 8), timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, TEXT, 16), encoder_attention_mask=_mask(torch.int64),
        num_frames=GRID[0], height=GRID[1], width=GRID[2], rope_interpolation_scale=(0.32, 32.0, 32.0),
    )  # fmt: skip
    return Tiny(model, inputs)


def mochi() -> Tiny:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=HEADS, attention_head_dim=16, num_layers=2, pooled_projection_dim=24,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=TEXT,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, 4, *LATENT), timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, TEXT, 16), encoder_attention_mask=_mask(torch.bool),
    )  # fmt: skip
    return Tiny(model, inputs)


BUILDERS = {
    "cogvideox1.0": lambda: cogvideox("1.0"),
    "cogvideox1.5": cogvideox,
    "hunyuan": hunyuan,
    "ltx": ltx,
    "mochi": mochi,
    "wan": wan,
}


def build(name: str) -> Tiny:
    torch.manual_seed(0)
    tiny = BUILDERS[name]()
    tiny.model.eval()
    # Fresh models have zero or tiny tables; noise makes every path count.
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return tiny
