"""The registered ops of factorized self-attention and their public functions.

Paper: Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost, arXiv:2312.08614.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_BATCH, MAX_OFFSET, cast_for_autocast, map_reasons, refuse, use_triton
from zoo.kernels.factorized import reference

# Up to here one program holds all keys of a branch; more global keys are walked over.
MAX_HELD_KEYS = 128
# Half of it in float32, of which a tile would not fit.
MAX_HEAD_DIM = 128
MAX_WINDOW = 11
# Kernels divide the numbers of pooled values in float32, exactly up to here.
MAX_ENTRIES = 2**21


@torch.library.custom_op("zoo::cross_window_pool", mutates_args=(), device_types="cuda")
def _pool(x: Tensor, heads: int, window: int, dilations: list[int], fusion: str) -> Tensor:
    from zoo.kernels.factorized import triton_pool

    return triton_pool.forward(x, heads, window, dilations, fusion)


@_pool.register_kernel("cpu")
def _(x, heads, window, dilations, fusion):
    return reference.cross_window_pool(x, heads, window, dilations, fusion)


@_pool.register_fake
def _(x, heads, window, dilations, fusion):
    groups = len(dilations)
    return x.new_empty(groups, x.shape[0], window, window, x.shape[3] // groups)


@torch.library.custom_op("zoo::cross_window_pool_backward", mutates_args=(), device_types="cuda")
def _pool_backward(
    grad: Tensor, height: int, width: int, heads: int, dilations: list[int], fusion: str
) -> Tensor:  # fmt: skip
    from zoo.kernels.factorized import triton_pool

    return triton_pool.backward(grad, height, width, heads, dilations, fusion)


@_pool_backward.register_kernel("cpu")
def _(grad, height, width, heads, dilations, fusion):
    return reference.cross_window_pool_backward(grad, [height, width], heads, dilations, fusion)


@_pool_backward.register_fake
def _(grad, height, width, heads, dilations, fusion):
    return grad.new_empty(grad.shape[1], height, width, grad.shape[0] * grad.shape[4])


def _pool_setup_context(ctx, inputs, output):
    x, ctx.heads, _, ctx.dilations, ctx.fusion = inputs
    ctx.size = x.shape[1:3]


def _pool_autograd_backward(ctx, grad):
    dx = torch.ops.zoo.cross_window_pool_backward(grad, *ctx.size, ctx.heads, ctx.dilations, ctx.fusion)
    return dx, None, None, None, None


_pool.register_autograd(_pool_autograd_backward, setup_context=_pool_setup_context)


@torch.library.custom_op("zoo::factorized_attention", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, k_global: Tensor, v_global: Tensor, k_local: Tensor, v_local: Tensor,
    k_dilated: Tensor | None, v_dilated: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.factorized import triton

    return triton.forward(q, k_global, v_global, k_local, v_local, k_dilated, v_dilated)


@_attention.register_kernel("cpu")
def _(q, k_global, v_global, k_local, v_local, k_dilated, v_dilated):
    out = reference.factorized_attention(q, k_global, v_global, k_local, v_local, k_dilated, v_dilated)
    return out, q.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(q, k_global, v_global, k_local, v_local, k_dilated, v_dilated):
    # Where all keys are held, the backward computes its softmax again.
    kept = q.device.type == "cuda" and k_global.shape[1] > MAX_HELD_KEYS
    return q.new_empty(q.shape), q.new_empty(q.shape[:2] if kept else (0,), dtype=torch.float32)


@torch.library.custom_op("zoo::factorized_attention_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    grad: Tensor, q: Tensor, k_global: Tensor, v_global: Tensor, k_local: Tensor, v_local: Tensor,
    k_dilated: Tensor | None, v_dilated: Tensor | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.factorized import triton

    return triton.backward(grad, q, k_global, v_global, k_local, v_local, k_dilated, v_dilated, out, lse)


@_attention_backward.register_kernel("cpu")
def _(grad, q, k_global, v_global, k_local, v_local, k_dilated, v_dilated, out, lse):
    inputs = (q, k_global, v_global, k_local, v_local, k_dilated, v_dilated)
    grads = reference.factorized_attention_backward(grad, *inputs)
    grads = [g.clone(memory_format=torch.contiguous_format) for g in grads]
    return (*grads, *(q.new_empty(0) for _ in range(7 - len(grads))))


@_attention_backward.register_fake
def _(grad, q, k_global, v_global, k_local, v_local, k_dilated, v_dilated, out, lse):
    inputs = (q, k_global, v_global, k_local, v_local, k_dilated, v_dilated)
    return tuple(q.new_empty(0 if x is None else x.shape) for x in inputs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    *inputs, out, lse = ctx.saved_tensors
    grads = torch.ops.zoo.factorized_attention_backward(grad, *inputs, out, lse)
    return tuple(None if x is None else g for x, g in zip(inputs, grads, strict=True))


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def _attention_flops(q, k_global, k_local, k_dilated, products: int) -> int:
    """FLOPs of `products` matrix products of queries and keys; arguments are shapes."""
    local = k_local[1] * k_local[2] * k_local[3] * (1 if k_dilated is None else 2)
    return 2 * products * q[0] * q[1] * (k_global[1] * k_global[2] + local)


@register_flop_formula(torch.ops.zoo.factorized_attention)
def _(q, k_global, v_global, k_local, v_local, k_dilated=None, *args, out_shape=None, **kwargs) -> int:
    return _attention_flops(q, k_global, k_local, k_dilated, 2)


@register_flop_formula(torch.ops.zoo.factorized_attention_backward)
def _(grad, q, k_global, v_global, k_local, v_local, k_dilated=None, *args, out_shape=None, **kwargs) -> int:
    return _attention_flops(q, k_global, k_local, k_dilated, 5)


def can_pool(x: Tensor, heads: int, window: int, dilations: Sequence[int], raise_error: bool = False) -> bool:
    """Whether the Triton kernels of `cross_window_pool` take this problem; arguments as given there.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = map_reasons("x", x)
    if len(dilations) > 2:
        reasons.append(f"its limit is 2 channel groups, got {len(dilations)}.")
    if window > MAX_WINDOW:
        reasons.append(f"its limit is a window of {MAX_WINDOW} positions, got {window}.")
    _, H, W, C = x.shape
    if H * W * C >= MAX_OFFSET:
        reasons.append(f"its limit is an image of {MAX_OFFSET} elements, got x of shape {tuple(x.shape)}.")
    windows = max(reference.window_count(H, window, d) * reference.window_count(W, window, d) for d in dilations)
    entries = windows * (C // (len(dilations) * heads))
    if entries > MAX_ENTRIES:
        reasons.append(f"its limit is {MAX_ENTRIES} values of one position and head, got {entries}.")
    return refuse(reasons, "cross_window_pool", raise_error)


def can_run(q: Tensor, k_global: Tensor, k_local: Tensor, raise_error: bool = False) -> bool:
    """Whether the Triton kernels of `factorized_attention` take this problem.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    if not q.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {q.device}.")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {q.dtype}.")
    if q.shape[0] > MAX_BATCH:
        reasons.append(f"its limit is a batch of {MAX_BATCH}, got q of shape {tuple(q.shape)}.")
    if max(q.stride(1), q.shape[2]) * q.shape[1] >= MAX_OFFSET:
        reasons.append(f"its limit is an image of {MAX_OFFSET} elements, got q of shape {tuple(q.shape)}.")
    if k_local.shape[1] > MAX_HELD_KEYS:
        reasons.append(f"its limit is {MAX_HELD_KEYS} local keys, got {k_local.shape[1]}.")
    limit = MAX_HEAD_DIM if q.dtype != torch.float32 else MAX_HEAD_DIM // 2
    for name, width in (("the global group", k_global.shape[2]), ("a local head", k_local.shape[3])):
        if width > limit:
            reasons.append(f"its limit is {limit} channels in {name} with {q.dtype}, got {width}.")
    return refuse(reasons, "factorized_attention", raise_error)


def cross_window_pool(
    x: Tensor,
    heads: int,
    *,
    window: int = 7,
    dilations: Sequence[int] = (1,),
    fusion: str = "official",
    backend: str = "auto",
) -> Tensor:
    """Pool a map over its windows: one value for each position of a window, head and channel (cross-window fusion).

    The channels are cut into as many contiguous groups as there are dilations. For each group the map is covered by
    windows of `window` x `window` positions, `dilation` apart, from the top left; a window that reaches over the
    bottom or right edge continues by reflection, repeatedly where the map is smaller than the window. Within a head
    the windows then are fused. With "official", as published, channel c of the result is the mean of the c-th
    run of R consecutive values of the R x D values ordered by window, then channel: it mixes windows and channels in
    a pattern that depends on the number of windows R. With "window_mean" it is the mean of channel c over windows.

    Neither a padded nor an unfolded map is stored. Gradients are deterministic.

    Args:
        x: Map [B, H, W, C], float16, bfloat16, float32 (float64 on the reference). Any strides.
        heads: Number of heads M of D channels in each group, C = len(dilations) * M * D.
        window: Positions P per side of a window.
        dilations: Distance of neighbouring positions for each group, in tokens.
        fusion: "official" or "window_mean".
        backend: "auto", "triton" or "reference".

    Returns:
        [len(dilations), B, P, P, M * D] in the dtype of x, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes or arguments do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: FaViT, arXiv:2312.08614.
    """
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"x must be a map [B, H, W, C] of at least one token, got shape {tuple(x.shape)}.")
    if len(dilations) < 1 or min(dilations) < 1 or window < 1 or heads < 1:
        raise ValueError(f"heads, window and dilations must be positive, got {heads}, {window}, {tuple(dilations)}.")
    if x.shape[-1] % (heads * len(dilations)):
        raise ValueError(
            f"{len(dilations)} groups of {heads} heads must divide the channels of x, got {x.shape[-1]} channels."
        )
    if fusion not in reference.FUSIONS:
        raise ValueError(f"fusion must be one of {reference.FUSIONS}, got {fusion!r}.")
    (x,) = cast_for_autocast(x)
    if use_triton(backend, lambda explain: can_pool(x, heads, window, dilations, explain)):
        return torch.ops.zoo.cross_window_pool(x, heads, window, list(dilations), fusion)
    return reference.cross_window_pool(x, heads, window, list(dilations), fusion)


def _check_attention(q: Tensor, keys: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be tokens [B, N, C], got shape {tuple(q.shape)}.")
    for (name, k), v in zip(keys.items(), values.values(), strict=True):
        if k.dim() != (3 if name == "k_global" else 4) or k.shape[0] != q.shape[0]:
            layout = "[B, L, Cg]" if name == "k_global" else "[B, L, M, D]"
            raise ValueError(f"{name} must be {layout} with B = {q.shape[0]}, got shape {tuple(k.shape)}.")
        if v is None or v.shape != k.shape:
            found = None if v is None else tuple(v.shape)
            raise ValueError(f"v{name[1:]} must have the shape of {name}, {tuple(k.shape)}, got {found}.")
    k_global, k_local, *k_dilated = keys.values()
    if not (k_global.shape[1] and k_local.shape[1]):
        raise ValueError("k_global and k_local need at least one key each, got none.")
    if k_dilated and k_dilated[0].shape != k_local.shape:
        raise ValueError(
            f"k_dilated must have the shape of k_local, {tuple(k_local.shape)}, got {tuple(k_dilated[0].shape)}."
        )
    width = k_global.shape[2] + sum(k.shape[2] * k.shape[3] for k in (k_local, *k_dilated))
    if q.shape[2] != width:
        raise ValueError(f"q needs the channels of all groups together, {width}, got {q.shape[2]}.")
    dtypes = {x.dtype for x in (q, *keys.values(), *values.values())}
    if len(dtypes) > 1:
        raise ValueError(f"q, keys and values need one dtype, got {sorted(map(str, dtypes))}.")


def factorized_attention(
    q: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    k_local: Tensor,
    v_local: Tensor,
    k_dilated: Tensor | None = None,
    v_dilated: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token to a few keys of the whole image: global, local and dilated ones, for all heads at once.

    Each group of channels attends to keys of its own: softmax(q k^T / sqrt(width)) v, with the channels of the global
    group as one head and D channels per head in the others. Keys carry no position and there is no mask. The kernels
    read q once and write the result once; probabilities are not stored. Gradients flow to all inputs,
    deterministically.

    Args:
        q: Queries [B, N, C], float16, bfloat16, float32 (float64 on the reference), any strides. The first Cg channels
            are the global group's; then follow, head by head, D channels of the local and D of the dilated group.
        k_global: Keys [B, Lg, Cg] of the global group, any number Lg.
        v_global: Values [B, Lg, Cg].
        k_local: Keys [B, L, M, D] of the local group.
        v_local: Values [B, L, M, D].
        k_dilated: Keys [B, L, M, D] of the dilated group; None for no such group.
        v_dilated: Values [B, L, M, D], with `k_dilated`.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, N, C], group by group: Cg channels, then M * D of the local, then M * D of the dilated group. In the dtype
        of the inputs, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: FaViT, arXiv:2312.08614.
    """
    inputs = cast_for_autocast(q, k_global, v_global, k_local, v_local, k_dilated, v_dilated)
    q, k_global, v_global, k_local, v_local, k_dilated, v_dilated = inputs
    keys, values = dict(k_global=k_global, k_local=k_local), dict(v_global=v_global, v_local=v_local)
    if k_dilated is not None or v_dilated is not None:
        if k_dilated is None:
            raise ValueError("v_dilated needs k_dilated.")
        keys["k_dilated"], values["v_dilated"] = k_dilated, v_dilated
    _check_attention(q, keys, values)
    if use_triton(backend, lambda explain: can_run(q, k_global, k_local, explain)):
        return torch.ops.zoo.factorized_attention(*inputs)[0]
    return reference.factorized_attention(*inputs)
