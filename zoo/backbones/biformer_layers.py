"""Layers of BiFormer: bi-level routing attention in its two published forms, global attention, and a convolution.

Paper: arXiv:2303.08810.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers import DepthwiseConv2d, global_attention
from zoo.kernels import Routing, bilevel_attention, route_regions
from zoo.kernels.bilevel_routing import reference

KV_POOLS = ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool")


def _pair(n_win: int | Sequence[int]) -> tuple[int, int]:
    rows, cols = (n_win, n_win) if isinstance(n_win, int) else tuple(n_win)
    if min(rows, cols) < 1:
        raise ValueError(f"n_win must be positive, got {n_win}.")
    return rows, cols


def _check_bra(dim: int, num_heads: int, qk_dim: int, n_win: int | Sequence[int], topk: int) -> None:
    rows, cols = _pair(n_win)
    if dim % num_heads or qk_dim % num_heads:
        raise ValueError(f"num_heads must divide dim and qk_dim, got {dim=}, {qk_dim=}, {num_heads=}.")
    if not 1 <= topk <= rows * cols:
        raise ValueError(f"topk must lie between 1 and the {rows * cols} regions of n_win={n_win}, got {topk}.")


class Router(nn.Module):
    """Trainable region routing: affinities of region descriptors after a shared linear map."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.emb = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, q_region: Tensor, k_region: Tensor) -> tuple[Tensor, Tensor]:
        return self.emb(q_region), self.emb(k_region)


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention (BRA) of BiFormer-T/S/B and STL, on channels-last maps.

    The map is cut into n_win x n_win regions; each region attends to the tokens of the `topk` regions whose
    mean keys fit its mean query best. A map that n_win does not divide is zero-padded at the bottom and right
    BEFORE the projection, so padding carries the bias and takes part, as in the official code; with
    `mask_padding` it is left out everywhere instead.

    Args:
        dim: Channels C.
        num_heads: Heads; the logit scale is qk_dim**-0.5, of the full width, as published.
        n_win: Regions per side, or (rows, columns).
        topk: Regions that each region attends to; all of them where a small map has fewer.
        qk_dim: Channels of queries and keys; `dim` by default.
        side_dwconv: Kernel of the depth-wise convolution on the values (local enhancement); 0 for none.
        kv_downsample_mode: "identity", or pooling of keys and values inside each region: "avgpool" or "maxpool"
            by kv_downsample_ratio, "ada_avgpool" or "ada_maxpool" to kv_per_win x kv_per_win tokens.
        kv_downsample_ratio: Factor of "avgpool" and "maxpool".
        kv_per_win: Tokens per side of "ada_avgpool" and "ada_maxpool".
        param_routing: Pass the region descriptors through a linear map; needs diff_routing.
        diff_routing: Let gradients flow through the routing weights; needs soft_routing.
        soft_routing: Multiply the keys and values of a region by its routing weight.
        param_attention: "qkvo", or "qkv" for no output projection.
        mask_padding: Leave padding out of means, softmax and convolution.

    Raises:
        ValueError, NotImplementedError: Arguments that do not fit, or that the method does not define.

    Source: arXiv:2303.08810.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        side_dwconv: int = 5,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratio: int = 1,
        kv_per_win: int = 1,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        param_attention: str = "qkvo",
        mask_padding: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        qk_dim = qk_dim or dim
        _check_bra(dim, num_heads, qk_dim, n_win, topk)
        if kv_downsample_mode not in KV_POOLS:
            raise ValueError(f"kv_downsample_mode must be one of {KV_POOLS}, got {kv_downsample_mode!r}.")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f'param_attention must be "qkvo" or "qkv", got {param_attention!r}.')
        if diff_routing and not soft_routing:
            raise NotImplementedError("diff_routing needs soft_routing=True: hard routing has no gradient.")
        if param_routing and not diff_routing:
            raise NotImplementedError("param_routing needs diff_routing=True, else its weights would never train.")
        if mask_padding and kv_downsample_mode != "identity":
            raise NotImplementedError("mask_padding does not combine with pooled keys and values.")
        self.dim, self.qk_dim, self.num_heads = dim, qk_dim, num_heads
        self.n_win, self.topk, self.scale = n_win, topk, qk_dim**-0.5
        self.kv_downsample_mode = kv_downsample_mode
        self.kv_downsample_ratio, self.kv_per_win = kv_downsample_ratio, kv_per_win
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self.mask_padding = mask_padding
        self.router = Router(qk_dim, **dd) if param_routing else None
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, **dd)
        self.lepe = DepthwiseConv2d(dim, side_dwconv, **dd) if side_dwconv else None
        self.wo = nn.Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()

    def _pool(self, x: Tensor, region: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Pool a divisible map inside each region: the smaller map and its region size."""
        if self.kv_downsample_mode == "identity":
            return x, region
        B, H, W, C = x.shape
        rows, cols = H // region[0], W // region[1]
        x = reference.to_regions(x, region).reshape(B * rows * cols, *region, C).permute(0, 3, 1, 2)
        if self.kv_downsample_mode.startswith("ada"):
            pool = F.adaptive_avg_pool2d if self.kv_downsample_mode == "ada_avgpool" else F.adaptive_max_pool2d
            x = pool(x, self.kv_per_win)
        else:
            pool = F.avg_pool2d if self.kv_downsample_mode == "avgpool" else F.max_pool2d
            x = pool(x, self.kv_downsample_ratio)
        h, w = x.shape[2:]
        x = x.permute(0, 2, 3, 1).reshape(B, rows * cols, h * w, C)
        return reference.from_regions(x, (h, w), (rows * h, cols * w)), (h, w)

    def _route(self, q: Tensor, k: Tensor, region: tuple[int, int]) -> Routing:
        rows, cols = reference.region_grid((q.shape[1], q.shape[2]), region)
        topk = min(self.topk, rows * cols)
        if not self.diff_routing:
            return route_regions(q, k, region, topk, scale=self.scale)
        q_region, k_region = reference.region_mean(q, region), reference.region_mean(k, region)
        if self.router is not None:
            with reference.without_autocast(q.device.type):
                q_region, k_region = self.router(q_region, k_region)
        logits = reference.affinity(q_region, k_region, self.scale)
        return Routing(*reference.top_regions(logits, topk), (rows, cols))

    def forward(
        self, x: Tensor, n_win: int | Sequence[int] | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Attend.

        Args:
            x: Map [B, H, W, C].
            n_win: Regions per side for this call; the layer's by default.
            return_routing: Also return the `Routing`, whose grid covers the padded map.

        Returns:
            [B, H, W, C], or that and the `Routing`.
        """
        H, W = x.shape[1:3]
        rows, cols = _pair(self.n_win if n_win is None else n_win)
        region = (-(-H // rows), -(-W // cols))
        if not self.mask_padding and (H % rows or W % cols):
            x = F.pad(x, (0, 0, 0, cols * region[1] - W, 0, rows * region[0] - H))
        q, k, v = self.qkv(x).split((self.qk_dim, self.qk_dim, self.dim), dim=-1)
        routing = self._route(q, k, region)
        (keys, kv_region), (values, _) = self._pool(k, region), self._pool(v, region)
        out = bilevel_attention(
            q, keys, values, routing.index, heads=self.num_heads, region=region, kv_region=kv_region,
            scale=self.scale, mask_padding=self.mask_padding, distinct=True,
            weight=routing.weight if self.soft_routing else None,
        )  # fmt: skip
        if self.lepe is not None:
            out = self.lepe(v, residual=out)
        out = self.wo(out)[:, :H, :W]
        return (out, routing) if return_routing else out


@register_notrace_module
class BiLevelRoutingAttentionNCHW(nn.Module):
    """The refactored bi-level routing attention of BiFormer-STL-nchw, on maps [B, C, H, W].

    It equals `BiLevelRoutingAttention` where n_win divides the map. Elsewhere the region size is H // n_win
    and W // n_win, at least 1, so that there can be more than n_win regions per side, and the padding is added
    AFTER the projection: padded keys and values are zero and stay in the softmax, unless `mask_padding`.

    Args:
        dim: Channels C.
        num_heads: Heads; the logit scale is dim**-0.5, of the full width, as published.
        n_win: Regions per side, or (rows, columns).
        topk: Regions that each region attends to; all of them where a small map has fewer.
        side_dwconv: Kernel of the depth-wise convolution on the values; 0 for none.
        mask_padding: Leave padding out of the softmax.

    Source: arXiv:2303.08810.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        *,
        side_dwconv: int = 5,
        mask_padding: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        _check_bra(dim, num_heads, dim, n_win, topk)
        self.num_heads, self.n_win, self.topk = num_heads, n_win, topk
        self.scale = dim**-0.5
        self.mask_padding = mask_padding
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.lepe = DepthwiseConv2d(dim, side_dwconv, **dd) if side_dwconv else None
        self.output_linear = nn.Conv2d(dim, dim, 1, **dd)

    def forward(
        self, x: Tensor, n_win: int | Sequence[int] | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """[B, C, H, W] -> the same, or that and the `Routing` with `return_routing`."""
        H, W = x.shape[2:]
        rows, cols = _pair(self.n_win if n_win is None else n_win)
        region = (max(H // rows, 1), max(W // cols, 1))
        grid = reference.region_grid((H, W), region)
        qkv = self.qkv_linear(x).permute(0, 2, 3, 1).contiguous()  # [B, H, W, 3C]
        q, k, v = qkv.chunk(3, dim=-1)
        # The official affinities are not scaled.
        routing = route_regions(q, k, region, min(self.topk, grid[0] * grid[1]))
        out = bilevel_attention(
            q, k, v, routing.index, heads=self.num_heads, region=region, scale=self.scale,
            mask_padding=self.mask_padding, distinct=True,
        )  # fmt: skip
        if self.lepe is not None:
            out = self.lepe(v, residual=out)
        out = self.output_linear(out.permute(0, 3, 1, 2))
        return (out, routing) if return_routing else out


@register_notrace_module
class AttentionLePE(nn.Module):
    """Global attention plus a depth-wise convolution, as in stage 4, on maps [B, H, W, C].

    Args:
        dim: Channels C.
        num_heads: Heads; the logit scale is (dim / num_heads)**-0.5, per head.
        side_dwconv: Kernel of the depth-wise convolution; 0 for none.
        lepe_on: "input" convolves x (BiFormer-T/S/B, STL), "value" the values (STL-nchw).
    """

    def __init__(
        self, dim: int, num_heads: int = 8, side_dwconv: int = 5, lepe_on: str = "input", device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {dim=}, {num_heads=}.")
        if lepe_on not in ("input", "value"):
            raise ValueError(f'lepe_on must be "input" or "value", got {lepe_on!r}.')
        self.num_heads, self.lepe_on = num_heads, lepe_on
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = DepthwiseConv2d(dim, side_dwconv, **dd) if side_dwconv else None

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x [B, M, N, D]
        out = global_attention(q, k, v, self.scale).transpose(1, 2).reshape(B, H, W, C)
        if self.lepe is not None:
            source = x.to(out.dtype) if self.lepe_on == "input" else qkv[..., 2 * C :]
            out = self.lepe(source, residual=out)
        return self.proj(out)


class ConvMixer(nn.Module):
    """Linear, 5x5 depth-wise convolution, linear: the ablation without attention (topk 0)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, dim, **dd)
        self.dwconv = DepthwiseConv2d(dim, 5, **dd)
        self.fc2 = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dwconv(self.fc1(x)))


@register_notrace_module
class ChannelsLastBRA(BiLevelRoutingAttentionNCHW):
    """The same on maps [B, H, W, C] for the blocks; both permutations are views."""

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        out, routing = super().forward(x.permute(0, 3, 1, 2), return_routing=True)
        out = out.permute(0, 2, 3, 1)
        return (out, routing) if return_routing else out
