"""Run timm's models on this package's ops, in place.

    model = zoo.accelerate(timm.create_model("halonet50ts", pretrained=True))
    zoo.accelerated(model)  # ['stages.1.3.self_attn', ...]
    zoo.restore(model)  # timm's modules again

A layer changes its class and nothing else: it stays the same object, with the same parameters, hooks, device, dtype and
mode. Optimizers, state dicts, copies and wrappers do not notice; every layer computes what it did, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers.halo_attn import HaloAttn
from torch import nn

from zoo.backbones.halo import HaloAttention

__all__ = ["accelerate", "accelerated", "can_accelerate", "restore"]

# timm's layer -> a subclass with the same parameters and numbers. Subclasses of timm's layers by others are left alone:
# what they compute is not known.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {HaloAttn: HaloAttention}
_ORIGINAL = "_accelerated_from"


def accelerate(model: nn.Module) -> nn.Module:
    """Let the layers of a timm model that have an equal and faster twin here run on it, in place.

    Replaced are timm's `HaloAttn` (the models `*halo*`). Results and gradients are equal to rounding, parameters remain
    the same objects under the same names, and maps of any size work where timm takes multiples of the block only.
    Do it before `torch.compile` and before tracing (`feature_cls="fx"`), which copy a layer's code. A pickled model
    needs this package to be loaded; its state dict does not. Calling it again changes nothing.

    Args:
        model: A model, or one of the layers.

    Returns:
        The same model. `accelerated` lists what runs on the ops of this package, `restore` undoes it.

    Raises:
        ValueError: No layer of the model has a twin here.
    """
    for module in _replaceable(model):
        module.__dict__[_ORIGINAL] = type(module)
        module.__class__ = REPLACEMENTS[type(module)]
    if not accelerated(model):
        names = ", ".join(f"timm's {cls.__name__}" for cls in REPLACEMENTS)
        raise ValueError(
            f"nothing to accelerate in {type(model).__name__}: zoo.accelerate replaces {names}, and there is none. "
            "A traced or scripted model has lost its layers: accelerate it before that."
        )
    return model


def accelerated(model: nn.Module) -> list[str]:
    """Names of the layers that `accelerate` has replaced; "" stands for the model itself."""
    return [name for name, module in model.named_modules() if _ORIGINAL in module.__dict__]


def can_accelerate(model: nn.Module) -> bool:
    """Whether `accelerate` would replace a layer of the model."""
    return next(_replaceable(model), None) is not None


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place and return the model; layers that were never replaced stay as they are."""
    for module in model.modules():
        if _ORIGINAL in module.__dict__:
            module.__class__ = module.__dict__.pop(_ORIGINAL)
    return model


def _replaceable(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module) in REPLACEMENTS)
