"""Kernels on images, videos and tokens under Triton's interpreter on a CPU; `test_interpreter.py` runs this file.

The interpreter is slow and wrong in bfloat16, so shapes are tiny and the dtype is float32.
"""

from __future__ import annotations

import pytest
import torch

from zoo.kernels.agent import AgentBias
from zoo.kernels.agent import reference as agent_reference
from zoo.kernels.agent import triton as agent_kernels
from zoo.kernels.bilevel_routing import reference, triton_routing
from zoo.kernels.bilevel_routing import triton as kernels
from zoo.kernels.depthwise_conv import reference as conv_reference
from zoo.kernels.depthwise_conv import triton as conv_kernels
from zoo.kernels.factorized import reference as factorized_reference
from zoo.kernels.factorized import triton as factorized_kernels
from zoo.kernels.factorized import triton_pool as pool_kernels
from zoo.kernels.halo import reference as halo_reference
from zoo.kernels.halo import triton as halo_kernels
from zoo.kernels.halo.reference import Geometry
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
