"""Depth-wise convolution of channels-last maps with a fused residual."""

from zoo.kernels.depthwise_conv.op import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
