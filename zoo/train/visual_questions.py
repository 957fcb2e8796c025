"""The training of the small vision-language model as a LightningModule: several devices, checkpoints, loggers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from zoo.heads.tiny_vlm import CLASSES, build_tiny_vlm
from zoo.train.scenes import TYPES, GarmentPool, Questioner, compose
from zoo.train.seeding import mix_seed, run_seed
from zoo.train.vlm import Recipe, VisualQuestionLoss, parameter_groups, save, tower_layers


class VisualQuestions(LightningModule):
    """Trains a vision-language model on scenes composed of the garments of each batch.

    The data module must give the images of Fashion-MNIST as they are, 28 pixels a side in [-1, 1] (mean and std of
    0.5), in batches large enough to hold every class. `zoo.train.vlm` does the same on one GPU in less time.

    Args:
        num_classes: Number of classes, 10; the command line takes it from the data.
        scenes: Scenes of a step and device.
        questions: Questions about each scene.
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW, for matrices only.
        warmup_steps: Updates of linear warm-up; a cosine to zero follows.
        scene: Further arguments of `zoo.train.scenes.compose`.
        vision, text: Changes of the model, see `zoo.heads.tiny_vlm.build_tiny_vlm`.
        compile: Whether to compile the layers of both towers.
        folder: Where the model is written when the training ends, None for nowhere.
    """

    def __init__(
        self,
        num_classes: int = len(CLASSES),
        scenes: int = 256,
        questions: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
        scene: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        compile: bool = False,
        folder: str | None = None,
    ):
        super().__init__()
        if num_classes != len(CLASSES):
            raise ValueError(f"questions are about the {len(CLASSES)} classes of Fashion-MNIST, got {num_classes=}")
        self.save_hyperparameters()
        self.model = build_tiny_vlm(vision, text)
        self.objective = VisualQuestionLoss(self.model, Recipe())
        if compile:
            for layer in [*tower_layers(self.model), *self.model.model.language_model.layers]:
                layer.compile()

    def measure(self, images: Tensor, labels: Tensor, *place: int) -> dict[str, Tensor]:
        """Losses of scenes of a batch, see `VisualQuestionLoss`.

        Args:
            images: `[B, 3, 28, 28]` in [-1, 1].
            labels: `[B]` int64.
            *place: In the run; scenes and questions follow from it, whatever happened before.
        """
        hparams, vision = self.hparams, self.model.config.vision_config
        seed = mix_seed(run_seed(), *place)
        index = torch.arange(hparams.scenes, device=images.device)
        # Places in half precision would be off by pixels.
        with torch.autocast(images.device.type, enabled=False):
            pixels = ((images.float().mean(1) + 1) * 127.5).round().byte()
            pool = GarmentPool(pixels, labels, images.device)
            scenes = compose(pool, seed, index, vision.image_size, vision.patch_size, **(hparams.scene or {}))
            types = (torch.arange(hparams.questions, device=images.device) + index[:, None]) % len(TYPES)
            questions = Questioner(images.device).ask(scenes, seed, index, types)
        return self.objective(scenes, questions)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        out = self.measure(*batch, self.trainer.current_epoch, batch_idx, self.global_rank)
        self.log_dict({f"train/{name}": out[name] for name in ("loss", "answer", "attention")}, prog_bar=True)
        return out["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and share of right answers on held-out garments, on the same scenes in each validation."""
        out = self.measure(*batch, -1, batch_idx, self.global_rank)
        values = {"val/loss": out["answer"], "val/accuracy": out["correct"].float().mean()}
        self.log_dict(values, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=self.hparams.scenes)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, linear warm-up and cosine, stepped per update."""
        hparams = self.hparams
        groups = parameter_groups(self.objective, hparams.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=(0.9, 0.98))
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("the learning rate schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        warmup = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1 / hparams.warmup_steps, total_iters=hparams.warmup_steps
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - hparams.warmup_steps))
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [hparams.warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        """Write the model; the callback of averaged weights has put them in place by now."""
        if self.hparams.folder and self.trainer.is_global_zero:
            save(self.model, Path(self.hparams.folder))
