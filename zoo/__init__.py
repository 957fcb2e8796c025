"""Efficient attention for vision and multimodal models.

Importing this package registers every image model with timm, so that ``timm.create_model`` finds it. Plug-ins for the
pipelines of diffusers and the models of transformers are imported when they are first used.
"""

__version__ = "0.1.0"

from importlib import import_module

from zoo import backbones  # noqa: F401  registers the models
from zoo.accelerate import accelerate, accelerated, restore
from zoo.factory import create_model, list_models, model_info

__all__ = ["__version__", "accelerate", "accelerated", "create_model", "list_models", "model_info", "restore"]

_PLUGINS = {
    "agent_sd": "zoo.heads.agent_sd",
    "hired": "zoo.heads.token_dropping",
    "sparse_vdit": "zoo.heads.sparse_vdit",
}


def __getattr__(name: str):
    if name in _PLUGINS:
        return import_module(_PLUGINS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLUGINS])
