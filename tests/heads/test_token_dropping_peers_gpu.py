"""The methods beside HiRED with recorded launches, and on a GPU."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.heads.token_dropping.base import Prompt

from .test_token_dropping_peers import EDITS, SQUARE, WIDE, deep, generate
from .vlm_models import IMAGE, inputs_of

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def on(device: str, inputs: dict) -> dict:
    return {name: x.to(device) for name, x in inputs.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["visionzip", "prumerge", "tome"])
def test_captured_generation_equals_generate(method: str, device: str) -> None:
    model = deep("next_llama").to(device)
    inputs = [on(device, inputs_of(model, [[SQUARE], [WIDE]], seed=seed)) for seed in (0, 1)]
    with zoo.hired.apply(model, 0.3, method=method) as handle:
        runner = handle.capture(inputs[0], max_new_tokens=6)
        for each in reversed(inputs):
            expected = model.generate(**each, max_new_tokens=6, do_sample=False)
            assert torch.equal(runner.generate(each), expected)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("method", [*EDITS, "visionzip", "prumerge", "tome"])
@torch.no_grad()
def test_a_gpu_agrees_with_a_cpu(method: str, device: str) -> None:
    cpu, gpu = deep("next_mistral"), deep("next_mistral").to(device)
    inputs = inputs_of(cpu, [[SQUARE], [WIDE]])
    options = EDITS.get(method, {"budget": 0.3})
    with zoo.hired.apply(cpu, method=method, **options), zoo.hired.apply(gpu, method=method, **options):
        expected, actual = cpu(**inputs).logits, gpu(**on(device, inputs)).logits
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=1e-3)
        tokens = generate(gpu, on(device, inputs), cache_implementation="static", disable_compile=True)
        assert torch.equal(tokens, generate(gpu, on(device, inputs)))
        gpu.to(torch.bfloat16)
        assert generate(gpu, on(device, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})).shape == (2, 5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@torch.no_grad()
def test_nothing_waits_for_the_device(device: str) -> None:
    """VisionZip's tokens and FastV's prefill are launched without a look at a value."""
    model = deep("next_llama").to(device)
    inputs = on(device, inputs_of(model, [[SQUARE]]))
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    with zoo.hired.apply(model, 0.3, method="visionzip") as handle:
        tower, partitions, grids = handle._images(**images)

        def zip_images() -> None:
            handle.family.encode(handle.method, tower, handle.packer, partitions, grids)

        check(zip_images)
    decoder, ids = model.model.language_model, inputs["input_ids"]
    with zoo.hired.apply(model, method="fastv") as handle:
        handle.method.begin(Prompt(ids == IMAGE, torch.ones_like(ids, dtype=torch.bool)))
        embeddings = decoder.embed_tokens(ids)
        # Without a cache the decoder looks for packed sequences in the positions, which waits.
        check(lambda: decoder(inputs_embeds=embeddings, use_cache=True))
        handle.method.end()


def check(function) -> None:
    """Run once to warm up, and again with waiting forbidden."""
    function()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
