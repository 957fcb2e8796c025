"""Bi-level routing attention in plain PyTorch: the definition, the CPU path and the test oracle.

Maps are channels-last, [B, H, W, C]. A region is `region = (h, w)` tokens; the map is covered by
ceil(H / h) x ceil(W / w) regions, numbered row-major, and tokens inside a region are row-major too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Which regions each query region attends to."""

    index: Tensor  # [B, G, K] int32, descending affinity
    weight: Tensor  # [B, G, K] float32, softmax over the kept affinities
    grid: tuple[int, int]  # query regions per column and per row, G = rows * cols


def region_grid(size: tuple[int, int], region: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of regions that cover a map."""
    return -(-size[0] // region[0]), -(-size[1] // region[1])


def to_regions(x: Tensor, region: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> [B, G, T, C]; tokens outside the map are zero."""
    B, H, W, C = x.shape
    (rows, cols), (h, w) = region_grid((H, W), region), region
    x = F.pad(x, (0, 0, 0, cols * w - W, 0, rows * h - H))
    x = x.reshape(B, rows, h, cols, w, C).transpose(2, 3)  # [B, rows, cols, h, w, C]
    return x.reshape(B, rows * cols, h * w, C)


def from_regions(x: Tensor, region: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[B, G, T, C] -> [B, H, W, C], dropping tokens outside the map."""
    (rows, cols), (h, w) = region_grid(size, region), region
    B, _, _, C = x.shape
    x = x.reshape(B, rows, cols, h, w, C).transpose(2, 3)  # [B, rows, h, cols, w, C]
    return x.reshape(B, rows * h, cols * w, C)[:, : size[0], : size[1]]


def inside(size: tuple[int, int], region: tuple[int, int], device: torch.device) -> Tensor:
    """[G, T] bool: which tokens of which region lie on the map."""
    return to_regions(torch.ones(1, *size, 1, dtype=torch.bool, device=device), region)[0, :, :, 0]


def region_mean(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean of each region's tokens on the map: [B, H, W, C] -> [B, G, C], at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = inside((x.shape[1], x.shape[2]), region, x.device).sum(1, keepdim=True)  # [G, 1]
    return to_regions(x, region).sum(2) / count


def without_autocast(device_type: str) -> AbstractContextManager:
    """Full precision inside an autocast region; the meta device knows no autocast."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def affinity(q_region: Tensor, k_region: Tensor, scale: float) -> Tensor:
    """[B, G, C], [B, R, C] -> [B, G, R], outside autocast: a rounded affinity routes elsewhere."""
    with without_autocast(q_region.device.type):
        return (q_region * scale) @ k_region.transpose(1, 2)


def top_regions(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` largest logits of each row: indices (int32) and their softmax, [B, G, K] each."""
    value, index = logits.topk(topk, dim=-1)
    return index.to(torch.int32), value.softmax(-1)


def route_regions(
    q: Tensor, k: Tensor, region: tuple[int, int], kv_region: tuple[int, int], topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Routing by mean query and key of each region; see `op.route_regions`."""
    return top_regions(affinity(region_mean(q, region), region_mean(k, kv_region), scale), topk)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, G, T, M*D] -> [B, M, G, T, D]"""
    return x.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)


def _merge_heads(x: Tensor, region: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[B, M, G, T, D] -> [B, H, W, M*D]"""
    return from_regions(x.permute(0, 2, 3, 1, 4).flatten(3), region, size)


def _select(x: Tensor, index: Tensor) -> Tensor:
    """Regions [B, M, R, T, D] picked by index [B, M, G, K] -> [B, M, G, K, T, D]"""
    flat = x.flatten(3)  # [B, M, R, T*D]
    flat = flat.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, flat.shape[-1]))  # [B, M, G*K, T*D]
    return flat.reshape(*index.shape, *x.shape[3:])


def gather_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int],
    mask_padding: bool = False,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries [B, M, G, T, D], routed keys and values [B, M, G, K*T', D] and a key mask (or None)."""
    qr, kr, vr = (_split_heads(to_regions(x, r), heads) for x, r in ((q, region), (k, kv_region), (v, kv_region)))
    index = (index if index.dim() == 4 else index[:, None]).long()  # [B, M or 1, G, K]
    index = index.expand(-1, heads, -1, -1)
    ks, vs = _select(kr, index), _select(vr, index)
    if weight is not None:
        weight = weight[:, None, :, :, None, None].to(ks.dtype)  # [B, 1, G, K, 1, 1]
        ks, vs = ks * weight, vs * weight
    mask = None
    if mask_padding:
        mask = inside((k.shape[1], k.shape[2]), kv_region, k.device)[index].flatten(3)[..., None, :]
    return qr, ks.flatten(3, 4), vs.flatten(3, 4), mask


def bilevel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int],
    scale: float,
    mask_padding: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """Attention of each region's queries to the tokens of its routed regions; see `op.bilevel_attention`.

    Probabilities are never stored: `scaled_dot_product_attention` keeps memory linear in tokens.
    """
    qr, ks, vs, mask = gather_routed(q, k, v, index, heads, region, kv_region, mask_padding, weight)
    B, M, G, T, _ = qr.shape
    if mask is not None:
        mask = mask.flatten(1, 2)  # [B, M*G, 1, L]
    out = F.scaled_dot_product_attention(
        qr.flatten(1, 2), ks.flatten(1, 2), vs.flatten(1, 2), attn_mask=mask, scale=scale
    )  # [B, M*G, T, D]
    return _merge_heads(out.unflatten(1, (M, G)), region, (q.shape[1], q.shape[2]))


def bilevel_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int],
    scale: float,
    mask_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `bilevel_attention` with respect to q, k and v, written out.

    Autograd does not reach inside a registered op; elsewhere it differentiates the forward by itself.
    """
    qr, ks, vs, mask = gather_routed(q, k, v, index, heads, region, kv_region, mask_padding)
    do = _split_heads(to_regions(grad, region), heads)  # [B, M, G, T, D]
    s = (qr * scale) @ ks.transpose(-2, -1)
    p = (s if mask is None else s.masked_fill(~mask, float("-inf"))).softmax(-1)  # [B, M, G, T, L]
    dp = do @ vs.transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    index = (index if index.dim() == 4 else index[:, None]).long().expand(-1, heads, -1, -1)

    def add_regions(selected: Tensor, size: tuple[int, int]) -> Tensor:
        B, M, G, L, D = selected.shape
        K, (rows, cols) = index.shape[-1], region_grid(size, kv_region)
        flat = selected.reshape(B, M, G * K, L // K * D)
        total = flat.new_zeros(B, M, rows * cols, L // K * D)
        total.scatter_add_(2, index.reshape(B, M, G * K, 1).expand_as(flat), flat)
        return _merge_heads(total.reshape(B, M, rows * cols, L // K, D), kv_region, size)

    dq = _merge_heads(ds @ ks, region, (q.shape[1], q.shape[2]))
    size = (k.shape[1], k.shape[2])
    return dq, add_regions(ds.transpose(-2, -1) @ qr, size), add_regions(p.transpose(-2, -1) @ do, size)
