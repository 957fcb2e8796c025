"""FlexAttention under the tiles of pattern sparse attention.

Tokens of a head are gathered in the order of its pattern, video and text each filled up to whole tiles, so that a block
of FlexAttention is a tile of the op. Then all active blocks are whole, but for those of keys that fill up a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.bench.ops.base import Inputs
from zoo.bench.ops.bilevel_routing import compiled_flex


class FlexTiles(NamedTuple):
    """What FlexAttention needs of the patterns of all heads.

    Attributes:
        mask: Its block mask, [1, M, query tiles, key tiles].
        queries: Place in the sequence of each gathered query, [M, query tiles * Bq]; filled up with 0.
        keys: The same of keys, [M, key tiles * Bk].
        place: Gathered query of each place in the sequence, [M, S].
    """

    mask: object
    queries: Tensor
    keys: Tensor
    place: Tensor


def filled_order(order: Tensor, video: int, size: int) -> tuple[Tensor, Tensor]:
    """Gathered positions [S + filling] of an order [S] in tiles of `size`, and the position of each of its entries."""
    text_start = -(-video // size) * size
    position = torch.arange(len(order), device=order.device)
    position = torch.where(position < video, position, position - video + text_start)
    length = text_start + -(-(len(order) - video) // size) * size
    return order.new_zeros(length).scatter(0, position, order), position


def block_lists(active: Tensor) -> tuple[Tensor, Tensor]:
    """Number of active blocks in each row of [..., rows, columns], and the columns, active ones first."""
    return active.sum(-1, dtype=torch.int32), active.int().argsort(dim=-1, descending=True, stable=True).int()


def tile_block_mask(active: Tensor, layout):
    """Block mask of active tiles [M, query tiles, key tiles], without looking at pairs of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    (tile_q, tile_k), V, T = layout.tile, layout.video, layout.text
    text_start = layout.key_tiles[0] * tile_k
    filled = torch.zeros(active.shape[-1], dtype=torch.bool, device=active.device)
    if V % tile_k:
        filled[layout.key_tiles[0] - 1] = True
    if T % tile_k:
        filled[-1] = True

    def attends(b, h, q, k):
        valid = (k < V) | ((k >= text_start) & (k < text_start + T))
        return active[h, q // tile_q, k // tile_k] & valid

    partial, whole = block_lists((active & filled)[None]), block_lists((active & ~filled)[None])
    lengths = (active.shape[1] * tile_q, active.shape[2] * tile_k)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=layout.tile, mask_mod=attends, seq_lengths=lengths)


def flex_tiles(patterns: Sequence, layout, device: torch.device) -> FlexTiles:
    """Mask and gathers of the patterns of all heads, in their order."""
    from zoo.kernels.tile_sparse.patterns import sequence_order, tile_map

    tables = {}
    for pattern in set(patterns):
        order = sequence_order(pattern, layout)
        queries, position = filled_order(order, layout.video, layout.tile[0])
        place = position.new_empty(len(order)).scatter(0, order, position)
        keys = filled_order(order, layout.video, layout.tile[1])[0]
        tables[pattern] = [x.to(device) for x in (tile_map(pattern, layout), queries, keys, place)]
    active, queries, keys, place = (
        torch.stack(tensors) for tensors in zip(*(tables[p] for p in patterns), strict=True)
    )  # fmt: skip
    return FlexTiles(tile_block_mask(active, layout), queries, keys, place)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of each head: x [B, M, S, D] by index [M, N] -> [B, M, N, D]."""
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def _attend(q: Tensor, k: Tensor, v: Tensor, tiles: FlexTiles, tile: tuple[int, int]) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if not q.is_cuda:
        return flex_attention(q, k, v, block_mask=tiles.mask)
    # Its defaults can be longer than a tile.
    size = min(64, *tile)
    backward = {f"bwd_BLOCK_{side}": size for side in ("M1", "N1", "M2", "N2")}
    options = {"fwd_BLOCK_M": min(128, tile[0]), "fwd_BLOCK_N": min(128, tile[1])} if tile[1] < 128 else {}
    return compiled_flex()(q, k, v, block_mask=tiles.mask, kernel_options={**options, **backward})


def _tiles_of(inputs: Inputs) -> FlexTiles:
    if "flex" not in inputs:
        inputs["flex"] = flex_tiles(inputs["head_patterns"], inputs["settings"]["layout"], inputs["q"].device)
    return inputs["flex"]


def _gathered(inputs: Inputs) -> list[Tensor]:
    tiles = _tiles_of(inputs)
    indices = (tiles.queries, tiles.keys, tiles.keys)
    return [gather_tokens(inputs[name], index) for name, index in zip("qkv", indices, strict=True)]


def flex(inputs: Inputs) -> Tensor:
    """The op by FlexAttention, with the gathers of queries, keys, values and outputs; the mask is built once."""
    tiles = _tiles_of(inputs)
    out = _attend(*_gathered(inputs), tiles, inputs["settings"]["layout"].tile)
    return gather_tokens(out, tiles.place)


def flex_kernel(inputs: Inputs) -> Tensor:
    """FlexAttention on tokens that have been gathered before, and its output left in their order.

    Raises:
        NotImplementedError: With gradients: they would belong to the gathered tokens.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError("flex_kernel is timed forward only")
    if "gathered" not in inputs:
        inputs["gathered"] = _gathered(inputs)
    return _attend(*inputs["gathered"], _tiles_of(inputs), inputs["settings"]["layout"].tile)
