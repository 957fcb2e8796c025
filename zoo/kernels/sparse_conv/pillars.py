"""Reductions over the sites of pillars: the registered ops, which are for inference, and their public functions.

Source: the attentive pillar pooling of ScatterFormer, arXiv:2401.00912.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels._dispatch import refuse, use_triton
from zoo.kernels.sparse_conv import reference


@torch.library.custom_op("zoo::sparse_pillar_max", mutates_args=(), device_types="cuda")
def _max(x: Tensor, rows: Tensor) -> Tensor:
    from zoo.kernels.sparse_conv import triton_pillars

    return triton_pillars.pillar_max(x, rows)


@_max.register_kernel("cpu")
def _(x, rows):
    return reference.pillar_max(x, rows)


@_max.register_fake
def _(x, rows):
    return x.new_empty(rows.shape[0], x.shape[1])


@torch.library.custom_op("zoo::sparse_pillar_attention", mutates_args=(), device_types="cuda")
def _attention(q: Tensor, k: Tensor, v: Tensor, place: Tensor, rows: Tensor, heads: int) -> Tensor:
    from zoo.kernels.sparse_conv import triton_pillars

    return triton_pillars.pillar_attention(q, k, v, place, rows, heads)


@_attention.register_kernel("cpu")
def _(q, k, v, place, rows, heads):
    return reference.pillar_attention(q, k, v, place, rows, heads)


@_attention.register_fake
def _(q, k, v, place, rows, heads):
    return q.new_empty(q.shape)


def can_run(tensors: tuple[Tensor, ...], heads: int | None = None, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take rows of sites of this kind; `heads` are those of `pillar_attention`.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    x, reasons = tensors[0], []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {x.device}.")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {x.dtype}.")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("it has no gradients.")
    sizes = (x.shape[1], x.shape[1] // heads) if heads else ()
    if any(n & (n - 1) for n in sizes):
        reasons.append(f"it takes powers of two of channels and channels of a head, got {sizes[0]} and {sizes[1]}.")
    return refuse(reasons, "pillar pooling", raise_error)


def pillar_max(x: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Maximum of each pillar's sites and 0.

    Args:
        x: [N, C] rows of sites.
        rows: int64 [P, Z] from `find_pillars`, each site at most once; N for no site.
        backend: "auto", "triton" or "reference".

    Returns:
        [P, C]. Gradients flow on the reference, which "auto" takes then.

    Raises:
        NotImplementedError: `backend="triton"` where the kernel cannot run.
    """
    if use_triton(backend, lambda explain: can_run((x,), None, explain)):
        return torch.ops.zoo.sparse_pillar_max(x, rows)
    return reference.pillar_max(x, rows)


def pillar_attention(
    q: Tensor, k: Tensor, v: Tensor, place: Tensor, rows: Tensor, heads: int, *, backend: str = "auto"
) -> Tensor:
    """Attention of one query a pillar to the pillar's sites, whose keys know their height.

    Args:
        q: [P, C].
        k, v: [N, C] rows of sites, any row stride.
        place: [Z, C], added to the keys at each height.
        rows: int64 [P, Z] from `find_pillars`, each site at most once; N for no site.
        heads: Heads M; logits are scaled by (C / M)**-0.5.
        backend: "auto", "triton" or "reference".

    Returns:
        [P, C], zero for a pillar without a site. Gradients flow on the reference, which "auto" takes then.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernel cannot run.
    """
    (P, Z), C = rows.shape, q.shape[1]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(place.shape)
    if shapes != ((P, C), (len(k), C), (len(k), C), (Z, C)) or C % heads:
        raise ValueError(
            f"q, k, v and place must be [{P}, C], [N, C], [N, C] and [{Z}, C], got {shapes}, {heads} heads."
        )
    if not q.dtype == k.dtype == v.dtype == place.dtype:
        raise ValueError(f"q, k, v and place need one dtype, got {[t.dtype for t in (q, k, v, place)]}.")
    if use_triton(backend, lambda explain: can_run((q, k, v, place), heads, explain)):
        return torch.ops.zoo.sparse_pillar_attention(q, k, v, place, rows, heads)
    return reference.pillar_attention(q, k, v, place, rows, heads)
