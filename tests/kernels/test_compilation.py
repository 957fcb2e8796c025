"""Kernels compile for every supported GPU architecture, without one, as their launchers call them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from zoo.kernels.agent import AgentBias
from zoo.kernels.agent import triton as agent
from zoo.kernels.bias_relu import triton as bias_relu
from zoo.kernels.bilevel_routing import triton as attention
from zoo.kernels.bilevel_routing import triton_routing
from zoo.kernels.depthwise_conv import triton as conv
from zoo.kernels.factorized import triton as factorized
from zoo.kernels.factorized import triton_pool
from zoo.kernels.flat_window import triton as flat_window
from zoo.kernels.flat_window import triton_order
from zoo.kernels.flat_window.reference import Windows
from zoo.kernels.halo import triton as halo
from zoo.kernels.halo.reference import Geometry, query_size
from zoo.kernels.rotated_iou import triton as rotated
from zoo.kernels.scatter_linear import triton as scatter_linear
from zoo.kernels.sparse_conv import triton as sparse_conv
from zoo.kernels.sparse_conv import triton_depthwise, triton_neighbours, triton_pillars, triton_sites, triton_tiles
from zoo.kernels.sparse_conv.reference import SiteGrid
from zoo.kernels.tile_sparse import Diagonal, Layout, hopper, pattern_table
from zoo.kernels.tile_sparse import triton as tile_sparse
from zoo.kernels.token_select import triton as token_select
from zoo.kernels.voxelize import make_grid
from zoo.kernels.voxelize import triton as voxelize

from .selection_plans import plan_of

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")
ARCHITECTURES = (80, 90, 100)

# Stages 1 to 3 of BiFormer at 224 pixels, and stages 1 and 3 at 512: (map, channels, heads, region, topk). The last one
# has more keys than a tile holds.
STAGES = {
    "stage1": ((56, 56), 64, 2, (8, 8), 1),
    "stage2": ((28, 28), 128, 4, (4, 4), 4),
    "stage3": ((14, 14), 256, 8, (2, 2), 16),
    "stage1_512": ((128, 128), 64, 2, (16, 16), 1),
    "stage3_512": ((32, 32), 256, 8, (4, 4), 16),
    "large": ((40, 40), 64, 2, (20, 20), 1),
}
# Agent attention: (grid of tokens, channels, heads, agents, biased). Two stages at 224 pixels, the widest vision
# transformer, and diffusion at 64 x 64.
AGENT_STAGES = {
    "agent_stage1": ((56, 56), 96, 3, 9, True),
    "agent_stage3": ((14, 14), 384, 12, 49, True),
    "agent_deit_base": ((14, 14), 768, 12, 81, True),
    "agent_diffusion": ((64, 64), 320, 8, 256, False),
}
# Halo attention in timm's models and in the paper's H1: (map, dqk, dv, geometry).
HALO_STAGES = {
    "h1_stage1": ((64, 64), 16, 16, Geometry(4, 8, 3, 1)),
    "stage3": ((16, 16), 32, 32, Geometry(8, 8, 3, 1)),
    "stage4": ((8, 8), 64, 64, Geometry(8, 8, 2, 1)),
    "stage4_strided": ((16, 16), 64, 64, Geometry(8, 8, 2, 2)),
    "regnet": ((14, 14), 12, 36, Geometry(8, 7, 2, 1)),
}
# Attention of FaViT: (side of the map, channels, heads, sr_ratio, dtype). Stages of B1 and B2, the narrowest stage of
# B0, the widest of B3, and stage 1 of B1 at 1024 pixels, which walks over its global keys.
FACTORIZED = {
    "stage1": (56, 64, 1, 8, torch.bfloat16),
    "stage3": (14, 256, 4, 2, torch.bfloat16),
    "stage4": (7, 512, 8, 1, torch.bfloat16),
    "narrow": (56, 32, 1, 8, torch.bfloat16),
    "wide": (7, 768, 8, 1, torch.bfloat16),
    "stage1_1024": (256, 64, 1, 8, torch.bfloat16),
    "stage1_float32": (56, 64, 1, 8, torch.float32),
    "stage4_float32": (7, 512, 8, 1, torch.float32),
}

# Flattened window attention: (group, heads, head dim, dtype). FlatFormer on Waymo, and the limits.
FLAT = {
    "waymo": (144, 8, 16, torch.float16),
    "limits": (256, 2, 64, torch.bfloat16),
    "float32": (144, 8, 16, torch.float32),
}
# Pattern sparse attention: (layout, head dim, dtype). Heads of HunyuanVideo and CogVideoX, exact masks.
SPARSE = {
    "hunyuan": (Layout((3, 45, 80), 256, "last"), 128, torch.bfloat16),
    "cogvideox": (Layout((3, 48, 85), 226, "first"), 64, torch.float16),
    "exact": (Layout((3, 45, 80), 256, "last", granularity="element"), 128, torch.bfloat16),
    "float32": (Layout((3, 45, 80)), 128, torch.float32),
    "small": (Layout((3, 5, 7), 9, "first", (16, 16)), 24, torch.bfloat16),
}

# Scattered linear attention of ScatterFormer: (channels of a head, dtype, permuted).
SCATTER = {"float16": (32, torch.float16, True), "float32": (32, torch.float32, False)}

# Sparse convolutions of ScatterFormer: (taps, input and output channels, dtype, whether a kernel is its own transpose).
SPARSE_CONV = {
    "first": (27, 64, 128, torch.float16, True),
    "strided": (27, 128, 128, torch.bfloat16, False),
    "float32": (3, 128, 128, torch.float32, False),
}

# Choice of visual tokens: (tokens, heads, head dim, grid of sub-images, exact, dtype). CLIP-L/14 at 336 pixels, SigLIP
# at 384 with the largest grid of LLaVA-OneVision, the longest row.
SELECTIONS = {
    "clip": (577, 16, 64, (2, 2), False, torch.float16),
    "clip_exact": (577, 16, 64, (2, 2), True, torch.bfloat16),
    "siglip": (729, 16, 72, (6, 6), True, torch.float32),
    "longest": (4096, 16, 80, (1, 2), False, torch.bfloat16),
}
# Stack bytes that are known. Configurations were chosen by their time on an H100, where those that spill were the
# fastest of the ones tried (the dense gradients hold two wide tiles in registers). Not every spill-free one was timed.
SPILLS = {
    "_dq_tile_kernel": 1024,
    "_dkv_tile_kernel": 384,
    "_forward_tile_kernel": 192,
    "_dkv_walk_kernel": 64,
    "_top_regions_kernel": 64,
    "_conv_kernel": 64,
    "_weight_grad_kernel": 16,
    # On sm_80 only, with 49 agents.
    "_agent_gradient_kernel": 16,
    "_factorized_attention_kernel": 8,
    "_factorized_attention_grad_kernel": 16,
    # Heads of 128 channels, in float32 and on sm_100; not timed.
    "_tile_sparse_dq_kernel": 16,
    "_tile_sparse_dkv_kernel": 64,
    # Faster on an H100 than the configurations without.
    # Outside of the walk over keys, once a tile of queries.
    "_tile_sparse_specialised_kernel": 240,
}
# The same for sm_80 alone, which keeps both factors of a product in registers.
SPILLS_SM80 = {
    "_halo_forward_kernel": 32,
    "_halo_dq_kernel": 192,
    "_halo_dkv_kernel": 64,
    # With exact masks.
    "_tile_sparse_forward_kernel": 56,
}
# Columns of tensor memory on sm_100; a kernel that asks for more compiles to a trap.
TENSOR_MEMORY = 512


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Record launches instead of running them."""
    recorded = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: recorded.append((self, args, kwargs))
    )
    yield recorded


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, arch: int):
    """Compile a recorded launch with the specialisation that the launcher would apply."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attrs = {}, {}, {}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[i].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in fixed:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel, signature=signature, constexprs=constants, attrs=attrs
    )
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled_bytes(compiled, folder: Path) -> int:
    """Stack frame of a compiled kernel: registers that did not fit."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1])


def launch_attention(name: str) -> None:
    size, C, heads, region, topk = STAGES[name]
    q, k, v = torch.empty(4, *size, 3 * C, dtype=torch.bfloat16).split(C, -1)
    index = torch.zeros(4, -(-size[0] // region[0]) * -(-size[1] // region[1]), topk, dtype=torch.int32)
    settings = (heads, region, region, 0.125, False, True)
    triton_routing.route(q, k, region, region, topk, 1.0)
    out, lse = attention.forward(q, k, v, index, *settings)
    attention.backward(out, q, k, v, out, lse, index, *settings)


def launch_convolution(kernel: int) -> None:
    x = torch.empty(4, 28, 28, 384, dtype=torch.bfloat16)[..., 256:]
    grad, weight, bias = torch.empty(x.shape, dtype=x.dtype), torch.empty(128, 1, kernel, kernel), torch.empty(128)
    conv.convolve(x, weight, bias, grad, False)
    conv.convolve(grad, weight, None, None, True, flip=True)
    conv.weight_gradient(x, grad, weight, True)


def launch_agents(name: str) -> None:
    grid, C, heads, n, biased = AGENT_STAGES[name]
    q, k, v = torch.empty(8, grid[0] * grid[1], 3 * C, dtype=torch.bfloat16).split(C, -1)
    agents = torch.empty(8, n, C, dtype=torch.bfloat16)
    bias = AgentBias(*(torch.empty(heads, n, *size) for size in ((7, 7), grid[:1], grid[1:]))) if biased else None
    settings = bias, bias, heads, list(grid), list(grid), 0.125, 0.125
    out, values, lse = agent.forward(q, agents, k, v, *settings)
    agent.backward(out, q, agents, k, v, values, lse, *settings)


def launch_halo(name: str) -> None:
    size, dqk, dv, geometry = HALO_STAGES[name]
    q = torch.empty(16, *query_size(size, geometry.stride), geometry.heads * dqk, dtype=torch.bfloat16)
    kv = torch.empty(16, *size, geometry.heads * (dqk + dv), dtype=torch.bfloat16)
    tables = torch.empty(2, 2 * geometry.window - 1, dqk, dtype=torch.bfloat16)
    settings = (geometry, dqk**-0.5, False, False)
    out, lse = halo.forward(q, kv, *tables, *settings)
    halo.backward(out, q, kv, *tables, out, lse, *settings)


def launch_factorized(name: str) -> None:
    side, C, heads, ratio, dtype = FACTORIZED[name]
    dilations = [1, ratio] if ratio > 1 else [1]
    width = C // (16 if ratio > 1 else 8) * 7
    CG, N, NG = C - width * len(dilations), side**2, (side // ratio) ** 2
    map = torch.empty(64, side, side, C - CG, dtype=dtype)
    pooled = triton_pool.forward(map, heads, 7, dilations, "official")
    triton_pool.backward(pooled, side, side, heads, dilations, "official")
    packed = torch.empty(64, NG, 2 * CG, dtype=dtype)
    local = torch.empty(64, 49, heads, 2 * width // heads, dtype=dtype)
    k, v = local[..., : width // heads], local[..., : width // heads].contiguous()
    dilated = (k, v) if ratio > 1 else (None, None)
    inputs = (map.new_empty(64, N, C), packed[..., :CG], packed[..., CG:].contiguous(), k, v, *dilated)
    out, lse = factorized.forward(*inputs)
    factorized.backward(out, *inputs, out, lse)


def launch_flat_window(name: str) -> None:
    group, heads, D, dtype = FLAT[name]
    coords = torch.zeros(11783, 4, dtype=torch.int32)
    order, groups = triton_order.flatten_windows(coords, Windows(1, (468, 468), (13, 13), group))
    q, k, v = torch.empty(11783, 3, heads, D, dtype=dtype).unbind(1)
    out, lse = flat_window.forward(q, k, v, order[0], groups, group, 0.25)
    flat_window.backward(out, q, k, v, out, lse, order[0], groups, group, 0.25)


def launch_voxelize(order: str, dtype: torch.dtype) -> None:
    grid = make_grid((0.32, 0.32, 6), (-74.88, -74.88, -2, 74.88, 74.88, 4), order == "zyx", order)
    grouped = voxelize.group_points(torch.zeros(1000, 5), [400, 600], grid, 128)
    _, sorted_points, index, offsets = grouped
    voxelize.point_features(torch.zeros(1000, 5), sorted_points, offsets, grouped.voxels.coords, grid, True)
    out, row = voxelize.segment_max(torch.empty(1000, 128, dtype=dtype), offsets)
    voxelize.segment_max_backward(out, row, index)


def launch_tile_sparse(name: str) -> None:
    layout, D, dtype = SPARSE[name]
    q = torch.empty(1, layout.tokens, 2, D, dtype=dtype).transpose(1, 2)
    settings = (torch.zeros(2, dtype=torch.int32), pattern_table([Diagonal(1)], layout), layout, None, D**-0.5)
    out, lse = tile_sparse.forward(q, q, q, *settings)
    tile_sparse.backward(out, q, q, q, out, lse, *settings)


def launch_scatter_linear(name: str) -> None:
    D, dtype, permuted = SCATTER[name]
    q, k, v = torch.empty(24645, 3, 4, D, dtype=dtype).unbind(1)
    settings = (torch.zeros(401, dtype=torch.int32), torch.arange(24645) if permuted else None, 1e-6, True)
    out = scatter_linear.forward(q, k, v, *settings)
    scatter_linear.backward(out, q, k, v, *settings)


def launch_sparse_conv(name: str) -> None:
    K, cin, cout, dtype, mirror = SPARSE_CONV[name]
    N, table, tiles = 21823, torch.empty(K, 21823, dtype=torch.int32), torch.empty(341, 1 + K + 64, dtype=torch.int32)
    x, weight, bias = (torch.empty(size, dtype=dtype) for size in ((N, cin), (cout, K, cin), (cout,)))
    out = sparse_conv.convolve(x, weight, bias, table, tiles, False, False)
    sparse_conv.backward(out, x, weight, table, tiles, table, tiles, mirror)


def launch_sparse_depthwise() -> None:
    x, table = torch.empty(24645, 128, dtype=torch.bfloat16), torch.empty(53, 24645, dtype=torch.int32)
    weight, taps = torch.empty(53, 32, dtype=torch.bfloat16), [27, 13, 13]
    triton_depthwise.convolve(x, weight, table, taps, True, False)
    triton_depthwise.convolve(x, weight, table, taps, True, True)
    triton_depthwise.weight_gradient(x, x, table, taps, 32)
    keys, coords = torch.empty(24645, dtype=torch.int64), torch.empty(24645, 4, dtype=torch.int32)
    grid = SiteGrid(1, (16, 480, 480), (12, 12))
    triton_neighbours.neighbour_table(keys, coords, (3, 3, 3), (1, 1, 1), (1, 1, 1), False, grid)
    triton_neighbours.neighbour_table(keys, coords, (3, 3, 3), (2, 2, 2), (1, 1, 1), True, grid)
    triton_tiles.build_tiles(table[:27], (3, 3, 3), 64)
    triton_sites.number_cells(coords, grid)
    triton_sites.coarser_sites(coords, (3, 3, 3), (2, 2, 2), (1, 1, 1), grid, 20480)
    triton_sites.find_pillars(keys, coords, grid, 8192)
    rows, place = torch.empty(8192, 10, dtype=torch.int64), torch.empty(10, 128, dtype=torch.bfloat16)
    triton_pillars.pillar_max(x, rows)
    triton_pillars.pillar_attention(x[:8192], x, x, place, rows, 8)


def launch_selection(name: str) -> None:
    T, heads, D, grid, exact, dtype = SELECTIONS[name]
    token_select.cls_attention(
        torch.empty(5, heads * D, dtype=dtype), torch.empty(5, T, heads * D, dtype=dtype), heads, 1.0
    )
    plan = plan_of([grid] * 2, T - T % 2, exact=exact)
    scores = torch.empty(len(plan.image), T - T % 2)
    token_select.token_select(scores, scores, plan)


def check(launches: list, arch: int, folder: Path) -> None:
    assert launches
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs, arch)
        stack = spilled_bytes(compiled, folder)
        allowed = SPILLS.get(kernel.__name__, SPILLS_SM80.get(kernel.__name__, 0) if arch == 80 else 0)
        assert stack <= allowed, f"{kernel.__name__} spills {stack} bytes on sm_{arch}, {allowed} are known"
        assert compiled.metadata.tmem_size <= TENSOR_MEMORY, f"{kernel.__name__} needs too much tensor memory"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", STAGES)
def test_attention_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_attention(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [3, 5])
def test_convolution_compiles(kernel: int, arch: int, launches: list, tmp_path: Path) -> None:
    launch_convolution(kernel)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", AGENT_STAGES)
def test_agents_compile(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_agents(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", HALO_STAGES)
def test_halo_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_halo(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FACTORIZED)
def test_factorized_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_factorized(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("candidates", [500, 2048, 4096, 8192])
def test_rotated_suppression_compiles(candidates: int, arch: int, launches: list, tmp_path: Path) -> None:
    boxes = torch.empty(2, candidates, 5)
    rotated.nms(boxes, torch.empty(2, dtype=torch.int32), torch.empty(2))
    rotated.overlap(boxes[0], boxes[1], False)
    rotated.overlap(boxes[0], boxes[1], True)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bias_and_relu_compiles(arch: int, launches: list, tmp_path: Path) -> None:
    x, bias = torch.empty(468, 468, 384, dtype=torch.float16), torch.empty(384, dtype=torch.float16)
    bias_relu.bias_relu_(x, bias, None, False)
    bias_relu.bias_relu_(x, bias, x, True)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FLAT)
def test_flat_window_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_flat_window(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("order", "dtype"), [("zyx", torch.float32), ("xyz", torch.bfloat16)])
def test_voxelize_compiles(order: str, dtype: torch.dtype, arch: int, launches: list, tmp_path: Path) -> None:
    launch_voxelize(order, dtype)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SPARSE)
def test_tile_sparse_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_tile_sparse(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SCATTER)
def test_scatter_linear_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_scatter_linear(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SPARSE_CONV)
def test_sparse_conv_compiles(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_sparse_conv(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sparse_depthwise_and_neighbours_compile(arch: int, launches: list, tmp_path: Path) -> None:
    launch_sparse_depthwise()
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_compile(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    launch_selection(name)
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "small"])
def test_tile_sparse_compiles_in_fp8(name: str, arch: int, launches: list, tmp_path: Path) -> None:
    layout, D, dtype = SPARSE[name]
    q = torch.empty(1, layout.tokens, 2, D, dtype=dtype).transpose(1, 2)
    settings = (torch.zeros(2, dtype=torch.int32), pattern_table([Diagonal(1)], layout), layout, None, D**-0.5)
    tile_sparse.forward(q, q, q, *settings, fp8=True)
    assert len(launches) == 2
    check(launches, arch, tmp_path)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
@pytest.mark.parametrize("keys", [64, 128])
def test_tile_sparse_compiles_for_hopper(
    name: str, keys: int, launches: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "can_run", lambda *args: True)
    layout, *rest = SPARSE[name]
    monkeypatch.setitem(SPARSE, name, (replace(layout, tile=(128, keys)), *rest))
    launch_tile_sparse(name)
    names = [launch[0].__name__ for launch in launches[:2]]
    assert names == ["_token_major_kernel", "_tile_sparse_specialised_kernel"]
    check(launches[:2], 90, tmp_path)
