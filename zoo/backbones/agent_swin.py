"""Agent-Swin: the Swin transformer with agent attention over the whole map in its early stages (arXiv:2312.08874)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, resize_rel_pos_bias_table_simple, to_2tuple, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.agent_layers import (
    AgentAttention,
    Block,
    Grid,
    agent_blocks,
    check_heads,
    from_strips,
    softmax_heads,
    to_strips,
)
from zoo.backbones.agent_pyramid import NORM_EPS, AgentPyramid, build_stages, per_stage, stage_grids


@register_notrace_module
class PatchEmbed(nn.Module):
    """4 x 4 patches and LayerNorm, [B, C, H, W] -> [B, D, H / 4, W / 4]; an incomplete border is filled with zeros."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, 4, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, eps=NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = (-side % 4 for side in x.shape[2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register_notrace_module
class PatchMerging(nn.Module):
    """Squares of 2 x 2 tokens become one, [B, C, H, W] -> [B, C', H / 2, W / 2]; odd maps are padded with zeros."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * in_dim, eps=NORM_EPS, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        bottom, right = x.shape[1] % 2, x.shape[2] % 2
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        # Column by column: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)  # [B, H/2, W/2, 4C]
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


@register_notrace_module
class WindowAttention(nn.Module):
    """Softmax attention in windows with a relative position bias, the windows optionally shifted by half.

    A map that windows do not divide is padded at the bottom and right before the projection, so that padding carries
    the bias and takes part, as in the official code for dense tasks.

    Args:
        dim: Channels C.
        num_heads: Heads.
        grid: Constructed map; where it is no larger than the window, the window is the map and is not shifted.
        window: Side of a window.
        shifted: Whether windows are shifted.
        qkv_bias: Bias of the projection to queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Sequence[int],
        window: int = 7,
        shifted: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        check_heads(dim, num_heads)
        self.num_heads, self.grid, self.shifted = num_heads, tuple(grid), shifted
        self.window = min(window, *grid)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, num_heads, **dd))
        if self.relative_position_bias_table.device.type != "meta":
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def set_grid(self, grid: Sequence[int], window: int) -> None:
        """Resize the bias table bicubically for another window, for fine-tuning."""
        self.grid, self.window = tuple(grid), min(window, *grid)
        table = self.relative_position_bias_table
        shape = ((2 * self.window - 1) ** 2, self.num_heads)
        resized = resize_rel_pos_bias_table_simple(table.detach(), (self.window, self.window), shape)
        self.relative_position_bias_table = nn.Parameter(resized.contiguous(), requires_grad=table.requires_grad)

    def _bias(self) -> Tensor:
        """Relative position bias [M, w * w, w * w]: entry (i, j) of the table at the offset from j to i."""
        w = self.window
        # Reversed, the table seen from the last token runs forward over keys; each earlier token sees it one later.
        table = self.relative_position_bias_table.view(2 * w - 1, 2 * w - 1, -1).flip(0, 1)
        views = table.unfold(0, w, 1).unfold(1, w, 1).flip(0, 1)  # [w, w, M, w, w], query then key
        return views.permute(2, 0, 1, 3, 4).reshape(self.num_heads, w * w, w * w)

    def _shift_mask(self, padded: Grid, shift: int, like: Tensor) -> Tensor:
        """-100 between tokens of a window that the roll brought together, [windows, w * w, w * w]."""
        rows, cols = (
            (torch.arange(side, device=like.device) >= side - self.window).long()
            + (torch.arange(side, device=like.device) >= side - shift).long()
            for side in padded
        )
        region = (3 * rows[:, None] + cols)[None, :, :, None]  # [1, H, W, 1]
        region = to_strips(region, (self.window, self.window)).flatten(1)  # [windows, w * w]
        apart = region[:, :, None] != region[:, None, :]
        return apart.to(like.dtype) * -100.0

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        B, H, W, C = x.shape
        w = self.window
        covered = self.grid == (H, W) and min(H, W) <= w
        shift = w // 2 if self.shifted and not covered else 0
        bottom, right = -H % w, -W % w
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        padded = (H + bottom, W + right)
        bias = self._bias()
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            bias = bias + self._shift_mask(padded, shift, bias)[:, None]  # [windows, M, w * w, w * w]
            bias = bias.repeat(B, 1, 1, 1)
        windows = to_strips(x, (w, w)).flatten(1, 2)  # [B * windows, w * w, C]
        out = self.proj(softmax_heads(*self.qkv(windows).chunk(3, dim=-1), self.num_heads, bias))
        out = from_strips(out.unflatten(1, (w, w)), padded)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return out[:, :H, :W]


def softmax_window(img_size: int | Sequence[int]) -> int:
    """Side of the windows of softmax blocks for an input size: 7, or an eighth of the first map if that is more."""
    return max(7, max(to_2tuple(img_size)) // 4 // 8)


class AgentSwin(AgentPyramid):
    """Agent-Swin image classifier and feature extractor; any input size runs.

    Agent blocks attend over the whole map; softmax blocks in (shifted) windows.

    Args:
        img_size: Input size that biases are made for; others resize them.
        in_chans: Channels of the input image.
        num_classes: Classes; 0 for features.
        global_pool: Pooling before the classifier, "avg" or "".
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; they double with each.
        num_heads: Heads per stage.
        mlp_ratio: Hidden over outer width of the MLP.
        agent_nums: Agents per stage, square numbers.
        attn_type: A letter a stage: A agent attention, B softmax attention, M mixed; see `agent_blocks`.
        window_size: Window of agent blocks; the first map by default. It must cover every map with agent blocks.
        agent_grids: Agents per stage at run time, (rows, columns), for dense tasks; None for those of `agent_nums`.
        qkv_bias: Bias of the projections.
        extra_norms: One LayerNorm per stage on the features, for dense tasks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        NotImplementedError: A window smaller than a map with agent blocks. Every second block would shift it, and agent
            attention cannot mask the tokens that a shift brings together.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        agent_nums: int | Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AAAB",
        window_size: int | None = None,
        agent_grids: Sequence[Sequence[int]] | None = None,
        qkv_bias: bool = True,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        count = len(depths)
        dims = [embed_dim * 2**i for i in range(count)]
        heads, agents = per_stage(num_heads, count, "num_heads"), per_stage(agent_nums, count, "agent_nums")
        run_grids = per_stage(agent_grids, count, "agent_grids")
        grids = stage_grids(img_size, count, self.divide)
        agent_depths = agent_blocks(attn_type, depths)
        for grid, number in zip(grids, agent_depths, strict=True):
            if window_size is not None and number and window_size < max(grid):
                raise NotImplementedError(
                    f"Agent blocks attend over the whole map, here {grid[0]} x {grid[1]} tokens, and window_size must "
                    f"cover it, got {window_size}: shifted windows need a mask, which agent attention cannot apply."
                )
        window = softmax_window(img_size) if window_size is None else max(7, window_size // 8)

        def attention(i: int, j: int) -> nn.Module:
            if j >= agent_depths[i]:
                return WindowAttention(dims[i], heads[i], grids[i], window, j % 2 == 1, qkv_bias, **dd)
            options = dict(agent_grid=run_grids[i], qkv_bias=qkv_bias)
            return AgentAttention(dims[i], heads[i], agents[i], grids[i], **options, **dd)

        super().__init__(
            PatchEmbed(in_chans, dims[0], **dd),
            build_stages(
                depths,
                drop_path_rate,
                lambda i: PatchMerging(dims[i - 1], dims[i], **dd),
                lambda i, j, rate: Block(dims[i], attention(i, j), mlp_ratio, rate, NORM_EPS, **dd),
            ),
            dims,
            grids,
            extra_norms=extra_norms,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self._window = window

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make another input size the constructed one: biases are resized, as for fine-tuning.

        Args:
            img_size: Side, or (height, width); the windows of softmax blocks grow with it.
        """
        self._window = softmax_window(img_size)
        super().set_input_size(img_size)

    def _set_grid(self, part: nn.Module, grid: Grid) -> None:
        for module in part.modules():
            if isinstance(module, WindowAttention):
                module.set_grid(grid, self._window)
            elif isinstance(module, AgentAttention):
                module.set_grid(grid)
