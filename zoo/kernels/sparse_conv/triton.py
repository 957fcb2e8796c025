"""Triton kernels of sparse convolution as an implicit matrix product, then their launchers.

No gathered copy of the features is made: a program reads the rows that its taps meet. Tiles of output rows come from
`sites.make_tiles`, sorted such that most taps of the kernel are met by no row of most tiles, and are skipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.sparse_conv.sites import TILE


@triton.jit(do_not_specialize=["N"])
def _sparse_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, table_ptr, tiles_ptr, out_ptr, N, x_row, weight_tap,
    TAPS: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr, WEIGHT_IN: tl.constexpr, WEIGHT_OUT: tl.constexpr,
    MIRROR: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n] = bias + sum over taps k of x[table[k, n]] W_k, W_k [CIN, COUT] read at any strides.

    One program computes BLOCK_N channels of one tile of BLOCK_M rows: for each tap that the tile meets, a product of
    the rows met, zero where there is none, with the tap's weights. The gradient of x is the same sum with the
    transposed table and weights; a sub-manifold kernel's transposed table is its own with the taps reversed (MIRROR).
    Bytes: rows from L2, once for each neighbour, and weights from L2 once a tile. FLOPs: 2 CIN COUT for each row and
    tap of a tile, at K = 27 on LiDAR sweeps about twice those of the neighbours and half those of all taps.
    """
    STEPS: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    tiles_ptr += tl.program_id(0).to(tl.int64) * (1 + TAPS + BLOCK_M)
    met = tl.load(tiles_ptr)
    row = tl.load(tiles_ptr + 1 + TAPS + tl.arange(0, BLOCK_M))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, met * STEPS):
        tap = tl.load(tiles_ptr + 1 + i // STEPS)
        c = i % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        at = tl.load(table_ptr + tap.to(tl.int64) * N + row, mask=row >= 0, other=-1)
        x = tl.load(
            x_ptr + at.to(tl.int64)[:, None] * x_row + c[None, :], mask=(at >= 0)[:, None] & (c < CIN)[None, :],
            other=0.0,
        )  # fmt: skip
        tap = TAPS - 1 - tap if MIRROR else tap
        weight = tl.load(
            weight_ptr + tap * weight_tap + c[:, None] * WEIGHT_IN + n[None, :] * WEIGHT_OUT,
            mask=(c < CIN)[:, None] & (n < COUT)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < COUT, other=0.0).to(tl.float32)[None, :]
    out_ptr += row.to(tl.int64)[:, None] * COUT + n[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(row >= 0)[:, None] & (n < COUT)[None, :])


@triton.jit(do_not_specialize=["N", "tiles", "chunk"])
def _sparse_conv_weight_kernel(
    x_ptr, grad_ptr, table_ptr, tiles_ptr, sums_ptr, N, tiles, chunk, x_row,
    TAPS: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Partial sums of dW_k [COUT, CIN] = sum over rows n of dout[n]^T x[table[k, n]].

    One program computes a block of one tap over `chunk` tiles of rows; the caller adds the chunks, in a fixed order.
    Rows that the tap does not meet are zeros and are not read. FLOPs a program: 2 BLOCK_O BLOCK_I BLOCK_M chunk.
    """
    tap = tl.program_id(0)
    COLS: tl.constexpr = (CIN + BLOCK_I - 1) // BLOCK_I
    o = tl.program_id(1) // COLS * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(1) % COLS * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(2) * chunk
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    table_ptr += tap.to(tl.int64) * N
    for tile in tl.range(first, tl.minimum(first + chunk, tiles)):
        row = tl.load(tiles_ptr + tile * (1 + TAPS + BLOCK_M) + 1 + TAPS + tl.arange(0, BLOCK_M))
        at = tl.load(table_ptr + row, mask=row >= 0, other=-1)
        hit = (at >= 0)[:, None]
        grad = tl.load(
            grad_ptr + row.to(tl.int64)[:, None] * COUT + o[None, :], mask=hit & (o < COUT)[None, :], other=0.0
        )  # fmt: skip
        x = tl.load(x_ptr + at.to(tl.int64)[:, None] * x_row + c[None, :], mask=hit & (c < CIN)[None, :], other=0.0)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision="ieee")
    sums_ptr += ((tl.program_id(2) * COUT + o[:, None]) * TAPS + tap).to(tl.int64) * CIN + c[None, :]
    tl.store(sums_ptr, acc, mask=(o < COUT)[:, None] & (c < CIN)[None, :])


# Programs of the weight gradient that fill a GPU.
PROGRAMS = 512


def _block(channels: int, limit: int) -> int:
    return max(16, min(limit, triton.next_power_of_2(channels)))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tiles: Tensor, transposed: bool, mirror: bool
) -> Tensor:  # fmt: skip
    """Launch the convolution: [N, Cout], contiguous; `transposed` takes weight [Cout, K, Cin] from Cout to Cin."""
    K, N = table.shape
    weight = weight.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    cin, cout = (weight.shape[0], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[0])
    out = torch.empty((N, cout), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    wide = x.dtype == torch.float32
    block_n, block_k = _block(cout, 64 if wide else 128), _block(cin, 32 if wide else 64)
    strides = (weight.stride(0), 1) if transposed else (1, weight.stride(0))
    _sparse_conv_kernel[(triton.cdiv(N, TILE), triton.cdiv(cout, block_n))](
        x, weight, weight if bias is None else bias.contiguous(), table, tiles, out, N, x.stride(0), weight.stride(1),
        TAPS=K, CIN=cin, COUT=cout, WEIGHT_IN=strides[0], WEIGHT_OUT=strides[1], MIRROR=mirror, BIAS=bias is not None,
        BLOCK_M=TILE, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=2 if wide else 4,
    )  # fmt: skip
    return out


def weight_gradient(grad: Tensor, x: Tensor, table: Tensor, tiles: Tensor) -> Tensor:
    """Launch the weight gradient: [Cout, K, Cin] in float32."""
    (K, N), cout, cin = table.shape, grad.shape[1], x.shape[1]
    if N == 0:
        return x.new_zeros((cout, K, cin), dtype=torch.float32)
    x, grad = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, grad.contiguous()))
    limit = 64 if x.dtype == torch.float32 else 128
    block_o, block_i = _block(cout, limit), _block(cin, limit)
    blocks, count = triton.cdiv(cout, block_o) * triton.cdiv(cin, block_i), triton.cdiv(N, TILE)
    chunk = triton.cdiv(count, max(1, PROGRAMS // (K * blocks)))
    chunks = triton.cdiv(count, chunk)
    sums = torch.empty((chunks, cout, K, cin), dtype=torch.float32, device=x.device)
    _sparse_conv_weight_kernel[(K, blocks, chunks)](
        x, grad, table, tiles, sums, N, count, chunk, x.stride(0),
        TAPS=K, CIN=cin, COUT=cout, BLOCK_M=TILE, BLOCK_O=block_o, BLOCK_I=block_i,
        num_warps=8 if block_o * block_i > 4096 else 4, num_stages=2,
    )  # fmt: skip
    return sums[0] if chunks == 1 else sums.sum(0)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, table: Tensor, tiles: Tensor, transposed: Tensor,
    transposed_tiles: Tensor, mirror: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the weight and of a bias."""
    grad = grad.contiguous()
    dx = convolve(grad, weight, None, transposed, transposed_tiles, True, mirror)
    dweight = weight_gradient(grad, x, table, tiles).to(weight.dtype)
    return dx, dweight, grad.sum(0)
