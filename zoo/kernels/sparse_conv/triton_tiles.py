"""Triton kernels that sort output rows by the taps that they meet and describe tiles of them, then their launcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _distance(tap, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr):
    """Of a tap from the kernel's centre, in half cells."""
    z: tl.constexpr = 2 * (tap // (KY * KX)) - KZ + 1
    y: tl.constexpr = 2 * (tap // KX % KY) - KY + 1
    x: tl.constexpr = 2 * (tap % KX) - KX + 1
    return (z if z > 0 else -z) + (y if y > 0 else -y) + (x if x > 0 else -x)


@triton.jit(do_not_specialize=["N"])
def _tap_bits_kernel(
    table_ptr, bits_ptr, N, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Which taps of BLOCK rows meet a site, a bit each, the farthest from the kernel's centre in the highest bits."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    TAPS: tl.constexpr = KZ * KY * KX
    bits = tl.zeros([BLOCK], bits_ptr.dtype.element_ty)
    for near in tl.static_range(KZ + KY + KX - 2):
        for i in tl.static_range(TAPS):
            if _distance(TAPS - 1 - i, KZ, KY, KX) == KZ + KY + KX - 3 - near:
                at = tl.load(table_ptr + (TAPS - 1 - i) * N.to(tl.int64) + n, mask=n < N, other=-1)
                bits = bits * 2 + (at >= 0).to(bits.dtype)
    tl.store(bits_ptr + n, bits, mask=n < N)


@triton.jit(do_not_specialize=["N"])
def _tiles_kernel(table_ptr, rows_ptr, tiles_ptr, N, TAPS: tl.constexpr, TILE: tl.constexpr):
    """One tile of TILE rows: how many taps it meets, these taps before the others, and the rows; see
    `sites.make_tiles`."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(rows_ptr + i, mask=i < N, other=-1)
    tiles_ptr += tl.program_id(0).to(tl.int64) * (1 + TAPS + TILE)
    tl.store(tiles_ptr + 1 + TAPS + tl.arange(0, TILE), row.to(tl.int32))
    total = 0
    for tap in tl.static_range(TAPS):
        at = tl.load(table_ptr + tap * N.to(tl.int64) + row, mask=i < N, other=-1)
        total += (tl.max(at, 0) >= 0).to(tl.int32)
    met = 0
    for tap in tl.static_range(TAPS):
        # From the cache this time.
        at = tl.load(table_ptr + tap * N.to(tl.int64) + row, mask=i < N, other=-1)
        hit = (tl.max(at, 0) >= 0).to(tl.int32)
        tl.store(tiles_ptr + 1 + tl.where(hit > 0, met, total + tap - met), tap)
        met += hit
    tl.store(tiles_ptr, total)


def build_tiles(table: Tensor, kernel: Sequence[int], tile: int) -> Tensor:
    """Two launches around a sort: int32 [T, 1 + K + tile]."""
    K, N = table.shape
    T = triton.cdiv(N, tile)
    tiles = torch.empty((T, 1 + K + tile), dtype=torch.int32, device=table.device)
    if N == 0:
        return tiles
    bits = torch.empty(N, dtype=torch.int32 if K < 31 else torch.int64, device=table.device)
    KZ, KY, KX = kernel
    _tap_bits_kernel[(triton.cdiv(N, BLOCK),)](table, bits, N, KZ=KZ, KY=KY, KX=KX, BLOCK=BLOCK, num_warps=4)
    rows = bits.sort(stable=True).indices
    _tiles_kernel[(T,)](table, rows, tiles, N, TAPS=K, TILE=tile, num_warps=1)
    return tiles
