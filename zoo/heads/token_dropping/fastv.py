"""FastV: visual tokens that the last token of the prompt hardly looks at leave the language model after a few layers.

Paper: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models, arXiv:2403.06764.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.heads.token_dropping.base import Budget, Removable, check_budget
from zoo.heads.token_dropping.decoder import (
    LayerDropper,
    Reading,
    View,
    attention_rows,
    keep_columns,
    last_token,
    rotate,
)


class FastV(LayerDropper):
    """FastV for batches, under any attention implementation.

    The first `layer` layers read everything. Then the visual tokens of a prompt are ranked together, by the attention
    that the prompt's last token pays them in the layer before, the mean over heads; one row of the map is computed.
    Kept tokens keep their positions, and the cache is short from `layer` on.

    Args:
        budget: Fraction of a prompt's visual tokens, newlines included, rounded as published; or a number of visual
            tokens of a prompt. 0.5 by default.
        layer: First layer that reads the short sequence, from 1.

    Raises:
        ValueError: A layer below 1, or a budget for each image: images of a prompt share one.
    """

    name: ClassVar[str] = "fastv"
    default_budget: ClassVar[float | None] = 0.5

    def __init__(self, budget: Budget | None = None, *, layer: int = 2) -> None:
        super().__init__()
        self.budget = check_budget(budget, self.default_budget)
        if isinstance(self.budget, list):
            raise ValueError("FastV ranks the visual tokens of a prompt together: give one budget, not a sequence.")
        if layer < 1:
            raise ValueError(f"FastV ranks tokens by the layer before `layer`, which must be at least 1, got {layer}.")
        self.layer = layer
        self._rows: dict[str, Tensor] = {}

    @property
    def is_identity(self) -> bool:
        """Whether the budget is everything."""
        return isinstance(self.budget, float) and self.budget == 1

    def kept(self, tokens: int) -> int:
        """Visual tokens of a prompt that are kept."""
        # As published, what is dropped is the given fraction, and halves are rounded to even numbers.
        return round(tokens * self.budget) if isinstance(self.budget, float) else min(self.budget, tokens)

    def observe(self, language_model: nn.Module) -> list[Removable]:
        """Hooks on the query and key projections of the layer before."""
        if self.layer >= len(language_model.layers):
            raise ValueError(
                f"layer must be below {len(language_model.layers)}, the decoder's layers, got {self.layer}."
            )
        attention = language_model.layers[self.layer - 1].self_attn

        def keep_query(module: nn.Module, args: tuple, out: Tensor) -> None:
            if self._reading is not None and self._reading.prompt is not None:
                rows = torch.arange(out.shape[0], device=out.device)
                self._rows["q"] = out[rows, last_token(self._reading.prompt.attention_mask)].unsqueeze(1)

        def keep_keys(module: nn.Module, args: tuple, out: Tensor) -> None:
            if self._reading is not None and self._reading.prompt is not None:
                self._rows["k"] = out

        hooks = ((attention.q_proj, keep_query), (attention.k_proj, keep_keys))
        return [module.register_forward_hook(hook) for module, hook in hooks]

    def end(self) -> None:
        """Forget the prompt."""
        super().end()
        self._rows = {}

    def decide(self, reading: Reading, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> View | None:
        """Everything before `layer`; text and the visual tokens with the highest scores from there on."""
        if layer != self.layer:
            return reading.view
        image, attended = reading.prompt.image_mask, reading.prompt.attention_mask
        priority = self._scores(attended, arguments["position_embeddings"])
        priority = priority.masked_fill(~image, torch.inf).masked_fill(~attended, -1)
        counts = self.counts(reading)
        padded = any(sum(count) < reading.shape[1] for count in counts)
        return keep_columns(priority, [others + self.kept(images) for images, others in counts], padded)

    @torch.no_grad()
    def _scores(self, attended: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[B, L] float32 attention of the last token."""
        attention = self._model.layers[self.layer - 1].self_attn
        q, k = (self._rows.pop(name).unflatten(-1, (-1, attention.head_dim)) for name in "qk")  # [B, L, M, D]
        last = last_token(attended)[:, None, None].expand(-1, -1, q.shape[-1])
        q = rotate(q, tuple(x.expand(len(last), -1, -1).gather(1, last) for x in rotation))
        return attention_rows(q, rotate(k, rotation), attended[:, None], attention.scaling)[:, :, 0].mean(1)
