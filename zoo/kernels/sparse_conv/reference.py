"""Sparse convolution in plain PyTorch: the definition, the CPU path and the test oracle.

A table of neighbours [K, N] names, for each of K taps and N output sites, the row of the input site that the tap meets,
or -1. Taps of a kernel [KZ, KY, KX] are numbered with the last axis fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SiteGrid(NamedTuple):
    """Cells of a batch, numbered window by window.

    The map is cut to windows of `window` = (rows, columns) cells, over all heights, numbered sample by sample and row
    by row. Within a window z runs fastest, then y, then x. A window as large as the map gives the order x, y, z.
    """

    batch_size: int
    shape: tuple[int, int, int]  # cells along z, y, x
    window: tuple[int, int]  # along y, x

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows of a sample."""
        return -(-self.shape[1] // self.window[0]), -(-self.shape[2] // self.window[1])

    @property
    def volume(self) -> int:
        """Cells of a window."""
        return self.shape[0] * self.window[0] * self.window[1]

    @property
    def count(self) -> int:
        """Windows of the batch."""
        return self.batch_size * self.windows[0] * self.windows[1]

    @property
    def end(self) -> int:
        """The number of padding, one beyond the last cell."""
        return self.count * self.volume

    def parts(self, b: Tensor, z: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summands of the numbers of cells, int64: one for each coordinate."""
        (rows, cols), (TY, TX) = self.windows, self.window
        b, z, y, x = (c.long() for c in (b, z, y, x))
        return (
            b * (rows * cols * self.volume),
            z,
            y // TY * (cols * self.volume) + y % TY * self.shape[0],
            x // TX * self.volume + x % TX * (TY * self.shape[0]),
        )

    def encode(self, coords: Tensor) -> Tensor:
        """Numbers of cells [..., 4] = (sample, z, y, x), int64; those of sample `batch_size` are padding."""
        return sum(self.parts(*coords.unbind(-1))).clamp(max=self.end)

    def decode(self, keys: Tensor) -> Tensor:
        """Cells of numbers, int32 [N, 4]; padding has sample `batch_size`."""
        (rows, cols), (TY, TX), Z = self.windows, self.window, self.shape[0]
        window, cell = keys // self.volume, keys % self.volume
        y = window // cols % rows * TY + cell // Z % TY
        x = window % cols * TX + cell // (Z * TY)
        return torch.stack((window // (rows * cols), cell % Z, y, x), 1).int()


def neighbour_table(
    keys: Tensor,
    coords: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool,
    grid: SiteGrid,
) -> Tensor:
    """int32 [K, N] row of `keys` that tap k of site n meets, or -1.

    Tap k of an output site o meets the input cell o * stride - padding + k; `transposed` asks for the output cell
    (i + padding - k) / stride whose tap k meets input cell i.
    """
    device = coords.device
    b, query, valid = coords[:, 0], [], coords[:, 0] < grid.batch_size  # [N]
    for axis in range(3):
        tap = torch.arange(kernel[axis], device=device)[:, None]
        cell = coords[:, axis + 1].long()
        if transposed:
            cell = cell + padding[axis] - tap
            inside, cell = cell % stride[axis] == 0, cell.div(stride[axis], rounding_mode="floor")
        else:
            cell = cell * stride[axis] - padding[axis] + tap
            inside = torch.ones_like(cell, dtype=torch.bool)
        inside = inside & (cell >= 0) & (cell < grid.shape[axis])
        shape = [1, 1, 1, len(coords)]
        shape[axis] = kernel[axis]
        query.append(cell.clamp(min=0).view(shape))
        valid = valid & inside.view(shape)
    key = sum(grid.parts(b, *query)).where(valid, -1).flatten(0, 2)  # [K, N]
    if len(keys) == 0:
        return key.new_full(key.shape, -1, dtype=torch.int32)
    row = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
    return row.where(keys[row] == key, -1).int()


def _with_zero(x: Tensor) -> Tensor:
    """A row of zeros behind the last one, which the index -1 takes."""
    return torch.cat((x, x.new_zeros(1, x.shape[1])))


def sparse_conv(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
    """out[n] = bias + sum over taps k of weight[:, k] x[table[k, n]]; weight is [Cout, K, Cin]."""
    met = _with_zero(x)[table.t().long().contiguous()]  # [N, K, Cin]
    out = met.flatten(1) @ weight.flatten(1).t()
    return out if bias is None else out + bias


def sparse_conv_backward(grad: Tensor, x: Tensor, weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `sparse_conv` with respect to x and weight, written out."""
    rows = table.t().long().contiguous()
    dweight = (grad.t() @ _with_zero(x)[rows].flatten(1)).view(weight.shape)
    dmet = (grad @ weight.flatten(1)).unflatten(1, weight.shape[1:])  # [N, K, Cin]
    # What met no site goes to rows behind the last one, a row for each site: a GPU would add to a single one in turn.
    beyond = len(x) + torch.arange(len(rows), device=x.device)
    rows = rows.where(rows >= 0, beyond[:, None]).flatten()
    dx = x.new_zeros(len(x) + len(beyond), x.shape[1]).index_add(0, rows, dmet.flatten(0, 1))
    return dx[: len(x)], dweight


def sparse_depthwise_conv(
    x: Tensor, weight: Tensor, table: Tensor, taps: Sequence[int], residual: bool, mirror: bool = False
) -> Tensor:
    """Depth-wise convolutions of groups of channels, each with its own kernel; see `op.sparse_depthwise_conv`."""
    D, parts = weight.shape[1], []
    groups = x.split(D, 1)
    weights, tables = weight.split(list(taps)), table.t().long().contiguous().split(list(taps), 1)
    for group, own, rows in zip(groups, weights, tables, strict=False):
        own = own.flip(0) if mirror else own
        parts.append((_with_zero(group)[rows] * own).sum(1))  # [N, T, D] -> [N, D]
    out = torch.cat((*parts, *groups[len(parts) :]), 1)
    return out + x if residual else out


def sparse_depthwise_weight_gradient(grad: Tensor, x: Tensor, table: Tensor, taps: Sequence[int], D: int) -> Tensor:
    """[T, D] sum over sites of the gradient times the neighbour."""
    padded, out = _with_zero(x), []
    for g, tables in enumerate(table.long().split(list(taps))):
        channels = slice(g * D, (g + 1) * D)
        out += [(grad[:, channels] * padded[rows, channels]).sum(0) for rows in tables.unbind(0)]
    return torch.stack(out)


def pillar_max(x: Tensor, rows: Tensor) -> Tensor:
    """Maximum of each pillar's sites and 0, [P, C]; see `pillars.pillar_max`."""
    return _of_cells(x, _cells_of(len(x), rows), rows.shape).max(1).values.relu()


def _cells_of(sites: int, rows: Tensor) -> Tensor:
    """int64 [sites] the cell of each site, counted over all pillars; P * Z for a site of no pillar."""
    cells = rows.new_full((sites + 1,), rows.numel())
    cells[rows.flatten()] = torch.arange(rows.numel(), device=rows.device)
    return cells[:-1]


def _of_cells(x: Tensor, cells: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of sites [N, C] in the cells of their pillars [P, Z, C], zeros between.

    Sites are written to their cells, as each lies in one at most. Reading them from there gives the same values, but a
    gradient that adds up the reads of the row of zeros, most cells being empty, one by one.
    """
    # Sites of no pillar, if any, meet in a last row, which is dropped.
    out = x.new_zeros(shape[0] * shape[1] + 1, x.shape[1]).index_copy_(0, cells, x)
    return out[:-1].unflatten(0, tuple(shape))


def pillar_attention(q: Tensor, k: Tensor, v: Tensor, place: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Attention of one query a pillar to its sites, [P, C]; see `pillars.pillar_attention`."""
    size = heads, q.shape[1] // heads
    # Sites and heights are added after both were projected: few of a pillar's cells hold a site.
    cells = _cells_of(len(k), rows)
    keys = _of_cells(k, cells, rows.shape) + place  # [P, Z, C]
    # One query a pillar is too little for a matrix product.
    logits = (q[:, None] * keys).unflatten(-1, size).sum(-1) * size[1] ** -0.5  # [P, Z, M]
    empty = rows == len(k)
    # A row of padding has no site, and a softmax over nothing is NaN.
    empty = empty & ~empty.all(1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shares = logits.masked_fill(empty[..., None], float("-inf")).softmax(1).to(v.dtype)
    return (shares[..., None] * _of_cells(v, cells, rows.shape).unflatten(-1, size)).sum(1).flatten(1)
