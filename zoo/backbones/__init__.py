"""Model families; importing one registers its models with timm."""

from zoo.backbones import agent, biformer, favit, halo  # noqa: F401
