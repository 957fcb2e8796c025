"""Kernel tests run on memory full of NaN, so that an output left unwritten is seen."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

    with torch.device("cpu"):
        # torch lists the functions that obey a device context once, at the first call inside one: were that list made
        # from the functions below, `torch.device("meta")` would have no effect in the rest of this process.
        torch.empty(0)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs)))


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Convolutions of the reference in full float32; matrix products are so by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
