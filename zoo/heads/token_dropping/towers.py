"""Running a vision tower layer by layer: it stops after the last layer needed, and leaves probes of its attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from zoo.heads.token_dropping.base import Probes, Vision
from zoo.heads.token_dropping.packing import ImageGrid
from zoo.kernels.token_select import cls_attention

# Largest attention map that is held at a time while mean received attention is computed, in elements.
MAX_MAP = 2**27


class Tower:
    """A CLIP or SigLIP vision tower of transformers.

    Only its modules are called, never changed.

    Attributes:
        layers: Its blocks.
        heads: Attention heads.
        prefix: Tokens before the patches: 1 (CLS) or 0.
        side: Patches along a side of a partition.
        pixels: Pixels along a side of a partition.
        feature_layers: Hidden states that make up the features, counted as transformers does: 0 is the embedding and i
            is the output of block i - 1.
    """

    def __init__(self, tower: nn.Module, feature_layer: int | Sequence[int]) -> None:
        # Before transformers 5 the tower was one level deeper.
        body = getattr(tower, "vision_model", tower)
        config = tower.config
        layers = getattr(getattr(body, "encoder", None), "layers", None)
        if layers is None or not hasattr(layers[0].self_attn, "q_proj"):
            raise NotImplementedError(
                f"token dropping needs a CLIP or SigLIP vision tower, whose blocks have q_proj and k_proj; "
                f"got {type(tower).__name__}."
            )
        self.module, self.embeddings, self.layers = tower, body.embeddings, layers
        self.pre_norm = getattr(body, "pre_layrnorm", None)
        self.heads = config.num_attention_heads
        self.prefix = int(hasattr(body.embeddings, "class_embedding"))
        self.side, self.pixels = config.image_size // config.patch_size, config.image_size
        given = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        self.feature_layers = [i % (len(layers) + 1) for i in given]

    @property
    def last_feature_block(self) -> int:
        """Block whose output is the last feature layer, from 0."""
        return max(max(self.feature_layers) - 1, 0)

    def resolve(self, layer: int) -> int:
        """A block by a number that may count from the end.

        Raises:
            ValueError: There is no such block.
        """
        if not -len(self.layers) <= layer < len(self.layers):
            raise ValueError(f"the vision tower has {len(self.layers)} layers, got layer {layer}.")
        return layer % len(self.layers)

    def run(self, pixel_values: Tensor, images: list[ImageGrid], probes: Probes) -> Vision:
        """Features and probes of partitions [P, 3, H, W]; blocks behind the last one needed do not run."""
        vision = Vision(pixel_values, self.prefix, self.heads, images)
        wanted = (*probes.scores, *probes.queries, *probes.keys)
        blocks = max([self.last_feature_block, *wanted]) + 1
        with self._probe(vision, probes):
            hidden = self.embeddings(pixel_values.to(self.embeddings.patch_embedding.weight.dtype))
            hidden = hidden if self.pre_norm is None else self.pre_norm(hidden)
            kept = {0: hidden}
            for i, layer in enumerate(self.layers[:blocks], 1):
                hidden = layer(hidden, attention_mask=None)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                if i in self.feature_layers:
                    kept[i] = hidden
        features = [kept[i] for i in self.feature_layers]
        vision.features = features[0] if len(features) == 1 else torch.cat(features, -1)
        return vision

    @contextlib.contextmanager
    def _probe(self, vision: Vision, probes: Probes) -> Iterator[None]:
        """Hooks on the projections of the probed blocks."""
        hooks = []
        try:
            for i in {*probes.scores, *probes.queries, *probes.keys}:
                attention, queries = self.layers[i].self_attn, {}

                def keep_queries(module, args, out, i=i, queries=queries) -> None:
                    if i in probes.scores:
                        queries[i] = out[:, 0] if self.prefix else out
                    if i in probes.queries:
                        vision.queries[i] = out

                def keep_keys(module, args, out, i=i, queries=queries) -> None:
                    if i in probes.scores:
                        vision.scores[i] = self._score(queries.pop(i), out)
                    if i in probes.keys:
                        vision.keys[i] = out

                hooks.append(attention.q_proj.register_forward_hook(keep_queries))
                hooks.append(attention.k_proj.register_forward_hook(keep_keys))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[P, N] float32 attention that the patches receive, summed over heads."""
        with torch.no_grad():
            if self.prefix:
                return cls_attention(queries, keys, self.heads).sum(1)[:, self.prefix :]
            return received_attention(queries, keys, self.heads)


def received_attention(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention that each token receives, the mean over all queries, summed over heads: [P, T, C] twice -> [P, T]."""
    scale = (keys.shape[-1] // heads) ** -0.5
    chunk = max(MAX_MAP // (heads * keys.shape[1] ** 2), 1)
    out = []
    for q, k in zip(queries.split(chunk), keys.split(chunk), strict=True):
        # [P, T, C] -> [P, M, T, D]
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (q, k))
        out.append((q * scale @ k.transpose(-1, -2)).softmax(-1).mean(-2).sum(1))
    return torch.cat(out)
