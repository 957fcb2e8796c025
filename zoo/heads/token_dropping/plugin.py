"""Installing a method of token dropping on a vision-language model of transformers, and taking it off again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.heads.token_dropping.base import AttentionEdit, Budget, Method, Prompt, TokenDropper, create_method
from zoo.heads.token_dropping.families import Encoded, Family, family_of
from zoo.heads.token_dropping.packing import ImageGrid, Packer
from zoo.heads.token_dropping.prompts import Lengths, Trimmed, padding_side, trim
from zoo.heads.token_dropping.towers import Tower

if TYPE_CHECKING:
    from zoo.heads.token_dropping.capture import CapturedGeneration

PROMPTS = ("original", "trimmed")
POSITIONS = ("compact", "original")
# Arguments of forward() that run along the tokens.
ALIGNED = ("labels", "position_ids", "token_type_ids", "mm_token_type_ids")
CALL_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")
_HANDLE = "_zoo_token_dropping"


class TokenDroppingHandle:
    """Token dropping as installed on one model. As a context manager it is removed at the end of the block.

    Attributes:
        model: The model.
        method: The method, a `TokenDropper` or an `AttentionEdit`.
        packer: Order, grid and newline options.
        prompt_length: Tokens of the last prompt of `generate` after dropping, padding included.
        lengths: Visual tokens of each image of the last call, after dropping.
    """

    def __init__(self, family: Family, method: Method, packer: Packer, options: dict[str, Any]) -> None:
        self.model, self.family, self.method, self.packer = family.model, family, method, packer
        self.prompt, self.positions, self.bypass = options["prompt"], options["positions"], options["bypass"]
        self.prompt_length: int | None = None
        self.lengths: list[int] | None = None
        self._takes_encoded = takes_encoded_images(self.model)
        self._prompting = False
        self._removables: list[Any] = []
        self._saved: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether the method is installed and changes anything."""
        return bool(self._saved) and not (self.bypass and self.method.is_identity)

    # Installing

    def _install(self) -> None:
        if isinstance(self.method, AttentionEdit):
            self._removables = self.method.install(self.family.body.language_model)
        for name in ("forward", "generate"):
            stock = getattr(self.model, name)
            self._saved[name] = self.model.__dict__.get(name)
            self.model.__dict__[name] = self._wrapped(stock, getattr(self, f"_{name}"))
        self.model.__dict__[_HANDLE] = self

    def _wrapped(self, stock: Callable, ours: Callable) -> Callable:
        """A function that takes calls with images to ours and all others to the stock one."""

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("pixel_values") is None or not self.active:
                return stock(*args, **kwargs)
            return ours(stock, *args, **kwargs)

        return call

    def remove(self) -> None:
        """Restore the model as it was. Removing again does nothing."""
        for name, value in self._saved.items():
            if value is None:
                self.model.__dict__.pop(name, None)
            else:
                self.model.__dict__[name] = value
        for removable in self._removables:
            removable.remove()
        self._saved, self._removables = {}, []
        if self.model.__dict__.get(_HANDLE) is self:
            del self.model.__dict__[_HANDLE]

    def __enter__(self) -> TokenDroppingHandle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "installed" if self._saved else "removed"
        return f"TokenDroppingHandle({self.method.name!r} on {type(self.model).__name__}, {state})"

    # Images

    def encode(self, pixel_values: Tensor, **inputs: Any) -> Encoded:
        """Images as the language model reads them.

        Args:
            pixel_values: As the processor returns them.
            **inputs: `image_sizes` and whatever else of the processor's output belongs to images.

        Raises:
            ValueError: Shapes that do not fit the sizes of the images.
            NotImplementedError: A tower that does not suit the method.
        """
        if not isinstance(self.method, TokenDropper):
            raise NotImplementedError(f"method {self.method.name!r} drops nothing before the language model.")
        tower, partitions, images = self._images(pixel_values, **inputs)
        return self.family.encode(self.method, tower, self.packer, partitions, images)

    def _images(self, pixel_values: Tensor, **inputs: Any) -> tuple[Tower, Tensor, list[ImageGrid]]:
        tower = self.family.tower(*(inputs.get(name) for name in CALL_OPTIONS))
        pixel_values = pixel_values.to(tower.embeddings.patch_embedding.weight.device)
        return tower, *self.family.images(tower, pixel_values, **inputs)

    def capture(self, inputs: Mapping[str, Tensor], max_new_tokens: int = 64) -> CapturedGeneration:
        """Record prefill and decoding of prompts like these as CUDA graphs, for greedy generation without launches.

        At batch 1 a host that launches kernels one by one takes longer than the GPU does for few tokens. A graph has
        fixed shapes: `exact=True` (or a budget of 1) makes the counts known, and later prompts need the same batch,
        image sizes and length. On a CPU the same steps run without a graph.

        Args:
            inputs: What the processor returns: ids, attention mask, pixel values, image sizes.
            max_new_tokens: Most tokens that `CapturedGeneration.generate` can make.

        Raises:
            NotImplementedError: Counts that are not known, methods inside the language model, other attention
                implementations than "sdpa".
        """
        from zoo.heads.token_dropping.capture import CapturedGeneration

        return CapturedGeneration(self, inputs, max_new_tokens)

    def token_counts(self, pixel_values: Tensor, **inputs: Any) -> list[int] | None:
        """Visual tokens that each image will take, if that follows from its size (exact counts); otherwise None."""
        _, _, images = self._images(pixel_values, **inputs)
        if self.bypass and self.method.is_identity:
            return self.packer.stock_lengths(images)
        return self.method.lengths(images, self.packer) if isinstance(self.method, TokenDropper) else None

    # Prompts

    def _forward(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = {**inspect.signature(stock).bind_partial(*args).arguments, **kwargs}
        token_ids = self._token_ids(kwargs.get("input_ids"), kwargs)
        if isinstance(self.method, AttentionEdit):
            with self._editing(token_ids, kwargs):
                return stock(**kwargs)
        kwargs.pop("input_ids", None)
        mask = kwargs.pop("attention_mask", None)
        trimmed, encoded = self._read(token_ids, mask, padding_side(mask), kwargs)
        if mask is not None or trimmed.padded:
            kwargs["attention_mask"] = trimmed.attention_mask
        return stock(**self._with_images(trimmed, encoded, kwargs))

    def _generate(self, stock: Callable, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("input_ids", None)
        given = inputs if given is None else given
        token_ids = self._token_ids(given, kwargs)
        if isinstance(self.method, AttentionEdit):
            self.prompt_length = token_ids.shape[1]
            with self._editing(token_ids, kwargs):
                return stock(given, *args, **kwargs)
        mask, past = kwargs.pop("attention_mask", None), _past_length(kwargs.get("past_key_values"))
        # A cache is continued with the ids of everything so far, or with the new ones.
        cached = past if token_ids.shape[1] > past else 0
        with torch.no_grad():
            # Generation reads the last place of each row.
            trimmed, encoded = self._read(token_ids, mask, "left", kwargs, cached)
            self.prompt_length = trimmed.token_ids.shape[1]
            kwargs["attention_mask"] = trimmed.attention_mask
            kwargs = self._with_lengths(token_ids.shape[1] - self.prompt_length, kwargs)
            chunks = _chunks(args, kwargs)
            kwargs = self._with_images(trimmed, encoded, kwargs, chunks=chunks)
        if given is None:
            # From embeddings alone, generate() returns new tokens alone.
            return stock(None, *args, **kwargs)
        return self._with_prompt(stock(None, *args, **{**kwargs, "input_ids": trimmed.token_ids}), token_ids)

    def _token_ids(self, token_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """Ids of the prompts; of embeddings, ids that are right at the places of images."""
        if kwargs.get("pixel_values_videos") is not None:
            raise NotImplementedError("token dropping takes images; remove it (handle.remove()) for calls with videos.")
        if token_ids is not None:
            return token_ids
        embeddings, image = kwargs.get("inputs_embeds"), self.model.config.image_token_id
        if embeddings is None:
            raise ValueError("token dropping needs input_ids or inputs_embeds beside pixel_values.")
        table = self.model.get_input_embeddings()
        placeholder = table(torch.tensor(image, device=table.weight.device)).to(embeddings)
        return torch.where((embeddings == placeholder).all(-1), image, int(image == 0))

    def _read(
        self, token_ids: Tensor, mask: Tensor | None, side: str, kwargs: dict[str, Any], cached: int = 0
    ) -> tuple[Trimmed, Encoded]:
        """Take the images out of the arguments, encode them, and trim the prompts behind the first `cached` columns.

        Where the counts are known, prompts are trimmed first: then nothing waits for the device.
        """
        device = token_ids.device
        token_ids, mask = token_ids.cpu(), None if mask is None else mask.cpu()
        inputs = {name: kwargs.pop(name) for name in (*self.family.inputs, *CALL_OPTIONS) if name in kwargs}
        tower, partitions, images = self._images(**inputs)
        lengths, encoded = None, None
        if self.positions == "compact":
            lengths = self.method.lengths(images, self.packer)
        if lengths is None:
            encoded = self.family.encode(self.method, tower, self.packer, partitions, images)
            lengths = encoded.lengths
        places = self._places(encoded) if self.positions == "original" else None
        stock = self.packer.stock_lengths(images)
        trimmed = self._trim(token_ids, mask, Lengths(stock, lengths, places), side, cached, kwargs, device)
        if encoded is None:
            encoded = self.family.encode(self.method, tower, self.packer, partitions, images)
        self.lengths = encoded.lengths
        return trimmed, encoded

    def _trim(
        self,
        token_ids: Tensor,
        mask: Tensor | None,
        lengths: Lengths,
        side: str,
        cached: int,
        kwargs: dict[str, Any],
        device: torch.device,
    ) -> Trimmed:
        aligned = {name: kwargs.pop(name) for name in ALIGNED if kwargs.get(name) is not None}
        embeddings = kwargs.pop("inputs_embeds", None)
        if embeddings is not None:
            aligned["inputs_embeds"] = embeddings.movedim(-1, 0)  # [D, B, L]
        past = _past_length(kwargs.get("past_key_values"))
        head, token_ids = token_ids[:, :cached], token_ids[:, cached:]
        if self.positions == "original" and "position_ids" not in aligned:
            if past:
                raise NotImplementedError("positions='original' cannot continue a cache; pass position_ids.")
            aligned["position_ids"] = _positions(token_ids, mask).to(device)
        trimmed = trim(
            token_ids,
            mask,
            lengths,
            image_token=self.model.config.image_token_id,
            pad_token=self._pad_token(),
            side=side,
            aligned=aligned,
            past=past,
            device=device,
        )
        if not cached:
            return trimmed
        return trimmed._replace(token_ids=torch.cat((head.to(device), trimmed.token_ids), 1), cached=cached)

    def _places(self, encoded: Encoded) -> list[Tensor]:
        """Places of the kept tokens in the stock model's order of each image."""
        stock = Packer(has_newline=self.packer.has_newline, newline="all" if self.packer.has_newline else "drop")
        out = []
        for image, source in zip(encoded.images, encoded.source.cpu().split(encoded.lengths), strict=True):
            if (source < 0).any():
                raise NotImplementedError(
                    "positions='original' needs tokens that are patches: no merging, no newlines."
                )
            order = stock.layout([image], torch.device("cpu")).source
            place = torch.full((image.partitions * image.patches,), -1)
            place[order[order >= 0]] = torch.arange(len(order))[order >= 0]
            out.append(place[source])
        return out

    def _pad_token(self) -> int:
        configs = (self.model.generation_config, self.model.config, self.model.config.get_text_config())
        return next((x for x in (getattr(c, "pad_token_id", None) for c in configs) if x is not None), 0)

    def _with_images(
        self, trimmed: Trimmed, encoded: Encoded, kwargs: dict[str, Any], chunks: bool = False
    ) -> dict[str, Any]:
        """Arguments of the stock functions: trimmed ids and encoded images, or embeddings of both."""
        aligned = dict(trimmed.aligned)
        embeddings = aligned.pop("inputs_embeds", None)
        kwargs = {**kwargs, **aligned}
        if embeddings is None and self._takes_encoded:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            images = BaseModelOutputWithPooling(pooler_output=encoded.embeddings)
            return {**kwargs, "input_ids": trimmed.token_ids, "mm_encoder_outputs": {"image": images}}
        if chunks:
            raise NotImplementedError(
                "prefill in chunks needs input_ids, not embeddings, and images that are encoded before, "
                "as transformers does from 5.23 on."
            )
        if embeddings is None:
            embeddings = self.model.get_input_embeddings()(trimmed.token_ids)
        else:
            embeddings = embeddings.movedim(0, -1)
        places = trimmed.token_ids == self.model.config.image_token_id
        places[:, : trimmed.cached] = False
        features = torch.cat(encoded.embeddings).to(embeddings)
        return {**kwargs, "inputs_embeds": embeddings.masked_scatter(places[..., None], features)}

    def _with_lengths(self, dropped: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Limits on the whole length, which count the prompt as the caller knows it."""
        names = [n for n in ("max_length", "min_length") if kwargs.get(n) is not None and self.prompt == "original"]
        return {**kwargs, **{name: max(kwargs[name] - dropped, 0) for name in names}}

    def _with_prompt(self, out: Any, token_ids: Tensor) -> Any:
        if self.prompt == "trimmed":
            return out
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompts = token_ids.repeat_interleave(sequences.shape[0] // token_ids.shape[0], 0)
        sequences = torch.cat((prompts.to(sequences), sequences[:, self.prompt_length :]), 1)
        if isinstance(out, Tensor):
            return sequences
        out["sequences"] = sequences
        return out

    @contextlib.contextmanager
    def _editing(self, token_ids: Tensor, kwargs: dict[str, Any]) -> Iterator[None]:
        if self._prompting:
            # generate() calls forward() with the images.
            yield
            return
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(token_ids) if mask is None else mask[:, -token_ids.shape[1] :]
        ids = token_ids if kwargs.get("inputs_embeds") is None else None
        self.method.begin(Prompt(token_ids == self.model.config.image_token_id, mask != 0, ids))
        self._prompting = True
        try:
            yield
        finally:
            self._prompting = False
            self.method.end()


def takes_encoded_images(model: nn.Module) -> bool:
    """Whether forward() and generate() take encoded images, as from transformers 5.23 on, and not embeddings only."""
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def _chunks(args: tuple, kwargs: dict[str, Any]) -> bool:
    config = kwargs.get("generation_config", args[0] if args else None)
    given = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    return given is not None


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _positions(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(token_ids) if mask is None else mask.long()
    return (mask.cumsum(-1) - 1).clamp(min=0)


def apply(
    model: nn.Module,
    budget: Budget | None = None,
    *,
    method: str | Method = "hired",
    grid: str = "fixed",
    newline: str = "drop",
    prompt: str = "original",
    positions: str = "compact",
    bypass: bool = True,
    **options: Any,
) -> TokenDroppingHandle:
    """Let a vision-language model read fewer visual tokens, without training.

    Works on unmodified checkpoints of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: `model(**inputs)` and
    `model.generate(**inputs)` take what the processor returns, in batches of any sizes, with several images in a
    prompt, any padding side, beams, static caches and chunked prefill. Surplus placeholders leave the prompt before the
    language model sees it, and with them their positions and their place in the KV cache. The tower stops after the
    last layer needed. Calls without images go to the stock functions. Applying again replaces the former settings.

    Args:
        model: A `...ForConditionalGeneration` model. What `torch.compile` returns is unwrapped.
        budget: How much stays. A float is a fraction of an image's visual tokens, all partitions together, padding
            included and newlines not; an int is a number of tokens of an image; a sequence has one of these for each
            image of a call. None is the method's default, 0.2 for most. Methods state what else it means.
        method: Name of a method (`zoo.hired.method_names()`), or an instance.
        grid: "fixed", or "legacy" for the swapped rows and columns of the published code, which garble images whose
            grid is not square.
        newline: Newline tokens of LLaVA-NeXT and LLaVA-OneVision behind the rows of the mosaic: "drop" them as
            published, keep "all", or those of "nonempty_rows".
        prompt: What sequences of `generate` begin with: the "original" prompt, so that slicing at its length works, or
            the "trimmed" one, which can be passed on with the cache; `handle.prompt_length` is its length.
        positions: "compact", as published, or "original" with gaps where tokens are missing.
        bypass: Leave the stock model alone if the method would keep everything. Otherwise such calls run the method
            too, which drops newlines: the published code at a budget of 1.
        **options: Of the method: for "hired" `allocation`, `alpha`, `exact`, `budget_layer`, `select_layer` and
            `spatial_budget` (see `zoo.hired.Hired`).

    Returns:
        A handle: `handle.remove()`, or a `with` statement, restores the model exactly.

    Raises:
        ValueError: An option out of its range. Calls raise it for placeholders that do not fit the images.
        NotImplementedError: A model that is not supported, with the reason.

    Source: HiRED, arXiv:2408.10945, and the papers of the other methods.
    """
    for name, value, values in (("prompt", prompt, PROMPTS), ("positions", positions, POSITIONS)):
        if value not in values:
            raise ValueError(f"{name} must be one of {values}, got {value!r}.")
    family = family_of(model)
    if isinstance(method, Method):
        if budget is not None or options:
            raise ValueError(
                "an instance of a method has its budget and options already; pass them to its constructor."
            )
    else:
        method = create_method(method, budget, **options)
    packer = Packer(grid, newline, has_newline=family.has_newline)
    # A tower that does not suit is refused here, not in the first call.
    tower = family.tower()
    if isinstance(method, TokenDropper):
        method.probes(tower)
    remove(model)
    handle = TokenDroppingHandle(family, method, packer, {"prompt": prompt, "positions": positions, "bypass": bypass})
    handle._install()
    return handle


def remove(model: nn.Module) -> bool:
    """Remove token dropping from a model; returns whether it was there."""
    handle = getattr(model, "_orig_mod", model).__dict__.get(_HANDLE)
    if handle is not None:
        handle.remove()
    return handle is not None
