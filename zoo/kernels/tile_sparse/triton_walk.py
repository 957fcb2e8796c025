"""What the kernels of pattern sparse attention share: patterns of the table, places of positions."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def own_tile(heads, video, text, BLOCK: tl.constexpr):
    """Rank of the program's head, first position of its tile, and whether that is text; text tiles come first."""
    text_tiles = tl.cdiv(text, BLOCK)
    program = tl.program_id(0)
    of_text = program < heads * text_tiles
    index = tl.where(of_text, program, program - heads * text_tiles)
    tiles = tl.where(of_text, text_tiles, tl.cdiv(video, BLOCK))
    rank = index // tiles
    return rank, (index - rank * tiles) * BLOCK, of_text


@triton.jit
def load_pattern(ids_ptr, rows_ptr, head):
    """Kind, window, list and row of the columns of a head's pattern."""
    row_ptr = rows_ptr + tl.load(ids_ptr + head) * 6
    count = tl.load(row_ptr + 3)
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), count, tl.load(row_ptr + 4)


@triton.jit
def places(position, of_text, token_major, frames, inverse, frame, video_start, text_start):
    """Places in the sequence of positions of the video, in the head's order, or of the text."""
    reordered = token_major & (of_text == 0)
    step = tl.where(reordered, frames, 1)
    # The quotient of float32 is exact up to 2**20 positions: half a unit is more than its error.
    place = ((position.to(tl.float32) + 0.5) * tl.where(reordered, inverse, 1.0)).to(tl.int32)
    return (position - place * step) * frame + place + tl.where(of_text, text_start, video_start)


@triton.jit
def reach(start, width, last, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Tiles of size OTHER with a position nearer than `width` to the tile of size OWN that holds `start`."""
    low = start // OWN * OWN
    high = tl.minimum(low + OWN - 1, last)
    return tl.maximum(low - width + 1, 0) // OTHER, tl.minimum(high + width - 1, last) // OTHER + 1
