"""Sparse convolution over the voxels of a LiDAR sweep, and the depth-wise branches of ScatterFormer."""

from __future__ import annotations

import functools

import torch

from zoo.bench.ops.base import Op, element_size


@functools.lru_cache(maxsize=4)
def sweep(rows: int, extent: int, device: torch.device):
    """Sites like those of a LiDAR sweep: rolling ground and walls around the sensor, thinning out with the distance.

    At 21,823 sites on 480 x 480 cells a site has 7.4 of 27 neighbours, itself included; real sweeps have 7.4 to 8.1.
    """
    from zoo.kernels.sparse_conv import sort_sites
    from zoo.kernels.voxelize import Voxels

    generator = torch.Generator().manual_seed(0)
    y, x = torch.cartesian_prod(*(torch.arange(extent, dtype=torch.float32) - extent / 2 for _ in range(2))).unbind(1)
    ground = 4 + 2 * ((x / 30).sin() + (y / 40).cos()) + 0.7 * torch.rand(len(x), generator=generator)
    wall = (x / 17 + (y / 23).sin()).sin().abs() < 0.1
    levels = torch.cat((ground[:, None], ground[:, None] + torch.arange(1, 9)), 1)  # [cells of the map, 9]
    exists = torch.cat((torch.ones_like(wall)[:, None], wall[:, None].expand(-1, 8)), 1)
    # A cell is seen while a random number exceeds its distance: all of the nearest are, few of the farthest.
    distance = (x.square() + y.square()).sqrt()[:, None] * (0.3 + 1.0 * torch.rand(levels.shape, generator=generator))
    first = distance.masked_fill(~exists, torch.inf).flatten().argsort()[:rows]
    cell, level = first // 9, levels.flatten()[first].long()
    coords = torch.stack((cell * 0, level, cell // extent, cell % extent), 1).int().to(device)
    return sort_sites(Voxels(coords, None, 1, (32, extent, extent)))[0]


@functools.lru_cache(maxsize=4)
def tables(rows: int, extent: int, branch: int, device: torch.device):
    """Neighbours of a 3 x 3 x 3 convolution, or the table of the depth-wise branches."""
    from zoo.kernels.sparse_conv import same_neighbours, same_table

    sites = sweep(rows, extent, device)
    if not branch:
        return same_neighbours(sites, (3, 3, 3))
    return same_table(sites, [(3, 3, 3), (1, 1, branch), (1, branch, 1)])


class SparseConv(Op):
    """Sub-manifold 3 x 3 x 3 convolution; shape: rows, extent, in_channels, out_channels.

    FLOPs count all 27 taps; on sweeps a third of them meets a site. The peer `plain` gathers all and multiplies once.
    """

    leaves = ("x", "weight")

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        cin, cout = shape["in_channels"], shape["out_channels"]
        x = torch.randn(shape["rows"], cin, generator=generator, device=device)
        weight = torch.randn(cout, 3, 3, 3, cin, generator=generator, device=device) * (8 * cin) ** -0.5
        neighbours = tables(shape["rows"], shape["extent"], 0, device)
        leaves = {name: value.to(dtype).requires_grad_() for name, value in (("x", x), ("weight", weight))}
        return {**leaves, "neighbours": neighbours}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": functools.partial(self._zoo, backend="reference"), "by_tap": self._by_tap}

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels.sparse_conv import sparse_conv

        return sparse_conv(inputs["x"], inputs["weight"], None, inputs["neighbours"], backend=backend)

    @staticmethod
    def _by_tap(inputs):
        """Gather, multiply and add for each tap, over the pairs that exist."""
        x, weight, table = inputs["x"], inputs["weight"].flatten(1, 3), inputs["neighbours"].table
        out = x.new_zeros(len(x), len(weight), dtype=torch.float32)
        for rows, w in zip(table.unbind(0), weight.unbind(1), strict=True):
            hit = (rows >= 0).nonzero()[:, 0]
            out = out.index_add(0, hit, (x[rows[hit].long()] @ w.t()).float())
        return out.to(x.dtype)

    def bytes(self, shape, dtype, backward):
        rows = shape["rows"] * (shape["in_channels"] + shape["out_channels"])
        weight = 27 * shape["in_channels"] * shape["out_channels"]
        table = 27 * shape["rows"] * 4
        return (2 if backward else 1) * (rows + weight) * element_size(dtype) + table

    def flops(self, shape, backward):
        return (4 if backward else 2) * 27 * shape["rows"] * shape["in_channels"] * shape["out_channels"]


class SparseDepthwiseConv(Op):
    """The three depth-wise branches of ScatterFormer; shape: rows, extent, channels, bar (length of the bars).

    The first three quarters of the channels have a kernel each, and the input is added.
    """

    leaves = ("x", "cube", "along_x", "along_y")

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        D, bar = shape["channels"] // 4, shape["bar"]
        sizes = [(shape["rows"], 4 * D), (3, 3, 3, D), (1, 1, bar, D), (1, bar, 1, D)]
        inputs = {
            name: torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()
            for name, size in zip(self.leaves, sizes, strict=True)
        }
        return {**inputs, "table": tables(shape["rows"], shape["extent"], bar, device)}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": functools.partial(self._zoo, backend="reference")}

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels.sparse_conv import sparse_depthwise_conv

        x, *weights = (inputs[name] for name in SparseDepthwiseConv.leaves)
        return sparse_depthwise_conv(x, weights, inputs["table"], residual=True, backend=backend)

    def bytes(self, shape, dtype, backward):
        rows = shape["rows"] * shape["channels"] * element_size(dtype)
        table = (27 + 2 * shape["bar"]) * shape["rows"] * 4
        return (3 if backward else 2) * rows + (2 if backward else 1) * table
