"""The registered op of the depth-wise convolution and its public function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import cast_for_autocast, map_reasons, refuse, use_triton
from zoo.kernels.depthwise_conv import reference

MAX_KERNEL = 7


@torch.library.custom_op("zoo::depthwise_conv2d", mutates_args=(), device_types="cuda")
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, add_input: bool) -> Tensor:
    from zoo.kernels.depthwise_conv import triton

    return triton.convolve(x, weight, bias, residual, add_input)


@_conv.register_kernel("cpu")
def _(x, weight, bias, residual, add_input):
    out = reference.depthwise_conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), residual)
    return (out + x if add_input else out).clone(memory_format=torch.contiguous_format)


@_conv.register_fake
def _(x, weight, bias, residual, add_input):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::depthwise_conv2d_backward", mutates_args=(), device_types="cuda")
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool, add_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.kernels.depthwise_conv import triton

    dx = triton.convolve(grad, weight, None, None, add_input, flip=True)
    return dx, *triton.weight_gradient(x, grad, weight, with_bias)


@_conv_backward.register_kernel("cpu")
def _(grad, x, weight, with_bias, add_input):
    dx, dw, db = reference.depthwise_conv2d_backward(grad, x, weight.to(x.dtype))
    dx = dx + grad if add_input else dx
    grads = dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype) if with_bias else weight.new_empty(0)
    return tuple(g.clone(memory_format=torch.contiguous_format) for g in grads)


@_conv_backward.register_fake
def _(grad, x, weight, with_bias, add_input):
    db = weight.new_empty(x.shape[-1] if with_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), db


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, ctx.add_input = inputs
    ctx.with_bias, ctx.with_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    dx, dw, db = torch.ops.zoo.depthwise_conv2d_backward(grad, x, weight, ctx.with_bias, ctx.add_input)
    return dx, dw, db if ctx.with_bias else None, grad if ctx.with_residual else None, None


_conv.register_autograd(_autograd_backward, setup_context=_setup_context)


def _conv_flops(x, weight) -> int:
    return 2 * x[0] * x[1] * x[2] * x[3] * weight[-1] * weight[-2]


@register_flop_formula(torch.ops.zoo.depthwise_conv2d)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return _conv_flops(x, weight)


@register_flop_formula(torch.ops.zoo.depthwise_conv2d_backward)
def _(grad, x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * _conv_flops(x, weight)


def can_run(x: Tensor, weight: Tensor, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take this problem.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = map_reasons("x", x)
    if weight.shape[-1] > MAX_KERNEL:
        reasons.append(f"its limit is a kernel of {MAX_KERNEL} x {MAX_KERNEL}, got {weight.shape[-1]}.")
    return refuse(reasons, "depthwise_conv2d", raise_error)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Depth-wise convolution of a channels-last map, stride 1 and zero padding k // 2, plus a residual.

    Args:
        x: Map [B, H, W, C], float16, bfloat16, float32 (float64 on the reference). Any strides, for example a
            slice of a packed qkv map.
        weight: [C, 1, k, k] with k odd. The kernels take it in float32 or the dtype of x and multiply in float32.
        bias: [C] or None.
        residual: Map of x's shape added to the result, or None. x itself may be given: x + conv(x).
        backend: "auto", "triton" or "reference".

    Returns:
        [B, H, W, C] in the dtype of x, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes do not fit or the kernel size is even.
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be a map [B, H, W, C], got shape {tuple(x.shape)}.")
    k = weight.shape[-1]
    if tuple(weight.shape) != (x.shape[-1], 1, k, k) or k % 2 == 0:
        raise ValueError(f"weight must be [{x.shape[-1]}, 1, k, k] with k odd, got {tuple(weight.shape)}.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}.")
    if not use_triton(backend, lambda explain: can_run(x, weight, explain)):
        return reference.depthwise_conv2d(x, weight, bias, residual)
    add_input = residual is x
    if add_input:
        (x,), residual = cast_for_autocast(x), None
    else:
        x, residual = cast_for_autocast(x, residual)
    return torch.ops.zoo.depthwise_conv2d(x, weight, bias, residual, add_input)
