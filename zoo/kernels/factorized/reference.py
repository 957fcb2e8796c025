"""Factorized self-attention (FaSA) in plain PyTorch: the definition, the CPU path and the test oracle.

Maps are channels-last, [B, H, W, C]. Keys of the local groups are laid out as [B, L, M, D]: L positions of a window,
M heads of D channels, so that a pooled map [B, P, P, M * D] is such a tensor without a copy, L = P * P.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSIONS = ("official", "window_mean")


def reflect_index(position: Tensor, size: int) -> Tensor:
    """Index on an axis of `size` elements of positions at or past its start, by repeated reflection.

    The axis is continued with period 2 (size - 1): 0 1 2 3 | 2 1 0 1 2 3 ... As far as ``F.pad(mode="reflect")`` is
    defined, which is up to size - 1 elements past the end, this is its rule. An axis of one element is repeated.
    """
    period = max(2 * (size - 1), 1)
    position = position % period
    return torch.minimum(position, period - position) if size > 1 else position


def window_span(window: int, dilation: int) -> int:
    """Side of a window on the map: `window` positions, `dilation` apart."""
    return dilation * (window - 1) + 1


def window_count(size: int, window: int, dilation: int) -> int:
    """Windows that cover an axis of the map."""
    return -(-size // window_span(window, dilation))


def window_index(size: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """Source indices of the positions of all windows along one axis, [windows * window]."""
    start = torch.arange(window_count(size, window, dilation), device=device) * window_span(window, dilation)
    position = torch.arange(window, device=device) * dilation
    return reflect_index(start[:, None] + position, size).flatten()


def _pool_group(x: Tensor, heads: int, window: int, dilation: int, fusion: str) -> Tensor:
    """One group [B, H, W, C] -> [B, P, P, C]."""
    B, H, W, _ = x.shape
    x = x.index_select(1, window_index(H, window, dilation, x.device))
    x = x.index_select(2, window_index(W, window, dilation, x.device))  # [B, rows * P, cols * P, C]
    x = x.reshape(B, x.shape[1] // window, window, x.shape[2] // window, window, heads, x.shape[3] // heads)
    x = x.permute(0, 2, 4, 5, 1, 3, 6).flatten(4, 5)  # [B, P, P, M, windows, D]
    if fusion == "official":
        # Runs of `windows` consecutive values of the (window, channel) axis: they mix windows and channels.
        x = x.reshape(*x.shape[:4], x.shape[5], x.shape[4]).mean(-1)  # [B, P, P, M, D]
    else:
        x = x.mean(4)
    return x.flatten(3)


def cross_window_pool(x: Tensor, heads: int, window: int, dilations: list[int], fusion: str) -> Tensor:
    """Pool each channel group of a map over its windows; see `op.cross_window_pool`."""
    groups = x.chunk(len(dilations), -1)
    return torch.stack(
        [_pool_group(g, heads, window, d, fusion) for g, d in zip(groups, dilations, strict=True)]
    )  # [G, B, P, P, C / G]


def _spread_group(grad: Tensor, size: list[int], heads: int, dilation: int, fusion: str) -> Tensor:
    """Transpose of `_pool_group`: [B, P, P, C] -> [B, H, W, C]."""
    B, window, _, C = grad.shape
    (H, W), D = size, C // heads
    rows, cols = window_count(H, window, dilation), window_count(W, window, dilation)
    grad = grad.reshape(B, window, window, heads, D) / (rows * cols)
    if fusion == "official":
        grad = grad[..., None].expand(-1, -1, -1, -1, -1, rows * cols)
    else:
        grad = grad[..., None, :].expand(-1, -1, -1, -1, rows * cols, -1)
    grad = grad.reshape(B, window, window, heads, rows, cols, D).permute(0, 4, 1, 5, 2, 3, 6)
    grad = grad.reshape(B, rows * window, cols * window, C)
    dx = grad.new_zeros(B, H, cols * window, C).index_add_(1, window_index(H, window, dilation, grad.device), grad)
    return grad.new_zeros(B, H, W, C).index_add_(2, window_index(W, window, dilation, grad.device), dx)


def cross_window_pool_backward(grad: Tensor, size: list[int], heads: int, dilations: list[int], fusion: str) -> Tensor:
    """Gradient of `cross_window_pool` with respect to its map, written out.

    Autograd does not reach inside a registered op; elsewhere it differentiates the forward by itself.
    """
    groups = zip(grad, dilations, strict=True)
    return torch.cat([_spread_group(g, size, heads, d, fusion) for g, d in groups], -1)


def split_queries(q: Tensor, global_channels: int, groups: int, heads: int) -> list[Tensor]:
    """[B, N, C] -> [B, 1, N, Cg] and, for each local group, [B, M, N, D].

    The global group comes first; inside each head the channels of group 1 precede those of group 2.
    """
    local = q[..., global_channels:].unflatten(-1, (heads, groups, -1))  # [B, N, M, G, D]
    return [q[:, None, :, :global_channels], *(local[:, :, :, i].transpose(1, 2) for i in range(groups))]


def _branches(k_global: Tensor, k_local: Tensor, k_dilated: Tensor | None) -> list[Tensor]:
    """Keys (or values) of each branch as [B, heads, L, D]."""
    local = [k_local] if k_dilated is None else [k_local, k_dilated]
    return [k_global[:, None], *(k.transpose(1, 2) for k in local)]


def _merge(branches: list[Tensor]) -> Tensor:
    """[B, heads, N, D] of every branch -> [B, N, C], group by group."""
    return torch.cat([x.transpose(1, 2).flatten(2) for x in branches], -1)


def factorized_attention(
    q: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    k_local: Tensor,
    v_local: Tensor,
    k_dilated: Tensor | None = None,
    v_dilated: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the global, the local and the dilated keys; see `op.factorized_attention`."""
    keys, values = _branches(k_global, k_local, k_dilated), _branches(v_global, v_local, v_dilated)
    queries = split_queries(q, k_global.shape[-1], len(keys) - 1, k_local.shape[2])
    return _merge([F.scaled_dot_product_attention(*x) for x in zip(queries, keys, values, strict=True)])


def factorized_attention_backward(
    grad: Tensor,
    q: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    k_local: Tensor,
    v_local: Tensor,
    k_dilated: Tensor | None,
    v_dilated: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of `factorized_attention` with respect to its inputs, written out; seven, or five without group 2."""
    keys, values = _branches(k_global, k_local, k_dilated), _branches(v_global, v_local, v_dilated)
    groups, heads = len(keys) - 1, k_local.shape[2]
    queries = split_queries(q, k_global.shape[-1], groups, heads)
    widths = [k.shape[1] * k.shape[3] for k in keys]
    grads = [
        g.unflatten(-1, (k.shape[1], -1)).transpose(1, 2) for g, k in zip(grad.split(widths, -1), keys, strict=True)
    ]
    dq, dkv = [], []
    for query, k, v, do in zip(queries, keys, values, grads, strict=True):
        scale = k.shape[-1] ** -0.5
        p = (query * scale @ k.transpose(-2, -1)).softmax(-1)  # [B, heads, N, L]
        dp = do @ v.transpose(-2, -1)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq.append(ds @ k)
        dkv += [(ds.transpose(-2, -1) @ query).transpose(1, 2), (p.transpose(-2, -1) @ do).transpose(1, 2)]
    local = torch.stack(dq[1:], 3).permute(0, 2, 1, 3, 4).flatten(2)  # [B, N, M, G, D] -> [B, N, M * G * D]
    return torch.cat([dq[0][:, 0], local], -1), dkv[0][:, :, 0], dkv[1][:, :, 0], *dkv[2:]
