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
import copy
import json
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from zoo.heads.tiny_vlm import (
    BOS,
    CLASSES,
    COLOURS,
    PAD,
    POSITIONS,
    build_processor,
    build_tiny_vlm,
    build_tokenizer,
    load_tiny_vlm,
    normalised,
    words,
)
from zoo.train.scenes import ROOT, TYPES, GarmentPool, Questioner, Questions, Scenes, compose, garment_pool
from zoo.train.vlm_card import RUN, write_card
from zoo.train.vlm_evaluation import accuracy, evaluate, table, write_results

# Of a patch: class, colour and cell, and nothing in place of each.
PATCH_CHOICES = tuple(len(names) + 1 for names in (CLASSES, COLOURS, POSITIONS))
VALIDATION_SEED, SAMPLE_SEED = 1_000_003, 3_000_003


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
    patch_weight: float = 1.0
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
        classes = (_one_hot(scenes.label, len(CLASSES)) * present).amax(1)
        colours = (_one_hot(scenes.colour, len(COLOURS)) * present).amax(1)
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


def _one_hot(x: Tensor, count: int) -> Tensor:
    """As PyTorch's, but float32 and without a look at the values."""
    return (x[..., None] == torch.arange(count, device=x.device)).float()


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


def parameter_groups(objective: VisualQuestionLoss, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer: embeddings, norms and biases do not decay."""
    return param_groups_weight_decay(objective, weight_decay, no_weight_decay_list=("*embed*",))


# What a step measures, in this order, and then the share of right answers of each type.
LOSSES = ("loss", "answer", "patch", "cls", "attention")
SPEEDS = ("eager", "graph", "compile")


class Trainer:
    """A run.

    Args:
        recipe: What to do.
        pool: Garments, on the device of the run.
        seed: Of weights, scenes and hidden tokens.
        speed: "eager"; "graph": a whole step, with its scenes, is one CUDA graph, because Python launches the kernels
            of small networks more slowly than a GPU runs them; "compile": such a graph of compiled layers. A CPU
            replays no graphs.
    """

    def __init__(self, recipe: Recipe, pool: GarmentPool, seed: int = 0, speed: str = "graph") -> None:
        if speed not in SPEEDS:
            raise ValueError(f"speed must be one of {SPEEDS}, got {speed!r}")
        torch.manual_seed(seed)
        self.recipe, self.pool, self.seed, self.device = recipe, pool, seed, pool.device
        self.model = build_tiny_vlm(recipe.vision, recipe.text).to(self.device).train()
        self.objective = VisualQuestionLoss(self.model, recipe).to(self.device)
        self.average = copy.deepcopy(self.model)
        self.questioner = Questioner(self.device)
        self.steps, self.seconds = 0, 0.0
        # What changes from step to step, read by a graph.
        self.index = torch.arange(recipe.batch_size, device=self.device)
        self.rate = torch.tensor(0.0, device=self.device)
        on_gpu = self.device.type == "cuda"
        groups = parameter_groups(self.objective, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), capturable=on_gpu, fused=on_gpu)
        if speed == "compile":
            for layer in [*tower_layers(self.model), *self.model.model.language_model.layers]:
                layer.compile()
        self.graph = None
        if on_gpu and speed != "eager":
            self._capture()

    def batch(self) -> tuple[Scenes, Questions]:
        """Scenes and questions of the current index."""
        recipe, vision = self.recipe, self.model.config.vision_config
        scenes = compose(self.pool, self.seed, self.index, vision.image_size, vision.patch_size, **recipe.scene)
        types = torch.arange(recipe.questions, device=self.device)
        # What is left of a round of all types changes from scene to scene.
        types = (types + self.index[:, None]) % len(TYPES)
        return scenes, self.questioner.ask(scenes, self.seed, self.index, types)

    def _update(self) -> Tensor:
        """One update; what it measures, `LOSSES` and right answers by type."""
        scenes, questions = self.batch()
        # A cache of casts does not survive in a graph.
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            out = self.objective(scenes, questions)
        out["loss"].backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        kind = _one_hot(questions.type, len(TYPES))
        by_type = (kind * out["correct"][..., None]).sum((0, 1)) / kind.sum((0, 1)).clamp(min=1)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - self.recipe.ema)
            return torch.cat([torch.stack([out[name] for name in LOSSES]), by_type])

    def _capture(self) -> None:
        """Warm up with a learning rate of zero, then record; the optimizer's state starts afresh."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.measured = self._update()
        with torch.no_grad():
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def step(self, progress: float) -> Tensor:
        """One update, with `progress` through the run in [0, 1]; returns what it measures, see `LOSSES`."""
        warm = min(1.0, (progress + 1e-3) / 0.04)
        self.rate.fill_(self.recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        if self.graph is not None:
            self.graph.replay()
            measured = self.measured.clone()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            measured = self._update()
        self.index += self.recipe.batch_size
        self.steps += 1
        return measured

    def run(self, minutes: float | None = None, steps: int | None = None, every: int = 50) -> bool:
        """Train for some minutes or steps; print what is learnt. Whether the run ended without an interrupt."""
        if (minutes is None) == (steps is None):
            raise ValueError("a run needs either minutes or steps")
        start, progress, averaging, measured = time.perf_counter(), 0.0, False, []
        try:
            while progress < 1:
                if not averaging and progress > 0.25:
                    self._start_average()
                    averaging = True
                measured.append(self.step(progress))
                if len(measured) == every:
                    # Reading waits for the device, so that the clock is right.
                    self._report(torch.stack(measured).mean(0).tolist(), time.perf_counter() - start)
                    measured = []
                seconds = time.perf_counter() - start
                progress = seconds / (60 * minutes) if steps is None else self.steps / steps
        except KeyboardInterrupt:
            print(f"interrupted after {self.steps} steps; the average so far is kept", flush=True)
        if not averaging:
            self._start_average()
        self.seconds += time.perf_counter() - start
        print(f"{self.steps} steps in {self.seconds:.0f} s", flush=True)
        return progress >= 1

    @torch.no_grad()
    def _start_average(self) -> None:
        """Forget the random weights that the average began with."""
        torch._foreach_copy_(list(self.average.parameters()), list(self.model.parameters()))

    def _report(self, measured: list[float], seconds: float) -> None:
        losses = " ".join(f"{name} {value:.3f}" for name, value in zip(LOSSES, measured, strict=False))
        types = " ".join(f"{name} {share:.1%}" for name, share in zip(TYPES, measured[len(LOSSES) :], strict=True))
        print(f"step {self.steps} {seconds:.0f} s | {losses} | {types}", flush=True)


def save(model: nn.Module, folder: Path, pool: GarmentPool | None = None, samples: int = 16) -> None:
    """Write a model in half precision with its processor, and sample scenes of held-out garments if there are any."""
    vision = model.config.vision_config
    copy.deepcopy(model).half().save_pretrained(folder)
    build_processor(vision.image_size, vision.patch_size).save_pretrained(folder)
    if pool is not None:
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
    parser.add_argument("--speed", choices=SPEEDS, default="graph", help="how a GPU runs a step (%(default)s)")
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
    trainer = Trainer(recipe, garment_pool(args.root, "train", device), args.seed, args.speed)
    trainer.run(None if args.steps else args.minutes, args.steps)
    model = trainer.average.eval()
    save(model, args.out, garment_pool(args.root, "test", device))
    write_run(args.out, trainer)
    print(f"wrote {args.out}", flush=True)
    shares = accuracy(model, garment_pool(args.root, "val", device), VALIDATION_SEED, args.scenes)
    print("validation | " + " ".join(f"{name} {share:.2%}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
