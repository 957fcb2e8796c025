"""Triton kernels of agent attention, then their launchers.

Tokens are [B, N, C] with unit channel stride and are read in place, also as views of a packed qkv. All kernels are
bound by memory: each takes a tile of tokens of one head and all agents (or a block of them). Nothing of the size
agents x tokens is stored for every image: a position bias is expanded without a batch, its gradient has a few parts.

Two ways to split the work. Where a result belongs to a token (output, its gradient) a program owns a tile of tokens
and walks over images, so that a position bias is read once and its gradient is summed over the batch in registers.
Where a result belongs to an agent (its values, its gradient) a program owns an image and walks over a part of its
tokens; the parts are summed afterwards in a fixed order. The backward pass reads its inputs twice, once each way:
that costs less than partial results of either way with 49 agents. Images are addressed in int64, tokens within an
image in int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.agent.reference import AgentBias
from zoo.kernels.agent.triton_bias import LOG2E, Side, expand, reduce
from zoo.kernels.agent.triton_plan import Launch, Plan, plan


@triton.jit
def _load_rows(ptr, row, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] channels of one head, zero outside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + (row * stride)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, value, row, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + (row * stride)[:, None] + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_bias(ptr, head, tokens, token, agent, inside, PITCH: tl.constexpr):
    """Bias of a tile; `token`, `agent` and `inside` broadcast to its shape."""
    at = ptr + head.to(tl.int64) * tokens * PITCH + token * PITCH + agent
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _part(HEADS: tl.constexpr, AGENT_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr):
    """Part of the tokens, head and agents of a program that walks over tokens."""
    pid = tl.program_id(0)
    head = pid % HEADS
    agent = (pid // HEADS % AGENT_BLOCKS) * BLOCK_A + tl.arange(0, BLOCK_A)
    return pid // (HEADS * AGENT_BLOCKS), head, agent


_SIZES = ["tokens", "agents", "batch", "chunk"]


@triton.jit(do_not_specialize=_SIZES)
def _aggregate_kernel(
    a_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    a_stride_b, a_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t, tokens, agents, batch, chunk, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PITCH: tl.constexpr, BIAS: tl.constexpr,
    AGENT_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * a k^T + bias) v over one part of the keys, and lse = log2 of the denominator.

    One program: one image, head, block of agents and `chunk` keys. `_combine_kernel` joins the parts. Bytes: k and v
    once, 2 N C b; the bias from L2, P / D of that. FLOPs: 4 N P C. Memory-bound.
    """
    part, head, agent = _part(HEADS, AGENT_BLOCKS, BLOCK_A)
    b = tl.program_id(1).to(tl.int64)
    present = agent < agents
    a = _load_rows(a_ptr + b * a_stride_b + head * D, agent, a_stride_t, present, D, BLOCK_D)
    k_ptr += b * k_stride_b + head * D
    v_ptr += b * v_stride_b + head * D
    begin = part * chunk
    end = tl.minimum(begin + chunk, tokens)

    top = tl.full([BLOCK_A], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_A], tl.float32)
    acc = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < end
        k = _load_rows(k_ptr, t, k_stride_t, inside, D, BLOCK_D)
        v = _load_rows(v_ptr, t, v_stride_t, inside, D, BLOCK_D)
        s = tl.dot(a, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_A, BLOCK_T]
        if BIAS:
            s += _load_bias(bias_ptr, head, tokens, t[None, :], agent[:, None], inside[None, :], PITCH)
        s = tl.where(inside[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A bias of -inf may hide a whole tile; subtracting -inf from -inf would give NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(top - shift)
        norm = norm * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    image = part.to(tl.int64) * batch + b
    out_ptr += image * agents * (HEADS * D) + head * D
    _store_rows(out_ptr, acc * (1 / norm)[:, None], agent, HEADS * D, present, D, BLOCK_D)
    tl.store(lse_ptr + (image * HEADS + head) * agents + agent, top + tl.log2(norm), mask=present)


@triton.jit
def _load_parts(
    ptr, part, parts, b, batch, head, agent, agents,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[parts, BLOCK_A, BLOCK_D] of partial results [parts, B, n, C]; several at once, so that their latencies overlap."""
    d = tl.arange(0, BLOCK_D)
    row = ((part.to(tl.int64) * batch + b) * agents)[:, None, None] + agent[None, :, None]
    mask = (part < parts)[:, None, None] & (agent < agents)[None, :, None] & (d < D)[None, None, :]
    return tl.load(ptr + row * (HEADS * D) + (head * D + d)[None, None, :], mask=mask, other=0.0)


_PARTS = ["agents", "batch", "parts"]


@triton.jit(do_not_specialize=_PARTS)
def _combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, agents, batch, parts,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    AGENT_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The softmax over all keys from those over parts of them: weights exp2(lse of a part - lse)."""
    _, head, agent = _part(HEADS, AGENT_BLOCKS, BLOCK_A)
    b = tl.program_id(1).to(tl.int64)
    present = agent < agents
    top = tl.full([BLOCK_A], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_A], tl.float32)
    acc = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = part_lse_ptr + ((part.to(tl.int64) * batch + b) * HEADS + head)[:, None] * agents + agent[None, :]
        lse = tl.load(at, mask=(part < parts)[:, None] & present[None, :], other=float("-inf"))
        value = _load_parts(part_ptr, part, parts, b, batch, head, agent, agents, HEADS, D, BLOCK_D)
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale, weight = tl.exp2(top - shift), tl.exp2(lse - shift[None, :])
        norm = norm * rescale + tl.sum(weight, 0)
        acc = acc * rescale[:, None] + tl.sum(value * weight[:, :, None], 0)
        top = new_top
    norm = tl.where(present, norm, 1.0)
    out_ptr += b * agents * (HEADS * D) + head * D
    _store_rows(out_ptr, acc * (1 / norm)[:, None], agent, HEADS * D, present, D, BLOCK_D)
    tl.store(lse_ptr + (b * HEADS + head) * agents + agent, top + tl.log2(norm), mask=present)


@triton.jit(do_not_specialize=_SIZES)
def _broadcast_kernel(
    q_ptr, a_ptr, v_ptr, bias_ptr, out_ptr, q_stride_b, q_stride_t, a_stride_b, a_stride_t,
    tokens, agents, batch, chunk, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PITCH: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q a^T + bias) v over the agents, v their values.

    One program: BLOCK_T queries and one head of `chunk` images. Bytes: q read and out written once, 2 N C b.
    FLOPs: 4 N P C. Memory-bound.
    """
    head = tl.program_id(0) % HEADS
    t = (tl.program_id(0) // HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    agent = tl.arange(0, BLOCK_A)
    present = agent < agents
    if BIAS:
        bias = _load_bias(bias_ptr, head, tokens, t[:, None], agent[None, :], inside[:, None], PITCH)
    first = tl.program_id(1).to(tl.int64) * chunk
    for i in range(0, tl.minimum(chunk, batch - tl.program_id(1) * chunk)):
        b = first + i
        q = _load_rows(q_ptr + b * q_stride_b + head * D, t, q_stride_t, inside, D, BLOCK_D)
        a = _load_rows(a_ptr + b * a_stride_b + head * D, agent, a_stride_t, present, D, BLOCK_D)
        v = _load_rows(v_ptr + b * agents * (HEADS * D) + head * D, agent, HEADS * D, present, D, BLOCK_D)
        s = tl.dot(q, tl.trans(a), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_T, BLOCK_A]
        if BIAS:
            s += bias
        s = tl.where(present[None, :], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1 / tl.sum(p, 1))[:, None]
        _store_rows(out_ptr + b * tokens * (HEADS * D) + head * D, out, t, HEADS * D, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _query_gradient_kernel(
    q_ptr, a_ptr, v_ptr, grad_ptr, bias_ptr, dq_ptr, dbias_ptr, lse_ptr, delta_ptr,
    q_stride_b, q_stride_t, a_stride_b, a_stride_t, grad_stride_b, grad_stride_t, tokens, agents, batch, chunk, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PITCH: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dq = scale * ds a with ds = p (do v^T - delta), p as in `_broadcast_kernel`, delta = rowsum(p (do v^T)).

    The programs of `_broadcast_kernel`. The sum of ds over its images is a program's part of the bias gradient,
    [chunks, M, T, P]. Also writes delta and log2 of the denominators for `_agent_gradient_kernel`. Bytes: q and do
    read, dq written once, 3 N C b. FLOPs: 6 N P C.
    """
    head = tl.program_id(0) % HEADS
    t = (tl.program_id(0) // HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    agent = tl.arange(0, BLOCK_A)
    present = agent < agents
    if BIAS:
        bias = _load_bias(bias_ptr, head, tokens, t[:, None], agent[None, :], inside[:, None], PITCH)
        dbias = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    first = tl.program_id(1).to(tl.int64) * chunk
    for i in range(0, tl.minimum(chunk, batch - tl.program_id(1) * chunk)):
        b = first + i
        q = _load_rows(q_ptr + b * q_stride_b + head * D, t, q_stride_t, inside, D, BLOCK_D)
        a = _load_rows(a_ptr + b * a_stride_b + head * D, agent, a_stride_t, present, D, BLOCK_D)
        s = tl.dot(q, tl.trans(a), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_T, BLOCK_A]
        if BIAS:
            s += bias
        s = tl.where(present[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        norm = tl.sum(p, 1)
        p *= (1 / norm)[:, None]
        grad = _load_rows(grad_ptr + b * grad_stride_b + head * D, t, grad_stride_t, inside, D, BLOCK_D)
        v = _load_rows(v_ptr + b * agents * (HEADS * D) + head * D, agent, HEADS * D, present, D, BLOCK_D)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        if BIAS:
            dbias += ds
        dq = tl.dot(ds.to(a.dtype), a, input_precision="ieee") * scale
        _store_rows(dq_ptr + b * tokens * (HEADS * D) + head * D, dq, t, HEADS * D, inside, D, BLOCK_D)
        stat = (b * HEADS + head) * tokens + t
        tl.store(lse_ptr + stat, top + tl.log2(norm), mask=inside)
        tl.store(delta_ptr + stat, delta, mask=inside)
    if BIAS:
        dbias_ptr += (tl.program_id(1).to(tl.int64) * HEADS + head) * tokens * PITCH
        at = dbias_ptr + t[:, None] * PITCH + agent[None, :]
        tl.store(at, dbias, mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _agent_gradient_kernel(
    q_ptr, a_ptr, v_ptr, grad_ptr, bias_ptr, lse_ptr, delta_ptr, dv_ptr, da_ptr,
    q_stride_b, q_stride_t, a_stride_b, a_stride_t, grad_stride_b, grad_stride_t, tokens, agents, batch, chunk, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PITCH: tl.constexpr, BIAS: tl.constexpr,
    AGENT_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dv = p^T do and da = scale * ds^T q over one part of the queries, p and ds as in `_query_gradient_kernel`.

    One program: one image, head, block of agents and `chunk` queries. Bytes: q and do, 2 N C b. FLOPs: 8 N P C.
    """
    part, head, agent = _part(HEADS, AGENT_BLOCKS, BLOCK_A)
    b = tl.program_id(1).to(tl.int64)
    present = agent < agents
    a = _load_rows(a_ptr + b * a_stride_b + head * D, agent, a_stride_t, present, D, BLOCK_D)
    v = _load_rows(v_ptr + b * agents * (HEADS * D) + head * D, agent, HEADS * D, present, D, BLOCK_D)
    q_ptr += b * q_stride_b + head * D
    grad_ptr += b * grad_stride_b + head * D
    lse_ptr += (b * HEADS + head) * tokens
    delta_ptr += (b * HEADS + head) * tokens
    begin = part * chunk
    end = tl.minimum(begin + chunk, tokens)

    dv = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    da = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < end
        q = _load_rows(q_ptr, t, q_stride_t, inside, D, BLOCK_D)
        grad = _load_rows(grad_ptr, t, grad_stride_t, inside, D, BLOCK_D)
        lse = tl.load(lse_ptr + t, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + t, mask=inside, other=0.0)
        s = tl.dot(a, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_A, BLOCK_T]
        if BIAS:
            s += _load_bias(bias_ptr, head, tokens, t[None, :], agent[:, None], inside[None, :], PITCH)
        # Rows past the last agent may overflow; they are not stored. Queries past the end meet zero gradients.
        p = tl.exp2(s - lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        da = tl.dot(ds.to(q.dtype), q, da, input_precision="ieee")

    offset = (part.to(tl.int64) * batch + b) * agents * (HEADS * D) + head * D
    _store_rows(dv_ptr + offset, dv, agent, HEADS * D, present, D, BLOCK_D)
    _store_rows(da_ptr + offset, da * scale, agent, HEADS * D, present, D, BLOCK_D)


@triton.jit(do_not_specialize=_PARTS)
def _sum_parts_kernel(
    part_ptr, v_ptr, out_ptr, delta_ptr, agents, batch, parts,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DELTA: tl.constexpr,
    AGENT_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = sum of the parts [parts, B, n, C], and with DELTA delta = rowsum(out v) for each head."""
    _, head, agent = _part(HEADS, AGENT_BLOCKS, BLOCK_A)
    b = tl.program_id(1).to(tl.int64)
    present = agent < agents
    total = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        total += tl.sum(_load_parts(part_ptr, part, parts, b, batch, head, agent, agents, HEADS, D, BLOCK_D), 0)
    offset = b * agents * (HEADS * D) + head * D
    _store_rows(out_ptr + offset, total, agent, HEADS * D, present, D, BLOCK_D)
    if DELTA:
        v = _load_rows(v_ptr + offset, agent, HEADS * D, present, D, BLOCK_D)
        delta = tl.sum(total * v.to(tl.float32), 1)
        tl.store(delta_ptr + (b * HEADS + head) * agents + agent, delta, mask=present)


@triton.jit(do_not_specialize=_SIZES)
def _key_gradient_kernel(
    k_ptr, v_ptr, a_ptr, grad_ptr, bias_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    k_stride_b, k_stride_t, v_stride_b, v_stride_t, a_stride_b, a_stride_t, tokens, agents, batch, chunk, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PITCH: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dv = p do and dk = scale * ds a with p = exp2(s - lse), s as in `_aggregate_kernel` transposed, do the gradient
    of the agents' values, ds = p (v do^T - delta).

    One program: BLOCK_T keys and one head of `chunk` images; its part of the bias gradient as in
    `_query_gradient_kernel`. Bytes: k and v read, dk and dv written once, 4 N C b. FLOPs: 8 N P C.
    """
    head = tl.program_id(0) % HEADS
    t = (tl.program_id(0) // HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    agent = tl.arange(0, BLOCK_A)
    present = agent < agents
    if BIAS:
        bias = _load_bias(bias_ptr, head, tokens, t[:, None], agent[None, :], inside[:, None], PITCH)
        dbias = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    first = tl.program_id(1).to(tl.int64) * chunk
    for i in range(0, tl.minimum(chunk, batch - tl.program_id(1) * chunk)):
        b = first + i
        k = _load_rows(k_ptr + b * k_stride_b + head * D, t, k_stride_t, inside, D, BLOCK_D)
        a = _load_rows(a_ptr + b * a_stride_b + head * D, agent, a_stride_t, present, D, BLOCK_D)
        stat = (b * HEADS + head) * agents + agent
        lse = tl.load(lse_ptr + stat, mask=present, other=float("inf"))
        delta = tl.load(delta_ptr + stat, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(a), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_T, BLOCK_A]
        if BIAS:
            s += bias
        p = tl.exp2(s - lse[None, :])
        v = _load_rows(v_ptr + b * v_stride_b + head * D, t, v_stride_t, inside, D, BLOCK_D)
        grad = _load_rows(grad_ptr + b * agents * (HEADS * D) + head * D, agent, HEADS * D, present, D, BLOCK_D)
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        if BIAS:
            dbias += ds
        out = b * tokens * (HEADS * D) + head * D
        dv = tl.dot(p.to(grad.dtype), grad, input_precision="ieee")
        _store_rows(dv_ptr + out, dv, t, HEADS * D, inside, D, BLOCK_D)
        dk = tl.dot(ds.to(a.dtype), a, input_precision="ieee") * scale
        _store_rows(dk_ptr + out, dk, t, HEADS * D, inside, D, BLOCK_D)
    if BIAS:
        dbias_ptr += (tl.program_id(1).to(tl.int64) * HEADS + head) * tokens * PITCH
        at = dbias_ptr + t[:, None] * PITCH + agent[None, :]
        tl.store(at, dbias, mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _aggregate_gradient_kernel(
    k_ptr, v_ptr, a_ptr, grad_ptr, bias_ptr, lse_ptr, delta_ptr, da_ptr,
    k_stride_b, k_stride_t, v_stride_b, v_stride_t, a_stride_b, a_stride_t, tokens, agents, batch, chunk, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PITCH: tl.constexpr, BIAS: tl.constexpr,
    AGENT_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """da = scale * ds^T k over one part of the keys, ds as in `_key_gradient_kernel`.

    One program: one image, head, block of agents and `chunk` keys. Bytes: k and v, 2 N C b. FLOPs: 6 N P C.
    """
    part, head, agent = _part(HEADS, AGENT_BLOCKS, BLOCK_A)
    b = tl.program_id(1).to(tl.int64)
    present = agent < agents
    a = _load_rows(a_ptr + b * a_stride_b + head * D, agent, a_stride_t, present, D, BLOCK_D)
    grad = _load_rows(grad_ptr + b * agents * (HEADS * D) + head * D, agent, HEADS * D, present, D, BLOCK_D)
    stat = (b * HEADS + head) * agents + agent
    lse = tl.load(lse_ptr + stat, mask=present, other=float("inf"))
    delta = tl.load(delta_ptr + stat, mask=present, other=0.0)
    k_ptr += b * k_stride_b + head * D
    v_ptr += b * v_stride_b + head * D
    begin = part * chunk
    end = tl.minimum(begin + chunk, tokens)

    da = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < end
        k = _load_rows(k_ptr, t, k_stride_t, inside, D, BLOCK_D)
        v = _load_rows(v_ptr, t, v_stride_t, inside, D, BLOCK_D)
        s = tl.dot(a, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_A, BLOCK_T]
        if BIAS:
            s += _load_bias(bias_ptr, head, tokens, t[None, :], agent[:, None], inside[None, :], PITCH)
        # A key past the end has a zero row in k, which takes it out of the product with ds.
        s = tl.where(inside[None, :], s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        da = tl.dot(ds.to(k.dtype), k, da, input_precision="ieee")

    da_ptr += (part.to(tl.int64) * batch + b) * agents * (HEADS * D) + head * D
    _store_rows(da_ptr, da * scale, agent, HEADS * D, present, D, BLOCK_D)


def _unit_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _plan_of(q: Tensor, agents: Tensor, k: Tensor, heads: int, key_bias, query_bias) -> Plan:
    return plan(
        q.shape[0], q.shape[1], k.shape[1], agents.shape[1], q.shape[2], heads,
        key_bias is not None, query_bias is not None, q.dtype == torch.float32,
    )  # fmt: skip


def _aggregate(agents: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int, scale: float, p: Plan):
    """Agents' values [B, n, C] and their log2-sum-exp [B, M, n]."""
    (B, n, C), launch = agents.shape, p.aggregate

    def empty(parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values = torch.empty(parts, B, n, C, dtype=dtype, device=k.device)
        return values, torch.empty(parts, B, heads, n, dtype=torch.float32, device=k.device)

    values, lse = empty(1, k.dtype)
    parts = (values, lse) if launch.chunks == 1 else empty(launch.chunks, torch.float32)
    _aggregate_kernel[launch.grid](
        agents, k, v, bias, *parts, *_strides(agents, k, v), k.shape[1], n, B, launch.chunk, scale, **launch.config
    )  # fmt: skip
    if launch.chunks > 1:
        _combine_kernel[p.join.grid](*parts, values, lse, n, B, launch.chunks, **p.join.config)
    return values[0], lse[0]


def _sides(key_bias, query_bias, key_grid, grid) -> dict[str, Side]:
    """The biases that there are."""
    named = (("key", key_bias, key_grid), ("query", query_bias, grid))
    return {name: Side(bias, size) for name, bias, size in named if bias is not None}


def _expanded(sides: dict[str, Side], dtype: torch.dtype, pitch: int) -> dict[str, Tensor]:
    return dict(zip(sides, expand(list(sides.values()), dtype, pitch), strict=True)) if sides else {}


def forward(
    q: Tensor, agents: Tensor, k: Tensor, v: Tensor, key_bias: AgentBias | None, query_bias: AgentBias | None,
    heads: int, grid: list[int] | None, key_grid: list[int] | None, scale: float, query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernels: out [B, N, C], agents' values [B, n, C] and their log2-sum-exp [B, M, n]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        lse = torch.empty(q.shape[0], heads, agents.shape[1], dtype=torch.float32, device=q.device)
        return out, torch.empty(agents.shape, dtype=q.dtype, device=q.device), lse
    q, agents, k, v = (_unit_channels(x) for x in (q, agents, k, v))
    (B, N, _), n = q.shape, agents.shape[1]
    p = _plan_of(q, agents, k, heads, key_bias, query_bias)
    biases = _expanded(_sides(key_bias, query_bias, key_grid, grid), q.dtype, p.pitch)
    values, lse = _aggregate(agents, k, v, biases.get("key", k), heads, scale, p)
    launch = p.broadcast
    _broadcast_kernel[launch.grid](
        q, agents, values, biases.get("query", q), out, *_strides(q, agents), N, n, B, launch.chunk, query_scale,
        **launch.config,
    )  # fmt: skip
    return out, values, lse


def _bias_parts(launch: Launch, tokens: int, like: Tensor) -> Tensor:
    """Room for the parts of a bias gradient [chunks, M, T, P]; any tensor without a bias."""
    if not launch.config["BIAS"]:
        return like
    shape = launch.chunks, launch.config["HEADS"], tokens, launch.config["PITCH"]
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _backward_queries(grad, q, agents, values, bias, heads: int, scale: float, p: Plan, da_parts: Tensor):
    """dq, the gradient of the bias and of the agents' values in parts; the agents' gradient goes to `da_parts`."""
    (B, N, C), n = q.shape, agents.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, delta = torch.empty(2, B, heads, N, dtype=torch.float32, device=q.device)
    strides = _strides(q, agents, grad)
    launch = p.query_gradient
    dbias = _bias_parts(launch, N, q)
    _query_gradient_kernel[launch.grid](
        q, agents, values, grad, bias, dq, dbias, lse, delta, *strides, N, n, B, launch.chunk, scale, **launch.config
    )  # fmt: skip
    launch = p.agent_gradient
    dv_parts = torch.empty(launch.chunks, B, n, C, dtype=torch.float32, device=q.device)
    _agent_gradient_kernel[launch.grid](
        q, agents, values, grad, bias, lse, delta, dv_parts, da_parts, *strides, N, n, B, launch.chunk, scale,
        **launch.config,
    )  # fmt: skip
    return dq, dbias, dv_parts


def _backward_keys(grad, delta, k, v, agents, lse, bias, scale: float, p: Plan, da_parts: Tensor):
    """dk, dv and the gradient of the bias in parts; the agents' gradient goes to `da_parts`."""
    (B, N, _), n = k.shape, agents.shape[1]
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    strides = _strides(k, v, agents)
    launch = p.key_gradient
    dbias = _bias_parts(launch, N, k)
    _key_gradient_kernel[launch.grid](
        k, v, agents, grad, bias, lse, delta, dk, dv, dbias, *strides, N, n, B, launch.chunk, scale, **launch.config
    )  # fmt: skip
    launch = p.aggregate_gradient
    _aggregate_gradient_kernel[launch.grid](
        k, v, agents, grad, bias, lse, delta, da_parts, *strides, N, n, B, launch.chunk, scale, **launch.config
    )  # fmt: skip
    return dk, dv, dbias


def _zeros(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device)


def _zero_gradients(tensors: tuple[Tensor, ...], biases: tuple[AgentBias | None, ...]) -> tuple:
    """What a problem without queries gives."""
    bias_zeros = (None if bias is None else AgentBias(*map(_zeros, bias)) for bias in biases)
    return *map(_zeros, tensors), *bias_zeros


def backward(
    grad: Tensor, q: Tensor, agents: Tensor, k: Tensor, v: Tensor, values: Tensor, lse: Tensor,
    key_bias: AgentBias | None, query_bias: AgentBias | None,
    heads: int, grid: list[int] | None, key_grid: list[int] | None, scale: float, query_scale: float,
) -> tuple:  # fmt: skip
    """Launch the backward kernels: gradients of q, agents, k, v, contiguous and in their dtype, and of both biases."""
    if q.numel() == 0:
        return _zero_gradients((q, agents, k, v), (key_bias, query_bias))
    grad, q, agents, k, v = (_unit_channels(x) for x in (grad, q, agents, k, v))
    B, n, C = agents.shape
    p = _plan_of(q, agents, k, heads, key_bias, query_bias)
    sides = _sides(key_bias, query_bias, key_grid, grid)
    biases = _expanded(sides, q.dtype, p.pitch)
    query_parts, key_parts = p.agent_gradient.chunks, p.aggregate_gradient.chunks
    da_parts = torch.empty(query_parts + key_parts, B, n, C, dtype=torch.float32, device=q.device)
    dbiases = {}
    dq, dbiases["query"], dv_parts = _backward_queries(
        grad, q, agents, values, biases.get("query", q), heads, query_scale, p, da_parts
    )  # fmt: skip
    d_values, da = (torch.empty(agents.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    delta, join = torch.empty_like(lse), p.join
    _sum_parts_kernel[join.grid](dv_parts, values, d_values, delta, n, B, query_parts, DELTA=True, **join.config)
    dk, dv, dbiases["key"] = _backward_keys(
        d_values, delta, k, v, agents, lse, biases.get("key", k), scale, p, da_parts[query_parts:]
    )  # fmt: skip
    parts = query_parts + key_parts
    _sum_parts_kernel[join.grid](da_parts, values, da, delta, n, B, parts, DELTA=False, **join.config)
    if sides:
        reduced = reduce(list(sides.values()), [dbiases[name] for name in sides])
        dbiases = dict(zip(sides, reduced, strict=True))
    else:
        dbiases = {}
    return dq, da, dk, dv, dbiases.get("key"), dbiases.get("query")
