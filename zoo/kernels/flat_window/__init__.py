"""Flattened window attention: sort pillars by window, cut into groups of equal size, attend within a group."""

from zoo.kernels.flat_window.op import flat_window_attention, flatten_windows
from zoo.kernels.flat_window.reference import ORDERS, Flattening

__all__ = ["ORDERS", "Flattening", "flat_window_attention", "flatten_windows"]
