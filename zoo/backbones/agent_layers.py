"""Agent attention in its four flavours, and what the Agent backbones share. Maps are channels-last, [B, H, W, C].

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han et al., ECCV 2024, arXiv:2312.08874.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers import DepthwiseConv2d, Mlp, global_attention
from zoo.kernels import AgentBias, agent_attention
from zoo.kernels.agent.reference import expand_bias

__all__ = [
    "AgentAttention",
    "AgentStripAttention",
    "Block",
    "SoftmaxAttention",
    "SpatialReductionAgentAttention",
    "SpatialReductionAttention",
]

Grid = tuple[int, int]
# The block biases are stored for a map of 7 x 7 tokens, whatever the map.
BLOCK_BIAS_SIZE = 7
BIAS_INIT_STD = 0.02


def agent_grid_of(agent_num: int | Sequence[int]) -> Grid:
    """Rows and columns of agents: a square number, or the two themselves."""
    if not isinstance(agent_num, int):
        rows, cols = agent_num
    else:
        rows = cols = math.isqrt(max(agent_num, 0))
    if rows < 1 or cols < 1 or (isinstance(agent_num, int) and rows * cols != agent_num):
        raise ValueError(f"agent_num must be a positive square number or (rows, columns), got {agent_num}.")
    return rows, cols


def check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim, got {dim=}, {num_heads=}.")


def refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise NotImplementedError(
            "Agent attention takes no mask: queries reach keys only through the agents, so that no single pair can be "
            "left out. Crop the map, or use a softmax attention."
        )


def as_tokens(x: Tensor, grid: Grid | None, default: Grid, prefix: int = 0) -> tuple[Tensor, Grid]:
    """Tokens [B, N, C] and their grid, of a map [B, H, W, C] or of tokens."""
    if x.dim() == 4:
        return x.flatten(1, 2), (x.shape[1], x.shape[2])
    rows, cols = grid or default
    if x.shape[1] != rows * cols + prefix:
        extra = " and a class token" if prefix else ""
        raise ValueError(f"Tokens of shape {tuple(x.shape)} are no grid of {rows} x {cols}{extra}; pass their grid.")
    return x, (rows, cols)


def linear_weights(source: int, target: int, like: Tensor) -> Tensor:
    """Linear interpolation without align_corners as a matrix [source, target].

    A product has a deterministic gradient on every device, which `F.interpolate` has not.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    eye = torch.eye(source, device=like.device, dtype=dtype)
    return F.interpolate(eye[None], size=target, mode="linear")[0].to(like.dtype)


def resize_table(table: Tensor, length: int) -> Tensor:
    """Resize the last dimension linearly; the same length is the same table."""
    return table if table.shape[-1] == length else table @ linear_weights(table.shape[-1], length, table)


def for_grids(rows: Tensor, cols: Tensor) -> Tensor:
    """Weights of rows [a, b] and of columns [c, d] as those of grids, [a * c, b * d]"""
    return (rows[:, None, :, None] * cols[None, :, None, :]).flatten(2).flatten(0, 1)


def resize_agents(bias: Tensor, source: Grid, target: Grid) -> Tensor:
    """Bilinear interpolation of a bias [M, n, ...] over its grid of agents."""
    if source == target:
        return bias
    rows, cols = (linear_weights(a, b, bias) for a, b in zip(source, target, strict=True))
    return torch.einsum("mn...,nk->mk...", bias, for_grids(rows, cols))


def pool_agents(q: Tensor, grid: Grid, agents: Grid) -> Tensor:
    """Mean query of each agent's bin, the bins of adaptive average pooling: [B, N, C] -> [B, n, C]"""
    if grid == agents:
        return q
    (rows, cols), (H, W) = agents, grid
    if H % rows == 0 and W % cols == 0:
        bins = q.unflatten(1, (rows, H // rows, cols, W // cols))  # [B, rows, h, cols, w, C]
        return bins.mean((2, 4)).flatten(1, 2)
    # Overlapping bins as a matrix [n, N]: one product reads the queries in place and has a deterministic gradient.
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = [
        F.adaptive_avg_pool1d(torch.eye(side, device=q.device, dtype=dtype)[None], count)[0].T
        for side, count in zip(grid, agents, strict=True)
    ]
    return for_grids(*weights).to(q.dtype) @ q


# Axis of the rows or columns of a map in each bias: of keys, then of queries.
LENGTH_DIM = dict(ah_bias=2, aw_bias=3, ha_bias=1, wa_bias=2)


def without_leading_axis(bias: Tensor) -> Tensor:
    """A row or column bias as the official models store it, [1, M, ...], or as it is here, [M, ...]."""
    return bias.squeeze(0) if bias.dim() == 5 else bias


class AgentCore(nn.Module):
    """Agents and biases of agent attention, for tokens that are already projected.

    Args:
        dim: Channels C.
        num_heads: Heads M.
        agent_num: Agents: a square number, or (rows, columns).
        grid: Map that the row and column biases are made for; another one resizes them.
        key_grid: Map of the keys, where it differs from that of the queries.
        class_token: Whether token 0 of queries and keys is a class token outside the map.
        agent_grid: Agents at run time, (rows, columns), where they differ from `agent_num`; the biases are resized.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int | Sequence[int],
        grid: Sequence[int],
        *,
        key_grid: Sequence[int] | None = None,
        class_token: bool = False,
        agent_grid: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.grid = num_heads, tuple(grid)
        self.agents = agent_grid_of(agent_num)
        self.agent_grid = agent_grid_of(agent_grid) if agent_grid is not None else self.agents
        self.prefix = int(class_token)
        n, (H, W), (key_h, key_w) = self.agents[0] * self.agents[1], self.grid, key_grid or self.grid
        shapes = dict(
            an_bias=(num_heads, n, BLOCK_BIAS_SIZE, BLOCK_BIAS_SIZE),
            na_bias=(num_heads, n, BLOCK_BIAS_SIZE, BLOCK_BIAS_SIZE),
            ah_bias=(num_heads, n, key_h, 1),
            aw_bias=(num_heads, n, 1, key_w),
            ha_bias=(num_heads, H, 1, n),
            wa_bias=(num_heads, 1, W, n),
        )
        if class_token:
            shapes.update(ac_bias=(1, num_heads, n, 1), ca_bias=(1, num_heads, 1, n))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.init_biases()

    def init_biases(self) -> None:
        for name, bias in self.named_parameters(recurse=False):
            if name.endswith("_bias") and bias.device.type != "meta":
                trunc_normal_(bias, std=BIAS_INIT_STD)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        # Official row and column biases have a leading axis of length one. Here it is left out: torch refuses to lay
        # out a module with parameters of five axes as channels_last.
        for name in LENGTH_DIM:
            key = prefix + name
            if key in state_dict:
                state_dict[key] = without_leading_axis(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def key_grid_of(self, grid: Grid) -> Grid:
        """Map of the keys for a map of queries."""
        return grid

    def set_grid(self, grid: Sequence[int]) -> None:
        """Resize the row and column biases for another map, for fine-tuning."""
        self.grid = tuple(grid)
        keys = self.key_grid_of(self.grid)
        for name, length in zip(LENGTH_DIM, (*keys, *self.grid), strict=True):
            bias = getattr(self, name)
            resized = resize_bias(name, bias.detach(), length)
            setattr(self, name, nn.Parameter(resized, requires_grad=bias.requires_grad))

    def _bias(self, block: Tensor, row: Tensor, column: Tensor, extra: Tensor | None, grid: Grid) -> AgentBias:
        """The bias for a map and the agents of run time. Both resizings are linear, so that their order is free and
        the sum of row and column biases may stay two tables."""
        parts = [block, resize_table(row, grid[0]), resize_table(column, grid[1]), extra]
        return AgentBias(*(p if p is None else resize_agents(p, self.agents, self.agent_grid) for p in parts))

    def key_bias(self, grid: Grid) -> AgentBias:
        """Bias of agents against keys."""
        extra = self.ac_bias[0, :, :, 0] if self.prefix else None  # [M, n]
        return self._bias(self.an_bias, self.ah_bias[..., 0], self.aw_bias[:, :, 0], extra, grid)

    def query_bias(self, grid: Grid) -> AgentBias:
        """Bias of queries against agents, agents first; they are last in the row and column parameters."""
        row, column = self.ha_bias[:, :, 0].transpose(1, 2), self.wa_bias[:, 0].transpose(1, 2)  # [M, n, H or W]
        extra = self.ca_bias[0, :, 0] if self.prefix else None
        return self._bias(self.na_bias, row, column, extra, grid)

    def pool(self, q: Tensor, grid: Grid) -> Tensor:
        """Agents of the queries, which leave the class token out: [B, N, C] -> [B, n, C]"""
        return pool_agents(q[:, self.prefix :], grid, self.agent_grid)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Queries [B, N, C] of a map, keys and values [B, Nk, C] -> [B, N, C]"""
        key_grid = self.key_grid_of(grid)
        return agent_attention(
            q, self.pool(q, grid), k, v, heads=self.num_heads, grid=grid, key_grid=key_grid,
            key_bias=self.key_bias(key_grid), query_bias=self.query_bias(grid),
        )  # fmt: skip

    def attention_maps(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Both attention maps by their definition, to look at: of agents over keys [B, M, n, Nk] and of queries over
        agents [B, M, N, n]. The op itself never forms them."""
        key_grid = self.key_grid_of(grid)
        scale = (q.shape[-1] // self.num_heads) ** -0.5
        queries, agents, keys = (split_heads(t, self.num_heads) for t in (q, self.pool(q, grid), k))
        key_bias = expand_bias(self.key_bias(key_grid), key_grid)
        query_bias = expand_bias(self.query_bias(grid), grid).transpose(1, 2)
        gather = ((scale * agents) @ keys.transpose(-2, -1) + key_bias).softmax(-1)
        return gather, ((scale * queries) @ agents.transpose(-2, -1) + query_bias).softmax(-1)


def resize_bias(name: str, bias: Tensor, length: int) -> Tensor:
    """Resize a row or column bias, in the layout of its parameter, to another number of rows or columns."""
    dim = LENGTH_DIM[name]
    return resize_table(bias.transpose(dim, -1), length).transpose(dim, -1).contiguous()


@register_notrace_module
class AgentAttention(AgentCore):
    """Agent attention: a few agents, pooled from the queries, gather from all keys and give to all queries.

    The cost is linear in the number of tokens. Any map runs: biases are made for `grid` and resized for others.

    Args:
        dim: Channels C.
        num_heads: Heads; each head scales by (dim / num_heads)**-0.5 in both softmaxes.
        agent_num: Agents: a square number, or (rows, columns).
        grid: Map (rows, columns) that the row and column biases are made for.
        class_token: Whether token 0 is a class token outside the map (Agent-DeiT).
        agent_grid: Agents at run time, (rows, columns), where they differ from `agent_num`, as in dense tasks.
        qkv_bias: Bias of the projection to queries, keys and values.

    Raises:
        ValueError: Numbers that do not fit.

    Source: arXiv:2312.08874.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        agent_num: int | Sequence[int] = 49,
        grid: Sequence[int] = (14, 14),
        *,
        class_token: bool = False,
        agent_grid: Sequence[int] | None = None,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, agent_num, grid, class_token=class_token, agent_grid=agent_grid, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv2d(dim, 3, **dd)

    def _add_convolution(self, out: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Add the convolution of the values' map; a class token gets none."""
        patches, values = (t[:, self.prefix :].unflatten(1, grid) for t in (out, v))  # [B, H, W, C]
        patches = self.dwc(values, residual=patches).flatten(1, 2)
        return torch.cat((out[:, : self.prefix], patches), 1) if self.prefix else patches

    def forward(self, x: Tensor, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: Map [B, H, W, C], or its tokens [B, N, C], the class token first if the layer has one.
            grid: (H, W) of tokens; the constructed one by default.
            mask: None; there are no masks.

        Returns:
            The shape of x.

        Raises:
            ValueError: Tokens that do not fill the grid.
            NotImplementedError: A mask.
        """
        refuse_mask(mask)
        tokens, grid = as_tokens(x, grid, self.grid, self.prefix)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        out = self._add_convolution(self.attend(q, k, v, grid), v, grid)
        return self.proj(out).reshape(x.shape)


@register_notrace_module
class SpatialReductionAgentAttention(AgentCore):
    """Agent attention of Agent-PVT: separate query and key projections, optionally keys of a smaller map.

    Args:
        dim: Channels C.
        num_heads: Heads.
        agent_num: Agents: a square number, or (rows, columns).
        grid: Map (rows, columns) of the queries.
        sr_ratio: Stride of the convolution that reduces the map of keys and values.
        agent_grid: Agents at run time, where they differ from `agent_num`.
        qkv_bias: Bias of the projections.

    Source: arXiv:2312.08874.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        agent_num: int | Sequence[int] = 49,
        grid: Sequence[int] = (14, 14),
        *,
        sr_ratio: int = 1,
        agent_grid: Sequence[int] | None = None,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        key_grid = tuple(max(side // sr_ratio, 1) for side in grid)
        super().__init__(dim, num_heads, agent_num, grid, key_grid=key_grid, agent_grid=agent_grid, **dd)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv2d(dim, 3, **dd)
        self.sr, self.norm = _reduction(dim, sr_ratio, dd)

    def key_grid_of(self, grid: Grid) -> Grid:
        return max(grid[0] // self.sr_ratio, 1), max(grid[1] // self.sr_ratio, 1)

    def forward(self, x: Tensor, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """Map [B, H, W, C] or tokens [B, N, C] -> the same shape; see `AgentAttention.forward`."""
        refuse_mask(mask)
        tokens, grid = as_tokens(x, grid, self.grid)
        q = self.q(tokens)
        k, v = self.kv(_reduced(tokens, grid, self.sr, self.norm)).chunk(2, dim=-1)
        out = self.attend(q, k, v, grid)
        values = v.unflatten(1, self.key_grid_of(grid))  # [B, H / r, W / r, C]
        if self.sr is not None:
            values = F.interpolate(values.permute(0, 3, 1, 2), size=grid, mode="bilinear").permute(0, 2, 3, 1)
        out = self.dwc(values, residual=out.unflatten(1, grid)).flatten(1, 2)
        return self.proj(out).reshape(x.shape)


def _reduction(dim: int, ratio: int, dd: dict) -> tuple[nn.Module | None, nn.Module | None]:
    if ratio == 1:
        return None, None
    return nn.Conv2d(dim, dim, ratio, ratio, **dd), LayerNorm(dim, eps=1e-5, **dd)


def _reduced(tokens: Tensor, grid: Grid, sr: nn.Module | None, norm: nn.Module | None) -> Tensor:
    """Tokens of the reduced map; the border that the stride does not reach is left out, a smaller map is filled up."""
    if sr is None:
        return tokens
    x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    bottom, right = (max(step - side, 0) for step, side in zip(sr.stride, grid, strict=True))
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    return norm(sr(x).flatten(2).transpose(1, 2))


@register_notrace_module
class AgentStripAttention(AgentCore):
    """Agent attention of Agent-CSWin, inside strips of a map, on projected queries, keys and values.

    The values' convolution is padded with zeros at the borders of strips.

    Args:
        dim: Channels C.
        num_heads: Heads.
        agent_num: Agents of a strip: a square number, or (rows, columns).
        grid: Map (rows, columns) that the biases are made for.
        strip: Rows and columns of a strip; the whole map, of any size, by default.
        agent_grid: Agents at run time, where they differ from `agent_num`.

    Source: arXiv:2312.08874.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int | Sequence[int] = 49,
        grid: Sequence[int] = (14, 14),
        *,
        strip: Sequence[int] | None = None,
        agent_grid: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, agent_num, strip or grid, agent_grid=agent_grid, **dd)
        self.strip = tuple(strip) if strip else None
        self.get_v = DepthwiseConv2d(dim, 3, **dd)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Three maps [B, H, W, C] -> [B, H, W, C]

        Raises:
            ValueError: The strips do not divide the map.
            NotImplementedError: A mask.
        """
        refuse_mask(mask)
        grid = tuple(q.shape[1:3])
        strip = self.strip or grid
        if grid[0] % strip[0] or grid[1] % strip[1]:
            raise ValueError(f"Strips of {strip} tokens do not divide the map of {grid}.")
        q, k, v = (to_strips(t, strip) for t in (q, k, v))  # [B * S, h, w, C]
        out = self.attend(*(t.flatten(1, 2) for t in (q, k, v)), strip)
        return from_strips(self.get_v(v, residual=out.unflatten(1, strip)), grid)


def to_strips(x: Tensor, strip: Grid) -> Tensor:
    """[B, H, W, C] -> [B * S, h, w, C], strips row by row; one strip is the map itself."""
    if tuple(x.shape[1:3]) == tuple(strip):
        return x
    (B, H, W, C), (h, w) = x.shape, strip
    return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h, w, C)


def from_strips(x: Tensor, grid: Grid) -> Tensor:
    """Inverse of `to_strips`: [B * S, h, w, C] -> [B, H, W, C]"""
    (h, w, C), (H, W) = x.shape[1:], grid
    if (h, w) == (H, W):
        return x
    return x.reshape(-1, H // h, W // w, h, w, C).transpose(2, 3).reshape(-1, H, W, C)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, M, N, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of tokens [B, N, C] -> [B, N, C]; bias [..., N, Nk] is added to the logits."""
    scale = (q.shape[-1] // heads) ** -0.5
    out = global_attention(*(split_heads(t, heads) for t in (q, k, v)), scale, bias)
    return out.transpose(1, 2).flatten(2)


@register_notrace_module
class SoftmaxAttention(nn.Module):
    """Softmax attention over all tokens, as in the later blocks of Agent-DeiT-B."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        return self.proj(softmax_heads(*self.qkv(x).chunk(3, dim=-1), self.num_heads))


@register_notrace_module
class SpatialReductionAttention(nn.Module):
    """Softmax attention of PVT, with keys and values of a map that a strided convolution reduces."""

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int = 1, qkv_bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.sr, self.norm = _reduction(dim, sr_ratio, dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        tokens, grid = x.flatten(1, 2), (x.shape[1], x.shape[2])
        k, v = self.kv(_reduced(tokens, grid, self.sr, self.norm)).chunk(2, dim=-1)
        return self.proj(softmax_heads(self.q(tokens), k, v, self.num_heads)).reshape(x.shape)


class Block(nn.Module):
    """Pre-norm block: attention and MLP, each with a residual.

    Args:
        dim: Channels C.
        attn: Attention, of maps [B, H, W, C] or of tokens and their grid.
        mlp_ratio: Hidden over outer width of the MLP.
        drop_path: Stochastic depth rate.
        eps: Of the norms.
        mlp_dwconv: 3x3 depth-wise convolution inside the MLP; takes maps.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        mlp_dwconv: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp_dwconv, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_linear(model: nn.Module) -> None:
    """Truncated normal (std 0.02) for linear weights, zero biases; the rest keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type != "meta":
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def agent_blocks(attn_type: str, depths: Sequence[int]) -> list[int]:
    """Number of leading agent blocks of each stage.

    Args:
        attn_type: A letter a stage, A for agent, B for softmax and M for a mixed stage, whose number of agent blocks
            stands at the end: "AAMB2".
        depths: Blocks of each stage.

    Raises:
        ValueError: Another spelling.
    """
    letters = attn_type.rstrip("0123456789")
    mixed = attn_type[len(letters) :]
    if len(letters) != len(depths) or set(letters) - set("ABM") or ("M" in letters) != bool(mixed):
        raise ValueError(
            f"attn_type needs a letter A, B or M for each of {len(depths)} stages, and a number after them if one is M "
            f'("AAMB2"), got {attn_type!r}.'
        )
    counts = {"A": None, "B": 0, "M": int(mixed or 0)}
    return [depth if counts[c] is None else min(counts[c], depth) for c, depth in zip(letters, depths, strict=True)]
