"""What every op shares: autocast, and the choice between the Triton kernels and the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
# What backend="auto" stands for within `reference_only`; compiled graphs guard on it.
_auto_is_reference = False


@contextmanager
def reference_only() -> Iterator[None]:
    """Let backend="auto" mean the reference, for whole models in the plain formulation; for all threads."""
    global _auto_is_reference
    before, _auto_is_reference = _auto_is_reference, True
    try:
        yield
    finally:
        _auto_is_reference = before


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
    if backend == "auto" and _auto_is_reference:
        return False
    return backend != "reference" and can_run(backend == "triton")


def refuse(reasons: list[str], op: str, raise_error: bool) -> bool:
    """Return whether there is no reason to refuse, or raise with the first reason."""
    if reasons and raise_error:
        raise NotImplementedError(f"The Triton kernel of {op} cannot run here: {reasons[0]} Use backend='reference'.")
    return not reasons


# Tokens of an image are addressed in 32 bits, and images are a second dimension of a launch.
MAX_OFFSET = 2**31
MAX_BATCH = 65535
# Kernels divide token numbers in float32, exactly up to here.
MAX_TOKENS = 2**20


def map_reasons(name: str, x: Tensor) -> list[str]:
    """Why a map's device, dtype or size keeps it from the Triton kernels, if anything does."""
    reasons = []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {x.device}.")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {x.dtype}.")
    if x.shape[0] > MAX_BATCH:
        reasons.append(f"its limit is a batch of {MAX_BATCH}, got {name} of shape {tuple(x.shape)}.")
    if x.stride(1) * x.shape[1] >= MAX_OFFSET:
        reasons.append(f"its limit is an image of {MAX_OFFSET} elements, got {name} of shape {tuple(x.shape)}.")
    if x.shape[1] * x.shape[2] > MAX_TOKENS:
        reasons.append(f"its limit is an image of {MAX_TOKENS} tokens, got {name} of shape {tuple(x.shape)}.")
    return reasons
