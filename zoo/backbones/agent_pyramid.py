"""What the pyramids Agent-PVT, Agent-Swin and Agent-CSWin share: stages, features, classifier, input sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm, LayerNorm2d, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint_seq
from torch import Tensor, nn

from zoo.backbones.agent_layers import Block, Grid, init_linear
from zoo.backbones.pyramid import Pyramid

NORM_EPS = 1e-5


class Stage(nn.Module):
    """Downsampling and blocks; maps are [B, C, H, W] outside, channels-last inside."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution and LayerNorm, [B, C, H, W] -> [B, C', H', W'] in channels-last memory."""

    def __init__(
        self, in_dim: int, dim: int, kernel_size: int, stride: int, padding: int = 0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, eps=NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def per_stage(value: Any, stages: int, name: str) -> tuple:
    """One value for each stage."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} needs one value or one for each of {stages} stages, got {value}.")
    return values


def stage_grids(img_size: int | Sequence[int], stages: int, divide: Callable[[int, int], int]) -> list[Grid]:
    """Maps of the stages for an input size; `divide(side, factor)` rounds as the family's convolutions do."""
    grid = tuple(divide(side, 4) for side in to_2tuple(img_size))
    grids = [grid]
    for _ in range(stages - 1):
        grids.append(tuple(divide(side, 2) for side in grids[-1]))
    if min(grids[-1]) < 1:
        raise ValueError(f"img_size must leave a token in the last of {stages} stages, got {img_size}.")
    return grids


def floor_divide(side: int, factor: int) -> int:
    return side // factor


def ceil_divide(side: int, factor: int) -> int:
    return -(-side // factor)


def build_stages(
    depths: Sequence[int],
    drop_path_rate: float,
    downsample: Callable[[int], nn.Module],
    block: Callable[[int, int, float], Block],
) -> list[Stage]:
    """Stages of `block(stage, number, drop path rate)`; the first has no downsampling."""
    rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
    stages = []
    for i, depth in enumerate(depths):
        down = downsample(i) if i else nn.Identity()
        stages.append(Stage(down, [block(i, j, rates[i][j]) for j in range(depth)]))
    return stages


class AgentPyramid(Pyramid):
    """A pyramid of stages with timm's methods; subclasses build the stages.

    Args:
        patch_embed: From images to the map of the first stage, [B, C, H, W].
        stages: The stages.
        dims: Channels of each stage.
        grids: Maps of the stages for the constructed input size.
        final_norm: LayerNorm before the pooling.
        extra_norms: One LayerNorm a stage on the features (not on the map that goes on), for dense tasks.
        in_chans, num_classes, global_pool, drop_rate: See the subclasses.
    """

    # How the family's convolutions round the sides of a map.
    divide = staticmethod(ceil_divide)

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        grids: Sequence[Grid],
        *,
        final_norm: bool = True,
        extra_norms: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_classes, self.in_chans, self.grids = num_classes, in_chans, list(grids)
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)]
        self.patch_embed = patch_embed
        self.stages = nn.Sequential(*stages)
        self.extra_norms = None
        if extra_norms:
            self.extra_norms = nn.ModuleList(LayerNorm(dim, eps=NORM_EPS, **dd) for dim in dims)
        self.norm = LayerNorm2d(dims[-1], eps=NORM_EPS, **dd) if final_norm else nn.Identity()
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        init_linear(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            blocks = [(r"^stages\.(\d+)", None)]
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^patch_embed", blocks=[*blocks, (r"^(?:norm|extra_norms|head)", (99999,))])

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make another input size the constructed one: position tables are resized, as for fine-tuning.

        Args:
            img_size: Side, or (height, width).
        """
        self.grids = stage_grids(img_size, len(self.grids), self.divide)
        for part, grid in zip([self.patch_embed, *self.stages[1:]], self.grids, strict=False):
            self._set_grid(part, grid)
        self._set_grid(self.stages[0], self.grids[0])
        record_input_size(self, img_size)

    def _set_grid(self, part: nn.Module, grid: Grid) -> None:
        for module in part.modules():
            if hasattr(module, "set_grid"):
                module.set_grid(grid)


def record_input_size(model: nn.Module, img_size: int | Sequence[int]) -> None:
    """Let an exported config rebuild the model at its new size, where timm keeps a record of arguments."""
    size = to_2tuple(img_size)
    model._model_args = dict(getattr(model, "_model_args", {}), img_size=size)
    model._traits = dict(getattr(model, "_traits", {}), img_size=size)
