"""The registered op of bias, sum and ReLU, and its public function."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels._dispatch import refuse, use_triton
from zoo.kernels.bias_relu import reference


@torch.library.custom_op("zoo::bias_relu_", mutates_args=("x",), device_types="cuda")
def _bias_relu_(x: Tensor, bias: Tensor, added: Tensor | None, after: bool) -> None:
    from zoo.kernels.bias_relu import triton

    triton.bias_relu_(x, bias, added, after)


@_bias_relu_.register_kernel("cpu")
def _(x, bias, added, after):
    reference.bias_relu_(x, bias, added, after)


@_bias_relu_.register_fake
def _(x, bias, added, after):
    return None


def can_run(x: Tensor, raise_error: bool = False) -> bool:
    """Whether the Triton kernel takes this tensor.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {x.device}.")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {x.dtype}.")
    if not x.is_contiguous():
        reasons.append(f"it takes contiguous tensors, got strides {tuple(x.stride())}.")
    return refuse(reasons, "bias_relu_", raise_error)


def bias_relu_(
    x: Tensor, bias: Tensor, added: Tensor | None = None, *, after: bool = False, backend: str = "auto"
) -> Tensor:
    """relu(x + bias + added) in place, or relu(x + bias) + added: what follows a convolution, in one pass.

    For inference: no gradients flow. The kernel adds in float32 and rounds once.

    Args:
        x: [..., C], overwritten. A channels-last map [B, C, H, W] is given as `x.permute(0, 2, 3, 1)`.
        bias: [C], of the dtype of x.
        added: Of the shape and dtype of x; None for nothing.
        after: Add it behind the ReLU.
        backend: "auto", "triton" or "reference".

    Returns:
        x.

    Raises:
        ValueError: Shapes or dtypes do not fit, or a gradient is wanted.
        NotImplementedError: `backend="triton"` where the kernel cannot run.
    """
    if x.dim() < 1 or tuple(bias.shape) != tuple(x.shape[-1:]) or (added is not None and added.shape != x.shape):
        raise ValueError(
            f"x must be [..., C], bias [C] and added as x, got {tuple(x.shape)}, {tuple(bias.shape)} and "
            f"{None if added is None else tuple(added.shape)}."
        )
    if bias.dtype != x.dtype or (added is not None and added.dtype != x.dtype):
        raise ValueError(f"x, bias and added need one dtype, got {x.dtype} and {bias.dtype}.")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, added)):
        raise ValueError("bias_relu_ has no gradients: call it under torch.no_grad().")
    if use_triton(backend, lambda explain: can_run(x, explain)):
        torch.ops.zoo.bias_relu_(x, bias, added, after)
        return x
    return reference.bias_relu_(x, bias, added, after)
