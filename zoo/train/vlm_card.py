"""Model card of the small vision-language model: written from what a run recorded and what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.heads.tiny_vlm import TEMPLATES

RUN = "training.json"

HEAD = """---
datasets:
- fashion-mnist
library_name: transformers
license: apache-2.0
metrics:
- accuracy
pipeline_tag: image-text-to-text
tags:
- llava
- attention-zoo
---

# {name}

A small LLaVA of stock transformers classes that answers questions about scenes of coloured clothes. It shows on a CPU,
and measures, what dropping visual tokens costs. It knows nothing else.

## Model

`LlavaForConditionalGeneration`: CLIP vision tower ({vision_layers} layers, width {vision_width}, {image_size} pixels,
patches of {patch_size}: {tokens} visual tokens; features of the layer before the last), projector, llama language
model ({text_layers} layers, width {text_width}), {parameters:.2f} M parameters, stored in half precision
({megabytes:.1f} MB). The tokenizer has whole words, {words} in all.

## Use

```python
from zoo.heads.tiny_vlm import ask, load_samples, load_tiny_vlm
import zoo

model, processor = load_tiny_vlm()
image, asked = load_samples()[0]
print(ask(model, processor, [image], [asked[0]["question"]]))
with zoo.hired.apply(model, budget=0.2):
    print(ask(model, processor, [image], [asked[0]["question"]]))
```

`zoo vlm demo` does this for all sample scenes. Questions follow these templates:

{templates}

## Data

Fashion-MNIST (Zalando Research, MIT licence): real grey photographs of garments, 28 x 28 pixels, in ten classes. A
scene of `zoo.train.scenes` has two to six of them in nine cells, given one of six colours each, scaled, turned and
mirrored, on a plain or textured background. Training uses 55,000 training images, validation the other 5,000; the
results below and the sample scenes in `samples/` (also MIT licence) use the 10,000 test images.

## Training

`python -m zoo.train.vlm`, {run}. Besides the answers the vision tower learns, through heads that are not part of the
model, what each patch shows and in which cell, and which classes and colours a scene has (from the CLS token). The
attention of the CLS token in the feature layer is trained towards the garments, so methods that choose tokens by this
attention find it at its best. In half of the scenes some background tokens are hidden from the language model; garments
never are. No method of dropping is used in training.

## Results

"""


def write_card(folder: Path, model: Any, rows: Sequence[dict[str, Any]], table: str) -> None:
    """Write the README.md of a model folder.

    Args:
        folder: The model's, with `training.json` where the run left it.
        model: The model.
        rows: Of `zoo.train.vlm.evaluate`.
        table: Their Markdown table.
    """
    vision, text = model.config.vision_config, model.config.text_config
    head = HEAD.format(
        name=folder.name,
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        tokens=(vision.image_size // vision.patch_size) ** 2,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        words=text.vocab_size,
        templates="\n".join(f"- {name}: `{template}`" for name, template in TEMPLATES.items()),
        run=_run(folder),
    )
    seeds = len({row["seed"] for row in rows})
    note = (
        f"Share of right answers in percent on {rows[0]['scenes']} scenes of held-out garments with a question\n"
        f"of each type; mean and range over {seeds} sets of scenes (one trained model). Each method gets\n"
        "the same budget; `full` has all tokens and no plug-in.\n\n"
    )
    (folder / "README.md").write_text(head + note + table + "\n", encoding="utf-8")


def _run(folder: Path) -> str:
    path = folder / RUN
    if not path.is_file():
        return "a run that left no record"
    run = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"{run['steps']:,} steps of {run['batch_size']} scenes with {run['questions']} questions each in "
        f"{run['seconds']:.0f} seconds on {run['device']}, seed {run['seed']}"
    )
