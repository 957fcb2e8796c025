"""Semantic segmentation: a backbone with a head, its loss, schedules and mean IoU as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from zoo.heads.segmentation import create_segmenter
from zoo.train.data.segmentation import IGNORE
from zoo.train.detection import parameter_groups
from zoo.train.seeding import mix_seed, run_seed, seed_global

Batch = tuple[Tensor, Tensor]


class SemanticSegmenter(LightningModule):
    """Trains a segmenter of `zoo.heads.segmentation.create_segmenter` with AdamW.

    The loss is the cross entropy averaged over the labelled pixels of a batch; label 255 is ignored. Validation and
    test log the mean IoU over the classes that occur in labels or predictions (`val/miou`) and the share of right
    pixels (`val/acc`), both at the size of the labels.

    Args:
        backbone: Name of an image model of this package or of timm.
        num_classes: Number of classes; the command line takes it from the data.
        head: Semantic FPN or UPerNet.
        pretrained_backbone: Whether the backbone starts from pretrained weights.
        backbone_kwargs: Further arguments of the backbone, such as ``drop_path_rate``.
        head_kwargs: Further arguments of the head, such as ``channels``.
        dropout: Rate of channel dropout before the classifiers.
        auxiliary_weight: Weight of the auxiliary head's loss, 0 for no such head; None means 0.4 with UPerNet and 0
            with Semantic FPN.
        lr: Peak learning rate.
        weight_decay: Decay of AdamW.
        no_decay: Parameters whose name has one of these parts are not decayed.
        betas: Of AdamW.
        scheduler: Learning rate schedule of timm, such as poly or cosine.
        power: Exponent of the poly schedule.
        warmup_steps: Updates of linear warm-up, included in the run's updates.
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end of the schedule.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        head: Literal["semantic_fpn", "upernet"] = "semantic_fpn",
        pretrained_backbone: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
        head_kwargs: dict[str, Any] | None = None,
        dropout: float = 0.1,
        auxiliary_weight: float | None = None,
        lr: float = 2e-4,
        weight_decay: float = 1e-4,
        no_decay: Sequence[str] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        scheduler: Literal["poly", "cosine", "constant"] = "poly",
        power: float = 1.0,
        warmup_steps: int = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__()
        # A checkpoint holds plain types only, so that it loads with weights_only=True.
        no_decay, betas = list(no_decay), list(betas)
        self.save_hyperparameters()
        # Heads are random at first, whatever the backbone: the command line must not measure them.
        self.hparams["pretrained"] = False
        if auxiliary_weight is None:
            auxiliary_weight = 0.4 if head == "upernet" else 0.0
        self.auxiliary_weight = auxiliary_weight
        self.net = create_segmenter(
            backbone, head, num_classes, pretrained_backbone, auxiliary=auxiliary_weight > 0, dropout=dropout,
            backbone_kwargs=backbone_kwargs, head_kwargs=head_kwargs,
        )  # fmt: skip
        for stage in ("val", "test"):
            setattr(self, f"{stage}_miou", MulticlassJaccardIndex(num_classes, ignore_index=IGNORE))
            setattr(self, f"{stage}_acc", MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes, H, W]` of images `[B, 3, H, W]`."""
        return self.net(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the random draws of a step a function of its place in the run, whatever happened before."""
        seed_global(mix_seed(run_seed(), self.trainer.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        images, labels = batch
        logits, auxiliary = self.net.forward_training(images)
        loss = pixel_cross_entropy(logits, labels)
        if auxiliary is not None:
            side_loss = pixel_cross_entropy(auxiliary, labels)
            self.log("train/auxiliary_loss", side_loss)
            loss = loss + self.auxiliary_weight * side_loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        # The images were resized for the network, the labels were not.
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        log = dict(on_step=False, on_epoch=True, batch_size=len(images))
        self.log(f"{stage}/loss", pixel_cross_entropy(logits, labels), sync_dist=True, **log)
        found = logits.argmax(1)
        for name in ("miou", "acc"):
            metric = getattr(self, f"{stage}_{name}")
            metric.update(found, labels)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "miou", **log)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean IoU, accuracy and loss on validation images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean IoU, accuracy and loss on test images."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class of each pixel, `[B, H, W]` int64, of a batch of images, with or without labels."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).argmax(1)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and a schedule that is stepped per update."""
        hparams = self.hparams
        groups = parameter_groups(self.net, hparams.weight_decay, hparams.no_decay)
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=tuple(hparams.betas))
        updates = self.trainer.estimated_stepping_batches
        if math.isinf(updates):
            raise ValueError("the learning rate schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        # One "epoch" is one update here, as published segmentation schedules count updates.
        schedule, _ = create_scheduler_v2(
            optimizer, sched=hparams.scheduler, num_epochs=int(updates), warmup_epochs=hparams.warmup_steps,
            warmup_lr=hparams.warmup_lr, min_lr=hparams.min_lr, decay_rate=hparams.power, step_on_epochs=False,
            updates_per_epoch=1,
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler, metric: Any) -> None:
        """Set the learning rate of the next update from the number of updates done."""
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a user of the weights needs beside them."""
        data = self.trainer.datamodule
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        checkpoint["zoo"] = {"data_config": getattr(data, "data_config", None), "metrics": metrics}


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy averaged over labelled pixels, in float32; 0 where no pixel is labelled.

    Args:
        logits: `[B, K, H, W]`.
        labels: `[B, H, W]` int64, 255 where a pixel has no label.
    """
    total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)
