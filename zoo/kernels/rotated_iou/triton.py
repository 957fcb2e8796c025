"""Triton kernels of rotated overlap and suppression, then their launchers. The formula is `reference.overlap`'s."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = tl.constexpr(32)
TINY = tl.constexpr(1e-30)
EPSILON = tl.constexpr(1e-8)
ROWS = 32
PAIR_ROWS = 16
ALIGNED = 128


@triton.jit
def _clamp(x, limit):
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _edge(x0, y0, x1, y1, w, h):
    """Integral of clamp(x, -w, w) dy over the part of the edge with |y| <= h."""
    dx, dy = x1 - x0, y1 - y0
    start, end = _clamp(y0, h), _clamp(y1, h)
    divisor = tl.where(tl.abs(dy) < TINY, 1.0, dy)
    xs = x0 + tl.minimum(tl.maximum((start - y0) / divisor, 0.0), 1.0) * dx
    xe = x1 - tl.minimum(tl.maximum((y1 - end) / divisor, 0.0), 1.0) * dx
    cs, ce = _clamp(xs, w), _clamp(xe, w)
    run = tl.abs(xe - xs)
    shares = (tl.abs(cs - xs) - tl.abs(xe - ce)) / tl.where(run < TINY, 1.0, run)
    return (end - start) * 0.5 * (cs + ce + shares * (cs - ce))


@triton.jit
def _load(ptr, index, inside):
    """Centre, half sizes, cosine and sine of rectangles; zeros outside."""
    base = ptr + index * 5
    x = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(base + 1, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(base + 2, mask=inside, other=0.0).to(tl.float32) * 0.5
    h = tl.load(base + 3, mask=inside, other=0.0).to(tl.float32) * 0.5
    yaw = tl.load(base + 4, mask=inside, other=0.0).to(tl.float32)
    return x, y, w, h, tl.cos(yaw), tl.sin(yaw)


@triton.jit
def _overlap(ax, ay, aw, ah, acos, asin, bx, by, bw, bh, bcos, bsin):
    """Areas of intersection; the arguments broadcast."""
    rx = bcos * (ax - bx) + bsin * (ay - by)
    ry = bcos * (ay - by) - bsin * (ax - bx)
    cos, sin = acos * bcos + asin * bsin, asin * bcos - acos * bsin
    ux, uy, vx, vy = cos * aw, sin * aw, -sin * ah, cos * ah
    x0, x1, x2, x3 = rx + ux + vx, rx - ux + vx, rx - ux - vx, rx + ux - vx
    y0, y1, y2, y3 = ry + uy + vy, ry - uy + vy, ry - uy - vy, ry + uy - vy
    area = _edge(x0, y0, x1, y1, bw, bh) + _edge(x1, y1, x2, y2, bw, bh)
    area += _edge(x2, y2, x3, y3, bw, bh) + _edge(x3, y3, x0, y0, bw, bh)
    return tl.maximum(area, 0.0)


@triton.jit
def _pairs_kernel(a_ptr, b_ptr, out_ptr, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """out[i, j] = |a_i n b_j|; one program a tile [BLOCK_N, BLOCK_M]. About 150 FLOPs for 4 bytes written."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ax, ay, aw, ah, acos, asin = _load(a_ptr, i, i < N)
    bx, by, bw, bh, bcos, bsin = _load(b_ptr, j, j < M)
    area = _overlap(
        ax[:, None], ay[:, None], aw[:, None], ah[:, None], acos[:, None], asin[:, None],
        bx[None, :], by[None, :], bw[None, :], bh[None, :], bcos[None, :], bsin[None, :],
    )  # fmt: skip
    tl.store(out_ptr + i[:, None] * M + j[None, :], area, mask=(i < N)[:, None] & (j < M)[None, :])


@triton.jit
def _aligned_kernel(a_ptr, b_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out[i] = |a_i n b_i|; one program BLOCK pairs."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ax, ay, aw, ah, acos, asin = _load(a_ptr, i, i < N)
    bx, by, bw, bh, bcos, bsin = _load(b_ptr, i, i < N)
    tl.store(out_ptr + i, _overlap(ax, ay, aw, ah, acos, asin, bx, by, bw, bh, bcos, bsin), mask=i < N)


@triton.jit
def _conflict_kernel(
    boxes_ptr, count_ptr, threshold_ptr, words_ptr, N, words, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Bit j of words[g, i, w]: rectangle i conflicts with 32 * w + j, a later one, by its IoU.

    One program computes BLOCK_N rows of one word, unless all its pairs lie on or below the diagonal, where nothing is
    read later. Most tiles of a large scene have no two circumscribed circles that meet and end after the distances.
    """
    g, word = tl.program_id(2).to(tl.int64), tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    count = tl.minimum(tl.load(count_ptr + g), N)
    if (first >= count) | (word * BITS + BITS <= first):
        return
    rows, cols = first + tl.arange(0, BLOCK_N), word * BITS + tl.arange(0, BITS)
    boxes_ptr += g * N * 5
    ax, ay, aw, ah, acos, asin = _load(boxes_ptr, rows, rows < count)
    bx, by, bw, bh, bcos, bsin = _load(boxes_ptr, cols, cols < count)
    radius = tl.sqrt(aw * aw + ah * ah)[:, None] + tl.sqrt(bw * bw + bh * bh)[None, :]
    far = (ax[:, None] - bx[None, :]) * (ax[:, None] - bx[None, :])
    far += (ay[:, None] - by[None, :]) * (ay[:, None] - by[None, :])
    pairs = (rows[:, None] < cols[None, :]) & (cols < count)[None, :] & (far <= radius * radius)
    bits = tl.zeros([BLOCK_N], tl.int32)
    if tl.max(tl.max(pairs.to(tl.int32), 1), 0) > 0:
        inter = _overlap(
            ax[:, None], ay[:, None], aw[:, None], ah[:, None], acos[:, None], asin[:, None],
            bx[None, :], by[None, :], bw[None, :], bh[None, :], bcos[None, :], bsin[None, :],
        )  # fmt: skip
        union = (4 * aw * ah)[:, None] + (4 * bw * bh)[None, :] - inter
        meet = pairs & (inter > tl.load(threshold_ptr + g) * tl.maximum(union, EPSILON))
        # Each bit occurs once: their sum is their union.
        bits = tl.sum(meet.to(tl.int32) << tl.arange(0, BITS)[None, :], 1)
    tl.store(words_ptr + (g * words * BITS + rows) * words + word, bits)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _greedy_kernel(
    words_ptr, count_ptr, keep_ptr, N, words, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Keep a rectangle unless a kept one before it conflicts with it; one program a group.

    32 rectangles at a time. Those that earlier chunks removed are out; within the chunk the rule is applied to all 32
    at once until nothing changes (`reference.greedy`), a reduction a round and two or three rounds as a rule; then the
    kept rows are joined to what is removed. Rows of a chunk are read whatever their fate, one chunk ahead.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(count_ptr + g), N)
    row, word = tl.arange(0, BITS), tl.arange(0, BLOCK_W)
    words_ptr += g * words * BITS * words
    removed = tl.zeros([BLOCK_W], tl.int32)
    chunks = tl.cdiv(count, BITS)
    own = tl.load(words_ptr + row * words, mask=row < count, other=0)
    tile_ptr = words_ptr + row[:, None] * words + word[None, :]
    tile = tl.load(tile_ptr, mask=(row < count)[:, None] & ((word > 0) & (word < words))[None, :], other=0)
    for c in range(0, chunks):
        ahead = (c + 1) * BITS + row
        more = ahead < count
        next_own = tl.load(words_ptr + ahead * words + c + 1, mask=more, other=0)
        later = (word > c + 1) & (word < words)
        next_tile = tl.load(tile_ptr + (c + 1) * BITS * words, mask=more[:, None] & later[None, :], other=0)

        candidates = ~tl.sum(tl.where(word == c, removed, 0), 0)
        keep = candidates
        before = ~keep
        while keep != before:
            before = keep
            hit = tl.reduce(tl.where(((keep >> row) & 1) != 0, own, 0), 0, _or)
            keep = candidates & ~hit
        kept = ((keep >> row) & 1) != 0
        removed |= tl.reduce(tl.where(kept[:, None], tile, 0), 0, _or)
        tl.store(keep_ptr + g * N + c * BITS + row, kept, mask=c * BITS + row < count)
        own, tile = next_own, next_tile


def overlap(a: Tensor, b: Tensor, aligned: bool) -> Tensor:
    """[N, 5] and [M, 5] -> float32 [N, M], or [N] for pairs of equal position."""
    a, b = a.contiguous(), b.contiguous()
    N, M = len(a), len(b)
    out = torch.empty((N,) if aligned else (N, M), dtype=torch.float32, device=a.device)
    if out.numel() == 0:
        return out
    if aligned:
        _aligned_kernel[(triton.cdiv(N, ALIGNED),)](a, b, out, N, BLOCK=ALIGNED, num_warps=4)
    else:
        grid = (triton.cdiv(N, PAIR_ROWS), triton.cdiv(M, ROWS))
        _pairs_kernel[grid](a, b, out, N, M, BLOCK_N=PAIR_ROWS, BLOCK_M=ROWS, num_warps=4)
    return out


def nms(boxes: Tensor, count: Tensor, threshold: Tensor) -> Tensor:
    """Two launches, no synchronisation; see `reference.nms`."""
    boxes, (G, N, _) = boxes.contiguous(), boxes.shape
    keep = torch.zeros((G, N), dtype=torch.bool, device=boxes.device)
    if keep.numel() == 0:
        return keep
    words = triton.cdiv(N, BITS.value)
    # [G, rows, words]; what lies below the diagonal is neither written nor read.
    conflict = torch.empty((G, words * BITS.value, words), dtype=torch.int32, device=boxes.device)
    grid = (triton.cdiv(N, ROWS), words, G)
    _conflict_kernel[grid](boxes, count, threshold, conflict, N, words, BLOCK_N=ROWS, num_warps=4)
    block = max(32, triton.next_power_of_2(words))
    _greedy_kernel[(G,)](
        conflict, count, keep.view(torch.uint8), N, words, BLOCK_W=block, num_warps=1 if block <= 64 else 4
    )
    return keep
