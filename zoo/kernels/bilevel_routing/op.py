"""The registered ops of bi-level routing attention and their public functions.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv:2303.08810.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import cast_for_autocast, map_reasons, refuse, use_triton
from zoo.kernels.bilevel_routing import reference
from zoo.kernels.bilevel_routing.reference import Routing, region_grid

# Above this, one program can no longer hold a row of affinities in registers.
MAX_ROUTED_REGIONS = 1024


@torch.library.custom_op("zoo::bilevel_attention", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, heads: int, region: list[int], kv_region: list[int],
    scale: float, mask_padding: bool, distinct: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.bilevel_routing import triton

    return triton.forward(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct)


@_attention.register_kernel("cpu")
def _(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct):
    out = reference.bilevel_attention(q, k, v, index, heads, region, kv_region, scale, mask_padding)
    return out.clone(memory_format=torch.contiguous_format), q.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct):
    # The reference's backward computes its softmax again, so only the kernels keep the log-sum-exp.
    shape = (q.shape[0], heads, q.shape[1], q.shape[2]) if q.device.type == "cuda" else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("zoo::bilevel_attention_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Tensor,
    heads: int, region: list[int], kv_region: list[int], scale: float, mask_padding: bool, distinct: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.bilevel_routing import triton

    return triton.backward(grad, q, k, v, out, lse, index, heads, region, kv_region, scale, mask_padding, distinct)


@_attention_backward.register_kernel("cpu")
def _(grad, q, k, v, out, lse, index, heads, region, kv_region, scale, mask_padding, distinct):
    grads = reference.bilevel_attention_backward(
        grad, q, k, v, index, heads, region, kv_region, scale, mask_padding
    )  # fmt: skip
    return tuple(g.clone(memory_format=torch.contiguous_format) for g in grads)


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, index, heads, region, kv_region, scale, mask_padding, distinct):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, index, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, index, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    q, k, v, index, out, lse = ctx.saved_tensors
    grads = torch.ops.zoo.bilevel_attention_backward(grad, q, k, v, out, lse, index, *ctx.settings)
    return (*grads, *(None,) * 7)


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def _attention_flops(q, index, kv_region, products: int) -> int:
    """FLOPs of `products` token-level matrix products; q and index are shapes."""
    keys = index[-1] * kv_region[0] * kv_region[1]
    return 2 * products * q[0] * q[1] * q[2] * q[3] * keys


@register_flop_formula(torch.ops.zoo.bilevel_attention)
def _(q, k, v, index, heads, region, kv_region, *args, out_shape=None, **kwargs) -> int:
    return _attention_flops(q, index, kv_region, 2)


@register_flop_formula(torch.ops.zoo.bilevel_attention_backward)
def _(grad, q, k, v, out, lse, index, heads, region, kv_region, *args, out_shape=None, **kwargs) -> int:
    return _attention_flops(q, index, kv_region, 5)


@torch.library.custom_op("zoo::route_regions", mutates_args=(), device_types="cuda")
def _route(
    q: Tensor, k: Tensor, region: list[int], kv_region: list[int], topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.bilevel_routing import triton_routing

    return triton_routing.route(q, k, region, kv_region, topk, scale)


@_route.register_kernel("cpu")
def _(q, k, region, kv_region, topk, scale):
    index, weight = reference.route_regions(q, k, region, kv_region, topk, scale)
    return index, weight.float()


@_route.register_fake
def _(q, k, region, kv_region, topk, scale):
    rows, cols = region_grid((q.shape[1], q.shape[2]), region)
    shape = (q.shape[0], rows * cols, topk)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


@register_flop_formula(torch.ops.zoo.route_regions)
def _(q, k, region, kv_region, *args, out_shape=None, **kwargs) -> int:
    grids = region_grid(q[1:3], region), region_grid(k[1:3], kv_region)
    return 2 * q[0] * q[3] * grids[0][0] * grids[0][1] * grids[1][0] * grids[1][1]


def can_run(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, weighted: bool = False, raise_error: bool = False
) -> bool:
    """Whether the Triton kernels take this problem.

    Args:
        q, k, v: Maps as given to `bilevel_attention`.
        heads: Number of heads.
        scale: Factor on the logits.
        weighted: Whether routing weights scale keys and values.
        raise_error: Raise with the reason instead of returning False.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = map_reasons("q", q) + map_reasons("k", k)
    if weighted:
        reasons.append("it does not scale keys and values by routing weights (soft routing).")
    if q.shape[-1] != v.shape[-1]:
        reasons.append(f"queries and values need equally many channels, got {q.shape[-1]} and {v.shape[-1]}.")
    if q.shape[-1] // heads > 128:
        reasons.append(f"its limit is a head dimension of 128, got {q.shape[-1] // heads}.")
    if scale <= 0:
        reasons.append(f"the scale must be positive, got {scale}.")
    return refuse(reasons, "bilevel_attention", raise_error)


def can_route(q: Tensor, k: Tensor, kv_regions: int, raise_error: bool = False) -> bool:
    """Whether the Triton routing kernels take this problem; see `can_run`."""
    reasons = map_reasons("q", q) + map_reasons("k", k)
    if kv_regions > MAX_ROUTED_REGIONS:
        reasons.append(f"its limit is {MAX_ROUTED_REGIONS} regions, got {kv_regions}.")
    return refuse(reasons, "route_regions", raise_error)


def _check_maps(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.dim() != 4:
            raise ValueError(f"{name} must be a map [B, H, W, C], got shape {tuple(x.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k need equal batch and channels, got {tuple(q.shape)} and {tuple(k.shape)}.")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v need equal batch and map size, got {tuple(k.shape)} and {tuple(v.shape)}.")
    if v is not None and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")


def _check_region(name: str, region: tuple[int, int]) -> tuple[int, int]:
    if len(region) != 2 or min(region) < 1:
        raise ValueError(f"{name} must be two positive sizes (height, width) in tokens, got {tuple(region)}.")
    return int(region[0]), int(region[1])


def _check_heads(heads: int, q: Tensor, v: Tensor) -> None:
    if heads < 1 or q.shape[-1] % heads or v.shape[-1] % heads:
        raise ValueError(f"heads must divide the channels {q.shape[-1]} of q and {v.shape[-1]} of v, got {heads}.")


def route_regions(
    q: Tensor,
    k: Tensor,
    region: tuple[int, int],
    topk: int,
    *,
    kv_region: tuple[int, int] | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Routing:
    """Choose for each query region the regions whose mean keys fit its mean query best.

    Means, affinities and the choice are computed in float32 for every input dtype: rounded to 16 bits they
    select other regions. Not differentiable; the reference functions are, for trainable routing.

    Args:
        q: Queries [B, H, W, C], float16, bfloat16, float32 (float64 on the reference). Any strides.
        k: Keys [B, H', W', C], the dtype of q.
        region: Height and width of a query region in tokens; ceil(H / height) * ceil(W / width) = G regions.
        topk: Number K of regions to keep, at most the number of key regions.
        kv_region: Height and width of a key region; `region` by default.
        scale: Factor on the affinities. It changes `Routing.weight`, not the choice.
        backend: "auto", "triton" or "reference".

    Returns:
        `Routing` with index [B, G, K] int32 in descending affinity, weight [B, G, K] float32 and the grid of
        query regions (rows, columns).

    Raises:
        ValueError: Shapes do not fit or `topk` is not in 1 ... number of key regions.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: BiFormer, arXiv:2303.08810, section 3.2.
    """
    _check_maps(q, k, None)
    region = _check_region("region", region)
    kv_region = _check_region("kv_region", kv_region or region)
    kv_rows, kv_cols = region_grid((k.shape[1], k.shape[2]), kv_region)
    if not 1 <= topk <= kv_rows * kv_cols:
        raise ValueError(
            f"topk must lie between 1 and the number of regions, {kv_rows * kv_cols} "
            f"({kv_rows} x {kv_cols} regions of {kv_region[0]} x {kv_region[1]} tokens), got {topk}."
        )
    grid = region_grid((q.shape[1], q.shape[2]), region)
    q, k = q.detach(), k.detach()
    if use_triton(backend, lambda explain: can_route(q, k, kv_rows * kv_cols, explain)):
        index, weight = torch.ops.zoo.route_regions(q, k, region, kv_region, topk, scale)
    else:
        index, weight = reference.route_regions(q, k, region, kv_region, topk, scale)
    return Routing(index, weight, grid)


def bilevel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int] | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
    weight: Tensor | None = None,
    distinct: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention of each query to the tokens of the regions that its own region has routed to.

    out = softmax(scale * q k_sel^T) v_sel for every region and head, where k_sel and v_sel are the tokens of
    the K routed regions. A map that regions do not divide is padded at the bottom and right: padding keys and
    values are zero and take part in the softmax as published, or are left out with `mask_padding`. Memory is
    linear in the number of tokens. Gradients flow to q, k, v (and `weight`), deterministically.

    Args:
        q: Queries [B, H, W, C], float16, bfloat16, float32 (float64 on the reference). Any strides; channel
            c belongs to head c // (C / heads).
        k: Keys [B, H', W', C].
        v: Values [B, H', W', C']. C' may differ from C on the reference.
        index: Routed key regions, integers [B, G, K] for all heads or [B, heads, G, K], values below the number
            of key regions, which is not checked.
        heads: Number of heads.
        region: Height and width of a query region in tokens.
        kv_region: The same for keys; `region` by default.
        scale: Factor on the logits; C**-0.5, of the full width, by default as published.
        mask_padding: Leave padding out of the softmax.
        weight: Optional [B, G, K] factors on the keys and values of each routed region (soft routing).
        distinct: Promise that no row of `index` names a region twice, as a top-k never does. It allows the
            faster kernel for regions of a few tokens.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, H, W, C'] in the dtype of the inputs, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes, dtypes or sizes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: BiFormer, arXiv:2303.08810, section 3.2.
    """
    _check_maps(q, k, v)
    _check_heads(heads, q, v)
    region = _check_region("region", region)
    kv_region = _check_region("kv_region", kv_region or region)
    rows, cols = region_grid((q.shape[1], q.shape[2]), region)
    per_head = index.dim() != 4 or index.shape[1] == heads
    if index.dim() not in (3, 4) or index.shape[0] != q.shape[0] or index.shape[-2] != rows * cols or not per_head:
        raise ValueError(
            f"index must be [{q.shape[0]}, {rows * cols}, K] or [{q.shape[0]}, {heads}, {rows * cols}, K], "
            f"got {tuple(index.shape)}."
        )
    if index.is_floating_point():
        raise ValueError(f"index must hold integers, got {index.dtype}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = cast_for_autocast(q, k, v)
    if use_triton(backend, lambda explain: can_run(q, k, v, heads, scale, weight is not None, explain)):
        index = index.to(torch.int32)
        return torch.ops.zoo.bilevel_attention(q, k, v, index, heads, region, kv_region, scale, mask_padding, distinct)[
            0
        ]
    return reference.bilevel_attention(q, k, v, index, heads, region, kv_region, scale, mask_padding, weight)


def bilevel_routing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    region: tuple[int, int],
    topk: int,
    scale: float | None = None,
    mask_padding: bool = False,
    return_routing: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Routing]:
    """Bi-level routing attention: `route_regions`, then `bilevel_attention` on its choice.

    Args:
        q: Queries [B, H, W, C], float16, bfloat16, float32 (float64 on the reference). Any strides.
        k: Keys [B, H, W, C].
        v: Values [B, H, W, C'].
        heads: Number of heads; they share the routing.
        region: Height and width of a region in tokens.
        topk: Number of regions that each region attends to.
        scale: Factor on the logits of both levels; C**-0.5, of the full width, by default as published.
        mask_padding: Leave padding out of the softmax.
        return_routing: Also return the `Routing`, for visualisation.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, H, W, C'], or that and the `Routing`.

    Raises:
        ValueError: Shapes, dtypes or sizes do not fit, or `topk` exceeds the number of regions.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: BiFormer, arXiv:2303.08810, section 3.2.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    routing = route_regions(q, k, region, topk, scale=scale, backend=backend)
    out = bilevel_attention(
        q, k, v, routing.index, heads=heads, region=region, scale=scale,
        mask_padding=mask_padding, distinct=True, backend=backend,
    )  # fmt: skip
    return (out, routing) if return_routing else out
