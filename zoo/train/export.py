"""From a Lightning checkpoint to a plain timm model or detector."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from zoo import registry
from zoo.factory import create_model

_PREFIX = "net."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of a training run without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint, or contains more than tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not loaded: it is damaged, or holds objects other than tensors and plain types, which could "
            f"run code when loaded ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {_first_line(error)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of zoo fit: it has no 'state_dict'")
    return checkpoint


def _choose_weights(checkpoint: dict[str, Any], weights: str, path: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    # With EMAWeightAveraging the average is in state_dict and the trained weights in current_model_state.
    averaged = "current_model_state" in checkpoint
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights must be 'auto', 'ema' or 'raw', got {weights!r}")
    if weights == "ema" and not averaged:
        raise ValueError(f"{path} has no averaged weights (trained without EMAWeightAveraging): use weights='raw'")
    if weights == "raw" and averaged:
        return checkpoint["current_model_state"], "raw"
    return checkpoint["state_dict"], "ema" if averaged else "raw"


def load_lightning_checkpoint(
    path: str | Path, weights: Literal["auto", "ema", "raw"] = "auto"
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint that ``ImageClassifier`` or ``PointCloudDetector`` has written.

    Args:
        path: The ``.ckpt`` file.
        weights: ``ema`` for the averaged weights, ``raw`` for the trained ones, ``auto`` for the averaged ones where
            the run averaged.

    Returns:
        The model in evaluation mode, a timm model's ``pretrained_cfg`` describing its input, and a dict with
        ``model``, ``num_classes``, ``weights`` (ema or raw), ``data_config``, ``metrics``, ``epoch``, ``global_step``
        and ``hyper_parameters``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be loaded safely, or its weights do not fit the model that it names.
    """
    checkpoint = read_checkpoint(path)
    hparams = checkpoint.get("hyper_parameters") or {}
    if "model" not in hparams or "num_classes" not in hparams:
        raise ValueError(f"{path} does not name its model: it was not written by a module of zoo.train")
    state, chosen = _choose_weights(checkpoint, weights, path)
    is_detector = registry.find(hparams["model"]) is not None
    # A detector's classes are among its own arguments.
    classes = {} if is_detector else {"num_classes": hparams["num_classes"]}
    build = create_model if is_detector else timm.create_model
    model = build(hparams["model"], pretrained=False, **classes, **(hparams.get("model_kwargs") or {}))
    own = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    try:
        model.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights of {path} do not fit {hparams['model']}: {error}") from error
    extra = checkpoint.get("zoo") or {}
    if not is_detector:
        _describe_input(model, hparams["num_classes"], extra.get("data_config"))
    return model.eval(), {
        "model": hparams["model"],
        "num_classes": hparams["num_classes"],
        "weights": chosen,
        "data_config": extra.get("data_config"),
        "metrics": extra.get("metrics") or {},
        "epoch": checkpoint.get("epoch"),
        "global_step": checkpoint.get("global_step"),
        "hyper_parameters": dict(hparams),
    }


def _describe_input(model: nn.Module, num_classes: int, data_config: dict[str, Any] | None) -> None:
    """Write the input that the model was trained for into its ``pretrained_cfg``."""
    cfg = dict(model.pretrained_cfg, num_classes=num_classes)
    cfg.update({key: tuple(v) if isinstance(v, list) else v for key, v in (data_config or {}).items()})
    # Facts about the weights of timm's tag do not hold for these.
    for key in ("test_input_size", "test_crop_pct", "label_descriptions", "hf_hub_id", "url", "tag"):
        cfg.pop(key, None)
    if cfg.get("label_names") is not None:
        cfg["label_names"] = list(cfg["label_names"])
    model.pretrained_cfg = model.default_cfg = cfg
