"""Find the training configurations that the package ships."""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the configurations lie inside the package, in a checkout beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def config_folder() -> Path:
    """Folder of the shipped configurations."""
    for folder in _FOLDERS:
        if next(folder.rglob("*.yaml"), None):
            return folder
    raise FileNotFoundError(f"no configurations found in {' or '.join(map(str, _FOLDERS))}")


def list_configs() -> list[str]:
    """Names of the shipped configurations, such as ``digits/biformer_nano``."""
    folder = config_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Resolve a file path or the name of a shipped configuration.

    Args:
        name: Path of an existing file, or a name of ``list_configs()`` with or without ``.yaml`` and ``configs/``.

    Raises:
        FileNotFoundError: There is neither; the message lists what is available, the closest first.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = path.as_posix().removeprefix("./").removeprefix("configs/")
    short = short.removesuffix(".yaml").removesuffix(".yml")
    names = list_configs()
    if short in names:
        return config_folder() / f"{short}.yaml"
    close = difflib.get_close_matches(short, names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise FileNotFoundError(f"no config file {name!r}; {hint}available configs: {', '.join(names)}")
