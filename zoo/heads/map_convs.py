"""Convolutions on bird's-eye-view maps for inference: bias, sum and ReLU in one pass over the result.

Maps of a LiDAR detector are large (468 x 468 cells of 64 to 384 channels, in half precision), and each pass over one
takes a good part of the time of the convolution that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.bev import ResidualUnit
from zoo.backbones.cascade_ded import DED, BasicBlock
from zoo.kernels.bias_relu import bias_relu_


def finish(out: Tensor, bias: Tensor, added: Tensor | None = None, after: bool = False) -> Tensor:
    """relu(out + bias + added) of a map [B, C, H, W], in place; with `after`, relu(out + bias) + added."""
    rows = None if added is None else added.permute(0, 2, 3, 1)
    bias_relu_(out.permute(0, 2, 3, 1), bias, rows, after=after)
    return out


class ConvReLU(nn.Module):
    """A convolution with bias, then ReLU. Weights are shared with the given one.

    Args:
        conv: A convolution, transposed or not.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        weight, transposed = conv.weight.detach(), isinstance(conv, nn.ConvTranspose2d)
        self.settings = conv.stride, conv.padding
        # A transposed convolution of single cells is a convolution with its weights transposed.
        self.transposed = transposed and (*conv.kernel_size, *conv.stride) != (1, 1, 1, 1)
        if transposed and not self.transposed:
            weight = weight.transpose(0, 1).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor, added: Tensor | None = None, after: bool = False) -> Tensor:
        """[B, C, H, W], and what is added before the ReLU or after it -> [B, D, H', W']"""
        convolve: Callable[..., Tensor] = F.conv_transpose2d if self.transposed else F.conv2d
        return finish(convolve(x, self.weight, None, *self.settings), self.bias, added, after)


class FusedUnit(nn.Module):
    """A `ResidualUnit` whose norm is folded."""

    def __init__(self, unit: ResidualUnit) -> None:
        super().__init__()
        self.conv, self.residual = ConvReLU(unit[0]), unit.residual

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]"""
        return self.conv(x, x if self.residual else None, after=True)


class FusedBlock(nn.Module):
    """A `BasicBlock` whose norms are folded."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shortcut = ConvReLU(block.conv1), ConvReLU(block.conv2), block.downsample_layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]"""
        return self.conv2(self.conv1(x), x if self.shortcut is None else self.shortcut(x))


class FusedDED(nn.Module):
    """A `DED` whose norms behind convolutions are folded."""

    def __init__(self, ded: DED) -> None:
        super().__init__()
        self.encoder, self.decoder_norm = ded.encoder, ded.decoder_norm
        self.decoder = nn.ModuleList(ConvReLU(conv) for conv, _ in ded.decoder)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H, W]"""
        levels = []
        for level in self.encoder:
            x = level(x)
            levels.append(x)
        for conv, norm, skip in zip(self.decoder, self.decoder_norm, reversed(levels[:-1]), strict=True):
            x = norm(conv(x, skip, after=True))
        return x


FUSED = {ResidualUnit: FusedUnit, BasicBlock: FusedBlock, DED: FusedDED}


def _is_plain(conv: nn.Module) -> bool:
    """Whether a module is a convolution that `ConvReLU` knows."""
    if not isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) or conv.bias is None:
        return False
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and getattr(conv, "output_padding", (0, 0)) == (0, 0)


def _fuse_children(parent: nn.Module, names: list[str]) -> None:
    """Join convolutions and ReLUs with nothing but folded norms between them."""
    for i, name in enumerate(names):
        after = [n for n in names[i + 1 :] if not isinstance(getattr(parent, n), nn.Identity)]
        if after and _is_plain(getattr(parent, name)) and isinstance(getattr(parent, after[0]), nn.ReLU):
            setattr(parent, name, ConvReLU(getattr(parent, name)))
            setattr(parent, after[0], nn.Identity())


def fuse_convs(model: nn.Module) -> nn.Module:
    """Join convolutions with what follows them, in place; their norms must be folded.

    Found are neighbours in a `Sequential`, `conv`, `bn` and `activate` of any other module, and the blocks of the
    backbones on maps.
    """
    # Children first: a block holds others.
    for parent in reversed(list(model.modules())):
        names = list(dict(parent.named_children()))
        for name in names:
            child = getattr(parent, name)
            if type(child) in FUSED and all(map(_is_plain, _convs(child))):
                setattr(parent, name, FUSED[type(child)](child))
        if type(parent) is nn.Sequential:
            _fuse_children(parent, names)
        elif {"conv", "bn", "activate"} <= set(names):
            _fuse_children(parent, ["conv", "bn", "activate"])
    return model


def _convs(block: nn.Module) -> list[nn.Module]:
    """The convolutions of a block that become `ConvReLU`s."""
    if isinstance(block, BasicBlock):
        return [block.conv1, block.conv2]
    return [block[0]] if isinstance(block, ResidualUnit) else [conv for conv, _ in block.decoder]


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """relu(conv(x) + bias), [B, C, H, W] -> [B, D, H', W'], without gradients."""
    if torch.compiler.is_compiling():
        # Joined by the compiler.
        return F.relu(F.conv2d(x, weight, bias, padding=padding))
    return finish(F.conv2d(x, weight, padding=padding), bias)
