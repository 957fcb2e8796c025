"""Agent Attention's layers as users drop them into their own networks, the official variants, and all kinds of size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import gen_relative_position_index
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.backbones.agent import (
    AgentAttention,
    AgentCSWin,
    AgentDeiT,
    AgentPVT,
    AgentStripAttention,
    AgentSwin,
    SpatialReductionAgentAttention,
    StripAttention,
    WindowAttention,
)
from zoo.backbones.agent_layers import LENGTH_DIM, agent_blocks, pool_agents
from zoo.kernels.agent.reference import expand_bias
from zoo.visualize import agent_maps, draw_attention

PARAMETERS = dict(
    agent_deit_tiny=6_015_640,
    agent_deit_small=22_647_112,
    agent_deit_small_448=23_070_472,
    agent_deit_base=87_204_904,
    agent_pvt_tiny=11_570_352,
    agent_pvt_small=20_635_066,
    agent_pvt_medium=35_921_746,
    agent_pvt_medium_256=36_083_682,
    agent_pvt_large=48_738_180,
    agent_swin_tiny=28_902_964,
    agent_swin_small=49_666_684,
    agent_swin_small_288=49_707_964,
    agent_swin_base=88_095_096,
    agent_swin_base_384=88_305_016,
    agent_cswin_tiny=20_458_672,
    agent_cswin_small=32_814_100,
    agent_cswin_base=73_249_696,
    agent_cswin_base_384=73_328_416,
)
SMALL = dict(
    deit=(AgentDeiT, dict(img_size=64, depth=3, embed_dim=32, num_heads=2, agent_nums=9, agent_depth=2)),
    pvt=(AgentPVT, dict(img_size=64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2))),
    pvt_softmax=(
        AgentPVT,
        dict(
            img_size=64, depths=(1, 1, 2, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2),
            attn_type="ABMA1", agent_sr_ratios=2, sr_ratios=(4, 2, 1, 1),
        ),
    ),
    swin=(AgentSwin, dict(img_size=64, depths=(1, 1, 2, 2), embed_dim=16, num_heads=(1, 1, 2, 2), attn_type="AAMB1")),
    cswin=(
        AgentCSWin, dict(img_size=64, depths=(1, 1, 1, 1), embed_dims=16, num_heads=(1, 2, 2, 2), split_sizes=3)
    ),
)  # fmt: skip


def small(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    cls, own = SMALL[name]
    return cls(num_classes=3, **dict(own, **kwargs))


without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_family = pytest.mark.parametrize("name", SMALL)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters_is_official(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_small_model_stays_small() -> None:
    assert sum(p.numel() for p in timm.create_model("agent_nano", device="meta").parameters()) < 4e6


@pytest.mark.parametrize(
    ("name", "size", "resized"),
    [
        ("agent_deit_tiny", 224, 256),
        ("agent_deit_small_448", 448, 512),
        ("agent_pvt_medium_256", 256, 292),
        ("agent_swin_small_288", 288, 288),
        ("agent_swin_base_384", 384, 384),
        ("agent_cswin_base_384", 384, 438),
    ],
)
def test_evaluation_squashes_to_a_square(name: str, size: int, resized: int) -> None:
    cfg = get_pretrained_cfg(name)
    assert cfg.input_size == (3, size, size)
    assert cfg.crop_mode == "squash" and cfg.interpolation == "bicubic"
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()))
    sides = [t.size for t in transform.transforms if type(t).__name__ == "Resize"]
    assert [tuple(s) if not isinstance(s, int) else (s, s) for s in sides] == [(resized, resized)]


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (3, 2)])
@pytest.mark.parametrize("agents", [(3, 3), (7, 7), (2, 5)])
def test_agents_are_adaptive_means_of_queries(grid: tuple[int, int], agents: tuple[int, int]) -> None:
    q = torch.randn(2, grid[0] * grid[1], 3 * 8)[..., :8]
    expected = F.adaptive_avg_pool2d(q.unflatten(1, grid).permute(0, 3, 1, 2), agents).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_agents(q, grid, agents), expected)


def test_as_many_agents_as_queries_are_the_queries() -> None:
    q = torch.randn(2, 12, 8)
    assert pool_agents(q, (3, 4), (3, 4)) is q


def resized_bias(layer: AgentAttention, block: Tensor, row: Tensor, column: Tensor, grid, agents) -> Tensor:
    """The rule for dense tasks, step by step: sum on the training map, then space, then agents. [M, n, N]"""
    out = 0
    for bias in (block, row + column):  # [M, n, h, w]
        bias = F.interpolate(bias, size=grid, mode="bilinear")
        bias = bias.flatten(2).transpose(1, 2).unflatten(2, layer.agents)  # [M, N, p, p]
        out = out + F.interpolate(bias, size=agents, mode="bilinear").flatten(2).transpose(1, 2)
    return out


@pytest.mark.parametrize("grid", [(10, 10), (7, 13), (4, 20)])
@pytest.mark.parametrize("agents", [(3, 3), (4, 6), (2, 2)])
def test_biases_are_resized_by_the_rule_for_dense_tasks(grid, agents) -> None:
    layer = AgentAttention(16, 2, 9, (10, 10), agent_grid=agents)
    for p in layer.parameters():
        nn.init.normal_(p)
    expected = resized_bias(layer, layer.an_bias, layer.ah_bias, layer.aw_bias, grid, agents)
    torch.testing.assert_close(expand_bias(layer.key_bias(grid), grid), expected)
    row, column = layer.ha_bias.movedim(-1, 1), layer.wa_bias.movedim(-1, 1)
    expected = resized_bias(layer, layer.na_bias, row, column, grid, agents)
    torch.testing.assert_close(expand_bias(layer.query_bias(grid), grid), expected)


def test_official_biases_load_and_the_layer_may_be_channels_last() -> None:
    layer, other = AgentAttention(16, 2, 9, (10, 10)), AgentAttention(16, 2, 9, (10, 10))
    official = {name: as_official(name, value) for name, value in layer.state_dict().items()}
    assert official["ha_bias"].shape == (1, 2, 10, 1, 9)
    other.load_state_dict(official)
    other.to(memory_format=torch.channels_last)
    x = torch.randn(2, 10, 10, 16)
    torch.testing.assert_close(other(x), layer(x))


def as_official(name: str, value: Tensor) -> Tensor:
    return value[None] if name in LENGTH_DIM else value


@pytest.mark.parametrize("kind", [AgentAttention, SpatialReductionAgentAttention])
def test_a_map_is_its_tokens(kind: type) -> None:
    layer = kind(16, 2, 4, (6, 6))
    x = torch.randn(2, 5, 7, 16)
    torch.testing.assert_close(layer(x).flatten(1, 2), layer(x.flatten(1, 2), (5, 7)))


def test_the_class_token_joins_the_attention_but_not_the_agents() -> None:
    layer = AgentAttention(16, 2, 4, (6, 6), class_token=True)
    x = torch.randn(1, 37, 16)
    changed = torch.cat((torch.randn(1, 1, 16), x[:, 1:]), 1)
    q = layer.qkv(x)[..., :16]
    assert torch.equal(layer.pool(q, (6, 6)), layer.pool(layer.qkv(changed)[..., :16], (6, 6)))
    assert not torch.allclose(layer(x)[:, 1:], layer(changed)[:, 1:])


def test_agents_on_a_rectangle() -> None:
    layer = AgentAttention(16, 2, (2, 5), (4, 10))
    assert layer.an_bias.shape == (2, 10, 7, 7)
    assert layer(torch.randn(1, 4, 10, 16)).shape == (1, 4, 10, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(agent_num=10), "agent_num must be a positive square number"),
        (dict(agent_num=(0, 3)), "agent_num must be a positive square number"),
        (dict(num_heads=3), "num_heads must divide dim"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentAttention(16, **dict(dict(num_heads=2, agent_num=4, grid=(4, 4)), **arguments))


def test_tokens_that_fill_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="no grid of 4 x 4"):
        AgentAttention(16, 2, 4, (4, 4))(torch.randn(1, 20, 16))
    with pytest.raises(ValueError, match="do not divide the map"):
        strips = AgentStripAttention(16, 2, 4, (4, 4), strip=(4, 2))
        strips(*torch.randn(3, 1, 4, 5, 16))


def test_masks_are_refused() -> None:
    x, mask = torch.randn(1, 4, 4, 16), torch.zeros(16, 16)
    for kind in (AgentAttention, SpatialReductionAgentAttention):
        with pytest.raises(NotImplementedError, match="takes no mask"):
            kind(16, 2, 4, (4, 4))(x, mask=mask)
    with pytest.raises(NotImplementedError, match="takes no mask"):
        AgentStripAttention(16, 2, 4, (4, 4))(x, x, x, mask=mask)


def test_windows_of_agent_blocks_must_cover_the_map() -> None:
    with pytest.raises(NotImplementedError, match=r"cover it, got 28: shifted windows need a mask"):
        AgentSwin(window_size=28, device="meta")
    AgentSwin(window_size=28, attn_type="BAAA", device="meta")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("AAAB", [2, 2, 6, 0]), ("AAMB2", [2, 2, 2, 0]), ("BBBB", [0, 0, 0, 0]), ("MMMM1", [1, 1, 1, 1])],
)
def test_attention_types(text: str, expected: list[int]) -> None:
    assert agent_blocks(text, (2, 2, 6, 2)) == expected


@pytest.mark.parametrize("text", ["AAA", "AAMB", "AAAB2", "AAXB", ""])
def test_wrong_attention_types_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="attn_type needs a letter"):
        agent_blocks(text, (2, 2, 6, 2))


def test_relative_positions() -> None:
    layer = WindowAttention(16, 2, (14, 14), 5)
    index = gen_relative_position_index((5, 5))
    expected = layer.relative_position_bias_table[index.flatten()].unflatten(0, (25, 25)).permute(2, 0, 1)
    torch.testing.assert_close(layer._bias(), expected)


def test_shifted_windows_do_not_wrap_around() -> None:
    """A token in the corner that the roll brings next to the opposite one must not see it."""
    layer = WindowAttention(16, 2, (12, 12), 6, shifted=True)
    x = torch.randn(1, 12, 12, 16, requires_grad=True)
    layer(x)[0, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 1e-12
    assert seen[:3, :3].all()
    assert not seen[3:].any() and not seen[:, 3:].any()


@pytest.mark.parametrize("size", [(9, 10), (7, 14), (3, 2)])
def test_padding_of_strips_is_left_out(size: tuple[int, int]) -> None:
    layer = StripAttention(16, 2, (None, 7))
    q, k, v = torch.randn(3, 2, *size, 16)
    # Each strip by itself; the last one may be narrow.
    alone = StripAttention(16, 2, (None, None))
    alone.load_state_dict(layer.state_dict())
    expected = [alone(*(t[:, :, i : i + 7] for t in (q, k, v))) for i in range(0, size[1], 7)]
    torch.testing.assert_close(layer(q, k, v), torch.cat(expected, 2))


@every_family
@pytest.mark.parametrize("size", [(64, 64), (97, 130), (33, 100)])
def test_any_size_runs_and_every_parameter_learns(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_family
@pytest.mark.parametrize("size", [(225, 201), (600, 500)])
def test_large_sizes_run(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    model(torch.randn(1, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits and every gradient, as float32 on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out = model(x)
        out.float().square().sum().backward()
    return [t.detach().float().cpu() for t in (out, *(p.grad for p in model.parameters()))]


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    # What is nearly zero has no relative error.
    floor = 1e-3 * max(float(t.norm()) for t in expected)
    return [float((a - e).norm()) / max(float(e.norm()), floor) for a, e in zip(actual, expected, strict=True)]


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, without_gpu])]


@pytest.mark.gpu
@without_gpu
@every_family
@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_a_gpu_computes_the_same(name: str, size: tuple[int, int]) -> None:
    model, x = small(name), torch.randn(2, 3, *size)
    expected = gradients(copy.deepcopy(model), x)
    assert max(relative_errors(gradients(model.cuda(), x.cuda()), expected)) < 5e-3


@pytest.mark.parametrize("device", DEVICES)
@every_family
@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_autocast_and_half_precision(name: str, size: tuple[int, int], device: str) -> None:
    model, x = small(name).to(device), torch.randn(2, 3, *size, device=device)
    with torch.no_grad():
        expected = model(x).float()
        with torch.autocast(device, torch.bfloat16):
            assert relative_errors([model(x)], [expected])[0] < 0.05
    half = copy.deepcopy(model).bfloat16()
    assert relative_errors([half(x.bfloat16()).detach()], [expected])[0] < 0.1
    with torch.autocast(device, torch.bfloat16):
        model(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@every_family
def test_runtime_agents(name: str) -> None:
    more = dict(agent_grid=(4, 5)) if name == "deit" else dict(agent_grids=[(4, 5), (3, 3), (2, 3), (5, 5)])
    plain, dense = small(name), small(name, **more)
    dense.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 96, 64)
    assert dense(x).isfinite().all()
    assert not torch.allclose(dense(x), plain(x))


@every_family
def test_the_input_size_can_be_changed(name: str) -> None:
    model = small(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.set_input_size((96, 128))
    twin = small(name, img_size=(96, 128)).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 128)
    assert torch.equal(model(x), twin(x))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_a_changed_input_size_is_exported(tmp_path) -> None:
    model = timm.create_model("agent_nano", num_classes=3, depths=(1, 1, 1, 1)).eval()
    model.set_input_size(160)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny", "agent_cswin_tiny"])
def test_weight_decay_is_the_official_one(name: str) -> None:
    model = timm.create_model(name, device="meta")
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {key for key, p in model.named_parameters() if id(p) not in decayed and p.dim() > 1}
    expected = dict(
        agent_deit_tiny=("cls_token", "pos_embed"), agent_swin_tiny=("relative_position_bias_table",)
    ).get(name, ())  # fmt: skip
    assert {key.rpartition(".")[2] for key in spared} == set(expected)


def test_extra_norms_leave_the_map_that_goes_on_alone() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("agent_nano", features_only=True, feature_cls="getter").eval()
    dense = timm.create_model("agent_nano", features_only=True, extra_norms=True).eval()
    missing = dense.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(".extra_norms." in name for name in missing)
    x = torch.randn(1, 3, 64, 64)
    for raw, normed in zip(plain(x), dense(x), strict=True):
        expected = F.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(normed, expected)


def test_prefix_tokens_on_request() -> None:
    model = small("deit").eval()
    x = torch.randn(1, 3, 64, 96)
    (patches, prefix), *_ = model.forward_intermediates(
        x, indices=[2], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )  # fmt: skip
    torch.testing.assert_close(torch.cat((prefix, patches), 1), model.forward_features(x))


def test_pooling_of_the_plain_transformer() -> None:
    model, x = small("deit").eval(), torch.randn(1, 3, 64, 64)
    tokens = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(tokens[:, 0]))
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model(x), model.head(tokens[:, 1:].mean(1)))
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(3, "max")


def test_attention_maps_of_a_model() -> None:
    model = small("deit").train()
    maps = agent_maps(model, torch.randn(1, 3, 64, 96))
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"] and model.training
    first = maps["blocks.0.attn"]
    assert first.grid == (4, 6) and first.agent_grid == (3, 3)
    assert first.gather.shape == (1, 2, 9, 25) and first.spread.shape == (1, 2, 25, 9)
    torch.testing.assert_close(first.gather.sum(-1), torch.ones(1, 2, 9))
    with pytest.raises(ValueError, match="no layer of agent attention"):
        agent_maps(nn.Identity(), torch.randn(1))


def test_attention_is_drawn_where_it_is() -> None:
    weights = torch.zeros(4, 4)
    weights[0, 0] = 0.5
    picture = draw_attention(np.full((32, 32, 3), 200, np.uint8), weights)
    assert (picture[:4, :4] == 200).all() and (picture[16:, 16:] == 50).all()
