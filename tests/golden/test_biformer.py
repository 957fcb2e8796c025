"""BiFormer equals its official implementation: ops, blocks and whole models, with gradients and routing."""

from __future__ import annotations

import inspect

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.backbones import biformer
from zoo.backbones.biformer import AttentionLePE, BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW
from zoo.convert.biformer import convert, convert_name
from zoo.kernels import bilevel_attention
from zoo.kernels.bilevel_routing import reference

from .cases import Case, find

# Official arguments without a counterpart: maps are always padded to whole windows, and training set-up.
WITHOUT_COUNTERPART = ("auto_pad", "norm_eval", "disable_bn_grad", "pretrained", "use_checkpoint_stages")
LAYER_OPTIONS = set(inspect.signature(BiLevelRoutingAttention).parameters) - {"dim", "num_heads", "n_win", "topk"}


def our_arguments(case: Case) -> dict:
    return {k: v for k, v in case.kwargs.items() if k not in WITHOUT_COUNTERPART}


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def load(case: Case, layer: nn.Module) -> dict[str, str]:
    """Fill a layer with the case's official weights; returns official name -> zoo name."""
    names = {p[0]: convert_name("." + p[0])[1:].replace("qkv.qkv.", "qkv.") for p in case.spec["params"]}
    weights = {names[name]: value for name, value in case.weights().items()}
    layer.load_state_dict(weights)
    assert sum(p.numel() for p in layer.parameters()) == case.spec["num_params"]
    return names


class Recorder:
    """Outputs of submodules and routings of attention layers, seen through hooks."""

    def __init__(self, model: nn.Module, *watched: nn.Module) -> None:
        self.outputs: dict[nn.Module, Tensor] = {}
        self.routings: dict[nn.Module, Tensor] = {}
        self.attention_inputs: dict[nn.Module, Tensor] = {}
        for module in watched:
            module.register_forward_hook(lambda m, args, out: self.outputs.__setitem__(m, out))
        for module in model.modules():
            if isinstance(module, (BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW)):
                module.register_forward_pre_hook(lambda m, args: self.attention_inputs.__setitem__(m, args[0]))

    def route(self, module: nn.Module) -> Tensor:
        """The regions that an attention layer chose for the input that it saw."""
        x = self.attention_inputs[module].detach()
        return module(x, return_routing=True)[1].index


def check_gradients(case: Case, out: Tensor, inputs: dict[str, Tensor], layer: nn.Module | None, names: dict) -> None:
    (out * case.output_gradient(out.shape)).sum().backward()
    for name, value in inputs.items():
        case.check(f"grad.{name}", value.grad)
    for official, ours in names.items():
        case.check(f"grad.{official}", layer.get_parameter(ours).grad)


def attention_of(layer, q, k, v, index, weight=None, regions=None, kv_regions=None) -> Tensor:
    """Token attention probabilities [B, M, G, T, L] by the definition."""
    qr, ks, _, _ = reference.gather_routed(q, k, v, index, layer.num_heads, regions, kv_regions, weight=weight)
    return ((qr * layer.scale) @ ks.transpose(-2, -1)).softmax(-1)


def run_bra(case: Case) -> None:
    layer = BiLevelRoutingAttention(**our_arguments(case))
    names = load(case, layer)
    seen = Recorder(layer, layer.lepe, layer.qkv)
    x = case.input().requires_grad_()
    out, routing = layer(x, return_routing=True)
    case.check("out", out)
    q, k, v = seen.outputs[layer.qkv].split((layer.qk_dim, layer.qk_dim, layer.dim), dim=-1)
    region = (q.shape[1] // routing.grid[0], q.shape[2] // routing.grid[1])
    q_region, k_region = reference.region_mean(q, region), reference.region_mean(k, region)
    case.check("q_region", q_region)
    case.check("k_region", k_region)
    if layer.router is not None:
        q_region, k_region = layer.router(q_region, k_region)
    case.check("logits_region", reference.affinity(q_region, k_region, layer.scale))
    case.check_routing("r_idx", routing.index)
    case.check("r_weight", routing.weight)
    case.check("lepe", nchw(seen.outputs[layer.lepe] - lepe_residual(layer, q, k, v, routing, region)))
    (keys, kv_region), (values, _) = layer._pool(k, region), layer._pool(v, region)
    weight = routing.weight if layer.soft_routing else None
    attn = attention_of(layer, q, keys, values, routing.index, weight, region, kv_region)
    case.check("attn", attn.transpose(1, 2).flatten(0, 1))  # [B*G, M, T, L]
    check_gradients(case, out, {"x": x}, layer, names)


def lepe_residual(layer, q, k, v, routing, region) -> Tensor:
    """What the fused convolution adds to: the attention's output."""
    (keys, kv_region), (values, _) = layer._pool(k, region), layer._pool(v, region)
    return bilevel_attention(
        q, keys, values, routing.index, heads=layer.num_heads, region=region, kv_region=kv_region, scale=layer.scale,
        weight=routing.weight if layer.soft_routing else None,
    )  # fmt: skip


def run_nchw_bra(case: Case) -> None:
    layer = BiLevelRoutingAttentionNCHW(**our_arguments(case))
    names = load(case, layer)
    seen = Recorder(layer, layer.lepe, layer.qkv_linear)
    x = case.input().requires_grad_()
    out, routing = layer(x, return_routing=True)
    case.check("out", out)
    q, k, v = seen.outputs[layer.qkv_linear].permute(0, 2, 3, 1).chunk(3, -1)
    region = tuple(max(side // layer.n_win, 1) for side in x.shape[2:])
    q_region, k_region = reference.region_mean(q, region), reference.region_mean(k, region)
    case.check("q_region", q_region)
    case.check("k_region", k_region)
    case.check("logits_region", reference.affinity(q_region, k_region, 1.0))
    case.check_routing("r_idx", routing.index)
    attn_out = bilevel_attention(
        q, k, v, routing.index, heads=layer.num_heads, region=region, scale=layer.scale
    )  # fmt: skip
    case.check("attn_out", nchw(attn_out))
    case.check("lepe", nchw(seen.outputs[layer.lepe] - attn_out))
    case.check("attn", attention_of(layer, q, k, v, routing.index, None, region, region))
    check_gradients(case, out, {"x": x}, layer, names)


def run_attention_lepe(case: Case) -> None:
    on_value = case.model == "nchwAttentionLePE"
    layer = AttentionLePE(**case.kwargs, lepe_on="value" if on_value else "input")
    layer.lepe.register_forward_hook(lambda m, args, kwargs, out: setattr(m, "seen", out - kwargs["residual"]),
                                     with_kwargs=True)  # fmt: skip
    official = case.weights()
    names = {name: name for name in official}
    layer.load_state_dict({n: v.reshape(layer.state_dict()[n].shape) for n, v in official.items()})
    x = case.input().requires_grad_()
    out = layer(x.permute(0, 2, 3, 1)) if on_value else layer(x)
    case.check("lepe", nchw(layer.lepe.seen))
    out = nchw(out) if on_value else out
    case.check("out", out)
    (out * case.output_gradient(out.shape)).sum().backward()
    case.check("grad.x", x.grad)
    for name in names:
        case.check(f"grad.{name}", layer.get_parameter(name).grad.reshape(official[name].shape))


def run_block(case: Case) -> None:
    kwargs = our_arguments(case)
    shared = {k: kwargs.pop(k) for k in list(kwargs) if k in biformer.BlockConfig._fields}
    dim, heads, topk, drop_path = (kwargs.pop(k, 0) for k in ("dim", "num_heads", "topk", "drop_path"))
    unknown = set(kwargs) - LAYER_OPTIONS
    assert not unknown, f"unknown block arguments {sorted(unknown)}"
    config = biformer.BlockConfig(**shared)
    block = biformer.Block(dim, heads, topk, drop_path, config, attn_options=kwargs if topk > 0 else None).eval()
    names = load(case, block)
    block.attn.lepe.register_forward_hook(lambda m, args, kw, out: setattr(m, "seen", out - kw["residual"]),
                                          with_kwargs=True)  # fmt: skip
    seen = Recorder(block)
    x = case.input().requires_grad_()
    out = nchw(block(x.permute(0, 2, 3, 1)))
    case.check("lepe", nchw(block.attn.lepe.seen))
    case.check("out", out)
    check_gradients(case, out, {"x": x}, block, names)
    if topk > 0:
        case.check_routing("route.attn", seen.route(block.attn))


def run_function(case: Case) -> None:
    inputs = {name: case.input(name).requires_grad_() for name in ("q", "k", "v")}
    q, k, v = (x.permute(0, 2, 3, 1) for x in inputs.values())
    index = case.input("region_graph")
    case.check_routing("region_graph", index)
    heads, region, kv_region = (case.kwargs[name] for name in ("num_heads", "region_size", "kv_region_size"))
    out = nchw(
        bilevel_attention(
            q, k, v, index, heads=heads, region=region, kv_region=kv_region, scale=case.kwargs["scale"]
        )  # fmt: skip
    )
    case.check("out", out)
    qr, ks, _, _ = reference.gather_routed(q, k, v, index, heads, region, kv_region)
    case.check("attn", ((qr * case.kwargs["scale"]) @ ks.transpose(-2, -1)).softmax(-1))
    check_gradients(case, out, inputs, None, {})


def dense_arguments(kwargs: dict) -> dict:
    """The official arguments of a dense-task backbone as arguments of `BiFormer`."""
    renamed = dict(depth="depths", embed_dim="embed_dims", kv_downsample_ratio="kv_downsample_ratios")
    dropped = (*WITHOUT_COUNTERPART, "pe", "kv_per_wins", "qk_dims")
    out = {renamed.get(k, k): v for k, v in kwargs.items() if k not in dropped}
    if kwargs.get("pe") is not None:
        raise ValueError(f"no position embedding but the convolution is known, got pe={kwargs['pe']!r}")
    if kwargs["kv_downsample_mode"] != "identity":
        out["kv_per_wins"] = kwargs["kv_per_wins"]
    if kwargs.get("qk_dims") and list(kwargs["qk_dims"]) != list(kwargs["embed_dim"]):
        out["qk_dims"] = kwargs["qk_dims"]
    return out


def run_model(case: Case) -> None:
    dense = case.model.startswith("BiFormer_mm")
    if dense:
        model = timm.create_model(
            "biformer_small", features_only=True, extra_norms=True, **dense_arguments(case.kwargs)
        ).eval()  # fmt: skip
        net = model.model
    else:
        model = net = timm.create_model(case.model, **our_arguments(case)).eval()
    assert sum(p.numel() for p in model.parameters()) == case.spec["num_params"]
    net.load_state_dict(convert(case.weights(), nchw=case.model.endswith("nchw")))
    downs = [net.stem, *(stage.downsample for stage in net.stages[1:])]
    seen = Recorder(net, *downs, *net.stages)
    x = case.input()
    with torch.no_grad():
        out = model(x)
        for name in case.spec["outputs"]:
            if name.startswith("down"):
                case.check(name, seen.outputs[downs[int(name[4:])]])
            elif name.startswith("stage"):
                case.check(name, seen.outputs[net.stages[int(name[5:])]])
            elif name.startswith("feat"):
                case.check(name, out[int(name[4:])])
            elif name.startswith("route."):
                module = net.get_submodule(convert_name(name[len("route.") :] + ".")[:-1])
                case.check_routing(name, seen.route(module))
            elif name == "logits":
                case.check(name, out)
            else:
                raise ValueError(f"unknown output {name!r}")


RUNNERS = {
    ("op", "BiLevelRoutingAttention"): run_bra,
    ("op", "nchwBRA"): run_nchw_bra,
    ("op", "AttentionLePE"): run_attention_lepe,
    ("op", "nchwAttentionLePE"): run_attention_lepe,
    ("op", "Block"): run_block,
    ("func", "regional_routing_attention"): run_function,
}


@pytest.mark.parametrize("path", find("biformer"), ids=lambda p: p.stem)
def test_golden(path) -> None:
    case = Case(path)
    runner = RUNNERS.get((case.kind, case.model), run_model if case.kind == "model" else None)
    assert runner is not None, f"no runner for kind {case.kind!r}, model {case.model!r}"
    runner(case)
    case.finish()


def test_cases_are_found() -> None:
    assert find("biformer")
