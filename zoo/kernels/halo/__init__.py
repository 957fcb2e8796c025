"""Halo attention: blocks of queries attend to their block of the map and a ring of pixels around it."""

from zoo.kernels.halo.op import halo_attention

__all__ = ["halo_attention"]
