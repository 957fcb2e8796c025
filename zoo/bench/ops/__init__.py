"""One adapter per op, in a file of its own; ``OPS`` has them under the names that suites use."""

from zoo.bench.ops.agent import AgentAttention
from zoo.bench.ops.base import Inputs, Op, Provider, element_size, input_bytes, upcast
from zoo.bench.ops.bias_relu import BiasReLU
from zoo.bench.ops.bilevel_routing import BilevelAttention, BilevelRouting
from zoo.bench.ops.depthwise_conv import DepthwiseConv
from zoo.bench.ops.factorized import CrossWindowPool, FactorizedAttention
from zoo.bench.ops.flat_window import FlatWindowAttention, FlatWindowBlock, VoxelMax
from zoo.bench.ops.halo import HaloAttention, HaloLayer
from zoo.bench.ops.rotated_iou import RotatedOverlap
from zoo.bench.ops.scatter_linear import ScatterLinear
from zoo.bench.ops.sparse_conv import SparseConv, SparseDepthwiseConv
from zoo.bench.ops.tile_sparse import TileSparseAttention
from zoo.bench.ops.token_select import TokenSelect

__all__ = ["OPS", "Inputs", "Op", "Provider", "element_size", "input_bytes", "upcast"]

OPS: dict[str, Op] = {
    "agent_attention": AgentAttention(),
    "bias_relu": BiasReLU(),
    "bilevel_attention": BilevelAttention(),
    "bilevel_routing": BilevelRouting(),
    "cross_window_pool": CrossWindowPool(),
    "depthwise_conv": DepthwiseConv(),
    "factorized_attention": FactorizedAttention(),
    "flat_window_attention": FlatWindowAttention(),
    "flat_window_block": FlatWindowBlock(),
    "halo_attention": HaloAttention(),
    "halo_layer": HaloLayer(),
    "rotated_overlap": RotatedOverlap(),
    "scatter_linear": ScatterLinear(),
    "sparse_conv": SparseConv(),
    "sparse_depthwise_conv": SparseDepthwiseConv(),
    "tile_sparse_attention": TileSparseAttention(),
    "token_select": TokenSelect(),
    "voxel_max": VoxelMax(),
}
