"""The registered op of agent attention and its public function.

Paper: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels._dispatch import MAX_BATCH, MAX_OFFSET, MAX_TOKENS, cast_for_autocast, refuse, use_triton
from zoo.kernels.agent import reference
from zoo.kernels.agent.reference import AgentBias

# One program holds the logits of a tile of queries to all agents.
MAX_AGENTS = 256
# Bytes of one head's agents, padded to powers of two: the kernels keep several such tiles in shared memory.
MAX_AGENT_BYTES = 32768


def _pack(block: Tensor | None, row: Tensor | None, column: Tensor | None, extra: Tensor | None) -> AgentBias | None:
    return None if block is None else AgentBias(block, row, column, extra)


def _unpack(bias: AgentBias | None, like: Tensor) -> list[Tensor]:
    """The four tensors of a bias gradient, empty where there is none: ops return no optional tensors."""
    return [like.new_empty(0) if x is None else x for x in bias or (None,) * 4]


@torch.library.custom_op("zoo::agent_attention", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, agents: Tensor, k: Tensor, v: Tensor,
    key_block: Tensor | None, key_row: Tensor | None, key_column: Tensor | None, key_extra: Tensor | None,
    query_block: Tensor | None, query_row: Tensor | None, query_column: Tensor | None, query_extra: Tensor | None,
    heads: int, grid: list[int] | None, key_grid: list[int] | None, scale: float, query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from zoo.kernels.agent import triton

    key_bias = _pack(key_block, key_row, key_column, key_extra)
    query_bias = _pack(query_block, query_row, query_column, query_extra)
    return triton.forward(q, agents, k, v, key_bias, query_bias, heads, grid, key_grid, scale, query_scale)


@_attention.register_kernel("cpu")
def _(q, agents, k, v, kb, kr, kc, ke, qb, qr, qc, qe, heads, grid, key_grid, *scales):
    out = reference.agent_attention(
        q, agents, k, v, heads, grid, key_grid, _pack(kb, kr, kc, ke), _pack(qb, qr, qc, qe), *scales
    )  # fmt: skip
    return out.clone(memory_format=torch.contiguous_format), agents.new_empty(0), q.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(q, agents, k, v, kb, kr, kc, ke, qb, qr, qc, qe, heads, grid, key_grid, scale, query_scale):
    # The reference's backward computes its softmax again, so only the kernels keep values and log-sum-exp of agents.
    if q.device.type != "cuda":
        return q.new_empty(q.shape), agents.new_empty(0), q.new_empty(0, dtype=torch.float32)
    lse = q.new_empty((q.shape[0], heads, agents.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), agents.new_empty(agents.shape), lse


@torch.library.custom_op("zoo::agent_attention_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    grad: Tensor, q: Tensor, agents: Tensor, k: Tensor, v: Tensor, agent_values: Tensor, lse: Tensor,
    key_block: Tensor | None, key_row: Tensor | None, key_column: Tensor | None, key_extra: Tensor | None,
    query_block: Tensor | None, query_row: Tensor | None, query_column: Tensor | None, query_extra: Tensor | None,
    heads: int, grid: list[int] | None, key_grid: list[int] | None, scale: float, query_scale: float,
) -> list[Tensor]:  # fmt: skip
    from zoo.kernels.agent import triton

    key_bias = _pack(key_block, key_row, key_column, key_extra)
    query_bias = _pack(query_block, query_row, query_column, query_extra)
    *grads, d_key_bias, d_query_bias = triton.backward(
        grad, q, agents, k, v, agent_values, lse, key_bias, query_bias, heads, grid, key_grid, scale, query_scale
    )  # fmt: skip
    return [*grads, *_unpack(d_key_bias, q), *_unpack(d_query_bias, q)]


@_attention_backward.register_kernel("cpu")
def _(
    grad, q, agents, k, v, agent_values, lse, kb, kr, kc, ke, qb, qr, qc, qe, heads, grid, key_grid, scale, query_scale
):
    *grads, d_key_bias, d_query_bias = reference.agent_attention_backward(
        grad, q, agents, k, v, heads, grid, key_grid, _pack(kb, kr, kc, ke), _pack(qb, qr, qc, qe), scale, query_scale
    )  # fmt: skip
    grads = [*grads, *_unpack(d_key_bias, q), *_unpack(d_query_bias, q)]
    return [g.clone(memory_format=torch.contiguous_format) for g in grads]


@_attention_backward.register_fake
def _(grad, q, agents, k, v, agent_values, lse, kb, kr, kc, ke, qb, qr, qc, qe, *settings):
    biases = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (kb, kr, kc, ke, qb, qr, qc, qe))
    return [*(x.new_empty(x.shape) for x in (q, agents, k, v)), *biases]


def _setup_context(ctx, inputs, output):
    ctx.settings = inputs[12:]
    ctx.save_for_backward(*inputs[:12], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 17
    q, agents, k, v, *biases, agent_values, lse = ctx.saved_tensors
    grads = torch.ops.zoo.agent_attention_backward(grad, q, agents, k, v, agent_values, lse, *biases, *ctx.settings)
    bias_grads = (None if x is None else g for x, g in zip(biases, grads[4:], strict=True))
    return (*grads[:4], *bias_grads, *(None,) * 5)


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def _flops(q, agents, k, products: int) -> int:
    """FLOPs of `products` matrix products of agents with queries, and as many with keys; arguments are shapes."""
    return 2 * products * q[0] * agents[1] * (q[1] + k[1]) * q[2]


@register_flop_formula(torch.ops.zoo.agent_attention)
def _(q, agents, k, *args, out_shape=None, **kwargs) -> int:
    return _flops(q, agents, k, 2)


@register_flop_formula(torch.ops.zoo.agent_attention_backward)
def _(grad, q, agents, k, *args, out_shape=None, **kwargs) -> int:
    return _flops(q, agents, k, 5)


def _padded(size: int) -> int:
    """The next power of two from 16 on, by comparisons alone, which sizes unknown to a compiler allow too."""
    padded = 16
    while padded < size:
        padded *= 2
    return padded


def can_run(
    q: Tensor, agents: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, query_scale: float,
    biased: bool = False, raise_error: bool = False,
) -> bool:  # fmt: skip
    """Whether the Triton kernels take this problem.

    Args:
        q, agents, k, v: As given to `agent_attention`.
        heads: Number of heads.
        scale, query_scale: Factors on the logits.
        biased: Whether there is a position bias.
        raise_error: Raise with the reason instead of returning False.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    n, D = agents.shape[1], q.shape[-1] // heads
    if k.shape[1] == 0:
        reasons.append("it needs at least one key, got none.")
    if not q.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {q.device}.")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"it takes float16, bfloat16 or float32, got {q.dtype}.")
    if q.shape[0] > MAX_BATCH:
        reasons.append(f"its limit is a batch of {MAX_BATCH}, got q of shape {tuple(q.shape)}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[1] > MAX_TOKENS:
            reasons.append(f"its limit is {MAX_TOKENS} tokens, got {name} of shape {tuple(x.shape)}.")
        if x.stride(1) * x.shape[1] >= MAX_OFFSET:
            reasons.append(f"its limit is an image of {MAX_OFFSET} elements, got {name} of shape {tuple(x.shape)}.")
    if not 1 <= n <= MAX_AGENTS:
        reasons.append(f"it takes 1 to {MAX_AGENTS} agents, got {n}.")
    if biased and n > MAX_AGENTS // 2:
        reasons.append(f"its limit with a position bias is {MAX_AGENTS // 2} agents, got {n}.")
    if D > 128:
        reasons.append(f"its limit is a head dimension of 128, got {D}.")
    elif _padded(n) * _padded(D) * q.dtype.itemsize > MAX_AGENT_BYTES:
        reasons.append(
            f"its limit is {MAX_AGENT_BYTES} bytes for the agents of a head, padded to powers of two, got {n} agents "
            f"of {D} channels in {q.dtype}."
        )
    if min(scale, query_scale) <= 0:
        reasons.append(f"the scales must be positive, got {scale} and {query_scale}.")
    return refuse(reasons, "agent_attention", raise_error)


def _check_tokens(q: Tensor, agents: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    named = (("q", q), ("agents", agents), ("k", k), ("v", v))
    for name, x in named:
        if x.dim() != 3:
            raise ValueError(f"{name} must be [B, tokens, C], got shape {tuple(x.shape)}.")
        if x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2]:
            raise ValueError(f"q and {name} need equal batch and channels, got {tuple(q.shape)} and {tuple(x.shape)}.")
        if x.dtype != q.dtype:
            raise ValueError(f"q, agents, k and v need one dtype, got {', '.join(str(x.dtype) for _, x in named)}.")
    if v.shape != k.shape:
        raise ValueError(f"k and v need one shape, got {tuple(k.shape)} and {tuple(v.shape)}.")
    if heads < 1 or q.shape[-1] % heads:
        raise ValueError(f"heads must divide the {q.shape[-1]} channels, got {heads}.")


def _check_bias(name: str, bias: AgentBias | None, grid_name: str, grid, tokens: int, heads: int, agents: int) -> None:
    if bias is None:
        return
    if grid is None:
        raise ValueError(f"{name} needs {grid_name} = (height, width) of the tokens, got None.")
    H, W = grid
    lead = 0 if bias.extra is None else 1
    if lead + H * W != tokens:
        raise ValueError(f"{grid_name} {H} x {W} with {lead} extra token(s) does not cover {tokens} tokens.")
    shapes = dict(row=(heads, agents, H), column=(heads, agents, W), extra=(heads, agents))
    for part, shape in shapes.items():
        x = getattr(bias, part)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}.{part} must be {list(shape)}, got {tuple(x.shape)}.")
    block = bias.block
    if block.dim() != 4 or tuple(block.shape[:2]) != (heads, agents):
        raise ValueError(f"{name}.block must be [{heads}, {agents}, h, w], got {tuple(block.shape)}.")


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    grid: tuple[int, int] | None = None,
    key_grid: tuple[int, int] | None = None,
    key_bias: AgentBias | None = None,
    query_bias: AgentBias | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention through agents: they gather from all keys, then all queries read from them.

    agent_values = softmax(scale * agents k^T + key_bias) v over the keys and
    out = softmax(query_scale * q agents^T + query_bias) agent_values over the agents, for each head. Cost and memory
    are linear in the number of tokens. Gradients flow to all tensors, deterministically on the kernels.

    Args:
        q: Queries [B, N, C], float16, bfloat16, float32 (float64 on the reference). Any strides, for example a slice
            of a packed qkv; channel c belongs to head c // (C / heads).
        agents: Agent tokens [B, n, C], for example queries pooled to a small grid.
        k: Keys [B, Nk, C].
        v: Values [B, Nk, C].
        heads: Number M of heads.
        grid: Height and width of the grid of queries, row-major; needed with `query_bias`.
        key_grid: The same for keys; `grid` by default; needed with `key_bias`.
        key_bias: Position bias between agents and keys, or None.
        query_bias: Position bias between queries and agents, agents first as in `key_bias`, or None.
        scale: Factor on the logits of agents and keys; (C / heads)**-0.5 by default.
        query_scale: Factor on the logits of queries and agents; (C / heads)**-0.5 by default.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, N, C] in the dtype of q, or of the enclosing autocast region.

    Raises:
        ValueError: Shapes or dtypes do not fit, or a bias comes without its grid.
        NotImplementedError: `backend="triton"` where the kernels cannot run.

    Source: Agent Attention, arXiv:2312.08874, section 3.
    """
    _check_tokens(q, agents, k, v, heads)
    key_grid = grid if key_grid is None else key_grid
    _check_bias("key_bias", key_bias, "key_grid", key_grid, k.shape[1], heads, agents.shape[1])
    _check_bias("query_bias", query_bias, "grid", grid, q.shape[1], heads, agents.shape[1])
    default = (q.shape[-1] // heads) ** -0.5
    scale = default if scale is None else float(scale)
    query_scale = default if query_scale is None else float(query_scale)
    q, agents, k, v = cast_for_autocast(q, agents, k, v)
    biased = key_bias is not None or query_bias is not None
    if not use_triton(backend, lambda explain: can_run(q, agents, k, v, heads, scale, query_scale, biased, explain)):
        return reference.agent_attention(
            q, agents, k, v, heads, grid, key_grid, key_bias, query_bias, scale, query_scale
        )  # fmt: skip
    none = (None,) * 4
    return torch.ops.zoo.agent_attention(
        q, agents, k, v, *(key_bias or none), *(query_bias or none), heads, grid, key_grid, scale, query_scale
    )[0]  # fmt: skip
