"""Runners of the cases of the methods beside HiRED; `test_hired.py` collects them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from zoo.heads.token_dropping import tome, var
from zoo.heads.token_dropping.aki import AKI, mutual_mask
from zoo.heads.token_dropping.base import MERGED, Prompt, Vision
from zoo.heads.token_dropping.fastv import FastV
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.prumerge import PruMerge, outlier_counts
from zoo.heads.token_dropping.towers import Tower
from zoo.heads.token_dropping.visionzip import VisionZip
from zoo.kernels.token_select import cls_attention

from . import fill

if TYPE_CHECKING:
    from .test_hired import Case


def vision_tower(case: Case) -> nn.Module:
    """A CLIP tower of transformers with the case's weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**case.kwargs["vision_config"], attn_implementation="eager")
    tower = CLIPVisionModel(config).eval()
    prefix = "vision_tower.vision_model."
    tower.load_state_dict({k.removeprefix(prefix): x for k, x in case.weights().items() if k.startswith(prefix)})
    return tower


def run_tower(case: Case, method: object) -> tuple[Vision, Packer]:
    """The tower under a method, on the case's images as single partitions."""
    spec = case.inputs["pixel_values"]
    pixels = fill.image(spec["fill_image"], spec["shape"])
    for edit in spec["edits"]:
        pixels[edit["image"]][:, slice(*edit["rows"]), slice(*edit["cols"])] += edit["add"]
    tower = Tower(vision_tower(case), case.kwargs.get("vision_feature_layer", -2))
    image = ImageGrid((0, 0), (tower.pixels, tower.pixels), tower.side, tower.pixels)
    return tower.run(pixels, [image] * len(pixels), method.probes(tower)), Packer(has_newline=False)


def stacked(x: Tensor, images: int) -> Tensor:
    """[L, ...] -> [images, L / images, ...]."""
    return x.unflatten(0, (images, -1))


@torch.no_grad()
def run_visionzip(case: Case) -> None:
    dominant, contextual = case.kwargs["dominant"], case.kwargs["contextual"]
    method = VisionZip(dominant + contextual, contextual=contextual)
    vision, packer = run_tower(case, method)
    kept, images = method.reduce(vision, packer), len(vision.images)
    assert kept.lengths == method.lengths(vision.images, packer)
    case.check("features", stacked(kept.features, images))
    source = stacked(kept.source, images)[:, :dominant]
    case.check("kept_index_sorted", torch.where(source < 0, 0, source + 1))


def language_model(case: Case) -> nn.Module:
    """A Llama of transformers with the case's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kwargs = dict(case.kwargs)
    rope = {"rope_type": "default", "rope_theta": kwargs.pop("rope_theta")}
    config = LlamaConfig(**kwargs, rope_parameters=rope, attn_implementation=case.spec["attn_implementation"])
    model = LlamaForCausalLM(config).eval()
    assert sum(p.numel() for p in model.parameters()) == case.spec["num_params"]
    model.load_state_dict(case.weights())
    return model


@torch.no_grad()
def run_fastv(case: Case) -> None:
    model, spec = language_model(case), case.inputs["inputs_embeds"]
    x = fill.image(spec["fill_image"], spec["shape"])
    first, count = (case.spec["fastv"][f"image_token_{name}"] for name in ("start_index", "length"))
    image = torch.zeros(x.shape[:2], dtype=torch.bool)
    image[:, first : first + count] = True
    for implementation in (case.spec["attn_implementation"], "sdpa"):
        model.set_attn_implementation(implementation)
        for layer in case.spec["fastv"]["k"]:
            for ratio in case.spec["fastv"]["r"]:
                method = FastV(1 - ratio, layer=layer)
                hooks = method.install(model.model)
                method.begin(Prompt(image, torch.ones_like(image)))
                cache = DynamicCache(config=model.config)
                logits = model(inputs_embeds=x, past_key_values=cache).logits
                method.end()
                for hook in hooks:
                    hook.remove()
                kept = case.expected[f"k{layer}.r{ratio:g}.kept_positions"].long()
                assert cache.get_seq_length(layer - 1) == x.shape[1] and cache.get_seq_length(layer) == len(kept)
                case.check(f"k{layer}.r{ratio:g}.logits", logits[:, kept])
                case.check(f"k{layer}.r{ratio:g}.kept_positions", logits[0].any(-1).nonzero()[:, 0])


@torch.no_grad()
def run_prumerge(case: Case) -> None:
    options = {"prumerge": {}, "prumerge_plus": {"plus": True}, "prumerge_ratio0.1": {"budget": 0.1}}
    for name, kwargs in options.items():
        method = PruMerge(**kwargs)
        vision, packer = run_tower(case, method)
        kept = method.reduce(vision, packer)
        layer = method._layer
        row = cls_attention(vision.queries[layer][:, 0], vision.keys[layer], 1)[:, 0, 1:]
        case.check("cls_attn_layer23_single_head", row)
        assert outlier_counts(row).tolist() == [round(case.spec["reduction_ratio"] * row.shape[1])]
        case.check(f"{name}.features", kept.features[None])
        assert kept.source[-1] == MERGED
        case.check(f"{name}.kept_index", kept.source[:-1])


def run_tome(case: Case) -> None:
    x, metric, metric2 = (
        fill.image(case.inputs[k]["fill_image"], case.inputs[k]["shape"]) for k in ("x", "metric", "metric2")
    )
    first = tome.match(metric, case.kwargs["r1"], class_token=case.kwargs["class_token"])
    x1, size1 = tome.merge_mean(x, torch.ones(*x.shape[:2], 1), first)
    case.check("x1", x1)
    case.check("size1", size1[..., 0])
    case.check("source1", tome.merge_sum(torch.eye(x.shape[1]).expand(x.shape[0], -1, -1), first).to(torch.uint8))
    second = tome.match(metric2, case.kwargs["r2"], class_token=case.kwargs["class_token"])
    x2, size2 = tome.merge_mean(x1, size1, second)
    case.check("x2", x2)
    case.check("size2", size2[..., 0])
    case.check("unmerged2", tome.unmerge(x2, second))
    for key, expected in case.spec["r_schedules"].items():
        assert tome.parse_r(*ast.literal_eval(key)) == expected, key


def run_var(case: Case) -> None:
    spec, kwargs = case.inputs, case.kwargs
    hidden = fill.image(spec["hidden"]["fill_image"], spec["hidden"]["shape"])
    for token in spec["hidden"]["sinks"]:
        # Sinks are loud in one of two channels.
        hidden[:, token, kwargs["sink_dims"][0 if token % 2 else 1]] *= 400
    sinks = var.find_sinks(hidden, kwargs["sink_dims"], kwargs["tau"])
    case.check("sink_index", sinks[0].nonzero()[:, 0])
    start, end = kwargs["image_start"], kwargs["image_start"] + kwargs["image_len"]
    logits = 1.5 * fill.image(spec["logits"]["fill_image"], spec["logits"]["shape"])
    logits[:, 0, :, start:end] += 2
    logits[:, 1, :, spec["hidden"]["sinks"]] += 6
    L = logits.shape[-1]
    if kwargs["prefill"]:
        logits = logits.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
    attention = logits.softmax(-1)
    case.check("attention", attention)
    image, rows = torch.zeros(1, L, dtype=torch.bool), torch.ones(1, L, dtype=torch.bool)
    image[:, start:end] = True
    rows[:, : end if kwargs["prefill"] else 0] = False
    settings = var.Settings(kwargs["tau"], kwargs["rho"], kwargs["summ"], kwargs["p"])
    new, passing = var.redistribute(attention, image, sinks, rows, settings)
    case.check("selected_head_query", passing[0].nonzero())
    case.check("redistributed", new)
    torch.testing.assert_close(new.sum(-1), attention.sum(-1))


def run_aki(case: Case) -> None:
    for i, spec in enumerate(case.inputs["cases"]):
        attended = torch.tensor([spec["attention_mask"]], dtype=torch.bool)
        T = attended.shape[1]
        place = torch.arange(T)
        image = ((place >= spec["image_start"]) & (place < spec["text_start"]))[None]
        # A token that no other is ends the question.
        ids = (place == spec["text_end"]).long()[None]
        question = AKI(end_token=1).question(Prompt(image, attended, ids))
        causal = (place <= place[:, None]) & attended[:, None, None]
        case.check(f"mask{i}", mutual_mask(causal, image, question)[0, 0])


RUNNERS = {
    "VAR": run_var,
    "modality-mutual": run_aki,
    "prumerge": run_prumerge,
    "ToMe": run_tome,
    "FastV": run_fastv,
    "VisionZip": run_visionzip,
}
