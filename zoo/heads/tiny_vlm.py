"""A small vision-language model of transformers' stock classes, about scenes of coloured clothes.

`LlavaForConditionalGeneration` with a CLIP vision tower (a CLS token, features of the layer before the last, as in
LLaVA-1.5, arXiv:2310.03744) and a llama language model of a few million parameters, and a `LlavaProcessor` with a
tokenizer of whole words. It is small enough to be trained in minutes (`zoo.train.vlm`) and to answer on a CPU, and
everything that works on LLaVA-1.5 works on it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "tiny_vlm.zoo_scenes"

# The classes of Fashion-MNIST in its order; trousers have no singular.
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PLURALS = tuple({"trousers": "trousers", "dress": "dresses"}.get(name, f"{name}s") for name in CLASSES)
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
# Cells of a scene, row by row.
POSITIONS = (
    *("top-left", "top", "top-right"),
    *("left", "centre", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)
NUMBERS = tuple(str(number) for number in range(len(POSITIONS) + 1))
# Six words each, so that a batch of questions of all types needs no padding.
TEMPLATES = {
    "what": "what is at the {position} ?",
    "where": "where is the {colour} {class} ?",
    "colour": "what colour is the {class} ?",
    "count class": "how many {plural} are there ?",
    "count colour": "how many items are {colour} ?",
    "exists": "is there a {colour} {class} ?",
}
ANSWERS = ("nothing", "yes", "no")
ANSWER_TOKENS = 3

PAD, BOS, EOS, UNKNOWN, IMAGE, QUESTION, ANSWER = SPECIAL = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "<question>", "<answer>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "<question>{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %} <answer>"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
)

# Keyword arguments of the two towers.
VISION = dict(
    hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6, image_size=224, patch_size=14
)
TEXT = dict(hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8)


def words() -> list[str]:
    """All tokens, special ones first; the place of a token in this list is its number."""
    template_words = [word for text in TEMPLATES.values() for word in text.split() if not word.startswith("{")]
    return list(
        dict.fromkeys([*SPECIAL, *template_words, *ANSWERS, *CLASSES, *PLURALS, *COLOURS, *POSITIONS, *NUMBERS])
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of whole words; it ignores case, and an unknown word becomes `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Hyphens are parts of words, punctuation is not.
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s-]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    # Words joined by blanks.
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, QUESTION, ANSWER],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(image_size: int = VISION["image_size"], patch_size: int = VISION["patch_size"]) -> LlavaProcessor:
    """Processor of images and prompts; images are squashed to `image_size` pixels a side."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    sides = dict(height=image_size, width=image_size)
    images = CLIPImageProcessor(size=sides, do_center_crop=False, crop_size=sides, do_convert_rgb=True)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        # The CLS token, which the strategy takes away again.
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_vlm(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> LlavaForConditionalGeneration:
    """Build the model with random weights.

    Args:
        vision: Changes of `CLIPVisionConfig` against `VISION`.
        text: Changes of `LlamaConfig` against `TEXT`.

    Returns:
        The model, float32: 6.9 million parameters without changes.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vocabulary = words()
    numbers = {name: vocabulary.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    ends = {f"{name}_token_id": number for name, number in numbers.items()}
    vision_config = CLIPVisionConfig(**{"hidden_act": "gelu", **VISION, **(vision or {})})
    text = {**TEXT, **(text or {})}
    text_config = LlamaConfig(
        **{
            "vocab_size": len(vocabulary),
            # The usual 0.02 suits wide models; from it a narrow one takes thousands of steps to look anything up.
            "initializer_range": text["hidden_size"] ** -0.5,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            **ends,
            **text,
        }
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=vocabulary.index(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for name, number in ends.items():
        setattr(model.generation_config, name, number)
    _set_positions(model.model.vision_tower)
    return model


@torch.no_grad()
def _set_positions(tower: torch.nn.Module) -> None:
    """Start the learned positions of the patches from sines and cosines: CLIP's fresh ones are too small to be seen."""
    from timm.layers import build_sincos2d_pos_embed

    side = tower.config.image_size // tower.config.patch_size
    weight = getattr(tower, "vision_model", tower).embeddings.position_embedding.weight
    weight[1:] = 0.3 * build_sincos2d_pos_embed([side, side], dim=weight.shape[1])


def load_tiny_vlm(
    folder: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a trained model and its processor from a folder, by default the weights that come with the package.

    Raises:
        FileNotFoundError: There is no model; the message says how to train one.
    """
    path = WEIGHTS if folder is None else Path(folder)
    if not (path / "config.json").is_file():
        what = "This package has no embedded vision-language model" if folder is None else f"{path} holds no model"
        raise FileNotFoundError(
            f"{what}. Train one on a GPU with `python -m zoo.train.vlm --out tiny_vlm`, then give that folder "
            "(`zoo vlm demo --model tiny_vlm`)."
        )
    try:
        from transformers import LlavaForConditionalGeneration, LlavaProcessor
    except ImportError as error:
        raise ImportError("vision-language models need transformers: pip install 'attention-zoo[transformers]'") from (
            error
        )
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return model.eval(), LlavaProcessor.from_pretrained(path)


def prompt(question: str) -> str:
    """Text for the processor: the place of an image, and a question about it."""
    return f"{IMAGE}{QUESTION} {question} {ANSWER}"


def answer_tokens(sequences: Tensor) -> Tensor:
    """What follows the prompt in each generated sequence.

    The prompt's end is found by its last token, not by its length, which dropping of visual tokens changes.

    Args:
        sequences: `[B, L]` int64, of `generate`.

    Returns:
        `[B, 3]` int64, the answer, `</s>` and padding.
    """
    vocabulary = words()
    pad, end, marker = (vocabulary.index(token) for token in (PAD, EOS, ANSWER))
    found = sequences == marker
    if not found.any(1).all():
        raise ValueError(f"a sequence has no {ANSWER} token, so it is not of a prompt of this model.")
    length = sequences.shape[1]
    first = length - found.flip(1).int().argmax(1)
    places = first[:, None] + torch.arange(ANSWER_TOKENS, device=sequences.device)
    answers = sequences.gather(1, places.clamp(max=length - 1)).masked_fill(places >= length, pad)
    # Nothing counts after the end.
    ended = (answers == end).int().cumsum(1)
    return answers.masked_fill((ended > 0) & ((answers != end) | (ended > 1)), pad)


@functools.lru_cache(8)
def _statistics(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Mean and standard deviation of CLIP's pixels, `[2, 3, 1, 1]`; kept, as a CUDA graph cannot copy from the host."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device, dtype=dtype)[..., None, None]


def normalised(pixels: Tensor) -> Tensor:
    """What the processor makes of pixels `[B, 3, S, S]` in [0, 1]."""
    mean, std = _statistics(pixels.device, pixels.dtype)
    return (pixels - mean) / std


def prepare(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Sequence[Image], questions: Sequence[str]
) -> dict[str, Tensor]:
    """Inputs of a model for one question about each image, on its device."""
    inputs = processor(images=list(images), text=[prompt(q) for q in questions], padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@torch.no_grad()
def answer_questions(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, inputs: dict[str, Tensor]
) -> list[str]:
    """Answers to prepared questions, with or without a plug-in of `zoo.hired` on the model."""
    sequences = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return processor.batch_decode(answer_tokens(sequences), skip_special_tokens=True)


def ask(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Sequence[Image], questions: Sequence[str]
) -> list[str]:
    """Answer one question about each image.

    Args:
        model: As trained by `zoo.train.vlm`, with or without a plug-in of `zoo.hired`.
        processor: Its processor.
        images: PIL images.
        questions: As many, in the words of `TEMPLATES`.

    Returns:
        The answers.
    """
    return answer_questions(model, processor, prepare(model, processor, images, questions))


def load_samples(folder: str | Path | None = None) -> list[tuple[Image, list[dict[str, str]]]]:
    """Held-out scenes: an image and its questions, dicts of `type`, `question` and `answer`.

    Args:
        folder: Of a model; the scenes beside it, or else those that come with the package.

    Raises:
        FileNotFoundError: There are none.
    """
    from PIL import Image

    paths = [Path(place) / "samples" for place in (folder, WEIGHTS) if place is not None]
    path = next((path for path in paths if (path / "questions.json").is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no sample scenes in {paths[0]}; `python -m zoo.train.vlm` writes them beside a model."
        )
    scenes = json.loads((path / "questions.json").read_text(encoding="utf-8"))
    samples = []
    for scene in scenes:
        with Image.open(path / scene["image"]) as image:
            samples.append((image.convert("RGB"), scene["questions"]))
    return samples
