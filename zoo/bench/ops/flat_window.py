"""Flattened window attention without and with its window sort, and maxima over voxels, on simulated scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.bench.ops.base import Op, element_size


def scan_cells(pillars: int, side: int, seed: int) -> torch.Tensor:
    """int32 [V, 4] cells (0, 0, y, x) of a square grid, dense at the centre as a scan is, sorted."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(0, dtype=torch.int64)
    while len(found) < pillars:
        u = torch.rand(2, 2 * pillars, generator=generator) * 2 - 1
        x, y = ((u * u.abs() + 1) * 0.5 * side).long().clamp(max=side - 1)
        found = torch.cat([found, y * side + x]).unique()
    cell = found[torch.randperm(len(found), generator=generator)[:pillars]].sort().values
    return torch.stack([torch.zeros_like(cell), torch.zeros_like(cell), cell // side, cell % side], 1).int()


def scan_points(points: int, seed: int) -> torch.Tensor:
    """float32 [N, 5] points within 75 m, dense at the centre."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(points, 5, generator=generator) * 2 - 1
    return torch.cat([75 * u[:, :2] * u[:, :2].abs(), 6 * u[:, 2:3] ** 2 - 2, u[:, 3:]], 1)


class FlatWindowAttention(Op):
    """Attention in groups along a window order; shape: pillars, side, window, group, heads, dim."""

    leaves = ("q", "k", "v")

    def make_inputs(self, shape, dtype, device, seed=0):
        from zoo.kernels import Voxels, flatten_windows

        coords = scan_cells(shape["pillars"], shape["side"], seed).to(device)
        voxels = Voxels(coords, None, 1, (1, shape["side"], shape["side"]))
        flattening = flatten_windows(voxels, (shape["window"], shape["window"]), shape["group"])
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape["pillars"], 3, shape["heads"], shape["dim"])
        packed = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        q, k, v = (x.detach().requires_grad_() for x in packed.unbind(1))
        return {"q": q, "k": k, "v": v, "flattening": flattening}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain, "sdpa": self._sdpa}

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels import flat_window_attention

        return flat_window_attention(inputs["q"], inputs["k"], inputs["v"], inputs["flattening"], backend=backend)

    @staticmethod
    def _plain(inputs):
        """Rows gathered into groups, matrix products and softmax, rows scattered: the definition of the op."""
        return FlatWindowAttention._zoo(inputs, "reference")

    @staticmethod
    def _sdpa(inputs):
        """The same with torch's fused attention between gather and scatter."""
        from zoo.kernels.flat_window import reference

        q, k, v, (order, groups, size) = (inputs[name] for name in ("q", "k", "v", "flattening"))
        pillar, filled, written = reference._slots(order[0], groups, size)
        bias = torch.zeros(filled.shape, dtype=q.dtype, device=q.device).masked_fill(~filled, -1e4)
        gathered = (x[pillar].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*gathered, attn_mask=bias[:, None, None].expand(-1, -1, size, -1))
        out = out.transpose(1, 2).flatten(0, 1)
        return v.new_zeros(len(v) + 1, *v.shape[1:]).index_copy(0, pillar.where(written, len(v)).flatten(), out)[:-1]

    def bytes(self, shape, dtype, backward):
        # Forward: read q, k, v, write o. Backward: read q, k, v, o and its gradient, write three gradients.
        channels = shape["heads"] * shape["dim"]
        return (8 if backward else 4) * shape["pillars"] * channels * element_size(dtype) + 4 * shape["pillars"]

    def flops(self, shape, backward):
        products = 7 if backward else 2
        return 2 * products * shape["pillars"] * shape["group"] * shape["heads"] * shape["dim"]


class FlatWindowBlock(FlatWindowAttention):
    """The window sort and attention along each of its four orders, summed, as a block needs them; same shape."""

    def make_inputs(self, shape, dtype, device, seed=0):
        inputs = super().make_inputs(shape, dtype, device, seed)
        side, window = (shape["side"],) * 2, (shape["window"],) * 2
        coords = scan_cells(shape["pillars"], shape["side"], seed).to(device)
        return {**inputs, "coords": coords, "settings": (1, side, window, shape["group"])}

    def providers(self, device):
        return {"zoo": self._sorted, "plain": self._plain_sorted}

    @staticmethod
    def _four(inputs, order, groups, backend):
        from zoo.kernels.flat_window import ORDERS, Flattening

        flattening = Flattening(order, groups, inputs["settings"][3])
        return sum(
            FlatWindowAttention._zoo({**inputs, "flattening": flattening._replace(order=order[i:])}, backend)
            for i in range(len(ORDERS))
        )

    @staticmethod
    def _sorted(inputs):
        samples, cells, window, group = inputs["settings"]
        table = torch.ops.zoo.flatten_windows(inputs["coords"], samples, list(cells), list(window), group)
        return FlatWindowBlock._four(inputs, *table, "auto")

    @staticmethod
    def _plain_sorted(inputs):
        from zoo.kernels.flat_window import reference

        table = reference.flatten_windows(inputs["coords"], reference.Windows(*inputs["settings"]))
        return FlatWindowBlock._four(inputs, *table, "reference")

    def bytes(self, shape, dtype, backward):
        return 4 * super().bytes(shape, dtype, backward) + 16 * shape["pillars"]

    def flops(self, shape, backward):
        return 4 * super().flops(shape, backward)


class VoxelMax(Op):
    """Points to voxels, then the maximum of features over them; shape: points, channels, voxel, range, capacity.

    The capacity fixes the number of voxels, so that nothing waits for the device.
    """

    leaves = ("values",)

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        size = shape["points"], shape["channels"]
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        # In a tuple, since coordinates stay in float32 when the reference runs in float64.
        cloud = (scan_points(shape["points"], seed).to(device),)
        return {"cloud": cloud, "values": values.requires_grad_(), "shape": shape}

    def providers(self, device):
        return {"zoo": self._zoo, "plain": self._plain}

    @staticmethod
    def _zoo(inputs, backend="auto"):
        from zoo.kernels.voxelize import group_points, make_grid, segment_max

        shape, (points,) = inputs["shape"], inputs["cloud"]
        half, size = shape["range"], shape["voxel"]
        grid = make_grid((size, size, 6), (-half, -half, -2, half, half, 4), True, "zyx")
        _, order, index, offsets = group_points(points, [len(points)], grid, shape["capacity"], backend=backend)
        return segment_max(inputs["values"][order], index, shape["capacity"], offsets, backend=backend)

    @staticmethod
    def _plain(inputs):
        """Keys, sort, running sum and scattered maxima in torch: the definition of the op."""
        return VoxelMax._zoo(inputs, "reference")

    def bytes(self, shape, dtype, backward):
        # Read five columns and the values, write the maxima; backward reads those and writes gradients.
        values, voxels = shape["points"] * shape["channels"], shape["capacity"] * shape["channels"]
        moved = (2 * values + 2 * voxels) if backward else values + voxels
        return 20 * shape["points"] + moved * element_size(dtype)
