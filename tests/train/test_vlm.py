"""Scenes, questions and the training of the small vision-language model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.modeling_clip import CLIPVisionModel

from zoo.heads.tiny_vlm import (
    CLASSES,
    COLOURS,
    PLURALS,
    POSITIONS,
    build_processor,
    build_tiny_vlm,
    build_tokenizer,
    load_samples,
    load_tiny_vlm,
    normalised,
    prompt,
)
from zoo.train import vlm
from zoo.train.scenes import TYPES, Draws, GarmentPool, Questioner, compose
from zoo.train.vlm import Recipe, Trainer, cls_attention, multi_question_layout

SCENE = dict(image_size=48, patch_size=8)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8
)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
RECIPE = Recipe(batch_size=16, questions=6, lr=3e-3, vision=VISION, text=TEXT, scene=dict(scale=(0.7, 0.95)))


def garments(each: int = 3) -> GarmentPool:
    """Stripes of another direction and width for each class."""
    y, x = np.mgrid[:28, :28] / 28
    images, labels = [], []
    for label in range(len(CLASSES)):
        for number in range(each):
            wave = np.sin(2 * np.pi * (1 + label // 4) * (x * (label % 2) + y * (label // 2 % 2)) + number)
            images.append(np.clip(100 + 100 * wave, 60, 255))
            labels.append(label)
    return GarmentPool(torch.tensor(np.array(images), dtype=torch.uint8), torch.tensor(labels))


def all_types(batch: int) -> torch.Tensor:
    return torch.arange(len(TYPES)).expand(batch, -1)


def test_draws_are_uniform_and_independent_of_the_batch() -> None:
    index = torch.arange(4000)
    draws = Draws(3, index)
    values = draws(7)
    assert values.min() >= 0 and values.max() < 1
    torch.testing.assert_close(values.mean(0), torch.full((7,), 0.5), rtol=0, atol=0.03)
    torch.testing.assert_close(values.std(0), torch.full((7,), 12**-0.5), rtol=0, atol=0.02)
    assert np.abs(np.corrcoef(torch.cat([values, draws(2)], 1).T.numpy()) - np.eye(9)).max() < 0.07
    assert torch.equal(Draws(3, index[70:75])(7), values[70:75])
    assert not torch.equal(Draws(4, index)(7), values)


def test_a_scene_follows_from_seed_and_index() -> None:
    pool = garments()
    scenes = compose(pool, 1, torch.arange(12), **SCENE)
    alone = compose(pool, 1, torch.tensor([5]), **SCENE)
    for name in ("pixels", "present", "label", "colour", "coverage"):
        torch.testing.assert_close(getattr(alone, name), getattr(scenes, name)[5:6], msg=name)
    assert not torch.equal(compose(pool, 2, torch.tensor([5]), **SCENE).pixels, alone.pixels)
    number = compose(pool, 1, torch.arange(200), 24, 8).present.sum(1)
    assert number.unique().tolist() == [2, 3, 4, 5, 6]
    levels = scenes.pixels * 255
    assert scenes.pixels.min() >= 0 and scenes.pixels.max() <= 1
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [48, 56])
def test_coverage_says_where_garments_are(size: int) -> None:
    """Without garments a scene is its background: the two differ just where patches are covered."""
    pool, index = garments(), torch.arange(8)
    scenes = compose(pool, 0, index, size, 8)
    pool.images = torch.zeros_like(pool.images)
    empty = compose(pool, 0, index, size, 8)
    assert not empty.coverage.any()
    changed = (scenes.pixels != empty.pixels).any(1, keepdim=True).float()
    share = torch.nn.functional.avg_pool2d(changed, 8).flatten(1)
    covered = scenes.coverage.sum(1)
    assert torch.equal(share > 0, covered > 1e-4)
    # Edges of garments cover half a pixel, but change it.
    assert ((share - covered).abs() < 0.3).all() and 0.05 < covered.mean() < 0.5
    target = scenes.attention_target
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    label, colour, cell = scenes.patch_targets()
    assert torch.equal(label == len(CLASSES), colour == len(COLOURS))
    assert torch.equal(label == len(CLASSES), cell == len(POSITIONS))
    garment = label < len(CLASSES)
    assert torch.equal(cell[garment], scenes.coverage.argmax(1)[garment])
    assert torch.equal(label[garment], scenes.label.gather(1, cell.clamp(max=8))[garment])
    assert torch.equal(colour[garment], scenes.colour.gather(1, cell.clamp(max=8))[garment])


def answer_of(question: str, items: dict[str, tuple[str, str]]) -> str:
    """The answer to a question, from position to (colour, class)."""
    asked = question.removesuffix(" ?").split()
    if question.startswith("what is at"):
        return " ".join(items.get(asked[-1], ("nothing",)))
    if question.startswith("where"):
        (position,) = [p for p, item in items.items() if item == tuple(asked[-2:])]
        return position
    if question.startswith("what colour"):
        (colour,) = [colour for colour, name in items.values() if name == asked[-1]]
        return colour
    if question.startswith("how many items"):
        return str(sum(colour == asked[-1] for colour, _ in items.values()))
    if question.startswith("how many"):
        return str(sum(PLURALS[CLASSES.index(name)] == asked[2] for _, name in items.values()))
    return "yes" if tuple(asked[-2:]) in items.values() else "no"


def test_answers_are_true() -> None:
    index = torch.arange(300)
    scenes = compose(garments(), 0, index, 24, 8)
    questions = Questioner().ask(scenes, 0, index, all_types(300))
    tokenizer = build_tokenizer()
    counts = dict.fromkeys(("yes", "no", "nothing", "0"), 0)
    for b in range(300):
        cells = torch.nonzero(scenes.present[b])[:, 0].tolist()
        items = {POSITIONS[c]: (COLOURS[scenes.colour[b, c]], CLASSES[scenes.label[b, c]]) for c in cells}
        texts = tokenizer.batch_decode(questions.tokens[b], skip_special_tokens=True)
        answers = tokenizer.batch_decode(questions.answer[b], skip_special_tokens=True)
        for text, answer in zip(texts, answers, strict=True):
            assert answer == answer_of(text, items), (text, items)
            counts[answer] = counts.get(answer, 0) + 1
    assert abs(counts["yes"] - counts["no"]) < 60
    assert counts["nothing"] > 30 and counts["0"] > 80
    # Types that need a garment of which there is one are replaced where there is none.
    assert (questions.type == all_types(300)).float().mean() > 0.95
    assert torch.equal(Questioner().ask(scenes, 0, index, all_types(300)).tokens, questions.tokens)


def test_pool_needs_every_class() -> None:
    with pytest.raises(ValueError, match="needs images of each of 10 classes"):
        GarmentPool(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="multiple of patch_size, got 48 and 7"):
        compose(garments(), 0, torch.arange(2), 48, 7)


def test_pixels_are_those_of_the_processor() -> None:
    pixels = compose(garments(), 0, torch.arange(2), **SCENE).pixels
    images = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in pixels]
    inputs = build_processor(48, 8)(images=images, text=[prompt("?")] * 2, return_tensors="pt")
    torch.testing.assert_close(normalised(pixels), inputs["pixel_values"], rtol=0, atol=1e-5)


def test_cls_attention_is_the_towers() -> None:
    model = build_tiny_vlm(VISION, TEXT)
    tower: CLIPVisionModel = model.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(torch.randn(2, 3, 48, 48), output_hidden_states=True, output_attentions=True)
    row = out.attentions[-2][:, :, 0, 1:]
    expected = (row / row.sum(-1, keepdim=True)).mean(1)
    actual = cls_attention(tower.encoder.layers[-2], out.hidden_states[-3])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_questions_together_are_questions_alone() -> None:
    """Each question, with others before it and hidden tokens, must come out as alone and with those tokens removed."""
    torch.manual_seed(0)
    language = build_tiny_vlm(VISION, TEXT | {"num_hidden_layers": 3}).model.language_model.eval()
    prefix, count, length = 9, 3, 4
    shown = torch.rand(2, prefix) < 0.5
    shown[:, 0] = True
    embeds = torch.randn(2, prefix + count * length, 32)
    mask, positions = multi_question_layout(shown, count, length)
    together = language(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    for b in range(2):
        for q in range(count):
            own = slice(prefix + q * length, prefix + (q + 1) * length)
            alone = torch.cat([embeds[b, :prefix][shown[b]], embeds[b, own]])
            expected = language(inputs_embeds=alone[None]).last_hidden_state[0, -length:]
            torch.testing.assert_close(together[b, own], expected, rtol=1e-4, atol=1e-5)


def test_hidden_tokens_are_background() -> None:
    trainer = Trainer(RECIPE, garments())
    scenes, _ = trainer.batch()
    shown = trainer.objective._shown(scenes)
    assert shown[scenes.coverage.amax(1) > 0.02].all()
    whole = shown.all(1)
    assert whole.any() and not whole.all()


def test_training_learns_and_repeats(capsys) -> None:
    def losses() -> list[float]:
        trainer = Trainer(RECIPE, garments(), seed=1)
        return [float(trainer.step(i / 60)[0]) for i in range(30)]

    first = losses()
    assert np.mean(first[-3:]) < 0.6 * np.mean(first[:3])
    assert losses() == first


def test_saved_model_is_measured(tmp_path, capsys) -> None:
    pool = garments()
    trainer = Trainer(RECIPE, pool)
    assert trainer.run(steps=3, every=2)
    printed = capsys.readouterr().out
    assert "step 2 " in printed and "3 steps in" in printed and "count class" in printed
    moved = [not torch.equal(a, b) for a, b in zip(trainer.average.parameters(), trainer.model.parameters())]  # noqa: B905
    assert all(moved[:3])
    vlm.save(trainer.average, tmp_path, pool, samples=2)
    model, processor = load_tiny_vlm(tmp_path)
    assert next(p for p in load_tiny_vlm(tmp_path, torch.float16)[0].parameters()).dtype == torch.float16
    shares = vlm.accuracy(model, pool, 0, scenes=5, batch_size=3)
    assert list(shares) == ["all", *TYPES] and 0 <= shares["all"] <= 1
    samples = load_samples(tmp_path)
    assert len(samples) == 2 and samples[0][0].size == (48, 48)
    assert {question["type"] for _, asked in samples for question in asked} <= set(TYPES)
    assert processor.tokenizer(samples[0][1][0]["question"]).input_ids.count(processor.tokenizer.unk_token_id) == 0


def test_accuracy_counts_right_answers(monkeypatch) -> None:
    """A model that always says the truth, or nothing, has all, or none, right."""
    pool, scenes = garments(), 4
    model = build_tiny_vlm(VISION, TEXT)
    truth = (
        Questioner()
        .ask(compose(pool, 7, torch.arange(scenes), **SCENE), 7, torch.arange(scenes), all_types(scenes))
        .answer.flatten(0, 1)
    )
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, truth], 1))
    assert set(vlm.accuracy(model, pool, 7, scenes).values()) == {1.0}
    wrong = truth.clone()
    wrong[:: len(TYPES), 0] = 0
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, wrong], 1))
    shares = vlm.accuracy(model, pool, 7, scenes)
    assert shares["what"] < 1 and shares["all"] == pytest.approx(5 / 6)


def test_interrupted_run_keeps_the_average(monkeypatch, capsys) -> None:
    trainer = Trainer(RECIPE, garments())
    step = trainer.step

    def interrupted(progress: float):
        if trainer.steps == 2:
            raise KeyboardInterrupt
        return step(progress)

    monkeypatch.setattr(trainer, "step", interrupted)
    assert not trainer.run(minutes=1.0)
    assert "interrupted after 2 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="either minutes or steps"):
        trainer.run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_is_the_eager_step() -> None:
    pool = garments()
    pool = GarmentPool(pool.images, torch.arange(len(CLASSES)).repeat_interleave(3), "cuda")
    # Hidden tokens are drawn anew by the steps that warm a graph up.
    recipe = replace(RECIPE, hidden=0.0)
    measured = {}
    for speed in ("eager", "graph"):
        trainer = Trainer(recipe, pool, speed=speed)
        measured[speed] = torch.stack([trainer.step(0.1) for _ in range(5)])
        assert (trainer.graph is None) == (speed == "eager")
    torch.testing.assert_close(measured["graph"][:, :5], measured["eager"][:, :5], rtol=0.02, atol=0.02)
    assert measured["graph"][-1, 0] < measured["graph"][0, 0]


def test_table() -> None:
    shares = dict.fromkeys(TYPES, 0.5)
    rows = [
        dict(method=method, budget=budget, seed=seed, all=share + seed / 100, **shares)
        for method, budget, share in (("full", 1.0, 0.9), ("hired", 0.2, 0.8))
        for seed in (0, 1)
    ]
    lines = vlm.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| 100% | full | 90.5 (90.0 to 91.0) | 50.0 |")
    assert lines[3].startswith("| 20% | hired | 80.5 (80.0 to 81.0) |")
