"""DyVTE: all visual tokens leave the language model as soon as a small network finds that text has taken them in.

Paper: Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings,
arXiv:2411.19628.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.heads.token_dropping.base import Budget, Prompt, Removable
from zoo.heads.token_dropping.decoder import LayerDropper, Reading, View, keep_columns, last_token

WIDTH = 2048


def create_routers(hidden_size: int, layers: int, width: int = WIDTH) -> nn.ModuleList:
    """Routers for a decoder, not trained: one for each layer but the first, where text has seen no image yet.

    Each maps `exit_features` [B, 2 * hidden_size] to logits [B, 2] of staying and leaving.
    """

    def router() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2 * hidden_size, width, bias=False), nn.GELU(), nn.Linear(width, 2, bias=False))

    return nn.ModuleList(router() for _ in range(layers - 1))


def save_routers(routers: nn.ModuleList, path: str | Path) -> None:
    """Write routers as safetensors."""
    from safetensors.torch import save_file

    save_file({name: x.detach().cpu().contiguous() for name, x in routers.state_dict().items()}, str(path))


def load_routers(path: str | Path) -> nn.ModuleList:
    """Read what `save_routers` wrote; sizes and dtype are those of the file.

    Raises:
        ValueError: A file with other tensors.
    """
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    layers = len(tensors) // 2 + 1
    first = tensors.get("0.0.weight")
    if first is None or first.dim() != 2:
        raise ValueError(
            f"{path} holds no routers of DyVTE: expected '0.0.weight' and so on, got {sorted(tensors)[:4]}."
        )
    routers = create_routers(first.shape[1] // 2, layers, first.shape[0]).to(first.dtype)
    try:
        routers.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no routers of DyVTE: {error}") from error
    return routers


def exit_features(hidden: Tensor, prompt: Prompt) -> Tensor:
    """What a router sees of the states that enter a layer, [B, L, C] -> [B, 2 * C].

    The mean of the text behind the last visual token, without the prompt's last token, and that last token.
    """
    last = last_token(prompt.attention_mask)[:, None]
    place = torch.arange(hidden.shape[1], device=hidden.device)
    text = prompt.attention_mask & (place > last_token(prompt.image_mask)[:, None]) & (place < last)
    mean = torch.einsum("bl,blc->bc", text.to(hidden.dtype), hidden) / text.sum(1, keepdim=True).clamp(min=1)
    rows = torch.arange(len(hidden), device=hidden.device)
    return torch.cat((mean, hidden[rows, last[:, 0]]), -1)


class DyVTE(LayerDropper):
    """DyVTE with trained routers, or with a layer given.

    The router of a layer reads the states that enter it. From the first layer on whose router says so, a prompt's
    visual tokens are gone, from the cache as well; the text keeps its positions. Prompts of a batch decide for
    themselves: tokens are hidden from then on, and memory is freed when the last prompt has decided. This takes a read
    back from the device in every layer until then. Routers are trained by `zoo.train.dyvte`.

    Args:
        budget: None; the routers decide.
        routers: Path of a safetensors file, or modules as `create_routers` makes them.
        exit_layer: First layer without visual tokens, from 1, instead of routers.

    Raises:
        ValueError: A budget, or not exactly one of routers and exit_layer; installing raises it for sizes that do not
            fit the decoder.
    """

    name: ClassVar[str] = "dyvte"
    default_budget: ClassVar[float | None] = None

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        routers: str | Path | nn.ModuleList | None = None,
        exit_layer: int | None = None,
    ) -> None:
        super().__init__()
        if budget is not None:
            raise ValueError(f"DyVTE drops all visual tokens at a layer: leave budget unset, got {budget!r}.")
        if (routers is None) == (exit_layer is None):
            raise ValueError(
                "DyVTE needs either routers, the file that training by zoo.train.dyvte.DyVTETraining saves, or "
                f"exit_layer; got routers={routers!r} and exit_layer={exit_layer!r}."
            )
        self.routers = load_routers(routers) if isinstance(routers, (str, Path)) else routers
        self.exit_layer = exit_layer
        self._gone: list[bool] = []

    def observe(self, language_model: nn.Module) -> list[Removable]:
        """No further hooks; checks sizes and moves the routers to the decoder."""
        layers, width = len(language_model.layers), language_model.config.hidden_size
        if self.exit_layer is not None:
            if not 1 <= self.exit_layer < layers:
                raise ValueError(f"exit_layer must be in [1, {layers}), got {self.exit_layer}.")
            return []
        inputs = {router[0].in_features for router in self.routers}
        if len(self.routers) != layers - 1 or inputs != {2 * width}:
            raise ValueError(
                f"the decoder of {layers} layers and hidden size {width} needs {layers - 1} routers with {2 * width} "
                f"inputs, got {len(self.routers)} with {sorted(inputs)}."
            )
        self.routers.to(next(language_model.parameters()).device)
        return []

    def decide(self, reading: Reading, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> View | None:
        """Without columns, what each prompt hides; with columns, text alone."""
        counts, view, prompt = self.counts(reading), reading.view, reading.prompt
        if layer == 0:
            self._gone = [images == 0 for images, _ in counts]
        if layer == 0 or all(self._gone):
            return view
        leaves = self._leaves(layer, hidden, prompt)
        gone = [a or b for a, b in zip(self._gone, leaves, strict=True)]
        if gone == self._gone:
            return view
        self._gone = gone
        if all(gone):
            text = (prompt.attention_mask & ~prompt.image_mask).to(torch.int8)
            padded = any(sum(count) < reading.shape[1] for count in counts)
            return keep_columns(text, [others for _, others in counts], padded)
        hidden_images = prompt.image_mask & torch.tensor(gone, device=hidden.device)[:, None]
        return View(None, prompt.attention_mask & ~hidden_images)

    @torch.no_grad()
    def _leaves(self, layer: int, hidden: Tensor, prompt: Prompt) -> list[bool]:
        if self.exit_layer is not None:
            return [layer == self.exit_layer] * len(hidden)
        router = self.routers[layer - 1]
        logits = router(exit_features(hidden, prompt).to(router[0].weight))
        return (logits[:, 1] > logits[:, 0]).tolist()
