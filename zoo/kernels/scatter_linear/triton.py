"""Triton kernels of scattered linear attention, then their launchers.

Rows are read in place, by `order` where it is given: no permuted, padded or per-window copy is made. A window of at
most LONG rows and one head is one program: S and s are sums in its registers, and a second pass over the same rows
applies them. Longer windows are cut at multiples of LONG, counted over all rows: a piece of LONG rows meets at most two
of them, one at either end, so piece c has the two parts 2 * c and 2 * c + 1, for the window of its first row and for
that of its last one. Parts leave their sums in memory; the next launch adds those of a window, in the order of the rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows from which a window is cut: few windows of a LiDAR sweep are longer, and the second launch has little to do.
LONG = 512


@triton.jit
def _rows(order_ptr, at, end, BLOCK_N: tl.constexpr, ORDERED: tl.constexpr):
    """The rows at places at ... at + BLOCK_N - 1 of the windows, and which of them lie before `end`."""
    row = at + tl.arange(0, BLOCK_N)
    inside = row < end
    if ORDERED:
        row = tl.load(order_ptr + row, mask=inside, other=0)
    return row.to(tl.int64), inside


@triton.jit
def _load(ptr, row, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :] if D < BLOCK_D else inside[:, None]
    return tl.load(ptr + row[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, value, row, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :] if D < BLOCK_D else inside[:, None]
    tl.store(ptr + row[:, None] * stride + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu(x, RELU: tl.constexpr):
    # Written so that NaN stays.
    return tl.where(x < 0, 0.0, x).to(x.dtype) if RELU else x


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Product with a float32 factor: sums over a window need its range and precision."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def _part(offsets_ptr, part, windows, V, LONG: tl.constexpr, BLOCK_R: tl.constexpr):
    """First row of a part's window, the part's own rows, and the first of the piece's rows that are in no window.

    A part that is not needed (the window is short, or the other part of the piece has it) gets no rows.
    """
    first = part // 2 * LONG
    last = tl.minimum(first + LONG, V) - 1
    row = tl.where(part % 2 == 0, first, last)
    before = tl.zeros([BLOCK_R], tl.int32)
    for r in tl.range(0, windows + 1, BLOCK_R):
        index = r + tl.arange(0, BLOCK_R)
        offset = tl.load(offsets_ptr + index, mask=index <= windows, other=V)
        before += (offset <= row).to(tl.int32)
    window = tl.sum(before, 0) - 1
    covered = window < windows
    start = tl.load(offsets_ptr + window, mask=covered, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + window + 1, mask=covered, other=0).to(tl.int32)
    needed = (end - start > LONG) & ((part % 2 == 0) | (start > first))
    low = tl.maximum(start, first)
    high = tl.where(needed, tl.minimum(end, last + 1), low)
    outside = tl.maximum(tl.load(offsets_ptr + windows).to(tl.int32), first)
    return start, low, high, tl.where(part % 2 == 0, outside, last + 1), last + 1


@triton.jit
def _window(offsets_ptr, item, parts, windows, V, LONG: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of a program: those of a part (the first items), or of a whole window unless it is long."""
    low, high, outside, behind = 0, 0, 0, 0
    if item < parts:
        _, low, high, outside, behind = _part(offsets_ptr, item, windows, V, LONG, BLOCK_R)
    else:
        low = tl.load(offsets_ptr + item - parts).to(tl.int32)
        high = tl.load(offsets_ptr + item - parts + 1).to(tl.int32)
        high = tl.where(high - low <= LONG, high, low)
    return low, high, outside, behind


@triton.jit
def _sums(
    k_ptr, v_ptr, order_ptr, low, high, k_stride, v_stride, RELU: tl.constexpr, ORDERED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S [BLOCK_D, BLOCK_D] = sum of k^T v and s [BLOCK_D] = sum of k over rows."""
    state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in tl.range(low, high, BLOCK_N):
        row, inside = _rows(order_ptr, at, high, BLOCK_N, ORDERED)
        k = _relu(_load(k_ptr, row, inside, k_stride, D, BLOCK_D), RELU)
        v = _load(v_ptr, row, inside, v_stride, D, BLOCK_D)
        state = tl.dot(tl.trans(k), v, state, input_precision="ieee")
        total += k.to(tl.float32)
    return state, tl.sum(total, 0)


@triton.jit
def _outputs(
    q_ptr, out_ptr, order_ptr, state, total, low, high, q_stride, out_stride, eps,
    RELU: tl.constexpr, ORDERED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = q S / (q . s + eps) for rows."""
    for at in tl.range(low, high, BLOCK_N):
        row, inside = _rows(order_ptr, at, high, BLOCK_N, ORDERED)
        q = _relu(_load(q_ptr, row, inside, q_stride, D, BLOCK_D), RELU)
        norm = tl.sum(q.to(tl.float32) * total[None, :], 1) + eps
        out = _dot(q, state, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION) / norm[:, None]
        _store(out_ptr, out, row, inside, out_stride, D, BLOCK_D)


@triton.jit
def _query_gradients(
    q_ptr, grad_ptr, dq_ptr, order_ptr, state, total, low, high, q_stride, grad_stride, eps,
    RELU: tl.constexpr, ORDERED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of rows and return dS = q^T dp and ds = sum of dz q, with dp = dout / z and dz = -(dp . q S) / z.

    A query without a positive channel has z = eps, and dp beyond the range of float16; its zeros must stay zeros.
    """
    dstate = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    dtotal = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in tl.range(low, high, BLOCK_N):
        row, inside = _rows(order_ptr, at, high, BLOCK_N, ORDERED)
        raw = _load(q_ptr, row, inside, q_stride, D, BLOCK_D)
        q = _relu(raw, RELU).to(tl.float32)
        norm = tl.sum(q * total[None, :], 1) + eps
        dproduct = _load(grad_ptr, row, inside, grad_stride, D, BLOCK_D).to(tl.float32) / norm[:, None]
        dnorm = -tl.sum(dproduct * _dot(q, state, zero, PRECISION), 1) / norm
        dq = _dot(dproduct, tl.trans(state), dnorm[:, None] * total[None, :], PRECISION)
        if RELU:
            dq = tl.where(raw > 0, dq, 0.0)
        _store(dq_ptr, dq, row, inside, grad_stride, D, BLOCK_D)
        dstate = _dot(tl.trans(q), dproduct, dstate, PRECISION)
        dtotal += dnorm[:, None] * q
    return dstate, tl.sum(dtotal, 0)


@triton.jit
def _key_gradients(
    k_ptr, v_ptr, dk_ptr, dv_ptr, order_ptr, dstate, dtotal, low, high, k_stride, v_stride, grad_stride,
    RELU: tl.constexpr, ORDERED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = v dS^T + ds and dv = k dS for rows."""
    zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in tl.range(low, high, BLOCK_N):
        row, inside = _rows(order_ptr, at, high, BLOCK_N, ORDERED)
        raw = _load(k_ptr, row, inside, k_stride, D, BLOCK_D)
        v = _load(v_ptr, row, inside, v_stride, D, BLOCK_D)
        dk = _dot(v, tl.trans(dstate), zero + dtotal[None, :], PRECISION)
        if RELU:
            dk = tl.where(raw > 0, dk, 0.0)
        _store(dk_ptr, dk, row, inside, grad_stride, D, BLOCK_D)
        _store(dv_ptr, _dot(_relu(raw, RELU), dstate, zero, PRECISION), row, inside, grad_stride, D, BLOCK_D)


@triton.jit
def _clear(
    ptr, order_ptr, low, high, stride, ORDERED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Zero the rows of no window."""
    zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in tl.range(low, high, BLOCK_N):
        row, inside = _rows(order_ptr, at, high, BLOCK_N, ORDERED)
        _store(ptr, zero, row, inside, stride, D, BLOCK_D)


@triton.jit
def _keep_sums(ptr, state, total, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(ptr + d[:, None] * BLOCK_D + d[None, :], state)
    tl.store(ptr + BLOCK_D * BLOCK_D + d, total)


@triton.jit
def _add_sums(ptr, start, end, head, HEADS: tl.constexpr, LONG: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of a window from row start to row end - 1: those of its parts, in the order of the rows."""
    d = tl.arange(0, BLOCK_D)
    state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for piece in tl.range(start // LONG, (end + LONG - 1) // LONG):
        part = 2 * piece + (start > piece * LONG).to(tl.int32)
        part_ptr = ptr + (part * HEADS + head).to(tl.int64) * (BLOCK_D * BLOCK_D + BLOCK_D)
        state += tl.load(part_ptr + d[:, None] * BLOCK_D + d[None, :])
        total += tl.load(part_ptr + BLOCK_D * BLOCK_D + d)
    return state, total


@triton.jit
def _end_of(offsets_ptr, start, windows, V, BLOCK_R: tl.constexpr):
    """End of the window that starts at row `start`: the next offset."""
    least = tl.full([BLOCK_R], 0, tl.int32) + V
    for r in tl.range(0, windows + 1, BLOCK_R):
        index = r + tl.arange(0, BLOCK_R)
        offset = tl.load(offsets_ptr + index, mask=index <= windows, other=V).to(tl.int32)
        least = tl.minimum(least, tl.where(offset > start, offset, V))
    return tl.min(least, 0)


_SIZES = ["V", "windows", "parts"]


@triton.jit(do_not_specialize=_SIZES)
def _scatter_linear_kernel(
    q_ptr, k_ptr, v_ptr, offsets_ptr, order_ptr, out_ptr, sums_ptr,
    V, windows, parts, eps, q_row, q_head, k_row, k_head, v_row, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LONG: tl.constexpr, RELU: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = q S / (q . s + eps), S = sum of k^T v and s = sum of k over the window, with relu on q and k.

    One program computes one head of one window of at most LONG rows; the first programs compute the sums of parts of
    longer ones, and clear rows of no window. Bytes a row and head: q, k and v read and out written once. FLOPs
    4 D^2, some 8 a byte at D = 32: bound by bandwidth, and S, written and read twice otherwise, stays in registers.
    """
    head = tl.program_id(0) % HEADS
    item = tl.program_id(0) // HEADS
    low, high, outside, behind = _window(offsets_ptr, item, parts, windows, V, LONG, BLOCK_R)
    out_ptr += head * D
    _clear(out_ptr, order_ptr, outside, behind, HEADS * D, ORDERED, D, BLOCK_D, BLOCK_N)
    if low < high:
        state, total = _sums(
            k_ptr + head * k_head, v_ptr + head * v_head, order_ptr, low, high, k_row, v_row,
            RELU, ORDERED, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        if item < parts:
            _keep_sums(sums_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_D * BLOCK_D + BLOCK_D), state, total, BLOCK_D)
        else:
            _outputs(
                q_ptr + head * q_head, out_ptr, order_ptr, state, total, low, high, q_row, HEADS * D, eps,
                RELU, ORDERED, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _scatter_linear_long_kernel(
    q_ptr, offsets_ptr, order_ptr, out_ptr, sums_ptr, V, windows, parts, eps, q_row, q_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LONG: tl.constexpr, RELU: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out of long windows, from the sums of their parts. One program computes one head of one part."""
    head = tl.program_id(0) % HEADS
    start, low, high, _, _ = _part(offsets_ptr, tl.program_id(0) // HEADS, windows, V, LONG, BLOCK_R)
    if low < high:
        end = _end_of(offsets_ptr, start, windows, V, BLOCK_R)
        state, total = _add_sums(sums_ptr, start, end, head, HEADS, LONG, BLOCK_D)
        _outputs(
            q_ptr + head * q_head, out_ptr + head * D, order_ptr, state, total, low, high, q_row, HEADS * D, eps,
            RELU, ORDERED, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _scatter_linear_grad_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, offsets_ptr, order_ptr, dq_ptr, dk_ptr, dv_ptr, sums_ptr,
    V, windows, parts, eps, q_row, q_head, k_row, k_head, v_row, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LONG: tl.constexpr, RELU: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v; formulas with `_query_gradients` and `_key_gradients`.

    One program computes one head of one window of at most LONG rows in three passes: the sums again, dq with the sums
    dS and ds, then dk and dv. The first programs compute the sums of parts of longer windows. Bytes a row and head: q
    and dout read once, k and v twice, three gradients written. FLOPs 12 D^2.
    """
    head = tl.program_id(0) % HEADS
    item = tl.program_id(0) // HEADS
    low, high, outside, behind = _window(offsets_ptr, item, parts, windows, V, LONG, BLOCK_R)
    dq_ptr += head * D
    dk_ptr += head * D
    dv_ptr += head * D
    _clear(dq_ptr, order_ptr, outside, behind, HEADS * D, ORDERED, D, BLOCK_D, BLOCK_N)
    _clear(dk_ptr, order_ptr, outside, behind, HEADS * D, ORDERED, D, BLOCK_D, BLOCK_N)
    _clear(dv_ptr, order_ptr, outside, behind, HEADS * D, ORDERED, D, BLOCK_D, BLOCK_N)
    if low < high:
        k_ptr += head * k_head
        v_ptr += head * v_head
        state, total = _sums(
            k_ptr, v_ptr, order_ptr, low, high, k_row, v_row, RELU, ORDERED, D, BLOCK_D, BLOCK_N
        )  # fmt: skip
        if item < parts:
            _keep_sums(sums_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_D * BLOCK_D + BLOCK_D), state, total, BLOCK_D)
        else:
            dstate, dtotal = _query_gradients(
                q_ptr + head * q_head, grad_ptr + head * D, dq_ptr, order_ptr, state, total, low, high, q_row,
                HEADS * D, eps, RELU, ORDERED, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
            _key_gradients(
                k_ptr, v_ptr, dk_ptr, dv_ptr, order_ptr, dstate, dtotal, low, high, k_row, v_row, HEADS * D,
                RELU, ORDERED, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _scatter_linear_long_dq_kernel(
    grad_ptr, q_ptr, offsets_ptr, order_ptr, dq_ptr, sums_ptr, dsums_ptr, V, windows, parts, eps, q_row, q_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LONG: tl.constexpr, RELU: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of long windows, and the sums dS and ds of their parts. One program computes one head of one part."""
    head = tl.program_id(0) % HEADS
    start, low, high, _, _ = _part(offsets_ptr, tl.program_id(0) // HEADS, windows, V, LONG, BLOCK_R)
    if low < high:
        end = _end_of(offsets_ptr, start, windows, V, BLOCK_R)
        state, total = _add_sums(sums_ptr, start, end, head, HEADS, LONG, BLOCK_D)
        dstate, dtotal = _query_gradients(
            q_ptr + head * q_head, grad_ptr + head * D, dq_ptr + head * D, order_ptr, state, total, low, high, q_row,
            HEADS * D, eps, RELU, ORDERED, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        _keep_sums(dsums_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_D * BLOCK_D + BLOCK_D), dstate, dtotal, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _scatter_linear_long_dkv_kernel(
    k_ptr, v_ptr, offsets_ptr, order_ptr, dk_ptr, dv_ptr, dsums_ptr, V, windows, parts, k_row, k_head, v_row, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LONG: tl.constexpr, RELU: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of long windows. One program computes one head of one part."""
    head = tl.program_id(0) % HEADS
    start, low, high, _, _ = _part(offsets_ptr, tl.program_id(0) // HEADS, windows, V, LONG, BLOCK_R)
    if low < high:
        end = _end_of(offsets_ptr, start, windows, V, BLOCK_R)
        dstate, dtotal = _add_sums(dsums_ptr, start, end, head, HEADS, LONG, BLOCK_D)
        _key_gradients(
            k_ptr + head * k_head, v_ptr + head * v_head, dk_ptr + head * D, dv_ptr + head * D, order_ptr,
            dstate, dtotal, low, high, k_row, v_row, HEADS * D, RELU, ORDERED, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def config(heads: int, D: int, dtype: torch.dtype, relu: bool, ordered: bool, gradient: bool) -> dict:
    """Tiles, warps and stages: such that registers do not spill."""
    block_d = max(16, triton.next_power_of_2(D))
    wide = block_d > 32
    return dict(
        HEADS=heads, D=D, BLOCK_D=block_d, BLOCK_N=(32 if gradient else 64) // (2 if wide else 1), BLOCK_R=1024, LONG=LONG,
        RELU=relu, ORDERED=ordered, PRECISION="ieee" if dtype == torch.float32 else "tf32x3",
        num_warps=8 if wide else 4, num_stages=2,
    )  # fmt: skip


def _prepare(q: Tensor, offsets: Tensor, order: Tensor | None, relu: bool, gradient: bool) -> tuple[tuple, tuple, dict]:
    """Index tensors, sizes and configuration of the launches."""
    V, heads, D = q.shape
    parts = 2 * triton.cdiv(V, LONG)
    chosen = config(heads, D, q.dtype, relu, order is not None, gradient)
    offsets = offsets.contiguous()
    index = (offsets, offsets if order is None else order.contiguous())
    return index, (V, offsets.shape[0] - 1, parts), chosen


def _empty_sums(q: Tensor, parts: int, block_d: int) -> Tensor:
    """Room for S and s of every part and head."""
    return torch.empty((parts * q.shape[1], block_d * (block_d + 1)), dtype=torch.float32, device=q.device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _dense_channels(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, eps: float, relu: bool
) -> Tensor:  # fmt: skip
    """Launch the forward kernels: [V, M, D], contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = _dense_channels(q, k, v)
    index, sizes, chosen = _prepare(q, offsets, order, relu, False)
    _, windows, parts = sizes
    sums = _empty_sums(q, parts, chosen["BLOCK_D"])
    grid = ((parts + windows) * q.shape[1],)
    _scatter_linear_kernel[grid](q, k, v, *index, out, sums, *sizes, eps, *_strides(q, k, v), **chosen)
    if q.shape[0] > LONG:
        _scatter_linear_long_kernel[(parts * q.shape[1],)](
            q, *index, out, sums, *sizes, eps, *_strides(q), **chosen
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels: gradients of q, k and v, contiguous."""
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    q, k, v = _dense_channels(q, k, v)
    grad = grad.contiguous()
    index, sizes, chosen = _prepare(q, offsets, order, relu, True)
    _, windows, parts = sizes
    sums = _empty_sums(q, parts, chosen["BLOCK_D"])
    grid = ((parts + windows) * q.shape[1],)
    _scatter_linear_grad_kernel[grid](
        grad, q, k, v, *index, dq, dk, dv, sums, *sizes, eps, *_strides(q, k, v), **chosen
    )  # fmt: skip
    if q.shape[0] > LONG:
        dsums, grid = torch.empty_like(sums), (parts * q.shape[1],)
        _scatter_linear_long_dq_kernel[grid](
            grad, q, *index, dq, sums, dsums, *sizes, eps, *_strides(q), **chosen
        )  # fmt: skip
        _scatter_linear_long_dkv_kernel[grid](
            k, v, *index, dk, dv, dsums, *sizes, *_strides(k, v), **chosen
        )  # fmt: skip
    return dq, dk, dv
