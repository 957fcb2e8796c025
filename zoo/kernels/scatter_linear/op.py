"""The registered op of scattered linear attention and its public function.

Paper: ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention, arXiv:2401.00912.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_OFFSET, cast_for_autocast, refuse, use_triton
from zoo.kernels.scatter_linear import reference

# S of one head, in the registers of one program.
MAX_HEAD = 64


@torch.library.custom_op("zoo::scatter_linear", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, eps: float, relu: bool
) -> Tensor:
    from zoo.kernels.scatter_linear import triton

    return triton.forward(q, k, v, offsets, order, eps, relu)


@_attention.register_kernel("cpu")
def _(q, k, v, offsets, order, eps, relu):
    return reference.scatter_linear(q, k, v, offsets, order, eps, relu).contiguous()


@_attention.register_fake
def _(q, k, v, offsets, order, eps, relu):
    return q.new_empty(q.shape)


@torch.library.custom_op("zoo::scatter_linear_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.kernels.scatter_linear import triton

    return triton.backward(grad, q, k, v, offsets, order, eps, relu)


@_attention_backward.register_kernel("cpu")
def _(grad, q, k, v, offsets, order, eps, relu):
    grads = reference.scatter_linear_backward(grad, q, k, v, offsets, order, eps, relu)
    return tuple(g.contiguous() for g in grads)


@_attention_backward.register_fake
def _(grad, q, k, v, offsets, order, eps, relu):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, grad):
    grads = torch.ops.zoo.scatter_linear_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.relu)
    return (*grads, *(None,) * 4)


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.scatter_linear)
def _(q, k, v, *args, out_shape=None, **kwargs) -> int:
    # k^T v and q S, a row of D x D each.
    return 2 * 2 * q[0] * q[1] * q[2] ** 2


@register_flop_formula(torch.ops.zoo.scatter_linear_backward)
def _(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
    # k^T v and q S again, and four products for the gradients.
    return 6 * 2 * q[0] * q[1] * q[2] ** 2


def can_run(q: Tensor, k: Tensor, v: Tensor, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take this problem.

    Args:
        q, k, v: Rows as given to `scatter_linear_attention`.
        raise_error: Raise with the reason instead of returning False.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    if not q.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {q.device}.")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {q.dtype}.")
    if q.shape[-1] > MAX_HEAD:
        reasons.append(f"its limit is a head dimension of {MAX_HEAD}, got {q.shape[-1]}.")
    if q.shape[0] * q.shape[1] >= MAX_OFFSET // 8:
        reasons.append(f"its limit is {MAX_OFFSET // 8} rows times heads, got q of shape {tuple(q.shape)}.")
    return refuse(reasons, "scatter_linear_attention", raise_error)


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None) -> None:
    if q.dim() != 3 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v must be [V, M, D] (rows, heads, channels of a head) of one shape, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    for name, index in (("offsets", offsets), ("order", order)):
        if index is not None and (index.dim() != 1 or index.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"{name} must be a vector of int32 or int64, got shape {tuple(index.shape)} and {index.dtype}."
            )
    if offsets.shape[0] < 1:
        raise ValueError("offsets must hold 0 and the end of every window, got an empty tensor.")
    if order is not None and order.shape[0] != q.shape[0]:
        raise ValueError(f"order must name each of the {q.shape[0]} rows once, got {order.shape[0]} entries.")


def scatter_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
    *,
    relu: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Linear attention of each row to the rows of its window; windows hold any number of rows.

    With phi = relu (or the identity), for each window and head

        S = sum_j phi(k_j)^T v_j,   s = sum_j phi(k_j),   out_i = phi(q_i) S / (phi(q_i) . s + eps)

    without a scale. Rows of one window need not lie together: `order` names them, and nothing is copied. A query
    without a positive channel gives zero, as do rows behind the last window (padding). Sums run in float32. Gradients
    flow to q, k and v, deterministically.

    Args:
        q, k, v: [V, M, D] rows, heads and channels of a head, float16, bfloat16, float32 (float64 on the reference);
            any row and head strides, so that a packed projection is read in place. With `relu` these are the
            projections themselves, and so are the gradients.
        offsets: [R + 1] int32 or int64, rising from 0 to at most V: window r holds places offsets[r] to
            offsets[r + 1] - 1. Empty windows are allowed. Its values are not checked.
        order: [V] int32 or int64, the row at each place, each row once; rows in order by default.
        relu: Apply relu to q and k; without it they are taken as they are, and should not be negative.
        eps: Added to the denominator.
        backend: "auto", "triton" or "reference".

    Returns:
        [V, M, D] in the dtype of the inputs, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: ScatterFormer, arXiv:2401.00912, section 3.2.
    """
    _check(q, k, v, offsets, order)
    q, k, v = cast_for_autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if use_triton(backend, lambda explain: can_run(q, k, v, explain)):
        return torch.ops.zoo.scatter_linear(q, k, v, offsets, order, float(eps), relu)
    return reference.scatter_linear(q, k, v, offsets, order, float(eps), relu)
