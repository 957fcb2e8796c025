"""Official FaViT names become the zoo's, every one of them, and what cannot convert is refused."""

from __future__ import annotations

import pytest
import timm
import torch

import zoo  # noqa: F401
from zoo.convert.favit import convert


def official_name(name: str) -> str:
    """The official name of a zoo entry, written independently of the converter's rules."""
    part = name.split(".")
    if part[0] == "head":
        return "head." + part[-1]
    number = int(part[1]) + 1
    if part[2] == "patch_embed":
        return f"patch_embed{number}." + ".".join(part[3:])
    if part[2] == "norm":
        return f"norm{number}.{part[3]}"
    tail = ".".join(part[4:]).replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
    return f"block{number}.{part[3]}.{tail}"


def official(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {official_name(name): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["favit_b0", "favit_b2"])
def test_round_trip(name: str) -> None:
    model = timm.create_model(name, device="meta")
    checkpoint = official(model)
    converted = convert({"model": checkpoint, "optimizer": {}, "epoch": 299})
    expected = model.state_dict()
    assert set(converted) == set(expected)
    assert all(converted[key].shape == expected[key].shape for key in expected)


def test_official_names() -> None:
    names = set(official(timm.create_model("favit_b1", device="meta")))
    assert {
        "patch_embed1.proj.weight", "patch_embed4.norm.bias", "norm1.weight", "norm4.bias", "head.weight", "head.bias",
        "block1.0.norm1.weight", "block3.5.attn.kv_l.depth_conv.weight", "block1.1.attn.single_heads.1.bias",
        "block4.1.attn.local_convs.0.weight", "block2.0.mlp.fc1.weight", "block2.0.mlp.dwconv.dwconv.weight",
    } <= names  # fmt: skip


def test_backbone_without_head_converts() -> None:
    checkpoint = official(timm.create_model("favit_b0", device="meta"))
    converted = convert({name: value for name, value in checkpoint.items() if not name.startswith("head.")})
    assert len(converted) == len(checkpoint) - 2


def test_native_state_dict_passes_through() -> None:
    state = timm.create_model("favit_nano", device="meta").state_dict()
    assert convert(state) is state


@pytest.mark.parametrize("name", ["conv1.weight", "block1.0.attn.kv.weight", "stages.0.blocks.0.attn.qkv.weight"])
def test_other_checkpoints_are_refused(name: str) -> None:
    """Also those of its relative, the pyramid transformer, whose names are much the same."""
    with pytest.raises(ValueError, match="no FaViT checkpoint"):
        convert({name: torch.zeros(1)})


def test_features_are_the_same_after_conversion() -> None:
    torch.manual_seed(0)
    kwargs = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(1, 2, 2, 4), num_classes=3)
    source, target = (timm.create_model("favit_b0", **kwargs).eval() for _ in range(2))
    target.load_state_dict(convert(official(source)))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(target(x), source(x))
