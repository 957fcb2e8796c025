"""Flattened window attention in plain PyTorch: the definition, the CPU path and the test oracle.

Pillars are sorted by window in four snake-like orders. A sample of n pillars is cut into ceil(n / G) groups of G; a
last group that is not full attends over the last G pillars of its sample all the same (or over all n, if there are
fewer), and only its own are written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = ("x", "x_shift", "y", "y_shift")


class Flattening(NamedTuple):
    """Orders of pillars and the groups that they are cut into, which are the same in every order."""

    order: Tensor  # int32 [4, V], the pillar at each place, one row for each of ORDERS
    # int32 [R + 1, 3]: places of a group's first and past-the-last pillar, and of the first one that it attends to; -1
    # there marks a group of padding. Groups that are not needed are empty, as the last row is.
    groups: Tensor
    group_size: int


class Windows(NamedTuple):
    """Sizes that the orders follow from."""

    samples: int
    cells: tuple[int, int]  # along x, y
    window: tuple[int, int]  # cells along x, y
    group_size: int

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along x, y that cover the grid, shifted or not."""
        return tuple(-(-(n + w // 2) // w) for n, w in zip(self.cells, self.window, strict=True))

    @property
    def places(self) -> int:
        """Keys of a sample."""
        (nx, ny), (wx, wy) = self.counts, self.window
        return nx * ny * wx * wy

    def key_dtype(self) -> torch.dtype:
        """int32 where all keys of the four orders fit, padding included."""
        return torch.int32 if len(ORDERS) * (self.samples + 1) * self.places < 2**31 else torch.int64

    def table_rows(self, pillars: int) -> int:
        """Rows of the group table: a sample, or the padding, may end in a group that is not full; one row more."""
        return pillars // self.group_size + self.samples + 2


def _mirror(value: Tensor, size: int, mirrored: Tensor) -> Tensor:
    """Count from the other end where `mirrored`."""
    return torch.where(mirrored, size - 1 - value, value)


def window_keys(coords: Tensor, windows: Windows) -> Tensor:
    """Place of each pillar in the four orders, with gaps; int64 [4, V]. Orders and samples do not overlap.

    In order "x", rows of windows follow each other along y, windows of a row along x, then lines of a window along x,
    then cells of a line along y. Every second row, window and line runs backwards. In order "y" the axes change roles.
    """
    sample, _, y, x = coords.long().unbind(1)
    (wx, wy), (nx, ny), keys = windows.window, windows.counts, []
    for along, shifted in (("x", 0), ("x", 1), ("y", 0), ("y", 1)):
        a, b, wa, wb, na, nb = x + shifted * (wx // 2), y + shifted * (wy // 2), wx, wy, nx, ny
        if along == "y":
            a, b, wa, wb, na, nb = b, a, wb, wa, nb, na
        row, line = b // wb, a % wa
        odd = row % 2 == 1
        key = (sample * nb + row) * na + _mirror(a // wa, na, odd)
        key = key * wa + _mirror(line, wa, odd)
        keys.append(key * wb + _mirror(b % wb, wb, (row + line) % 2 == 1))
    return torch.stack(keys) + torch.arange(len(ORDERS), device=coords.device)[:, None] * (
        (windows.samples + 1) * windows.places
    )


def group_table(starts: Tensor, windows: Windows, pillars: int) -> Tensor:
    """Groups of samples that begin at `starts` [B + 2], the padding being one more sample; int32 [R + 1, 3]."""
    G, device = windows.group_size, starts.device
    count = -(-starts.diff() // G)  # groups of each sample
    total = count.cumsum(0)
    group = torch.arange(windows.table_rows(pillars), device=device)
    sample = torch.searchsorted(total, group, right=True)
    used, sample = sample <= windows.samples, sample.clamp(max=windows.samples)
    begin = starts[sample] + (group - total[sample] + count[sample]) * G
    end = torch.minimum(begin + G, starts[sample + 1])
    first = torch.where(end - begin < G, torch.maximum(end - G, starts[sample]), begin)
    first = first.where(sample < windows.samples, -1)
    return torch.stack([begin, end, first], 1).where(used[:, None], pillars).int()


def flatten_windows(coords: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Orders [4, V] and groups [R + 1, 3] of pillars at `coords` (sample, z, y, x); see `op.flatten_windows`."""
    V = len(coords)
    order = window_keys(coords, windows).to(windows.key_dtype()).sort(stable=True).indices.int()
    samples = torch.arange(windows.samples + 2, device=coords.device, dtype=coords.dtype)
    starts = torch.searchsorted(coords[:, 0].contiguous(), samples)
    return order, group_table(starts, windows, V)


def _slots(order: Tensor, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pillars [R, G] that the groups attend over, which slots hold one, and which are written."""
    begin, end, first = (x[:, None] for x in groups[:-1].long().unbind(1))
    place = first + torch.arange(group_size, device=order.device)  # [R, G]
    filled = (place < end) & (first >= 0)
    return order.long()[place.clamp(0, order.shape[0] - 1)], filled, filled & (place >= begin)


def _gather(x: Tensor, pillar: Tensor) -> Tensor:
    return x[pillar].transpose(1, 2)  # [V, M, D] -> [R, M, G, D]


def _probabilities(q: Tensor, k: Tensor, filled: Tensor, scale: float) -> Tensor:
    empty = ~filled[:, None, None]
    logits = (q * scale @ k.transpose(-2, -1)).masked_fill(empty, -torch.inf)
    # A group without pillars would divide zero by zero.
    return logits.softmax(-1).masked_fill(empty, 0)


def flat_window_attention(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Tensor, group_size: int, scale: float
) -> Tensor:
    """Attention within groups, [V, M, D]; see `op.flat_window_attention`."""
    V = q.shape[0]
    if V == 0:
        return q * k * v
    pillar, filled, written = _slots(order, groups, group_size)
    p = _probabilities(_gather(q, pillar), _gather(k, pillar), filled, scale)
    out = (p @ _gather(v, pillar)).transpose(1, 2).flatten(0, 1)  # [R * G, M, D]
    # The last row takes what is not written.
    return v.new_zeros(V + 1, *v.shape[1:]).index_copy(0, pillar.where(written, V).flatten(), out)[:V]


def flat_window_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Tensor, group_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, written out."""
    if q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    pillar, filled, written = _slots(order, groups, group_size)
    q_, k_, v_, do = (_gather(x, pillar) for x in (q, k, v, grad))
    do = do * written[:, None, :, None]
    p = _probabilities(q_, k_, filled, scale)
    dp = do @ v_.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    parts = ds @ k_ * scale, ds.transpose(-2, -1) @ q_ * scale, p.transpose(-2, -1) @ do
    # Pillars before a last group stand in two groups, so gradients add up; empty slots have none.
    return tuple(
        torch.zeros_like(x, memory_format=torch.contiguous_format).index_add(
            0, pillar.flatten(), part.transpose(1, 2).flatten(0, 1)
        )
        for x, part in zip((q, k, v), parts, strict=True)
    )
