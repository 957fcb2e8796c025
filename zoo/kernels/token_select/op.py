"""The registered ops that choose visual tokens, and their public functions.

Paper: HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models,
arXiv:2408.10945.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_BATCH, refuse, use_triton
from zoo.kernels.token_select import reference
from zoo.kernels.token_select.reference import SelectionPlan

MAX_TOKENS = 4096
MAX_HEAD = 256
MAX_SUBIMAGES = 64


@torch.library.custom_op("zoo::cls_attention", mutates_args=(), device_types="cuda")
def _cls(q: Tensor, k: Tensor, heads: int, scale: float) -> Tensor:
    from zoo.kernels.token_select import triton

    return triton.cls_attention(q, k, heads, scale)


@_cls.register_kernel("cpu")
def _(q, k, heads, scale):
    return reference.cls_attention(q, k, heads, scale)


@_cls.register_fake
def _(q, k, heads, scale):
    return k.new_empty(k.shape[0], heads, k.shape[1], dtype=torch.promote_types(k.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    q, k, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(output, q, k)


def _cls_backward(ctx, grad):
    # Training through a choice of tokens is rare: plain PyTorch is enough, and as fast as memory allows.
    dq, dk = reference.cls_attention_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.scale)
    return dq, dk, None, None


_cls.register_autograd(_cls_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.cls_attention)
def _(q, k, heads, scale, *args, out_shape=None, **kwargs) -> int:
    return 2 * k[0] * k[1] * k[2]


@torch.library.custom_op("zoo::token_select", mutates_args=(), device_types="cuda")
def _select(
    first: Tensor, scores: Tensor, image: Tensor, slot: Tensor, whole: Tensor, region: Tensor, base: Tensor,
    rest: Tensor, hits: Tensor, capacity: Tensor, candidates: Tensor | None, exact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.token_select import triton

    plan = SelectionPlan(image, slot, whole, region, base, rest, hits, capacity, candidates, exact)
    return triton.token_select(first, scores, plan)


@_select.register_kernel("cpu")
def _(first, scores, *plan):
    return reference.token_select(first, scores, SelectionPlan(*plan))


@_select.register_fake
def _(first, scores, *plan):
    return torch.empty_like(scores, dtype=torch.bool), scores.new_empty(scores.shape[0], dtype=torch.int32)


def _device_reasons(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    reasons = []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {x.device}.")
    if x.dtype not in dtypes:
        reasons.append(f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {x.dtype}.")
    if x.shape[0] > MAX_BATCH:
        reasons.append(f"its limit is {MAX_BATCH} rows, got {x.shape[0]}.")
    if x.shape[1] > MAX_TOKENS:
        reasons.append(f"its limit is {MAX_TOKENS} tokens, got {x.shape[1]}.")
    return reasons


def can_run_cls(k: Tensor, heads: int, raise_error: bool = False) -> bool:
    """Whether the Triton kernel takes keys [B, T, C]; `raise_error` explains a refusal by NotImplementedError."""
    reasons = _device_reasons(k, (torch.float16, torch.bfloat16, torch.float32))
    if k.shape[-1] // heads > MAX_HEAD:
        reasons.append(f"its limit is a head dimension of {MAX_HEAD}, got {k.shape[-1] // heads}.")
    return refuse(reasons, "cls_attention", raise_error)


def can_run_select(scores: Tensor, plan: SelectionPlan, raise_error: bool = False) -> bool:
    """Whether the Triton kernel takes scores [P, N]; `raise_error` explains a refusal by NotImplementedError."""
    reasons = _device_reasons(scores, (torch.float32,))
    if plan.capacity.shape[1] > MAX_SUBIMAGES:
        reasons.append(f"its limit is {MAX_SUBIMAGES} sub-images an image, got {plan.capacity.shape[1]}.")
    return refuse(reasons, "token_select", raise_error)


def cls_attention(q: Tensor, k: Tensor, heads: int, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """One row of an attention map: where a single query of each image, the CLS token, looks.

    row[b, m] = softmax over T of scale * q[b, m] . k[b, :, m], always in float32 (float64 for float64), since ties and
    swaps among the scores of float16 would change which tokens are kept. Autocast does not touch it. Differentiable.

    Args:
        q: Queries [B, C] after the linear projection, not scaled.
        k: Keys [B, T, C]; any strides.
        heads: Number of heads; they are contiguous in the channels.
        scale: Factor on q . k; head_dim**-0.5 by default.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, heads, T] float32 probabilities.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernel cannot run.

    Source: HiRED, arXiv:2408.10945, section 3, of which this is the one row that its full maps are read for.
    """
    if k.dim() != 3 or q.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"q must be [B, C] and k [B, T, C], got {tuple(q.shape)} and {tuple(k.shape)}.")
    if heads < 1 or k.shape[-1] % heads or not k.shape[1]:
        raise ValueError(f"heads must divide the channels of at least one key, got heads={heads}, {tuple(k.shape)}.")
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q and k need one floating-point dtype, got {q.dtype} and {k.dtype}.")
    scale = (k.shape[-1] // heads) ** -0.5 if scale is None else float(scale)
    if use_triton(backend, lambda explain: can_run_cls(k, heads, explain)):
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        return torch.ops.zoo.cls_attention(q, k, heads, scale)
    with torch.autocast(k.device.type, enabled=False):
        return reference.cls_attention(q, k, heads, scale)


def _check(first: Tensor, scores: Tensor, plan: SelectionPlan) -> None:
    if scores.dim() != 2 or first.shape != scores.shape:
        raise ValueError(f"first and scores must be [P, N] alike, got {tuple(first.shape)} and {tuple(scores.shape)}.")
    P, N = scores.shape
    images = plan.whole.shape[0]
    shapes = {
        "image": (P,), "slot": (P,), "region": (images, N), "base": (images,), "rest": (images,), "hits": (images,),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tuple(getattr(plan, name).shape) != shape:
            raise ValueError(
                f"plan.{name} must be {list(shape)} for {images} images and scores {[P, N]}, "
                f"got {tuple(getattr(plan, name).shape)}."
            )
    if plan.capacity.dim() != 2 or plan.capacity.shape[0] != images:
        raise ValueError(f"plan.capacity must be [{images}, K], got {tuple(plan.capacity.shape)}.")
    if plan.candidates is not None and plan.candidates.shape != scores.shape:
        raise ValueError(f"plan.candidates must be {[P, N]}, got {tuple(plan.candidates.shape)}.")


def token_select(first: Tensor, scores: Tensor, plan: SelectionPlan, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Share a budget of tokens among the partitions of images and keep the first ones of each.

    The whole image gets `plan.base` tokens. `plan.rest` is shared among the sub-images in proportion to their content,
    which is where `first`, the attention map of the whole image, lies. Of every partition the tokens with the largest
    `scores` are kept, in their order; of equal scores the earlier. Nothing is read back to the host.

    Args:
        first: [P, N] scores that measure content; only the rows of whole images are read.
        scores: [P, N] scores that rank the tokens.
        plan: Sizes and capacities, see `SelectionPlan`.
        backend: "auto", "triton" or "reference".

    Returns:
        [P, N] bool, patches to keep, and [P] int32, how many of each partition.

    Raises:
        ValueError: Shapes do not fit.
        NotImplementedError: `backend="triton"` where the kernel cannot run.

    Source: HiRED, arXiv:2408.10945, algorithm 1, and its published code where they differ.
    """
    _check(first, scores, plan)
    first, scores = first.detach(), scores.detach()
    if use_triton(backend, lambda explain: can_run_select(scores, plan, explain)):
        first, scores = (x.float() if x.stride(-1) == 1 else x.float().contiguous() for x in (first, scores))
        return torch.ops.zoo.token_select(first, scores, *plan)
    return reference.token_select(first, scores, plan)
