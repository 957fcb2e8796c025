"""`zoo vlm demo`: a small trained vision-language model answers questions with fewer and fewer visual tokens."""

import argparse
import time
from pathlib import Path
from typing import Any

from zoo.cli.arguments import pick_device, share

BUDGETS = (1.0, 0.5, 0.2, 0.1)
METHODS = ("hired", "spatial", "random")
GAP = 6
HEADER = 16
SHADE = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model folder (default: the weights of this package)")
    parser.add_argument("--out", type=Path, default=Path("zoo_vlm_demo"), help="folder to write (%(default)s)")
    parser.add_argument("--budgets", type=share, nargs="+", default=list(BUDGETS), help="shares of the visual tokens")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="methods of dropping (%(default)s)")
    parser.add_argument("--scenes", type=int, default=16, help="sample scenes to ask about (default: %(default)s)")
    parser.add_argument("--device", help="device (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    import torch

    from zoo.heads.tiny_vlm import load_samples, load_tiny_vlm

    device = pick_device(args.device)
    with _no_progress_bars():
        model, processor = load_tiny_vlm(args.model, torch.float32 if device.type == "cpu" else torch.float16)
    model = model.to(device)
    samples = load_samples(args.model)[: max(args.scenes, 1)]
    questions = [(image, *_text(question)) for image, asked in samples for question in asked]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{len(questions)} questions about {len(samples)} scenes of held-out garments, on {where}")
    print("tokens  method   accuracy  ms a question")
    answers = {}
    for method, budget in _cases(args.methods, args.budgets):
        answers[method, budget], seconds = _answer(model, processor, questions, method, budget)
        right = sum(given == true for given, (_, _, true) in zip(answers[method, budget], questions, strict=True))
        share, each = right / len(questions), 1000 * seconds / len(questions)
        print(f"{budget:>6.0%}  {method:<8} {share:>8.1%} {each:>14.1f}", flush=True)
    _print_answers(questions[: len(samples[0][1])], answers)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "kept_tokens.png"
    _draw(model, processor, samples[0][0], (args.methods, args.budgets)).save(path)
    print(f"wrote {path}")
    return 0


def _no_progress_bars() -> Any:
    """Context in which transformers shows no progress bars."""
    import contextlib

    from transformers.utils import logging

    stack = contextlib.ExitStack()
    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        stack.callback(logging.enable_progress_bar)
    return stack


def _text(question: dict[str, str]) -> tuple[str, str]:
    return question["question"], question["answer"]


def _cases(methods: list[str], budgets: list[float]) -> list[tuple[str, float]]:
    """Method and budget of each row; nothing is dropped at a budget of 1, whatever the method."""
    full = [("full", 1.0)] if 1.0 in budgets else []
    return full + [(method, budget) for budget in budgets if budget < 1 for method in methods]


def _dropping(model: Any, method: str, budget: float) -> Any:
    """Context in which the model drops tokens; gives the handle, or None."""
    import contextlib

    from zoo.heads import token_dropping

    return contextlib.nullcontext() if budget == 1 else token_dropping.apply(model, budget=budget, method=method)


def _answer(
    model: Any, processor: Any, questions: list[tuple[Any, str, str]], method: str, budget: float, batch: int = 32
) -> tuple[list[str], float]:
    """Answers, and the seconds that they took after a warm-up, images and prompts prepared beforehand."""
    import torch

    from zoo.heads.tiny_vlm import answer_questions, prepare

    images, texts, _ = zip(*questions, strict=True)
    batches = [
        prepare(model, processor, images[i : i + batch], texts[i : i + batch]) for i in range(0, len(texts), batch)
    ]
    answers = []
    with _dropping(model, method, budget):
        answer_questions(model, processor, batches[0])
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        start = time.perf_counter()
        for inputs in batches:
            answers += answer_questions(model, processor, inputs)
        return answers, time.perf_counter() - start


def _print_answers(questions: list[tuple[Any, str, str]], answers: dict[tuple[str, float], list[str]]) -> None:
    """The questions about the first scene, with the answers of the first method at each budget."""
    first = next((method for method, budget in answers if budget < 1), "full")
    shown = [case for case in answers if case[0] in ("full", first)]
    print(
        "first scene, answers with " + ", ".join(f"{budget:.0%}" for _, budget in shown) + f" of the tokens ({first}):"
    )
    for number, (_, question, true) in enumerate(questions):
        given = ", ".join(answers[case][number] for case in shown)
        print(f"  {question} {given} (true: {true})")


def _draw(model: Any, processor: Any, image: Any, cases: tuple[list[str], list[float]]) -> Any:
    """The scene with the patches that each method keeps, a row a method and a column a budget."""
    from PIL import Image, ImageDraw

    methods, budgets = cases
    budgets = [budget for budget in budgets if budget < 1]
    width, height = image.width + GAP, image.height + GAP + HEADER
    picture = Image.new("RGB", (width * (1 + len(budgets)), height * max(len(methods), 1)), "white")
    draw = ImageDraw.Draw(picture)

    def put(tile: Any, row: int, column: int, title: str) -> None:
        picture.paste(tile, (column * width, row * height + HEADER))
        draw.text((column * width + tile.width // 2, row * height + 2), title, fill=0, anchor="ma")

    for row, method in enumerate(methods):
        put(image, row, 0, "scene")
        for column, budget in enumerate(budgets, 1):
            kept = kept_patches(model, processor, image, method, budget)
            put(_shaded(image, kept), row, column, f"{method}, {int(kept.sum())} of {kept.numel()} tokens")
    return picture


def kept_patches(model: Any, processor: Any, image: Any, method: str, budget: float) -> Any:
    """Patches of an image that a method keeps, `[G, G]` bool."""
    import torch

    inputs = processor.image_processor(images=[image], return_tensors="pt").to(model.device, model.dtype)
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    with torch.no_grad(), _dropping(model, method, budget) as handle:
        source = handle.encode(inputs["pixel_values"]).source.cpu()
    kept = torch.zeros(side * side, dtype=torch.bool)
    # Tokens that are no patch have numbers below zero.
    kept[source[source >= 0]] = True
    return kept.view(side, side)


def _shaded(image: Any, kept: Any) -> Any:
    """The image with the dropped patches darkened."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image, dtype=np.float32)
    rows = np.arange(pixels.shape[0]) * kept.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * kept.shape[1] // pixels.shape[1]
    bright = kept.numpy()[rows][:, columns, None]
    return Image.fromarray(np.where(bright, pixels, SHADE * pixels).round().astype(np.uint8))
