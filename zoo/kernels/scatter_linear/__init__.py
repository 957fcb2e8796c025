"""Scattered linear attention: linear attention within windows of any number of rows."""

from zoo.kernels.scatter_linear.op import scatter_linear_attention

__all__ = ["scatter_linear_attention"]
