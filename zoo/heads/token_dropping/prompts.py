"""Prompts whose images take fewer places than the processor reserved for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# What fills the new padding of tensors that run along the tokens.
FILL = {"labels": -100}


class Trimmed(NamedTuple):
    """Prompts after trimming.

    Attributes:
        token_ids: [B, L].
        attention_mask: [B, L] int64; with the columns of earlier tokens if there is a cache.
        aligned: The other tensors along the tokens.
        padded: Whether any row has padding.
        cached: Columns of `token_ids` that are in the cache already.
    """

    token_ids: Tensor
    attention_mask: Tensor
    aligned: dict[str, Tensor]
    padded: bool
    cached: int = 0


class Lengths(NamedTuple):
    """Tokens of each image of a call, in the order of the placeholders.

    Attributes:
        stock: In the stock model.
        kept: After dropping.
        places: Which of the stock model's tokens are kept, by place in their image, or None for the first ones:
            placeholders are all alike, so that it matters for positions only.
    """

    stock: list[int]
    kept: list[int]
    places: list[Tensor] | None = None


def _repeats(is_image: Tensor, lengths: Lengths) -> Tensor:
    """How often each placeholder, [B, L] bool in order, is repeated; 1 at all other places."""
    images, found = len(lengths.kept), int(is_image.sum())
    repeats = torch.ones(is_image.shape, dtype=torch.int64)
    if found == sum(lengths.stock):
        keep = []
        for i, (stock, kept) in enumerate(zip(lengths.stock, lengths.kept, strict=True)):
            places = torch.arange(kept) if lengths.places is None else lengths.places[i]
            keep.append(torch.zeros(stock, dtype=torch.int64).index_fill_(0, places, 1))
        repeats[is_image] = torch.cat(keep)
    elif found == images:
        repeats[is_image] = torch.tensor(lengths.kept)
    elif found != sum(lengths.kept):
        raise ValueError(
            f"the prompts hold {found} image placeholders, but {images} images need {sum(lengths.stock)}, as the "
            f"processor emits them ({lengths.stock} by image), {images} (one each), or {sum(lengths.kept)} (as many as "
            "are kept). Pass the ids and the pixel values of one processor call."
        )
    return repeats


def padding_side(attention_mask: Tensor | None) -> str:
    """Side on which prompts [B, L] are padded; "left", as these models' processors do, without padding."""
    return "right" if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()) else "left"


def trim(
    token_ids: Tensor,
    attention_mask: Tensor | None,
    lengths: Lengths,
    *,
    image_token: int,
    pad_token: int,
    side: str,
    aligned: Mapping[str, Tensor] | None = None,
    past: int = 0,
    device: torch.device | None = None,
) -> Trimmed:
    """Drop the placeholders of tokens that are not kept, and pad rows anew.

    Args:
        token_ids: [B, L] int64 with a placeholder for each token of the stock model, one for each image, or already as
            many as are kept.
        attention_mask: [B, past + L] or None for no padding.
        lengths: Tokens of each image.
        image_token: Id of placeholders.
        pad_token: Id that fills padding.
        side: Where rows are padded, "left" or "right".
        aligned: Tensors [..., L] that run along the tokens: labels, position ids, token types.
        past: Tokens in the cache; their columns of the mask stay as they are.
        device: Where ids and mask go; by default where they are. The work is done on the host.

    Raises:
        ValueError: Numbers of placeholders and images do not fit.
    """
    device, (B, L) = device or token_ids.device, token_ids.shape
    token_ids, attention_mask = token_ids.cpu(), None if attention_mask is None else attention_mask.cpu()
    if attention_mask is None:
        attention_mask = torch.ones(B, past + L, dtype=torch.int64)
    if attention_mask.shape != (B, past + L):
        raise ValueError(
            f"attention_mask must be [B, L] = {[B, past + L]}, the cached tokens included, "
            f"got {tuple(attention_mask.shape)}."
        )
    real = attention_mask[:, past:] != 0
    repeats = _repeats((token_ids == image_token) & real, lengths) * real
    rows = [torch.arange(L).repeat_interleave(row) for row in repeats]
    length = max(len(row) for row in rows)
    index, mask = torch.zeros(B, length, dtype=torch.int64), torch.zeros(B, length, dtype=torch.int64)
    for b, row in enumerate(rows):
        part = slice(length - len(row), None) if side == "left" else slice(len(row))
        index[b, part], mask[b, part] = row, 1
    padded = not bool(mask.all())

    def gather(x: Tensor, fill: int) -> Tensor:
        # Leading dimensions, as of three-axis positions, share the index; a row of batch 1 serves all.
        x = x.expand(*x.shape[:-2], B, x.shape[-1])
        x = x.gather(-1, index.to(x.device).expand(*x.shape[:-1], length))
        return torch.where(mask.to(x.device) != 0, x, fill) if padded else x

    # Such copies do not wait for the device.
    ids = gather(token_ids, pad_token).to(device, non_blocking=True)
    full_mask = torch.cat((attention_mask[:, :past], mask.to(attention_mask.dtype)), 1)
    others = {name: gather(x, FILL.get(name, 0)) for name, x in (aligned or {}).items()}
    return Trimmed(ids, full_mask.to(device, non_blocking=True), others, padded)
