"""Which tokens of a grid are merged, and merging and unmerging them.

Some tokens of the grid, one in each cell, are destinations. Every other token is a source and finds the destination most
similar to it; the sources that fit best are averaged into theirs. Nothing here waits for the device, and no sum depends
on the order in which threads arrive.

Paper: Agent Attention, arXiv:2312.08874, section on Stable Diffusion; Token Merging for Fast Stable Diffusion,
arXiv:2303.17604.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Largest matrix between tokens and destinations that is held at once; larger ones are worked off in parts.
MAX_ELEMENTS = 2**27


def destinations(
    grid: tuple[int, int], cell: tuple[int, int], offsets: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Destination tokens, one in each whole cell of the grid, ascending.

    Args:
        grid: Height and width of the token grid, row-major.
        cell: Height and width of a cell. Cells start at the top left; what is left over has no destination.
        offsets: Position of each destination in its cell, row * cell width + column, [cells down, cells across]; the
            top-left position by default.
        device: Device of the result.

    Returns:
        Token indices [cells down * cells across], int64; empty where no cell fits.
    """
    (H, W), (cell_h, cell_w) = grid, cell
    rows = torch.arange(H // cell_h, device=device)[:, None] * cell_h
    columns = torch.arange(W // cell_w, device=device) * cell_w
    if offsets is None:
        return (rows * W + columns).flatten()
    tokens = (rows + offsets // cell_w) * W + columns + offsets % cell_w
    return tokens.flatten().sort().values


class Match(NamedTuple):
    """Each token's most similar destination.

    Attributes:
        score: Cosine similarity to it [B, N]; -inf for destinations, which are never merged into others.
        target: Its index among the destinations [B, N]; a destination is its own.
        dst: Destination tokens [n].
    """

    score: Tensor
    target: Tensor
    dst: Tensor


def _unit(x: Tensor) -> Tensor:
    """Tokens of length one. A zero token stays zero: it is as similar to one destination as to any other."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


@torch.no_grad()
def match(x: Tensor, dst: Tensor) -> Match:
    """Find each token's most similar destination, by cosine; the first one where several are equal.

    Args:
        x: Tokens [B, N, C].
        dst: Destination tokens [n], n > 0.
    """
    unit = _unit(x)
    # [B, C, n]
    targets = unit[:, dst].transpose(1, 2)
    part = max(1, MAX_ELEMENTS // (x.shape[0] * dst.shape[0]))
    score, target = zip(*((tokens @ targets).max(-1) for tokens in unit.split(part, dim=1)), strict=True)
    score, target = torch.cat(score, dim=1), torch.cat(target, dim=1)
    score[:, dst] = -torch.inf
    target[:, dst] = torch.arange(dst.shape[0], device=x.device)
    return Match(score, target, dst)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, N, C] by index [B, K] -> [B, K, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Merge(NamedTuple):
    """How N tokens become fewer, the kept ones in their order, then the destinations, and how they become N again.

    Attributes:
        kept: Tokens that stay as they are [B, K], ascending.
        row: Row of each token among the K + n merged ones [B, N].
        target: Destination of each token, as an index among n [B, N]; of no meaning for kept tokens.
        share: Share of each token in the mean that its destination becomes [B, N], float32; 0 for kept tokens.
        dst: Destination tokens [n].
    """

    kept: Tensor
    row: Tensor
    target: Tensor
    share: Tensor
    dst: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, K + n, C]."""
        means = self._means(x)
        return torch.cat((_rows(x, self.kept), means), dim=1) if self.kept.shape[1] else means

    def _means(self, x: Tensor) -> Tensor:
        # A product with the matrix of shares: unlike scattered additions its sums have one order.
        (B, N, _), n = x.shape, self.dst.shape[0]
        part, means = max(1, MAX_ELEMENTS // (B * n)), 0
        for start in range(0, N, part):
            tokens = slice(start, start + part)
            # [B, part, 1] -> [B, part, n]
            target, share = self.target[:, tokens, None], self.share[:, tokens, None].to(x.dtype)
            shares = share.new_zeros(B, target.shape[1], n).scatter(2, target, share)
            means = means + shares.transpose(1, 2) @ x[:, tokens]
        return means

    def unmerge(self, x: Tensor) -> Tensor:
        """[B, K + n, C] -> [B, N, C]: merged tokens read their destination."""
        return _rows(x, self.row)


@torch.no_grad()
def select(found: Match, count: int) -> Merge:
    """Merge the `count` sources that are most similar to their destinations; the earlier token where several are equal.

    Args:
        found: The destinations of all tokens.
        count: Number of tokens to merge, 0 to N - n.
    """
    score, target, dst = found
    (B, N), n = score.shape, dst.shape[0]
    K = N - n - count
    merged = torch.zeros(B, N, dtype=torch.bool, device=score.device)
    merged[:, dst] = True
    if K == 0:
        merged = torch.ones_like(merged)
    elif count:
        best = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        merged = merged.scatter(1, best, True)
    place = (~merged).cumsum(1) - 1
    # The last column takes the indices of all tokens that are not kept, and is dropped.
    kept = place.new_zeros(B, K + 1)
    kept = kept.scatter(1, place.masked_fill(merged, K), torch.arange(N, device=place.device).expand(B, N))[:, :K]
    # Sums of ones are exact in any order.
    sizes = torch.zeros(B, n, device=score.device).scatter_add(1, target, merged.float())
    share = merged.float() / sizes.gather(1, target)
    return Merge(kept, torch.where(merged, K + target, place), target, share, dst)
