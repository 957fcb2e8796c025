"""The demonstration of token dropping on the small vision-language model, and its measurement by budget."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main, vlm_demo
from zoo.cli.vlm_demo import kept_patches
from zoo.heads.tiny_vlm import build_tiny_vlm, load_tiny_vlm
from zoo.train import vlm
from zoo.train.scenes import GarmentPool

VISION = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8
)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def pool() -> GarmentPool:
    generator = torch.Generator().manual_seed(0)
    return GarmentPool(
        torch.randint(0, 255, (20, 28, 28), generator=generator, dtype=torch.uint8), torch.arange(20) % 10
    )


@pytest.fixture(scope="module")
def folder(pool, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vlm") / "model"
    vlm.save(build_tiny_vlm(VISION, TEXT).eval(), path, pool, samples=3)
    return path


def test_demo_prints_and_draws(folder, tmp_path, capsys) -> None:
    options = ["--scenes", "2", "--device", "cpu", "--budgets", "1", "0.5", "0.1"]
    assert main(["vlm", "demo", "--model", str(folder), "--out", str(tmp_path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 questions about 2 scenes of held-out garments, on cpu"
    rows = [line.split()[:2] for line in lines[2:9]]
    methods = ["hired", "spatial", "random"]
    assert rows == [["100%", "full"], *(["50%", m] for m in methods), *(["10%", m] for m in methods)]
    assert lines[9] == "first scene, answers with 100%, 50%, 10% of the tokens (hired):"
    assert sum("(true: " in line for line in lines) == 6
    with Image.open(tmp_path / "kept_tokens.png") as image:
        assert image.size == (3 * (48 + 6), 3 * (48 + 6 + 16))


def test_pictures_show_what_is_kept(folder) -> None:
    model, processor = load_tiny_vlm(folder)
    image = Image.fromarray(np.full((48, 48, 3), 200, np.uint8))
    kept = kept_patches(model, processor, image, "hired", 0.5)
    assert kept.shape == (6, 6) and kept.sum() == 18
    assert kept_patches(model, processor, image, "random", 0.1).sum() == 3
    pixels = np.asarray(vlm_demo._shaded(image, kept))
    bright = np.kron(kept.numpy(), np.ones((8, 8), bool))
    assert (pixels[bright] == 200).all() and (pixels[~bright] == 50).all()


def test_demo_without_model(tmp_path, capsys) -> None:
    assert main(["vlm", "demo", "--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "holds no model. Train one on a GPU" in capsys.readouterr().err
    assert main(["vlm", "demo", "--budgets", "1.5"]) == 2


def test_evaluate_leaves_the_model_as_it_was(folder, pool) -> None:
    model, _ = load_tiny_vlm(folder)
    rows = vlm.evaluate(model, (1.0, 0.3), ("hired", "random"), (0, 1), pool=pool, scenes=3, batch_size=2)
    cases = [(row["method"], row["budget"], row["seed"]) for row in rows]
    assert cases == [(m, b, s) for m, b in (("full", 1.0), ("hired", 0.3), ("random", 0.3)) for s in (0, 1)]
    assert all(0 <= row["all"] <= 1 for row in rows)
    assert "generate" not in model.__dict__ and "forward" not in model.__dict__
    again = vlm.evaluate(model, (1.0,), seeds=(0, 1), pool=pool, scenes=3, batch_size=2)
    assert again == rows[:2]


def test_evaluate_drops_tokens(folder, pool, monkeypatch) -> None:
    """What the language model reads must be the budget's number of tokens, not all of them."""
    model, _ = load_tiny_vlm(folder)
    lengths = []

    def count(module, args, kwargs) -> None:
        lengths.append(kwargs["inputs_embeds"].shape[1])

    model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    vlm.evaluate(model, (1.0, 0.25), ("hired",), (0,), pool=pool, scenes=1, batch_size=1)
    # <s>, visual tokens, question; then one token at a time.
    assert [length for length in lengths if length > 1] == [1 + 36 + 8, 1 + 9 + 8]


def test_results_are_written(tmp_path) -> None:
    vlm.write_results(tmp_path, [dict(method="full", budget=1.0, seed=0, all=0.5)])
    assert (tmp_path / "budgets.csv").read_text().split() == ["method,budget,seed,all", "full,1.0,0,0.5"]


def test_command_trains_and_measures(pool, tmp_path, monkeypatch, capsys) -> None:
    recipe = vlm.Recipe(batch_size=4, questions=2, vision=VISION, text=TEXT)
    monkeypatch.setattr(vlm, "Recipe", _Recipe(recipe))
    monkeypatch.setattr(vlm, "garment_pool", lambda root, split, device: pool)
    monkeypatch.setattr(vlm.torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "model")
    vlm.main(["--out", out, "--steps", "2", "--scenes", "2"])
    printed = capsys.readouterr().out
    assert "2 steps in" in printed and "validation | all " in printed
    vlm.main(["--out", out, "--evaluate", "--scenes", "1"])
    assert "| 20% | hired |" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "budgets.csv", "samples"} <= {
        p.name for p in (tmp_path / "model").iterdir()
    }


class _Recipe:
    """Stands for the class `Recipe`: whatever is asked for, a small one."""

    batch_size, lr = 4, 1e-3

    def __init__(self, recipe: vlm.Recipe) -> None:
        self.recipe = recipe

    def __call__(self, **_) -> vlm.Recipe:
        return self.recipe
