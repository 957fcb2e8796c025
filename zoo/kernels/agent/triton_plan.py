"""Tiles, parts and grids of the kernels of agent attention."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton


class Launch(NamedTuple):
    """How one kernel is launched: grid, units of work a program walks over, number of such chunks, configuration."""

    grid: tuple[int, int]
    chunk: int
    chunks: int
    config: dict


class Plan(NamedTuple):
    """What the launches of one problem share, computed once for its sizes."""

    pitch: int
    aggregate: Launch
    broadcast: Launch
    query_gradient: Launch
    agent_gradient: Launch
    key_gradient: Launch
    aggregate_gradient: Launch
    join: Launch


class Tile(NamedTuple):
    """Tokens and agents that a program holds at once, its warps and pipeline stages, and how many programs to start."""

    tokens: int
    agents: int
    warps: int
    stages: int
    programs: int


def choose_tile(kernel: str, pitch: int, block_d: int, biased: bool, single: bool) -> Tile:
    """The tile of a kernel: as large as the registers of a thread allow.

    `single` for float32, whose products keep their operands in registers.
    """
    if kernel in ("aggregate", "agent_gradient", "aggregate_gradient"):
        agents = min(64, pitch)
        narrow = single or agents == 16 or block_d > (32 if biased else 64)
        return Tile(32 if narrow else 64, agents, agents // 16, 3, {16: 2112, 32: 1056, 64: 528}[agents])
    if pitch > 64:
        return Tile(32, pitch, 8, 2, 528 if kernel == "broadcast" else 264)
    if kernel == "broadcast":
        return Tile(32 if single else 64 if pitch == 64 else 128, pitch, 4, 2, 1056)
    if pitch == 16 and not single:
        return Tile(32, pitch, 2, 3, 660)
    return Tile(32 if single else 64, pitch, 4, 3, 528 if pitch == 64 else 660)


def _over_images(tile: Tile, tokens: int, batch: int, meta: dict) -> Launch:
    """Programs own a tile of tokens and walk over images. Each gradient program writes a part of a bias gradient."""
    tiles = triton.cdiv(tokens, tile.tokens) * meta["HEADS"]
    chunk = triton.cdiv(batch, min(batch, max(1, tile.programs // tiles)))
    chunks = triton.cdiv(batch, chunk)
    config = dict(BLOCK_A=tile.agents, BLOCK_T=tile.tokens, num_warps=tile.warps, num_stages=tile.stages)
    return Launch((tiles, chunks), chunk, chunks, {**meta, **config})


def _over_tokens(tile: Tile, agents: int, tokens: int, batch: int, meta: dict) -> Launch:
    """Programs own an image and a block of agents and walk over a part of its tokens.

    A part has so many tokens that reading them costs a multiple of writing its result.
    """
    blocks = triton.cdiv(agents, tile.agents)
    rows = batch * meta["HEADS"] * blocks
    parts = max(1, min(triton.cdiv(tile.programs, rows), tokens // max(128, 4 * tile.agents)))
    chunk = triton.cdiv(triton.cdiv(tokens, parts), tile.tokens) * tile.tokens
    parts = triton.cdiv(tokens, chunk)
    config = dict(BLOCK_A=tile.agents, AGENT_BLOCKS=blocks, BLOCK_T=tile.tokens)
    config.update(num_warps=tile.warps, num_stages=tile.stages)
    return Launch((parts * meta["HEADS"] * blocks, batch), chunk, parts, {**meta, **config})


@functools.lru_cache(maxsize=256)
def plan(
    batch: int, queries: int, keys: int, agents: int, channels: int, heads: int,
    key_bias: bool, query_bias: bool, single: bool,
) -> Plan:  # fmt: skip
    """Choose tiles, parts and grids; `single` for float32."""
    pitch, D = max(16, triton.next_power_of_2(agents)), channels // heads
    block_d = max(16, triton.next_power_of_2(D))
    meta = dict(HEADS=heads, D=D, BLOCK_D=block_d)

    def launch(kernel: str, tokens: int, biased: bool) -> Launch:
        tile, extra = choose_tile(kernel, pitch, block_d, biased, single), dict(meta, PITCH=pitch, BIAS=biased)
        if kernel in ("broadcast", "query_gradient", "key_gradient"):
            return _over_images(tile, tokens, batch, extra)
        return _over_tokens(tile, agents, tokens, batch, extra)

    join = dict(meta, BLOCK_A=4, AGENT_BLOCKS=triton.cdiv(agents, 4), BLOCK_P=8, num_warps=1)
    return Plan(
        pitch=pitch,
        aggregate=launch("aggregate", keys, key_bias),
        broadcast=launch("broadcast", queries, query_bias),
        query_gradient=launch("query_gradient", queries, query_bias),
        agent_gradient=launch("agent_gradient", queries, query_bias),
        key_gradient=launch("key_gradient", keys, key_bias),
        aggregate_gradient=launch("aggregate_gradient", keys, key_bias),
        join=Launch((heads * join["AGENT_BLOCKS"], batch), 0, 0, join),
    )
