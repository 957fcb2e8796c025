"""Attention ops: one folder each, with a plain reference, Triton kernels and the registered op."""

from zoo.kernels.agent import AgentBias, agent_attention
from zoo.kernels.bilevel_routing import Routing, bilevel_attention, bilevel_routing, route_regions
from zoo.kernels.depthwise_conv import depthwise_conv2d
from zoo.kernels.factorized import cross_window_pool, factorized_attention
from zoo.kernels.flat_window import flat_window_attention, flatten_windows
from zoo.kernels.halo import halo_attention
from zoo.kernels.rotated_iou import rotated_iou, rotated_iou_3d, rotated_nms, rotated_overlap
from zoo.kernels.scatter_linear import scatter_linear_attention
from zoo.kernels.tile_sparse import tile_sparse_attention
from zoo.kernels.token_select import SelectionPlan, cls_attention, token_select
from zoo.kernels.voxelize import Voxels, segment_max, segment_mean, voxelize

__all__ = [
    "AgentBias",
    "Routing",
    "SelectionPlan",
    "Voxels",
    "agent_attention",
    "bilevel_attention",
    "bilevel_routing",
    "cls_attention",
    "cross_window_pool",
    "depthwise_conv2d",
    "factorized_attention",
    "flat_window_attention",
    "flatten_windows",
    "halo_attention",
    "rotated_iou",
    "rotated_iou_3d",
    "rotated_nms",
    "rotated_overlap",
    "route_regions",
    "scatter_linear_attention",
    "segment_max",
    "segment_mean",
    "tile_sparse_attention",
    "token_select",
    "voxelize",
]
