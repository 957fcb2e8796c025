"""Halo attention as a layer, the models of the paper, and tables for another block or halo."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.layers.halo_attn import HaloAttn
from torch import nn

import zoo  # noqa: F401
from zoo.backbones import halo
from zoo.backbones.halo import HaloAttention, HaloNet, resize_relative_table

SMALL = dict(
    layout=("c", "h", "hh", "h"), dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 2), block_size=4, halo_size=1,
    stem_dims=(8, 16), num_classes=3,
)  # fmt: skip
# Millions of parameters with relative tables of half the head's channels: counted from the paper's description, which
# rounds to what the paper prints for all but H3 (12.3 M with a last convolution of 1280 channels, printed as 1024).
PARAMS = dict(h0=5.488, h1=8.085, h2=9.388, h3=11.822, h4=19.083, h5=30.683, h6=43.426, h7=67.400)
PRINTED = dict(h0=5.5, h1=8.1, h2=9.4, h4=19.1, h5=30.7, h6=43.4, h7=67)


@functools.cache
def count(name: str, **kwargs) -> int:
    return sum(p.numel() for p in timm.create_model(name, device="meta", **kwargs).parameters())


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_of_the_paper(name: str) -> None:
    assert round(count(f"halo_{name}") / 1e6, 3) == PARAMS[name]
    if name in PRINTED:
        assert count(f"halo_{name}") / 1e6 == pytest.approx(PRINTED[name], abs=0.5 if name == "h7" else 0.05)


def test_h3_with_the_printed_parameters() -> None:
    assert round(count("halo_h3", final_dim=1280) / 1e6, 1) == 12.3


def test_layers_of_the_paper() -> None:
    """Layers as the paper counts them: the stem, three per block and the classifier."""
    layers = dict(h0=50, h1=59, h2=62, h3=65, h4=65, h5=98, h6=101, h7=107)
    for name, expected in layers.items():
        assert 3 * sum(len(stage) for stage in halo.VARIANTS[f"halo_{name}"]["layout"]) + 2 == expected


def test_nano_is_small_enough_to_embed() -> None:
    assert count("halo_nano") <= 4e6


def with_window(**kwargs) -> tuple[HaloAttn, HaloAttention]:
    """timm's layer and ours with equal weights."""
    torch.manual_seed(0)
    arguments = dict(dim=16, num_heads=2, block_size=4, halo_size=1, qkv_bias=True, **kwargs)
    theirs, ours = HaloAttn(**arguments), HaloAttention(**arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("kwargs", [dict(), dict(stride=2), dict(stride=2, avg_down=True)])
@pytest.mark.parametrize("size", [(6, 9), (3, 13), (1, 1)])
def test_padding_is_the_padded_layer_cut(kwargs: dict, size: tuple[int, int]) -> None:
    """Keys, values and queries outside the map are zero, whatever the bias: what timm computes on a padded map."""
    theirs, ours = with_window(**kwargs)
    x = torch.randn(2, 16, *size)
    rows, cols = -size[0] % 4, -size[1] % 4
    stride = ours.block_stride

    def padded(output: torch.Tensor, by: tuple[int, int]) -> torch.Tensor:
        return nn.functional.pad(output, (0, by[1], 0, by[0]))

    projected = {}
    for name in ("q", "kv"):
        projected[name] = getattr(ours, name)(x)
    height, width = (-(-(side + extra) // stride) for side, extra in zip(size, (rows, cols), strict=True))
    q = padded(projected["q"], (height - projected["q"].shape[2], width - projected["q"].shape[3]))
    kv = padded(projected["kv"], (rows, cols))
    theirs.q.forward, theirs.kv.forward = (lambda _: q), (lambda _: kv)
    expected = theirs(nn.functional.pad(x, (0, cols, 0, rows)))
    out = ours(x)
    cut = [-(-side // kwargs.get("stride", 1)) for side in size]
    assert list(out.shape[2:]) == cut
    torch.testing.assert_close(out, expected[:, :, : cut[0], : cut[1]], rtol=1e-5, atol=1e-6)


def test_pooling_of_an_odd_number_of_odd_blocks_is_timms() -> None:
    arguments = dict(dim=16, num_heads=2, block_size=3, halo_size=1, stride=2)
    theirs, ours = HaloAttn(**arguments), HaloAttention(**arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 16, 9, 6)
    assert ours(x).shape == (1, 16, 4, 3)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kwargs", [dict(), dict(stride=2), dict(stride=2, avg_down=True)])
def test_masked_border_sees_only_the_map(kwargs: dict) -> None:
    """A map inside one window, with the border masked, is full attention over the map."""
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=2, block_size=8, halo_size=2, mask_border=True, **kwargs)
    nn.init.zeros_(layer.pos_embed.height_rel)
    nn.init.zeros_(layer.pos_embed.width_rel)
    x = torch.randn(2, 16, 5, 7)
    q, kv = layer.q(x), layer.kv(x)
    # [B, M * D, H, W] -> [B, M, N, D]
    queries = q.unflatten(1, (2, -1)).flatten(3).transpose(2, 3)
    keys, values = kv.unflatten(1, (2, -1)).flatten(3).transpose(2, 3).chunk(2, -1)
    full = nn.functional.scaled_dot_product_attention(queries, keys, values)
    expected = full.transpose(2, 3).reshape(2, 16, *q.shape[2:])
    if kwargs.get("avg_down"):
        expected = nn.functional.avg_pool2d(expected, 2, ceil_mode=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_half_tables_give_each_axis_its_channels() -> None:
    """Rows use the first half of a head's channels and columns the second."""
    torch.manual_seed(0)
    half = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, half_rel=True)
    full = HaloAttention(16, num_heads=2, block_size=4, halo_size=1)
    assert half.pos_embed.height_rel.shape == (11, 4)
    state = half.state_dict()
    zeros = torch.zeros(11, 4)
    state["pos_embed.height_rel"] = torch.cat((state["pos_embed.height_rel"], zeros), 1)
    state["pos_embed.width_rel"] = torch.cat((zeros, state["pos_embed.width_rel"]), 1)
    full.load_state_dict(state)
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(half(x), full(x))
    half(x).square().sum().backward()
    # Rows of the tables for distances out of reach have no gradient, the others have.
    assert half.pos_embed.height_rel.grad[2:].abs().amin(1).gt(0).all()
    assert half.pos_embed.height_rel.grad[:2].eq(0).all()


def test_switching_fused_attention_off_changes_nothing(monkeypatch) -> None:
    layer, x, seen = HaloAttention(16, num_heads=2), torch.randn(1, 16, 8, 8), []
    original = halo.halo_attention
    monkeypatch.setattr(halo, "halo_attention", lambda *a, **k: seen.append(k["backend"]) or original(*a, **k))
    expected = layer(x)
    set_fused_attn(False)
    try:
        torch.testing.assert_close(layer(x), expected)
    finally:
        set_fused_attn(True)
    assert seen == ["auto", "reference"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=3), "num_heads must divide dim_out, got dim_out=16, num_heads=3"),
        (dict(dim_out=20), "num_heads must divide dim_out, got dim_out=20, num_heads=8"),
        (dict(stride=3), "stride must be 1 or 2, got 3"),
        (dict(block_size=0), "block_size must be positive and halo_size not negative, got 0 and 3"),
        (dict(halo_size=-1), "got 8 and -1"),
        (dict(dim_head=3, half_rel=True), "half_rel needs an even number of channels per head, got 3"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloAttention(16, **kwargs)


def test_refused_sizes_are_named() -> None:
    layer = HaloAttention(16, num_heads=2, padding=False)
    assert layer(torch.randn(1, 16, 8, 16)).shape == (1, 16, 8, 16)
    with pytest.raises(ValueError, match=r"13 x 5 .* blocks of 8 x 8; .* 8 or 16 by 8\. padding=True takes any size"):
        layer(torch.randn(1, 16, 13, 5))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(layout=("c", "x", "hh", "h")), 'layout needs a string of "c"'),
        (dict(layout=("c", "", "hh", "h")), 'layout needs a string of "c"'),
        (dict(dims=(16, 16)), "dims needs one value for each of 4 stages"),
        (dict(num_heads=(1,)), "num_heads needs one value for each of 4 stages"),
    ],
)
def test_wrong_model_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloNet(**dict(SMALL, **kwargs))


@pytest.mark.parametrize(
    "kwargs", [dict(), dict(mask_border=True), dict(value_ratio=2.5, out_ratio=1.75, final_dim=24)]
)
@pytest.mark.parametrize("size", [(225, 201), (97, 130), (33, 32)])
def test_any_size_runs_and_every_parameter_learns(kwargs: dict, size: tuple[int, int]) -> None:
    model = HaloNet(**SMALL, **kwargs)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["halo_nano", "halo_h0"])
@pytest.mark.parametrize("size", [(225, 201), (97, 130)])
def test_models_take_odd_sizes(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(name, num_classes=3)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_hybrids_of_the_paper() -> None:
    model = timm.create_model("halo_h0", layout=("ccc", "ccc", "hhhhhhh", "hhh"), device="meta")
    kinds = [type(block) for stage in model.stages for block in stage]
    assert kinds == [halo.ConvBlock] * 6 + [halo.HaloBlock] * 10


def test_relative_tables_do_not_decay() -> None:
    names = HaloNet(**SMALL).no_weight_decay()
    assert len(names) == 8
    assert all("pos_embed" in name for name in names)


def test_resized_table_is_linear_in_the_distance() -> None:
    """A table that is linear in the distance stays so, and a pixel's own row stays its own."""
    block, halo_size, window = 4, 2, 8
    # Row r stands for a distance of r - (w - 1) - h pixels.
    distance = torch.arange(2 * window - 1.0)[:, None] - (window - 1) - halo_size
    table = resize_relative_table(distance, (4, 2), (9, 3))
    new_window = 15
    assert table.shape == (2 * new_window - 1, 1)
    reached = table[new_window - 9 :, 0]
    assert reached[len(reached) // 2] == 0
    reach = block + halo_size - 1
    torch.testing.assert_close(reached, torch.linspace(-reach, reach, 2 * (9 + 3) - 1))
    assert table[: new_window - 9].eq(0).all()
    same = resize_relative_table(distance, (4, 2), (4, 2))
    torch.testing.assert_close(same[4:], distance[4:])


def test_resized_table_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"a table of block 4 and halo 1 has 11 rows, got shape \(15, 2\)"):
        resize_relative_table(torch.zeros(15, 2), (4, 1), (8, 1))


@pytest.mark.parametrize(("block", "halo_size"), [(6, 2), (4, 3), (8, 1)])
def test_checkpoints_fit_another_block_or_halo(block: int, halo_size: int, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    source = timm.create_model("halo_nano")
    torch.save({"state_dict": source.state_dict()}, path)
    overlay = dict(file=str(path))
    model = timm.create_model(
        "halo_nano", pretrained=True, pretrained_cfg_overlay=overlay, block_size=block, halo_size=halo_size
    )
    name = "stages.1.1.self_attn.pos_embed.height_rel"
    old, new = source.state_dict()[name], model.state_dict()[name]
    torch.testing.assert_close(new, resize_relative_table(old, (4, 2), (block, halo_size)))
    # The row of a pixel for itself.
    window = block + 2 * halo_size
    torch.testing.assert_close(new[window - 1 + halo_size], old[8 - 1 + 2])
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_checkpoints_of_an_unknown_window_keep_the_halo() -> None:
    model = HaloNet(**SMALL)
    state = HaloNet(**dict(SMALL, block_size=6)).state_dict()
    name = "stages.1.0.self_attn.pos_embed.width_rel"
    out = halo.checkpoint_filter_fn({"model": state}, model)
    torch.testing.assert_close(out[name], resize_relative_table(state[name], (6, 1), (4, 1), stride=2))
    with pytest.raises(ValueError, match="a window of 2 pixels, from a table of 3 rows, has no room for a halo of 1"):
        halo.checkpoint_filter_fn({name: torch.zeros(3, 4)}, model)
    model.load_state_dict(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["halo_nano", *(f"halo_{name}" for name in PARAMS)])
def test_models_on_a_gpu_match_the_reference(name: str) -> None:
    """An odd size, with gradients: the kernels against the plain formulation in float64 on the same device."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, layout=("h", "hh", "h", "h"), device="cuda").train()
    for block in model.modules():
        if isinstance(block, halo.Bottleneck):
            # A new network has its branches switched off.
            nn.init.ones_(block.conv3_1x1.bn.weight)
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 161, 97, device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out, expected = model(x), exact(x.double())
        for value in (out, expected):
            (value * torch.linspace(-1, 1, value.numel(), device="cuda").view_as(value)).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    for (key, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (p.grad.double() - q.grad).abs().max() / q.grad.abs().max().clamp_min(1e-6)
        assert error < 1e-2, f"{key} is off by {error:.1e} of the largest value"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["halo_nano", "halo_h0"])
def test_models_train_compiled_under_autocast(name: str) -> None:
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 128, 128, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(model, fullgraph=True)(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
