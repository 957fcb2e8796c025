"""Attention processors of the supported diffusers models.

Each subclasses the stock processor of its model and differs from it in one place only: the call of attention. Layers
whose heads are all full, and calls whose token grid is unknown, run the stock processor itself, so that the user's
attention backend and the exact numbers are kept.

`Attention.forward` passes on only those arguments that `__call__` names, hence the full signatures. Projections are
called as modules, never by their weights, which adapters, quantisation and offloading replace.
"""

from __future__ import annotations

import torch
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention_dispatch import SeqAllToAllDim
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, MochiAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as apply_rotary_emb_ltx
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from zoo.heads.sparse_vdit.context import Step

Rotary = tuple[Tensor, Tensor]


class SparseProcessor:
    """What the processors share.

    Attributes:
        layer: Number of the planned layer.
        step: What the root's hook knows about the running forward pass.
        active: Whether this layer is sparse in this pass.
        pattern_ids: `[M]` integer tensor, the pattern of each head in this pass; a tensor and not a list, so that
            layers with different plans share one compiled graph.
    """

    # diffusers writes these two on the processor of every attention.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, layer: int, step: Step) -> None:
        super().__init__()
        self.layer = layer
        self.step = step
        self.active = False
        self.pattern_ids: Tensor | None = None

    @property
    def parallel(self):
        """diffusers' configuration of context parallelism, None without it."""
        return None if self._parallel_config is None else self._parallel_config.context_parallel_config

    def is_sparse(self, tokens: int) -> bool:
        """Whether a joint sequence of so many tokens on this device takes the sparse path in this pass."""
        if not self.active:
            return False
        if self.parallel is not None:
            reason = self._obstacle()
            if reason is not None:
                self.step.warn(reason)
                return False
            tokens *= self.parallel.ulysses_degree
        if tokens != self.step.tokens:
            self.step.warn(f"an attention has {tokens} tokens where the token grid has {self.step.tokens}")
            return False
        return True

    def _obstacle(self) -> str | None:
        """Why context parallelism and patterns do not go together here, None where each device can take some heads."""
        config = self.parallel
        if config.ring_degree > 1:
            return "ring attention splits the keys of a head over devices; Ulysses (ulysses_degree) does not"
        if config.ulysses_anything:
            return "ulysses_anything pads heads and sequences"
        if len(self.pattern_ids) % config.ulysses_degree:
            return f"{len(self.pattern_ids)} heads do not divide over ulysses_degree={config.ulysses_degree} devices"
        if self.step.layout.text:
            return "context parallelism splits video and text apart"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_length: Tensor | None = None) -> Tensor:
        """Attention with this pass's pattern of each head.

        Under Ulysses parallelism a device holds a part of the sequence. Devices exchange parts for heads, each attends
        with the patterns of its own heads, and they exchange back.

        Args:
            q, k, v: `[B, S, M, D]`, in the model's order of the joint sequence.
            text_length: `[B]`, valid text tokens of each sample; None means all.

        Returns:
            `[B, S, M * D]`, dtype of `q`.
        """
        ids, parallel = self.pattern_ids, self.parallel
        if parallel is not None:
            group = parallel._ulysses_mesh.get_group()
            # [B, S / P, M, D] -> [B, S, M / P, D]
            q, k, v = (SeqAllToAllDim.apply(group, x, 2, 1) for x in (q, k, v))
            ids = ids.chunk(parallel.ulysses_degree)[parallel._ulysses_local_rank]
        # [B, S, M, D] -> [B, M, S, D]
        out = self.step.attention(self.layer, ids, *(x.transpose(1, 2) for x in (q, k, v)), text_length)
        out = out.transpose(1, 2).to(q.dtype)
        if parallel is not None:
            # [B, S, M / P, D] -> [B, S / P, M, D]
            out = SeqAllToAllDim.apply(group, out, 1, 2)
        return out.flatten(2, 3)


class SparseWanProcessor(SparseProcessor, WanAttnProcessor):
    """Self-attention of Wan 2.1 and 2.2."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        plain = encoder_hidden_states is None and attention_mask is None
        if not (plain and self.is_sparse(hidden_states.shape[1])):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # [B, S, M * D] -> [B, S, M, D]
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = _rotate_pairs(q, *rotary_emb), _rotate_pairs(k, *rotary_emb)
        out = self.attend(q, k, v)
        return attn.to_out[1](attn.to_out[0](out))


class SparseLTXProcessor(SparseProcessor, LTXVideoAttnProcessor):
    """Self-attention of LTX-Video."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        plain = encoder_hidden_states is None and attention_mask is None
        if not (plain and self.is_sparse(hidden_states.shape[1])):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        q = attn.norm_q(attn.to_q(hidden_states))
        k = attn.norm_k(attn.to_k(hidden_states))
        v = attn.to_v(hidden_states)
        # Rotation spans all heads together, before they are split.
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb_ltx(q, image_rotary_emb), apply_rotary_emb_ltx(k, image_rotary_emb)
        # [B, S, M * D] -> [B, S, M, D]
        out = self.attend(*(x.unflatten(2, (attn.heads, -1)) for x in (q, k, v)))
        return attn.to_out[1](attn.to_out[0](out))


class SparseCogVideoXProcessor(SparseProcessor, CogVideoXAttnProcessor2_0):
    """Joint attention of CogVideoX 1.0 and 1.5; text comes first."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        if attention_mask is not None or not self.is_sparse(text + hidden_states.shape[1]):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        # [B, S, M * D] -> [B, S, M, D]
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], image_rotary_emb, sequence_dim=1)], dim=1)
                for x in (q, k)
            )
        out = self.attend(q, k, v)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


class SparseHunyuanVideoProcessor(SparseProcessor, HunyuanVideoAttnProcessor2_0):
    """Joint attention of HunyuanVideo's double- and single-stream blocks; text comes last, its padding masked."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        joint = encoder_hidden_states is not None
        # A mask of queries and keys, or of numbers to add, is none that the model makes.
        known = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1))
        tokens = hidden_states.shape[1] + (encoder_hidden_states.shape[1] if joint else 0)
        if not (joint and known and self.is_sparse(tokens)):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        video = hidden_states.shape[1]
        q, k, v = _hunyuan_projections(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        text_length = None
        if attention_mask is not None:
            # The model allows a prefix of the joint sequence, as [B, 1, 1, S].
            text_length = attention_mask.flatten(1).sum(1, dtype=torch.int32) - video
        out = self.attend(q, k, v, text_length)
        out, encoder_out = out[:, :video], out[:, video:]
        if getattr(attn, "to_out", None) is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_out = attn.to_add_out(encoder_out)
        return out, encoder_out


class SparseMochiProcessor(SparseProcessor, MochiAttnProcessor2_0):
    """Joint attention of Mochi; text comes last, and its padding takes no part."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        if not self.is_sparse(video + text):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        # The stock processor gathers the valid text tokens in front and leaves them there.
        valid = attention_mask.flatten(1).bool()
        order = torch.sort(valid.to(torch.uint8), dim=1, descending=True, stable=True).indices
        # [B, T] -> [B, T, C]
        encoder_hidden_states = encoder_hidden_states.gather(
            1, order[..., None].expand(-1, -1, encoder_hidden_states.shape[2])
        )
        q, k, v = _mochi_projections(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        text_length = valid.sum(1, dtype=torch.int32)
        out = self.attend(q, k, v, text_length)
        out, encoder_out = out[:, :video], out[:, video:]
        # Padded rows are zero in the stock processor.
        kept = torch.arange(text, device=out.device) < text_length[:, None]
        encoder_out = encoder_out.masked_fill(~kept[..., None], 0)
        out = attn.to_out[1](attn.to_out[0](out))
        if hasattr(attn, "to_add_out"):
            encoder_out = attn.to_add_out(encoder_out)
        return out, encoder_out


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of Wan: neighbouring channels are a pair, its angle stands twice in `cos` and `sin`."""
    # [B, S, M, D] -> 2 x [B, S, M, D / 2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def _hunyuan_projections(attn, video: Tensor, text: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Joint queries, keys and values, `[B, S, M, D]`, video then text."""
    single_stream, length = attn.add_q_proj is None, video.shape[1]
    x = torch.cat([video, text], dim=1) if single_stream else video
    # [B, S, M * D] -> [B, S, M, D]
    q, k, v = (to(x).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    if rotary is not None:
        q, k = (
            torch.cat([apply_rotary_emb(x[:, :length], rotary, sequence_dim=1), x[:, length:]], dim=1) for x in (q, k)
        )
    if single_stream:
        return q, k, v
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_q, text_k, text_v = (to(text).unflatten(2, (attn.heads, -1)) for to in added)
    text_q = text_q if attn.norm_added_q is None else attn.norm_added_q(text_q)
    text_k = text_k if attn.norm_added_k is None else attn.norm_added_k(text_k)
    return torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)


def _mochi_projections(attn, video: Tensor, text: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Joint queries, keys and values, `[B, S, M, D]`, video then text."""
    # [B, S, M * D] -> [B, S, M, D]
    q, k, v = (to(video).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_q, text_k, text_v = (to(text).unflatten(2, (attn.heads, -1)) for to in added)
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    text_q = text_q if attn.norm_added_q is None else attn.norm_added_q(text_q)
    text_k = text_k if attn.norm_added_k is None else attn.norm_added_k(text_k)
    if rotary is not None:
        q, k = _rotate_mochi(q, *rotary), _rotate_mochi(k, *rotary)
    return torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)


def _rotate_mochi(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of Mochi: angles of each head, computed in float32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _skip_video_only(attn, *args, **kwargs):
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _skip_video_and_text(attn, *args, **kwargs):
    names = ("hidden_states", "encoder_hidden_states")
    found = dict(zip(names, args, strict=False), **{name: kwargs[name] for name in names if name in kwargs})
    return found["hidden_states"], found.get("encoder_hidden_states")


def register_with_skip_guiders() -> None:
    """Tell diffusers what skipping an attention returns: layer-skip guiders look it up by the processor's class."""
    single, joint = AttentionProcessorMetadata(_skip_video_only), AttentionProcessorMetadata(_skip_video_and_text)
    for cls in (SparseWanProcessor, SparseLTXProcessor):
        AttentionProcessorRegistry.register(cls, single)
    for cls in (SparseCogVideoXProcessor, SparseHunyuanVideoProcessor, SparseMochiProcessor):
        AttentionProcessorRegistry.register(cls, joint)
