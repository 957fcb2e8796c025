"""Greedy generation with recorded launches: one CUDA graph for the prefill, one for a step of decoding.

The prefill graph holds the vision tower, the choice of tokens, the projector and the language model, the decoding graph
one step with a key-value cache of fixed size. Both read and write tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.heads.token_dropping.base import TokenDropper
from zoo.heads.token_dropping.families import Encoded
from zoo.heads.token_dropping.packing import Packer
from zoo.heads.token_dropping.prompts import Lengths, Trimmed, trim
from zoo.heads.token_dropping.spatial import Spatial

if TYPE_CHECKING:
    from zoo.heads.token_dropping.plugin import TokenDroppingHandle

# Runs before recording: kernels are compiled and chosen, tables are copied to the device.
WARM_UP = 2
# Steps of decoding between two looks at whether all rows have ended.
LOOK = 8


class _Graph:
    """A function without arguments as a CUDA graph; on a CPU it simply runs."""

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._run = function
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
        self._run = graph.replay

    def __call__(self) -> None:
        self._run()


class _Cache:
    """Keys and values of fixed size, with the one method of transformers' caches that decoder layers call."""

    def __init__(self, layers: int, length: Tensor) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.length, self.size, self.prefill = length, 0, True

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep [B, M, L, D]. Prefill attends to what it brings, a step of decoding to everything."""
        if self.keys[layer] is None:
            shape = (*keys.shape[:2], self.size, keys.shape[3])
            self.keys[layer], self.values[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        stored = self.keys[layer], self.values[layer]
        if self.prefill:
            for old, new in zip(stored, (keys, values), strict=True):
                old[:, :, : new.shape[2]].copy_(new)
            return keys, values
        for old, new in zip(stored, (keys, values), strict=True):
            old.index_copy_(2, self.length, new)
        return stored

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(x.nbytes for x in (*self.keys, *self.values) if x is not None)


class CapturedGeneration:
    """Prefill and decoding recorded for one shape of prompts; made by `TokenDroppingHandle.capture`.

    Recording keeps the weights' addresses: do not move or replace them. It also holds memory for the activations of a
    prefill and for a cache of the longest sequence.

    Attributes:
        prompt_length: Tokens of a prompt after dropping.
        max_new_tokens: Most tokens that `generate` makes.
        cache_bytes: Size of the key-value cache.
    """

    @torch.no_grad()
    def __init__(self, handle: TokenDroppingHandle, inputs: Mapping[str, Tensor], max_new_tokens: int) -> None:
        self.handle, self.model, self.max_new_tokens = handle, handle.model, max_new_tokens
        self._check_model(inputs["input_ids"].shape[1] + max_new_tokens)
        self._dropper, self._packer = self._method()
        self.device = self.model.get_input_embeddings().weight.device
        self._tower, self._pixels, self._images = self._partitions(inputs)
        self._pixels = self._pixels.to(self.device, copy=True)
        self._lengths = self._dropper.lengths(self._images, self._packer)
        if self._lengths is None:
            raise NotImplementedError(
                f"a graph needs the number of tokens ahead, which method {self._dropper.name!r} with these settings "
                "finds out from the images: use exact=True, and no newline='nonempty_rows'."
            )
        trimmed = self._trim(inputs)
        self._padded, self._shape = trimmed.padded, trimmed.token_ids.shape
        self.prompt_length = trimmed.token_ids.shape[1]
        self._allocate(trimmed)
        self._fill(trimmed)
        self._prefill_graph = _Graph(self._prefill, self.device)
        self._prefill_graph()
        self._step_graph = _Graph(self._step, self.device) if max_new_tokens > 1 else None

    def _check_model(self, longest: int) -> None:
        if not isinstance(self.handle.method, TokenDropper):
            raise NotImplementedError(f"method {self.handle.method.name!r} acts inside the language model: no capture.")
        if self.handle.positions != "compact":
            raise NotImplementedError("capture needs positions='compact'.")
        text = self.model.config.get_text_config()
        if text._attn_implementation != "sdpa":
            raise NotImplementedError(
                f"capture needs a language model with attn_implementation='sdpa', got {text._attn_implementation!r}."
            )
        window = getattr(text, "sliding_window", None)
        if window is not None and getattr(text, "use_sliding_window", True) and window < longest:
            raise NotImplementedError(f"capture has no sliding windows, and this model's of {window} is reached.")

    def _method(self) -> tuple[TokenDropper, Packer]:
        """The method, or one that keeps everything in the order of the stock model."""
        if self.handle.active:
            return self.handle.method, self.handle.packer
        newline = self.handle.packer.has_newline
        return Spatial(1.0), Packer(newline="all" if newline else "drop", has_newline=newline)

    def _partitions(self, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor, list]:
        names = [name for name in self.handle.family.inputs if inputs.get(name) is not None]
        return self.handle._images(**{name: inputs[name] for name in names})

    def _trim(self, inputs: Mapping[str, Tensor]) -> Trimmed:
        return trim(
            inputs["input_ids"],
            inputs.get("attention_mask"),
            Lengths(self._packer.stock_lengths(self._images), self._lengths),
            image_token=self.model.config.image_token_id,
            pad_token=self.handle._pad_token(),
            side="left",
            device=torch.device("cpu"),
        )

    def _allocate(self, trimmed: Trimmed) -> None:
        """Everything that graphs read and write."""
        (B, L), device = trimmed.token_ids.shape, self.device
        total = L + self.max_new_tokens
        self._ids = torch.zeros(B, L, dtype=torch.int64, device=device)
        self._places = torch.zeros(sum(self._lengths), dtype=torch.int64, device=device)
        self._real = torch.zeros(B, total, dtype=torch.bool, device=device)
        self._token = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._length = torch.zeros(1, dtype=torch.int64, device=device)
        self._ended = torch.zeros(B, dtype=torch.bool, device=device)
        self._columns = torch.arange(total, device=device)
        ids = self.model.generation_config.eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
        self._eos = torch.tensor(ids, dtype=torch.int64, device=device)
        self._pad = self.handle._pad_token()
        self._cache = _Cache(len(self._language_model.layers), self._length)
        self._cache.size = total
        # Tables of the packing and of the choice stay alive with the graph that reads them.
        self._tables = (
            self._packer.layout(self._images, device),
            self._packer.candidates(self._images, device),
            self._dropper.plan(self._images, self._packer, device),
        )

    @property
    def _language_model(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value cache."""
        return self._cache.nbytes

    def _fill(self, trimmed: Trimmed) -> None:
        """Copy a prompt to where the graph reads it."""
        ids, L = trimmed.token_ids, self.prompt_length
        places = (ids == self.model.config.image_token_id) & (trimmed.attention_mask != 0)
        self._ids.copy_(ids, non_blocking=True)
        self._places.copy_(places.flatten().nonzero().flatten(), non_blocking=True)
        self._real[:, :L].copy_(trimmed.attention_mask != 0, non_blocking=True)
        self._real[:, L:] = True

    def _prefill(self) -> None:
        """Images and prompt to the first new token."""
        encoded = self.handle.family.encode(self._dropper, self._tower, self._packer, self._pixels, self._images)
        embeddings = self._embed(encoded)
        L, real = self.prompt_length, self._real[:, : self.prompt_length]
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        mask = None
        if self._padded:
            column = self._columns[:L]
            # Rows of padding see themselves: a row without any key would be NaN.
            mask = (column <= column[:, None]) & real[:, None] | (column == column[:, None])
            mask = mask[:, None]  # [B, 1, L, L]
        self._cache.prefill = True
        self._length.fill_(L)
        self._ended.zero_()
        self._next(self._decode(embeddings, positions, mask))
        self._position.copy_(positions[:, -1:] + 1)

    def _embed(self, encoded: Encoded) -> Tensor:
        embeddings = self.model.get_input_embeddings()(self._ids)
        images = torch.cat(encoded.embeddings).to(embeddings)
        return embeddings.flatten(0, 1).index_copy(0, self._places, images).view_as(embeddings)

    def _decode(self, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, D] -> logits of the last place [B, V]."""
        model = self._language_model
        rotary = model.rotary_emb(hidden, positions)
        for layer in model.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.model.get_output_embeddings()(model.norm(hidden[:, -1]))

    def _next(self, logits: Tensor) -> None:
        """Greedy choice; rows that have ended go on with padding."""
        token = logits.argmax(-1).masked_fill(self._ended, self._pad)
        self._ended.logical_or_((token[:, None] == self._eos).any(-1))
        self._token.copy_(token[:, None])

    def _step(self) -> None:
        """The next token from the last one."""
        seen = (self._columns <= self._length) & self._real
        self._cache.prefill = False
        embeddings = self.model.get_input_embeddings()(self._token)
        logits = self._decode(embeddings, self._position, seen[:, None, None])
        self._length.add_(1)
        self._position.add_(1)
        self._next(logits)

    @torch.no_grad()
    def prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first new token of each prompt, [B, 1]; a view that the next call overwrites.

        Raises:
            ValueError: Prompts of another shape than the recorded ones.
        """
        _, pixels, images = self._partitions(inputs)
        if images != self._images:
            raise ValueError("the images have other sizes than the recorded ones: capture again for them.")
        trimmed = self._trim(inputs)
        if trimmed.token_ids.shape != self._shape or (trimmed.padded and not self._padded):
            padding = "" if self._padded else " without padding"
            raise ValueError(
                f"the prompts have {list(trimmed.token_ids.shape)} tokens after dropping, recorded were "
                f"{list(self._shape)}{padding}: capture again for them."
            )
        self._pixels.copy_(pixels, non_blocking=True)
        self._fill(trimmed)
        self._prefill_graph()
        return self._token

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Tensor], max_new_tokens: int | None = None) -> Tensor:
        """Greedy generation: the prompts as given and up to `max_new_tokens` new tokens, [B, L + n].

        Raises:
            ValueError: Prompts of another shape than the recorded ones, or more tokens than recorded.
        """
        count = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= count <= self.max_new_tokens:
            raise ValueError(f"max_new_tokens must be 1 to {self.max_new_tokens}, as recorded, got {count}.")
        tokens = [self.prefill(inputs).clone()]
        for i in range(1, count):
            if i % LOOK == 0 and self._eos.numel() and bool(self._ended.all()):
                break
            self._step_graph()
            tokens.append(self._token.clone())
        new = torch.cat(tokens, 1)
        return torch.cat((inputs["input_ids"].to(new), self._cut(new)), 1)

    def _cut(self, new: Tensor) -> Tensor:
        """Without the columns behind the last row's end."""
        ended = torch.isin(new, self._eos).long().cumsum(1) > 0
        # A row's own end belongs to it.
        open_before = torch.cat((torch.ones_like(ended[:, :1]), ~ended[:, :-1]), 1)
        return new[:, : int(open_before.any(0).sum())]
