"""Kernels under Triton's interpreter on a CPU; `test_interpreter.py` runs this file with TRITON_INTERPRET=1.

The interpreter is slow and wrong in bfloat16, so shapes are tiny and the dtype is float32.
"""

from __future__ import annotations

import math

import pytest
import torch

from zoo.kernels.agent import AgentBias
from zoo.kernels.agent import reference as agent_reference
from zoo.kernels.agent import triton as agent_kernels
from zoo.kernels.bias_relu import reference as relu_reference
from zoo.kernels.bias_relu import triton as relu_kernels
from zoo.kernels.bilevel_routing import reference, triton_routing
from zoo.kernels.bilevel_routing import triton as kernels
from zoo.kernels.depthwise_conv import reference as conv_reference
from zoo.kernels.depthwise_conv import triton as conv_kernels
from zoo.kernels.factorized import reference as factorized_reference
from zoo.kernels.factorized import triton as factorized_kernels
from zoo.kernels.factorized import triton_pool as pool_kernels
from zoo.kernels.flat_window import reference as flat_reference
from zoo.kernels.flat_window import triton as flat_kernels
from zoo.kernels.flat_window import triton_order
from zoo.kernels.halo import reference as halo_reference
from zoo.kernels.halo import triton as halo_kernels
from zoo.kernels.halo.reference import Geometry
from zoo.kernels.rotated_iou import reference as rotated_reference
from zoo.kernels.rotated_iou import triton as rotated_kernels
from zoo.kernels.scatter_linear import reference as scatter_reference
from zoo.kernels.scatter_linear import triton as scatter_kernels
from zoo.kernels.sparse_conv import (
    Neighbours,
    downsample,
    same_table,
    sort_sites,
    triton_depthwise,
    triton_neighbours,
    triton_pillars,
    triton_sites,
    triton_tiles,
)
from zoo.kernels.sparse_conv import reference as conv3d_reference
from zoo.kernels.sparse_conv import triton as conv3d_kernels
from zoo.kernels.sparse_conv.reference import SiteGrid
from zoo.kernels.sparse_conv.sites import build_tiles, coarser_sites, pillars_of
from zoo.kernels.tile_sparse import (
    Diagonal,
    Full,
    Layout,
    MultiDiagonal,
    Skip,
    VerticalStripe,
    pattern_table,
)
from zoo.kernels.tile_sparse import fp8 as sparse_fp8
from zoo.kernels.tile_sparse import reference as sparse_reference
from zoo.kernels.tile_sparse import triton as sparse_kernels
from zoo.kernels.token_select import reference as select_reference
from zoo.kernels.token_select import triton as select_kernels
from zoo.kernels.voxelize import Voxels, make_grid
from zoo.kernels.voxelize import reference as voxel_reference
from zoo.kernels.voxelize import triton as voxel_kernels

from .selection_plans import PLANS, scores_of

# (map, channels, heads, region, topk, key map, key region, mask_padding, distinct) and the designs expected.
PROBLEMS = {
    "dense": ((6, 6), 16, 1, (2, 3), 2, None, None, False, True),
    "dense_masked": ((5, 7), 16, 1, (1, 2), 7, None, None, True, True),
    "dense_two_heads": ((6, 4), 24, 2, (1, 1), 20, None, None, False, True),
    "tile": ((8, 4), 24, 2, (4, 4), 1, None, None, False, False),
    "tile_padded": ((7, 5), 24, 2, (4, 3), 2, None, None, False, False),
    "tile_masked": ((7, 5), 16, 1, (4, 3), 2, None, None, True, False),
    "tile_of_blocks": ((16, 8), 16, 1, (16, 8), 1, None, None, False, True),
    "walk": ((20, 20), 16, 1, (10, 10), 3, None, None, False, True),
    "walk_even": ((16, 16), 16, 1, (4, 4), 8, None, None, False, True),
    "cross": ((6, 10), 32, 2, (3, 5), 3, (4, 6), (2, 2), False, False),
}
DESIGNS = {"dense": "tile tile tile", "tile": "tile tile walk", "walk": "walk walk walk", "walk_even": "walk walk walk"}


def setup(name: str):
    size, C, heads, region, topk, kv_size, kv_region, mask, distinct = PROBLEMS[name]
    kv_size, kv_region = kv_size or size, kv_region or region
    torch.manual_seed(0)
    q = torch.randn(1, *size, C)
    k, v = torch.randn(2, 1, *kv_size, C)
    index, _ = reference.route_regions(q, k, region, kv_region, topk, 1.0)
    return (q, k, v), index, (heads, region, kv_region, 0.3, mask), distinct


@pytest.mark.parametrize("name", PROBLEMS)
def test_attention(name: str) -> None:
    inputs, index, settings, distinct = setup(name)
    heads, region, kv_region, scale, mask = settings
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = reference.bilevel_attention(*leaves, index, *settings)
    grad = torch.randn_like(expected)
    out, lse = kernels.forward(*inputs, index, heads, region, kv_region, scale, mask, distinct)
    grads = kernels.backward(grad, *inputs, out, lse, index, heads, region, kv_region, scale, mask, distinct)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "designs"), DESIGNS.items())
def test_each_design_is_taken(name: str, designs: str) -> None:
    (q, k, _), index, (heads, region, kv_region, scale, mask), distinct = setup(name)
    plan = kernels.plan(
        q.shape, q.stride(), k.shape, k.stride(), index.shape, heads, region, kv_region, scale, mask, distinct
    )
    assert " ".join(design for design, _, _ in plan.launches.values()) == designs
    assert plan.dense == name.startswith("dense")


def test_attention_with_a_graph_per_head() -> None:
    q, k, v = torch.randn(3, 1, 4, 6, 32)
    index = torch.randn(1, 2, 6, 6).topk(2).indices.int()
    settings = (2, (2, 2), (2, 2), 0.3, False)
    out, lse = kernels.forward(q, k, v, index, *settings, False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference.bilevel_attention(*leaves, index, *settings)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    grads = kernels.backward(grad, q, k, v, out, lse, index, *settings, False)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "region", "topk"), [((5, 7), (2, 3), 3), ((6, 6), (1, 2), 16)])
def test_routing(size: tuple, region: tuple, topk: int) -> None:
    q, k = torch.randn(2, 2, *size, 24)
    index, weight = triton_routing.route(q, k, region, region, topk, 0.4)
    expected = reference.route_regions(q, k, region, region, topk, 0.4)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1], rtol=1e-4, atol=1e-6)


def test_transposed_graph() -> None:
    index = torch.tensor([[[0, 2], [2, 1], [0, 2]]], dtype=torch.int32)
    reader, start = triton_routing.transpose_graph(index, 4)
    assert start.tolist() == [[0, 2, 3, 6, 6]] and reader.tolist() == [[0, 2, 1, 0, 1, 2]]


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_convolution(kernel: int) -> None:
    x = torch.randn(2, 5, 9, 40)[..., 20:].requires_grad_()
    weight, bias = torch.randn(20, 1, kernel, kernel, requires_grad=True), torch.randn(20, requires_grad=True)
    residual = torch.randn(2, 5, 9, 20)
    expected = conv_reference.depthwise_conv2d(x, weight, bias, residual)
    out = conv_kernels.convolve(x.detach(), weight.detach(), bias.detach(), residual, False)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    dx = conv_kernels.convolve(grad, weight.detach(), None, None, False, flip=True)
    dw, db = conv_kernels.weight_gradient(x.detach(), grad, weight.detach(), True)
    torch.testing.assert_close(
        (dx, dw, db), torch.autograd.grad(expected, (x, weight, bias), grad), rtol=1e-4, atol=1e-4
    )
    plus_input = conv_kernels.convolve(x.detach(), weight.detach(), bias.detach(), None, True)
    torch.testing.assert_close(plus_input, (expected - residual + x).detach(), rtol=1e-4, atol=1e-5)


# (B, grid, key grid, channels, heads, agents, biased sides, extra token, block cells, dtype)
AGENT_PROBLEMS = {
    "class_token": (2, (5, 6), (5, 6), 48, 2, 9, "key query", 1, (7, 7), torch.float32),
    "half": (3, (5, 6), (5, 6), 48, 2, 9, "key query", 1, (7, 7), torch.float16),
    "large_block": (1, (5, 18), (3, 4), 16, 1, 2, "key query", 0, (4, 17), torch.float32),
    "key_bias": (1, (4, 7), (4, 7), 32, 1, 49, "key", 0, (7, 7), torch.float32),
    "query_bias": (3, (4, 7), (4, 7), 16, 1, 20, "query", 1, (3, 2), torch.float32),
    "parts": (1, (1, 390), (1, 290), 16, 1, 3, "", 0, None, torch.float32),
    "blocks_of_agents": (2, (3, 8), (3, 9), 48, 2, 70, "", 0, None, torch.float32),
}


def setup_agents(name: str):
    """Leaves (tokens, then the biases), a function from these to the biases, and the remaining arguments."""
    B, grid, key_grid, C, heads, n, sides, extra, cells, dtype = AGENT_PROBLEMS[name]
    torch.manual_seed(0)
    q, agents = torch.randn(B, extra + grid[0] * grid[1], 2 * C)[..., C:], torch.randn(B, n, C)
    k, v = torch.randn(B, extra + key_grid[0] * key_grid[1], 2 * C).split(C, -1)
    leaves = [x.to(dtype) for x in (q, agents, k, v)]
    for H, W in [size for side, size in (("key", key_grid), ("query", grid)) if side in sides]:
        shapes = [(heads, n, *cells), (heads, n, H), (heads, n, W), (heads, n)][: 3 + extra]
        leaves += [torch.randn(shape) for shape in shapes]

    def biases(leaves: list) -> list:
        parts = iter(leaves[4:])
        return [
            AgentBias(*(next(parts) for _ in range(3 + extra))) if side in sides else None for side in ("key", "query")
        ]

    return leaves, biases, (heads, grid, key_grid, 0.3, 0.5)


@pytest.mark.parametrize("name", AGENT_PROBLEMS)
def test_agent_attention(name: str) -> None:
    inputs, biases, (heads, grid, key_grid, scale, query_scale) = setup_agents(name)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = agent_reference.agent_attention(
        *leaves[:4], heads, grid, key_grid, *biases(leaves), scale, query_scale
    )  # fmt: skip
    grad = torch.randn_like(expected)
    settings = (*biases(inputs), heads, list(grid), list(key_grid), scale, query_scale)
    out, values, lse = agent_kernels.forward(*inputs[:4], *settings)
    *grads, d_key_bias, d_query_bias = agent_kernels.backward(grad, *inputs[:4], values, lse, *settings)
    grads += [x for bias in (d_key_bias, d_query_bias) for x in bias or () if x is not None]
    tolerance = dict(rtol=2e-2, atol=2e-2) if inputs[0].dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected.detach(), **tolerance)
    torch.testing.assert_close(grads, list(torch.autograd.grad(expected, leaves, grad)), **tolerance)


def test_agent_attention_splits_long_sequences() -> None:
    inputs, _, (heads, *_) = setup_agents("parts")
    q, agents, k, _ = inputs
    p = agent_kernels.plan(1, q.shape[1], k.shape[1], 3, 16, heads, False, False, True)
    assert p.aggregate.chunks == 2 and p.agent_gradient.chunks == 3
    assert agent_kernels.plan(1, 24, 27, 70, 48, 2, False, False, True).aggregate.config["AGENT_BLOCKS"] == 2


# (batch, height, width, geometry, dqk, dv, scale_position, mask_border) and whether key tiles are written out.
HALO_PROBLEMS = {
    "padded": (1, 5, 10, Geometry(2, 8, 3, 1), 16, 16, False, False, True),
    "masked": (1, 9, 7, Geometry(1, 8, 3, 1), 16, 16, False, True, False),
    "strided": (2, 9, 6, Geometry(1, 8, 3, 2), 16, 24, True, False, False),
    "wide_halo": (1, 5, 6, Geometry(2, 4, 3, 1), 12, 20, False, False, True),
    "no_halo": (1, 6, 7, Geometry(1, 4, 0, 1), 4, 12, False, True, True),
    "two_tiles": (1, 7, 5, Geometry(1, 10, 1, 1), 16, 40, False, False, False),
}


@pytest.mark.parametrize("name", HALO_PROBLEMS)
def test_halo_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    B, H, W, geometry, dqk, dv, *flags, unroll = HALO_PROBLEMS[name]
    monkeypatch.setattr(halo_kernels, "MAX_UNROLL", 100 if unroll else 0)
    halo_kernels.plan.cache_clear()
    torch.manual_seed(0)
    q = torch.randn(B, *halo_reference.query_size((H, W), geometry.stride), geometry.heads * dqk)
    kv = torch.randn(B, H, W, geometry.heads * (dqk + dv) + 8)[..., 8:]
    tables = torch.randn(2, 2 * geometry.window - 1, dqk) / 4
    check_halo([q, kv, *tables], (geometry, 0.3, *flags))


def test_halo_attention_with_several_tiles_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halo_kernels, "MAX_PARTS", 2)
    halo_kernels.plan.cache_clear()
    q, kv, tables = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 8), torch.randn(2, 7, 4) / 2
    check_halo([q, kv, *tables], (Geometry(1, 2, 1, 1), 0.5, False, False))


def test_halo_attention_in_float16_with_large_logits() -> None:
    """Position logits divided by the scale are beyond float16, where masked keys hold its least number."""
    q, kv, tables = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 8), torch.randn(2, 7, 4)
    inputs, settings = [x.half() for x in (q * 500, kv, *tables)], (Geometry(1, 2, 1, 1), 0.02, False, True)
    out, lse = halo_kernels.forward(*inputs, *settings)
    # Logits this far apart leave one key, which rounding may confuse with another: the result stays among the values.
    assert torch.isfinite(lse).all() and (out.abs() <= inputs[1][..., 4:].abs().max()).all()
    assert all(torch.isfinite(g).all() for g in halo_kernels.backward(out, *inputs, out, lse, *settings))


def check_halo(inputs: list[torch.Tensor], settings: tuple) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = halo_reference.halo_attention(*leaves, *settings)
    grad = torch.randn_like(expected)
    out, lse = halo_kernels.forward(*inputs, *settings)
    grads = halo_kernels.backward(grad, *inputs, out, lse, *settings)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad), rtol=1e-4, atol=1e-5)


# (batch, tokens, global keys, global channels, local keys, heads, head dim, groups): all keys held, walked over,
# one local group, several chunks of queries.
FACTORIZED = {
    "held": (1, 70, 49, 8, 49, 2, 14, 2),
    "chunks": (2, 800, 9, 4, 9, 1, 6, 2),
    "one_group": (1, 49, 49, 16, 49, 1, 28, 1),
    "walked": (1, 800, 150, 4, 9, 1, 6, 2),
    "many_keys": (1, 20, 100, 4, 121, 1, 6, 2),
}


def factorized_inputs(name: str) -> list[torch.Tensor]:
    """Keys as strided halves of packed tensors, values contiguous, as the layer has them."""
    B, N, NG, CG, L, heads, D, groups = FACTORIZED[name]
    torch.manual_seed(0)
    q = torch.randn(B, N, 2 * (CG + groups * heads * D))[..., ::2]
    inputs = [q, torch.randn(B, NG, 2 * CG)[..., :CG], torch.randn(B, NG, CG)]
    for _ in range(groups):
        inputs += [torch.randn(B, L, heads, 2 * D)[..., :D], torch.randn(B, L, heads, D)]
    return inputs


@pytest.mark.parametrize("name", FACTORIZED)
def test_factorized_attention(name: str) -> None:
    inputs = factorized_inputs(name)
    absent = [None] * (7 - len(inputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = factorized_reference.factorized_attention(*leaves)
    grad = torch.randn_like(expected)
    out, lse = factorized_kernels.forward(*inputs, *absent)
    grads = factorized_kernels.backward(grad, *inputs, *absent, out, lse)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[: len(inputs)], torch.autograd.grad(expected, leaves, grad), rtol=1e-4, atol=1e-4)


def test_each_way_of_adding_is_taken() -> None:
    """dk and dv written at once by the only chunk, or added up from shares."""
    chunks = {}
    for name in FACTORIZED:
        q, *keys = factorized_inputs(name)
        *_, plan = factorized_kernels._prepare(q, [*keys, *[None] * (6 - len(keys))])
        assert plan.held == (name != "walked")
        chunks[name] = -(-q.shape[1] // plan.backward[1])
    assert chunks == {"held": 1, "chunks": 2, "one_group": 1, "walked": 2, "many_keys": 1}


# (batch, map, heads, head dim, window, dilations, fusion): exact and padded, a map smaller than a window, one row.
POOLS = {
    "exact": (2, (6, 3), 2, 6, 3, [1], "official"),
    "padded": (1, (9, 8), 1, 6, 3, [1, 3], "official"),
    "mean": (1, (4, 5), 2, 4, 2, [1, 2], "window_mean"),
    "small": (1, (2, 3), 1, 5, 4, [1, 2], "official"),
    "one_row": (1, (1, 7), 1, 6, 2, [1, 3], "official"),
}


@pytest.mark.parametrize("name", POOLS)
def test_cross_window_pool(name: str) -> None:
    B, (H, W), heads, D, window, dilations, fusion = POOLS[name]
    torch.manual_seed(0)
    x = torch.randn(B, H, W, 2 * len(dilations) * heads * D)[..., len(dilations) * heads * D :].requires_grad_()
    expected = factorized_reference.cross_window_pool(x, heads, window, dilations, fusion)
    out = pool_kernels.forward(x.detach(), heads, window, dilations, fusion)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    dx = pool_kernels.backward(grad, H, W, heads, dilations, fusion)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, grad)[0], rtol=1e-4, atol=1e-5)


# Layouts of pattern sparse attention, (head dim, dtype), and valid text keys: full and short tiles of video and text,
# text before and after the video, more text than video, none of it valid, tiles wider than blocks.
SPARSE = {
    "even": (Layout((4, 4, 4), tile=(16, 16)), 16, torch.float32, None),
    "odd": (Layout((3, 3, 5), 7, "last", (32, 16)), 16, torch.float32, [2]),
    "exact": (Layout((2, 4, 5), 18, "first", (16, 32), "element"), 16, torch.float32, [18, 0]),
    "exact_even": (Layout((4, 4, 3), tile=(16, 16), granularity="element"), 16, torch.float32, None),
    "more_text": (Layout((1, 3, 3), 37, "first", (16, 16), "element"), 16, torch.float32, [20]),
    "narrow": (Layout((5, 3, 3), 3, "last", (16, 16)), 12, torch.float32, None),
    "blocks": (Layout((3, 5, 11), 5, "last", (128, 64)), 16, torch.float32, [0]),
    "half": (Layout((3, 3, 5), 3, "last", (32, 16)), 16, torch.float16, None),
    "samples": (Layout((3, 3, 5), 7, "first", (16, 16)), 16, torch.float32, [2, 7]),
}
SPARSE_PATTERNS = (
    Full(),
    Skip(),
    Diagonal(0.5),
    MultiDiagonal(0.7),
    VerticalStripe(frames=(0, -1)),
    VerticalStripe(every=(23, 2, 5)),
    VerticalStripe(),
)


@pytest.mark.parametrize("name", SPARSE)
def test_tile_sparse_attention(name: str) -> None:
    layout, D, dtype, valid = SPARSE[name]
    table, B = pattern_table(SPARSE_PATTERNS, layout), len(valid or [0])
    torch.manual_seed(0)
    ids = torch.randperm(len(SPARSE_PATTERNS))
    length = None if valid is None else torch.tensor(valid)
    # [B, M, S, D]: two in the memory of [B, S, M, D], of one packed tensor.
    q, k = torch.randn(B, layout.tokens, len(ids), 2 * D).to(dtype).transpose(1, 2).split(D, -1)
    v = torch.randn(B, len(ids), layout.tokens, D).to(dtype)
    settings = (ids, table, layout, length, 0.4)
    expected = sparse_reference.tile_sparse_attention(q, k, v, *settings)
    grad = torch.randn_like(expected)
    grads = sparse_reference.tile_sparse_attention_backward(grad, q, k, v, *settings)
    out, lse = sparse_kernels.forward(q, k, v, *settings)
    actual = sparse_kernels.backward(grad, q, k, v, out, lse, *settings)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(actual, grads, **tolerance)
    assert out.stride() == expected.stride() and not torch.isnan(lse).any()


@pytest.mark.parametrize(("n", "side"), [(70, 8.0), (33, 3.0), (5, 1.0)])
def test_rotated_suppression(n: int, side: float) -> None:
    torch.manual_seed(0)
    boxes = torch.rand(2, n, 5) * torch.tensor([side, side, 4, 2, 6])
    count, threshold = torch.tensor([n, n - 3], dtype=torch.int32), torch.tensor([0.3, 0.1])
    keep = rotated_kernels.nms(boxes, count, threshold)
    assert torch.equal(keep, rotated_reference.nms(boxes, count, threshold)) and not keep.all()


def test_rotated_overlap() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(40, 5) * 4, torch.rand(37, 5) * 4
    pairs = rotated_reference.overlap(a[:, None], b)
    torch.testing.assert_close(rotated_kernels.overlap(a, b, False), pairs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotated_kernels.overlap(a[:37], b, True), pairs.diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("B", "T", "heads", "D", "dtype"), [(2, 37, 3, 20, torch.float32), (1, 600, 2, 16, torch.float16)]
)
def test_cls_attention(B: int, T: int, heads: int, D: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(B, 2 * heads * D).to(dtype)[:, heads * D :], torch.randn(B, T, heads * D).to(dtype)
    row = select_kernels.cls_attention(q, k, heads, 0.3)
    torch.testing.assert_close(row, select_reference.cls_attention(q, k, heads, 0.3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_token_select(name: str) -> None:
    plan = PLANS[name]
    for first, scores in scores_of(plan)[:2]:
        mask, budgets = select_kernels.token_select(first, scores, plan)
        expected = select_reference.token_select(first, scores, plan)
        assert torch.equal(budgets, expected[1]) and torch.equal(mask, expected[0])


def representable(layout: Layout, B: int, M: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B, M, S, D] that FP8 holds exactly under scales of their rows and tiles, keys with an offset.

    Triton's interpreter loses the carry where rounding to FP8 ends at a power of two, so nothing is to be rounded.
    """

    def draw(tokens: int) -> torch.Tensor:
        x = torch.randint(-7, 8, (B, M, tokens, D)) / 8
        # The largest number of FP8 has this mantissa, so scales are powers of two.
        x[..., 0] = 7 / 8
        return x * 2.0 ** -torch.randint(0, 3, (B, M, tokens, 1))

    half = draw(layout.video // 2)
    # Keys of the video have their offset as exact mean.
    video = torch.cat([half, torch.zeros(B, M, layout.video % 2, D), -half], dim=2)
    parts = [video, draw(layout.text)]
    k = torch.cat(parts[::-1] if layout.text_first else parts, dim=2)
    return draw(layout.tokens), k + torch.arange(D) % 4


@pytest.mark.parametrize("name", ["odd", "exact", "blocks", "half", "two_steps"])
def test_tile_sparse_attention_in_fp8(name: str) -> None:
    layout, D, dtype, valid = SPARSE.get(name, (Layout((3, 5, 6), 5, "last", (16, 128)), 24, torch.float32, None))
    table, B, M = pattern_table(SPARSE_PATTERNS, layout), len(valid or [0]), len(SPARSE_PATTERNS)
    torch.manual_seed(0)
    ids = torch.randperm(M)
    length = None if valid is None else torch.tensor(valid)
    q, k = (x.to(dtype) for x in representable(layout, B, M, D))
    v = torch.randn(B, M, layout.tokens, D).to(dtype)
    settings = (ids, table, layout, length, 0.4)
    out = sparse_kernels.forward(q, k, v, *settings, fp8=True)[0]
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, sparse_reference.tile_sparse_attention(q, k, v, *settings), **tolerance)
    torch.testing.assert_close(sparse_fp8.tile_sparse_attention_fp8(q, k, v, *settings), out, **tolerance)


# (pillars of each sample, rows of padding, window, group, heads, head dim, dtype): several samples, one empty and some
# shorter than a group, groups with and without a tail, full last groups.
FLAT_PROBLEMS = {
    "samples": ([50, 0, 9, 33], 5, (5, 3), 16, 2, 12, torch.float32),
    "tail": ([61], 0, (4, 4), 24, 1, 16, torch.float32),
    "half": ([40, 3], 40, (5, 5), 20, 2, 16, torch.float16),
    "full": ([32], 0, (12, 12), 16, 1, 8, torch.float32),
    "large_group": ([30, 100], 2, (3, 3), 72, 1, 16, torch.float32),
    "single_pillars": ([9], 0, (4, 4), 1, 1, 8, torch.float32),  # nothing to choose from: gradients of q and k vanish
}


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("name", FLAT_PROBLEMS)
def test_flat_window_attention(name: str, prefetch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles in flat_kernels.TUNING["forward"].values():
        monkeypatch.setitem(tiles, "PREFETCH", prefetch)
    flat_kernels.plan.cache_clear()
    counts, padding, window, group, heads, D, dtype = FLAT_PROBLEMS[name]
    torch.manual_seed(0)
    coords = pillars(counts, 12, padding)
    windows = flat_reference.Windows(len(counts), (12, 12), window, group)
    order, groups = triton_order.flatten_windows(coords, windows)
    expected_order, expected_groups = flat_reference.flatten_windows(coords, windows)
    assert torch.equal(order, expected_order) and torch.equal(groups, expected_groups)
    inputs = [x.unflatten(-1, (heads, D)) for x in torch.randn(len(coords), 3 * heads * D).to(dtype).chunk(3, -1)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    settings = (order[1], groups, group, 0.4)
    expected = flat_reference.flat_window_attention(*leaves, *settings)
    grad = torch.randn_like(expected)
    out, lse = flat_kernels.forward(*inputs, *settings)
    grads = flat_kernels.backward(grad, *inputs, out, lse, *settings)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected.detach(), **tolerance)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad), **tolerance)


def pillars(counts: list[int], side: int, padding: int) -> torch.Tensor:
    """int32 [V, 4] random cells (sample, z, y, x) of a square grid, sorted, then rows of padding."""
    rows = [torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4)]
    for b in reversed(range(len(counts))):
        cell = torch.randperm(side * side)[: counts[b]].sort().values
        rows.insert(0, torch.stack([cell * 0 + b, cell * 0, cell // side, cell % side], 1))
    return torch.cat(rows).int()


def test_flattening_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of many samples do not fit 32 bits."""
    coords = pillars([0] * 5 + [40], 12, 3)
    windows = flat_reference.Windows(6, (12, 12), (5, 3), 16)
    expected = flat_reference.flatten_windows(coords, windows)
    monkeypatch.setattr(flat_reference.Windows, "key_dtype", lambda self: torch.int64)
    order, groups = triton_order.flatten_windows(coords, windows)
    assert torch.equal(order, expected[0]) and torch.equal(groups, expected[1])


# (rows of each window, rows behind the last window, heads, channels of a head, permuted, relu)
SCATTER = {
    "even": ([64, 32], 0, 2, 16, False, True),
    "odd": ([3, 0, 70, 1], 5, 1, 12, True, True),
    # With windows cut at 64 rows: over three pieces, exactly one piece, one row more.
    "long": ([10, 140, 64, 65, 2], 70, 1, 16, False, True),
    "long_permuted": ([150, 0, 90], 1, 2, 16, True, False),
    "one_row": ([1], 0, 1, 16, False, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCATTER)
def test_scatter_linear_attention(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter_kernels, "LONG", 64)
    scatter_kernels.config.cache_clear()
    counts, behind, M, D, permuted, relu = SCATTER[name]
    rows = sum(counts) + behind
    torch.manual_seed(0)
    qkv, grad = torch.randn(rows, 3, M, D).to(dtype), torch.randn(rows, M, D).to(dtype)
    inputs = qkv.unbind(1) if relu else qkv.abs().unbind(1)
    offsets, order = torch.tensor([0, *counts]).cumsum(0), torch.randperm(rows) if permuted else None
    settings = (offsets.int(), order, 1e-6, relu)
    tolerance = dict(rtol=2e-3, atol=2e-4) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    expected = scatter_reference.scatter_linear(*inputs, *settings)
    torch.testing.assert_close(scatter_kernels.forward(*inputs, *settings), expected, **tolerance)
    grads = scatter_reference.scatter_linear_backward(grad, *inputs, *settings)
    torch.testing.assert_close(scatter_kernels.backward(grad, *inputs, *settings), grads, **tolerance)


STRIDED = ((3, 3, 3), (2, 2, 2), (1, 1, 1))


def random_voxels(counts: tuple[int, ...], shape: tuple[int, int, int], padding: int) -> Voxels:
    Z, Y, X = shape
    rows = [torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4)]
    for b, count in enumerate(counts):
        cell = torch.randperm(Z * Y * X)[:count]
        rows.append(torch.stack((cell * 0 + b, cell // (Y * X), cell // X % Y, cell % X), 1))
    return Voxels(torch.cat(rows).int(), torch.tensor(sum(counts)), len(counts), shape)


def neighbours_of(kind: str) -> Neighbours:
    """Neighbours of 110 sites with the tiles that the kernels need."""
    torch.manual_seed(0)
    sites, _ = sort_sites(random_voxels((70, 35), (3, 6, 7), 5), (4, 3))
    if kind == "same":
        table = same_table(sites, [(3, 3, 3)])
        return Neighbours((3, 3, 3), table, build_tiles(table, (3, 3, 3)), table, build_tiles(table, (3, 3, 3)), True)
    n = downsample(sites, *STRIDED, (2, 2), 50)[1]
    tiles = (build_tiles(n.table, n.kernel), build_tiles(n.transposed, n.kernel))
    return n._replace(tiles=tiles[0], transposed_tiles=tiles[1])


@pytest.mark.parametrize("window", [None, (4, 3)])
def test_neighbours(window: tuple | None) -> None:
    torch.manual_seed(0)
    sites, _ = sort_sites(random_voxels((80, 0, 90), (3, 9, 11), 4), window)
    out, neighbours = downsample(sites, *STRIDED, window)
    cases = [
        (sites, sites, (3, 3, 3), (1, 1, 1), (1, 1, 1), False),
        (sites, sites, (1, 5, 1), (1, 1, 1), (0, 2, 0), False),
        (sites, out, *STRIDED, False),
        (out, sites, *STRIDED, True),
    ]
    for keys, queries, *settings in cases:
        arguments = (keys.keys, queries.coords, *settings, keys.grid)
        table = triton_neighbours.neighbour_table(*arguments)
        assert torch.equal(table, conv3d_reference.neighbour_table(*arguments)) and (table >= 0).any()


@pytest.mark.parametrize(
    ("kind", "cin", "cout", "dtype"),
    [("same", 16, 24, torch.float32), ("same", 72, 16, torch.float16), ("strided", 5, 40, torch.float32)],
)
def test_sparse_convolution(kind: str, cin: int, cout: int, dtype: torch.dtype, monkeypatch) -> None:
    # Several partial sums of the weight gradient.
    monkeypatch.setattr(conv3d_kernels, "PROGRAMS", 60)
    kernel, table, tiles, transposed, transposed_tiles, mirror = neighbours_of(kind)
    x = torch.randn(110, cin + 3)[:, 3:].to(dtype)
    weight, bias = (torch.randn(cout, 27, cin) / 8).to(dtype), torch.randn(cout).to(dtype)
    grad = torch.randn(table.shape[1], cout).to(dtype)
    out = conv3d_kernels.convolve(x, weight, bias, table, tiles, False, False)
    dx, dweight, _ = conv3d_kernels.backward(grad, x, weight, table, tiles, transposed, transposed_tiles, mirror)
    exact = [y.double() for y in (grad, x, weight, bias)]
    expected = conv3d_reference.sparse_conv(*exact[1:], table)
    gradients = conv3d_reference.sparse_conv_backward(*exact[:3], table)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
    for actual, wanted in zip((out, dx, dweight), (expected, *gradients), strict=True):
        torch.testing.assert_close(actual.double(), wanted, **tolerance)


@pytest.mark.parametrize(
    ("D", "groups", "residual", "dtype"), [(8, 4, True, torch.float32), (6, 2, False, torch.float16)]
)
def test_sparse_depthwise_convolution(
    D: int, groups: int, residual: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_depthwise, "PROGRAMS", 100)
    torch.manual_seed(0)
    kernels = [(3, 3, 3), (1, 1, 5), (1, 5, 1)][: max(2, groups - 1)]
    sites, _ = sort_sites(random_voxels((400, 350), (3, 15, 20), 5), (4, 3))
    table, taps = same_table(sites, kernels), [27, 5, 5][: len(kernels)]
    x, grad = torch.randn(2, 755, groups * D).to(dtype).unbind(0)
    weight = torch.randn(sum(taps), D).to(dtype)
    exact = [y.double() for y in (x, weight, grad)]
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
    for mirror in (False, True):
        out = triton_depthwise.convolve(x, weight, table, taps, residual, mirror)
        expected = conv3d_reference.sparse_depthwise_conv(*exact[:2], table, taps, residual, mirror)
        torch.testing.assert_close(out.double(), expected, **tolerance)
    dweight = triton_depthwise.weight_gradient(grad, x, table, taps, D)
    expected = conv3d_reference.sparse_depthwise_weight_gradient(exact[2], exact[0], table, taps, D)
    torch.testing.assert_close(dweight.double(), expected, **tolerance)


@pytest.mark.parametrize("capacity", [40, 500])
@pytest.mark.parametrize("strided", [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0))], ids=str)
def test_sites(strided: tuple, capacity: int) -> None:
    for voxels in (random_voxels((70, 0, 35), (7, 6, 9), 5), random_voxels((0,), (7, 6, 9), 3)):
        sites, _ = sort_sites(voxels, (4, 3))
        assert torch.equal(triton_sites.number_cells(sites.coords, sites.grid), sites.keys)
        coarse = SiteGrid(voxels.batch_size, (3, 3, 5), (2, 3))
        if strided[0][1] == 1:
            coarse = coarse._replace(shape=(3, 6, 9))
        expected = coarser_sites(sites.coords, *strided, coarse, capacity)
        actual = triton_sites.coarser_sites(sites.coords, *strided, coarse, capacity)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        expected = pillars_of(sites.keys, sites.coords, sites.grid, capacity)
        actual = triton_sites.find_pillars(sites.keys, sites.coords, sites.grid, capacity)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("Z", "heads", "C"), [(8, 2, 16), (10, 4, 32), (3, 1, 8)])
def test_pillars(Z: int, heads: int, C: int) -> None:
    torch.manual_seed(0)
    rows = torch.randperm(20 * Z).view(20, Z)
    N = 9 * Z
    rows[-2:] = N  # as padding has it
    rows = rows.clamp(max=N)
    q, kv, place = torch.randn(20, C), torch.randn(N, 2 * C), torch.randn(Z, C)
    k, v = kv.chunk(2, 1)
    assert torch.equal(triton_pillars.pillar_max(k, rows), conv3d_reference.pillar_max(k, rows))
    expected = conv3d_reference.pillar_attention(q, k, v, place, rows, heads)
    actual = triton_pillars.pillar_attention(q, k, v, place, rows, heads)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual[-2:] == 0).all() and (expected[-2:] == 0).all()


@pytest.mark.parametrize(("with_sum", "after"), [(False, False), (True, False), (True, True)])
def test_bias_and_relu(with_sum: bool, after: bool) -> None:
    torch.manual_seed(0)
    x, added, bias = torch.randn(2, 70, 40), torch.randn(70, 40) if with_sum else None, torch.randn(40)
    expected = relu_reference.bias_relu_(x[0].clone(), bias, added, after)
    relu_kernels.bias_relu_(x[0], bias, added, after)
    torch.testing.assert_close(x[0], expected)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 5, 2), (3, 3, 4)], ids=str)
def test_tiles(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for N in (0, 1, 64, 150):
        table = torch.randint(-2, 3, (math.prod(kernel), N), dtype=torch.int32)
        table[:, N // 2 :] = -1  # as padding has it
        assert torch.equal(triton_tiles.build_tiles(table, kernel, 64), build_tiles(table, kernel))


@pytest.mark.parametrize("capacity", [None, 100, 20])
@pytest.mark.parametrize(("order", "clamp"), [("zyx", True), ("xyz", False)])
@pytest.mark.parametrize("sizes", [[30, 0, 50], [40, 40]], ids=str)
def test_grouped_points(sizes: list[int], order: str, clamp: bool, capacity: int | None) -> None:
    torch.manual_seed(0)
    points = torch.rand(80, 5) * 10 - 5
    points[3, 4], points[60, 0], points[35:40] = torch.nan, torch.inf, torch.nan
    grid = make_grid((0.5, 0.25, 1.0), (-4.0, -2.0, -1.0, 4.0, 2.0, 2.0), clamp, order)
    expected = voxel_reference.group_points(points, sizes, grid, capacity)
    actual = voxel_kernels.group_points(points, sizes, grid, capacity)
    assert all(torch.equal(a, e) for a, e in zip(actual[1:], expected[1:], strict=True))
    assert torch.equal(actual.voxels.coords, expected.voxels.coords) and actual.voxels.num == expected.voxels.num
    V = len(actual.voxels.coords)
    features = voxel_kernels.point_features(
        points, actual.order, actual.offsets, actual.voxels.coords, grid, True
    )  # fmt: skip
    known = expected.index < V
    wanted = voxel_reference.point_features(points, expected, grid, True)
    torch.testing.assert_close(features[known], wanted[known])
    assert torch.isfinite(features).all()


def test_maximum_over_segments() -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 13, (90,)).sort().values
    index[index == 4] = 5
    offsets = torch.searchsorted(index, torch.arange(13))
    values = torch.randn(90, 20).round(decimals=1)  # with ties
    values[7, 3], values[11, 4] = torch.nan, -torch.inf
    leaf = values.clone().requires_grad_()
    expected = voxel_reference.segment_max(leaf, index, 12)
    out, row = voxel_kernels.segment_max(values, offsets)
    torch.testing.assert_close(out, expected.detach(), equal_nan=True)
    grad = torch.randn_like(expected)
    actual = voxel_kernels.segment_max_backward(grad, row, index)
    torch.testing.assert_close(actual, *torch.autograd.grad(expected, leaf, grad))
