"""The small vision-language model: stock classes, tokenizer of words, processor, and reading its answers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, LlamaModel, LlavaForConditionalGeneration

from zoo.heads.tiny_vlm import (
    TEMPLATES,
    answer_tokens,
    ask,
    build_processor,
    build_tiny_vlm,
    build_tokenizer,
    load_samples,
    load_tiny_vlm,
    prompt,
    words,
)

VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=24)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def build() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return build_tiny_vlm(VISION | {"patch_size": 8}, TEXT).eval()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


def test_stock_classes_of_a_few_million_parameters() -> None:
    with torch.device("meta"):
        model = build_tiny_vlm()
    assert type(model) is LlavaForConditionalGeneration
    assert type(model.model.vision_tower) is CLIPVisionModel and type(model.model.language_model) is LlamaModel
    # 16 MB in half precision.
    assert 6.5e6 < sum(p.numel() for p in model.parameters()) < 8e6


def test_tokenizer_knows_every_word() -> None:
    tokenizer, names = build_tokenizer(), words()
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(names)))
    assert tokenizer.padding_side == "left"
    text = "how many t-shirts are there ?"
    assert tokenizer("How many T-shirts are there?").input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("a zebra") == ["a", "<unk>"]
    for template in TEMPLATES.values():
        known = [word in names or word.startswith("{") for word in template.split()]
        assert len(known) == 6 and all(known), template


def test_processor_makes_a_placeholder_a_patch() -> None:
    model, processor = build(), build_processor(24, 8)
    assert ask(model, processor, [picture()] * 2, ["what is at the top ?", "is there a red bag ?"])
    inputs = processor(images=[picture()], text=[prompt("is there a red bag ?")], return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == 9
    assert model(**inputs).logits.shape == (1, 1 + 9 + 8, len(words()))
    content = [{"type": "image"}, {"type": "text", "text": "is there a red bag ?"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    again = processor(images=[picture()], text=[chat], return_tensors="pt")
    assert torch.equal(inputs.input_ids, again.input_ids)
    # Images of other sizes are squashed.
    wide = processor(images=[picture().resize((50, 30))], text=[prompt("?")], return_tensors="pt")
    assert wide.pixel_values.shape == (1, 3, 24, 24)


def test_fresh_patches_differ_by_their_place() -> None:
    weight = build().model.vision_tower.embeddings.position_embedding.weight[1:]
    assert weight.std() > 0.1 and torch.pdist(weight).min() > 0.05


def test_answers_end_at_the_end_token() -> None:
    names = words()
    pad, end, marker, yes, red, bag = map(names.index, ("<pad>", "</s>", "<answer>", "yes", "red", "bag"))
    sequences = torch.tensor(
        [
            [pad, 9, marker, red, bag, end],
            [9, 9, marker, yes, end, pad],
            [9, 9, 9, marker, yes, end],
            [9, 9, marker, yes, end, red],
            [9, 9, marker, end, end, red],
        ]
    )
    expected = [[red, bag, end], [yes, end, pad], [yes, end, pad], [yes, end, pad], [end, pad, pad]]
    assert answer_tokens(sequences).tolist() == expected
    with pytest.raises(ValueError, match="no <answer> token"):
        answer_tokens(sequences[:, :2])


def test_round_trip(tmp_path) -> None:
    model, processor = build(), build_processor(24, 8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load_tiny_vlm(tmp_path)
    question = "what colour is the bag ?"
    inputs = processor(images=[picture()], text=[prompt(question)], return_tensors="pt")
    inputs_again = processor_again(images=[picture()], text=[prompt(question)], return_tensors="pt")
    assert inputs.keys() == inputs_again.keys()
    torch.testing.assert_close(again(**inputs_again).logits, model(**inputs).logits, rtol=0, atol=0)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert again.generation_config.eos_token_id == words().index("</s>")


def test_what_is_missing_is_said(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model. Train one on a GPU with `python -m zoo.train.vlm"):
        load_tiny_vlm(tmp_path)
    monkeypatch.setattr("zoo.heads.tiny_vlm.WEIGHTS", tmp_path / "embedded")
    with pytest.raises(FileNotFoundError, match="no embedded vision-language model. Train one"):
        load_tiny_vlm()
    with pytest.raises(FileNotFoundError, match="no sample scenes in"):
        load_samples(tmp_path)
