"""Sparse convolution: sites and their neighbours, built once a stage, and convolutions that share them."""

from zoo.kernels.sparse_conv.op import sparse_conv, sparse_depthwise_conv
from zoo.kernels.sparse_conv.pillars import pillar_attention, pillar_max
from zoo.kernels.sparse_conv.reference import SiteGrid
from zoo.kernels.sparse_conv.sites import (
    Neighbours,
    Pillars,
    Sites,
    downsample,
    find_pillars,
    same_neighbours,
    same_table,
    sort_sites,
    window_offsets,
)

__all__ = [
    "Neighbours",
    "Pillars",
    "SiteGrid",
    "Sites",
    "downsample",
    "find_pillars",
    "pillar_attention",
    "pillar_max",
    "same_neighbours",
    "same_table",
    "sort_sites",
    "sparse_conv",
    "sparse_depthwise_conv",
    "window_offsets",
]
