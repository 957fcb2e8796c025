"""Agent Attention equals its official implementation: ops, layers, models, the resizing of weights, and AgentSD."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.backbones.agent import (
    AgentAttention,
    AgentDeiT,
    AgentStripAttention,
    AgentSwin,
    Block,
    CrossShapedAttention,
    SpatialReductionAgentAttention,
    WindowAttention,
    checkpoint_filter_fn,
)
from zoo.backbones.agent_layers import LENGTH_DIM, agent_blocks
from zoo.backbones.agent_swin import PatchMerging
from zoo.convert.agent import convert, convert_name
from zoo.kernels.agent.reference import expand_bias

from . import agent_sd, fill
from .cases import Case, _parse_slice, find

# Official arguments without a counterpart, and the only values for which that is right.
DEFAULTS = dict(patch_size=4, ape=False, patch_norm=True, num_stages=4, qk_scale=None, scale=-0.5, use_checkpoint=False)
# These do nothing in evaluation, or only set up training.
NO_EFFECT = ("drop_rate", "drop_path_rate", "attn_drop", "proj_drop", "attn_drop_rate", "frozen_stages", "init_cfg")


class AgentCase(Case):
    """A case whose outputs are [shape, dtype] rows with slices beside them."""

    def input(self, name: str = "x") -> Tensor:
        return fill.image(self.spec["input"]["name"], self.spec["input"]["shape"])

    @property
    def grid(self) -> tuple[int, int] | None:
        """Map of the input, where the case gives it."""
        spec = self.spec["input"]
        return (spec["H"], spec["W"]) if "H" in spec else None

    def slice_of(self, name: str) -> tuple[slice, ...]:
        taps = {tap["key"]: tap["slice"] for tap in self.spec.get("taps", [])}
        taps.update({f"out{i}": text for i, text in enumerate(self.spec.get("out_slices", []))})
        return _parse_slice(taps[name]) if name in taps else ()

    def check(self, name: str, actual: Tensor) -> None:
        if name not in self.spec["outputs"]:
            return
        actual, expected = actual.detach()[self.slice_of(name)], self.expected[name]
        assert list(actual.shape) == self.spec["outputs"][name][0], f"{name}: shape {tuple(actual.shape)}"
        torch.testing.assert_close(
            actual.to(expected.dtype), expected, rtol=self.spec["rtol"], atol=self.spec["atol"],
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip
        self.compared.add(name)

    def arguments(self, *same: str, **renamed: str) -> dict:
        """The case's arguments under our names; any other must have the value that we always have."""
        names, out = dict(renamed, **{name: name for name in same}), {}
        for name, value in self.kwargs.items():
            if name in names:
                out[names[name]] = value
            elif name not in NO_EFFECT:
                assert name in DEFAULTS and value == DEFAULTS[name], f"no counterpart of {name}={value}"
        return out


def numbers(values) -> list[int]:
    return [int(v) for v in values]


def load(case: AgentCase, layer: nn.Module, names: dict[str, str] | None = None) -> dict[str, str]:
    """Fill a layer with the case's weights; returns official name -> ours."""
    weights = {n: v for n, v in case.weights().items() if not n.endswith(("relative_position_index", "attn_mask"))}
    names = {n: (names or {}).get(n, n) for n in weights}
    layer.load_state_dict({names[n]: v for n, v in weights.items()})
    assert sum(p.numel() for p in layer.parameters()) == case.spec["num_params"]
    return names


def as_official(name: str, value: Tensor) -> Tensor:
    """Row and column biases of the official models have a leading axis of length one."""
    return value[None] if name.rpartition(".")[2] in LENGTH_DIM else value


def check_gradients(case: AgentCase, out: Tensor, x: Tensor, layer: nn.Module, names: dict[str, str]) -> None:
    (out * case.output_gradient(out.shape)).sum().backward()
    case.check("grad.x", x.grad)
    for official, ours in names.items():
        grad = layer.get_parameter(ours).grad
        case.check(f"grad.{official}", as_official(ours, grad))


def spy(layer: nn.Module, seen: dict) -> None:
    """Record what goes through the attention, the convolution and the output projection of a layer."""
    attend = layer.attend

    def recording(q, k, v, grid):
        seen.update(q=q, k=k, grid=grid)
        return attend(q, k, v, grid)

    layer.attend = recording
    conv = layer.get_v if hasattr(layer, "get_v") else layer.dwc
    conv.register_forward_hook(lambda m, args, kw, out: seen.update(conv=out - kw["residual"]), with_kwargs=True)
    if hasattr(layer, "proj"):
        layer.proj.register_forward_pre_hook(lambda m, args: seen.update(pre_proj=args[0]))


def check_internals(case: AgentCase, layer: nn.Module, seen: dict) -> None:
    """Agents, biases and both attention maps."""
    q, k, grid = seen["q"], seen["k"], seen["grid"]
    key_grid = layer.key_grid_of(grid)
    case.check("agent_tokens", layer.pool(q, grid))
    case.check("bias_agent_key", expand_bias(layer.key_bias(key_grid), key_grid))
    case.check("bias_query_agent", expand_bias(layer.query_bias(grid), grid).transpose(1, 2))
    gather, spread = layer.attention_maps(q, k, grid)
    case.check("attn_agent_key", gather)
    case.check("attn_query_agent", spread)
    case.check("dwc_out", seen["conv"].permute(0, 3, 1, 2))
    if "pre_proj" in seen:
        case.check("pre_proj", seen["pre_proj"])


def square(tokens: int) -> tuple[int, int]:
    return (round(tokens**0.5),) * 2


def build_op(case: AgentCase) -> nn.Module:
    kwargs = case.arguments(
        "dim", "num_heads", "qkv_bias", "sr_ratio", agent_num="agent_num", downstream_agent_shape="agent_grid",
        window="grid", window_size="grid", num_patches="grid",
    )  # fmt: skip
    grid = kwargs["grid"]
    if isinstance(grid, int):
        kwargs["grid"] = square(grid) if "num_patches" in case.kwargs else (grid, grid)
    if case.model == "op_deit":
        return AgentAttention(**kwargs, class_token=True)
    if case.model in ("op_swin", "op_downstream_swin"):
        return AgentAttention(**kwargs)
    if case.model in ("op_pvt", "op_downstream_pvt"):
        return SpatialReductionAgentAttention(**kwargs)
    raise ValueError(f"unknown op {case.model!r}")


def run_op(case: AgentCase) -> None:
    if case.model == "op_cswin":
        return run_strip_op(case)
    layer, seen = build_op(case), {}
    names = load(case, layer)
    spy(layer, seen)
    x = case.input().requires_grad_()
    out = layer(x, case.grid)
    case.check("out", out)
    check_internals(case, layer, seen)
    check_gradients(case, out, x, layer, names)


def run_strip_op(case: AgentCase) -> None:
    kwargs, side, seen = case.kwargs, case.kwargs["resolution"], {}
    width = kwargs["split_size"]
    strip = {-1: None, 0: (side, width), 1: (width, side)}[kwargs["idx"]]
    layer = AgentStripAttention(kwargs["dim"], kwargs["num_heads"], kwargs["agent_num"], (side, side), strip=strip)
    names = load(case, layer)
    spy(layer, seen)
    x = case.input().requires_grad_()
    out = layer(*x.unflatten(2, (side, side))).flatten(1, 2)
    case.check("out", out)
    check_internals(case, layer, seen)
    check_gradients(case, out, x, layer, names)


def run_cswin_block(case: AgentCase) -> None:
    kwargs = case.kwargs
    dim, heads, side, width = (kwargs[k] for k in ("dim", "num_heads", "reso", "split_size"))
    agent = None
    if kwargs["attn_type"] == "A":
        agent = AgentStripAttention(dim, heads, int(kwargs["agent_num"]), (side, side))
    attn = CrossShapedAttention(dim, heads, None if side == width else width, agent, kwargs["qkv_bias"])
    block = Block(dim, attn).eval()
    own = {p[0] for p in case.spec["params"]}
    names = load(case, block, {n: f"attn.{n}" for n in own if n.startswith(("qkv", "proj", "attns"))})
    x = case.input().requires_grad_()
    out = block(x.unflatten(1, (side, side))).flatten(1, 2)
    case.check("out", out)
    check_gradients(case, out, x, block, names)


def run_swin_layer(case: AgentCase) -> None:
    kwargs = case.kwargs
    dim, heads, grid, depth = (kwargs[k] for k in ("dim", "num_heads", "input_resolution", "depth"))
    agents, window = agent_blocks(kwargs["attn_type"], [depth])[0], max(7, kwargs["window_size"] // 8)

    def attention(j: int) -> nn.Module:
        if j < agents:
            return AgentAttention(dim, heads, kwargs["agent_num"], grid)
        return WindowAttention(dim, heads, grid, window, j % 2 == 1)

    layer = nn.ModuleDict(dict(blocks=nn.Sequential(*(Block(dim, attention(j)) for j in range(depth)))))
    if kwargs["patch_merging"]:
        layer["downsample"] = PatchMerging(dim, 2 * dim)
    names = load(case, layer.eval())
    x = case.input().requires_grad_()
    out = x.unflatten(1, grid)
    for j, block in enumerate(layer["blocks"]):
        out = block(out)
        case.check(f"block{j}", out.flatten(1, 2))
    if kwargs["patch_merging"]:
        out = layer["downsample"](out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    out = out.flatten(1, 2)
    case.check("out", out)
    check_gradients(case, out, x, layer, names)


COMMON = ("img_size", "in_chans", "num_classes", "qkv_bias", "depths", "num_heads", "attn_type")


def build_deit(case: AgentCase) -> nn.Module:
    kwargs = case.arguments(
        *COMMON, "patch_size", "embed_dim", "depth", "mlp_ratio", agent_num="agent_nums"
    )  # fmt: skip
    return AgentDeiT(**kwargs) if case.model == "deit_vit" else timm.create_model(case.model, **kwargs)


def build_pvt(case: AgentCase) -> nn.Module:
    if "agent_sr_ratios" in case.kwargs:
        case.kwargs["agent_sr_ratios"] = numbers(case.kwargs["agent_sr_ratios"])
    kwargs = case.arguments(
        *COMMON, "agent_sr_ratios", "embed_dims", "mlp_ratios", "sr_ratios", "out_indices",
        agent_num="agent_nums", downstream_agent_shapes="agent_grids",
    )  # fmt: skip
    if case.model == "downstream_pvt":
        del kwargs["num_classes"]
        return timm.create_model("agent_pvt_tiny", features_only=True, feature_cls="getter", **kwargs)
    return timm.create_model(re.sub("_b$", "_large", case.model), **kwargs)


def build_swin(case: AgentCase) -> nn.Module:
    kwargs = case.arguments(
        *COMMON, "embed_dim", "mlp_ratio", "window_size", "out_indices",
        agent_num="agent_nums", downstream_agent_shapes="agent_grids",
    )  # fmt: skip
    if case.model == "downstream_swin":
        del kwargs["num_classes"]
        return timm.create_model("agent_swin_tiny", features_only=True, extra_norms=True, **kwargs)
    return AgentSwin(**kwargs)


def build_cswin(case: AgentCase) -> nn.Module:
    size, side = case.model.split("_")[-2:]
    maps = [case.kwargs["img_size"] // 4 // 2**i for i in range(4)]
    # Agent blocks always attend over the whole map.
    assert numbers(case.kwargs.pop("la_split_size").split("-")) == maps
    kwargs = case.arguments(*COMMON, "mlp_ratio", split_size="split_sizes", agent_num="agent_nums")
    return timm.create_model(f"agent_cswin_{size}" + ("_384" if side == "384" else ""), **kwargs)


FAMILIES = {
    r"agent_deit_\w+|deit_vit": build_deit,
    r"(agent|downstream)_pvt\w*": build_pvt,
    r"(agent|downstream)_swin\w*": build_swin,
    r"Agent_CSWin_\w+": build_cswin,
}


def build(case: AgentCase) -> nn.Module:
    builder = next((build for pattern, build in FAMILIES.items() if re.fullmatch(pattern, case.model)), None)
    assert builder is not None, f"unknown model {case.model!r}"
    case.kwargs["agent_num"] = numbers(case.kwargs["agent_num"])
    return builder(case).eval()


def tokens(x: Tensor, channels_first: bool) -> Tensor:
    if x.dim() == 3:
        return x
    return x.flatten(2).transpose(1, 2) if channels_first else x.flatten(1, 2)


def watch(case: AgentCase, net: nn.Module) -> dict[str, Tensor]:
    """Hooks on the modules that the case's taps stand for."""
    seen = {}
    for tap in case.spec["taps"]:
        stage = re.fullmatch(r"layers\.(\d)", tap["module"])
        if stage is None:
            module, channels_first = net.get_submodule(convert_name(tap["module"] + ".")[:-1]), False
        else:
            # An official stage of Agent-Swin ends with what begins the next one here.
            i, channels_first = int(stage[1]) + 1, True
            module = net.stages[i].downsample if i < len(net.stages) else net.stages[-1]
        module.register_forward_hook(
            lambda m, args, out, key=tap["key"], cf=channels_first: seen.update({key: tokens(out, cf)})
        )
    return seen


def run_model(case: AgentCase) -> None:
    model = build(case)
    net = model.model if case.model.startswith("downstream") else model
    assert sum(p.numel() for p in model.parameters()) == case.spec["num_params"]
    net.load_state_dict(convert(case.weights()))
    seen = watch(case, net)
    with torch.no_grad():
        out = model(case.input())
    for name, value in seen.items():
        case.check(name, value)
    if isinstance(out, list):
        for i, value in enumerate(out):
            case.check(f"out{i}", value)
    else:
        case.check("out", out)


def run_resize(case: AgentCase) -> None:
    weights = case.weights()
    case.kwargs = dict(case.spec["kwargs_target"])
    model = build(case)
    resized = checkpoint_filter_fn(weights, model)
    model.load_state_dict(resized)
    for name in case.spec["outputs"]:
        case.check(name, as_official(name, resized[convert_name(name)]))


RUNNERS = {
    "op": run_op,
    "layer": lambda case: {"cswin_block": run_cswin_block, "swin_layer": run_swin_layer}[case.model](case),
    "model": run_model,
    "resize": run_resize,
    **agent_sd.RUNNERS,
}


@pytest.mark.parametrize("path", find("agent"), ids=lambda p: p.stem)
def test_golden(path) -> None:
    case = AgentCase(path)
    assert case.kind in RUNNERS, f"no runner for kind {case.kind!r}"
    RUNNERS[case.kind](case)
    case.finish()


def test_cases_are_found() -> None:
    assert find("agent")
