"""Official checkpoints to zoo state dicts: one pure function a family.

A family's module offers ``convert(state_dict, ...)`` and ``ORIGIN``, where its official weights are published.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

FAMILIES = ("agent", "biformer", "favit", "flatformer", "scatterformer")


def converter(family: str) -> ModuleType:
    """The converter module of a family.

    Raises:
        ValueError: Unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"No converter for family {family!r}; there are: {', '.join(FAMILIES)}.")
    return import_module(f"zoo.convert.{family}")
