"""Runners of the golden cases of AgentSD: token selection, a transformer block, a UNet."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from zoo.heads import agent_sd
from zoo.heads.agent_sd.merging import Merge, destinations, match, select
from zoo.heads.agent_sd.processor import Layer
from zoo.heads.agent_sd.schedule import Context, Phase

from . import fill

# Arguments that the official patch takes where a case does not give them.
PATCH_DEFAULTS = dict(sx=2, sy=2, ratio=0.5, agent_ratio=0.8, use_rand=True, merge_attn=True)
# Arguments of the same name and default here.
SAME = dict(max_downsample=1, merge_crossattn=False, merge_mlp=False, k_scale2=0.3, k_shortcut=0.075)


def settings(patch: dict) -> dict:
    """Arguments of `apply` for those of the official patch."""
    patch = PATCH_DEFAULTS | SAME | patch
    unknown = set(patch) - set(PATCH_DEFAULTS) - set(SAME)
    assert not unknown and patch["merge_attn"], f"no counterpart of {unknown or 'merge_attn=False'}"
    phase = Phase(1.0, (patch["sy"], patch["sx"]), patch["agent_ratio"])
    same = {name: patch[name] for name in SAME}
    return dict(ratio=patch["ratio"], schedule=(phase,), use_rand=patch["use_rand"], **same)


def context(patch: dict, latent: tuple[int, int], seed: int | None = None) -> Context:
    """The state of an installation of the published method in the middle of a UNet call."""
    arguments = settings(patch)
    # These choose what is installed.
    del arguments["max_downsample"], arguments["merge_crossattn"], arguments["merge_mlp"]
    out = Context(**arguments, fast=False, seed=seed, min_merge_tokens=0)
    out.begin(torch.empty(1, 4, *latent), 500)
    return out


def assignment(merge: Merge) -> Tensor:
    """Destination token of each token [B, N]; -1 for kept ones."""
    return torch.where(merge.share > 0, merge.dst[merge.target], -1)


def tokens_of_rows(merge: Merge) -> Tensor:
    """Token that each merged row stands for [B, K + n]."""
    return torch.cat((merge.kept, merge.dst.expand(len(merge.kept), -1)), dim=1)


def check_selection(case, tokens: Merge, agents: Merge | None) -> None:
    case.check("dst_tokens", tokens.dst)
    case.check("assign", assignment(tokens))
    case.check("kept_tokens", tokens_of_rows(tokens))
    assert (agents is None) == ("agent_assign" not in case.spec["outputs"])
    if agents is not None:
        case.check("agent_assign", assignment(agents))
        case.check("agent_kept_tokens", tokens_of_rows(agents))


def run_merge(case) -> None:
    kwargs, spec, x = case.kwargs, case.spec["input"], case.input()
    patch = {name: kwargs[name] for name in ("sx", "sy", "ratio", "agent_ratio")}
    latent = (kwargs["h"], kwargs["w"])
    state = context(patch | dict(use_rand=not kwargs["no_rand"]), latent, case.spec["seed"])
    plan = state.plan(x.shape[1])
    assert plan.grid == latent
    offsets = state.cell_offsets(0, plan, x.shape[0], x.device)
    assert (offsets is None) == kwargs["no_rand"]
    if offsets is not None:
        case.check("dst_offset", offsets)
    found = match(x, destinations(plan.grid, plan.cell, offsets))
    tokens = select(found, plan.merged)
    agents = select(found, plan.agent_merged) if plan.agent_merged else None
    check_selection(case, tokens, agents)
    sources = x.shape[1] - tokens.dst.numel()
    case.check("r_effective", torch.tensor([min(kwargs["r"], sources), min(kwargs["agent_r"], sources)]))
    assert plan.merged == min(kwargs["r"], sources)
    assert plan.agent_merged in (0, min(kwargs["agent_r"], sources))
    value = fill.image(spec["value_name"], spec["shape"])
    merged = tokens.merge(value)
    case.check("merged", merged)
    if agents is not None:
        case.check("agents", agents.merge(value))
    case.check("unmerged", tokens.unmerge(fill.image(spec["unmerge_name"], merged.shape)))


def run_block(case) -> None:
    spec, kwargs = case.spec["input"], dict(case.kwargs["block"])
    block = BasicTransformerBlock(
        kwargs.pop("dim"), kwargs.pop("n_heads"), kwargs.pop("d_head"), cross_attention_dim=kwargs.pop("context_dim")
    ).eval()  # fmt: skip
    assert not kwargs, f"no counterpart of {kwargs}"
    block.load_state_dict(case.weights())
    patch = case.kwargs["patch"]
    layer = Layer(block, 0, context(patch, (spec["H"], spec["W"]), case.spec.get("seed")))
    layer.install(patch.get("merge_crossattn", False), patch.get("merge_mlp", False))
    seen = {"selection": None, "queries": []}
    block.norm1.register_forward_hook(lambda m, args, out: seen.update(selection=layer.selection))
    block.attn1.to_q.register_forward_hook(lambda m, args, out: seen["queries"].append(args[0]))
    block.attn1.to_k.register_forward_hook(lambda m, args, out: seen.update(keys=args[0]))
    block.attn1.to_out[1].register_forward_hook(lambda m, args, out: seen.update(out=out))
    x = case.input().requires_grad_()
    out = block(x, encoder_hidden_states=fill.image(spec["context_name"], spec["context_shape"]))
    case.check("out", out)
    check_selection(case, *seen["selection"])
    case.check("attn1_in", seen["keys"])
    case.check("attn1_out", seen["out"])
    if len(seen["queries"]) > 1:
        case.check("attn1_agents", seen["queries"][1])
    (out * case.output_gradient(out.shape)).sum().backward()
    case.check("grad.x", x.grad)
    for name in case.spec["grad_params"]:
        case.check(f"grad.{name}", block.get_parameter(name).grad)


def watch(unet: UNet2DConditionModel, names: list[str]) -> list[list]:
    """Rows [block, tokens entering attn1, agents] as the UNet runs."""
    rows = []

    def on_queries(name):
        def hook(module, args, out):
            if rows and rows[-1][0] == name:
                rows[-1][2] = args[0].shape[1]
            else:
                rows.append([name, args[0].shape[1], 0])

        return hook

    for name in names:
        unet.get_submodule(name).attn1.to_q.register_forward_hook(on_queries(name))
    return rows


@torch.no_grad()
def run_unet(case) -> None:
    spec = case.spec["input"]
    unet = UNet2DConditionModel(**case.kwargs["unet"]).eval()
    unet.load_state_dict(case.weights())
    assert sum(p.numel() for p in unet.parameters()) == case.spec["num_params"]
    x, text = case.input(), fill.image(spec["context_name"], spec["context_shape"])
    case.check("unpatched", unet(x, spec["timestep"], text).sample)
    layers = case.spec["layers"]
    rows = watch(unet, [name for name, *_ in next(iter(layers.values()))])
    for phase in case.kwargs["phases"]:
        rows.clear()
        with agent_sd.apply(unet, mode="official", **settings(phase["patch"])):
            case.check(phase["key"], unet(x, spec["timestep"], text).sample)
        assert rows == layers[phase["key"]]


RUNNERS = {"merge": run_merge, "sdblock": run_block, "sdunet": run_unet}
