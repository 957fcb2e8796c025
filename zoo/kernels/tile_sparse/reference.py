"""Pattern sparse attention in plain PyTorch: the definition, and the path of CPUs.

No S x S matrix or mask is made: queries that see the same keys are one call of torch's attention, and band patterns
go through chunks of query tiles with the keys of these tiles alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.tile_sparse.patterns import FULL, MULTI_DIAGONAL, SKIP, STRIPE, Layout, PatternTable

# Queries of one call for a band pattern, and of one step of the backward pass.
CHUNK = 1024


class Piece(NamedTuple):
    """Queries [rows] that see the positions `keys`, or of these what the mask [rows, keys] keeps."""

    rows: slice
    keys: Tensor
    mask: Tensor | None


def sequence_places(kind: int, layout: Layout, device: torch.device) -> Tensor:
    """Place in the sequence of each position, video in the order of the pattern, then text: int64 [S]."""
    position = torch.arange(layout.video, device=device)
    if kind == MULTI_DIAGONAL:
        position = position % layout.grid[0] * layout.frame + position // layout.grid[0]
    text = torch.arange(layout.text, device=device)
    return torch.cat([position + layout.text, text] if layout.text_first else [position, text + layout.video])


def _band(width: int, layout: Layout, text: Tensor) -> Iterator[Piece]:
    """Chunks of query tiles of a band and the keys that they reach."""
    V, (tile_q, tile_k), exact = layout.video, layout.tile, layout.granularity == "element"
    step = max(1, CHUNK // tile_q) * tile_q
    for start in range(0, V, step):
        rows = torch.arange(start, min(start + step, V), device=text.device)[:, None]
        # First and last query of the tile of each row, of which the tile's key tiles follow.
        low = rows // tile_q * tile_q
        high = (low + tile_q - 1).clamp_max(V - 1)
        first = max(0, start - width + 1) // tile_k * tile_k
        end = min(V, (min(start + step, V) - 1 + width - 1) // tile_k * tile_k + tile_k)
        keys = torch.arange(first, end, device=text.device)
        if exact:
            mask = (rows - keys).abs() < width
        else:
            tile = keys // tile_k
            mask = (tile >= (low - width + 1).clamp_min(0) // tile_k) & (tile <= (high + width - 1) // tile_k)
        mask = F.pad(mask, (0, len(text)), value=True)
        yield Piece(slice(start, start + len(rows)), torch.cat([keys, text]), mask)


def pieces(row: list[int], table: PatternTable, layout: Layout, text_length: int) -> Iterator[Piece]:
    """The attention of one pattern, a row of the table, as pieces that cover all positions of its order."""
    kind, width, first, count, stripe, _ = row
    V, device = layout.video, table.rows.device
    video, text = torch.arange(V, device=device), torch.arange(text_length, device=device) + V
    if kind == FULL:
        yield Piece(slice(0, V), torch.cat([video, text]), None)
    elif kind == STRIPE:
        if layout.granularity == "element":
            keep = table.columns[stripe].bool()
        else:
            keep = torch.isin(video // layout.tile[1], table.tiles[first : first + count])
        yield Piece(slice(0, V), torch.cat([video[keep], text]), None)
    else:
        yield from _band(width, layout, text)
    if layout.text:
        yield Piece(slice(V, layout.tokens), torch.cat([video, text]), None)


def _parts(
    q: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout, text_length: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor, Piece]]:
    """Sample, heads of a pattern, order of the pattern and piece, for all that is to be computed."""
    lengths = [layout.text] * q.shape[0] if text_length is None else text_length.clamp(0, layout.text).tolist()
    rows, ids = table.rows.tolist(), pattern_ids.unique().tolist()
    if ids and not 0 <= ids[0] <= ids[-1] < len(rows):
        raise ValueError(f"pattern_ids must lie in 0 to {len(rows) - 1} for {len(rows)} patterns, got {ids}.")
    for p in ids:
        if rows[p][0] == SKIP:
            continue
        heads = (pattern_ids == p).nonzero().flatten()
        order = sequence_places(rows[p][0], layout, q.device)
        for sample, length in enumerate(lengths):
            for piece in pieces(rows[p], table, layout, length):
                if len(piece.keys):
                    yield sample, heads[:, None], order, piece


def _split(rows: slice, step: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def empty_output(q: Tensor) -> Tensor:
    """Memory for the output, its dimensions in the order of q's."""
    return torch.empty_like(q) if q.stride(-1) == 1 else q.new_empty(q.shape)


def tile_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout,
    text_length: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of each head [B, M, S, D] under its pattern; arguments as in the public function."""
    out = empty_output(q).zero_()
    # Torch's attention keeps all logits of a call in float64 on a GPU.
    step = CHUNK if q.dtype == torch.float64 else layout.tokens
    for sample, heads, order, (rows, keys, mask) in _parts(q, pattern_ids, table, layout, text_length):
        seen = order[keys]
        key, value = (x[sample, heads, seen][None] for x in (k, v))  # [1, h, keys, D]
        for part in _split(rows, step):
            own, kept = order[part], None if mask is None else mask[part.start - rows.start : part.stop - rows.start]
            query = q[sample, heads, own][None]  # [1, h, rows, D]
            out[sample, heads, own] = F.scaled_dot_product_attention(query, key, value, kept, scale=scale)[0]
    return out


def tile_sparse_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout,
    text_length: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients with respect to q, k and v, each in its tensor's order of memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (empty_output(x).to(dtype).zero_() for x in (q, k, v))
    for sample, heads, order, (rows, keys, mask) in _parts(q, pattern_ids, table, layout, text_length):
        seen = order[keys]
        key, value = (x[sample, heads, seen].to(dtype) for x in (k, v))  # [h, keys, D]
        for part in _split(rows, CHUNK):
            own = order[part]
            query, do = (x[sample, heads, own].to(dtype) for x in (q, grad))  # [h, rows, D]
            logits = query @ key.mT * scale  # [h, rows, keys]
            if mask is not None:
                logits = logits.masked_fill(~mask[part.start - rows.start : part.stop - rows.start], float("-inf"))
            p = logits.softmax(-1)
            dp = do @ value.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[sample, heads, own] = ds @ key
            # Positions are unique in a piece: an ordinary addition in place.
            dk[sample, heads, seen] += ds.mT @ query
            dv[sample, heads, seen] += p.mT @ do
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
