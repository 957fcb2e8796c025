"""Weights: embedded in the package, in a folder, or on a hub.

All three have one layout, timm's: `config.json`, `model.safetensors` and a `README.md` card. `timm.create_model` loads
such a folder as `local-dir:FOLDER` and such a repository as `hf-hub:org/name`. Which hub is used, its cache, its token
and offline mode are the user's choice through the hub client's own environment variables; nothing here sets them.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import nn

from zoo import registry

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
# Only these kinds of file are ever fetched or uploaded: none of them can run code.
PATTERNS = ["*.safetensors", "*.json", "*.md"]

_EMBEDDED = Path(__file__).parent / "weights"
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")


class HubError(RuntimeError):
    """Weights do not exist, cannot be fetched or uploaded, or are damaged; the message says which in one line."""


def embedded_cfg(arch_tag: str) -> dict[str, Any]:
    """Return the pretrained config of weights embedded in this package, for `generate_default_cfgs`.

    Args:
        arch_tag: `arch.tag`, the name of a folder in `zoo/weights`.

    Returns:
        Keyword arguments of timm's `PretrainedCfg`; `file` is the path of the safetensors file, which timm leaves out
        of every exported config.
    """
    folder = _EMBEDDED / arch_tag
    config = read_config(folder)
    known = {f.name for f in dataclasses.fields(PretrainedCfg)} - {"architecture", "tag", "source", "state_dict"}
    cfg = {key: _as_tuple(value) for key, value in config["pretrained_cfg"].items() if key in known}
    cfg["num_classes"] = config["num_classes"]
    for key in ("label_names", "label_descriptions"):
        if key in config:
            cfg[key] = _as_tuple(config[key])
    return dict(cfg, file=str(folder / WEIGHTS))


def fetch_config(repo_id: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Fetch and read `config.json` of `org/name[@revision]`.

    Raises:
        HubError: Whatever is wrong with the repository, the network or the file.
    """
    from huggingface_hub import hf_hub_download

    name, _, revision = repo_id.partition("@")
    with explain_errors(name, revision):
        path = hf_hub_download(name, CONFIG, revision=revision or None, cache_dir=cache_dir)
    return read_config(Path(path).parent)


def fetch_model(repo_id: str, cache_dir: str | Path | None = None, weights: bool = True) -> Path:
    """Fetch the config, and the weights, of `org/name[@revision]` and return the folder that holds them.

    Raises:
        HubError: Whatever is wrong with the repository, the network or the files.
    """
    from huggingface_hub import hf_hub_download

    name, _, revision = repo_id.partition("@")
    with explain_errors(name, revision):
        for file in [CONFIG, WEIGHTS] if weights else [CONFIG]:
            path = hf_hub_download(name, file, revision=revision or None, cache_dir=cache_dir)
    folder = Path(path).parent
    if weights:
        check_folder(folder)
    return folder


def is_embedded(file: str | Path) -> bool:
    """Tell whether a weights file belongs to this package."""
    return _EMBEDDED in Path(file).parents


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a folder in the hub layout.

    Raises:
        HubError: The file is missing or is not timm's config.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HubError(f"'{folder}' has no {CONFIG}: not a model folder.") from None
    except (ValueError, OSError) as error:
        raise HubError(f"'{path}' cannot be read: {error}.") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise HubError(f"'{path}' is not the config of a timm model or detector: it names no architecture.")
    return config


def check_folder(folder: str | Path) -> dict[str, Any]:
    """Check that a folder holds a complete, undamaged model and return its config.

    Raises:
        HubError: A file is missing, damaged, or differs from the checksum in the config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"'{folder}' is not a folder.")
    config = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise HubError(_no_weights(str(folder), [p.name for p in folder.iterdir()]))
    try:
        with safe_open(weights, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise HubError(f"'{weights}' is damaged: {error}.") from error
    recorded = config.get("sha256", {}).get(WEIGHTS)
    if recorded and recorded != sha256(weights):
        raise HubError(f"'{weights}' is damaged: its sha256 differs from the one in {CONFIG}.")
    return config


def sha256(path: str | Path) -> str:
    """Return the hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return _digest(file, hashlib.sha256())


def save_model(
    model: nn.Module,
    directory: str | Path,
    *,
    card: dict[str, Any] | str | None = None,
    metrics: dict[str, float] | None = None,
    label_names: list[str] | None = None,
    data_config: dict[str, Any] | None = None,
    half: bool = False,
) -> Path:
    """Save a model in the hub layout; the folder appears complete or not at all.

    Args:
        model: A model made by `create_model`: a timm-style one (it carries its `pretrained_cfg`) or a detector in
            point clouds, which knows its classes, so that it takes neither `label_names` nor `data_config`.
        directory: Target folder. An existing one keeps its other files.
        card: Fields of the model card (see `render_card`), or the whole text of it.
        metrics: Measured results by name, for instance `{"top1": 91.2}`; they go into the config and the card.
        label_names: Names of the classes, in order.
        data_config: Preprocessing used with these weights (`input_size`, `mean`, `std`, `crop_pct`, ...).
        half: Store floating-point weights as fp16; loading returns to the model's own dtype.

    Returns:
        The folder.

    Raises:
        ValueError: Not a timm-style model, wrong number of labels, or weights that fp16 cannot hold.
    """
    if registry.is_registered(model):
        if label_names is not None or data_config is not None:
            raise ValueError(f"{type(model).__name__} has classes of its own and takes no label_names or data_config.")
        with _new_folder(directory) as folder:
            save_file(_plain_tensors(model, half), folder / WEIGHTS, metadata={"format": "pt"})
            checksum = {WEIGHTS: sha256(folder / WEIGHTS)}
            registry.describe(model, folder, card or {}, metrics or {}, checksum)
        return Path(directory)
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        raise ValueError(f"{type(model).__name__} has no pretrained_cfg: only a model of create_model can be saved.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for a model of {model.num_classes} classes.")
    # The tag names the weights that the model started from, not these.
    extra: dict[str, Any] = {"pretrained_cfg": {"tag": None}}
    if metrics:
        extra["metrics"] = dict(metrics)
    if label_names is not None:
        extra["label_names"] = list(label_names)
    with _new_folder(directory) as folder:
        save_file(_plain_tensors(model, half), folder / WEIGHTS, metadata={"format": "pt"})
        extra["sha256"] = {WEIGHTS: sha256(folder / WEIGHTS)}
        _save_config(model, folder / CONFIG, extra, data_config)
        text = card if isinstance(card, str) else _card_of(model, folder, card or {}, metrics or {})
        (folder / CARD).write_text(text, encoding="utf-8")
    return Path(directory)


def _pool_size(cfg: dict[str, Any], data_config: dict[str, Any]) -> list[int] | None:
    """Size of the last map at the input size of these weights, which may differ from the architecture's default."""
    pool_size, old, new = cfg.get("pool_size"), cfg.get("input_size"), data_config.get("input_size")
    if not (pool_size and old and new):
        return None
    return [max(1, side * n // o) for side, o, n in zip(pool_size, old[1:], new[1:], strict=True)]


def _save_config(model: nn.Module, path: Path, extra: dict[str, Any], data_config: dict[str, Any] | None) -> None:
    """Write timm's config; timm before 1.0.30 takes the preprocessing from the model and drops what it is told."""
    import inspect

    from timm.models._hub import save_config_for_hf

    pool_size = _pool_size(model.pretrained_cfg, data_config or {})
    if "data_config" in inspect.signature(save_config_for_hf).parameters:
        save_config_for_hf(model, path, model_config=extra, data_config=data_config)
    else:
        described = copy.copy(model)
        changes = {**extra.pop("pretrained_cfg"), **(data_config or {}), "num_classes": model.num_classes}
        described.pretrained_cfg = {**model.pretrained_cfg, **changes}
        save_config_for_hf(described, path, model_config=extra, model_args=getattr(model, "_model_args", None))
    if pool_size:
        # timm keeps the architecture's value, or drops it.
        config = json.loads(path.read_text(encoding="utf-8"))
        config["pretrained_cfg"]["pool_size"] = pool_size
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def push(
    model_or_dir: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    **save_kwargs: Any,
) -> str:
    """Upload a model to a hub repository, creating it where needed.

    Args:
        model_or_dir: A model, or a folder written by `save_model`.
        repo_id: `org/name`.
        private: Make a newly created repository private.
        revision: Branch to commit to.
        token: Access token; None means the hub client's own log-in.
        create_pr: Open a pull request instead of committing; the repository must exist.
        **save_kwargs: Passed to `save_model` when a model is given.

    Returns:
        The URL of the commit or pull request.

    Raises:
        HubError: The folder is not a complete model, or the hub refused.
    """
    if isinstance(model_or_dir, nn.Module):
        import tempfile

        with tempfile.TemporaryDirectory() as temporary:
            folder = save_model(model_or_dir, Path(temporary) / "model", **save_kwargs)
            return push(folder, repo_id, private=private, revision=revision, token=token, create_pr=create_pr)
    from huggingface_hub import HfApi

    config = check_folder(model_or_dir)
    _check_repo_id(repo_id)
    api = HfApi(token=token)
    with explain_errors(repo_id, revision):
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(model_or_dir),
            revision=revision,
            create_pr=create_pr,
            allow_patterns=PATTERNS,
            commit_message=f"Upload {config['architecture']}",
        )
    return commit.pr_url or commit.commit_url


def pull(
    repo_id: str,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a model and check every byte of it; the folder appears complete or not at all.

    Args:
        repo_id: `org/name` or `org/name@revision`.
        directory: Target folder. An existing one keeps its other files.
        revision: Branch, tag or commit; None means the main branch.
        token: Access token; None means the hub client's own log-in.

    Returns:
        The folder, for `create_model("local-dir:...")`.

    Raises:
        HubError: Whatever is wrong with the repository, the network or the files.
    """
    repo_id, _, pinned = repo_id.partition("@")
    revision = revision or pinned or None
    _check_repo_id(repo_id)
    with explain_errors(repo_id, revision):
        source, names = _snapshot(repo_id, revision, token)
    with _new_folder(directory) as folder:
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
        check_folder(folder)
    return Path(directory)


@contextlib.contextmanager
def explain_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn every error of the hub client and of damaged files into a `HubError` of one line.

    Args:
        name: Repository or model that the block works on.
        revision: Its revision, for the message.
    """
    from huggingface_hub import errors

    # HTTPError is the root of the transport errors (no connection, time-out, connection lost) of the HTTP client.
    known = (errors.HTTPError, errors.HFValidationError, errors.EntryNotFoundError, errors.FileMetadataError)
    try:
        yield
    except (*known, ConnectionError) as error:
        raise HubError(_explain(error, name, revision)) from error
    except SafetensorError as error:
        raise HubError(f"The weights of '{name}' are damaged: {error}.") from error
    except OSError as error:
        # The client reports a download of the wrong length by a bare OSError.
        if "Consistency check failed" not in str(error):
            raise
        raise HubError(f"The download of '{name}' was interrupted. Nothing was written; try again.") from error


def _explain(error: Exception, name: str, revision: str | None) -> str:
    """Word a hub error. The order matters: a gated repository is also a missing one to the client."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return f"'{name}' is not a valid repository id (org/name): {_first_line(error)}"
    if isinstance(error, errors.GatedRepoError):
        return f"'{name}' is gated: ask for access on its page, then log in or set HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"Repository '{name}' does not exist, or it is private and needs a log-in or HF_TOKEN."
    if isinstance(error, errors.DisabledRepoError):
        return f"Repository '{name}' has been disabled by the hub."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"Repository '{name}' has no revision '{revision or name.partition('@')[2]}'."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"Repository '{name}' has no file '{_missing_file(error)}'."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            return f"The hub refused access to '{name}' ({status}): log in or set HF_TOKEN with the needed rights."
        return f"The hub failed on '{name}' ({status}): {_first_line(error)}"
    if constants.is_offline_mode():
        return (
            f"'{name}' is not in the local cache and HF_HUB_OFFLINE is set. "
            "Offline, a wrong name, file or revision looks the same: check them, or go online once."
        )
    if type(error).__name__ in ("RemoteProtocolError", "ReadError", "ReadTimeout"):
        return f"The download of '{name}' was interrupted. Nothing was written; try again."
    if "xet" in str(error):
        return f"The hub failed on '{name}' over the xet protocol, which not every hub has: set HF_HUB_DISABLE_XET=1."
    return f"The hub cannot be reached, which '{name}' needs: check the network or HF_ENDPOINT."


def _missing_file(error: Any) -> str:
    # .../{repo}/resolve/{revision}/{file}
    file = error.response.url.path.partition("/resolve/")[2].partition("/")[2]
    # timm asks for the pickle last, after the safetensors file was not found.
    return WEIGHTS if file == "pytorch_model.bin" else file


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(_explain(error, repo_id, None)) from error
    if repo_id.count("/") != 1:
        raise HubError(f"'{repo_id}' is not a valid repository id: expected org/name.")


def _no_weights(place: str, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not pickles:
        return f"'{place}' has no {WEIGHTS}."
    return (
        f"'{place}' has only pickled weights ({', '.join(sorted(pickles)[:3])}), which can run code when loaded. "
        f"Refused: fetch the file yourself if you trust it and turn it into {WEIGHTS} with "
        "`zoo convert FAMILY FILE --out DIR`."
    )


def _snapshot(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, list[str]]:
    """Fetch a repository into the hub cache and verify it there; return the folder and the names of its files."""
    from huggingface_hub import HfApi, constants, snapshot_download

    fetch = functools.partial(snapshot_download, repo_id, revision=revision, token=token, allow_patterns=PATTERNS)
    if constants.is_offline_mode():
        folder = Path(fetch(local_files_only=True))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in names:
            # The cache names the blob of a large file by its sha256.
            blob = (folder / name).resolve().name
            _verify(folder / name, repo_id, checksum=blob if len(blob) == 64 else None)
        return folder, names
    info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or []}
    if WEIGHTS not in files:
        raise HubError(_no_weights(repo_id, list(files)))
    if CONFIG not in files:
        raise HubError(f"'{repo_id}' has no {CONFIG}: not a timm-style model.")
    folder = Path(fetch())
    if folder.name != info.sha:
        raise HubError(f"'{repo_id}' changed during the download; try again.")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in names:
        file = files.get(name)
        if file is not None:
            _verify(folder / name, repo_id, file.lfs.sha256 if file.lfs else None, file.blob_id)
    return folder, names


def _verify(path: Path, repo_id: str, checksum: str | None = None, blob_id: str | None = None) -> None:
    """Compare a cached file with its checksum; a damaged one leaves the cache, so the next try fetches it again."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if checksum:
            good = _digest(file, hashlib.sha256()) == checksum
        elif blob_id and len(blob_id) == 40:
            # A small file has git's checksum of a blob instead.
            good = _digest(file, hashlib.sha1(b"blob %d\0" % size)) == blob_id
        else:
            good = True
    if not good:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise HubError(f"'{path.name}' of '{repo_id}' was damaged in the download (wrong checksum). Try again.")


def _digest(file: BinaryIO, digest: Any) -> str:
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _new_folder(directory: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside the target; it takes the target's place only when the block ends well."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise HubError(f"'{directory}' exists and is not a folder.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            # Other files of an existing folder are the user's: replace ours one by one. The config comes last, because
            # it holds the checksum that ties it to the weights.
            for path in sorted(temporary.rglob("*"), key=lambda path: path.name == CONFIG):
                if path.is_file():
                    target = directory / path.relative_to(temporary)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
        else:
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain_tensors(model: nn.Module, half: bool) -> dict[str, torch.Tensor]:
    """Return the state dict with every tensor contiguous, on the CPU and in its own storage, as safetensors demands."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().cpu()
        if half and plain.is_floating_point():
            plain = plain.half()
            if plain.isinf().any() and not tensor.isinf().any():
                raise ValueError(f"'{name}' exceeds the range of fp16: save without half.")
        tensors[name] = plain.clone(memory_format=torch.contiguous_format)
    return tensors


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_CARD_BODY = """
# {name}

{description}

## Model

| | |
| --- | --- |
| parameters | {params} |
| multiply-accumulates | {macs} at {input_size} |
| weights file | {size} |
| classes | {classes} |

## Use

```python
import timm
import zoo  # registers the architecture with timm

model = timm.create_model("{address}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


def _card_of(model: nn.Module, folder: Path, card: dict[str, Any], metrics: dict[str, float]) -> str:
    input_size = tuple(read_config(folder)["pretrained_cfg"]["input_size"])
    return render_card(model, card, metrics, size=(folder / WEIGHTS).stat().st_size, input_size=input_size)


def render_card(
    model: nn.Module, card: dict[str, Any], metrics: dict[str, float], *, size: int, input_size: tuple[int, ...]
) -> str:
    """Render a model card: front matter for hubs, then what a reader needs.

    Args:
        model: The model.
        card: Optional fields `name`, `description`, `address` (what `create_model` takes), `license`, `tags`,
            `datasets`, `results` (text beside the numbers: data, split, hardware), `details`, `citation`.
        metrics: Measured results by name.
        size: Bytes of the weights file.
        input_size: (channels, height, width) at which multiply-accumulates are counted.
    """
    from huggingface_hub import ModelCardData

    from zoo.costs import count_macs, count_params

    cfg = model.pretrained_cfg
    front = ModelCardData(
        license=card.get("license") or cfg.get("license"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "attention-zoo", *card.get("tags", [])],
        datasets=card.get("datasets"),
        metrics=["accuracy"] if metrics else None,
    )
    body = _CARD_BODY.format(
        name=card.get("name") or cfg["architecture"],
        description=card.get("description") or cfg.get("description") or f"Weights of `{cfg['architecture']}`.",
        params=f"{count_params(model) / 1e6:.2f} M",
        macs=f"{count_macs(model, input_size) / 1e9:.3f} G",
        input_size=" x ".join(map(str, input_size)),
        size=f"{size / 1e6:.2f} MB",
        classes=model.num_classes,
        address=card.get("address", "local-dir:FOLDER"),
    )
    return registry.join_card(front, body, card, metrics)
