"""The registered op of halo attention and its public function.

Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv:2103.12731.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import cast_for_autocast, map_reasons, refuse, use_triton
from zoo.kernels.halo import reference
from zoo.kernels.halo.reference import Geometry, query_size

MAX_HEAD = 128
# float16 holds position logits divided by the scale.
MIN_SCALE = 2**-7
# Reachable rows of one relative table: what a program holds in registers for a tile of queries.
MAX_RELATIVE = 64


@torch.library.custom_op("zoo::halo_attention", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, heads: int, block: int, halo: int, stride: int,
    scale: float, scale_position: bool, mask_border: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.halo import triton

    geometry = Geometry(heads, block, halo, stride)
    return triton.forward(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border)


@_attention.register_kernel("cpu")
def _(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_position, mask_border):
    geometry = Geometry(heads, block, halo, stride)
    out = reference.halo_attention(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border)
    return out.clone(memory_format=torch.contiguous_format), q.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_position, mask_border):
    # The reference's backward computes its softmax again, so only the kernels keep the log-sum-exp.
    shape = (q.shape[0], heads, q.shape[1], q.shape[2]) if q.device.type == "cuda" else (0,)
    out = q.new_empty(*q.shape[:3], kv.shape[-1] - q.shape[-1])
    return out, q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("zoo::halo_attention_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, out: Tensor, lse: Tensor,
    heads: int, block: int, halo: int, stride: int, scale: float, scale_position: bool, mask_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.halo import triton

    geometry = Geometry(heads, block, halo, stride)
    return triton.backward(
        grad, q, kv, height_rel, width_rel, out, lse, geometry, scale, scale_position, mask_border
    )  # fmt: skip


@_attention_backward.register_kernel("cpu")
def _(grad, q, kv, height_rel, width_rel, out, lse, heads, block, halo, stride, scale, scale_position, mask_border):
    grads = reference.halo_attention_backward(
        grad, q, kv, height_rel, width_rel, Geometry(heads, block, halo, stride), scale, scale_position, mask_border
    )  # fmt: skip
    return tuple(g.clone(memory_format=torch.contiguous_format) for g in grads)


@_attention_backward.register_fake
def _(grad, q, kv, height_rel, width_rel, out, lse, heads, block, halo, stride, scale, scale_position, mask_border):
    return tuple(x.new_empty(x.shape) for x in (q, kv, height_rel, width_rel))


def _setup_context(ctx, inputs, output):
    q, kv, height_rel, width_rel, *ctx.settings = inputs
    ctx.save_for_backward(q, kv, height_rel, width_rel, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    grads = torch.ops.zoo.halo_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None,) * 7)


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def _flops(q, kv, block: int, halo: int, products: tuple[int, int]) -> int:
    """FLOPs of matrix products with keys and with values (`products` of each) and of as many position terms.

    q and kv are shapes. The position term of a query is two products with a row of each table for each row and
    column of the window.
    """
    window = block + 2 * halo
    keys, values = q[3] * (window * window + 2 * window), (kv[3] - q[3]) * window * window
    return 2 * q[0] * q[1] * q[2] * (products[0] * keys + products[1] * values)


@register_flop_formula(torch.ops.zoo.halo_attention)
def _(q, kv, height_rel, width_rel, heads, block, halo, *args, out_shape=None, **kwargs) -> int:
    return _flops(q, kv, block, halo, (1, 1))


@register_flop_formula(torch.ops.zoo.halo_attention_backward)
def _(grad, q, kv, height_rel, width_rel, out, lse, heads, block, halo, *args, out_shape=None, **kwargs) -> int:
    return _flops(q, kv, block, halo, (3, 2))


def can_run(q: Tensor, kv: Tensor, geometry: Geometry, scale: float, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take this problem.

    Args:
        q, kv: Maps as given to `halo_attention`.
        geometry: Heads, block, halo and stride.
        scale: Factor on the content logits.
        raise_error: Raise with the reason instead of returning False.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = map_reasons("q", q) + map_reasons("kv", kv)
    key = q.shape[-1] // geometry.heads
    for name, size in (("query", key), ("value", kv.shape[-1] // geometry.heads - key)):
        if size > MAX_HEAD:
            reasons.append(f"its limit is a {name} head dimension of {MAX_HEAD}, got {size}.")
    relative = geometry.window + geometry.side - 1
    if relative > MAX_RELATIVE:
        reasons.append(
            f"its limit is {MAX_RELATIVE} relative positions along a side, 2 * block + 2 * halo - 1 at stride 1, "
            f"got {relative} for block {geometry.block} and halo {geometry.halo}."
        )
    least = MIN_SCALE if q.dtype == torch.float16 else 0
    if scale <= least:
        reasons.append(f"its scale must lie above {least} in {q.dtype}, got {scale}.")
    return refuse(reasons, "halo_attention", raise_error)


def _check_geometry(geometry: Geometry) -> None:
    heads, block, halo, stride = geometry
    if heads < 1 or block < 1 or halo < 0:
        raise ValueError(
            f"heads and block must be positive and halo not negative, got heads={heads}, block={block}, halo={halo}."
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}.")
    if block % stride:
        raise ValueError(f"a query stride of 2 needs an even block, got block={block}; pool after the op instead.")


def _check_tensors(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, geometry: Geometry) -> None:
    for name, x in (("q", q), ("kv", kv)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be a map [B, H, W, C], got shape {tuple(x.shape)}.")
    expected = (kv.shape[0], *query_size((kv.shape[1], kv.shape[2]), geometry.stride))
    if tuple(q.shape[:3]) != expected:
        raise ValueError(
            f"q must be {list(expected)} and channels for kv of shape {tuple(kv.shape)} and stride {geometry.stride}, "
            f"got {tuple(q.shape)}."
        )
    heads = geometry.heads
    if q.shape[-1] % heads or kv.shape[-1] % heads or kv.shape[-1] <= q.shape[-1]:
        raise ValueError(
            f"heads must divide the channels of q and of kv, and kv needs more channels than q (keys and values), "
            f"got heads={heads}, {q.shape[-1]} and {kv.shape[-1]} channels."
        )
    rows, key = 2 * geometry.window - 1, q.shape[-1] // heads
    for name, x in (("height_rel", height_rel), ("width_rel", width_rel)):
        if tuple(x.shape) != (rows, key):
            raise ValueError(
                f"{name} must be [{rows}, {key}] (2 * window - 1 rows for window {geometry.window} = block + 2 * halo, "
                f"and the head's query channels), got {tuple(x.shape)}."
            )


def halo_attention(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    heads: int,
    block: int,
    halo: int,
    stride: int = 1,
    scale: float | None = None,
    scale_position: bool = False,
    mask_border: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention of each block of queries to its block of the map and a halo of pixels around it.

    For every head and block, with window side w = block + 2 * halo,

        logit[q, k] = scale * q . k + q . height_rel[ky - qy + w - 1] + q . width_rel[kx - qx + w - 1]
        out = softmax(logit) v

    over the w * w pixels of the window. (ky, kx) counts pixels from the window's corner, (qy, qx) queries from the
    block's corner: with stride 2 they count different things, as in the published weights. Pixels outside the map,
    in the halo or in blocks that the map does not fill, are zero keys and values with a position logit of their
    own, and take part in the softmax as published; `mask_border` leaves them out. Any map size is taken, without a
    padded copy. Gradients flow to all four tensors, deterministically.

    Args:
        q: Queries [B, ceil(H / stride), ceil(W / stride), heads * dqk], float16, bfloat16, float32 (float64 on the
            reference). Any strides; a permuted channels-last convolution output is read in place.
        kv: Keys and values [B, H, W, heads * (dqk + dv)]; a head's channels are its dqk keys, then its dv values.
        height_rel: Relative positions along columns [2 * w - 1, dqk], shared by the heads.
        width_rel: The same along rows.
        heads: Number of heads.
        block: Side of a block in pixels of `kv`.
        halo: Pixels around a block that its queries see too, 0 or more.
        stride: 1, or 2 where `q` holds every second pixel of every second row; 2 needs an even block.
        scale: Factor on q . k; dqk**-0.5 by default.
        scale_position: Put the factor on the position logits as well.
        mask_border: Leave pixels outside the map out of the softmax.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, ceil(H / stride), ceil(W / stride), heads * dv] in the dtype of the inputs, or of the enclosing autocast
        region.

    Raises:
        ValueError: Shapes, dtypes or sizes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: HaloNet, arXiv:2103.12731, section 3; relative positions and scale as in timm's `HaloAttn`.
    """
    geometry = Geometry(heads, block, halo, stride)
    _check_geometry(geometry)
    _check_tensors(q, kv, height_rel, width_rel, geometry)
    q, kv, height_rel, width_rel = cast_for_autocast(q, kv, height_rel, width_rel)
    if not q.dtype == kv.dtype == height_rel.dtype == width_rel.dtype:
        raise ValueError(
            f"q, kv, height_rel and width_rel need one dtype, "
            f"got {q.dtype}, {kv.dtype}, {height_rel.dtype} and {width_rel.dtype}."
        )
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else float(scale)
    if use_triton(backend, lambda explain: can_run(q, kv, geometry, scale, explain)):
        return torch.ops.zoo.halo_attention(
            q, kv, height_rel, width_rel, *geometry, scale, scale_position, mask_border
        )[0]  # fmt: skip
    return reference.halo_attention(q, kv, height_rel, width_rel, geometry, scale, scale_position, mask_border)
