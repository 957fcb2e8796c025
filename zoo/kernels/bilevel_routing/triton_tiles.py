"""Tokens of regions in Triton: where they lie on the map, and the keys of a query region.

Region arithmetic divides by run-time region sizes through float32, exact for every index up to 2**20 and
without a recompilation for each map size. Images are addressed in int64, tokens within an image in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.bilevel_routing.triton_routing import divide


@triton.jit
def locate(token, region, width, rh, rw):
    """Row and column on a map of that width of token `token` of region `region`."""
    grid_w = tl.cdiv(width, rw)
    region_row = divide(region, grid_w)
    token_row = divide(token, rw)
    row = region_row * rh + token_row
    col = (region - region_row * grid_w) * rw + token - token_row * rw
    return row, col


@triton.jit
def own_tile(
    tile, H, W, RH, RW, regions, stride_h, stride_w, DENSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The tokens that a program owns, of one region or of all regions in order.

    Returns region, position on the map, offset in memory, whether on the map, and whether a token at all.
    """
    tokens = RH * RW
    if DENSE:
        t = tile * BLOCK + tl.arange(0, BLOCK)
        region = divide(t, tokens)
        token = t - region * tokens
        valid = t < regions * tokens
    else:
        blocks = tl.cdiv(tokens, BLOCK)
        token = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)
        region = tl.zeros_like(token) + tile // blocks
        valid = token < tokens
    row, col = locate(token, region, W, RH, RW)
    inside = valid & (row < H) & (col < W)
    return region, row * W + col, row * stride_h + col * stride_w, inside, valid


@triton.jit
def listed_tile(n, list_ptr, total, H, W, RH, RW, stride_h, stride_w):
    """Members n of the tokens of a list of regions: position, offset, whether on the map, whether in the list."""
    tokens = RH * RW
    slot = divide(n, tokens)
    valid = n < total
    region = tl.load(list_ptr + slot, mask=valid, other=0)
    row, col = locate(n - slot * tokens, region, W, RH, RW)
    inside = valid & (row < H) & (col < W)
    return row * W + col, row * stride_h + col * stride_w, inside, valid


@triton.jit
def all_keys(
    list_ptr, topk, KH, KW, KRH, KRW, kv_regions, stride_h, stride_w,
    DENSE: tl.constexpr, MASK_PADDING: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All keys of a tile kernel: region (DENSE only), offset, whether on the map, whether in the softmax."""
    if DENSE:
        region, position, offset, inside, keep = own_tile(
            0, KH, KW, KRH, KRW, kv_regions, stride_h, stride_w, True, BLOCK_N
        )
    else:
        n = tl.arange(0, BLOCK_N)
        position, offset, inside, keep = listed_tile(
            n, list_ptr, topk * KRH * KRW, KH, KW, KRH, KRW, stride_h, stride_w
        )
        region = n
    if MASK_PADDING:
        keep = inside
    return region, offset, inside, keep


@triton.jit
def has_routed(index_ptr, region, valid, other, topk, BLOCK_K: tl.constexpr):
    """[M, N] bool: whether query region m has routed to key region n (below 64), through a word of bits."""
    slot = tl.arange(0, BLOCK_K)
    at = index_ptr + region[:, None] * topk + slot[None, :]
    chosen = tl.load(at, mask=valid[:, None] & (slot < topk)[None, :], other=-1).to(tl.int64)
    one = tl.full(chosen.shape, 1, tl.int64)
    bits = tl.sum(tl.where(chosen >= 0, one << chosen, 0), 1)
    return ((bits[:, None] >> other.to(tl.int64)[None, :]) & 1) != 0
