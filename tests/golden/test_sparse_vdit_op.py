"""Masks, tiles and attention of the sparse patterns equal an independent definition, written in numpy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo.kernels.tile_sparse import Full, Layout, density, pattern_from_dict, tile_sparse_attention
from zoo.kernels.tile_sparse.patterns import active_tiles, attention_mask, key_columns, tile_lists, tile_map

from . import fill
from .cases import find


class Case:
    """A masks or attention case and the comparison with what it expects, exact where its tolerances are zero."""

    def __init__(self, spec: dict, expected: dict[str, Tensor]) -> None:
        self.spec, self.expected, self.compared = spec, expected, set()

    def layout(self, granularity: str) -> Layout:
        kwargs = self.spec["kwargs"]
        return Layout(kwargs["grid"], kwargs["text_tokens"], kwargs["text_position"], kwargs["tile"], granularity)

    def check(self, name: str, actual: Tensor) -> None:
        expected = self.expected[name]
        torch.testing.assert_close(
            actual.detach().to(expected.dtype), expected, rtol=self.spec["rtol"], atol=self.spec["atol"],
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip
        self.compared.add(name)

    def input(self, name: str) -> Tensor:
        """[B, S, M, D]"""
        spec = self.spec["inputs"][name]
        match = re.fullmatch(r"fill\.image\('([^']+)', shape\)", spec["rule"])
        assert match, f"unknown rule {spec['rule']!r}"
        return fill.image(match[1], spec["shape"])

    def finish(self) -> None:
        missing = set(self.spec["outputs"]) - self.compared
        assert not missing, f"outputs never compared: {sorted(missing)}"


def check_scalars(pattern, layout: Layout, expected: dict, exact: Tensor, expanded: Tensor) -> None:
    actual = {
        "active_tiles": active_tiles(pattern, layout),
        "total_tiles": layout.total_tiles,
        "sparsity": 1 - density(pattern, layout),
        "element_density": exact.double().mean().item(),
        "expanded_density": expanded.double().mean().item(),
    }
    if "window_tokens" in expected:
        actual["window_tokens"] = layout.width(pattern)
    if "columns" in expected:
        actual["columns"] = key_columns(pattern, layout).nonzero().flatten().tolist()
    assert actual == expected


def run_masks(case: Case) -> None:
    block, element = case.layout("block"), case.layout("element")
    for name, values in case.spec["kwargs"]["patterns"].items():
        pattern = pattern_from_dict(values)
        exact, expanded = attention_mask(pattern, element), attention_mask(pattern, block)
        case.check(f"element.{name}", exact)
        case.check(f"expanded.{name}", expanded)
        case.check(f"block.{name}", tile_map(pattern, block))
        start, keys = tile_lists(pattern, block)
        case.check(f"indptr.{name}", start)
        case.check(f"indices.{name}", keys)
        check_scalars(pattern, block, case.spec["expected_scalars"][name], exact, expanded)


def run_attention(case: Case) -> None:
    kwargs = case.spec["kwargs"]
    assert kwargs["scale"] == "head_dim**-0.5"
    patterns = [pattern_from_dict(values) for values in kwargs["heads"]]
    heads = torch.arange(len(patterns))
    length = None if kwargs["text_valid"] is None else torch.tensor(kwargs["text_valid"])
    # [B, M, S, D], in the memory of [B, S, M, D]
    inputs = [case.input(name).transpose(1, 2).requires_grad_() for name in "qkv"]
    if "out.dense" in case.spec["outputs"]:
        dense = tile_sparse_attention(*inputs, heads * 0, [Full()], case.layout("block"), text_length=length)
        case.check("out.dense", dense.transpose(1, 2))
    for granularity in ("element", "block"):
        out = tile_sparse_attention(*inputs, heads, patterns, case.layout(granularity), text_length=length)
        out = out.transpose(1, 2)
        case.check(f"out.{granularity}", out)
        grads = torch.autograd.grad(out, inputs, fill.image("grad:" + case.spec["case"], out.shape))
        for name, grad in zip("qkv", grads, strict=True):
            case.check(f"grad_{name}.{granularity}", grad.transpose(1, 2))


RUNNERS = {"sparse_vdit.masks": run_masks, "sparse_vdit.attention": run_attention}
# Cases of the search and of whole transformers, which the test of the plug-in runs.
ELSEWHERE = ("sparse_vdit.search", "Transformer3DModel")


def cases() -> list[Path]:
    return [p for p in find("sparse_vdit") if not json.loads(p.read_text())["model"].endswith(ELSEWHERE)]


@pytest.mark.parametrize("path", cases(), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case = Case(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))
    assert case.spec["model"] in RUNNERS, f"no runner for {case.spec['model']!r}"
    RUNNERS[case.spec["model"]](case)
    case.finish()


def test_cases_are_found() -> None:
    assert {json.loads(p.read_text())["model"] for p in cases()} == set(RUNNERS)
