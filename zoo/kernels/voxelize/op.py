"""Public functions of dynamic voxelisation.

Sources: the voxel encoders of FlatFormer (arXiv:2301.08739) and ScatterFormer (arXiv:2401.00912); dynamic voxelisation
itself is from arXiv:1910.06528.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels._dispatch import refuse, use_triton
from zoo.kernels.voxelize import reference
from zoo.kernels.voxelize.reference import Grid, Grouping, Voxels

ORDERS = ("zyx", "xyz")


def make_grid(voxel_size: Sequence[float], point_range: Sequence[float], clamp: bool, order: str) -> Grid:
    """Cells of a range.

    Args:
        voxel_size: Metres along x, y, z.
        point_range: x, y, z minimum, then maximum, in metres.
        clamp: Points outside go to the border cells rather than being dropped.
        order: "zyx" sorts voxels of a sample with x fastest, "xyz" with z fastest.

    Raises:
        ValueError: Lengths, signs or names do not fit.
    """
    if len(voxel_size) != 3 or len(point_range) != 6:
        raise ValueError(
            f"voxel_size takes 3 and point_range 6 numbers, got {list(voxel_size)} and {list(point_range)}."
        )
    minimum, maximum = tuple(map(float, point_range[:3])), tuple(map(float, point_range[3:]))
    size = tuple(map(float, voxel_size))
    if any(s <= 0 for s in size) or any(b <= a for a, b in zip(minimum, maximum, strict=True)):
        raise ValueError(f"a range must be positive along each axis, got {list(point_range)} in voxels of {size}.")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
    cells = tuple(max(1, round((b - a) / s)) for a, b, s in zip(minimum, maximum, size, strict=True))
    return Grid(size, minimum, cells, clamp, order)


def _check_points(points: Tensor, sizes: Sequence[int]) -> None:
    if points.dim() != 2 or points.shape[1] < 3 or points.dtype != torch.float32:
        raise ValueError(
            f"points must be float32 [N, 3 or more] with x, y, z first, got {points.dtype} {tuple(points.shape)}."
        )
    if min(sizes, default=0) < 0 or sum(sizes) != len(points):
        raise ValueError(f"sizes must be the points of each sample, {len(points)} in all, got {list(sizes)}.")


def can_run(x: Tensor, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take points or values of this kind.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {x.device}.")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {x.dtype}.")
    if x.shape[0] >= 2**31:
        reasons.append(f"its limit is 2**31 rows, got {x.shape[0]}.")
    return refuse(reasons, "voxelize", raise_error)


def group_points(
    points: Tensor, sizes: Sequence[int], grid: Grid, capacity: int | None = None, *, backend: str = "auto"
) -> Grouping:
    """Voxels of a batch of point clouds and the points in their order, for reductions without atomics.

    Points with a NaN or infinite column have no voxel: rows of NaN pad a sample and change no bit of its voxels. Equal
    cells keep the order of their points.

    Args:
        points: float32 [N, F], samples one after another; x, y, z in metres first.
        sizes: Points of each sample.
        grid: From `make_grid`.
        capacity: Rows of the result. Without it there are as many rows as voxels, which waits for the device once;
            with it, nothing waits, and voxels that find no row are lost with their points.
        backend: "auto", "triton" or "reference".

    Returns:
        Voxels; then the points that have one, by voxel. With a capacity all N points are there, those without a voxel
        last, with an index of `capacity`.

    Raises:
        ValueError: Shapes, dtypes or sizes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    _check_points(points, sizes)
    points = points.detach()
    if use_triton(backend, lambda explain: can_run(points, explain)) and len(points):
        from zoo.kernels.voxelize import triton

        return triton.group_points(points, list(sizes), grid, capacity)
    return reference.group_points(points, list(sizes), grid, capacity)


def point_features(
    points: Tensor, grouping: Grouping, grid: Grid, with_distance: bool = False, *, backend: str = "auto"
) -> Tensor:
    """What an encoder of voxels sees of a point, in the order of the grouping.

    Args:
        points: As given to `group_points`. Gradients flow to them on the reference only.
        grouping: From `group_points`.
        grid: From `make_grid`.
        with_distance: Append the distance from the origin.
        backend: "auto", "triton" or "reference".

    Returns:
        float32 [N, F + 6]: the columns of a point, x, y, z less their mean over the voxel's points, x, y, z less the
        voxel's centre; then the distance. Rows of points without a voxel are finite and otherwise arbitrary.

    Raises:
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    if use_triton(backend, lambda explain: can_run(points, explain)) and not points.requires_grad:
        from zoo.kernels.voxelize import triton

        _, order, _, offsets = grouping
        return triton.point_features(points, order, offsets, grouping.voxels.coords, grid, with_distance)
    return reference.point_features(points, grouping, grid, with_distance)


def voxelize(
    points: Tensor,
    sizes: Sequence[int],
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    clamp: bool = False,
    order: str = "zyx",
    capacity: int | None = None,
) -> tuple[Voxels, Tensor]:
    """Voxels of a batch of point clouds and the voxel of each point.

    Args:
        points: float32 [N, F], samples one after another; x, y, z in metres first.
        sizes: Points of each sample.
        voxel_size, point_range, clamp, order: As in `make_grid`.
        capacity: As in `group_points`.

    Returns:
        The voxels, and int64 [N] rows of them; the number of rows for a point without a voxel (outside the range,
        NaN or infinite, or beyond the capacity).

    Raises:
        ValueError: Shapes, dtypes, sizes or names do not fit.
    """
    grouped = group_points(points, sizes, make_grid(voxel_size, point_range, clamp, order), capacity)
    index = grouped.order.new_full((len(points),), len(grouped.voxels.coords))
    return grouped.voxels, index.scatter_(0, grouped.order, grouped.index)


def _check_segments(values: Tensor, index: Tensor) -> None:
    if values.dim() != 2 or index.dim() != 1 or len(index) != len(values) or index.dtype != torch.int64:
        raise ValueError(
            f"values must be [N, C] and index int64 [N], got {tuple(values.shape)} and {index.dtype} "
            f"{tuple(index.shape)}."
        )


def segment_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Mean of the rows of each segment.

    Args:
        values: [N, C], any floating dtype.
        index: int64 [N], the segment of each row; `num_segments` leaves a row out.
        num_segments: S.

    Returns:
        [S, C] in the dtype of `values`; zero for an empty segment. A row's gradient is its segment's over the count.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    _check_segments(values, index)
    return reference.segment_mean(values, index, num_segments)


@torch.library.custom_op("zoo::segment_max", mutates_args=(), device_types="cuda")
def _segment_max(values: Tensor, index: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    from zoo.kernels.voxelize import triton

    return triton.segment_max(values, offsets)


@_segment_max.register_kernel("cpu")
def _(values, index, offsets):
    row = reference.segment_argmax(values, index, len(offsets) - 1)
    return torch.cat([values, values.new_zeros(1, values.shape[1])]).gather(0, row), row.int()


@_segment_max.register_fake
def _(values, index, offsets):
    shape = offsets.shape[0] - 1, values.shape[1]
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("zoo::segment_max_backward", mutates_args=(), device_types="cuda")
def _segment_max_backward(grad: Tensor, row: Tensor, index: Tensor) -> Tensor:
    from zoo.kernels.voxelize import triton

    return triton.segment_max_backward(grad, row, index)


@_segment_max_backward.register_kernel("cpu")
def _(grad, row, index):
    out = grad.new_zeros(len(index) + 1, grad.shape[1])
    return out.scatter_(0, row.long(), grad)[:-1].clone()


@_segment_max_backward.register_fake
def _(grad, row, index):
    return grad.new_empty(index.shape[0], grad.shape[1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    return torch.ops.zoo.segment_max_backward(grad, *ctx.saved_tensors), None, None


_segment_max.register_autograd(_autograd_backward, setup_context=_setup_context)


def segment_max(
    values: Tensor, index: Tensor, num_segments: int, offsets: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Maximum of the rows of each segment by channel.

    Args:
        values, index, num_segments: As in `segment_mean`.
        offsets: int64 [S + 1] where each segment begins, for an index that does not decrease, as `group_points` gives
            both. The kernels need it.
        backend: "auto", "triton" or "reference".

    Returns:
        [S, C] in the dtype of `values`; zero for an empty segment. The first of equal rows has the gradient; a NaN
        counts as the largest.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    _check_segments(values, index)
    if offsets is not None and (offsets.shape != (num_segments + 1,) or offsets.dtype != torch.int64):
        raise ValueError(f"offsets must be int64 [{num_segments + 1}], got {offsets.dtype} {tuple(offsets.shape)}.")
    if backend == "triton" and offsets is None:
        raise NotImplementedError("The Triton kernel of segment_max needs sorted segments: give their offsets.")
    if use_triton(backend, lambda explain: can_run(values, explain)) and offsets is not None:
        return torch.ops.zoo.segment_max(values, index, offsets)[0]
    return reference.segment_max(values, index, num_segments)
