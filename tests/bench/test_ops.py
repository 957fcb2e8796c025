"""Ops of the shipped suites, their peers and floors."""

from __future__ import annotations

import pytest
import torch

from zoo.bench import gate, suites
from zoo.bench.ops import OPS
from zoo.bench.ops.bilevel_routing import plain_attention, routed_block_mask, sdpa_attention
from zoo.bench.ops.tile_sparse_flex import flex, flex_kernel, gather_tokens
from zoo.kernels.tile_sparse import density
from zoo.kernels.tile_sparse.patterns import tile_map

from .tools import CPU, quick, rows_of

STAGE1 = {"batch": 64, "height": 56, "width": 56, "channels": 64, "heads": 2, "regions": 7, "topk": 1}
SMALL = {"batch": 2, "height": 12, "width": 8, "channels": 16, "heads": 2, "regions": 4, "topk": 3}
TILES = {
    "batch": 2, "frames": 3, "height": 5, "width": 6, "heads": 6, "dim": 16, "tile": [32, 16],
    "patterns": ["diagonal 0.5", "multi_diagonal 0.4", "stripe 0", "skip", "full", "multi_diagonal 0"],
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in suites.list_suites() if suites.load(name).kind == "ops"])
def test_op_suites_run(name, tmp_path):
    assert quick(name, "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / f"{name}.csv")
    for op in {row["name"] for row in rows}:
        assert {"zoo", OPS[op].baseline} <= {row["provider"] for row in rows if row["name"] == op}
    # Ops without gradients have one mode.
    assert {row["mode"] for row in rows} == set(suites.load(name, True, True).settings["modes"])


def test_floor_of_bilevel_attention():
    op, tokens = OPS["bilevel_attention"], 64 * 56 * 56
    assert op.bytes(STAGE1, torch.bfloat16, False) == 4 * tokens * 64 * 2 + 4 * 64 * 49
    assert op.flops(STAGE1, False) == 4 * tokens * 64 * 64


@pytest.mark.parametrize("name", ["bilevel_attention", "bilevel_routing"])
def test_inputs_are_views_of_a_packed_projection(name):
    inputs = OPS[name].make_inputs(SMALL, torch.bfloat16, CPU)
    for key in "qkv":
        assert inputs[key].stride(2) == 3 * 16
        assert inputs[key].is_leaf
        assert inputs[key].requires_grad
    assert inputs["region"] == (3, 2)


def test_peers_compute_the_same_function():
    inputs = OPS["bilevel_routing"].make_inputs(SMALL, torch.float64, CPU)
    torch.testing.assert_close(plain_attention(inputs), sdpa_attention(inputs))


def test_block_mask_is_the_region_graph():
    op = OPS["bilevel_attention"]
    shape = {"batch": 2, "height": 24, "width": 24, "channels": 16, "heads": 2, "regions": 3, "topk": 2}
    inputs = op.make_inputs(shape, torch.float32, CPU)
    tokens, length = 64, 576
    mask = routed_block_mask(inputs["index"], tokens)
    position = torch.arange(length)
    dense = torch.stack([mask.mask_mod(b, 0, position[:, None], position[None]) for b in range(2)])
    expected = torch.zeros(2, 9, 9, dtype=torch.bool).scatter_(2, inputs["index"].long(), True)
    expected = expected.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    assert torch.equal(dense, expected)
    # A block is listed exactly where it holds a permitted pair.
    padded = torch.zeros(2, 640, 640, dtype=torch.bool)
    padded[:, :length, :length] = expected
    blocks = padded.reshape(2, 5, 128, 5, 128).any(4).any(2)
    assert torch.equal(mask.to_dense()[:, 0].bool(), blocks)


@pytest.mark.parametrize("text", [{}, {"text": 20}, {"text": 16, "text_position": "first"}])
def test_flex_attends_to_the_same_tiles(text):
    op = OPS["tile_sparse_attention"]
    inputs = op.make_inputs({**TILES, **text}, torch.float64, CPU)
    with torch.no_grad():
        torch.testing.assert_close(flex(inputs), op.reference(inputs))
    layout = inputs["settings"]["layout"]
    # Blocks are the tiles, whole ones but where keys fill up a tile.
    tiles = torch.stack([tile_map(pattern, layout) for pattern in inputs["head_patterns"]]).int()
    mask = inputs["flex"].mask
    assert torch.equal(mask.to_dense()[0], tiles)
    assert layout.tile == mask.BLOCK_SIZE
    filled = {layout.key_tiles[0] - 1} | ({sum(layout.key_tiles) - 1} if text.get("text") == 20 else set())
    partial = mask.kv_indices[0, 4, 0, : mask.kv_num_blocks[0, 4, 0]]
    assert set(partial.tolist()) == filled


def test_flex_without_gathers_is_forward_only():
    inputs = OPS["tile_sparse_attention"].make_inputs(TILES, torch.float32, CPU)
    with pytest.raises(NotImplementedError, match="forward only"):
        flex_kernel(inputs)
    with torch.no_grad():
        tiles = flex_kernel(inputs)
        torch.testing.assert_close(gather_tokens(tiles, inputs["flex"].place), flex(inputs), rtol=0, atol=0)


def test_density_is_told_and_the_gate_takes_each_pattern_once():
    op = OPS["tile_sparse_attention"]
    shape = {**TILES, "heads": 24}
    layout = op.layout(shape)
    mean = sum(density(pattern, layout) for pattern in op.patterns(shape)) / 6
    assert float(op.facts(shape)["density"]) == pytest.approx(mean, abs=1e-4)
    assert op.gate_shape(shape)["heads"] == 6
    assert op.gate_shape({**shape, "patterns": ["full", "skip", "full"]})["patterns"] == ["full", "skip"]


def test_routing_is_judged(monkeypatch):
    op = OPS["bilevel_routing"]
    inputs = op.make_inputs(SMALL, torch.float32, CPU)
    good = op.gate_inputs(inputs)
    assert op.invariants(good) is None
    worst = dict(good, index=15 - good["index"])
    assert op.invariants(worst) is not None
    assert "twice" in op.invariants(dict(good, index=good["index"] * 0))
    monkeypatch.setattr(op, "gate_inputs", lambda inputs: worst)
    assert "zoo" in gate.check(op, SMALL, torch.float32, CPU, ["zoo", "plain"])
