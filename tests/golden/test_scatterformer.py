"""ScatterFormer equals its official implementation: attention, blocks, pooling, backbone, encoder, map convolutions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.backbones.cascade_ded import CascadeDED
from zoo.backbones.point_layers import DynamicVFE
from zoo.backbones.scatterformer import (
    AttentivePillarPooling,
    CrossWindowInteraction,
    ScatteredLinearAttention,
    ScatterFormer,
    ScatterFormerLayers,
    stage_index,
)
from zoo.kernels import scatter_linear_attention
from zoo.kernels.scatter_linear.reference import window_of_rows, window_sums
from zoo.kernels.sparse_conv import Sites, find_pillars, sort_sites, sparse_depthwise_conv, window_offsets
from zoo.kernels.voxelize import Voxels

from . import fill
from .cases import find
from .test_flatformer import Case

_FIRST = re.compile(r"\[:(\d+)\]$")
# Where the input of a ReLU is zero within rounding, the official run and ours may fall to different sides, and so may
# two CPUs. The gradient with respect to the voxels then differs within the reach of that site, which is small: of a
# whole backbone, with ten million such inputs, this part of the entries may be off, by this factor at most.
KINKS, KINK_FACTOR = 0.02, 20


class SparseCase(Case):
    """A case whose outputs are rows of sites, compared in the order of their cells."""

    def voxels(self) -> Voxels:
        spec = self.spec["inputs"]["coords"]
        shape = tuple(self.kwargs.get("spatial_shape") or (spec["nz"], spec["ny"], spec["nx"]))
        return Voxels(self.input("coords").int(), None, len(spec["counts"]), shape)

    def rows(self, name: str, count: int) -> Tensor:
        return fill.image(f"{self.spec['case']}:{name}", (count, self.kwargs.get("dim") or self.channels()))

    def channels(self) -> int:
        return self.kwargs.get("embed_dim") or self.kwargs["input_channels"]

    def check(self, name: str, actual: Tensor) -> None:
        first = _FIRST.search(self.outputs[name]["description"]) if name in self.outputs else None
        super().check(name, actual[: int(first[1])] if first else actual)

    def check_gradients(self, module: nn.Module, y: Tensor, **inputs: Tensor) -> None:
        if self.kind != "backbone":
            return super().check_gradients(module, y, **inputs)
        strict = self.outputs.pop("grad.x")
        super().check_gradients(module, y, **inputs)
        self.outputs["grad.x"], expected = strict, self.expected["grad.x"]
        tolerance = self.spec["atol"] * max(1.0, expected.abs().max().item()) + self.spec["rtol"] * expected.abs()
        error = (inputs["x"].grad[:: self.spec["measured"]["grad_x_row_stride"]] - expected).abs() / tolerance
        assert (error > 1).float().mean() < KINKS and error.max() < KINK_FACTOR, f"grad.x is off by {error.max():.3g}"
        self.compared.add("grad.x")

    def check_sites(self, name: str, x: Tensor, voxels: Voxels) -> Tensor:
        """Compare rows and their coordinates, sorted by (sample, z, y, x); the sorted rows."""
        _, Y, X = voxels.shape
        b, z, y, col = voxels.coords.long().unbind(1)
        order = (((b * voxels.shape[0] + z) * Y + y) * X + col).argsort()
        self.check(f"{name}_coords", voxels.coords[order])
        self.check(name, x[order])
        return x[order]


def run_sla_kernel(case: SparseCase) -> None:
    counts, M, D = (case.kwargs[name] for name in ("counts", "num_heads", "head_dim"))
    shape = (sum(counts), M, D)
    q, k, v = (fill.image(f"{case.spec['case']}:{name}", shape) for name in "qkv")
    q, k, v = (x.requires_grad_() for x in (q.relu(), k.relu(), v))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    out = scatter_linear_attention(q, k, v, offsets, relu=False)
    case.check("out", out)
    window = window_of_rows(offsets, None, len(q))
    state, total = window_sums(k, v, window, len(counts))
    case.check("z", (q * total[window]).sum(-1, keepdim=True))
    case.check("k_sum", total)
    case.check("kv_sum_last4", state[-4:])
    case.check_gradients(nn.Module(), out, q=q, k=k, v=v)


def run_sla(case: SparseCase) -> None:
    module, voxels = case.load(ScatteredLinearAttention(case.kwargs["dim"], case.kwargs["num_heads"])), case.voxels()
    case.check("coords", voxels.coords)
    W = case.kwargs["win_size"]
    sites, order = sort_sites(voxels, (W, W))
    offsets = window_offsets(sites)
    x = case.rows("x", len(order)).requires_grad_()
    out = module(x, offsets, order)
    case.check("out", out)

    real = offsets.diff() > 0
    window = window_of_rows(offsets, order, len(x))
    case.check("window_count", offsets.diff()[real])
    case.check("window_index", (real.cumsum(0) - 1)[window])
    rows, cols = sites.grid.windows
    number = real.nonzero()[:, 0]
    case.check("window_table_b_wy_wx", torch.stack((number // (rows * cols), number // cols % rows, number % cols), 1))
    _, k, v = module.qkv(x).unflatten(1, (3, case.kwargs["num_heads"], -1)).unbind(1)
    state, total = window_sums(k.relu(), v, window, len(real))
    case.check("k_sum", total[real])
    case.check("kv_sum_first16", state[real][:16])
    case.check_gradients(module, out, x=x)


def sorted_input(case: SparseCase, W: int) -> tuple[Sites, Tensor, Tensor]:
    """Sites by window, and the input before and after that sort."""
    sites, order = sort_sites(case.voxels(), (W, W))
    x = case.rows("x", len(order)).requires_grad_()
    return sites, x, x[order]


def run_cwi(case: SparseCase) -> None:
    dim, size = case.kwargs["embed_dim"], case.kwargs["conv_size"]
    module = case.load(CrossWindowInteraction(dim, size))
    sites, x, rows = sorted_input(case, size - 1)
    table = stage_index(sites).table
    branches = {name: getattr(module, name).weight for name in ("conv_k", "conv_h", "conv_w")}
    parts = sparse_depthwise_conv(module.bn(rows), list(branches.values()), table).chunk(4, 1)
    for name, part in zip(branches, parts, strict=False):
        case.check_sites(name, part, sites.voxels)
    out = case.check_sites("out", module(rows, table), sites.voxels)
    case.check_gradients(module, out, x=x)


def run_layers(case: SparseCase) -> None:
    kwargs = case.kwargs
    module = ScatterFormerLayers(kwargs["embed_dim"], kwargs["nhead"], kwargs["num_layers"], kwargs["win_size"])
    case.load(module)
    sites, x, rows = sorted_input(case, kwargs["win_size"])
    out = case.check_sites("out", module(rows, stage_index(sites)), sites.voxels)
    case.check_gradients(module, out, x=x)


def run_app(case: SparseCase) -> None:
    module = case.load(AttentivePillarPooling(case.kwargs["dim"], case.kwargs["pillar_size"]))
    sites, x, rows = sorted_input(case, 4)
    pillars = find_pillars(sites)
    case.check_sites("query", module.query(rows, pillars), pillars.voxels)
    out = case.check_sites("out", module(rows, pillars), pillars.voxels)
    case.check_gradients(module, out, x=x)


def run_backbone(case: SparseCase) -> None:
    module, voxels = case.load(ScatterFormer(**case.kwargs)), case.voxels()
    x = case.rows("x", len(voxels.coords)).requires_grad_()
    features, sites = module._sites(x, voxels, is_sorted=True)
    features, sites = module.encode_sites(features, sites)
    case.check_sites("cpe", features, sites.voxels)
    # The map after the strided convolution, seen as the second stage's input.
    seen = []
    module.stage1[2].register_forward_hook(lambda m, args, out: seen.append(out))
    features, sites = module.run_stages(features, sites)
    case.check_sites("stage1", seen[0], sites.voxels)
    case.check_sites("stage2", features, sites.voxels)
    pillars = find_pillars(sites)
    tokens = case.check_sites("bev_tokens", module.app(features, pillars), pillars.voxels)
    case.check("bev_ch0", module(x, voxels, is_sorted=True)[:, 0])
    case.check_gradients(module, tokens, x=x)


def run_vfe(case: SparseCase) -> None:
    kwargs = case.kwargs
    module = DynamicVFE(
        kwargs["num_point_features"],
        kwargs["num_filters"],
        kwargs["voxel_size"],
        kwargs["point_cloud_range"],
        clamp=False,
        order="xyz",
        half_width=True,
        with_distance=kwargs["with_distance"],
        layers_name="pfn_layers",
    )
    features, voxels = case.load(module)(case.input("points"))
    case.check("voxel_coords", voxels.coords)
    case.check("voxel_features", features)
    case.check_gradients(module, features)


def run_bev(case: SparseCase) -> None:
    module = case.load(CascadeDED(**case.kwargs))
    for i, layer in enumerate(module.layers):
        layer.register_forward_hook(lambda m, args, out, i=i: case.check(f"layer{i}", out))
    module(case.input("x"))


RUNNERS = {
    "sla_kernel": run_sla_kernel,
    "sla": run_sla,
    "cwi": run_cwi,
    "layer3x": run_layers,
    "app": run_app,
    "backbone": run_backbone,
    "vfe": run_vfe,
    "bev": run_bev,
}
# Run by test_detectors.py.
OF_DETECTORS = {"center", "transfusion", "detector"}


@pytest.mark.parametrize("path", find("scatterformer"), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case = SparseCase(path)
    if case.kind in OF_DETECTORS:
        pytest.skip("a case of test_detectors.py")
    assert case.kind in RUNNERS, f"no runner for kind {case.kind!r}"
    RUNNERS[case.kind](case)
    case.finish()


def test_cases_are_found() -> None:
    assert find("scatterformer")
