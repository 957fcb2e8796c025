"""The registered ops of flattened window attention and their public functions.

Paper: FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer, arXiv:2301.08739.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_OFFSET, cast_for_autocast, refuse, use_triton
from zoo.kernels.flat_window import reference
from zoo.kernels.flat_window.reference import ORDERS, Flattening, Windows
from zoo.kernels.voxelize import Voxels

MAX_GROUP = 256
MAX_HEAD = 64
# In float32, group times head dimension: what the registers of the query gradient hold.
MAX_FLOAT32 = 4096


@torch.library.custom_op("zoo::flatten_windows", mutates_args=(), device_types="cuda")
def _flatten(
    coords: Tensor, samples: int, cells: list[int], window: list[int], group_size: int
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.flat_window import triton_order

    return triton_order.flatten_windows(coords, Windows(samples, tuple(cells), tuple(window), group_size))


@_flatten.register_kernel("cpu")
def _(coords, samples, cells, window, group_size):
    return reference.flatten_windows(coords, Windows(samples, tuple(cells), tuple(window), group_size))


@_flatten.register_fake
def _(coords, samples, cells, window, group_size):
    V, rows = coords.shape[0], Windows(samples, tuple(cells), tuple(window), group_size).table_rows(coords.shape[0])
    return coords.new_empty(len(ORDERS), V, dtype=torch.int32), coords.new_empty(rows, 3, dtype=torch.int32)


def flatten_windows(voxels: Voxels, window: tuple[int, int], group_size: int) -> Flattening:
    """Sort pillars by window in four orders and cut each order into groups, without waiting for the device.

    With X = x + shift and Y = y + shift, order "x" walks over rows of windows, over windows of a row along x, over the
    columns of a window and over the cells of a column, every second row, window and column backwards; order "y"
    exchanges the axes; "x_shift" and "y_shift" shift the windows by half a window. Samples never mix.

    Args:
        voxels: Pillars sorted by sample; padding rows, with a sample of `voxels.batch_size`, come last. z is ignored.
        window: Cells of a window along x and y.
        group_size: Pillars of a group.

    Returns:
        The four orders and their common groups. A sample of n pillars has ceil(n / group_size) groups; the last one,
        if not full, attends over the sample's last group_size pillars, or over all if there are fewer.

    Raises:
        ValueError: Sizes are not positive, or the coordinates are not int32 [V, 4].

    Source: FlatFormer, arXiv:2301.08739, section 3.2.
    """
    coords = voxels.coords
    if coords.dim() != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
        raise ValueError(f"coords must be int32 [V, 4], got {coords.dtype} {tuple(coords.shape)}.")
    if min(*window, group_size) < 1:
        raise ValueError(f"window and group_size must be positive, got {tuple(window)} and {group_size}.")
    _, Y, X = voxels.shape
    order, groups = torch.ops.zoo.flatten_windows(coords, voxels.batch_size, [X, Y], list(window), group_size)
    return Flattening(order, groups, group_size)


@torch.library.custom_op("zoo::flat_window_attention", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Tensor, group_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.flat_window import triton

    return triton.forward(q, k, v, order, groups, group_size, scale)


@_attention.register_kernel("cpu")
def _(q, k, v, order, groups, group_size, scale):
    out = reference.flat_window_attention(q, k, v, order, groups, group_size, scale)
    return out.clone(memory_format=torch.contiguous_format), q.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(q, k, v, order, groups, group_size, scale):
    # The reference's backward computes its softmax again, so only the kernels keep the log-sum-exp.
    lse = q.new_empty(q.shape[:2] if q.device.type == "cuda" else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("zoo::flat_window_attention_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, order: Tensor, groups: Tensor,
    group_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.flat_window import triton

    return triton.backward(grad, q, k, v, out, lse, order, groups, group_size, scale)


@_attention_backward.register_kernel("cpu")
def _(grad, q, k, v, out, lse, order, groups, group_size, scale):
    return reference.flat_window_attention_backward(grad, q, k, v, order, groups, group_size, scale)


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, order, groups, group_size, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, order, groups, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, order, groups)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    grads = torch.ops.zoo.flat_window_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None,) * 4)


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.flat_window_attention)
def _(q, k, v, order, groups, group_size, *args, out_shape=None, **kwargs) -> int:
    return 4 * q[0] * q[1] * q[2] * group_size


@register_flop_formula(torch.ops.zoo.flat_window_attention_backward)
def _(grad, q, k, v, out, lse, order, groups, group_size, *args, out_shape=None, **kwargs) -> int:
    return 10 * q[0] * q[1] * q[2] * group_size


def can_run(q: Tensor, k: Tensor, v: Tensor, group_size: int, scale: float, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take this problem.

    Args:
        q, k, v: As given to `flat_window_attention`.
        group_size: Pillars of a group.
        scale: Factor on q . k.
        raise_error: Raise with the reason instead of returning False.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    if not q.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {q.device}.")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {q.dtype}.")
    if q.shape[2] > MAX_HEAD:
        reasons.append(f"its limit is a head dimension of {MAX_HEAD}, got {q.shape[2]}.")
    if group_size > MAX_GROUP:
        reasons.append(f"its limit is a group of {MAX_GROUP} pillars, got {group_size}.")
    if q.dtype == torch.float32 and group_size * q.shape[2] > MAX_FLOAT32:
        reasons.append(
            f"its limit in float32 is group_size times head dimension of {MAX_FLOAT32}, "
            f"got {group_size} times {q.shape[2]}."
        )
    if scale <= 0:
        reasons.append(f"its scale must be positive, got {scale}.")
    if any(x.shape[0] * x.stride(0) >= MAX_OFFSET for x in (q, k, v)):
        reasons.append(f"its limit is {MAX_OFFSET} elements from first to last pillar, got {tuple(q.shape)}.")
    return refuse(reasons, "flat_window_attention", raise_error)


def _check(q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: Tensor) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be [V, M, D], got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}.")
    if order.shape != q.shape[:1] or order.dtype != torch.int32:
        raise ValueError(
            f"order must be one of the orders of `flatten_windows`, int32 [{len(q)}], "
            f"got {order.dtype} {tuple(order.shape)}."
        )
    if groups.dim() != 2 or groups.shape[1] != 3 or groups.dtype != torch.int32:
        raise ValueError(
            f"groups must be the table of `flatten_windows`, int32 [R, 3], got {groups.dtype} {tuple(groups.shape)}."
        )


def flat_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flattening: Flattening,
    which: int = 0,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of pillars within groups of equal size along a flattened order of windows.

    For a group that holds places [begin, end) of the order and attends over places [first, end),

        out[order[i]] = softmax(scale * q[order[i]] k[order[j]]^T) v[order[j]],   begin <= i < end, first <= j < end

    for each head. The kernels read the rows of q, k and v through the order and write to the rows of the pillars:
    nothing is gathered or scattered outside. Gradients flow to q, k and v, deterministically.

    Args:
        q, k, v: [V, M, D], float16, bfloat16, float32 (float64 on the reference), in the pillars' own row order.
            Slices of a packed projection are read in place.
        flattening: From `flatten_windows`.
        which: Row of `flattening.order`, one of the four `ORDERS`.
        scale: Factor on q . k; D**-0.5 by default.
        backend: "auto", "triton" or "reference".

    Returns:
        [V, M, D] in the dtype of the inputs, or of the enclosing autocast region; rows of padding are zero.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: FlatFormer, arXiv:2301.08739, section 3.
    """
    order, groups, group_size = flattening.order[which], flattening.groups, flattening.group_size
    _check(q, k, v, order, groups)
    q, k, v = cast_for_autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if use_triton(backend, lambda explain: can_run(q, k, v, group_size, scale, explain)):
        return torch.ops.zoo.flat_window_attention(q, k, v, order, groups, group_size, scale)[0]
    return reference.flat_window_attention(q, k, v, order, groups, group_size, scale)
