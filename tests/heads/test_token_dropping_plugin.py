"""The token dropping plug-in on tiny stock models of transformers."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration

import zoo
from zoo.heads.token_dropping import AttentionEdit, Prompt, plugin
from zoo.heads.token_dropping.families import family_of

from .vlm_models import IMAGE, NAMES, PAD, build, geometry, inputs_of, row_of, stock_lengths

SQUARE, WIDE, TALL = (30, 28), (14, 40), (48, 17)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture(scope="module")
def next_model() -> nn.Module:
    return build("next_llama")


def generate(model: nn.Module, inputs: dict, **kwargs) -> torch.Tensor:
    """New tokens."""
    # A random model might utter a placeholder.
    settings = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, "suppress_tokens": [IMAGE]}
    out = model.generate(**inputs, **{**settings, **kwargs})
    return out[:, inputs["input_ids"].shape[1] :]


def hooks(model: nn.Module) -> list:
    """Ids of all hooks; transformers leaves some of its own behind after a call."""
    return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]


@torch.no_grad()
def test_the_tower_and_the_order_are_the_stock_models(model: nn.Module) -> None:
    """All tokens and newlines kept: features equal those of the stock model."""
    inputs = inputs_of(model, [[SQUARE], [WIDE]])
    newline = "all" if family_of(model).has_newline else "drop"
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    expected = model.model.get_image_features(**images, return_dict=True).pooler_output
    with zoo.hired.apply(model, 1.0, newline=newline, bypass=False) as handle:
        encoded = handle.encode(**images)
        logits = model(**inputs).logits
    for a, e in zip(encoded.embeddings, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_budget_of_one_is_the_stock_model(model: nn.Module) -> None:
    inputs = inputs_of(model, [[SQUARE]])
    expected = model(**inputs).logits, generate(model, inputs)
    with zoo.hired.apply(model, 1.0) as handle:
        assert not handle.active
        assert torch.equal(model(**inputs).logits, expected[0]) and torch.equal(generate(model, inputs), expected[1])


@torch.no_grad()
def test_remove_restores_the_model(model: nn.Module) -> None:
    inputs = inputs_of(model, [[SQUARE]])
    expected = model(**inputs).logits
    before, hooks_before = dict(model.__dict__), hooks(model)
    handle = zoo.hired.apply(model, 0.3)
    assert handle.active and model(**inputs).logits.shape[1] < expected.shape[1]
    handle.remove()
    handle.remove()
    assert model.__dict__ == before and hooks(model) == hooks_before
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(ValueError, match="placeholders"), zoo.hired.apply(model, 0.3):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 1:-1], "attention_mask": None, **_fewer(inputs)})
    assert model.__dict__ == before and hooks(model) == hooks_before
    zoo.hired.apply(model, 0.3)
    zoo.hired.apply(model, 0.5)
    assert zoo.hired.remove(model) and not zoo.hired.remove(model)
    assert model.__dict__ == before


def _fewer(inputs: dict) -> dict:
    """Prompts with too few placeholders."""
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0]] = 5
    return {"input_ids": ids}


def test_methods_stay_bound_and_signatures_stay(next_model: nn.Module) -> None:
    expected = [inspect.signature(f) for f in (next_model.forward, next_model.generate)]
    with zoo.hired.apply(next_model):
        assert [inspect.signature(f) for f in (next_model.forward, next_model.generate)] == expected
    assert next_model.forward.__self__ is next_model


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_mixed_sizes_equals_one_by_one(model: nn.Module, side: str) -> None:
    sizes = [SQUARE, WIDE, TALL]
    inputs = inputs_of(model, [[size] for size in sizes], side=side)
    with zoo.hired.apply(model, 0.3, allocation="paper") as handle:
        logits, tokens = model(**inputs).logits, generate(model, inputs)
        lengths = handle.lengths
        for b in range(len(sizes)):
            row = row_of(inputs, b, slice(b, b + 1))
            alone = model(**row).logits
            assert handle.lengths == lengths[b : b + 1]
            part = logits[b, -alone.shape[1] :] if side == "left" else logits[b, : alone.shape[1]]
            torch.testing.assert_close(part, alone[0], rtol=1e-3, atol=1e-4)
            assert torch.equal(generate(model, row)[0], tokens[b])


@torch.no_grad()
def test_several_images_in_a_prompt(model: nn.Module) -> None:
    """Images of a prompt do not depend on each other; neighbouring placeholders belong to the right image."""
    prompts = [[SQUARE, WIDE], [TALL]]
    inputs = inputs_of(model, prompts)
    names = [n for n in ("pixel_values", "image_sizes") if n in inputs]
    with zoo.hired.apply(model, 0.3) as handle:
        encoded = handle.encode(**{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")})
        text = (inputs["attention_mask"] * (inputs["input_ids"] != IMAGE)).sum(1).tolist()
        longest = max(text[0] + sum(encoded.lengths[:2]), text[1] + encoded.lengths[2])
        assert model(**inputs).logits.shape[1] == longest
        for i in range(3 if "batch_num_images" not in inputs else 0):
            alone = handle.encode(**{n: inputs[n][i : i + 1] for n in names})
            assert torch.equal(alone.source, encoded.source.split(encoded.lengths)[i])
            torch.testing.assert_close(alone.embeddings[0], encoded.embeddings[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(generate(model, inputs)[1], generate(model, row_of(inputs, 1, slice(2, 3)))[0])


@torch.no_grad()
def test_generation_equals_a_loop_over_forward(model: nn.Module) -> None:
    inputs = inputs_of(model, [[SQUARE]])
    with zoo.hired.apply(model, 0.3):
        expected, ids = [], inputs["input_ids"]
        for _ in range(5):
            token = (
                model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[:, -1].argmax(-1)
            )
            expected.append(token)
            ids = torch.cat((ids, token[:, None]), 1)
        assert torch.equal(generate(model, inputs), torch.stack(expected, 1))


@torch.no_grad()
def test_ways_to_generate_agree(model: nn.Module) -> None:
    inputs = inputs_of(model, [[SQUARE], [WIDE]])
    with zoo.hired.apply(model, 0.3):
        greedy = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static"), greedy)
        assert torch.equal(generate(model, inputs, use_cache=False), greedy)
        if plugin.takes_encoded_images(model):
            assert torch.equal(generate(model, inputs, prefill_chunk_size=7), greedy)
        positional = {k: v for k, v in inputs.items() if k != "input_ids"}
        out = model.generate(inputs["input_ids"], **positional, max_new_tokens=1, suppress_tokens=[IMAGE])
        assert torch.equal(out[:, inputs["input_ids"].shape[1] :], greedy[:, :1])


@torch.no_grad()
def test_beams(model: nn.Module) -> None:
    """Beams of a batch equal those of each prompt; both returned sequences start with the prompt."""
    inputs = inputs_of(model, [[SQUARE], [WIDE]])
    beams = dict(num_beams=3, num_return_sequences=2, max_new_tokens=4, do_sample=False)
    with zoo.hired.apply(model, 0.3):
        out = model.generate(**inputs, **beams, return_dict_in_generate=True).sequences
        assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, 0))
        for b in range(2):
            row = row_of(inputs, b, slice(b, b + 1))
            alone = model.generate(**row, **beams)[:, row["input_ids"].shape[1] :]
            both = out[2 * b : 2 * b + 2, inputs["input_ids"].shape[1] :]
            n = min(alone.shape[1], both.shape[1])
            assert torch.equal(both[:, :n], alone[:, :n])
            assert (both[:, n:] == PAD).all() and (alone[:, n:] == PAD).all()


@torch.no_grad()
def test_returned_prompts_and_continuing_a_conversation(next_model: nn.Module) -> None:
    first, second = inputs_of(next_model, [[SQUARE]]), inputs_of(next_model, [[WIDE]], seed=1)
    with zoo.hired.apply(next_model, 0.3, prompt="trimmed") as handle:
        start = next_model.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        length = handle.prompt_length
        kept = handle.lengths[0]
        assert start.sequences.shape[1] == length + 4 and (start.sequences[0] == IMAGE).sum() == kept
        ids = torch.cat((start.sequences, second["input_ids"]), 1)
        images = {name: second[name] for name in ("pixel_values", "image_sizes")}
        more = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        with_cache = next_model.generate(ids, past_key_values=start.past_key_values, **images, **more)
        both = torch.cat([first["input_ids"], start.sequences[:, length:], second["input_ids"]], 1)
        pixels = torch.zeros(2, 5, *first["pixel_values"].shape[2:])
        pixels[0], pixels[1, :4] = first["pixel_values"][0], second["pixel_values"][0]
        sizes = torch.cat((first["image_sizes"], second["image_sizes"]))
        anew = next_model.generate(
            both, pixel_values=pixels, image_sizes=sizes, max_new_tokens=4, do_sample=False,
            attention_mask=torch.ones_like(both),
        )  # fmt: skip
    assert torch.equal(with_cache[:, -4:], anew[:, -4:])


@torch.no_grad()
def test_limits_count_the_prompt_as_given(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    L = inputs["input_ids"].shape[1]
    with zoo.hired.apply(next_model, 0.3):
        out = next_model.generate(**inputs, max_length=L + 3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == L + 3


@torch.no_grad()
def test_placeholders_one_each_or_as_many_as_kept(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    ids = inputs["input_ids"][0]
    with zoo.hired.apply(next_model, 0.3, exact=True) as handle:
        expected = next_model(**inputs).logits
        counts = handle.token_counts(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
        assert counts == handle.lengths
        for count in (1, counts[0]):
            places = (ids == IMAGE).nonzero()
            short = torch.cat((ids[: places[0]], torch.full((count,), IMAGE), ids[places[-1] + 1 :]))[None]
            logits = next_model(**{**inputs, "input_ids": short, "attention_mask": None}).logits
            assert torch.equal(logits, expected)


@torch.no_grad()
def test_original_positions(next_model: nn.Module) -> None:
    """Positions have gaps where tokens were dropped; with everything kept they are the compact ones."""
    inputs, seen = inputs_of(next_model, [[SQUARE]]), []
    hook = next_model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with zoo.hired.apply(next_model, 0.3, positions="original"):
        tokens = generate(next_model, inputs)
    with zoo.hired.apply(next_model, 0.3):
        compact = generate(next_model, inputs)
    hook.remove()
    L = inputs["input_ids"].shape[1]
    prompt = seen[0][0]
    assert prompt[-1] == L - 1 and (prompt.diff() > 0).all() and len(prompt) < L
    assert seen[1].flatten().tolist() == [L] and tokens.shape == compact.shape
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    kept = prompt[(prompt >= image[0]) & (prompt <= image[-1])] - image[0]
    assert (kept[:8] < 16).all()


def test_training_with_labels(model: nn.Module) -> None:
    """Labels lose the same places, gradients reach tower and projector through the kept tokens."""
    inputs = inputs_of(model, [[SQUARE], [WIDE]], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with zoo.hired.apply(model, 0.3):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert any("vision_tower" in n for n in grads) and any("projector" in n for n in grads)
    assert all(g.isfinite().all() for g in grads.values())
    # The same loss, from logits at the text alone.
    text = (labels != -100).sum()
    assert out.logits.shape[1] < labels.shape[1] and text > 0


@torch.no_grad()
def test_calls_without_images_are_stock(model: nn.Module) -> None:
    ids = torch.tensor([[1, 5, 9, 11]])
    expected = model(input_ids=ids).logits
    with zoo.hired.apply(model, 0.3):
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)


@torch.no_grad()
def test_without_pre_encoded_images(next_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of transformers before 5.23 take embeddings instead."""
    inputs = inputs_of(next_model, [[SQUARE], [WIDE]])
    with zoo.hired.apply(next_model, 0.3):
        expected = next_model(**inputs).logits, generate(next_model, inputs)
    monkeypatch.setattr(plugin, "takes_encoded_images", lambda model: False)
    with zoo.hired.apply(next_model, 0.3):
        torch.testing.assert_close(next_model(**inputs).logits, expected[0])
        assert torch.equal(generate(next_model, inputs), expected[1])
        beams = dict(num_beams=2, num_return_sequences=2, min_new_tokens=None)
        assert torch.equal(
            generate(next_model, inputs, **beams)[::2, 0], generate(next_model, inputs, num_beams=2)[:, 0]
        )
        with pytest.raises(NotImplementedError, match="chunks"):
            generate(next_model, inputs, prefill_chunk_size=7)


@torch.no_grad()
def test_embeddings_instead_of_ids(model: nn.Module) -> None:
    inputs = inputs_of(model, [[SQUARE], [WIDE]], side="right")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embedded = {**{k: v for k, v in inputs.items() if k != "input_ids"}, "inputs_embeds": embeddings}
    with zoo.hired.apply(model, 0.3):
        torch.testing.assert_close(model(**embedded).logits, model(**inputs).logits)
        settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
        expected = model.generate(**inputs, **settings)
        assert torch.equal(model.generate(**embedded, **settings), expected[:, -4:])
        assert torch.equal(model.generate(**inputs, inputs_embeds=embeddings, **settings), expected)


class Recorder(AttentionEdit):
    """An edit that changes nothing."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls, self.hooks = [], []

    def install(self, language_model: nn.Module) -> list:
        hook = language_model.layers[0].register_forward_pre_hook(lambda m, args: self.calls.append(args[0].shape[:2]))
        return [hook]

    def begin(self, prompt: Prompt) -> None:
        self.calls.append(prompt)

    def end(self) -> None:
        self.calls.append("end")


@torch.no_grad()
@pytest.mark.parametrize("encoded_first", [True, False])
def test_edits_are_told_of_prompts(model: nn.Module, encoded_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin and end once around a call, beams and errors included; without images nothing is told."""
    inputs, edit = inputs_of(model, [[SQUARE], [WIDE]]), Recorder()
    if not encoded_first:
        monkeypatch.setattr(type(model), "_supports_mm_encoder_outputs", lambda self: False, raising=False)
    expected = generate(model, inputs, num_beams=2)
    with zoo.hired.apply(model, method=edit) as handle:
        assert torch.equal(generate(model, inputs, num_beams=2), expected)
        prompt, *shapes, end = edit.calls
        assert end == "end" and all(isinstance(shape, torch.Size) and shape[0] == 4 for shape in shapes)
        assert torch.equal(prompt.image_mask, inputs["input_ids"] == IMAGE)
        assert torch.equal(prompt.attention_mask, inputs["attention_mask"] != 0)
        assert torch.equal(prompt.expand(4).token_ids, inputs["input_ids"].repeat_interleave(2, 0))
        assert handle.prompt_length == inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match="no multiple"):
            prompt.expand(3)
        edit.calls.clear()
        with pytest.raises(Exception, match="do not match"):
            model(**{**inputs, **_fewer(inputs)})
        assert edit.calls[-1] == "end"
        edit.calls.clear()
        model(input_ids=torch.tensor([[1, 5, 9]]))
        assert edit.calls == [torch.Size([1, 3])]
    with pytest.raises(ValueError, match="pass them to its constructor"):
        zoo.hired.apply(model, 0.3, method=edit)


def test_wrong_inputs_are_explained(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    with zoo.hired.apply(next_model, 0.3):
        with pytest.raises(ValueError, match="image_sizes is missing"):
            next_model(**{k: v for k, v in inputs.items() if k != "image_sizes"})
        with pytest.raises(ValueError, match="hold .* image placeholders, but 1 images need"):
            next_model(**{**inputs, **_fewer(inputs)})
        with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
            next_model(pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match=r"pixel_values must be \[1, 5 or more"):
            next_model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
        with pytest.raises(ValueError, match="attention_mask must be"):
            next_model(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
        with pytest.raises(NotImplementedError, match="select_strategy='default'"):
            next_model(**inputs, vision_feature_select_strategy="full")


def test_wrong_options_are_explained(next_model: nn.Module) -> None:
    for options, message in (
        (dict(budget=1.5), "fraction in"),
        (dict(budget=0), "at least 1"),
        (dict(budget="all"), "must be a fraction"),
        (dict(budget=True), "must be a fraction"),
        (dict(method="magic"), "method must be one of"),
        (dict(grid="square"), "grid must be one of"),
        (dict(newline="some"), "newline must be one of"),
        (dict(prompt="none"), "prompt must be one of"),
        (dict(positions="none"), "positions must be one of"),
        (dict(allocation="best"), "allocation must be one of"),
        (dict(alpha=2), "alpha must be"),
        (dict(budget_layer=9), "has 4 layers"),
        (dict(exact=True, spatial_budget=0.1), "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.hired.apply(next_model, **options)
    with pytest.raises(ValueError, match="needs a model with newline tokens"):
        zoo.hired.apply(build("llava"), 0.3, newline="all")
    with pytest.raises(TypeError):
        zoo.hired.apply(next_model, 0.3, colour="red")
    assert next_model.__dict__.get("forward") is None


def test_other_models_are_refused() -> None:
    class Qwen2VLForConditionalGeneration(nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="three axes"):
        zoo.hired.apply(Qwen2VLForConditionalGeneration())
    with pytest.raises(NotImplementedError, match="supports LlavaForConditionalGeneration"):
        zoo.hired.apply(nn.Linear(2, 2))


def test_subclasses_are_taken() -> None:
    class Mine(LlavaNextForConditionalGeneration):
        pass

    model = build("next_llama")
    mine = Mine(model.config).eval()
    with zoo.hired.apply(mine, 0.3) as handle:
        assert handle.active


@torch.no_grad()
def test_per_image_budgets(model: nn.Module) -> None:
    inputs = inputs_of(model, [[SQUARE], [WIDE]])
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with zoo.hired.apply(model, [0.5, 7], exact=True) as handle:
        lengths = handle.encode(**images).lengths
        assert lengths[1] == 7 and lengths[0] > 7
        with pytest.raises(ValueError, match="entry for 2 images, but the call brings 1"):
            model(**row_of(inputs, 0, slice(0, 1)))


@torch.no_grad()
def test_large_mosaics_of_onevision_are_resampled_first() -> None:
    """A budget of everything equals the stock features, and a selection keeps rows of them."""
    pinpoints = [[16 * a, 16 * b] for a in range(1, 7) for b in range(1, 7)]
    model = build("onevision", image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_2")
    inputs = inputs_of(model, [[(60, 75)], [SQUARE]])
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    grids = geometry(model, [(60, 75), SQUARE])
    assert grids[0].shrunk and stock_lengths(model, [(60, 75)])[0] < 16 * (1 + 20)
    expected = model.model.get_image_features(**images, return_dict=True).pooler_output
    with zoo.hired.apply(model, 1.0, newline="all", bypass=False) as handle:
        for a, e in zip(handle.encode(**images).embeddings, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    for options in (dict(exact=True), dict(allocation="paper"), dict(method="spatial"), dict(method="random")):
        with zoo.hired.apply(model, 0.25, **options) as handle:
            encoded = handle.encode(**images)
            known = handle.token_counts(**images)
            assert known is None or known == encoded.lengths
            difference = (encoded.embeddings[0][:, None] - expected[0]).abs().amax(-1)
            assert difference.min(1).values.max() < 1e-5 and len(difference.argmin(1).unique()) == encoded.lengths[0]
            assert torch.equal(generate(model, inputs)[0], generate(model, row_of(inputs, 0, slice(0, 1)))[0])
