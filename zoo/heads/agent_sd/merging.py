"""Which tokens of a grid merge, and merging and unmerging them.

Some tokens of the grid, one in each cell, are destinations. Every other token is a source and finds the destination
most like it; the sources that fit best are averaged into theirs. Nothing here waits for the device, and no sum depends
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
    down, across = H // cell_h, W // cell_w
    # [cells down, cells across]
    corners = torch.arange(H * W, device=device).view(H, W)[: down * cell_h : cell_h, : across * cell_w : cell_w]
    if offsets is None:
        return corners.flatten()
    return (corners + offsets // cell_w * W + offsets % cell_w).flatten().sort().values


class Match(NamedTuple):
    """Each token's most similar destination.

    Attributes:
        target: Its index among the destinations [B, N]; a destination is its own.
        order: Tokens [B, N], those most similar to their destinations first, the destinations last; of equal ones the
            earlier token first. None if not asked for.
        dst: Destination tokens [n].
    """

    target: Tensor
    order: Tensor | None
    dst: Tensor


def _norm(x: Tensor) -> Tensor:
    """Lengths of tokens to divide by: a zero token stays zero, as similar to one destination as to any other."""
    return x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@torch.no_grad()
def match(x: Tensor, dst: Tensor, rank: bool = True) -> Match:
    """Find each token's most similar destination, by cosine; the first one where several are equal.

    Args:
        x: Tokens [B, N, C].
        dst: Destination tokens [n], n > 0.
        rank: Whether to order the tokens, which merging some of them needs and merging all of them does not.
    """
    B, n = x.shape[0], dst.shape[0]
    targets = x[:, dst]
    # [B, C, n]; the length of a token does not change which destination is the most similar one.
    targets = (targets / _norm(targets)).transpose(1, 2)
    parts = [(tokens @ targets).max(-1) for tokens in x.split(max(1, MAX_ELEMENTS // (B * n)), dim=1)]
    target = torch.cat([part.indices for part in parts], dim=1)
    target[:, dst] = torch.arange(n, device=x.device)
    if not rank:
        return Match(target, None, dst)
    score = torch.cat([part.values for part in parts], dim=1) / _norm(x).squeeze(-1)
    score[:, dst] = -torch.inf
    return Match(target, score.argsort(dim=1, descending=True, stable=True), dst)


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
    """Merge the `count` sources that are most similar to their destinations.

    Args:
        found: The destinations of all tokens, ranked unless all sources merge.
        count: Number of tokens to merge, 0 to N - n.
    """
    target, order, dst = found
    (B, N), n = target.shape, dst.shape[0]
    K = N - n - count
    if K == 0:
        merged, kept, row = target.new_ones(1, dtype=torch.float32).expand(B, N), target.new_empty(B, 0), target
    else:
        merged = torch.zeros(B, N, dtype=torch.bool, device=target.device)
        merged[:, dst] = True
        merged = merged.scatter(1, order[:, :count], True)
        place = (~merged).cumsum(1) - 1
        row = torch.where(merged, K + target, place)
        # The last column takes the indices of all tokens that merge, and is dropped.
        index = torch.arange(N, device=target.device).expand(B, N)
        kept = target.new_empty(B, K + 1).scatter(1, place.masked_fill(merged, K), index)[:, :K]
        merged = merged.float()
    # Sums of ones are exact in any order.
    sizes = merged.new_zeros(B, n).scatter_add(1, target, merged)
    return Merge(kept, row, target, merged / sizes.gather(1, target), dst)
