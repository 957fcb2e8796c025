"""FaViT's layer as users drop it into their own networks, and the sizes the models take."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.backbones.favit import FactorizedSelfAttention, FaViT, PatchConv2d
from zoo.kernels import cross_window_pool

SMALL = dict(
    embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=(2, 2, 2, 2), num_classes=3
)


@pytest.mark.parametrize(
    ("name", "params"),
    [("favit_b0", 3.428), ("favit_b1", 12.959), ("favit_b2", 24.920), ("favit_b3", 48.746)],
)
def test_parameters_are_the_published_ones(name: str, params: float) -> None:
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params


@pytest.mark.parametrize(("name", "gmacs"), [("favit_b0", 0.632), ("favit_b1", 2.344)])
def test_cost_is_the_published_one(name: str, gmacs: float) -> None:
    """Attention included, which a counter of modules misses."""
    assert zoo.model_info(name).gmacs == gmacs


def test_nano_is_small() -> None:
    model = timm.create_model("favit_nano", device="meta")
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]


def test_layer_has_the_official_keys() -> None:
    layer = FactorizedSelfAttention(64, 2, qkv_bias=True, sr_ratio=4, device="meta")
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    expected = {
        "q.weight": (64, 64), "q.bias": (64,), "kv_g.weight": (16, 8), "kv_g.bias": (16,),
        "kv_l.depth_conv.weight": (56, 1, 3, 3), "kv_l.depth_conv.bias": (56,),
        "kv_l.point_conv.weight": (56, 56, 1, 1), "kv_l.point_conv.bias": (56,),
        "sr.weight": (8, 8, 4, 4), "sr.bias": (8,), "norm.weight": (8,), "norm.bias": (8,),
        "local_conv_g.weight": (8, 1, 3, 3), "local_conv_g.bias": (8,),
        "proj.weight": (64, 64), "proj.bias": (64,),
    }  # fmt: skip
    for i in range(2):
        expected.update({
            f"fcs.{i}.weight": (14, 14), f"fcs.{i}.bias": (14,),
            f"single_heads.{i}.weight": (28, 14), f"single_heads.{i}.bias": (28,),
            f"local_convs.{i}.weight": (28, 1, 3, 3), f"local_convs.{i}.bias": (28,),
        })  # fmt: skip
    assert shapes == expected
    without_bias = FactorizedSelfAttention(64, 8, sr_ratio=1, device="meta").state_dict()
    biased = {name.rsplit(".", 1)[0] for name in without_bias if name.endswith("bias")}
    assert biased == {"kv_l.depth_conv", "kv_l.point_conv", "sr", "norm", "local_conv_g", "local_convs.0", "proj"}


def test_patch_convolution_is_a_convolution() -> None:
    layer = PatchConv2d(6, 4)
    x = torch.randn(2, 9, 15, 6)
    expected = nn.functional.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, stride=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("fusion", ["official", "window_mean"])
@pytest.mark.parametrize(("size", "ratio"), [((3, 2), 8), ((1, 1), 4), ((5, 26), 8), ((7, 7), 1), ((24, 25), 8)])
def test_maps_below_the_official_limit_run(size: tuple[int, int], ratio: int, fusion: str) -> None:
    layer = FactorizedSelfAttention(32, 2, sr_ratio=ratio, fusion=fusion)
    x = torch.randn(2, *size, 32, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_autocast_is_close_to_float32() -> None:
    torch.manual_seed(0)
    layer = FactorizedSelfAttention(64, 2, qkv_bias=True, sr_ratio=2)
    x = torch.randn(2, 9, 11, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = layer(x)
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()


def test_small_map_is_extended_by_reflection() -> None:
    """Keys of a map below the limits are those of the map that reflection continues to a legal size."""
    layer = FactorizedSelfAttention(32, 1, sr_ratio=4)
    x = torch.randn(1, 9, 3, 32)
    wide = nn.functional.pad(x.permute(0, 3, 1, 2), (0, 2, 0, 0), mode="reflect").permute(0, 2, 3, 1)  # 9 x 5
    torch.testing.assert_close(layer.global_kv(x[..., :4]), layer.global_kv(wide[:, :, :4, :4]))
    short, long = (cross_window_pool(y, 1, window=4, dilations=(1, 2)) for y in (x, wide))
    # One window of 4 positions, and a dilated one that reaches over 7.
    torch.testing.assert_close(short[0], cross_window_pool(wide[:, :, :4], 1, window=4, dilations=(1, 2))[0])
    torch.testing.assert_close(short[1], long[1])


def test_window_mean_does_not_depend_on_the_number_of_windows() -> None:
    x = torch.randn(1, 14, 14, 28)
    tiled = x.repeat(1, 1, 3, 1)
    pooled = [cross_window_pool(y, 2, fusion="window_mean") for y in (x, tiled)]
    torch.testing.assert_close(*pooled)
    official = [cross_window_pool(y, 2) for y in (x, tiled)]
    assert (official[0] - official[1]).abs().max() > 0.1


@pytest.mark.parametrize("size", [(32, 32), (97, 130), (64, 40)])
def test_any_size_runs_and_every_parameter_learns(size: tuple[int, int]) -> None:
    model = FaViT(**SMALL)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("size", [(225, 201), (600, 500)])
def test_large_odd_sizes_run(size: tuple[int, int]) -> None:
    model = FaViT(**SMALL)
    model(torch.randn(1, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=40, sr_ratio=2), "dim must be a multiple of 16 with sr_ratio=2"),
        (dict(dim=44), "dim must be a multiple of 8 with sr_ratio=1"),
        (dict(dim=32, num_heads=3, sr_ratio=2), "num_heads must divide 7/16 of it"),
        (dict(dim=32, sr_ratio=0), "sr_ratio and window_size must be positive"),
        (dict(dim=32, fusion="max"), "fusion must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorizedSelfAttention(**dict(dict(num_heads=2), **arguments))


def test_wrong_model_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="embed_dims needs one value for each of 4 stages"):
        FaViT(embed_dims=(32, 64))
    with pytest.raises(ValueError, match="output_fmt must be"):
        FaViT(**SMALL).forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model("favit_b0")
    block = model.stages[2].blocks[0]
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # sqrt(2 / (kernel area * outputs / groups))
    assert model.stages[1].patch_embed.proj.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
