"""The methods beside HiRED on tiny stock models of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo.heads.token_dropping import tome, var
from zoo.heads.token_dropping.base import Probes
from zoo.heads.token_dropping.dyvte import DyVTE, create_routers, exit_features, save_routers
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
VAR_OPTIONS = {"sink_dims": (3, 5), "tau": 1.5, "rho": 0.9, "total": 0.05, "keep": 0.1}
EDITS = {"fastv": {"budget": 0.4}, "dyvte": {"exit_layer": 2}, "var": VAR_OPTIONS, "aki": {}}


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
        assert logits.shape != stock.shape or not torch.allclose(logits, stock, atol=1e-6)
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


class ByText(DyVTE):
    """DyVTE whose prompts leave at layers that follow from the number of their text tokens."""

    def _leaves(self, layer: int, hidden: Tensor, prompt: Any) -> list[bool]:
        text = (prompt.attention_mask & ~prompt.image_mask)[:, : self._prompt.image_mask.shape[1]].sum(1)
        return (layer >= 1 + text % 3).tolist()


@torch.no_grad()
def test_dyvte_prompts_of_a_batch_leave_at_their_own_layers(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE], [TALL], [WIDE]])
    with zoo.hired.apply(next_model, method=ByText(exit_layer=1)):
        logits, expected = next_model(**inputs).logits, generate(next_model, inputs, use_cache=False)
        tokens = generate(next_model, inputs)
        assert torch.equal(tokens, expected)
        assert torch.equal(generate(next_model, inputs, cache_implementation="static"), expected)
        depths = set()
        for b in range(3):
            row = row_of(inputs, b, slice(b, b + 1))
            out = next_model(**row, use_cache=True)
            torch.testing.assert_close(logits[b, -out.logits.shape[1] :], out.logits[0], rtol=1e-3, atol=1e-4)
            assert torch.equal(generate(next_model, row)[0], tokens[b])
            lengths = [out.past_key_values.get_seq_length(i) for i in range(4)]
            depths.add(lengths.index(int((row["input_ids"] != IMAGE).sum())))
    assert depths == {1, 2, 3}


@torch.no_grad()
def test_dyvte_leaves_where_its_router_says_so(next_model: nn.Module, tmp_path: Any) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    routers = create_routers(32, 4, 8)
    for i, router in enumerate(routers):
        # Logits of a constant sign: only the second router, before layer 2, says "leave".
        seen = []
        with zoo.hired.apply(next_model, method=DyVTE(exit_layer=i + 1)) as handle:
            handle.method._leaves = lambda layer, hidden, prompt, seen=seen: (
                seen.append(exit_features(hidden, prompt)) or [False]
            )
            next_model(**inputs)
        hidden = router[:2](seen[i])
        router[2].weight[0] = 0
        router[2].weight[1] = hidden[0] * (1 if i == 1 else -1)
    save_routers(routers, tmp_path / "routers.safetensors")
    with zoo.hired.apply(next_model, method="dyvte", exit_layer=2):
        expected = next_model(**inputs).logits
    with zoo.hired.apply(next_model, method="dyvte", routers=tmp_path / "routers.safetensors"):
        assert torch.equal(next_model(**inputs).logits, expected)
    with pytest.raises(ValueError, match="3 routers with 64 inputs"):
        zoo.hired.apply(next_model, method="dyvte", routers=create_routers(16, 4))
    with pytest.raises(ValueError, match="either routers"):
        DyVTE()
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no routers"):
        DyVTE(routers=tmp_path / "other.safetensors")


# Methods that edit attention


def reference_var(method: var.VAR, prompt_length: int, image: Tensor, sinks: dict[int, Tensor]) -> Any:
    """Eager attention with redistributed probabilities, for one prompt without padding."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        weights = (q @ k.mT * scaling + mask).softmax(-1)
        if module.layer_idx >= var.FIRST_LAYER:
            more = k.shape[2] - prompt_length
            rows = torch.arange(k.shape[2])[-q.shape[2] :][None] > image[0].nonzero().max()
            pads = (nn.functional.pad(x, (0, more)) for x in (image, sinks[module.layer_idx]))
            weights, _ = var.redistribute(weights, *pads, rows, method.settings)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    return attend


@torch.no_grad()
def test_var_equals_redistributed_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral import modeling_mistral

    model = deep("next_mistral")
    inputs = inputs_of(model, [[SQUARE]], text=5)
    with zoo.hired.apply(model, method="var", **VAR_OPTIONS) as handle:
        expected = model(**inputs).logits
        tokens = generate(model, inputs)
        assert torch.equal(generate(model, inputs, use_cache=False), tokens)
        assert torch.equal(generate(model, inputs, cache_implementation="static"), tokens)
        assert torch.equal(generate(model, inputs, num_beams=2), generate(model, inputs, num_beams=2, use_cache=False))
        monkeypatch.setattr(var, "ROWS", 2)
        torch.testing.assert_close(model(**inputs).logits, expected)
    method, sinks = handle.method, {}
    image = inputs["input_ids"] == IMAGE

    def find(module: nn.Module, args: tuple, layer: int) -> None:
        if args[0].shape[1] > 1:
            sinks[layer] = var.find_sinks(args[0], (3, 5), 1.5, model.config.text_config.rms_norm_eps)

    layers = model.model.language_model.layers
    found = [layer.register_forward_pre_hook(partial(find, layer=i)) for i, layer in enumerate(layers)]
    attend = reference_var(method, image.shape[1], image, sinks)
    monkeypatch.setattr(modeling_mistral, "eager_attention_forward", attend)
    model.set_attn_implementation({"text_config": "eager"})
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(model, inputs), tokens)
    assert len(found) == 4 and all(x.any() for x in sinks.values())


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_aki_lets_images_see_the_question(next_model: nn.Module, implementation: str) -> None:
    inputs = inputs_of(next_model, [[SQUARE]], text=4)
    ids = inputs["input_ids"][0]
    image, L = ids == IMAGE, len(ids)
    end = int(image.nonzero().max()) + 3
    ids[end], ids[end + 1 :] = 63, 5
    place = torch.arange(L)
    question = (place > image.nonzero().max()) & (place < end)
    mask = (place <= place[:, None]) | (image[:, None] & question)
    next_model.set_attn_implementation(implementation)
    try:
        additive = torch.zeros(L, L).masked_fill(~mask, torch.finfo(torch.float32).min)
        given = mask if implementation == "sdpa" else additive
        expected = next_model(**{**inputs, "attention_mask": given[None, None]}).logits
        with zoo.hired.apply(next_model, method="aki", end_token=63):
            torch.testing.assert_close(next_model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
            tokens = generate(next_model, inputs)
            for kwargs in ({"use_cache": False}, {"cache_implementation": "static"}):
                assert torch.equal(generate(next_model, inputs, **kwargs), tokens)
            with pytest.raises(NotImplementedError, match="one piece"):
                generate(next_model, inputs, prefill_chunk_size=8)
    finally:
        next_model.set_attn_implementation("sdpa")


def test_methods_that_drop_nothing_refuse_budgets(llava: nn.Module) -> None:
    for method in ("var", "aki", "dyvte"):
        with pytest.raises(ValueError, match="leave budget unset"):
            zoo.hired.apply(llava, 0.5, method=method)
    with pytest.raises(ValueError, match="are not known"):
        zoo.hired.apply(llava, method="var")
    with pytest.raises(ValueError, match="got taux"):
        zoo.hired.apply(llava, method="var", taux=3)
    assert not zoo.hired.remove(llava)


# PruMerge and ToMe


@torch.no_grad()
def test_prumerge_counts_and_refusals(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE], [WIDE]])
    for budget, expected in ((0.25, [5 * 5, 4 * 5]), ([22, 0.5], [5 * 4, 4 * 9])):
        with zoo.hired.apply(next_model, budget, method="prumerge") as handle:
            next_model(**inputs)
        assert handle.lengths == expected
    with pytest.raises(ValueError, match="no patch"), zoo.hired.apply(next_model, 9, method="prumerge"):
        next_model(**inputs)
    with pytest.raises(NotImplementedError, match="CLS"):
        zoo.hired.apply(build("onevision"), method="prumerge")


@torch.no_grad()
def test_tome_merges_in_the_tower(next_model: nn.Module) -> None:
    inputs = inputs_of(next_model, [[SQUARE]])
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with zoo.hired.apply(next_model, method="tome", r=0) as handle:
        nothing = handle.encode(**images)
    with zoo.hired.apply(next_model, 1.0, grid="fixed", bypass=False) as handle:
        _, partitions, grids = handle._images(**images)
    tower = handle.family.tower()
    stock = next_model.model.multi_modal_projector(tower.run(partitions, grids, Probes()).patches)
    torch.testing.assert_close(nothing.embeddings[0], stock.flatten(0, 1))
    outs = []
    for implementation in ("sdpa", "eager"):
        next_model.set_attn_implementation(implementation)
        with zoo.hired.apply(next_model, method="tome", r=[3, 2]) as handle:
            outs.append(handle.encode(**images))
    next_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(*(out.embeddings[0] for out in outs), rtol=1e-4, atol=1e-5)
    assert outs[0].lengths == [5 * 11]
    alone = outs[0].source.view(5, 11)
    assert ((alone == -1).sum(1) >= 1).all() and (alone[alone >= 0].diff() > 0).all()


def test_tome_schedules() -> None:
    assert sum(tome.schedule(23, 576, 115)) == 461 and max(tome.schedule(23, 576, 115)) == 21
    assert tome.schedule(3, 16, 16) == [0, 0, 0] and tome.schedule(3, 16, 2) == [8, 4, 2]
    with pytest.raises(ValueError, match="2 at least"):
        tome.schedule(3, 16, 1)
    with pytest.raises(ValueError, match="not both"):
        tome.ToMe(0.5, r=3)
    with pytest.raises(ValueError, match="one budget"):
        tome.ToMe([0.5, 0.4])


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
