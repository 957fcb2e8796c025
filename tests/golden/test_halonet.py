"""Halo attention and timm's halo networks on this package's op equal timm's: layers, whole models, gradients."""

from __future__ import annotations

import re

import pytest
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn

import zoo
from zoo.backbones.halo import HaloAttention
from zoo.kernels.halo import reference

from . import fill
from .cases import Case, _parse_slice, find

# Of these, the companions of halo attention in mixed networks, this package has no version of its own.
LAYERS = {"HaloAttn": HaloAttention, "BottleneckAttn": BottleneckAttn, "LambdaLayer": LambdaLayer}


class HaloCase(Case):
    """A case whose inputs are calls of `fill` and whose slices stand in the descriptions of its outputs."""

    def input(self, name: str = "x") -> Tensor:
        match = re.fullmatch(r'fill\.image\("([^"]+)", \[([\d, ]+)\]\)', self.spec["input"][name])
        assert match, f"unknown input {self.spec['input'][name]!r}"
        return fill.image(match[1], tuple(int(side) for side in match[2].split(",")))

    def select(self, name: str, actual: Tensor) -> Tensor:
        """The part of an output that the case holds; its description names the slice, and the whole shape."""
        text = self.spec["outputs"][name]
        if shape := re.search(r" of \[([\d, ]+)\]", text):
            assert list(actual.shape) == [int(side) for side in shape[1].split(",")], name
        if part := re.search(r"\[[\d, ]*:[\d:, ]*\]", text):
            actual = actual[_parse_slice(part[0])]
        assert list(actual.shape) == self.spec["shapes"][name], f"{name}: shape {tuple(actual.shape)}"
        return actual.detach()

    def check(self, name: str, actual: Tensor) -> None:
        if name not in self.spec["outputs"]:
            return
        torch.testing.assert_close(
            self.select(name, actual), self.expected[name], rtol=self.spec["rtol"], atol=self.spec["atol"],
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip
        self.compared.add(name)

    def check_gradient(self, name: str, actual: Tensor) -> None:
        """Gradient of an image: a near tie of a max-pool may send a few values elsewhere."""
        tolerance = self.spec.get("grad_tol")
        if tolerance is None or name not in self.spec["outputs"]:
            return self.check(name, actual)
        expected = self.expected[name]
        bound = tolerance["atol_rel_to_absmax"] * expected.abs().max()
        outliers = ((self.select(name, actual) - expected).abs() > bound).float().mean().item()
        assert outliers <= tolerance["max_outlier_fraction"], f"{name}: {outliers:.2%} of the values are off"
        self.compared.add(name)


def check_attention(case: HaloCase, layer: HaloAttention, x: Tensor) -> None:
    """What lies inside the op, by its own definition."""
    q, kv = (conv(x).permute(0, 2, 3, 1) for conv in (layer.q, layer.kv))
    geometry = reference.Geometry(layer.num_heads, layer.block_size, layer.halo_size, layer.block_stride)
    tables, settings = layer._tables(), (layer.scale, layer.scale_pos_embed, layer.mask_border)
    attn, blocks, keys, _ = reference._attend(q, kv, *tables, geometry, *settings)
    position = reference.position_logits(blocks, *tables, geometry.window)
    # [B, M, G, ...] -> [B*M, G, ...]
    case.check("q_blocked", blocks.flatten(3, 4).flatten(0, 1))
    case.check("k_window", keys.flatten(0, 1))
    case.check("rel_logits", position.flatten(0, 1))
    case.check("attn", attn.flatten(0, 1))


def run_layer(case: HaloCase) -> None:
    layer = LAYERS[case.model.rpartition(".")[2]](**case.kwargs).eval()
    layer.load_state_dict(case.weights())
    assert sum(p.numel() for p in layer.parameters()) == case.spec["num_params"]
    x = case.input().requires_grad_()
    out = layer(x)
    case.check("out", out)
    if isinstance(layer, HaloAttention):
        with torch.no_grad():
            check_attention(case, layer, x)
    (out * case.input("g")).sum().backward()
    case.check("grad_x", x.grad)
    for name, parameter in layer.named_parameters():
        case.check(f"grad.{name}", parameter.grad)


def watched(model: nn.Module, output: str) -> nn.Module | None:
    """The module whose output has this name, if a module has."""
    name = output.removesuffix("_slice")
    if name.startswith("attn@"):
        return model.get_submodule(name.removeprefix("attn@"))
    if name.startswith("stage"):
        return model.stages[int(name.removeprefix("stage")) - 1]
    return model.stem if name == "stem" else None


def run_model(case: HaloCase) -> None:
    model = zoo.create_model(case.model, **case.kwargs).eval()
    assert zoo.accelerated(model), "the network does not run on this package's op"
    assert sum(p.numel() for p in model.parameters()) == case.spec["num_params"]
    model.load_state_dict(case.weights())
    for output in case.spec["outputs"]:
        if module := watched(model, output):
            module.register_forward_hook(lambda m, args, out, output=output: case.check(output, out))
    x = case.input().requires_grad_()
    features = model.forward_features(x)
    case.check("pooled", model.forward_head(features, pre_logits=True))
    logits = model.forward_head(features)
    case.check("logits", logits)
    (logits * case.input("g")).sum().backward()
    case.check_gradient("grad_x_slice", x.grad)


RUNNERS = {"op": run_layer, "op_derived": run_layer, "model": run_model}


@pytest.mark.parametrize("path", find("halonet"), ids=lambda p: p.stem)
def test_golden(path) -> None:
    case = HaloCase(path)
    assert case.kind in RUNNERS, f"no runner for kind {case.kind!r}"
    RUNNERS[case.kind](case)
    case.finish()


def test_cases_are_found() -> None:
    assert find("halonet")
