"""Train the small vision-language model on a GPU in minutes, and measure it with fewer visual tokens.

The garments of Fashion-MNIST lie on the device, scenes and questions are made there in batches and never repeat. The
language model reads a scene once and answers several questions about it, which do not see each other. Besides the
answers, the vision tower learns what each patch shows, which classes and colours a scene has (from the CLS token), and
to direct the attention of the CLS token of the feature layer to the garments: this is what a CLS token has to do
before visual tokens can be dropped by its attention (HiRED, arXiv:2408.10945). In half of the scenes some of the
background's tokens are hidden from the language model, so that an answer does not depend on places in its sequence.

    python -m zoo.train.vlm --root FOLDER --out MODEL_FOLDER --minutes 8
    python -m zoo.train.vlm --root FOLDER --out MODEL_FOLDER --evaluate
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from zoo.heads.tiny_vlm import (
    ANSWER_TOKENS,
    BOS,
    CLASSES,
    COLOURS,
    IMAGE,
    PAD,
    POSITIONS,
    answer_tokens,
    build_processor,
    build_tiny_vlm,
    build_tokenizer,
    load_tiny_vlm,
    words,
)
from zoo.train.scenes import TYPES, GarmentPool, Questioner, Questions, Scenes, compose
from zoo.train.vlm_card import RUN, write_card

ROOT = "/usr/share/datasets/fashion-mnist"
# Of a patch: class, colour and cell, and nothing in place of each.
PATCH_CHOICES = tuple(len(names) + 1 for names in (CLASSES, COLOURS, POSITIONS))
VALIDATION_SEED, TEST_SEED, SAMPLE_SEED = 1_000_003, 2_000_003, 3_000_003


@dataclass(frozen=True)
class Recipe:
    """What a run is made of.

    Attributes:
        batch_size: Scenes of a step.
        questions: Questions about each scene.
        lr, weight_decay: Peak rate of AdamW after a warm-up of 4 % of the run (then cosine to zero), and decay.
        ema: Decay of the weight average.
        patch_weight: Weight of the loss of the class, colour and cell of each patch.
        cls_weight: Weight of the loss of the classes and colours of a scene, from the CLS token.
        attention_weight: Weight of the loss of the CLS token's attention.
        hidden: Share of scenes of which some background tokens are hidden.
        scene: Further arguments of `zoo.train.scenes.compose`.
        vision, text: Changes of the model, see `zoo.heads.tiny_vlm.build_tiny_vlm`.
    """

    batch_size: int = 512
    questions: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema: float = 0.998
    patch_weight: float = 0.5
    cls_weight: float = 0.2
    attention_weight: float = 0.1
    hidden: float = 0.5
    scene: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


def tower_layers(model: nn.Module) -> nn.ModuleList:
    """Blocks of the vision tower, which was one level deeper in former versions of transformers."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def cls_attention(layer: nn.Module, x: Tensor) -> Tensor:
    """Share of the CLS token's attention that each patch gets in a CLIP layer, mean over heads.

    Args:
        layer: `CLIPEncoderLayer`.
        x: `[B, 1 + N, C]`, what enters the layer.

    Returns:
        `[B, N]` float32, of the attention to patches only: it sums to 1.
    """
    attention, x = layer.self_attn, layer.layer_norm1(x)
    # [B, C] -> [B, M, D], [B, N, C] -> [B, N, M, D]
    query = attention.q_proj(x[:, 0]).float().unflatten(-1, (attention.num_heads, -1))
    keys = attention.k_proj(x[:, 1:]).float().unflatten(-1, (attention.num_heads, -1))
    logits = torch.einsum("bmd,bnmd->bmn", query, keys) * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)


class VisualQuestionLoss(nn.Module):
    """Losses of a `LlavaForConditionalGeneration` with a CLIP tower, with the heads that only the training needs.

    Args:
        model: The model.
        recipe: Weights of the losses, and the share of scenes with hidden tokens.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        width = model.config.vision_config.hidden_size
        self.patch_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(PATCH_CHOICES)))
        self.scene_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CLASSES) + len(COLOURS)))
        numbers = words()
        self.bos = numbers.index(BOS)
        self.pad = numbers.index(PAD)

    def forward(self, scenes: Scenes, questions: Questions) -> dict[str, Tensor]:
        """Losses by name, `loss` being their weighted sum, and `correct`, `[B, Q]` bool."""
        config = self.model.config
        hidden = self.model.model.vision_tower(normalised(scenes.pixels), output_hidden_states=True).hidden_states
        features = hidden[config.vision_feature_layer]
        layer = tower_layers(self.model)[config.vision_feature_layer]
        attention = cls_attention(layer, hidden[config.vision_feature_layer - 1])
        losses = {
            "patch": self._patch_loss(features[:, 1:], scenes),
            "cls": self._scene_loss(features[:, 0], scenes) + self._scene_loss(hidden[-1][:, 0], scenes),
            # Kullback-Leibler divergence but for a constant.
            "attention": -(scenes.attention_target * attention.clamp(min=1e-8).log()).sum(1).mean(),
        }
        visual = self.model.model.multi_modal_projector(features[:, 1:])
        losses["answer"], correct = self._answer_loss(visual, questions, self._shown(scenes))
        recipe = self.recipe
        extra = (recipe.patch_weight, losses["patch"]), (recipe.cls_weight, losses["cls"])
        attended = recipe.attention_weight * losses["attention"]
        losses["loss"] = losses["answer"] + attended + sum(weight * loss for weight, loss in extra)
        return {**losses, "correct": correct}

    def _patch_loss(self, features: Tensor, scenes: Scenes) -> Tensor:
        """What each patch shows: class, colour and cell, or nothing."""
        targets = scenes.patch_targets()
        # [B, N, K] -> [B, K, N]
        logits = self.patch_head(features).float().transpose(1, 2).split(PATCH_CHOICES, 1)
        loss = sum(F.cross_entropy(x, y, reduction="none") for x, y in zip(logits, targets, strict=True))
        # Garments and background count the same, though one is much larger.
        garment = (targets[0] < len(CLASSES)).float()
        share = garment.mean().clamp(min=1e-3)
        return (loss * (garment / share + (1 - garment) / (1 - share))).mean() / 2

    def _scene_loss(self, cls_token: Tensor, scenes: Scenes) -> Tensor:
        """Which classes and which colours there are."""
        present = scenes.present.float().unsqueeze(-1)
        classes = (F.one_hot(scenes.label, len(CLASSES)) * present).amax(1)
        colours = (F.one_hot(scenes.colour, len(COLOURS)) * present).amax(1)
        logits = self.scene_head(cls_token).float()
        return F.binary_cross_entropy_with_logits(logits, torch.cat([classes, colours], 1))

    def _shown(self, scenes: Scenes) -> Tensor:
        """Patches that the language model sees, `[B, N]` bool: garments always."""
        garment = scenes.coverage.amax(1) > 0.02
        place = dict(device=garment.device)
        share = torch.rand(len(garment), 1, **place)
        whole = torch.rand(len(garment), 1, **place) >= self.recipe.hidden
        return garment | whole | (torch.rand(garment.shape, **place) < share)

    def _answer_loss(self, visual: Tensor, questions: Questions, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers, and which of them are right, `[B, Q]`, given the right words before."""
        batch, count, asked = questions.tokens.shape
        language = self.model.model.language_model
        embed = language.get_input_embeddings()
        start = embed(torch.full((batch, 1), self.bos, device=visual.device))
        # All but the last word of an answer is read: [B, Q, 8 + 2] -> [B, Q * 10, C]
        text = torch.cat([questions.tokens, questions.answer[..., :-1]], -1)
        embeds = torch.cat([start, visual.to(start.dtype), embed(text).flatten(1, 2)], 1)
        shown = F.pad(shown, (1, 0), value=True)
        mask, positions = multi_question_layout(shown, count, text.shape[-1])
        out = language(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        # [B, 1 + N + Q * 10, C] -> [B, Q, 3, C], the places before each word of an answer
        states = out.last_hidden_state[:, shown.shape[1] :].unflatten(1, (count, -1))[:, :, asked - 1 :]
        logits = self.model.lm_head(states).float()
        target = questions.answer.masked_fill(questions.answer == self.pad, -100)
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten())
        right = (logits.argmax(-1) == target) | (target == -100)
        return loss, right.all(-1)


def multi_question_layout(shown: Tensor, questions: int, length: int) -> tuple[Tensor, Tensor]:
    """Attention mask and positions of a prefix and several questions after it that do not see each other.

    Each question stands where it would stand if it were alone and hidden tokens did not exist.

    Args:
        shown: `[B, P]` bool, tokens of the prefix that are not hidden; the first must be shown.
        questions: Number of questions, Q.
        length: Tokens of each.

    Returns:
        Mask `[B, 1, P + Q * length, P + Q * length]` bool, true where a token may look, and positions
        `[B, P + Q * length]` int64.
    """
    batch, prefix = shown.shape
    total = prefix + questions * length
    place = torch.arange(total, device=shown.device)
    block = torch.where(place < prefix, -1, (place - prefix) // length)
    structure = (place[:, None] >= place) & ((block == -1) | (block[:, None] == block))
    columns = F.pad(shown, (0, total - prefix), value=True)
    mask = structure & columns[:, None, None, :]
    within = torch.arange(length, device=shown.device).repeat(questions)
    number = shown.sum(1, keepdim=True)
    positions = torch.cat([(shown.cumsum(1) - 1).clamp(min=0), number + within], 1)
    return mask, positions


def normalised(pixels: Tensor) -> Tensor:
    """What CLIP's image processor makes of pixels `[B, 3, S, S]` in [0, 1]."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (pixels.new_tensor(x).view(1, 3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def garment_pool(root: str | Path, split: str, device: torch.device | str) -> GarmentPool:
    """Images of a split of Fashion-MNIST: `train` (55,000), `val` (5,000 others) or `test` (10,000)."""
    from zoo.train.data import FashionMnistData

    images = FashionMnistData(root=str(root)).load_splits()[split]
    return GarmentPool(torch.tensor(images.images), torch.tensor(images.labels, dtype=torch.int64), device)


class Trainer:
    """A run.

    Args:
        recipe: What to do.
        pool: Garments, on the device of the run.
        seed: Of weights, scenes and hidden tokens.
        compile: Whether to compile the layers of both towers.
    """

    def __init__(self, recipe: Recipe, pool: GarmentPool, seed: int = 0, compile: bool = False) -> None:
        torch.manual_seed(seed)
        self.recipe, self.pool, self.seed, self.device = recipe, pool, seed, pool.device
        self.model = build_tiny_vlm(recipe.vision, recipe.text).to(self.device).train()
        self.objective = VisualQuestionLoss(self.model, recipe).to(self.device)
        self.average = copy.deepcopy(self.model)
        on_gpu = self.device.type == "cuda"
        groups = param_groups_weight_decay(self.objective, recipe.weight_decay, no_weight_decay_list=("*embed*",))
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=on_gpu)
        self.questioner = Questioner(self.device)
        self.steps, self.seconds = 0, 0.0
        if compile:
            for layer in [*tower_layers(self.model), *self.model.model.language_model.layers]:
                layer.compile()

    def batch(self, step: int) -> tuple[Scenes, Questions]:
        """Scenes and questions of a step."""
        recipe = self.recipe
        index = torch.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size, device=self.device)
        vision = self.model.config.vision_config
        scenes = compose(self.pool, self.seed, index, vision.image_size, vision.patch_size, **recipe.scene)
        types = torch.arange(recipe.questions, device=self.device) % len(TYPES)
        # What is left of a round of all types changes from scene to scene.
        types = (types + index[:, None]) % len(TYPES)
        return scenes, self.questioner.ask(scenes, self.seed, index, types)

    def step(self, progress: float) -> dict[str, Tensor]:
        """One update, with `progress` through the run in [0, 1]; the losses, and how often each type was right."""
        rate = self.recipe.lr * min(1.0, (progress + 1e-3) / 0.04) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scenes, questions = self.batch(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.objective(scenes, questions)
        out["loss"].backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        # The average of a short run must not remember random weights.
        decay = min(self.recipe.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        kind = F.one_hot(questions.type, len(TYPES)).float()
        out["by_type"] = (kind * out.pop("correct")[..., None]).sum((0, 1)) / kind.sum((0, 1)).clamp(min=1)
        return {name: value.detach() for name, value in out.items()}

    def run(self, minutes: float | None = None, steps: int | None = None, every: int = 100) -> bool:
        """Train for some minutes or steps; print what is learnt. Whether the run ended without an interrupt."""
        if (minutes is None) == (steps is None):
            raise ValueError("a run needs either minutes or steps")
        start, sums, count = time.perf_counter(), {}, 0
        progress = 0.0
        try:
            while progress < 1:
                out = self.step(progress)
                sums = {name: sums.get(name, 0) + value for name, value in out.items()}
                count += 1
                seconds = time.perf_counter() - start
                if count == every:
                    # Reading the sums waits for the device, so that the clock is right.
                    self._report(sums, count, time.perf_counter() - start)
                    sums, count = {}, 0
                progress = seconds / (60 * minutes) if steps is None else self.steps / steps
        except KeyboardInterrupt:
            print(f"interrupted after {self.steps} steps; the average so far is kept", flush=True)
            return False
        finally:
            self.seconds += time.perf_counter() - start
        print(f"{self.steps} steps in {self.seconds:.0f} s", flush=True)
        return True

    def _report(self, sums: dict[str, Tensor], count: int, seconds: float) -> None:
        by_type = (sums["by_type"] / count).tolist()
        losses = " ".join(f"{name} {float(sums[name]) / count:.3f}" for name in ("answer", "patch", "cls", "attention"))
        types = " ".join(f"{name} {share:.1%}" for name, share in zip(TYPES, by_type, strict=True))
        print(f"step {self.steps} {seconds:.0f} s | {losses} | {types}", flush=True)


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


def save(model: nn.Module, folder: Path, pool: GarmentPool, samples: int = 16) -> None:
    """Write a model in half precision with its processor, and sample scenes of held-out garments."""
    vision = model.config.vision_config
    copy.deepcopy(model).half().save_pretrained(folder)
    build_processor(vision.image_size, vision.patch_size).save_pretrained(folder)
    if samples:
        save_samples(folder / "samples", pool, vision.image_size, vision.patch_size, samples)


def save_samples(folder: Path, pool: GarmentPool, image_size: int, patch_size: int, count: int) -> None:
    """Write scenes as images with a question of each type, `questions.json`."""
    from torchvision.transforms.functional import to_pil_image

    folder.mkdir(parents=True, exist_ok=True)
    index = torch.arange(count, device=pool.device)
    scenes = compose(pool, SAMPLE_SEED, index, image_size, patch_size)
    types = torch.arange(len(TYPES), device=pool.device).expand(count, -1)
    questions = Questioner(pool.device).ask(scenes, SAMPLE_SEED, index, types)
    tokenizer = build_tokenizer()
    entries = []
    for number in range(count):
        name = f"scene{number:02}.jpg"
        to_pil_image(scenes.pixels[number].cpu()).save(folder / name, quality=93, subsampling=0)
        texts = tokenizer.batch_decode(questions.tokens[number], skip_special_tokens=True)
        answers = tokenizer.batch_decode(questions.answer[number], skip_special_tokens=True)
        kinds = [TYPES[kind] for kind in questions.type[number].tolist()]
        asked = [dict(type=k, question=q, answer=a) for k, q, a in zip(kinds, texts, answers, strict=True)]
        entries.append(dict(image=name, questions=asked))
    (folder / "questions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def write_run(folder: Path, trainer: Trainer) -> None:
    """Write what a run was, for the model card."""
    device = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else trainer.device.type
    recipe = trainer.recipe
    run = dict(steps=trainer.steps, seconds=round(trainer.seconds), batch_size=recipe.batch_size)
    run |= dict(questions=recipe.questions, lr=recipe.lr, seed=trainer.seed, device=device, torch=torch.__version__)
    (folder / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def write_results(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `evaluate` as `budgets.csv`."""
    with (folder / "budgets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> None:
    """Train and write a model, or measure one."""
    parser = argparse.ArgumentParser(prog="python -m zoo.train.vlm", description=__doc__.split("\n")[0])
    parser.add_argument("--root", default=ROOT, help="folder of Fashion-MNIST's four files (default: Debian's)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=8.0, help="time to train for (default: %(default)s)")
    length.add_argument("--steps", type=int, help="steps to train for instead")
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size, help="scenes of a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in OUT with fewer visual tokens")
    parser.add_argument("--scenes", type=int, default=1024, help="scenes of a measurement (default: %(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.evaluate:
        model, _ = load_tiny_vlm(args.out, torch.float16 if device.type == "cuda" else torch.float32)
        rows = evaluate(model.to(device), pool=garment_pool(args.root, "test", device), scenes=args.scenes)
        write_results(args.out, rows)
        write_card(args.out, model, rows, table(rows))
        print(table(rows))
        return
    # A time limit ends processes by this signal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    recipe = Recipe(batch_size=args.batch_size, lr=args.lr)
    trainer = Trainer(recipe, garment_pool(args.root, "train", device), args.seed, args.compile)
    trainer.run(None if args.steps else args.minutes, args.steps)
    model = trainer.average.eval()
    save(model, args.out, garment_pool(args.root, "test", device))
    write_run(args.out, trainer)
    print(f"wrote {args.out}", flush=True)
    shares = accuracy(model, garment_pool(args.root, "val", device), VALIDATION_SEED, args.scenes)
    print("validation | " + " ".join(f"{name} {share:.2%}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
