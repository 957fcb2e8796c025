"""Model families, one file each; importing a family registers its models with timm."""

from zoo.backbones import biformer, favit  # noqa: F401
