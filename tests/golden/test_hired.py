"""HiRED and its peers equal their official implementations, on unmodified models of transformers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution

import zoo
from zoo.heads.token_dropping.hired import Hired, Rule, _plan
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.kernels.token_select import cls_attention, token_select

from . import fill
from .cases import find

GRIDS = {"official": "legacy", "fixed_grid": "fixed"}


class Case:
    """One case: its description, and what is expected."""

    def __init__(self, path: Path) -> None:
        self.path, self.spec = path, json.loads(path.read_text())
        tensors = path.with_suffix(".safetensors")
        self.expected: dict[str, Tensor] = load_file(tensors) if tensors.exists() else {}
        self.model, self.kwargs, self.inputs = self.spec["model"], self.spec["kwargs"], self.spec["inputs"]
        self.compared: set[str] = set()

    def weights(self) -> dict[str, Tensor]:
        return fill.state_dict(self.spec["params"], self.spec.get("scale_overrides"))

    def check(self, name: str, actual: Tensor) -> None:
        """Compare with an expected tensor; integers exactly, others at the case's tolerance."""
        expected, actual = self.expected[name], actual.detach()
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        if expected.is_floating_point():
            torch.testing.assert_close(
                actual, expected, rtol=self.spec["rtol"], atol=self.spec["atol"], msg=lambda text: f"{name}: {text}"
            )
        else:
            assert torch.equal(actual.to(expected.dtype), expected), f"{name} differs"
        self.compared.add(name)

    def finish(self) -> None:
        """Every expected tensor must have been compared."""
        missing = set(self.expected) - self.compared
        assert not missing, f"never compared: {sorted(missing)}"


def image_grid(size: list[int], pinpoints: list[list[int]], pixels: int, side: int) -> ImageGrid:
    height, width = select_best_resolution(tuple(size), pinpoints)
    return ImageGrid((height // pixels, width // pixels), tuple(size), side, pixels)


# Selection and packing alone


def attention(spec: dict[str, Any], case: str, layer: int) -> Tensor:
    """[P, M, N + 1] attention rows of a sub-case of a selection table."""
    S, N = spec["grid_side"], spec["N"]
    shape = (sum(spec["num_partitions"]), spec["heads"], N + 1)
    logits = spec["logit_gain"] * fill.image(f"hired:{case}:{spec['id']}:layer{layer}", shape)
    if layer == 0:
        for edit in spec["layer0_edits"]:
            rows, cols = (slice(*edit[name]) for name in ("rows", "cols"))
            logits[edit["row"], :, 1:].unflatten(-1, (S, S))[:, rows, cols] += edit["add"]
        boost = spec["layer0_boost"]
        if boost:
            logits[boost["row"], :, 1 + torch.tensor(boost["tokens"])] += boost["add"]
    return logits.softmax(-1)


def select(case: Case, spec: dict[str, Any], allocation: str, images: int | None = None) -> tuple[Tensor, Tensor]:
    """Mask and budgets of a sub-case."""
    side = str(spec["grid_side"])
    grids = [
        image_grid(size, case.kwargs["image_grid_pinpoints"][side], case.kwargs["image_size"][side], int(side))
        for size in spec["image_sizes"][:images]
    ]
    P = sum(grid.partitions for grid in grids)
    first, scores = (attention(spec, case.inputs["case"], layer)[:P, :, 1:].sum(1) for layer in (0, 22))
    rule = Rule(allocation, spec["alpha"], False)
    plan = _plan(tuple(grids), (float(spec["token_budget_rate"]),) * len(grids), rule, False, torch.device("cpu"))
    return token_select(first, scores, plan)


def run_selection(case: Case) -> None:
    for spec in case.spec["subcases"]:
        mask, budgets = select(case, spec, "official")
        if spec["official_error"]:
            # Where the official code fails, sub-images are alike.
            assert len(set(budgets[1 : spec["num_partitions"][0]].tolist())) == 1
            continue
        assert budgets.tolist() == spec["budgets"], spec["id"]
        case.check(f"{spec['id']}.mask", mask)


def run_allocation(case: Case) -> None:
    tables = [other for other in map(Case, find("hired")) if "subcases" in other.spec]
    for row in case.spec["rows"]:
        table, spec = next((t, s) for t in tables for s in t.spec["subcases"] if s["id"] == row["subcase"])
        _, budgets = select(table, spec, "paper", images=1)
        assert budgets.tolist() == row["budgets"], row["subcase"]


def run_packing(case: Case) -> None:
    pixels = case.kwargs["image_size"]
    for row in case.spec["rows"]:
        image = image_grid(
            row["image_size"], case.kwargs["image_grid_pinpoints"], pixels, pixels // case.kwargs["patch_size"]
        )
        assert list(image.grid) == row["grid_rows_cols"] and image.partitions == row["num_partitions"]
        for name, grid in GRIDS.items():
            order = Packer(grid).layout([image], torch.device("cpu")).source
            checksum = (torch.arange(1, len(order) + 1) * order).sum() % (2**31 - 1)
            newline = Packer(grid, "all").newline_counts([image])[0]
            assert len(order) == row[f"{name}_tokens"] and len(order) + newline == row[f"{name}_tokens_with_newline"]
            assert checksum == row[f"{name}_order_checksum"]
        assert Packer().stock_lengths([image]) == [row["fixed_grid_tokens_with_newline"]]


def run_cls_row(case: Case) -> None:
    from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionConfig

    heads, D = case.kwargs["num_heads"], case.kwargs["hidden_size"]
    config = CLIPVisionConfig(hidden_size=D, num_attention_heads=heads, attn_implementation="eager")
    layer = CLIPAttention(config)
    layer.load_state_dict({name.split("self_attn.")[1]: x for name, x in case.weights().items()})
    assert sum(p.numel() for p in layer.parameters()) == case.spec["num_params"]
    x = fill.image(case.inputs["x"]["fill_image"], case.inputs["x"]["shape"]).requires_grad_()
    row = cls_attention(layer.q_proj(x[:, 0]), layer.k_proj(x), heads)
    case.check("cls_row", row)
    case.check("headsum", row.sum(1))
    case.check("attn_output", layer(x, attention_mask=None)[0])
    grad = fill.image(case.inputs["grad_output"]["fill_image"], case.inputs["grad_output"]["shape"])
    leaves = {"x": x, "q_weight": layer.q_proj.weight, "k_weight": layer.k_proj.weight, "q_bias": layer.q_proj.bias}
    for name, value in zip(leaves, torch.autograd.grad(row, list(leaves.values()), grad), strict=True):
        case.check(f"grad_{name}", value)


# Whole models


def build(case: Case) -> nn.Module:
    """An unmodified model of transformers with the case's weights."""
    kwargs = dict(case.kwargs)
    kwargs["image_token_id"] = kwargs.pop("image_token_index")
    kwargs["vision_config"] = {**kwargs["vision_config"]}
    text = {**kwargs["text_config"]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    kwargs["text_config"] = text
    is_next = "image_grid_pinpoints" in kwargs
    config = (LlavaNextConfig if is_next else LlavaConfig)(**kwargs)
    config._attn_implementation = case.spec["attn_implementation"]
    model = (LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration)(config).eval()
    assert sum(p.numel() for p in model.parameters()) == case.spec["num_params"]
    model.load_state_dict({rename(name, model): x for name, x in case.weights().items()})
    return model


def rename(name: str, model: nn.Module) -> str:
    """Names of transformers 4 to those of 5."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1", name)
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def pixels(case: Case) -> Tensor:
    spec = case.inputs["pixel_values"]
    values = fill.image(spec["fill_image"], spec["shape"])
    for edit in spec["edits"]:
        part = values[edit["image"]] if "partition" not in edit else values[edit["image"], edit["partition"]]
        part[..., slice(*edit["rows"]), slice(*edit["cols"])] += edit["add"]
    return values


def processed(case: Case) -> dict[str, Tensor]:
    """Inputs with one placeholder for each image, as these cases have them."""
    inputs = {name: torch.tensor(case.inputs[name]) for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = pixels(case)
    if "image_sizes" in case.inputs:
        inputs["image_sizes"] = torch.tensor(case.inputs["image_sizes"])
    return inputs


def probe(handle: Any, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """What the tower leaves behind, and the mask of selected patches."""
    images = {name: inputs[name] for name in ("image_sizes",) if name in inputs}
    tower, partitions, grids = handle._images(inputs["pixel_values"], **images)
    vision = tower.run(partitions, grids, handle.method.probes(tower))
    return vision, handle.method.select(vision, handle.packer)


@torch.no_grad()
def run_model(case: Case) -> None:
    model, inputs, hired = build(case), processed(case), case.spec["hired"]
    alphas, single = hired.get("alphas", [0.5]), "grids" not in hired
    for rate in hired["budgets"]:
        # Nothing is selected at a budget of 1, whatever alpha.
        for alpha in alphas if rate < 1 else alphas[:1]:
            for name in hired.get("grids", ["fixed_grid"]):
                suffix = f"b{rate:g}" + (f".a{alpha:g}" if len(alphas) > 1 else "")
                options = {"alpha": alpha, "spatial_budget": hired["spatial_budget"], "bypass": False}
                if "budget_layer" in hired:
                    options["budget_layer"] = hired["budget_layer"]
                with zoo.hired.apply(
                    model, float(rate), grid=GRIDS[name], select_layer=hired["select_layer"], **options
                ) as handle:
                    vision, mask = probe(handle, inputs)
                    check_vision(case, model, vision, hired)
                    check_selection(case, suffix, mask)
                    key = suffix if single else f"{name}.{suffix}"
                    check_outputs(case, key, handle, inputs, model)
    if case.spec.get("generate"):
        run_generate(case, model, inputs)


def check_vision(case: Case, model: nn.Module, vision: Any, hired: dict[str, Any]) -> None:
    for layer in {hired.get("budget_layer", hired["select_layer"]), hired["select_layer"]}:
        name = f"cls_attn_layer{layer}_headsum"
        if name in case.expected:
            case.check(name, vision.scores[layer])
    if "projected_features_every8" in case.expected:
        case.check("projected_features_every8", model.model.multi_modal_projector(vision.patches)[:, ::8])


def check_selection(case: Case, suffix: str, mask: Tensor) -> None:
    for name, value in ((f"{suffix}.mask", mask), (f"{suffix}.budgets", mask.sum(1))):
        if name in case.expected:
            expected = case.expected[name]
            case.check(name, value.reshape(expected.shape))


def check_outputs(case: Case, key: str, handle: Any, inputs: dict[str, Tensor], model: nn.Module) -> None:
    logits, expected = model(**inputs).logits, case.expected[f"{key}.logits"]
    assert logits.shape == expected.shape
    # Rows are padded on the left; what stands in padding is of no account.
    for row, count in zip(range(len(logits)), row_lengths(case, handle.lengths, inputs), strict=True):
        logits[row, :-count] = expected[row, :-count]
    case.check(f"{key}.logits", logits)
    if f"{key}.feature_lens" in case.expected:
        case.check(f"{key}.feature_lens", torch.tensor(handle.lengths))
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        case.check(f"{key}.packed_index", handle.encode(**images).source)


def row_lengths(case: Case, lengths: list[int], inputs: dict[str, Tensor]) -> list[int]:
    """Tokens of each row, with the kept tokens of its images."""
    kept, counts = iter(lengths), []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        images = int((ids == case.kwargs["image_token_index"]).sum())
        counts.append(int(mask.sum()) - images + sum(next(kept) for _ in range(images)))
    return counts


def run_generate(case: Case, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    spec = case.spec["generate"]
    with zoo.hired.apply(model, float(spec["token_budget_rate"]), alpha=spec["alpha"], grid="legacy"):
        count = spec["max_new_tokens"]
        out = model.generate(
            **inputs, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_scores=True,
            min_new_tokens=0,
        )  # fmt: skip
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    case.check("generate.new_tokens", new)
    case.check("generate.step_logits", torch.stack(out.scores, 1))


RUNNERS = {
    "hired_token_selection": run_selection,
    "paper Eq. (1) allocation": run_allocation,
    "hired packing lengths": run_packing,
    "CLIP attention, CLS row": run_cls_row,
    "hired_llava_next": run_model,
    "hired_llava15": run_model,
}


def runners() -> dict[str, Any]:
    if importlib.util.find_spec("tests.golden.hired_peers"):
        from .hired_peers import RUNNERS as PEERS

        return RUNNERS | PEERS
    return RUNNERS


@pytest.mark.parametrize("path", find("hired"), ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    case, known = Case(path), runners()
    kind = next((name for name in known if case.model.startswith(name)), None)
    assert kind is not None, f"unknown kind of case: {case.model}"
    known[kind](case)
    case.finish()


def test_hired_settings_of_the_cases_are_the_defaults() -> None:
    method = Hired()
    assert method.budget == 0.2 and method.rule == Rule("official", 0.5, False) and method.budget_layer == 0
