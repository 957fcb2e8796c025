"""Convolutions on bird's-eye-view maps for inference: bias, sum and ReLU within the convolution.

Maps of a LiDAR detector are large (468 x 468 cells of 64 to 384 channels), and each pass over them costs about as much
as the convolution saves by being in half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.cascade_ded import BasicBlock


def can_fuse(x: Tensor) -> bool:
    """Whether cuDNN adds and rectifies in the same pass."""
    fits = x.is_cuda and x.dtype == torch.float16
    return fits and torch.backends.cudnn.is_available() and not torch.compiler.is_compiling()


def conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups: int = 1,
    *, added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """relu(conv(x) + bias + added), without gradients.

    Args:
        x: [B, C, H, W].
        weight, bias: [D, C / groups, KH, KW] and [D].
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`.
        added: [B, D, H', W'], of the result's shape.

    Returns:
        [B, D, H', W'].
    """
    settings = stride, padding, dilation, groups
    if not can_fuse(x):
        out = F.conv2d(x, weight, bias, *settings)
        return F.relu_(out if added is None else out.add_(added))
    if added is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *settings)
    return torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *settings)


class ConvReLU(nn.Module):
    """A convolution with bias, then ReLU; parameters are shared with the given one.

    Args:
        conv: A convolution, or a transposed one of a single cell, which is a convolution with its weights transposed.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        weight = weight.transpose(0, 1) if isinstance(conv, nn.ConvTranspose2d) else weight
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.settings = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """[B, C, H, W], and what is added before the ReLU -> [B, D, H', W']"""
        return conv_relu(x, self.weight, self.bias, *self.settings, added=added)


class FusedBlock(nn.Module):
    """A `BasicBlock` whose norms are folded."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shortcut = ConvReLU(block.conv1), ConvReLU(block.conv2), block.downsample_layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]"""
        return self.conv2(self.conv1(x), x if self.shortcut is None else self.shortcut(x))


def _is_plain(conv: nn.Module) -> bool:
    if isinstance(conv, nn.ConvTranspose2d):
        return conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.bias is not None
    return isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros" and conv.bias is not None


def _fuse_children(parent: nn.Module, names: list[str]) -> None:
    """Fuse convolutions, folded norms and ReLUs that follow each other among children."""
    for i, name in enumerate(names):
        after = [n for n in names[i + 1 :] if not isinstance(getattr(parent, n), nn.Identity)]
        if after and _is_plain(getattr(parent, name)) and isinstance(getattr(parent, after[0]), nn.ReLU):
            setattr(parent, name, ConvReLU(getattr(parent, name)))
            setattr(parent, after[0], nn.Identity())


def fuse_convs(model: nn.Module) -> nn.Module:
    """Join convolutions with the ReLU behind them, in place; norms must be folded.

    Found are neighbours in a `Sequential`, `conv`, `bn` and `activate` of any other module, and `BasicBlock`s.
    """
    for parent in list(model.modules()):
        names = list(dict(parent.named_children()))
        if isinstance(parent, nn.Sequential):
            _fuse_children(parent, names)
        elif {"conv", "bn", "activate"} <= set(names):
            _fuse_children(parent, ["conv", "bn", "activate"])
        for name in names:
            if isinstance(child := getattr(parent, name), BasicBlock) and _is_plain(child.conv1):
                setattr(parent, name, FusedBlock(child))
    return model
