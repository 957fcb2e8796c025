"""Official BiFormer names become the zoo's, every one of them, and what cannot convert is refused."""

from __future__ import annotations

import pytest
import timm
import torch

import zoo  # noqa: F401
from zoo.convert.biformer import convert


def official_name(name: str, stl: bool) -> str:
    """The official name of a zoo entry, written independently of the converter's rules."""
    part = name.split(".")
    if part[0] == "stem":
        return "downsample_layers.0." + ".".join(part[1:])
    if part[0] == "head":
        return "head." + part[-1]
    if part[0] != "stages":
        return name
    if part[2] == "downsample":
        return f"downsample_layers.{part[1]}." + ".".join(part[3:])
    tail = ".".join(part[4:])
    tail = tail.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2" if stl else "mlp.3")
    if part[1] != "3":
        tail = tail.replace("attn.qkv.", "attn.qkv.qkv.")
    return f"stages.{part[1]}.{'blocks.' if stl else ''}{part[3]}.{tail}"


def official(model: torch.nn.Module, stl: bool = False) -> dict[str, torch.Tensor]:
    return {official_name(name, stl): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "stl", "entries"),
    [("biformer_tiny", False, 264), ("biformer_small", False, 518), ("biformer_stl", True, 201)],
)
def test_round_trip(name: str, stl: bool, entries: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    checkpoint = official(model, stl)
    assert len(checkpoint) == entries
    converted = convert({"model": checkpoint, "model_ema": {}, "epoch": 299})
    expected = model.state_dict()
    assert set(converted) == set(expected)
    assert all(converted[key].shape == expected[key].shape for key in expected)


def test_one_by_one_convolutions_of_nchw_become_linear_layers() -> None:
    with torch.device("meta"):
        model = timm.create_model("biformer_stl_nchw")
    checkpoint = {}
    for name, value in model.state_dict().items():
        square = name.endswith(("fc1.weight", "fc2.weight", "attn.qkv.weight", "attn.proj.weight"))
        checkpoint[official_name(name, True).replace("qkv.qkv", "qkv")] = value[..., None, None] if square else value
    converted = convert(checkpoint, nchw=True)
    expected = model.state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


def test_native_state_dict_passes_through() -> None:
    with torch.device("meta"):
        state = timm.create_model("biformer_nano").state_dict()
    assert convert(state) is state


def test_legacy_and_nchw_do_not_convert_into_each_other() -> None:
    with torch.device("meta"):
        legacy, nchw = timm.create_model("biformer_stl"), timm.create_model("biformer_stl_nchw")
    with pytest.raises(ValueError, match=r"legacy attention and the model the nchw one.*stage 4.*Use biformer_stl "):
        convert(official(legacy, stl=True), nchw=True)
    with pytest.raises(ValueError, match=r"nchw attention and the model the legacy one.*Use biformer_stl_nchw"):
        convert(nchw.state_dict(), nchw=False)


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="no BiFormer checkpoint"):
        convert({"conv1.weight": torch.zeros(1)})


def test_features_are_the_same_after_conversion() -> None:
    torch.manual_seed(0)
    kwargs = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 64, 64), n_win=4, topks=(1, 2, 4, -2), num_classes=3)
    source, target = (timm.create_model("biformer_tiny", **kwargs).eval() for _ in range(2))
    target.load_state_dict(convert(official(source)))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(target(x), source(x))
