"""What every op shares: autocast, and the choice between the Triton kernels and the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the dtype of the enclosing autocast region, as a matrix product there would be cast.

    ``torch.library.register_autocast`` casts to one dtype fixed at registration, which would turn a
    float16 region into bfloat16; asking the region for its dtype keeps the caller's choice.
    """
    device = next(t for t in tensors if t is not None).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)


def use_triton(backend: str, can_run: Callable[[bool], bool]) -> bool:
    """Decide the backend; `can_run(raise_error)` explains a refusal when asked to."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    return backend != "reference" and can_run(backend == "triton")


def refuse(reasons: list[str], op: str, raise_error: bool) -> bool:
    """Return whether there is no reason to refuse, or raise with the first reason."""
    if reasons and raise_error:
        raise NotImplementedError(f"The Triton kernel of {op} cannot run here: {reasons[0]} Use backend='reference'.")
    return not reasons


def device_reasons(tensor: Tensor) -> list[str]:
    """Why a tensor's device or dtype keeps it from the Triton kernels, if anything does."""
    reasons = []
    if not tensor.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {tensor.device}.")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {tensor.dtype}.")
    return reasons
