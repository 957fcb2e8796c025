"""Modality-mutual attention: visual tokens may look ahead at the question. A mask, nothing is dropped.

Paper: Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs,
arXiv:2503.02597.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.token_dropping.base import AttentionEdit, Budget, Prompt, Removable
from zoo.heads.token_dropping.decoder import check_decoder, check_fresh, check_window, fit_prompt, last_token


def mutual_mask(causal: Tensor, image: Tensor, question: Tensor) -> Tensor:
    """Let visual tokens attend to the question.

    Args:
        causal: [B, 1, L, T] bool (True: may attend) or additive, without the columns of padding.
        image: [B, L] bool, visual tokens.
        question: [B, L] bool, tokens of the question.

    Returns:
        The mask, of the same kind.
    """
    # [B, 1, L, T]: a cache of fixed size has columns behind the prompt.
    seen = image[:, None, :, None] & F.pad(question, (0, causal.shape[-1] - question.shape[1]))[:, None, None]
    return causal | seen if causal.dtype == torch.bool else causal.masked_fill(seen, 0)


class AKI(AttentionEdit):
    """The mask of AKI while a prompt is read; decoding is causal.

    The models that profit were trained with it: on others it is for experiments and for training.

    Args:
        budget: None; nothing is dropped.
        end_token: Id of the token that ends the question, the first of it behind the last image. None: the question is
            all text behind the last image. Training needs it: visual tokens must not see the answer.

    Raises:
        ValueError: A budget.
    """

    name: ClassVar[str] = "aki"
    default_budget: ClassVar[float | None] = None

    def __init__(self, budget: Budget | None = None, *, end_token: int | None = None) -> None:
        if budget is not None:
            raise ValueError(f"the mask of AKI drops nothing: leave budget unset, got {budget!r}.")
        self.end_token = end_token
        self._prompt: Prompt | None = None
        self._read = False
        self._model: nn.Module | None = None

    def install(self, language_model: nn.Module) -> list[Removable]:
        """A hook on the decoder as a whole."""
        check_decoder(language_model, "AKI", ("sdpa", "eager"))
        self._model = language_model
        return [language_model.register_forward_pre_hook(self._enter, with_kwargs=True)]

    def begin(self, prompt: Prompt) -> None:
        """Remember the prompt."""
        if self.end_token is not None and prompt.token_ids is None:
            raise ValueError("end_token needs token ids.")
        self._prompt, self._read = prompt, False

    def end(self) -> None:
        """Forget the prompt."""
        self._prompt = None

    def question(self, prompt: Prompt) -> Tensor:
        """[B, L] bool, text behind the last visual token."""
        place = torch.arange(prompt.image_mask.shape[1], device=prompt.image_mask.device)
        question = prompt.attention_mask & (place > last_token(prompt.image_mask)[:, None])
        if self.end_token is not None:
            question &= ((prompt.token_ids == self.end_token) & question).cumsum(1) == 0
        return question

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        cache, x = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if self._prompt is None or (cache is not None and self._read):
            return None
        from transformers.masking_utils import create_causal_mask

        check_fresh(cache, "AKI")
        check_window(module.config, None, x.shape[1], "AKI")
        prompt = fit_prompt(self._prompt, *x.shape[:2], cache is not None or bool(kwargs.get("use_cache")), "AKI")
        # The question ends where the prompt does, also where a generation without a cache appends to it.
        question = self.question(self._prompt.expand(x.shape[0]))
        question = F.pad(question, (0, x.shape[1] - question.shape[1]))
        causal = create_causal_mask(module.config, x, kwargs.get("attention_mask"), cache, allow_is_causal_skip=False)
        self._read = True
        return args, {**kwargs, "attention_mask": mutual_mask(causal, prompt.image_mask, question)}
