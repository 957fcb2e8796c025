"""FlatFormer equals its official implementation: sort, attention, blocks, backbone, encoder, map convolutions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.backbones.bev import SECOND, SECONDFPN
from zoo.backbones.flatformer import (
    FlatFormer,
    FlatFormerBlock,
    FlatFormerLayer,
    FlattenedWindowAttention,
    PositionEmbedding,
    sine_table,
)
from zoo.backbones.point_layers import DynamicVFE
from zoo.kernels.flat_window import ORDERS, Flattening, flatten_windows
from zoo.kernels.voxelize import Voxels, segment_mean, voxelize

from . import fill, pc_inputs
from .cases import _parse_slice, find

# What part of an output is kept stands at the end of its description, or before a condition.
_SLICE = re.compile(r"(?:rows|rows/channels|channels|spatial)? ?(\[[^\]]*::[^\]]*\])")


class Case:
    """One case: what to build, its weights and inputs, and the comparison with what is expected."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self.outputs: dict[str, dict] = self.spec["outputs"]
        self.kind, self.kwargs = self.spec["kind"], dict(self.spec["kwargs"])
        self.compared: set[str] = set()

    def load(self, module: nn.Module) -> nn.Module:
        """Fill a module in evaluation mode with the case's weights, all of them and no others."""
        weights = fill.state_dict(self.spec["params"])
        for name, (scale, shift) in self.spec["overrides"].items():
            weights[name] = weights[name] * scale + shift
        module.load_state_dict(weights)
        assert sum(p.numel() for p in module.parameters()) == self.spec["num_params"]
        return module.eval()

    def input(self, name: str):
        spec = dict(self.spec["inputs"][name])
        generator = spec.pop("generator")
        if generator == "fill.image":
            return fill.image(**spec)
        return getattr(pc_inputs, generator.removeprefix("pc_inputs."))(**spec)

    def pillars(self) -> Voxels:
        coords = self.input("coords").int()
        self.check("coords", coords)
        X, Y = self.kwargs["sparse_shape"][:2]
        return Voxels(coords, None, len(self.spec["inputs"]["coords"]["counts"]), (1, Y, X))

    def features(self, voxels: Voxels) -> Tensor:
        x = fill.image(self.spec["case"] + ":x", (len(voxels.coords), self.kwargs["in_channels"]))
        return x.requires_grad_()

    def check(self, name: str, actual: Tensor) -> None:
        """Compare an output with its expected values, if the case holds them, at the case's own tolerance."""
        if name not in self.outputs:
            return
        expected, found = self.expected[name], _SLICE.findall(self.outputs[name]["description"])
        if found and actual.shape != expected.shape:
            # Channels come second; other slices begin with the rows.
            prefix = ":, " if "channels" in self.outputs[name]["description"] else ""
            actual = actual[_parse_slice(prefix + found[-1].strip("[]"))]
        atol = self.spec["atol"]
        if name.startswith("grad"):
            # Gradients sum over all rows, in float32 in the official run too: rounding goes with the largest.
            atol *= max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            actual.detach().to(expected.dtype),
            expected,
            rtol=self.spec["rtol"],
            atol=atol,
            msg=lambda text: f"{name}: {text}",
        )
        self.compared.add(name)

    def check_gradients(self, module: nn.Module, y: Tensor, **inputs: Tensor) -> None:
        """Backward from the case's own gradient of `y`, then compare all gradients that the case holds."""
        wanted = [name for name in self.outputs if name.startswith("grad.")]
        if not wanted:
            return
        (y * fill.image("grad:" + self.spec["case"], y.shape)).sum().backward()
        leaves = {**dict(module.named_parameters()), **inputs}
        for name in wanted:
            self.check(name, leaves[name.removeprefix("grad.")].grad)

    def finish(self) -> None:
        """Every expected output must have been compared."""
        missing = set(self.outputs) - self.compared
        assert not missing, f"outputs never compared: {sorted(missing)}"


def run_mapping(case: Case) -> None:
    voxels = case.pillars()
    flattening = flatten_windows(voxels, case.kwargs["window_shape"][:2], case.kwargs["group_size"])
    for name, order in zip(ORDERS, flattening.order.long(), strict=True):
        case.check(name, order)
        # The official keys are other numbers for the same order.
        key, sample = case.expected[f"key_{name}"][order], voxels.coords[:, 0][order]
        assert ((key.diff() > 0) | (sample.diff() > 0)).all()
        case.compared.add(f"key_{name}")
    begin, end, first = flattening.groups[flattening.groups[:, 1] > flattening.groups[:, 0]].long().unbind(1)
    # The official tables list the pillars before a last group after its own.
    tables = [
        (torch.cat([torch.arange(b, e), torch.arange(f, b)]), e - b)
        for b, e, f in zip(begin.tolist(), end.tolist(), first.tolist(), strict=True)
    ]
    places = torch.cat([places for places, _ in tables])
    case.check("flat2win", places)
    own = torch.cat([torch.arange(len(places)) < n for places, n in tables])
    case.check("win2flat", own.nonzero().flatten())


def run_posemb(case: Case) -> None:
    kwargs = case.kwargs
    coords = case.input("coords").int()
    case.check("coords", coords)
    embed = PositionEmbedding(
        kwargs["feat_dim"], kwargs["sparse_shape"][:2], kwargs["pos_temperature"], kwargs["normalize_pos"]
    )
    case.check("pe", embed(coords))
    # The angle of cell 1 is the inverse of the divisor.
    L = kwargs["feat_dim"] // 4 * 2
    table = sine_table(2, L, kwargs["pos_temperature"], False)[1]
    angle = torch.where(torch.arange(L) % 2 == 0, table.asin(), table.acos())
    torch.testing.assert_close(1 / angle[:8], case.expected["inv_freq"][:8], rtol=1e-3, atol=0)
    frequency = kwargs["pos_temperature"] ** (2 * (torch.arange(L) // 2) / L)
    case.check("inv_freq", frequency)


def whole_groups(x: Tensor, group: int) -> Flattening:
    """Rows that are already cut into groups."""
    begin = torch.arange(0, len(x), group)
    groups = torch.stack([begin, begin + group, begin], 1)
    end = torch.full((1, 3), len(x))
    return Flattening(torch.arange(len(x)).int().expand(4, -1), torch.cat([groups, end]).int(), group)


def run_group_attention(case: Case) -> None:
    C, heads, group = (case.kwargs[name] for name in ("in_channels", "num_heads", "group_size"))
    module = case.load(FlattenedWindowAttention(C, heads))
    x, pe = case.input("x").requires_grad_(), case.input("pe").requires_grad_()
    out = module(x, pe, whole_groups(x, group), 0)
    case.check("out", out)
    weight, bias = module.attn.in_proj_weight, module.attn.in_proj_bias
    q, k = ((x + pe) @ weight[: 2 * C].T + bias[: 2 * C]).unflatten(1, (2, heads, -1)).unbind(1)  # [V, M, D]
    for name, rows, head in (("attn_g0_h0", slice(group), 0), ("attn_glast_hlast", slice(-group, None), -1)):
        logits = q[rows, head] @ k[rows, head].T * (C // heads) ** -0.5
        case.check(name, logits.softmax(-1))
    case.check_gradients(module, out, x=x, pe=pe)


def run_layer(case: Case) -> None:
    module = case.load(FlatFormerLayer(case.kwargs["in_channels"], case.kwargs["num_heads"], case.kwargs["activation"]))
    x, pe, seen = case.input("x").requires_grad_(), case.input("pe"), []
    module.norm1.register_forward_hook(lambda m, args, out: seen.append(out))
    out = module(x, pe, whole_groups(x, case.kwargs["group_size"]), 0)
    case.check("after_norm1", seen[0])
    case.check("out", out)
    case.check_gradients(module, out, x=x)


def run_block(case: Case) -> None:
    kwargs, voxels = case.kwargs, case.pillars()
    module = case.load(FlatFormerBlock(kwargs["in_channels"], kwargs["num_heads"], kwargs["activation"]))
    for i, layer in enumerate(module.block):
        layer.register_forward_hook(lambda m, args, out, i=i: case.check(f"after_layer{i}", out))
    embed = PositionEmbedding(
        kwargs["in_channels"], kwargs["sparse_shape"][:2], kwargs["pos_temperature"], kwargs["normalize_pos"]
    )
    flattening = flatten_windows(voxels, kwargs["window_shape"][:2], kwargs["group_size"])
    x = case.features(voxels)
    out = module(x, embed(voxels.coords), flattening)
    case.check("out", out)
    case.check_gradients(module, out, x=x)


def run_backbone(case: Case) -> None:
    module, voxels = case.load(FlatFormer(**case.kwargs)), case.pillars()
    x = case.features(voxels)
    bev = module(x, voxels)
    sample, _, row, col = voxels.coords.long().unbind(1)
    tokens = bev[sample, :, row, col]
    case.check("bev_tokens", tokens)
    case.check("bev_ch0", bev[:, 0])
    total, expected = bev.abs().sum((2, 3)), case.expected["bev_abs_sum"]
    # A sum of a thousand rows.
    torch.testing.assert_close(total, expected, rtol=case.spec["rtol"], atol=case.spec["atol"] * 50)
    case.compared.add("bev_abs_sum")
    case.check_gradients(module, tokens, x=x)


def run_vfe(case: Case) -> None:
    kwargs, points = case.kwargs, case.input("points")
    module = case.load(
        DynamicVFE(
            kwargs["in_channels"],
            kwargs["feat_channels"],
            kwargs["voxel_size"],
            kwargs["point_cloud_range"],
            with_distance=kwargs["with_distance"],
        )
    )
    features, voxels = module(points)
    cloud, sizes = torch.cat(points), [len(p) for p in points]
    again, index = voxelize(cloud, sizes, kwargs["voxel_size"], kwargs["point_cloud_range"], clamp=True)
    assert torch.equal(again.coords, voxels.coords)
    case.check("voxel_coords", voxels.coords)
    case.check("point_coords", voxels.coords[index])
    case.check("voxel_mean_xyz", segment_mean(cloud[:, :3], index, len(voxels.coords)))
    case.check("voxel_features", features)
    # The official kernel loses the first cell of each sample; ours keeps all.
    kept = torch.cat([torch.tensor([False]), voxels.coords[1:, 0] == voxels.coords[:-1, 0]])
    case.check("voxel_coords_official_drop", voxels.coords[kept])
    case.check_gradients(module, features)


class MapNetwork(nn.Module):
    """Map backbone and neck under the names of the official detector."""

    def __init__(self, in_channels, out_channels, layer_nums, layer_strides, residual, upsample_strides, fpn_channels):
        super().__init__()
        self.backbone = SECOND(in_channels, out_channels, layer_nums, layer_strides, residual)
        self.neck = SECONDFPN(out_channels, fpn_channels, upsample_strides)


def run_bev(case: Case) -> None:
    module = case.load(MapNetwork(**case.kwargs))
    stages = module.backbone(case.input("x"))
    for i, stage in enumerate(stages):
        case.check(f"stage{i}", stage)
    case.check("neck", module.neck(stages))


RUNNERS = {
    "mapping": run_mapping,
    "posemb": run_posemb,
    "group_attn": run_group_attention,
    "layer": run_layer,
    "block": run_block,
    "backbone": run_backbone,
    "backbone_composed": run_backbone,
    "vfe": run_vfe,
    "bev": run_bev,
}
# Run by test_detectors.py.
OF_DETECTORS = {"head", "detector"}


@pytest.mark.parametrize("path", find("flatformer"), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case = Case(path)
    if case.kind in OF_DETECTORS:
        pytest.skip("a case of test_detectors.py")
    assert case.kind in RUNNERS, f"no runner for kind {case.kind!r}"
    RUNNERS[case.kind](case)
    case.finish()


def test_cases_are_found() -> None:
    assert find("flatformer")
