"""Pattern sparse attention: each head of a video transformer attends to bands, stripes, everything or nothing."""

from zoo.kernels.tile_sparse.op import tile_sparse_attention
from zoo.kernels.tile_sparse.patterns import (
    DEFAULT_TILE,
    Diagonal,
    Full,
    Layout,
    MultiDiagonal,
    Pattern,
    PatternTable,
    Skip,
    VerticalStripe,
    density,
    pattern_from_dict,
    pattern_table,
)

__all__ = [
    "DEFAULT_TILE",
    "Diagonal",
    "Full",
    "Layout",
    "MultiDiagonal",
    "Pattern",
    "PatternTable",
    "Skip",
    "VerticalStripe",
    "density",
    "pattern_from_dict",
    "pattern_table",
    "tile_sparse_attention",
]
