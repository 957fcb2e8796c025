"""`zoo convert`: official checkpoint -> model folder."""

import argparse
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", help="model family, for instance biformer")
    parser.add_argument("checkpoint", help="official weights file (.pth, .safetensors)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--model", help="architecture (default: the one of the family that fits)")
    parser.add_argument("--half", action="store_true", help="store fp16 weights")


def run(args: argparse.Namespace) -> int:
    import zoo
    from zoo import hub
    from zoo.convert import converter

    converter(args.family)
    candidates = _archs(args.family)
    if args.model:
        zoo.model_info(args.model)
        if args.model not in candidates:
            raise ValueError(f"'{args.model}' is no model of the family '{args.family}': {', '.join(candidates)}.")
        candidates = [args.model]
    checkpoint = read_checkpoint(args.checkpoint)
    arch, state_dict = _match(args, checkpoint, candidates)
    sizes = {} if _detector(arch) else {"num_classes": _num_classes(arch, state_dict)}
    model = zoo.create_model(arch, **sizes)
    model.load_state_dict(state_dict)
    card = {
        "name": arch,
        "description": f"Official weights of `{arch}`, converted from `{Path(args.checkpoint).name}` "
        f"(SHA-256 {hub.sha256(args.checkpoint)}).",
    }
    folder = hub.save_model(model, args.out, card=card, half=args.half)
    print(f"wrote {folder} ({arch}); load it as 'local-dir:{folder}'")
    return 0


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read the tensors of an official checkpoint; no code of it is ever run.

    Raises:
        ValueError: The file is missing, damaged, or holds more than plain data.
    """
    import pickle
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"'{path}' does not exist or is not a file.")
    try:
        if path.endswith(".safetensors"):
            checkpoint = load_file(path)
        else:
            # Training scripts store their arguments beside the weights, as a Namespace, which is plain data, or as a
            # yacs config, a dictionary with attributes: an OrderedDict holds both without running code of yacs.
            plain = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
            with torch.serialization.safe_globals(plain), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) and _is_pickle(path):
            raise ValueError(
                f"'{path}' holds Python objects besides tensors and plain data; loading them could run code. Refused."
            ) from error
        raise ValueError(f"'{path}' is damaged or is not a checkpoint.") from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"'{path}' is damaged or is not a checkpoint.") from error
    # Where training kept an average under this name, it is the published one.
    for key in ("state_dict_ema", "model", "state_dict", "model_state"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    tensors = isinstance(checkpoint, dict) and {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"'{path}' holds no weights.")
    return tensors


def _is_pickle(path: str) -> bool:
    """Tell a checkpoint, a zip archive or a bare pickle, from a web page or other text that was saved instead."""
    with Path(path).open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _archs(family: str) -> list[str]:
    from timm.models import model_entrypoint

    import zoo
    from zoo import registry

    images = zoo.list_models(task="image-classification")
    names = [name for name in images if model_entrypoint(name).__module__.rpartition(".")[2] == family]
    return names + [name for name, entry in registry.entries().items() if entry.family == family]


def _detector(arch: str) -> bool:
    """Whether a model is a detector in point clouds, whose converter is all there is to do."""
    from zoo import registry

    return registry.find(arch) is not None


def _match(args: argparse.Namespace, checkpoint: dict[str, Any], candidates: list[str]) -> tuple[str, dict[str, Any]]:
    """Convert for each candidate and return the one whose names and shapes are exactly the model's.

    Families may resize weights to a model's input size; of several that fit, the one with the fewest changes is meant.
    """
    # A view (another shape of the same numbers) is no change.
    given = {tensor.untyped_storage().data_ptr() for tensor in checkpoint.values()}
    closest: tuple[int, str] | None = None
    fits: list[tuple[int, str, dict[str, Any]]] = []
    reasons = []
    for arch in candidates:
        try:
            converted = _convert(arch, checkpoint)
        except ValueError as error:
            reasons.append(str(error))
            continue
        problems = _differences(arch, converted)
        if not problems:
            changed = sum(tensor.untyped_storage().data_ptr() not in given for tensor in converted.values())
            fits.append((changed, arch, converted))
        elif closest is None or len(problems) < closest[0]:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            closest = (len(problems), f"Closest is {arch}: {problems[0]}{more}.")
    if fits:
        changed, arch, converted = min(fits, key=lambda fit: fit[0])
        if changed:
            print(f"note: {changed} weights that depend on the input size were resized to that of {arch}")
        return arch, converted
    what = f"'{args.model}'" if args.model else f"any model of the family '{args.family}'"
    raise ValueError(f"'{args.checkpoint}' does not fit {what}. {closest[1] if closest else reasons[0]}")


def _convert(arch: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Apply the family's own filter, the one that `create_model` uses on a weights file."""
    import torch
    from timm.models import model_entrypoint

    if _detector(arch):
        from zoo import registry
        from zoo.convert import converter

        return converter(registry.find(arch).family).convert(dict(checkpoint))
    module = sys.modules[model_entrypoint(arch).__module__]
    with torch.device("meta"):
        model = model_entrypoint(arch)()
    return module.checkpoint_filter_fn(dict(checkpoint), model)


def _differences(arch: str, state_dict: dict[str, Any]) -> list[str]:
    import timm
    import torch

    from zoo import registry

    with torch.device("meta"):
        if _detector(arch):
            wanted = registry.find(arch).build().state_dict()
        else:
            wanted = timm.create_model(arch, num_classes=_num_classes(arch, state_dict)).state_dict()
    shapes = [
        f"'{key}' has shape {tuple(state_dict[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state_dict and state_dict[key].shape != wanted[key].shape
    ]
    lacking = [f"'{key}' is missing" for key in wanted if key not in state_dict]
    extra = [f"'{key}' is unknown" for key in state_dict if key not in wanted]
    return shapes + lacking + extra


def _num_classes(arch: str, state_dict: dict[str, Any]) -> int:
    """Read the number of classes off the checkpoint's head, the only size that is not fixed by the architecture."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(arch)
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else None
    weight = state_dict.get(f"{classifier}.weight")
    return weight.shape[0] if weight is not None and weight.ndim else cfg.num_classes
