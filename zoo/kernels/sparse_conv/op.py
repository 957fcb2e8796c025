"""The registered ops of sparse convolution and their public functions.

Sub-manifold convolution is from arXiv:1711.10275; the depth-wise branches are ScatterFormer's, arXiv:2401.00912.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_OFFSET, cast_for_autocast, refuse, use_triton
from zoo.kernels.sparse_conv import reference
from zoo.kernels.sparse_conv.reference import SiteGrid
from zoo.kernels.sparse_conv.sites import TILE, Neighbours, build_tiles, coarser_sites, pillars_of

MAX_KERNELS = 3
MAX_GROUP = 256


@torch.library.custom_op("zoo::sparse_neighbours", mutates_args=(), device_types="cuda")
def _neighbours(
    keys: Tensor, coords: Tensor, kernel: list[int], stride: list[int], padding: list[int], transposed: bool,
    batch_size: int, shape: list[int], window: list[int],
) -> Tensor:  # fmt: skip
    from zoo.kernels.sparse_conv import triton_neighbours

    grid = SiteGrid(batch_size, tuple(shape), tuple(window))
    return triton_neighbours.neighbour_table(keys, coords, kernel, stride, padding, transposed, grid)


@_neighbours.register_kernel("cpu")
def _(keys, coords, kernel, stride, padding, transposed, batch_size, shape, window):
    grid = SiteGrid(batch_size, tuple(shape), tuple(window))
    return reference.neighbour_table(keys, coords, kernel, stride, padding, transposed, grid)


@_neighbours.register_fake
def _(keys, coords, kernel, stride, padding, transposed, batch_size, shape, window):
    taps = kernel[0] * kernel[1] * kernel[2]
    return coords.new_empty((taps, coords.shape[0]), dtype=torch.int32)


@torch.library.custom_op("zoo::sparse_numbers", mutates_args=(), device_types="cuda")
def _numbers(coords: Tensor, batch_size: int, shape: list[int], window: list[int]) -> Tensor:
    from zoo.kernels.sparse_conv import triton_sites

    return triton_sites.number_cells(coords, SiteGrid(batch_size, tuple(shape), tuple(window)))


@_numbers.register_kernel("cpu")
def _(coords, batch_size, shape, window):
    return SiteGrid(batch_size, tuple(shape), tuple(window)).encode(coords)


@_numbers.register_fake
def _(coords, batch_size, shape, window):
    return coords.new_empty(coords.shape[0], dtype=torch.int64)


@torch.library.custom_op("zoo::sparse_coarser", mutates_args=(), device_types="cuda")
def _coarser(
    coords: Tensor, kernel: list[int], stride: list[int], padding: list[int], batch_size: int, shape: list[int],
    window: list[int], capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.sparse_conv import triton_sites

    grid = SiteGrid(batch_size, tuple(shape), tuple(window))
    function = triton_sites.coarser_sites if len(coords) and capacity else coarser_sites
    return function(coords, kernel, stride, padding, grid, capacity)


@_coarser.register_kernel("cpu")
def _(coords, kernel, stride, padding, batch_size, shape, window, capacity):
    grid = SiteGrid(batch_size, tuple(shape), tuple(window))
    return coarser_sites(coords, kernel, stride, padding, grid, capacity)


@_coarser.register_fake
def _(coords, kernel, stride, padding, batch_size, shape, window, capacity):
    long = dict(dtype=torch.int64)
    return coords.new_empty(capacity, **long), coords.new_empty(capacity, 4), coords.new_empty((), **long)


@torch.library.custom_op("zoo::sparse_pillars", mutates_args=(), device_types="cuda")
def _pillars(
    keys: Tensor, coords: Tensor, batch_size: int, shape: list[int], window: list[int], capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.kernels.sparse_conv import triton_sites

    grid = SiteGrid(batch_size, tuple(shape), tuple(window))
    function = triton_sites.find_pillars if len(coords) and capacity else pillars_of
    return function(keys, coords, grid, capacity)


@_pillars.register_kernel("cpu")
def _(keys, coords, batch_size, shape, window, capacity):
    return pillars_of(keys, coords, SiteGrid(batch_size, tuple(shape), tuple(window)), capacity)


@_pillars.register_fake
def _(keys, coords, batch_size, shape, window, capacity):
    return coords.new_empty(capacity, 4), keys.new_empty(capacity, shape[0]), keys.new_empty(())


@torch.library.custom_op("zoo::sparse_tiles", mutates_args=(), device_types="cuda")
def _tiles(table: Tensor, kernel: list[int]) -> Tensor:
    from zoo.kernels.sparse_conv import triton_tiles

    return triton_tiles.build_tiles(table, kernel, TILE) if len(table) < 63 else build_tiles(table, kernel)


@_tiles.register_kernel("cpu")
def _(table, kernel):
    return build_tiles(table, kernel)


@_tiles.register_fake
def _(table, kernel):
    return table.new_empty(-(-table.shape[1] // TILE), 1 + table.shape[0] + TILE)


@torch.library.custom_op("zoo::sparse_conv", mutates_args=(), device_types="cuda")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tiles: Tensor, transposed: Tensor,
    transposed_tiles: Tensor, mirror: bool,
) -> Tensor:  # fmt: skip
    from zoo.kernels.sparse_conv import triton

    return triton.convolve(x, weight, bias, table, tiles, False, False)


@_conv.register_kernel("cpu")
def _(x, weight, bias, table, tiles, transposed, transposed_tiles, mirror):
    return reference.sparse_conv(x, weight, bias, table).contiguous()


@_conv.register_fake
def _(x, weight, bias, table, tiles, transposed, transposed_tiles, mirror):
    return x.new_empty(table.shape[1], weight.shape[0])


@torch.library.custom_op("zoo::sparse_conv_backward", mutates_args=(), device_types="cuda")
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, table: Tensor, tiles: Tensor, transposed: Tensor,
    transposed_tiles: Tensor, mirror: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.sparse_conv import triton

    return triton.backward(grad, x, weight, table, tiles, transposed, transposed_tiles, mirror)


@_conv_backward.register_kernel("cpu")
def _(grad, x, weight, table, tiles, transposed, transposed_tiles, mirror):
    dx, dweight = reference.sparse_conv_backward(grad, x, weight, table)
    return dx.contiguous(), dweight.contiguous(), grad.sum(0)


@_conv_backward.register_fake
def _(grad, x, weight, table, tiles, transposed, transposed_tiles, mirror):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad.new_empty(grad.shape[1])


def _conv_context(ctx, inputs, output):
    x, weight, bias, *tables, ctx.mirror = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, weight, *tables)


def _conv_autograd(ctx, grad):
    dx, dweight, dbias = torch.ops.zoo.sparse_conv_backward(grad, *ctx.saved_tensors, ctx.mirror)
    return (dx, dweight, dbias if ctx.bias else None, *(None,) * 5)


_conv.register_autograd(_conv_autograd, setup_context=_conv_context)


@torch.library.custom_op("zoo::sparse_depthwise_conv", mutates_args=(), device_types="cuda")
def _depthwise(x: Tensor, weight: Tensor, table: Tensor, taps: list[int], residual: bool, mirror: bool) -> Tensor:
    from zoo.kernels.sparse_conv import triton_depthwise

    return triton_depthwise.convolve(x, weight, table, taps, residual, mirror)


@_depthwise.register_kernel("cpu")
def _(x, weight, table, taps, residual, mirror):
    return reference.sparse_depthwise_conv(x, weight, table, taps, residual, mirror).contiguous()


@_depthwise.register_fake
def _(x, weight, table, taps, residual, mirror):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::sparse_depthwise_weight_gradient", mutates_args=(), device_types="cuda")
def _depthwise_weight(grad: Tensor, x: Tensor, table: Tensor, taps: list[int], width: int) -> Tensor:
    from zoo.kernels.sparse_conv import triton_depthwise

    return triton_depthwise.weight_gradient(grad, x, table, taps, width).to(x.dtype)


@_depthwise_weight.register_kernel("cpu")
def _(grad, x, table, taps, width):
    return reference.sparse_depthwise_weight_gradient(grad, x, table, taps, width)


@_depthwise_weight.register_fake
def _(grad, x, table, taps, width):
    return x.new_empty(table.shape[0], width)


def _depthwise_context(ctx, inputs, output):
    x, weight, table, ctx.taps, ctx.residual, ctx.mirror = inputs
    ctx.save_for_backward(x, weight, table)


def _depthwise_autograd(ctx, grad):
    x, weight, table = ctx.saved_tensors
    dx = torch.ops.zoo.sparse_depthwise_conv(grad, weight, table, ctx.taps, ctx.residual, not ctx.mirror)
    dweight = torch.ops.zoo.sparse_depthwise_weight_gradient(grad, x, table, ctx.taps, weight.shape[1])
    return dx, dweight, None, None, None, None


_depthwise.register_autograd(_depthwise_autograd, setup_context=_depthwise_context)


@register_flop_formula(torch.ops.zoo.sparse_conv)
def _(x, weight, bias, table, *args, out_shape=None, **kwargs) -> int:
    # As if every tap met a site: which do is known on the device only.
    return 2 * weight[0] * weight[1] * weight[2] * table[1]


@register_flop_formula(torch.ops.zoo.sparse_conv_backward)
def _(grad, x, weight, table, *args, out_shape=None, **kwargs) -> int:
    return 4 * weight[0] * weight[1] * weight[2] * table[1]


def _row_reasons(x: Tensor) -> list[str]:
    reasons = []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {x.device}.")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {x.dtype}.")
    if x.shape[0] >= MAX_OFFSET // 64:
        reasons.append(f"its limit is {MAX_OFFSET // 64} rows, got x of shape {tuple(x.shape)}.")
    return reasons


def can_run(x: Tensor, neighbours: Neighbours, raise_error: bool = False) -> bool:
    """Whether the Triton kernels of `sparse_conv` take this problem.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    return refuse(_row_reasons(x), "sparse_conv", raise_error)


def can_run_depthwise(x: Tensor, weight: Tensor, taps: Sequence[int], raise_error: bool = False) -> bool:
    """Whether the Triton kernels of `sparse_depthwise_conv` take this problem.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = _row_reasons(x)
    if len(taps) > MAX_KERNELS:
        reasons.append(f"its limit is {MAX_KERNELS} kernels, got {len(taps)}.")
    if weight.shape[1] > MAX_GROUP:
        reasons.append(f"its limit is {MAX_GROUP} channels a kernel, got {weight.shape[1]}.")
    return refuse(reasons, "sparse_depthwise_conv", raise_error)


def sparse_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Neighbours, *, backend: str = "auto"
) -> Tensor:
    """Convolution of a sparse map with tables of neighbours that layers share.

    out[n] = bias + sum over taps k with a site at table[k, n] of weight[:, k] x[table[k, n]]. Nothing is gathered in
    memory. Gradients flow to x, weight and bias, deterministically.

    Args:
        x: [N_in, Cin] rows of the input sites, float16, bfloat16, float32 (float64 on the reference); any row stride.
        weight: [Cout, KZ, KY, KX, Cin], as spconv 2 stores it.
        bias: [Cout] or None.
        neighbours: From `same_neighbours` (sub-manifold) or `downsample` (strided) with the same kernel size.
        backend: "auto", "triton" or "reference".

    Returns:
        [N_out, Cout] in the dtype of the inputs, or of the enclosing autocast region. Rows of padding hold the bias.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: sub-manifold sparse convolutional networks, arXiv:1711.10275.
    """
    if x.dim() != 2 or weight.dim() != 5 or weight.shape[4] != x.shape[1]:
        raise ValueError(
            f"x must be [N, Cin] and weight [Cout, KZ, KY, KX, Cin], got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if tuple(weight.shape[1:4]) != neighbours.kernel or x.shape[0] != neighbours.transposed.shape[1]:
        raise ValueError(
            f"the neighbours are of {neighbours.transposed.shape[1]} input sites and a kernel {neighbours.kernel}, "
            f"got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight has output channels, got {tuple(bias.shape)}.")
    x, weight, bias = cast_for_autocast(x, weight, bias)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"x, weight and bias need one dtype, got {x.dtype} and {weight.dtype}.")
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if wanted and len(neighbours.transposed) != len(neighbours.table):
        raise ValueError("gradients need neighbours that were made for them: downsample(..., gradients=True).")
    weight = weight.flatten(1, 3)  # [Cout, K, Cin]
    if use_triton(backend, lambda explain: can_run(x, neighbours, explain)):
        _, table, tiles, transposed, transposed_tiles, mirror = neighbours
        return torch.ops.zoo.sparse_conv(x, weight, bias, table, tiles, transposed, transposed_tiles, mirror)
    return reference.sparse_conv(x, weight, bias, neighbours.table)


def sparse_depthwise_conv(
    x: Tensor, weights: Sequence[Tensor], table: Tensor, *, residual: bool = False, backend: str = "auto"
) -> Tensor:
    """Depth-wise sub-manifold convolutions of consecutive groups of channels, each with its own kernel, in one launch.

    Channels behind the last group pass unchanged. With `residual`, x is added to all of it, which doubles those.
    Gradients flow to x and the weights, deterministically.

    Args:
        x: [N, C], float16, bfloat16, float32 (float64 on the reference); any row stride.
        weights: One [KZ, KY, KX, D] for each group, odd sizes, one D that divides C.
        table: int32 [sum of the kernels' taps, N] from `same_table`, in the order of `weights`.
        residual: Add x.
        backend: "auto", "triton" or "reference".

    Returns:
        [N, C] in the dtype of the inputs, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: the cross-window interaction of ScatterFormer, arXiv:2401.00912, section 3.3.
    """
    if x.dim() != 2 or not weights or any(w.dim() != 4 or w.shape[3] != weights[0].shape[3] for w in weights):
        raise ValueError(
            f"x must be [N, C] and weights [KZ, KY, KX, D] of one D, got {tuple(x.shape)} and "
            f"{[tuple(w.shape) for w in weights]}."
        )
    taps, D = [w.shape[:3].numel() for w in weights], weights[0].shape[3]
    if any(size % 2 == 0 for w in weights for size in w.shape[:3]):
        raise ValueError(f"a sub-manifold kernel needs odd sizes, got {[tuple(w.shape[:3]) for w in weights]}.")
    if x.shape[1] % D or len(weights) * D > x.shape[1]:
        raise ValueError(f"{len(weights)} groups of {D} channels must fit into and divide {x.shape[1]} channels.")
    if tuple(table.shape) != (sum(taps), x.shape[0]):
        raise ValueError(f"table must be [{sum(taps)}, {x.shape[0]}] (taps, rows of x), got {tuple(table.shape)}.")
    x, *weights = cast_for_autocast(x, *weights)
    if any(w.dtype != x.dtype for w in weights):
        raise ValueError(f"x and weights need one dtype, got {x.dtype} and {[w.dtype for w in weights]}.")
    weight = torch.cat([w.flatten(0, 2) for w in weights])
    if use_triton(backend, lambda explain: can_run_depthwise(x, weight, taps, explain)):
        return torch.ops.zoo.sparse_depthwise_conv(x, weight, table, taps, residual, False)
    return reference.sparse_depthwise_conv(x, weight, table, taps, residual)
