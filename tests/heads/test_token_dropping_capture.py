"""Generation with recorded launches equals generate(); on a CPU the same steps run without graphs."""

from __future__ import annotations

import pytest
import torch

import zoo

from .vlm_models import NAMES, build, inputs_of

SQUARE, WIDE, OTHER = (30, 28), (14, 40), (29, 30)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_captured_generation_equals_generate(name: str, budget: float, device: str) -> None:
    """Batches with padding, and other prompts and pixels than those that were recorded."""
    model = build(name).to(device)
    first, second = (inputs_of(model, [[SQUARE], [WIDE]], seed=seed) for seed in (0, 1))
    first, second = ({k: v.to(device) for k, v in x.items()} for x in (first, second))
    with zoo.hired.apply(model, budget, exact=True) as handle:
        runner = handle.capture(first, max_new_tokens=12)
        for inputs in (second, first, second):
            expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            assert torch.equal(runner.generate(inputs), expected)
            short = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert torch.equal(runner.prefill(inputs), short[:, -1:])
        assert runner.cache_bytes > 0


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_end_go_on_with_padding(device: str) -> None:
    model = build("next_llama").to(device)
    inputs = {k: v.to(device) for k, v in inputs_of(model, [[SQUARE], [WIDE]]).items()}
    with zoo.hired.apply(model, 0.3, exact=True) as handle:
        free = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for ids in ([int(free[0, 2])], [int(free[0, 4]), int(free[1, 1])]):
            model.generation_config.eos_token_id = ids
            runner = handle.capture(inputs, max_new_tokens=10)
            expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
            assert torch.equal(runner.generate(inputs), expected)


def test_prompts_of_another_shape_are_refused() -> None:
    model = build("next_llama")
    inputs = inputs_of(model, [[SQUARE]])
    with zoo.hired.apply(model, 0.3, exact=True) as handle:
        runner = handle.capture(inputs, max_new_tokens=4)
        with pytest.raises(ValueError, match="other sizes"):
            runner.generate(inputs_of(model, [[OTHER]]))
        with pytest.raises(ValueError, match="capture again"):
            runner.generate(inputs_of(model, [[SQUARE]], text=5))
        with pytest.raises(ValueError, match="max_new_tokens must be 1 to 4"):
            runner.generate(inputs, 5)


def test_what_cannot_be_captured_is_explained() -> None:
    model = build("next_llama")
    inputs = inputs_of(model, [[SQUARE]])
    with zoo.hired.apply(model, 0.3) as handle, pytest.raises(NotImplementedError, match="exact=True"):
        handle.capture(inputs)
    with (
        zoo.hired.apply(model, 0.3, positions="original") as handle,
        pytest.raises(NotImplementedError, match="compact"),
    ):
        handle.capture(inputs)
    model.set_attn_implementation("eager")
    with (
        zoo.hired.apply(model, 0.3, exact=True) as handle,
        pytest.raises(NotImplementedError, match="attn_implementation='sdpa'"),
    ):
        handle.capture(inputs)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_choose_what_the_reference_chooses(name: str, device: str) -> None:
    cpu, gpu = build(name), build(name).to(device)
    inputs = inputs_of(cpu, [[SQUARE], [WIDE]])
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for options in (dict(), dict(exact=True, allocation="paper")):
        with zoo.hired.apply(cpu, 0.3, **options) as expected, zoo.hired.apply(gpu, 0.3, **options) as actual:
            reference, encoded = (
                expected.encode(**images),
                actual.encode(**{k: v.to(device) for k, v in images.items()}),
            )
        assert torch.equal(encoded.source.cpu(), reference.source)
        torch.testing.assert_close(
            torch.cat(encoded.embeddings).cpu(), torch.cat(reference.embeddings), rtol=1e-2, atol=1e-3
        )
