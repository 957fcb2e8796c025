"""BiFormer's layers as users drop them into their own networks, and the sizes the models take."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import zoo  # noqa: F401
from zoo.backbones.biformer import AttentionLePE, BiFormer, BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW, Block
from zoo.visualize import routing_maps

SMALL = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 64, 64), topks=(1, 2, 4, -2), n_win=4, num_classes=3)


def test_routing_on_request() -> None:
    layer = BiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=3)
    x = torch.randn(2, 9, 10, 32)
    out, routing = layer(x, return_routing=True)
    assert routing.grid == (4, 4) and routing.index.shape == routing.weight.shape == (2, 16, 3)
    torch.testing.assert_close(out, layer(x))


def test_number_of_windows_per_call() -> None:
    layer = BiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=3)
    assert layer(torch.randn(1, 12, 12, 32), n_win=(3, 6), return_routing=True)[1].grid == (3, 6)


def test_both_semantics_agree_where_windows_divide_the_map() -> None:
    legacy = BiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=3)
    nchw = BiLevelRoutingAttentionNCHW(32, num_heads=2, n_win=4, topk=3)
    names = {"qkv": "qkv_linear", "wo": "output_linear", "lepe": "lepe"}
    for ours, theirs in names.items():
        source, target = legacy.get_submodule(ours), nchw.get_submodule(theirs)
        target.weight.data = source.weight.data.reshape(target.weight.shape)
        target.bias.data = source.bias.data
    x = torch.randn(2, 8, 12, 32)
    torch.testing.assert_close(nchw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), legacy(x), rtol=1e-4, atol=1e-5)
    odd = torch.randn(2, 9, 13, 32)
    assert not torch.allclose(nchw(odd.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), legacy(odd), atol=1e-2)


@pytest.mark.parametrize("size", [(9, 10), (3, 2), (5, 4)])
def test_masked_padding_sees_only_the_map(size: tuple[int, int]) -> None:
    """With every region selected and padding masked, routing equals full attention over the map."""
    layer = BiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=16, mask_padding=True, side_dwconv=0)
    x = torch.randn(2, *size, 32)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 16)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    full = nn.functional.scaled_dot_product_attention(q, k, v, scale=32**-0.5)
    expected = layer.wo(full.transpose(1, 2).reshape(2, *size, 32))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_trainable_routing_gets_gradients() -> None:
    options = dict(param_routing=True, diff_routing=True, soft_routing=True)
    layer = BiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=3, **options)
    layer(torch.randn(1, 8, 8, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.router.parameters())


@pytest.mark.parametrize("mode", ["avgpool", "maxpool", "ada_avgpool", "ada_maxpool"])
def test_pooled_keys_and_values(mode: str) -> None:
    layer = BiLevelRoutingAttention(
        32, num_heads=2, n_win=2, topk=2, kv_downsample_mode=mode, kv_downsample_ratio=2, kv_per_win=2
    )
    assert layer(torch.randn(1, 8, 8, 32)).shape == (1, 8, 8, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(topk=17, n_win=4), ValueError, "topk must lie between 1 and the 16 regions"),
        (dict(num_heads=5), ValueError, "num_heads must divide dim"),
        (dict(n_win=0), ValueError, "n_win must be positive"),
        (dict(kv_downsample_mode="mean"), ValueError, "kv_downsample_mode must be one of"),
        (dict(param_attention="kv"), ValueError, "param_attention must be"),
        (dict(diff_routing=True), NotImplementedError, "diff_routing needs soft_routing"),
        (dict(param_routing=True), NotImplementedError, "param_routing needs diff_routing"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BiLevelRoutingAttention(32, **arguments)


def test_wrong_model_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="embed_dims needs one value or one for each of 4 stages"):
        BiFormer(embed_dims=(32, 64))
    with pytest.raises(ValueError, match="topk must be positive, 0"):
        Block(32, 1, topk=-3)
    with pytest.raises(NotImplementedError, match="nchw attention"):
        BiFormer(nchw=True, soft_routing=True)
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        AttentionLePE(30)


def test_one_window_setting_per_stage() -> None:
    model = BiFormer(**dict(SMALL, n_win=(8, 4, 4, 4)))
    assert [stage.blocks[0].attn.n_win for stage in model.stages[:3]] == [8, 4, 4]


@pytest.mark.parametrize(
    "flags", [dict(), dict(nchw=True), dict(stl=True, before_attn_dwconv=0), dict(mask_padding=True)]
)
@pytest.mark.parametrize("size", [(32, 32), (97, 131), (64, 40)])
def test_any_size_runs_and_every_parameter_learns(flags: dict, size: tuple[int, int]) -> None:
    model = BiFormer(**SMALL, **flags)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("topk", [0, -1, -2])
def test_other_mixers(topk: int) -> None:
    model = BiFormer(**dict(SMALL, topks=(1, topk, 4, -2)))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", ["biformer_nano", "biformer_stl_nchw"])
def test_routing_maps_of_a_model(name: str) -> None:
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    maps = routing_maps(model, torch.randn(1, 3, 64, 64))
    assert list(maps) == [f"stages.{i}.blocks.0.attn" for i in range(3)]


def test_extra_norms_leave_the_map_that_goes_on_alone() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("biformer_nano", features_only=True, feature_cls="getter").eval()
    dense = timm.create_model("biformer_nano", features_only=True, extra_norms=True).eval()
    missing = dense.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(".extra_norms." in name for name in missing)
    x = torch.randn(1, 3, 64, 64)
    for raw, normed in zip(plain(x), dense(x), strict=True):
        expected = nn.functional.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(normed, expected)
