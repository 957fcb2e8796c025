"""Halo attention in plain PyTorch: the definition, the CPU path and the test oracle.

Maps are channels-last, [B, H, W, C]. The map is covered by ceil(H / b) x ceil(W / b) blocks of side b, numbered
row-major. The window of a block is the block and `halo` pixels on each side, w = b + 2 * halo pixels wide. Pixels
outside the map are zero keys and values; their position logits are not zero, and they take part in the softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Sizes that blocks and windows follow from."""

    heads: int
    block: int
    halo: int
    stride: int  # of the queries

    @property
    def window(self) -> int:
        """Side of a window in pixels."""
        return self.block + 2 * self.halo

    @property
    def side(self) -> int:
        """Side of a block in queries."""
        return self.block // self.stride


def block_grid(size: tuple[int, int], block: int) -> tuple[int, int]:
    """Rows and columns of blocks that cover a map."""
    return -(-size[0] // block), -(-size[1] // block)


def query_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width of the query map that belongs to a map of keys."""
    return -(-size[0] // stride), -(-size[1] // stride)


def to_blocks(x: Tensor, grid: tuple[int, int], side: int, heads: int) -> Tensor:
    """[B, H, W, M*D] -> [B, M, G, Y, X, D]; queries outside the map are zero."""
    (rows, cols), (_, H, W, _) = grid, x.shape
    x = F.pad(x, (0, 0, 0, cols * side - W, 0, rows * side - H))
    x = (
        x.unflatten(-1, (heads, -1)).unflatten(2, (cols, side)).unflatten(1, (rows, side))
    )  # [B, rows, Y, cols, X, M, D]
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 3)


def from_blocks(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[B, M, G, Y, X, D] -> [B, H, W, M*D], dropping queries outside the map."""
    x = x.unflatten(2, grid).permute(0, 2, 4, 3, 5, 1, 6)  # [B, rows, Y, cols, X, M, D]
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def _padding(size: tuple[int, int], block: int, halo: int) -> tuple[int, ...]:
    """Arguments of `F.pad` that give every block of a channels-last map its window."""
    rows, cols = block_grid(size, block)
    return 0, 0, halo, cols * block - size[1] + halo, halo, rows * block - size[0] + halo


def to_windows(x: Tensor, block: int, halo: int, heads: int) -> Tensor:
    """[B, H, W, M*D] -> [B, M, G, w*w, D], zero outside the map."""
    window = block + 2 * halo
    x = F.pad(x, _padding((x.shape[1], x.shape[2]), block, halo))
    x = x.unflatten(-1, (heads, -1)).unfold(1, window, block).unfold(2, window, block)  # [B, rows, cols, M, D, w, w]
    return x.permute(0, 3, 1, 2, 5, 6, 4).flatten(4, 5).flatten(2, 3)


def add_windows(x: Tensor, block: int, halo: int, size: tuple[int, int]) -> Tensor:
    """Transpose of `to_windows`: [B, M, G, w*w, D] -> [B, H, W, M*D], summing what windows share."""
    (rows, cols), window = block_grid(size, block), block + 2 * halo
    B, M, G, L, D = x.shape
    x = x.permute(0, 1, 4, 3, 2).reshape(B, M * D * L, G)
    padded = (rows * block + 2 * halo, cols * block + 2 * halo)
    x = F.fold(x, padded, window, stride=block)  # [B, M*D, H', W']
    return x[:, :, halo : halo + size[0], halo : halo + size[1]].permute(0, 2, 3, 1)


def inside(size: tuple[int, int], block: int, halo: int, device: torch.device) -> Tensor:
    """[G, w*w] bool: which pixels of which window lie on the map."""
    return to_windows(torch.ones(1, *size, 1, device=device), block, halo, 1)[0, 0, :, :, 0] > 0


def relative_index(side: int, window: int, device: torch.device) -> Tensor:
    """[Y, w] row of the table for a query and a key of the window; coordinates count from each one's own corner."""
    query, key = torch.arange(side, device=device), torch.arange(window, device=device)
    return key - query[:, None] + window - 1


def position_logits(q: Tensor, height_rel: Tensor, width_rel: Tensor, window: int) -> Tensor:
    """[B, M, G, Y, X, D] -> [B, M, G, Y*X, w*w]: q . height_rel[ky - qy + w - 1] + q . width_rel[kx - qx + w - 1]."""
    index = relative_index(q.shape[-2], window, q.device)
    rows = torch.einsum("...yxd,ykd->...yxk", q, height_rel[index])  # [B, M, G, Y, X, w]
    cols = torch.einsum("...yxd,xkd->...yxk", q, width_rel[index])
    return (rows[..., :, None] + cols[..., None, :]).flatten(5, 6).flatten(3, 4)


def halo_attention(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    geometry: Geometry,
    scale: float,
    scale_position: bool = False,
    mask_border: bool = False,
) -> Tensor:
    """softmax(scale * q k^T + position) v for each block of queries and its window; see `op.halo_attention`."""
    probabilities, _, _, v = _attend(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border)
    out = (probabilities @ v).unflatten(3, (geometry.side, -1))  # [B, M, G, Y, X, D]
    size = (kv.shape[1], kv.shape[2])
    return from_blocks(out, block_grid(size, geometry.block), (q.shape[1], q.shape[2]))


def _attend(
    q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, geometry: Geometry,
    scale: float, scale_position: bool, mask_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Probabilities [B, M, G, Y*X, w*w], blocks of queries [B, M, G, Y, X, D], windows of keys and of values."""
    heads, block, halo, _ = geometry
    size = (kv.shape[1], kv.shape[2])
    qb = to_blocks(q, block_grid(size, block), geometry.side, heads)
    D = qb.shape[-1]
    k, v = to_windows(kv, block, halo, heads).split((D, kv.shape[-1] // heads - D), -1)  # [B, M, G, w*w, D]
    content = (qb.flatten(3, 4) @ k.transpose(-1, -2)) * scale
    position = position_logits(qb, height_rel, width_rel, geometry.window)
    logits = content + (position * scale if scale_position else position)
    if mask_border:
        keep = inside(size, block, halo, q.device)[:, None]  # [G, 1, w*w]
        # Queries outside the map may see no key; they are dropped later, and must not become NaN.
        logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
    return logits.softmax(-1), qb, k, v


def halo_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    geometry: Geometry,
    scale: float,
    scale_position: bool = False,
    mask_border: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `halo_attention` with respect to q, kv and the two tables, written out.

    Autograd does not reach inside a registered op; elsewhere it differentiates the forward by itself.
    """
    heads, block, halo, _ = geometry
    size, side, window = (kv.shape[1], kv.shape[2]), geometry.side, geometry.window
    grid = block_grid(size, block)
    p, qb, k, v = _attend(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border)
    do = to_blocks(grad, grid, side, heads).flatten(3, 4)  # [B, M, G, Y*X, D']
    dp = do @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = (ds.transpose(-1, -2) @ qb.flatten(3, 4)) * scale, p.transpose(-1, -2) @ do
    dkv = add_windows(torch.cat((dk, dv), -1), block, halo, size)

    dposition = ds.unflatten(-1, (window, window)).unflatten(3, (side, side))  # [B, M, G, Y, X, w, w]
    drows, dcols = (dposition.sum(axis) * (scale if scale_position else 1) for axis in (-1, -2))
    index = relative_index(side, window, q.device)
    dq = ((ds @ k) * scale).unflatten(3, (side, side))
    dq = dq + torch.einsum("...yxk,ykd->...yxd", drows, height_rel[index])
    dq = dq + torch.einsum("...yxk,xkd->...yxd", dcols, width_rel[index])

    def table(gradient: Tensor) -> Tensor:
        """Sum [Y, w, D] over pairs of equal distance: [2*w - 1, D]"""
        return torch.zeros_like(height_rel).index_add(0, index.flatten(), gradient.flatten(0, 1).to(height_rel.dtype))

    dheight = table(torch.einsum("bmgyxk,bmgyxd->ykd", drows, qb))
    dwidth = table(torch.einsum("bmgyxk,bmgyxd->xkd", dcols, qb))
    return from_blocks(dq, grid, (q.shape[1], q.shape[2])), dkv, dheight, dwidth
