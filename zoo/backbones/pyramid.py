"""What the hierarchical image models of this package share: timm's interface over a stem, stages, a tail and a head."""

from __future__ import annotations

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Base of models whose stages give maps [B, C, H, W] of falling resolution.

    A subclass sets `stages` (an `nn.Sequential`), `head` (timm's `ClassifierHead`), `feature_info`, `num_classes` and
    timm's other attributes. What comes before the stages is `embed`, what comes after them `finish`. An optional
    `extra_norms` holds one LayerNorm a stage for the features of dense tasks.
    """

    # Name of the module that `finish` applies; None for none.
    tail: str | None = "norm"

    def embed(self, x: Tensor) -> Tensor:
        """Images to the input of the first stage."""
        return self.stem(x)

    def finish(self, x: Tensor) -> Tensor:
        """The last stage's map to that of `forward_features`."""
        return self.norm(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes for none, global_pool="" for an unpooled map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and the output of `forward_features`.

        Args:
            x: Images [B, in_chans, H, W].
            indices: Stages to return: None for all, a number for the last n, or a list.
            norm: Apply what follows the last stage (`finish`) to its map too.
            stop_early: Stop after the last stage asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Return only the list of maps.

        Raises:
            ValueError: Unknown output format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NHWC", got {output_fmt!r}.')
        take, max_index = feature_take_indices(len(self.stages), indices)
        extra_norms = getattr(self, "extra_norms", None)
        intermediates = []
        x = self.embed(x)
        last = len(self.stages) - 1
        for i, stage in enumerate(self.stages if not stop_early else self.stages[: max_index + 1]):
            x = stage(x)
            if i not in take:
                continue
            y = self.finish(x) if norm and i == last else x
            if extra_norms is not None:
                # The map that goes on stays as it is.
                y = extra_norms[i](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            intermediates.append(y if output_fmt == "NCHW" else y.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        return (self.finish(x) if i == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given stages do not need; returns the stage numbers."""
        take, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        if getattr(self, "extra_norms", None) is not None:
            self.extra_norms = self.extra_norms[: max_index + 1]
        if prune_norm and self.tail:
            setattr(self, self.tail, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> map of the last stage, [B, num_features, H / 32, W / 32] for strides of 32 in all"""
        return self.finish(self.stages(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
