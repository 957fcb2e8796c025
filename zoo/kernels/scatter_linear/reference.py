"""Scattered linear attention in plain PyTorch: the definition, the CPU path and the test oracle.

Rows are voxels, [V, M, D] for V rows, M heads and D channels a head. Windows are runs of rows: window r holds the rows
offsets[r] ... offsets[r + 1] - 1, counted along `order` where that is given. Sums run in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_of_rows(offsets: Tensor, order: Tensor | None, rows: int) -> Tensor:
    """[V] window of each row; the number of windows for rows behind the last one."""
    place = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    window = torch.searchsorted(offsets, place, right=True) - 1
    return window if order is None else torch.empty_like(window).scatter(0, order.long(), window)


def window_sums(k: Tensor, v: Tensor, window: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """S [R, M, D, D] = sum of k^T v and s [R, M, D] = sum of k over the rows of each window."""
    V, M, D = k.shape
    # One more window takes the rows that belong to none.
    state = k.new_zeros(windows + 1, M, D, v.shape[-1]).index_add(0, window, k[..., :, None] * v[..., None, :])
    total = k.new_zeros(windows + 1, M, D).index_add(0, window, k)
    return state[:-1], total[:-1]


def _prepare(x: Tensor, relu: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.relu() if relu else x


def scatter_linear(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """out_i = q_i S / (q_i . s + eps) with the sums of the row's window; zero for rows of no window."""
    dtype, windows = q.dtype, offsets.shape[0] - 1
    q, k, v = _prepare(q, relu), _prepare(k, relu), _prepare(v, False)
    window = window_of_rows(offsets, order, q.shape[0])
    state, total = (_with_zero(x)[window] for x in window_sums(k, v, window, windows))
    norm = (q * total).sum(-1, keepdim=True) + eps
    return ((q[..., None, :] @ state).squeeze(-2) / norm).to(dtype)


def _with_zero(x: Tensor) -> Tensor:
    """A row of zeros behind the last one."""
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))


def scatter_linear_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, order: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `scatter_linear` with respect to q, k and v, written out.

    Autograd does not reach inside a registered op; elsewhere it differentiates the forward by itself.
    """
    dtype, windows = q.dtype, offsets.shape[0] - 1
    positive_q, positive_k = q > 0, k > 0
    q, k, v, grad = _prepare(q, relu), _prepare(k, relu), _prepare(v, False), _prepare(grad, False)
    window = window_of_rows(offsets, order, q.shape[0])
    state, total = (_with_zero(x)[window] for x in window_sums(k, v, window, windows))
    norm = (q * total).sum(-1, keepdim=True) + eps
    dproduct = grad / norm
    dnorm = -(dproduct * (q[..., None, :] @ state).squeeze(-2)).sum(-1, keepdim=True) / norm
    dq = (state @ dproduct[..., None]).squeeze(-1) + dnorm * total
    dstate, _ = window_sums(q, dproduct, window, windows)
    dtotal = q.new_zeros(windows + 1, *q.shape[1:]).index_add(0, window, dnorm * q)[:-1]
    dstate, dtotal = _with_zero(dstate)[window], _with_zero(dtotal)[window]
    dk = (dstate @ v[..., None]).squeeze(-1) + dtotal
    dv = (k[..., None, :] @ dstate).squeeze(-2)
    if relu:
        dq, dk = dq * positive_q, dk * positive_k
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
