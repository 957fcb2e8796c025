"""FaViT equals its official implementation: the attention layer and whole models, with gradients."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.backbones.favit import FactorizedSelfAttention, FaViT
from zoo.convert.favit import convert
from zoo.kernels.factorized.reference import split_queries

from . import fill
from .cases import _parse_slice, find

_FILL = re.compile(r'^fill\.image\("(.+)", (\[[\d, ]+\])\)$')
# A slice at the end of an output's description, or before the full shape.
_SLICE = re.compile(r"(\[[-\d:, ]*:[-\d:, ]*\])(?: of (\[[\d, ]+\]))?$")


class Case:
    """One case: what to build, its weights and inputs, and the comparison with what is expected.

    These cases describe each output by a sentence that ends in the slice that was kept.
    """

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self.outputs: dict[str, str] = self.spec["outputs"]
        assert set(self.outputs) == set(self.expected)
        self.kind, self.model, self.kwargs = self.spec["kind"], self.spec["model"], dict(self.spec["kwargs"])
        self.compared: set[str] = set()

    def weights(self) -> dict[str, Tensor]:
        return fill.state_dict(self.spec["params"], self.spec.get("scale_overrides"))

    def input(self, name: str) -> Tensor:
        name, shape = _FILL.match(self.spec["input"][name]).groups()
        return fill.image(name, json.loads(shape))

    def check(self, name: str, actual: Tensor) -> None:
        """Compare an output with its expected values, if the case holds them, at the case's own tolerance."""
        if name not in self.outputs:
            return
        found, expected = _SLICE.search(self.outputs[name]), self.expected[name]
        if found:
            assert found[2] is None or list(actual.shape) == json.loads(found[2]), f"{name}: {tuple(actual.shape)}"
            actual = actual[_parse_slice(found[1])]
        atol = self.spec["atol"]
        if name.startswith("grad"):
            # Gradients sum over the whole map, in float32 in the official run too: rounding goes with the largest.
            largest = expected.abs().max().item()
            tolerance = self.spec.get("grad_tol")
            atol = tolerance["atol_rel_to_absmax"] * largest if tolerance else atol * max(1.0, largest)
        torch.testing.assert_close(
            actual.detach(), expected, rtol=self.spec["rtol"], atol=atol, msg=lambda text: f"{name}: {text}"
        )
        self.compared.add(name)

    def finish(self) -> None:
        """Every expected output must have been compared."""
        missing = set(self.outputs) - self.compared
        assert not missing, f"outputs never compared: {sorted(missing)}"


class Recorder:
    """Inputs and outputs of modules by name, seen through hooks."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name, module in modules.items():
            module.register_forward_hook(lambda m, args, out, name=name: self._see(name, args, out))

    def _see(self, name: str, args: tuple, out: Tensor) -> None:
        self.inputs[name], self.outputs[name] = args[0].detach(), out.detach()


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


def run_attention(case: Case) -> None:
    layer = FactorizedSelfAttention(**case.kwargs)
    layer.load_state_dict(case.weights())
    assert sum(p.numel() for p in layer.parameters()) == case.spec["num_params"]
    groups, heads, size = len(layer.dilations), layer.num_heads, (case.spec["H"], case.spec["W"])
    seen = Recorder(dict(layer.named_modules()))
    x = case.input("x").requires_grad_()
    out = layer(x.unflatten(1, size)).flatten(1, 2)
    case.check("out", out)
    case.check("concat", seen.inputs["proj"].flatten(1, 2))
    case.check("sr", seen.outputs["sr"].permute(0, 3, 1, 2))
    kv_g = seen.outputs["kv_g"].flatten(1, 2)
    case.check("kv_g", kv_g)
    case.check("kv_l", seen.outputs["kv_l"].permute(0, 3, 1, 2))
    q_g, *queries = split_queries(seen.outputs["q"].flatten(1, 2), layer.global_dim, groups, heads)
    case.check("attn_g", probabilities(q_g, kv_g[:, None, :, : layer.global_dim]))
    for i, q in enumerate(queries):
        pooled, kv = (
            y.flatten(1, 2).transpose(1, 2)  # [B, P, P, M, D] -> [B, M, L, D]
            for y in (seen.inputs[f"fcs.{i}"], seen.outputs[f"single_heads.{i}"])
        )
        case.check(f"pooled{i + 1}", pooled)
        case.check(f"kv{i + 1}", kv)
        case.check(f"attn{i + 1}", probabilities(q, kv.chunk(2, -1)[0]))
    (out * case.input("g")).sum().backward()
    case.check("grad_x", x.grad)
    for name, parameter in layer.named_parameters():
        case.check(f"grad.{name}", parameter.grad)


def watched_modules(model: FaViT) -> dict[str, nn.Module]:
    """Modules whose outputs a model case holds, by the case's names."""
    modules = {}
    for i, stage in enumerate(model.stages, 1):
        modules[f"embed{i}"], modules[f"stage{i}"] = stage.patch_embed, stage
        for j, block in enumerate(stage.blocks):
            modules[f"block{i}.{j}.attn"] = block.attn
        modules[f"block{i}.last.attn"] = stage.blocks[-1].attn
    return modules


def run_model(case: Case) -> None:
    model = timm.create_model(case.model, **case.kwargs).eval()
    assert sum(p.numel() for p in model.parameters()) == case.spec["num_params"]
    model.load_state_dict(convert(case.weights()))
    seen = Recorder(watched_modules(model))
    x = case.input("x").requires_grad_()
    features = model.forward_features(x)
    logits = model.forward_head(features)
    case.check("logits", logits)
    case.check("pooled", model.forward_head(features, pre_logits=True))
    for name, out in seen.outputs.items():
        # Stages give maps [B, C, H, W], the rest channels-last ones; the cases hold tokens.
        tokens = out.flatten(2).transpose(1, 2) if name.startswith("stage") else out.flatten(1, 2)
        for suffix in ("", "_slice"):
            case.check(name + suffix, tokens)
    grads = [name for name in case.outputs if name.startswith("grad")]
    if grads:
        (logits * case.input("g")).sum().backward()
    for name in grads:
        if name.startswith("grad_x"):
            case.check(name, x.grad)
    named = {key: parameter.grad for key, parameter in model.named_parameters()}
    for official in (p[0] for p in case.spec["params"]):
        if f"grad.{official}" in case.outputs:
            case.check(f"grad.{official}", named[next(iter(convert_one(official)))])


def convert_one(official: str) -> dict[str, str]:
    from zoo.convert.favit import convert_name

    return {convert_name(official): official}


RUNNERS = {("op", "Attention"): run_attention}


@pytest.mark.parametrize("path", find("favit"), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case = Case(path)
    runner = RUNNERS.get((case.kind, case.model), run_model if case.kind == "model" else None)
    assert runner is not None, f"no runner for kind {case.kind!r}, model {case.model!r}"
    runner(case)
    case.finish()


def test_cases_are_found() -> None:
    assert find("favit")
