"""What a method of dropping visual tokens has to provide, and how the plug-in calls it.

A method is one of two kinds. A `TokenDropper` works between the vision tower and the language model: it turns the
tower's tokens of a batch of images into fewer tokens. An `AttentionEdit` works inside the language model, with hooks
on its layers. Both are made by `create_method(name, budget, **options)` from the table `METHODS`; the keyword
arguments of `apply` that the plug-in does not know go to the method's constructor.

The plug-in calls a dropper once for each batch of images:

    probes = dropper.probes(tower)            # what to record, by layer
    with dropper.inside(tower):               # methods that change the tower's blocks
        vision = tower.run(pixel_values, probes)
    kept = dropper.reduce(vision, packer)     # tokens in the order in which the language model reads them
    embeddings = projector(kept.features)     # and the prompt's placeholders are trimmed to kept.lengths

and an edit once when it is installed and around each prompt:

    removables = edit.install(language_model) # hooks
    edit.begin(prompt)                        # before generate(), or before a forward() that brings images
    ...                                       # generate() calls the language model for prefill (in chunks) and decoding
    edit.end()                                # also after an error
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from zoo.heads.token_dropping.packing import ImageGrid, Packer
    from zoo.heads.token_dropping.towers import Tower

# A fraction of the visual tokens, a number of tokens for an image, or one of these for each image of a call.
Budget = float | int | Sequence[float | int]
# Values of `Kept.source` for tokens that are not one patch of the tower.
MERGED, CLS, NEWLINE = -1, -2, -3

METHODS = {
    "hired": "hired:Hired",
    "spatial": "spatial:Spatial",
    "random": "random:Random",
    "visionzip": "visionzip:VisionZip",
    "prumerge": "prumerge:PruMerge",
    "tome": "tome:ToMe",
    "fastv": "fastv:FastV",
    "dyvte": "dyvte:DyVTE",
    "var": "var:VAR",
    "aki": "aki:AKI",
}


@dataclass(frozen=True)
class Probes:
    """Vision layers (from 0) to record.

    Attributes:
        scores: Attention to the patches, see `Vision.scores`. Costs one row of the attention map where there is a CLS
            token.
        queries, keys: Outputs of the linear projections, bias included and not scaled, of all tokens.
    """

    scores: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()


@dataclass
class Vision:
    """What the tower made of the P partitions of all images of a call, concatenated.

    Attributes:
        features: Hidden states of the feature layer, [P, T, C], with the tokens before the patches.
        prefix: Number of tokens before the patches: 1 with a CLS token, otherwise 0.
        heads: Attention heads of the tower.
        images: Partitions, grid and size of each image, in order; the partitions of an image are the whole image, then
            its sub-images row by row.
        scores: By layer, [P, N] float32: attention that each patch receives, summed over heads, from the CLS token;
            in towers without one its mean over all queries.
        queries, keys: By layer, [P, T, C] as probed.
    """

    features: Tensor
    prefix: int
    heads: int
    images: list[ImageGrid]
    scores: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)

    @property
    def patches(self) -> Tensor:
        """Features of the patches, [P, N, C]."""
        return self.features[:, self.prefix :]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split a tensor with P rows into those of each image."""
        return x.split([image.partitions for image in self.images])


@dataclass
class Kept:
    """Tokens that go to the language model, of all images of a call, concatenated.

    Attributes:
        features: [L, C], as the projector takes them; rows whose source is NEWLINE are ignored.
        lengths: Number of tokens of each image; they sum to L.
        source: [L] int64: partition * N + patch within its image, or MERGED, CLS, NEWLINE. In this order the language
            model reads them.
    """

    features: Tensor
    lengths: list[int]
    source: Tensor

    @classmethod
    def join(cls, images: Sequence[tuple[Tensor, Tensor]]) -> Kept:
        """Put together (features [n, C], source [n]) of each image."""
        features, source = zip(*images, strict=True)
        return cls(torch.cat(features), [len(x) for x in source], torch.cat(source))


@dataclass
class Prompt:
    """The prompts of a call, as the language model reads them: after trimming.

    Attributes:
        image_mask: [B, L] bool, places of visual tokens.
        attention_mask: [B, L] bool, places that are not padding.
        token_ids: [B, L] int64, where the caller gave token ids.
    """

    image_mask: Tensor
    attention_mask: Tensor
    token_ids: Tensor | None = None

    def expand(self, batch: int) -> Prompt:
        """The same for `batch` rows, a multiple of B: beams and returned sequences repeat each row in place."""
        times, rest = divmod(batch, self.image_mask.shape[0])
        if rest:
            raise ValueError(f"a batch of {batch} is no multiple of the {self.image_mask.shape[0]} prompts.")
        fields = (self.image_mask, self.attention_mask, self.token_ids)
        return Prompt(*(None if x is None else x.repeat_interleave(times, 0) for x in fields))


class Removable(Protocol):
    """What `register_forward_hook` returns."""

    def remove(self) -> None: ...


class Method(ABC):
    """A method by name. Constructors take `budget` first and the method's own options as keywords.

    Attributes:
        name: Its name in `METHODS`.
        default_budget: What `budget=None` means; None for methods that keep every token, whose constructor refuses
            another budget.
    """

    name: ClassVar[str]
    default_budget: ClassVar[float | None] = 0.2

    @property
    def is_identity(self) -> bool:
        """Whether the settings change nothing, so that the plug-in can leave the stock model alone."""
        return False


class TokenDropper(Method):
    """Selects or merges visual tokens before the language model."""

    def probes(self, tower: Tower) -> Probes:
        """Layers to record; raises NotImplementedError with the reason where a tower does not suit the method."""
        return Probes()

    def inside(self, tower: Tower) -> contextlib.AbstractContextManager[Any]:
        """Context in which the tower runs, for methods that change its blocks. The blocks must be as before after it.

        Hooks and attributes of instances are fine; swapping a `__class__` breaks transformers' recording of outputs.
        """
        return contextlib.nullcontext()

    def lengths(self, images: list[ImageGrid], packer: Packer) -> list[int] | None:
        """Number of tokens of each image, newlines included, where it follows from the images' sizes; else None.

        Known counts save a read back from the device and allow the capture of launches.
        """
        return None

    def plan(self, images: list[ImageGrid], packer: Packer, device: torch.device) -> Any:
        """Cached tensors that follow from the images' sizes which `reduce` reads; a captured graph keeps them."""
        return None

    @abstractmethod
    def reduce(self, vision: Vision, packer: Packer) -> Kept:
        """Choose or merge the tokens of all images, and put them in order."""


class TokenSelector(TokenDropper):
    """A dropper that keeps some patches as they are: it only says which ones.

    The order, the crop of padding and newline tokens are the packer's, and equal for all selectors.
    """

    @abstractmethod
    def select(self, vision: Vision, packer: Packer) -> Tensor:
        """[P, N] bool: patches to keep."""

    def reduce(self, vision: Vision, packer: Packer) -> Kept:
        """Pack the selected patches."""
        return packer.pack(vision, self.select(vision, packer), self.lengths(vision.images, packer))


class AttentionEdit(Method):
    """Changes attention, or drops tokens, inside the language model."""

    @abstractmethod
    def install(self, language_model: nn.Module) -> list[Removable]:
        """Register hooks on the decoder (`layers`, `rotary_emb`, `norm`, `config`), inert while there is no prompt.

        Raises:
            NotImplementedError: The decoder's attention implementation does not suit the method, and what to choose.
        """

    @abstractmethod
    def begin(self, prompt: Prompt) -> None:
        """A prompt with images is about to be read: prefill, perhaps in chunks, then decoding; see `Prompt.expand`."""

    @abstractmethod
    def end(self) -> None:
        """The call is over: forget the prompt."""


def method_names() -> list[str]:
    """Names that `create_method` and `apply` take."""
    return sorted(METHODS)


def create_method(name: str, budget: Budget | None = None, **options: Any) -> Method:
    """Make a method by name.

    Raises:
        ValueError: An unknown name, or options that the method does not take.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {method_names()}, got {name!r}.")
    module, cls = METHODS[name].split(":")
    return getattr(import_module(f"zoo.heads.token_dropping.{module}"), cls)(budget, **options)


def check_budget(budget: Budget | None, default: float | None) -> Budget | None:
    """The budget, or the default; checked.

    Raises:
        ValueError: A fraction outside (0, 1], a negative number of tokens, or another type.
    """
    if budget is None:
        return default
    if isinstance(budget, (list, tuple)):
        if not budget:
            raise ValueError("a sequence of budgets needs one for each image, got none.")
        return [check_budget(each, None) for each in budget]
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget must be a fraction, a number of tokens or a sequence of these, got {budget!r}.")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"a budget of type float is a fraction in (0, 1], got {budget}; a number of tokens is an int.")
    if budget < 1 and isinstance(budget, int):
        raise ValueError(f"a budget of type int is a number of tokens, at least 1, got {budget}.")
    return budget


def each_budget(budget: Budget, images: int) -> list[float | int]:
    """One budget for each image.

    Raises:
        ValueError: A sequence of another length.
    """
    if not isinstance(budget, list):
        return [budget] * images
    if len(budget) != images:
        raise ValueError(f"budget has an entry for {len(budget)} images, but the call brings {images}.")
    return budget


def total_tokens(budget: float | int, tokens: int) -> int:
    """Number of tokens of a budget; a fraction is cut, not rounded, as published."""
    return min(int(tokens * budget), tokens) if isinstance(budget, float) else min(budget, tokens)
