"""Merging tokens for AgentSD and taking it back."""

from __future__ import annotations

import pytest
import torch

from zoo.heads.agent_sd import merging, processor
from zoo.heads.agent_sd.merging import destinations, match, select

from .agent_sd_unets import merged_by_loops


@pytest.mark.parametrize("grid, cell, count", [((7, 9), (3, 2), 20), ((5, 6), (2, 2), 24), ((4, 8), (4, 4), 1)])
def test_merging_equals_its_definition(grid, cell, count) -> None:
    torch.manual_seed(0)
    N = grid[0] * grid[1]
    x, y = torch.randn(3, N, 6, dtype=torch.float64), torch.randn(3, N, 5, dtype=torch.float64)
    x[0, 3] = 0
    dst = destinations(grid, cell)
    merge = select(match(x, dst), count)
    merged = merge.merge(y)
    assert merged.shape[1] == N - count
    for b in range(3):
        expected, back = merged_by_loops(x[b], y[b], dst.tolist(), count)
        torch.testing.assert_close(merged[b], expected)
        torch.testing.assert_close(merge.unmerge(merged)[b], back)


def test_destinations() -> None:
    assert destinations((5, 7), (2, 3)).tolist() == [0, 3, 14, 17]
    offsets = torch.tensor([[5, 0], [1, 3]])
    # Positions 5 and 3 of a cell of 2 x 3 lie in its second row.
    assert destinations((5, 7), (2, 3), offsets).tolist() == sorted([7 + 2, 3, 14 + 1, 21 + 3])
    assert destinations((3, 7), (4, 4)).numel() == 0


def test_equal_tokens_merge_in_their_order_and_stay_finite() -> None:
    x = torch.full((2, 64, 4), 3000.0, dtype=torch.float16)
    dst = destinations((8, 8), (4, 4))
    merge = select(match(x, dst), 10)
    assert merge.kept[0].tolist() == [t for t in range(64) if t not in dst.tolist()][10:]
    assert (merge.merge(x) == 3000).all()
    # All merge into one: a plain sum would overflow.
    everything = select(match(torch.zeros_like(x), dst), 60)
    torch.testing.assert_close(everything.merge(x), x[:, :4])


def test_all_sources_merge_without_ranking() -> None:
    torch.manual_seed(0)
    x, dst = torch.randn(2, 64, 8), destinations((8, 8), (4, 4))
    ranked, unranked = select(match(x, dst), 60), select(match(x, dst, rank=False), 60)
    assert all(torch.equal(a, b) for a, b in zip(ranked, unranked, strict=True))


def test_large_grids_are_worked_off_in_parts(monkeypatch) -> None:
    torch.manual_seed(0)
    x, dst = torch.randn(2, 63, 8), destinations((9, 7), (2, 2))
    whole = select(match(x, dst), 20)
    monkeypatch.setattr(merging, "MAX_ELEMENTS", 10 * 2 * dst.numel())
    parts = select(match(x, dst), 20)
    assert torch.equal(whole.row, parts.row)
    torch.testing.assert_close(whole.merge(x), parts.merge(x))


def test_merging_has_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    merge = select(match(x, destinations((4, 5), (2, 2))), 9)
    assert torch.autograd.gradcheck(merge.merge, x)
    assert torch.autograd.gradcheck(merge.unmerge, torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True))


def test_agents_beyond_the_kernel_run_as_two_attentions() -> None:
    torch.manual_seed(0)
    q, k, v, a = (torch.randn(2, n, 24) for n in (30, 20, 20, 5))
    settings = (3, 0.4, 0.9)
    torch.testing.assert_close(
        processor.attend_twice(q, a, k, v, *settings), processor.attend(q, a, k, v, *settings), rtol=1e-5, atol=1e-6
    )
