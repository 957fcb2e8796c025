"""Pictures of attention: the regions that bi-level routing selects, and what the agents of agent attention look at."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.agent_layers import AgentCore

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
    with _recording(model, maps):
        _evaluate(model, x)
    return maps


def _evaluate(model: nn.Module, x: Tensor) -> None:
    """One pass in eval mode without gradients, after which the mode is the same as before."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(x)
    finally:
        model.train(training)


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


class AgentMaps(NamedTuple):
    """Attention maps of a layer of agent attention.

    Attributes:
        gather: What each agent takes from the keys, [B, M, n, Nk]; a class token comes first in N and Nk.
        spread: What each query takes from the agents, [B, M, N, n].
        grid: Rows and columns of the queries.
        agent_grid: Rows and columns of the agents.
    """

    gather: Tensor
    spread: Tensor
    grid: tuple[int, int]
    agent_grid: tuple[int, int]


def agent_maps(model: nn.Module, x: Tensor) -> dict[str, AgentMaps]:
    """Run a model and collect the attention maps of its agent attention layers.

    Args:
        model: A model with layers of agent attention.
        x: Input batch, [B, C, H, W].

    Returns:
        By name of the layer, in order of execution, its maps.

    Raises:
        ValueError: The model has no such layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AgentCore)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of agent attention.")
    maps: dict[str, AgentMaps] = {}

    def record(name: str, layer: AgentCore, attend: Callable, q: Tensor, k: Tensor, v: Tensor, grid: tuple) -> Tensor:
        maps[name] = AgentMaps(*layer.attention_maps(q, k, grid), grid, layer.agent_grid)
        return attend(q, k, v, grid)

    for name, layer in layers.items():
        layer.attend = functools.partial(record, name, layer, layer.attend)
    try:
        _evaluate(model, x)
    finally:
        for layer in layers.values():
            del layer.attend
    return maps


def draw_attention(image: np.ndarray, weights: Tensor) -> np.ndarray:
    """Light up what an attention map looks at and dim the rest.

    Args:
        image: RGB image, [H, W, 3], uint8.
        weights: Attention to the tokens of a grid over the image, [h, w], for instance of one agent, the mean of heads.

    Returns:
        RGB image of the same size.
    """
    strength = (weights / weights.max())[None, None].float()
    strength = F.interpolate(strength, image.shape[:2], mode="bilinear")[0, 0, :, :, None].cpu().numpy()
    return (image * (0.25 + 0.75 * strength)).round().clip(0, 255).astype(np.uint8)


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
