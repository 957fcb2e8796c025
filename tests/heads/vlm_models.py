"""Tiny random vision-language models of transformers, and inputs as their processors make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from zoo.heads.token_dropping.families import family_of
from zoo.heads.token_dropping.packing import Packer

IMAGE, PAD, SIDE = 60, 0, 4
PIXELS = 16
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=PIXELS, patch_size=SIDE
)
TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
NAMES = ["llava", "next_llama", "next_mistral", "onevision"]


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model: "llava", "next_llama", "next_mistral" or "onevision"."""
    family, _, text = name.partition("_")
    siglip = family == "onevision"
    vision = {**VISION, "model_type": "siglip_vision_model" if siglip else "clip_vision_model"}
    vision |= {"vision_use_head": False} if siglip else {}
    text = {"": "qwen2" if siglip else "llama"}.get(text, text)
    text_config = {**TEXT, "model_type": text, "num_key_value_heads": 2 if text == "mistral" else 4}
    kwargs = dict(vision_config=vision, text_config=text_config, image_token_id=IMAGE)
    kwargs |= {} if family == "llava" else {"image_grid_pinpoints": PINPOINTS}
    kwargs |= dict(vision_feature_layer=-1 if siglip else -2)
    kwargs |= dict(vision_feature_select_strategy="full" if siglip else "default")
    kwargs |= dict(vision_aspect_ratio="anyres_max_9") if siglip else {}
    config, cls = CLASSES[family]
    torch.manual_seed(0)
    model = cls(config(**{**kwargs, **changes})).eval()
    model.generation_config.pad_token_id = PAD
    # Attention of freshly initialised towers is nearly uniform: scores would differ by rounding only.
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return model


def stock_lengths(model: nn.Module, sizes: list[tuple[int, int]], counts: list[int] | None = None) -> list[int]:
    """Placeholders of each image."""
    family = family_of(model)
    images = geometry(model, sizes, counts)
    return Packer(has_newline=family.has_newline).stock_lengths(images)


def geometry(model: nn.Module, sizes: list[tuple[int, int]], counts: list[int] | None = None) -> list:
    family = family_of(model)
    tower = family.tower()
    if not family.has_newline:
        return family.images(tower, torch.zeros(len(sizes), 3, PIXELS, PIXELS))[1]
    return family._geometry(tower, [list(size) for size in sizes], {"batch_num_images": counts})


def inputs_of(
    model: nn.Module, prompts: list[list[tuple[int, int]]], seed: int = 0, side: str = "left", text: int = 3
) -> dict[str, Tensor]:
    """Prompts of text and images of these sizes (H, W), each image after some text; rows padded on a side."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for row in prompts for size in row]
    counts = [len(row) for row in prompts] if "Onevision" in type(model).__name__ else None
    lengths = iter(stock_lengths(model, sizes, counts))
    rows = []
    for i, row in enumerate(prompts):
        words = [torch.randint(3, 60, (text + i + j,), generator=generator) for j in range(len(row) + 1)]
        ids = [words[0]]
        for word in words[1:]:
            ids += [torch.full((next(lengths),), IMAGE), word]
        rows.append(torch.cat(ids))
    L = max(map(len, rows))
    ids, mask = torch.full((len(rows), L), PAD), torch.zeros(len(rows), L, dtype=torch.int64)
    for b, row in enumerate(rows):
        part = slice(L - len(row), None) if side == "left" else slice(len(row))
        ids[b, part], mask[b, part] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    partitions = [image.partitions for image in geometry(model, sizes, counts)]
    shape = (len(sizes), max(partitions), 3, PIXELS, PIXELS)
    pixels = torch.randn(shape, generator=generator)
    for i, count in enumerate(partitions):
        pixels[i, count:] = 0
    if "Next" not in type(model).__name__ and "Onevision" not in type(model).__name__:
        return {**inputs, "pixel_values": pixels[:, 0]}
    inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return inputs if counts is None else {**inputs, "batch_num_images": torch.tensor(counts)}


def row_of(inputs: dict[str, Tensor], b: int, images: slice) -> dict[str, Tensor]:
    """One prompt of a batch without its padding, with its images."""
    keep = inputs["attention_mask"][b] != 0
    out = {name: inputs[name][b : b + 1, keep] for name in ("input_ids", "attention_mask")}
    for name in ("pixel_values", "image_sizes"):
        if name in inputs:
            out[name] = inputs[name][images]
    if "batch_num_images" in inputs:
        out["batch_num_images"] = inputs["batch_num_images"][b : b + 1]
    return out
