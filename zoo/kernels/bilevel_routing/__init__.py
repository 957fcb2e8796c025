"""Bi-level routing attention: route regions, then attend to the tokens of the routed regions."""

from zoo.kernels.bilevel_routing.op import bilevel_attention, bilevel_routing, route_regions
from zoo.kernels.bilevel_routing.reference import Routing

__all__ = ["Routing", "bilevel_attention", "bilevel_routing", "route_regions"]
