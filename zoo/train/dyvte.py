"""Training of the routers of DyVTE (zoo.heads.token_dropping.dyvte) on a frozen vision-language model.

Paper: Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings,
arXiv:2411.19628.

A step draws a layer, runs the model with all tokens and once more without visual tokens from that layer on, and labels
a prompt "leave" if its answer stays the same. The router of the layer learns that label.

    zoo fit --model zoo.train.dyvte.DyVTETraining --model.init_args.model llava-hf/llava-1.5-7b-hf \\
        --model.init_args.save_to routers.safetensors --data YOUR_DATA_MODULE --trainer.max_epochs 1
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.heads.token_dropping import apply
from zoo.heads.token_dropping.base import Prompt
from zoo.heads.token_dropping.dyvte import WIDTH, DyVTE, create_routers, exit_features, save_routers


def answer_prompt(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, image_token: int) -> Prompt:
    """The part of each row, [B, L], that a model reads before it answers: in front of the first label."""
    place = torch.arange(labels.shape[1], device=labels.device)
    first = torch.where(labels != -100, place, labels.shape[1]).amin(1, keepdim=True)
    return Prompt(input_ids == image_token, (attention_mask != 0) & (place < first), input_ids)


def stays_the_same(full: Tensor, early: Tensor, labels: Tensor, agreement: float, loss_ratio: float) -> Tensor:
    """Whether an answer survives an early exit.

    Args:
        full: Logits [B, L, V] of the model with all tokens.
        early: Those without visual tokens from some layer on.
        labels: [B, L], -100 outside the answers.
        agreement: Least share of the answer's tokens whose most probable choice is the same.
        loss_ratio: The loss must be smaller than that of the model with all tokens, times this.

    Returns:
        [B] bool.
    """
    target = labels[:, 1:]
    answer = target != -100
    count = answer.sum(1).clamp(min=1)
    full, early = full[:, :-1], early[:, :-1]
    same = ((full.argmax(-1) == early.argmax(-1)) & answer).sum(1) / count
    losses = [
        F.cross_entropy(x.float().mT, target, ignore_index=-100, reduction="none").sum(1) / count for x in (full, early)
    ]
    return (same >= agreement) & (losses[1] < loss_ratio * losses[0])


class DyVTETraining(LightningModule):
    """Routers of one model; the model itself is frozen and not part of checkpoints.

    A batch is what the model's processor returns, with `labels` that are -100 outside the answer. One router learns in
    a step: on several devices use `--trainer.strategy ddp_find_unused_parameters_true`.

    Args:
        model: A vision-language model that `zoo.hired.apply` supports, or its name or folder.
        width: Hidden units of a router.
        lr: Peak learning rate of AdamW, with cosine decay.
        warmup: Share of steps with linear warm-up.
        agreement: Share of the answer's tokens that have to stay the same for "leave".
        loss_ratio: Growth of the loss that "leave" has to stay below.
        save_to: File for the routers when training ends, as `DyVTE(routers=...)` reads it.
    """

    def __init__(
        self,
        model: str | nn.Module,
        width: int = WIDTH,
        lr: float = 6e-5,
        warmup: float = 0.03,
        agreement: float = 0.99,
        loss_ratio: float = 1.03,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        if isinstance(model, str):
            from transformers import AutoModelForImageTextToText

            model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        text = model.config.get_text_config()
        # In a list, so that it is no submodule.
        self._frozen = [model.eval().requires_grad_(False)]
        self.routers = create_routers(text.hidden_size, text.num_hidden_layers, width)

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self._frozen[0]

    def on_fit_start(self) -> None:
        """Put the frozen model beside the routers."""
        self.model.to(self.device)

    def on_validation_start(self) -> None:
        """The same for validation alone."""
        self.model.to(self.device)

    @torch.no_grad()
    def examples(self, batch: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """Features [B, 2 * C] that the router of a layer reads, and whether it should say "leave" [B] int64."""
        labels, seen = batch["labels"], {}
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        prompt = answer_prompt(ids, mask, labels, self.model.config.image_token_id)

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen["features"] = exit_features(args[0] if args else kwargs["hidden_states"], prompt)

        hook = self.model.model.language_model.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            full = self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        with apply(self.model, method=DyVTE(exit_layer=layer)):
            early = self.model(**inputs, use_cache=False).logits
        leave = stays_the_same(full, early, labels, self.hparams.agreement, self.hparams.loss_ratio)
        return seen["features"].float(), leave.long()

    def _step(self, batch: dict[str, Tensor], layer: int, stage: str) -> Tensor:
        features, leave = self.examples(batch, layer)
        logits = self.routers[layer - 1](features)
        loss = F.cross_entropy(logits, leave)
        values = {"loss": loss, "acc": (logits.argmax(-1) == leave).float().mean(), "leave": leave.float().mean()}
        values = {f"{stage}/{name}": value.detach() for name, value in values.items()}
        self.log_dict(values, batch_size=len(leave), sync_dist=stage == "val")
        return loss

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one router."""
        return self._step(batch, int(torch.randint(1, len(self.routers) + 1, ())), "train")

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """The same; layers take turns."""
        self._step(batch, 1 + index % len(self.routers), "val")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; warm-up and cosine over all steps."""
        from transformers import get_cosine_schedule_with_warmup

        optimizer = torch.optim.AdamW(self.routers.parameters(), self.hparams.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_cosine_schedule_with_warmup(optimizer, int(self.hparams.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Write the routers."""
        if self.hparams.save_to is not None and self.global_rank == 0:
            save_routers(self.routers, self.hparams.save_to)
