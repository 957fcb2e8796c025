"""Factorized self-attention: pooled keys from cross-window fusion, and attention to three small key sets at once."""

from zoo.kernels.factorized.op import cross_window_pool, factorized_attention

__all__ = ["cross_window_pool", "factorized_attention"]
