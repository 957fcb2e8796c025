"""Pictures of bi-level routing: which regions of an image a query region attends to."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

QUERY_COLOUR = (255, 214, 10)
SELECTED_COLOUR = (0, 122, 255)


def routing_maps(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Run a model and collect what each of its routed attention layers selected.

    Args:
        model: A model with attention layers whose forward takes `return_routing`.
        x: Input batch, [B, C, H, W].

    Returns:
        By name of the layer, in order of execution, its routing: `index` [B, G, K], `weight` [B, G, K] and
        `grid` (rows, columns) with G = rows * columns. Regions are numbered row by row.

    Raises:
        ValueError: The model has no such layer.
    """
    maps: dict[str, Any] = {}
    training = model.training
    with _recording(model, maps):
        model.eval()
        try:
            with torch.inference_mode():
                model(x)
        finally:
            model.train(training)
    return maps


@contextmanager
def _recording(model: nn.Module, maps: dict[str, Any]) -> Iterator[None]:
    """Make every routed layer store its routing, and undo it afterwards."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if "return_routing" in inspect.signature(module.forward).parameters
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer that routes regions.")
    for name, layer in layers.items():
        layer.forward = functools.partial(_record, layer.forward, maps, name)
    try:
        yield
    finally:
        for layer in layers.values():
            # The attribute of the instance hides the method of the class.
            del layer.forward


def _record(forward: Callable, maps: dict[str, Any], name: str, *args: Any, **kwargs: Any) -> Tensor:
    out, maps[name] = forward(*args, **dict(kwargs, return_routing=True))
    return out


def draw_routing(
    image: np.ndarray,
    grid: tuple[int, int],
    query: int,
    selected: Sequence[int],
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw the regions that one query region attends to.

    The query region is framed in yellow, the selected ones in blue, the stronger the heavier their weight; all others
    are dimmed.

    Args:
        image: RGB image, [H, W, 3], uint8.
        grid: Regions, (rows, columns).
        query: Number of the query region, row by row.
        selected: Numbers of the selected regions.
        weights: A weight for each selected region; None draws all alike.

    Returns:
        RGB image of the same size.

    Raises:
        ValueError: A number outside the grid, or weights that do not match the regions.
    """
    rows, cols = grid
    selected = [int(region) for region in selected]
    for region in [query, *selected]:
        if not 0 <= region < rows * cols:
            raise ValueError(f"Region {region} is outside the grid of {rows} x {cols} regions.")
    weights = [1.0] * len(selected) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(selected):
        raise ValueError(f"{len(weights)} weights for {len(selected)} regions.")
    out = image.astype(np.float32) * 0.3
    strongest = max(weights, default=1.0) or 1.0
    for region, weight in zip(selected, weights, strict=True):
        box = _box(image.shape, grid, region)
        # Even the weakest selected region must stand out from those not selected.
        tint = 0.1 + 0.25 * weight / strongest
        out[box] = (1 - tint) * image[box] + tint * np.array(SELECTED_COLOUR, np.float32)
    if query not in selected:
        box = _box(image.shape, grid, query)
        out[box] = 0.6 * image[box]
    for region in selected:
        _frame(out, _box(image.shape, grid, region), SELECTED_COLOUR, image.shape)
    _frame(out, _box(image.shape, grid, query), QUERY_COLOUR, image.shape)
    return out.round().clip(0, 255).astype(np.uint8)


def _box(shape: tuple[int, ...], grid: tuple[int, int], region: int) -> tuple[slice, slice]:
    (H, W), (rows, cols) = shape[:2], grid
    row, col = divmod(region, cols)
    return (
        slice(round(row * H / rows), round((row + 1) * H / rows)),
        slice(round(col * W / cols), round((col + 1) * W / cols)),
    )


def _frame(image: np.ndarray, box: tuple[slice, slice], colour: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    width = max(1, min(shape[:2]) // 100)
    area = image[box]
    area[:width] = area[-width:] = colour
    area[:, :width] = area[:, -width:] = colour
