"""Official Agent Attention names become the zoo's, every one of them, and what cannot convert is refused."""

from __future__ import annotations

import argparse
import sys
import types

import pytest
import timm
import torch

import zoo  # noqa: F401
from zoo.backbones.agent import checkpoint_filter_fn
from zoo.backbones.agent_layers import LENGTH_DIM
from zoo.cli import convert as command
from zoo.cli import main
from zoo.convert.agent import convert

SMALL = dict(
    agent_deit_tiny=dict(img_size=32, depth=4, embed_dim=24, num_heads=2, agent_nums=4, agent_depth=3),
    agent_pvt_tiny=dict(img_size=64, depths=(1, 2, 1, 1), embed_dims=(8, 16, 16, 24), num_heads=(1, 2, 2, 2)),
    agent_swin_tiny=dict(img_size=64, depths=(1, 2, 1, 2), embed_dim=8, num_heads=(1, 1, 2, 2)),
    agent_cswin_tiny=dict(img_size=64, depths=(1, 2, 1, 1), embed_dims=8, num_heads=(1, 2, 2, 2), split_sizes=3),
)


def official_name(model: str, name: str) -> str:
    """The official name of a zoo entry, written independently of the converter's rules."""
    part = name.split(".")
    if model.startswith("agent_deit"):
        return name
    if part[0] == "head":
        return f"head.{part[-1]}"
    stage = int(part[1]) if part[0] == "stages" else 0
    if model.startswith("agent_pvt"):
        if part[-1] == "pos_embed":
            return f"pos_embed{stage + 1}"
        if "blocks" not in part:
            return ".".join([f"patch_embed{stage + 1}", *part[-2:]])
        return ".".join([f"block{stage + 1}", *part[3:]])
    if model.startswith("agent_swin"):
        if part[0] != "stages":
            return name
        return ".".join(["layers", str(stage - (part[2] == "downsample")), *part[2:]])
    if part[0] == "patch_embed":
        return f"stage1_conv_embed.{dict(proj=0, norm=2)[part[1]]}.{part[2]}"
    if part[0] != "stages":
        return name
    if part[2] == "downsample":
        return f"merge{stage}.{part[3].replace('proj', 'conv')}.{part[4]}"
    return ".".join([f"stage{stage + 1}", part[3], *(p for p in part[4:] if p != "attn")])


def official(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {official_name(name, key): value for key, value in model.state_dict().items()}
    for key in [key for key in state if key.rpartition(".")[2] in LENGTH_DIM]:
        state[key] = state[key][None]
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.long)
        state[key.replace("attn.relative_position_bias_table", "attn_mask")] = torch.zeros(4, 49, 49)
    return state


@pytest.mark.parametrize(
    ("name", "entries"),
    [("agent_deit_base", 192), ("agent_pvt_small", 374), ("agent_swin_base", 397), ("agent_cswin_tiny", 442)],
)
def test_round_trip(name: str, entries: int) -> None:
    model = timm.create_model(name, device="meta")
    checkpoint = official(name, model)
    if name == "agent_swin_base":
        # Every second softmax block, but for the last stage with its single window, is shifted.
        for key in [key for key in checkpoint if key.endswith("attn_mask")]:
            if int(key.split(".")[3]) % 2 == 0 or key.startswith("layers.3"):
                del checkpoint[key]
    assert len(checkpoint) == entries
    converted = checkpoint_filter_fn({"model": checkpoint, "epoch": 299}, model)
    expected = model.state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_same_after_conversion(name: str) -> None:
    torch.manual_seed(0)
    source, target = (timm.create_model(name, num_classes=3, **SMALL[name]).eval() for _ in range(2))
    target.load_state_dict(convert(official(name, source)))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(target(x), source(x))


def test_averaged_weights_are_taken() -> None:
    raw, average = ({"stage1.0.attns.0.an_bias": torch.full((1,), value)} for value in (1.0, 2.0))
    converted = convert({"state_dict": raw, "state_dict_ema": average})
    assert converted["stages.0.blocks.0.attn.attns.0.an_bias"] == 2.0


def test_native_state_dict_passes_through() -> None:
    state = timm.create_model("agent_nano", device="meta").state_dict()
    assert convert(state) is state


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="no Agent Attention checkpoint"):
        convert(timm.create_model("biformer_nano", device="meta").state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_another_size_are_resized(name: str) -> None:
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=3, **SMALL[name])
    target = timm.create_model(name, num_classes=3, **dict(SMALL[name], img_size=(96, 128)))
    before = source.state_dict()
    weights = checkpoint_filter_fn(official(name, source), target)
    target.load_state_dict(weights)
    assert any(weights[key].shape != before[key].shape for key in before)
    assert all(torch.equal(weights[key], before[key]) for key in before if weights[key].shape == before[key].shape)
    source.set_input_size((96, 128))
    for key, value in source.state_dict().items():
        torch.testing.assert_close(weights[key], value, msg=key)


def test_patch_projection_is_resized() -> None:
    kwargs = dict(SMALL["agent_deit_tiny"], num_classes=3)
    source = timm.create_model("agent_deit_tiny", **kwargs)
    target = timm.create_model("agent_deit_tiny", **dict(kwargs, patch_size=8))
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target))


class CfgNode(dict):
    """As yacs pickles it: a dictionary with attributes."""

    def __init__(self, values: dict) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = True


def test_configs_beside_the_weights_are_read_without_their_package(tmp_path, monkeypatch) -> None:
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    weights = {"cls_token": torch.ones(1)}
    path = tmp_path / "official.pth"
    torch.save({"model": weights, "config": CfgNode({"MODEL": CfgNode({"TYPE": "deit"})}), "epoch": 3}, path)
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert list(command.read_checkpoint(str(path))) == ["cls_token"]


@pytest.mark.parametrize(
    "pair", [("agent_pvt_medium", "agent_pvt_medium_256"), ("agent_cswin_base", "agent_cswin_base_384")], ids=str
)
@pytest.mark.parametrize("which", [0, 1])
def test_command_tells_input_sizes_apart(pair: tuple[str, str], which: int) -> None:
    state = official(pair[which], timm.create_model(pair[which], device="meta"))
    checkpoint = {key: torch.zeros(1).expand(value.shape) for key, value in state.items()}
    assert command._match(argparse.Namespace(model=None), checkpoint, list(pair))[0] == pair[which]


def test_command_says_what_it_resized(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "_archs", lambda family: ["agent_pvt_tiny"])
    model = timm.create_model("agent_pvt_tiny", img_size=192)
    torch.save({"model": official("agent_pvt_tiny", model)}, tmp_path / "official.pth")
    main(["convert", "agent", str(tmp_path / "official.pth"), "--out", str(tmp_path / "out")])
    assert "were resized to that of agent_pvt_tiny" in capsys.readouterr().out
