"""Editing the decoder of a vision-language model with hooks: tokens that leave it at a layer, and rows of attention.

The decoder's loop hands every layer the hidden states of the layer before and the mask, rotations and positions of the
whole sequence. A pre-hook on each layer shortens the former once and replaces the latter for all layers behind. The
cache then holds fewer tokens in later layers. What these are is kept on the cache itself, so that decoding goes on
after the call that read the prompt, whoever calls the model.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.heads.token_dropping.base import AttentionEdit, Prompt, Removable
from zoo.heads.token_dropping.gathering import take

_VIEWS = "_zoo_token_views"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def check_decoder(language_model: nn.Module, method: str, implementations: tuple[str, ...] | None = None) -> None:
    """Whether a decoder can be edited.

    Raises:
        NotImplementedError: Layers of another kind than Llama's, an attention implementation outside
            `implementations`, or a version of transformers that sizes one mask for all layers.
    """
    from transformers.masking_utils import create_causal_mask

    config, layers = language_model.config, getattr(language_model, "layers", None)
    attention = getattr(layers[0], "self_attn", None) if layers else None
    if not all(hasattr(attention, name) for name in MODULES) or hasattr(attention, "q_norm"):
        raise NotImplementedError(
            f"{method} needs a decoder with the layers of Llama, Mistral or Qwen2, whose attention projects by "
            f"{', '.join(MODULES)} and does not normalise queries; got {type(language_model).__name__}."
        )
    if implementations and config._attn_implementation not in implementations:
        raise NotImplementedError(
            f"{method} works with attention implementations {implementations}, got {config._attn_implementation!r}: "
            f"model.set_attn_implementation({implementations[0]!r})."
        )
    if "layer_idx" not in inspect.signature(create_causal_mask).parameters:
        raise NotImplementedError(f"{method} needs a mask for each layer: transformers 5.23 or later.")


def is_empty(cache: Any) -> bool:
    """Whether nothing is cached."""
    return cache is None or not bool(cache.get_seq_length())


def check_window(config: Any, cache: Any, tokens: int, method: str) -> None:
    """Raises NotImplementedError where a sequence outgrows the decoder's sliding window."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return
    seen = 0 if cache is None else cache.get_seq_length()
    if tokens + int(seen) > window:
        raise NotImplementedError(
            f"{method} needs full attention: a sequence of {tokens + int(seen)} tokens exceeds sliding_window={window}."
        )


def check_fresh(cache: Any, method: str) -> None:
    """Raises NotImplementedError where a prompt with images continues a cache."""
    if not is_empty(cache):
        raise NotImplementedError(f"{method} cannot add images to a cache: pass the whole conversation without one.")


def fit_prompt(prompt: Prompt, batch: int, length: int, cached: bool, method: str) -> Prompt:
    """The prompt for a batch and a length, which is longer where a generation without a cache reads its own tokens.

    Raises:
        NotImplementedError: The prompt comes in chunks.
    """
    prompt, L = prompt.expand(batch), prompt.image_mask.shape[1]
    if length < L or (length > L and cached):
        raise NotImplementedError(
            f"{method} needs the prompt of {L} tokens in one piece, got {length}: leave prefill_chunk_size unset."
        )
    more = length - L
    pad = nn.functional.pad
    return Prompt(pad(prompt.image_mask, (0, more)), pad(prompt.attention_mask, (0, more), value=True))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in float32: [B, T, M, D] by cos and sin [B or 1, T, D]."""
    cos, sin = (part[:, :, None].float() for part in rotation)
    x = x.float()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attention_rows(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Some rows of an attention map: rotated q [B, Q, M, D], k [B, T, G, D], mask [B, Q, T] -> [B, M, Q, T] float32.

    M is a multiple of G, the heads of keys.
    """
    q = q.float().unflatten(2, (k.shape[2], -1))  # [B, Q, G, M / G, D]
    logits = torch.einsum("bqgmd,btgd->bgmqt", q * scale, k.float()).flatten(1, 2)
    return logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)


def last_token(attended: Tensor) -> Tensor:
    """[B, L] bool -> [B] int64, the last place that is no padding."""
    return (attended * torch.arange(attended.shape[1], device=attended.device)).argmax(1)


class View(NamedTuple):
    """What a layer reads of the prompt.

    Attributes:
        columns: [B, K] int64 places that are there, in order; None for all.
        valid: [B, K] bool which of these count; None for all.
    """

    columns: Tensor | None
    valid: Tensor | None


def keep_columns(priority: Tensor, count: list[int], padded: bool) -> View:
    """The places with the highest priority of each row.

    Args:
        priority: [B, L]; of equal ones the earlier is kept.
        count: Places that each row keeps.
        padded: Whether rows have padding, so that there is a mask anyway.
    """
    most = max(count)
    columns = priority.argsort(dim=1, descending=True, stable=True)[:, :most]
    if min(count) == most and not padded:
        return View(columns.sort(1).values, None)
    kept = torch.tensor(count, device=priority.device)[:, None]
    # Rows that keep fewer carry the next ones along, unseen by any other.
    valid = (torch.arange(most, device=priority.device) < kept).expand_as(columns)
    columns, order = columns.sort(1)
    return View(columns, valid.gather(1, order))


@dataclass
class Reading:
    """One pass through the decoder.

    Attributes:
        prompt: The prompt if this pass reads it, otherwise None.
        cache: The cache or None.
        views: What each layer reads; None for everything.
        view: That of the layer before.
        replaced: Arguments of layers with this view.
        shape: (B, L) of the sequence as it came in.
    """

    prompt: Prompt | None
    cache: Any
    views: list[View | None]
    view: View | None = None
    replaced: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] = (0, 0)


class LayerDropper(AttentionEdit):
    """Base of methods that drop visual tokens between two layers of the decoder.

    The kept tokens keep their positions. `forward` returns logits at all places of the prompt, those of dropped tokens
    zero, so that labels fit. Masks are made anew for each layer from what is padding: a mask of four dimensions that
    a caller passes is used by the layers before the drop only.
    """

    def __init__(self) -> None:
        self._prompt: Prompt | None = None
        self._counts: list[tuple[int, int]] = []
        self._read = False
        self._reading: Reading | None = None
        self._model: nn.Module | None = None

    @abstractmethod
    def decide(self, reading: Reading, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> View | None:
        """What a layer reads of the prompt; called for every layer, in order, while a prompt is read.

        `reading.view` is the answer for the layer before: it is the answer again where nothing changes. Once there are
        columns they stay.
        """

    def observe(self, language_model: nn.Module) -> list[Removable]:
        """Further hooks."""
        return []

    def install(self, language_model: nn.Module) -> list[Removable]:
        """Hooks on the layers and on the last norm."""
        check_decoder(language_model, type(self).__name__)
        self._model = language_model
        hooks = self.observe(language_model)
        for i, layer in enumerate(language_model.layers):
            hooks.append(layer.register_forward_pre_hook(functools.partial(self._enter, i), with_kwargs=True))
        hooks.append(language_model.norm.register_forward_pre_hook(self._leave))
        return hooks

    def begin(self, prompt: Prompt) -> None:
        """Remember the prompt; counts its tokens, which reads back from the device once."""
        self._prompt, self._read = prompt, False
        images = (prompt.image_mask & prompt.attention_mask).sum(1)
        self._counts = torch.stack((images, prompt.attention_mask.sum(1) - images), 1).tolist()

    def end(self) -> None:
        """Forget the prompt."""
        self._prompt = self._reading = None

    def counts(self, reading: Reading) -> list[tuple[int, int]]:
        """(visual, other) tokens of each row."""
        B, L = reading.shape
        more = L - self._prompt.image_mask.shape[1]
        times = B // len(self._counts)
        return [(images, others + more) for images, others in self._counts for _ in range(times)]

    # Hooks

    def _start(self, hidden: Tensor, cache: Any) -> Reading | None:
        B, L = hidden.shape[:2]
        if self._prompt is not None and (cache is None or not self._read):
            name = type(self).__name__
            check_fresh(cache, name)
            check_window(self._model.config, None, L, name)
            prompt = fit_prompt(self._prompt, B, L, cache is not None, name)
            return Reading(prompt, cache, [None] * len(self._model.layers), shape=(B, L))
        views = getattr(cache, _VIEWS, None)
        # A cache that was reset and is used again has forgotten its images. (Asking a static one waits for the device.)
        if views is None or (L > 1 and is_empty(cache)):
            return None
        check_window(self._model.config, cache, L, type(self).__name__)
        return Reading(None, cache, views, shape=(B, L))

    def _enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            self._reading = self._start(hidden, kwargs.get("past_key_values"))
        reading = self._reading
        if reading is None:
            return None
        if reading.prompt is not None:
            reading.views[layer] = self.decide(reading, layer, hidden, kwargs)
        view = reading.views[layer]
        if view is None:
            return None
        if view is not reading.view:
            hidden = self._change(reading, view, layer, hidden, kwargs)
        kwargs = {**kwargs, **reading.replaced}
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _change(self, reading: Reading, view: View, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Begin a view: shorten the hidden states, make the arguments of its layers."""
        before, reading.view, reading.replaced = reading.view, view, {}
        if reading.prompt is not None and view.columns is not None and (before is None or before.columns is None):
            columns = view.columns
            hidden = take(hidden, columns)
            cos, sin = (take(x.expand(len(columns), -1, -1), columns) for x in kwargs["position_embeddings"])
            reading.replaced["position_embeddings"] = cos, sin
            if kwargs.get("position_ids") is not None:
                reading.replaced["position_ids"] = kwargs["position_ids"].expand(reading.shape).gather(1, columns)
        reading.replaced["attention_mask"] = self._mask(reading, view, layer, hidden)
        return hidden

    def _mask(self, reading: Reading, view: View, layer: int, hidden: Tensor) -> Any:
        from transformers.masking_utils import create_causal_mask

        valid, cache = view.valid, reading.cache
        if valid is not None and cache is not None:
            keys, _ = cache.get_mask_sizes(hidden.shape[1], layer)
            valid = nn.functional.pad(valid, (0, keys - valid.shape[1]), value=True)
        return create_causal_mask(self._model.config, hidden, valid, cache, layer_idx=layer)

    def _leave(self, module: nn.Module, args: tuple) -> tuple | None:
        reading, self._reading = self._reading, None
        if reading is None or reading.prompt is None:
            return None
        if reading.cache is not None:
            setattr(reading.cache, _VIEWS, reading.views)
            self._read = True
        view = reading.view
        if view is None or view.columns is None:
            return None
        hidden = args[0] if view.valid is None else args[0] * view.valid[..., None]
        full = hidden.new_zeros(*reading.shape, hidden.shape[-1])
        return (full.scatter(1, view.columns[..., None].expand_as(hidden), hidden), *args[1:])
