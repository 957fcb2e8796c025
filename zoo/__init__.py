"""Efficient attention for vision and multimodal models.

Importing this package registers every image model with timm, so that ``timm.create_model`` finds it.
"""

__version__ = "0.1.0"

from zoo import backbones  # noqa: F401  registers the models
from zoo.accelerate import accelerate, accelerated, restore
from zoo.factory import create_model, list_models, model_info

__all__ = ["__version__", "accelerate", "accelerated", "create_model", "list_models", "model_info", "restore"]
