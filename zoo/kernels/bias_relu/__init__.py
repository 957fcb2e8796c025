"""Bias, sum and ReLU of a map in one pass."""

from zoo.kernels.bias_relu.op import bias_relu_

__all__ = ["bias_relu_"]
