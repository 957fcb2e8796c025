"""Visual attention redistribution: what attention sinks of visual tokens get goes to the other visual tokens.

Paper: See What You Are Told: Visual Attention Sink in Large Multimodal Models, arXiv:2503.03321.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.token_dropping.base import AttentionEdit, Budget, Prompt, Removable
from zoo.heads.token_dropping.decoder import (
    attention_rows,
    check_decoder,
    check_fresh,
    check_window,
    fit_prompt,
    is_empty,
    last_token,
    rotate,
)

# Channels that are huge in tokens that draw attention for nothing, by (hidden size, layers) of Llama 2.
SINK_DIMS = {(4096, 32): (2533, 1415), (5120, 40): (2100, 4743)}
FIRST_LAYER = 2
# Rows of attention maps that are held at a time.
ROWS = 256
_SINKS = "_zoo_sinks"


class Settings(NamedTuple):
    """Thresholds.

    Attributes:
        tau: Value in a sink channel, after normalisation, that makes a token a sink.
        rho: Largest share of sinks in the visual attention of a head that is changed.
        total: Least visual attention of a head that is changed.
        keep: Factor on the attention to sinks.
    """

    tau: float = 20.0
    rho: float = 0.5
    total: float = 0.2
    keep: float = 0.6


def find_sinks(hidden: Tensor, dims: Sequence[int], tau: float, eps: float = 1e-5) -> Tensor:
    """Tokens whose root-mean-square-normalised state exceeds `tau` in one of `dims`: [B, L, C] -> [B, L] bool."""
    hidden = hidden.float()
    scale = (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (hidden[..., list(dims)] * scale).abs().amax(-1) > tau


def redistribute(
    attention: Tensor, image: Tensor, sinks: Tensor, rows: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Move attention from sinks to visual tokens that are none.

    Args:
        attention: [B, M, Q, T] probabilities.
        image: [B, T] bool, visual tokens.
        sinks: [B, T] bool, sinks among all tokens.
        rows: [B, Q] bool, queries that may change.
        settings: Thresholds.

    Returns:
        New probabilities with the same sums, and the (head, query) pairs that pass the thresholds, [B, M, Q] bool.
    """
    image, sinks = image[:, None, None], sinks[:, None, None]
    total, share = (attention * image).sum(-1), (attention * (image & sinks)).sum(-1)
    passing = (total >= settings.total) & (share <= settings.rho * total)
    freed = (1 - settings.keep) * (attention * sinks).sum(-1)
    rest = total - share
    factor = torch.where(sinks, settings.keep, 1.0)
    factor = torch.where(image & ~sinks, 1 + (freed / rest)[..., None], factor)
    changed = passing & rows[:, None] & (rest > 0)
    return torch.where(changed[..., None], attention * factor, attention), passing


@dataclass
class _Pass:
    """One pass through the decoder: its prompt, sinks by layer, and what hooks have seen of the layer at hand."""

    prompt: Prompt
    cache: Any
    reads: bool
    sinks: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)


class VAR(AttentionEdit):
    """VAR under any attention implementation: only rows of text behind the images are computed a second time.

    A head's attention at a text token behind the last image, prompt or answer, changes if it looks at the image and
    mostly not at sinks. Sinks are found in each layer while the prompt is read. Nothing is dropped. The change is added
    to what the attention puts out; maps that `output_attentions` returns do not show it.

    Args:
        budget: None; nothing is dropped.
        sink_dims: Channels that mark sinks; known for Llama 2 with 7 and 13 billion parameters (Vicuna 1.5).
        tau, rho, total, keep: See `Settings`.

    Raises:
        ValueError: A budget. Installing raises it for a decoder whose sink channels are not known.
    """

    name: ClassVar[str] = "var"
    default_budget: ClassVar[float | None] = None

    def __init__(
        self, budget: Budget | None = None, *, sink_dims: Sequence[int] | None = None, **settings: float
    ) -> None:
        if budget is not None:
            raise ValueError(f"VAR drops nothing: leave budget unset, got {budget!r}.")
        unknown = sorted(set(settings) - set(Settings._fields))
        if unknown:
            raise ValueError(f"VAR takes sink_dims and {', '.join(Settings._fields)}, got {', '.join(unknown)}.")
        self.sink_dims, self.settings = sink_dims, Settings(**settings)
        self._prompt: Prompt | None = None
        self._pass: _Pass | None = None
        self._read, self._start = False, 0
        self._model: nn.Module | None = None

    def install(self, language_model: nn.Module) -> list[Removable]:
        """Hooks on layers and on the projections of their attention."""
        check_decoder(language_model, "VAR")
        config = language_model.config
        size = (config.hidden_size, config.num_hidden_layers)
        self._dims = self.sink_dims
        if self._dims is None:
            if config.model_type != "llama" or size not in SINK_DIMS:
                raise ValueError(
                    f"the sink channels of {config.model_type} with hidden size and layers {size} are not known: pass "
                    "sink_dims, the channels in which the first token of a text is huge."
                )
            self._dims = SINK_DIMS[size]
        if max(self._dims) >= size[0]:
            raise ValueError(f"sink_dims must be below the hidden size {size[0]}, got {tuple(self._dims)}.")
        self._model = language_model
        hooks: list[Removable] = [language_model.norm.register_forward_pre_hook(self._leave)]
        for i, layer in enumerate(language_model.layers):
            hooks.append(layer.register_forward_pre_hook(functools.partial(self._enter, i), with_kwargs=True))
            if i >= FIRST_LAYER:
                attention = layer.self_attn
                for name in "qkv":
                    hook = functools.partial(self._see, name)
                    hooks.append(getattr(attention, f"{name}_proj").register_forward_hook(hook))
                hooks.append(attention.o_proj.register_forward_pre_hook(functools.partial(self._change, i)))
        return hooks

    def begin(self, prompt: Prompt) -> None:
        """Remember the prompt; looks for the first text behind images, which reads back from the device once."""
        self._prompt, self._read = prompt, False
        self._start = int(last_token(prompt.image_mask).min())

    def end(self) -> None:
        """Forget the prompt."""
        self._prompt = self._pass = None

    # Hooks

    def _enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            self._pass = self._begin_pass(hidden, kwargs.get("past_key_values"))
        state = self._pass
        if state is None or layer < FIRST_LAYER:
            return
        state.seen = {"rotation": kwargs["position_embeddings"]}
        if state.reads:
            config = self._model.config
            sinks = find_sinks(hidden, self._dims, self.settings.tau, config.rms_norm_eps)
            # Tokens that a generation without a cache appended are none.
            sinks[:, self._prompt.image_mask.shape[1] :] = False
            state.sinks[layer] = sinks & state.prompt.attention_mask

    def _begin_pass(self, hidden: Tensor, cache: Any) -> _Pass | None:
        B, L = hidden.shape[:2]
        config = self._model.config
        if self._prompt is not None and (cache is None or not self._read):
            check_fresh(cache, "VAR")
            check_window(config, None, L, "VAR")
            return _Pass(fit_prompt(self._prompt, B, L, cache is not None, "VAR"), cache, True)
        stored = getattr(cache, _SINKS, None)
        if stored is None or (L > 1 and is_empty(cache)):
            return None
        check_window(config, cache, L, "VAR")
        return _Pass(stored[0], cache, False, stored[1])

    def _leave(self, module: nn.Module, args: tuple) -> None:
        state, self._pass = self._pass, None
        if state is not None and state.reads and state.cache is not None:
            setattr(state.cache, _SINKS, (state.prompt, state.sinks))
            self._read = True

    def _see(self, name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
        if self._pass is not None:
            self._pass.seen[name] = out

    @torch.no_grad()
    def _change(self, layer: int, module: nn.Module, args: tuple) -> tuple | None:
        state = self._pass
        if state is None:
            return None
        out, start = args[0], self._start + 1 if state.reads else 0
        if start >= out.shape[1]:
            return None
        parts = [out[:, :start]]
        keys, values, offset = self._keys_values(state, layer, out.shape[1])
        for first in range(start, out.shape[1], ROWS):
            rows = slice(first, first + ROWS)
            parts.append(out[:, rows] + self._difference(state, layer, rows, (keys, values), offset).to(out.dtype))
        state.seen = {}
        return (torch.cat(parts, 1), *args[1:])

    def _keys_values(self, state: _Pass, layer: int, length: int) -> tuple[Tensor, Tensor, Any]:
        """Rotated keys and values [B, T, G, D], and the place of the first query."""
        D = self._model.layers[layer].self_attn.head_dim
        if state.cache is None or state.reads:
            k, v = (state.seen[name].unflatten(-1, (-1, D)) for name in "kv")
            return rotate(k, state.seen["rotation"]), v, 0
        stored = state.cache.layers[layer]
        total = stored.get_seq_length()
        if isinstance(total, int) and stored.keys.shape[2] < total:
            raise NotImplementedError(f"VAR needs a cache of plain keys and values, got {type(stored).__name__}.")
        return stored.keys.transpose(1, 2), stored.values.transpose(1, 2), total - length

    def _difference(
        self, state: _Pass, layer: int, rows: slice, keys_values: tuple[Tensor, Tensor], offset: Any
    ) -> Tensor:
        """What redistribution adds to the attention's output at some queries, [B, Q, M * D] float32."""
        (keys, values), prompt = keys_values, state.prompt
        attention = self._model.layers[layer].self_attn
        q = state.seen["q"][:, rows].unflatten(-1, (-1, attention.head_dim))
        q = rotate(q, tuple(x[:, rows] for x in state.seen["rotation"]))
        more = keys.shape[1] - prompt.image_mask.shape[1]
        attended = F.pad(prompt.attention_mask, (0, more), value=True)
        image, sinks = (F.pad(x, (0, more)) for x in (prompt.image_mask, state.sinks[layer]))
        place = torch.arange(keys.shape[1], device=q.device)
        query = torch.arange(q.shape[1], device=q.device) + rows.start + offset
        mask = (place <= query[:, None]) & attended[:, None]  # [B, Q, T]
        # Rows of padding see nothing; they may see everything, as they are not changed.
        weights = attention_rows(q, keys, mask | ~mask.any(-1, keepdim=True), attention.scaling)
        behind = (query > last_token(prompt.image_mask)[:, None]) & mask.any(-1)
        new, _ = redistribute(weights, image, sinks, behind, self.settings)
        change = (new - weights).unflatten(1, (keys.shape[2], -1))  # [B, G, M / G, Q, T]
        return torch.einsum("bgmqt,btgd->bqgmd", change, values.float()).flatten(2)
