"""The methods beside HiRED on tiny stock models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.heads.token_dropping.fastv import FastV

from .vlm_models import IMAGE, TEXT, build, inputs_of, row_of

SQUARE, WIDE, TALL = (30, 28), (14, 40), (48, 17)
NAMES = ["llava", "next_llama", "next_mistral"]
DROPPERS = {
    "visionzip": {"budget": 0.3},
    "prumerge": {"budget": 0.2},
    "prumerge+": {"plus": True},
    "tome": {"budget": 0.4},
}
EDITS = {"fastv": {"budget": 0.4}}


def deep(name: str, **changes: Any) -> nn.Module:
    """A tiny model whose decoder has four layers."""
    text = name.partition("_")[2] or "llama"
    heads = 2 if text == "mistral" else 4
    return build(
        name, text_config={**TEXT, "model_type": text, "num_hidden_layers": 4, "num_key_value_heads": heads}, **changes
    )


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return deep(request.param)


@pytest.fixture(scope="module")
def llava() -> nn.Module:
    return deep("llava")


@pytest.fixture(scope="module")
def next_model() -> nn.Module:
    return deep("next_llama")


def generate(model: nn.Module, inputs: dict, **kwargs: Any) -> Tensor:
    """New tokens."""
    settings = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, "suppress_tokens": [IMAGE]}
    out = model.generate(**inputs, **{**settings, **kwargs})
    return out[:, inputs["input_ids"].shape[1] :]


def hooks(model: nn.Module) -> list:
    return [(list(m._forward_hooks), list(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]


# All methods


@torch.no_grad()
@pytest.mark.parametrize("method", [*DROPPERS, *EDITS])
def test_a_batch_of_mixed_sizes_equals_one_by_one_and_remove_restores(model: nn.Module, method: str) -> None:
    sizes = [SQUARE, WIDE, TALL]
    inputs = inputs_of(model, [[size] for size in sizes])
    stock, before = model(**inputs).logits, hooks(model)
    with zoo.hired.apply(model, method=method.removesuffix("+"), **{**DROPPERS, **EDITS}[method]) as handle:
        logits, tokens = model(**inputs).logits, generate(model, inputs)
        assert logits.shape != stock.shape or not torch.allclose(logits, stock, atol=1e-3)
        for b in range(len(sizes)):
            row = row_of(inputs, b, slice(b, b + 1))
            alone = model(**row).logits
            torch.testing.assert_close(logits[b, -alone.shape[1] :], alone[0], rtol=1e-3, atol=1e-4)
            assert torch.equal(generate(model, row)[0], tokens[b])
            if method in DROPPERS:
                images = {k: v for k, v in row.items() if k not in ("input_ids", "attention_mask")}
                assert handle.token_counts(**images) in (None, handle.lengths)
    assert hooks(model) == before and torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("method", list(EDITS))
def test_right_padding_and_text_only_calls(next_model: nn.Module, method: str) -> None:
    inputs = inputs_of(next_model, [[SQUARE], [WIDE, TALL]], side="right")
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    expected = generate(next_model, text)
    with zoo.hired.apply(next_model, method=method, **EDITS[method]):
        logits = next_model(**inputs).logits
        for b, images in enumerate((slice(0, 1), slice(1, 3))):
            alone = next_model(**row_of(inputs, b, images)).logits
            torch.testing.assert_close(logits[b, : alone.shape[1]], alone[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(generate(next_model, text), expected)


# Methods that drop tokens in the decoder


class Fixed(FastV):
    """FastV with scores that follow from the place alone, so that a generation without a cache ranks alike."""

    def _scores(self, attended: Tensor, rotation: Any) -> Tensor:
        self._rows.clear()
        # Places are counted from the first token that is no padding.
        place = (attended.cumsum(1) - 1).clamp(min=0)
        return (place * 7919 % 101).float()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoding_with_any_cache_equals_decoding_without(next_model: nn.Module, implementation: str) -> None:
    inputs = inputs_of(next_model, [[SQUARE], [TALL, WIDE]])
    next_model.set_attn_implementation(implementation)
    try:
        with zoo.hired.apply(next_model, method=Fixed(0.3, layer=1)):
            expected = generate(next_model, inputs, use_cache=False)
            assert torch.equal(generate(next_model, inputs), expected)
            assert torch.equal(generate(next_model, inputs, cache_implementation="static"), expected)
            beams = generate(next_model, inputs, num_beams=3, use_cache=False)
            assert torch.equal(generate(next_model, inputs, num_beams=3), beams)
    finally:
        next_model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_decoding_by_hand_goes_on_after_the_prompt(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    with zoo.hired.apply(next_model, 0.25, method="fastv", layer=2):
        out = next_model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        step = next_model(**inputs, use_cache=True)
        cache, images = step.past_key_values, int((inputs["input_ids"] == IMAGE).sum())
        lengths = [cache.get_seq_length(i) for i in range(4)]
        L = inputs["input_ids"].shape[1]
        assert lengths == [L, L, L - images + round(images * 0.25)] + lengths[2:3]
        for expected in out.logits[1:]:
            step = next_model(input_ids=step.logits[:, -1:].argmax(-1), past_key_values=cache)
            torch.testing.assert_close(step.logits[:, -1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fastv_ranks_by_the_attention_map_and_keeps_labels_in_place(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    next_model.set_attn_implementation("eager")
    row = next_model(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
    next_model.set_attn_implementation("sdpa")
    image = inputs["input_ids"][0] == IMAGE
    keep = ~image
    keep[row.masked_fill(~image, -1).topk(10).indices] = True
    labels = inputs["input_ids"].masked_fill(image[None], -100)
    with zoo.hired.apply(next_model, 10, method="fastv", layer=2):
        out = next_model(**inputs, labels=labels)
    assert torch.equal(out.logits[0].any(-1), keep)
    assert out.loss.isfinite()


@torch.no_grad()
def test_fastv_refuses_what_it_cannot_do(next_model: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FastV(layer=0)
    with pytest.raises(ValueError, match="one budget"):
        FastV([0.2, 0.3])
    with pytest.raises(ValueError, match="below 4"):
        zoo.hired.apply(next_model, method="fastv", layer=4)
    assert not zoo.hired.remove(next_model)
    inputs = inputs_of(next_model, [[SQUARE]])
    with zoo.hired.apply(next_model, method="fastv"):
        with pytest.raises(NotImplementedError, match="one piece"):
            generate(next_model, inputs, prefill_chunk_size=8)
        cache = next_model(**inputs, use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="to a cache"):
            next_model(**{**inputs, "attention_mask": None}, past_key_values=cache)
        assert generate(next_model, inputs).shape == (1, 5)


# VisionZip


@torch.no_grad()
def test_visionzip_order_and_budgets(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE], [WIDE]])
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for legacy in ("fixed", "legacy"):
        with zoo.hired.apply(next_model, method="visionzip", budget=[0.5, 34], contextual=2, grid=legacy) as handle:
            encoded = handle.encode(**images)
        assert encoded.lengths == [5 * 8, 4 * 8]
        for image, source in zip(encoded.images, encoded.source.split(encoded.lengths), strict=True):
            k, N = image.partitions - 1, image.patches
            # CLS, patches, contextual tokens of the whole image; then those of the mosaic.
            whole, subs = source[:8], source[8:]
            assert whole[0] == -2 and (whole[6:] == -1).all() and whole[1:6].diff().gt(0).all()
            mosaic = image.mosaic(legacy=legacy == "legacy", crop=False).flatten()
            place = torch.empty((k + 1) * N, dtype=torch.int64)
            place[mosaic] = torch.arange(k * N)
            assert place[subs[: k * 5]].diff().gt(0).all()
            assert (subs[k * 5 : k * 6] == -2).all() and (subs[k * 6 :] == -1).all()
    with pytest.raises(ValueError, match="raise the budget"), zoo.hired.apply(next_model, 5, method="visionzip"):
        next_model(**inputs)
    with (
        pytest.raises(NotImplementedError, match="newline"),
        zoo.hired.apply(next_model, method="visionzip", budget=0.5, newline="all"),
    ):
        next_model(**inputs)
    with pytest.raises(ValueError, match="contextual"):
        zoo.hired.create_method("visionzip", contextual=1.0)


@torch.no_grad()
def test_visionzip_without_a_cls_token() -> None:
    model = build("onevision")
    inputs = inputs_of(model, [[(16, 32)]])
    with zoo.hired.apply(model, 0.5, method="visionzip", contextual=2) as handle:
        model(**inputs)
    assert handle.lengths == [3 * 8]
