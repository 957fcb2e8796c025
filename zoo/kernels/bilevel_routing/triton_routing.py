"""Triton kernels of region routing, then their launchers: means, top-k, and the transposed graph.

Also what these share with the attention kernels in `triton.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.bilevel_routing.reference import region_grid


@triton.jit
def divide(x, n):
    """floor(x / n) of small non-negative integers; the half keeps rounding away from the boundary."""
    return ((x.to(tl.float32) + 0.5) / n.to(tl.float32)).to(tl.int32)


@triton.jit(do_not_specialize=["entries", "kv_regions", "topk"])
def _transpose_graph_kernel(
    index_ptr, reader_ptr, reader_start_ptr, entries, kv_regions, topk, BLOCK: tl.constexpr
):  # fmt: skip
    """CSR of the transposed routing graph: which query regions read region r, in ascending order.

    One program handles one (graph, r): it counts the entries below r to find its place and writes its own.
    """
    r = tl.program_id(0)
    graph = tl.program_id(1).to(tl.int64)
    index_ptr += graph * entries
    below = 0
    for start in range(0, entries, BLOCK):
        e = start + tl.arange(0, BLOCK)
        value = tl.load(index_ptr + e, mask=e < entries, other=2147483647)
        below += tl.sum((value < r).to(tl.int32))
    place = below
    for start in range(0, entries, BLOCK):
        e = start + tl.arange(0, BLOCK)
        hit = tl.load(index_ptr + e, mask=e < entries, other=2147483647) == r
        position = place + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(reader_ptr + graph * entries + position, divide(e, topk), mask=hit)
        place += tl.sum(hit.to(tl.int32))
    start_ptr = reader_start_ptr + graph * (kv_regions + 1)
    tl.store(start_ptr + r, below)
    if r == kv_regions - 1:
        tl.store(start_ptr + kv_regions, place)


@triton.jit
def _mean_of_region(ptr, stride_h, stride_w, region, H, W, RH, RW, c, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    grid_w = tl.cdiv(W, RW)
    top = (region // grid_w) * RH
    left = (region % grid_w) * RW
    width = tl.minimum(RW, W - left)
    tokens = tl.minimum(RH, H - top) * width
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        t_row = divide(t, width)
        offset = (top + t_row) * stride_h + (left + t - t_row * width) * stride_w
        mask = (t < tokens)[:, None] & (c < C)[None, :]
        x = tl.load(ptr + offset[:, None] + c[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    return total / tokens.to(tl.float32)


@triton.jit(do_not_specialize=["H", "W", "RH", "RW", "KH", "KW", "KRH", "KRW", "regions", "kv_regions"])
def _region_mean_kernel(
    q_ptr, k_ptr, q_mean_ptr, k_mean_ptr,
    q_stride_b, q_stride_h, q_stride_w, k_stride_b, k_stride_h, k_stride_w,
    H, W, RH, RW, KH, KW, KRH, KRW, regions, kv_regions,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean query and mean key of one region over its tokens on the map, in float32."""
    region = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    if region < regions:
        mean = _mean_of_region(
            q_ptr + b * q_stride_b, q_stride_h, q_stride_w, region, H, W, RH, RW, c, C, BLOCK_T, BLOCK_C
        )  # fmt: skip
        tl.store(q_mean_ptr + (b * regions + region) * C + c, mean, mask=c < C)
    if region < kv_regions:
        mean = _mean_of_region(
            k_ptr + b * k_stride_b, k_stride_h, k_stride_w, region, KH, KW, KRH, KRW, c, C, BLOCK_T, BLOCK_C
        )  # fmt: skip
        tl.store(k_mean_ptr + (b * kv_regions + region) * C + c, mean, mask=c < C)


@triton.jit(do_not_specialize=["regions", "kv_regions"])
def _top_regions_kernel(
    q_mean_ptr, k_mean_ptr, index_ptr, weight_ptr, regions, kv_regions, scale,
    C: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Affinities of BLOCK_M query regions to all regions in float32, then the top-k and their softmax.

    The k largest are taken one by one (the lowest region first among equals): k passes over a row that is
    in registers cost less than sorting it.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    logits = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        q = tl.load(
            q_mean_ptr + (b * regions + m[:, None]) * C + c[None, :],
            mask=(m < regions)[:, None] & (c < C)[None, :], other=0.0,
        )  # fmt: skip
        k = tl.load(
            k_mean_ptr + (b * kv_regions + r[None, :]) * C + c[:, None],
            mask=(r < kv_regions)[None, :] & (c < C)[:, None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(q, k, logits, input_precision="ieee")
    # A NaN would be passed over by the maximum and leave a row without a region.
    logits = tl.where(logits == logits, logits * scale, -3.0e38)
    logits = tl.where((r < kv_regions)[None, :], logits, float("-inf"))

    slot = tl.arange(0, BLOCK_K)
    values = tl.full([BLOCK_M, BLOCK_K], float("-inf"), tl.float32)
    indices = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    for i in range(TOPK):
        best, where = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
        values = tl.where((slot == i)[None, :], best[:, None], values)
        indices = tl.where((slot == i)[None, :], where[:, None], indices)
        logits = tl.where(r[None, :] == where[:, None], float("-inf"), logits)
    weight = tl.exp(values - tl.max(values, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    offset = (b * regions + m[:, None]) * TOPK + slot[None, :]
    mask = (m < regions)[:, None] & (slot < TOPK)[None, :]
    tl.store(index_ptr + offset, indices, mask=mask)
    tl.store(weight_ptr + offset, weight, mask=mask)


def unit_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def transpose_graph(index: Tensor, kv_regions: int) -> tuple[Tensor, Tensor]:
    """CSR of the transposed graph: readers [graphs, G*K] and row starts [graphs, R + 1], int32."""
    graphs, topk = index.numel() // (index.shape[-1] * index.shape[-2]), index.shape[-1]
    entries = index.shape[-2] * topk
    reader = torch.empty(graphs, entries, dtype=torch.int32, device=index.device)
    start = torch.empty(graphs, kv_regions + 1, dtype=torch.int32, device=index.device)
    block = min(1024, triton.next_power_of_2(entries))
    _transpose_graph_kernel[(kv_regions, graphs)](index, reader, start, entries, kv_regions, topk, BLOCK=block)
    return reader, start


def route(
    q: Tensor, k: Tensor, region: list[int], kv_region: list[int], topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the two routing kernels: index [B, G, K] int32 and weight [B, G, K] float32."""
    q, k = unit_channels(q), unit_channels(k)
    B, H, W, C = q.shape
    KH, KW = k.shape[1:3]
    (rows, cols), (kv_rows, kv_cols) = region_grid((H, W), region), region_grid((KH, KW), kv_region)
    regions, kv_regions = rows * cols, kv_rows * kv_cols
    q_mean = torch.empty(B, regions, C, dtype=torch.float32, device=q.device)
    k_mean = torch.empty(B, kv_regions, C, dtype=torch.float32, device=q.device)
    index = torch.empty(B, regions, topk, dtype=torch.int32, device=q.device)
    weight = torch.empty(B, regions, topk, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return index, weight
    tokens = max(region[0] * region[1], kv_region[0] * kv_region[1])
    block_c = min(128, triton.next_power_of_2(C))
    block_t = min(triton.next_power_of_2(tokens), 4096 // block_c)
    _region_mean_kernel[(max(regions, kv_regions), triton.cdiv(C, block_c), B)](
        q, k, q_mean, k_mean, *q.stride()[:3], *k.stride()[:3],
        H, W, *region, KH, KW, *kv_region, regions, kv_regions,
        C=C, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=1,
    )  # fmt: skip
    block_r = max(16, triton.next_power_of_2(kv_regions))
    _top_regions_kernel[(triton.cdiv(regions, 16), B)](
        q_mean, k_mean, index, weight, regions, kv_regions, scale,
        C=C, TOPK=topk, BLOCK_M=16, BLOCK_R=block_r, BLOCK_C=max(16, min(32, triton.next_power_of_2(C))),
        BLOCK_K=triton.next_power_of_2(topk), num_warps=1 if block_r <= 64 else 4 if block_r <= 256 else 8,
    )  # fmt: skip
    return index, weight
