"""Accuracy of the small vision-language model on scenes of held-out garments, with all and with fewer visual tokens."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.heads.tiny_vlm import ANSWER_TOKENS, BOS, IMAGE, answer_tokens, normalised, words
from zoo.train.scenes import ROOT, TYPES, GarmentPool, Questioner, compose, garment_pool

TEST_SEED = 2_000_003


@torch.no_grad()
def answer_scenes(
    model: nn.Module, pool: GarmentPool, seed: int, index: Tensor, scene: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Let a model answer a question of each type about scenes, by `generate`.

    Args:
        model: On the device of the pool, with or without a plug-in of `zoo.hired`.
        pool: Garments.
        seed, index: Of the scenes; index `[B]` int64.
        scene: Further arguments of `zoo.train.scenes.compose`.

    Returns:
        Whether each answer is right, `[B * 6]` bool, and its type, `[B * 6]` int64.
    """
    vision = model.config.vision_config
    scenes = compose(pool, seed, index, vision.image_size, vision.patch_size, **(scene or {}))
    types = torch.arange(len(TYPES), device=pool.device).expand(len(index), -1)
    questions = Questioner(pool.device).ask(scenes, seed, index, types)
    numbers = words()
    patches = (vision.image_size // vision.patch_size) ** 2
    start = torch.tensor([numbers.index(BOS)] + [numbers.index(IMAGE)] * patches, device=pool.device)
    # [B * 6, 1 + N + 8]
    tokens = questions.tokens.flatten(0, 1)
    tokens = torch.cat([start.expand(len(tokens), -1), tokens], 1)
    pixels = normalised(scenes.pixels).to(model.dtype).repeat_interleave(len(TYPES), 0)
    sequences = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=pixels,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
    )
    right = (answer_tokens(sequences) == questions.answer.flatten(0, 1)).all(1)
    return right, questions.type.flatten()


def accuracy(
    model: nn.Module, pool: GarmentPool, seed: int, scenes: int = 1024, batch_size: int = 128, **scene: Any
) -> dict[str, float]:
    """Share of right answers by type of question, and `all`, the mean over questions."""
    right, types = [], []
    for index in torch.arange(scenes, device=pool.device).split(batch_size):
        batch_right, batch_types = answer_scenes(model, pool, seed, index, scene)
        right.append(batch_right)
        types.append(batch_types)
    right, types = torch.cat(right).float(), torch.cat(types)
    by_type = {name: right[types == number].mean().item() for number, name in enumerate(TYPES)}
    return {"all": right.mean().item(), **by_type}


def evaluate(
    model: nn.Module,
    budgets: Sequence[float] = (1.0, 0.5, 0.4, 0.2, 0.1),
    methods: Sequence[str] = ("hired", "spatial", "random"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    pool: GarmentPool | None = None,
    scenes: int = 1024,
    batch_size: int = 128,
    scene: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Accuracy on scenes of held-out garments with fewer visual tokens.

    Each seed is another set of scenes, the same for all methods and budgets.

    Args:
        model: `LlavaForConditionalGeneration` as trained here, on the device of the pool.
        budgets: Shares of the visual tokens; 1 is the model without a plug-in, measured once.
        methods: Of `zoo.hired.apply`.
        seeds: One measurement each.
        pool: Garments; None reads the test images of Fashion-MNIST from Debian's folder.
        scenes: Scenes of a measurement, with six questions each.
        batch_size: Scenes at a time.
        scene: Further arguments of `zoo.train.scenes.compose`.

    Returns:
        A row for each method, budget and seed: `method`, `budget`, `seed`, `scenes`, `all` and the types of questions.
    """
    from zoo.heads import token_dropping

    pool = garment_pool(ROOT, "test", model.device) if pool is None else pool
    cases = [(method, budget) for budget in budgets if budget < 1 for method in methods]
    if any(budget >= 1 for budget in budgets):
        cases.insert(0, ("full", 1.0))
    rows = []
    for method, budget in cases:
        for seed in seeds:
            plugin = contextlib.nullcontext()
            if budget < 1:
                options = {"seed": seed} if method == "random" else {}
                plugin = token_dropping.apply(model, budget=budget, method=method, **options)
            with plugin:
                shares = accuracy(model, pool, TEST_SEED + seed, scenes, batch_size, **(scene or {}))
            rows.append({"method": method, "budget": budget, "seed": seed, "scenes": scenes, **shares})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown table of the rows of `evaluate`: mean and range over seeds, in percent."""
    lines = ["| visual tokens | method | all | " + " | ".join(TYPES) + " |", "| --- " * (3 + len(TYPES)) + "|"]
    for case in dict.fromkeys((row["budget"], row["method"]) for row in rows):
        group = [row for row in rows if (row["budget"], row["method"]) == case]
        total = [100 * row["all"] for row in group]
        means = [100 * sum(row[name] for row in group) / len(group) for name in TYPES]
        spread = f"{sum(total) / len(total):.1f} ({min(total):.1f} to {max(total):.1f})"
        lines.append(f"| {case[0]:.0%} | {case[1]} | {spread} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    return "\n".join(lines)


def write_results(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `evaluate` as `budgets.csv`."""
    with (folder / "budgets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
