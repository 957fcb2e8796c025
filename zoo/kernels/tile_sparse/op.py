"""The registered op of pattern sparse attention and its public function.

Paper: Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers,
arXiv:2506.03065.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_BATCH, MAX_OFFSET, MAX_TOKENS, cast_for_autocast, refuse, use_triton
from zoo.kernels.tile_sparse import fp8, reference
from zoo.kernels.tile_sparse.patterns import Layout, Pattern, PatternTable, pattern_table

MAX_HEAD = 128
TILES = (16, 32, 64, 128)
# First compute capability with products in FP8: Ada, then Hopper and Blackwell.
FP8_CAPABILITY = (8, 9)


@torch.library.custom_op("zoo::tile_sparse_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, rows: Tensor, tiles: Tensor, columns: Tensor,
    text_length: Tensor | None, sizes: list[int], scale: float, kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    table, layout = PatternTable(rows, tiles, columns), Layout.from_sizes(sizes)
    if kernels:
        from zoo.kernels.tile_sparse import triton

        return triton.forward(q, k, v, pattern_ids, table, layout, text_length, scale)
    out = reference.tile_sparse_attention(q, k, v, pattern_ids, table, layout, text_length, scale)
    return out, q.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(q, k, v, pattern_ids, rows, tiles, columns, text_length, sizes, scale, kernels):
    # The reference's backward computes its softmax again, so only the kernels keep the log-sum-exp.
    return reference.empty_output(q), q.new_empty(q.shape[:3] if kernels else (0,), dtype=torch.float32)


@torch.library.custom_op("zoo::tile_sparse_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern_ids: Tensor, rows: Tensor,
    tiles: Tensor, columns: Tensor, text_length: Tensor | None, sizes: list[int], scale: float, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    table, layout = PatternTable(rows, tiles, columns), Layout.from_sizes(sizes)
    if kernels:
        from zoo.kernels.tile_sparse import triton

        return triton.backward(grad, q, k, v, out, lse, pattern_ids, table, layout, text_length, scale)
    return reference.tile_sparse_attention_backward(grad, q, k, v, pattern_ids, table, layout, text_length, scale)


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, pattern_ids, rows, tiles, columns, text_length, sizes, scale, kernels):
    return tuple(reference.empty_output(x) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, pattern_ids, rows, tiles, columns, text_length, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, pattern_ids, rows, tiles, columns, text_length)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    grads = torch.ops.zoo.tile_sparse_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None,) * 8)


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


# Of its own, as it has no gradients: autograd says so.
@torch.library.custom_op("zoo::tile_sparse_attention_fp8", mutates_args=())
def _attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, rows: Tensor, tiles: Tensor, columns: Tensor,
    text_length: Tensor | None, sizes: list[int], scale: float, kernels: bool,
) -> Tensor:  # fmt: skip
    table, layout = PatternTable(rows, tiles, columns), Layout.from_sizes(sizes)
    if kernels:
        from zoo.kernels.tile_sparse import triton

        return triton.forward(q, k, v, pattern_ids, table, layout, text_length, scale, fp8=True)[0]
    out = fp8.tile_sparse_attention_fp8(q, k, v, pattern_ids, table, layout, text_length, scale)
    return reference.empty_output(q).copy_(out)


@_attention_fp8.register_fake
def _(q, k, v, pattern_ids, rows, tiles, columns, text_length, sizes, scale, kernels):
    return reference.empty_output(q)


def _flops(q: Tensor, pattern_ids: Tensor, rows: Tensor, sizes: Sequence[int], products: int) -> int:
    """FLOPs of `products` matrix products over the active tiles; over all tiles where the patterns have no values."""
    layout = Layout.from_sizes(sizes)
    if any(x.is_meta or isinstance(x, torch._subclasses.FakeTensor) for x in (pattern_ids, rows)):
        tiles = layout.total_tiles * q.shape[1]
    else:
        tiles = int(rows[pattern_ids.long(), -1].sum())
    return 2 * products * q.shape[0] * q.shape[3] * tiles * layout.tile[0] * layout.tile[1]


@register_flop_formula([torch.ops.zoo.tile_sparse_attention, torch.ops.zoo.tile_sparse_attention_fp8], get_raw=True)
def _(q, k, v, pattern_ids, rows, tiles, columns, text_length, sizes, *args, out_val=None, **kwargs) -> int:
    return _flops(q, pattern_ids, rows, sizes, 2)


@register_flop_formula(torch.ops.zoo.tile_sparse_attention_backward, get_raw=True)
def _(
    grad, q, k, v, out, lse, pattern_ids, rows, tiles, columns, text_length, sizes, *args, out_val=None, **kwargs
) -> int:
    return _flops(q, pattern_ids, rows, sizes, 5)


def can_run(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take this problem.

    Args:
        q, k, v: As given to `tile_sparse_attention`.
        layout: Sequence and tiles.
        scale: Factor on q . k.
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
    if not set(layout.tile) <= set(TILES):
        reasons.append(f"its tiles have sides of {TILES}, got {layout.tile}.")
    if layout.tokens > MAX_TOKENS:
        reasons.append(f"its limit is a sequence of {MAX_TOKENS} tokens, got {layout.tokens}.")
    if q.shape[0] > MAX_BATCH:
        reasons.append(f"its limit is a batch of {MAX_BATCH}, got {q.shape[0]}.")
    if scale <= 0:
        reasons.append(f"its scale must be positive, got {scale}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) * x.shape[2] >= MAX_OFFSET:
            reasons.append(f"its limit is a head of {MAX_OFFSET} elements from first to last token, got {name} of "
                           f"shape {tuple(x.shape)} and strides {x.stride()}.")  # fmt: skip
    return refuse(reasons, "tile_sparse_attention", raise_error)


def _check_fp8(qk_dtype: torch.dtype, backend: str, *tensors: Tensor) -> None:
    if qk_dtype != fp8.FP8:
        raise ValueError(f"qk_dtype must be None or {fp8.FP8}, got {qk_dtype}.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "qk_dtype rounds queries and keys, which has no gradients: leave it out for training, or call under "
            "torch.no_grad()."
        )
    device = tensors[0].device
    emulated = backend == "reference" or device.type != "cuda"
    if not emulated and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        needed = ".".join(map(str, FP8_CAPABILITY))
        raise NotImplementedError(
            f"qk_dtype={qk_dtype} needs a GPU of compute capability {needed} or more, got {found}: leave it out, or "
            "emulate its rounding with backend='reference'."
        )


def _check(
    q: Tensor, k: Tensor, v: Tensor, pattern_ids: Tensor, table: PatternTable, layout: Layout,
    text_length: Tensor | None,
) -> None:  # fmt: skip
    if q.dim() != 4 or q.shape[2] != layout.tokens:
        raise ValueError(
            f"q must be [B, M, {layout.tokens}, D] for {layout.video} video and {layout.text} text tokens, "
            f"got {tuple(q.shape)}."
        )
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"k and v must have q's shape {tuple(q.shape)}, got {tuple(k.shape)} and {tuple(v.shape)}.")
    if tuple(pattern_ids.shape) != (q.shape[1],) or pattern_ids.is_floating_point():
        raise ValueError(
            f"pattern_ids must be an integer tensor [{q.shape[1]}], a row of the table for each head, "
            f"got {pattern_ids.dtype} of shape {tuple(pattern_ids.shape)}."
        )
    if table.columns.shape[1] != layout.video:
        raise ValueError(
            f"patterns were put into a table for {table.columns.shape[1]} video tokens, the layout has {layout.video}."
        )
    if text_length is not None and tuple(text_length.shape) != (q.shape[0],):
        raise ValueError(f"text_length must be [{q.shape[0]}], a length a sample, got {tuple(text_length.shape)}.")
    for name, x in (("pattern_ids", pattern_ids), ("the pattern table", table.rows), ("text_length", text_length)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}.")


def tile_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_ids: Tensor,
    patterns: PatternTable | Sequence[Pattern],
    layout: Layout,
    *,
    text_length: Tensor | None = None,
    scale: float | None = None,
    qk_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of video and text tokens in which every head has a sparse pattern of its own.

    For head m with pattern p = patterns[pattern_ids[m]],

        out[b, m, i] = sum_j softmax_j(scale * q[b, m, i] . k[b, m, j]) v[b, m, j]

    over the keys j that p keeps for query i (`zoo.kernels.tile_sparse.patterns`): by pairs of `layout.tile` that hold
    an allowed pair ("block") or exactly ("element"). Text queries see all valid keys and valid text keys are seen by
    all queries. A query without any key, and all queries of a skipped head, give 0 with zero gradient. Gradients flow
    to q, k and v, deterministically.

    Args:
        q: Queries [B, M, S, D] in the order of the sequence, float16, bfloat16, float32 (float64 on the reference).
            Any strides with unit channel stride: a permuted [B, S, M, D] is read in place.
        k: Keys [B, M, S, D], with positions (RoPE) already in them, as in the queries.
        v: Values [B, M, S, D].
        pattern_ids: Integer [M] on q's device: the pattern of each head. A tensor, so that one compiled graph serves
            layers with different assignments; the kernels do not check that ids are in range.
        patterns: Patterns that ids refer to, or their `pattern_table` at this layout on q's device; inside of
            compiled code, the latter.
        layout: The sequence and its tiles.
        text_length: Integer [B] on q's device: valid text keys a sample, the first of the T; all by default, and at
            most. Padded text keys are seen by no query, padded text queries are computed as the others. Keys and values
            of padded text must be finite: a kernel may multiply them by zero.
        scale: Factor on q . k; D**-0.5 by default.
        qk_dtype: torch.float8_e4m3fn multiplies queries and keys in FP8 (`zoo.kernels.tile_sparse.fp8`), for inference
            on GPUs that have it. The reference rounds alike.
        backend: "auto", "triton" or "reference". The reference reads ids and lengths on the host.

    Returns:
        [B, M, S, D] in the dtype of the inputs, or of the enclosing autocast region, and in q's order of memory: of a
        permuted q, out.transpose(1, 2).flatten(2) is a view.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or gradients are asked for with `qk_dtype`.
        NotImplementedError: `backend="triton"` where the kernels cannot run, or `qk_dtype` on a GPU without FP8.

    Source: Sparse-vDiT, arXiv:2506.03065, sections 3.1 and 3.3.
    """
    table = patterns
    if not isinstance(table, PatternTable):
        if torch.compiler.is_compiling():
            raise ValueError("compiled code needs the patterns as a pattern_table, built before, got the patterns.")
        table = pattern_table(patterns, layout, q.device)
    _check(q, k, v, pattern_ids, table, layout, text_length)
    q, k, v = cast_for_autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if qk_dtype is not None:
        _check_fp8(qk_dtype, backend, q, k, v)

    def kernels_run(explain: bool) -> bool:
        return can_run(q, k, v, layout, scale, explain)

    kernels = use_triton(backend, kernels_run)
    args = (q, k, v, pattern_ids, *table, text_length, layout.to_sizes(), scale, kernels)
    if qk_dtype is not None:
        return torch.ops.zoo.tile_sparse_attention_fp8(*args)
    return torch.ops.zoo.tile_sparse_attention(*args)[0]
