"""Video diffusion: a small video DiT learns clips of moving images by flow matching."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.backbones.video_dit import create_video_dit, label_embeds
from zoo.train.export import read_checkpoint
from zoo.train.moving import moving_images
from zoo.train.seeding import mix_seed, run_seed

TRAIN_TIMESTEPS = 1000
_PREFIX = "net."


class VideoDiffusion(LightningModule):
    """Trains a class-conditional video DiT on the images of an image data module, set in motion.

    The data module must give pixels in [-1, 1]: mean and std of 0.5. Loss: the mean squared error of the velocity
    `noise - clip` at `(1 - sigma) * clip + sigma * noise` (flow matching, arXiv:2210.02747).

    Args:
        num_classes: Number of classes; the command line takes it from the data.
        model: `video_dit_nano` or `video_dit_small`.
        model_kwargs: Further arguments of `zoo.backbones.video_dit.create_video_dit`.
        channels: Channels of a frame: 1 averages those of the images.
        size: Height and width of a clip, pixels.
        frames: Frames of a clip.
        shift: Above 1, more of the noise levels are high, in training and in sampling (arXiv:2403.03206).
        drop_label: Share of clips that are learnt without their label, for classifier-free guidance.
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW, for matrices only.
        warmup_steps: Updates of linear warm-up; a cosine to zero follows.
        compile: Whether to train through `torch.compile`.
        pipeline: Folder that the trained pipeline is written to when the training ends, None for none.
    """

    def __init__(
        self,
        num_classes: int,
        model: str = "video_dit_nano",
        model_kwargs: dict[str, Any] | None = None,
        channels: int = 1,
        size: int = 32,
        frames: int = 8,
        shift: float = 2.0,
        drop_label: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
        compile: bool = False,
        pipeline: str | None = None,
    ):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if not 0 <= drop_label < 1:
            raise ValueError(f"drop_label must lie in [0, 1), got {drop_label}")
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.save_hyperparameters()
        self.net = create_video_dit(model, num_classes, channels, **(model_kwargs or {}))
        if compile:
            self.net.compile()

    def _generator(self, *place: int) -> torch.Generator:
        """Draws that follow from the place in the run, whatever happened before."""
        return torch.Generator(self.device).manual_seed(mix_seed(run_seed(), *place))

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Flow-matching loss of a batch.

        Args:
            images: `[B, C, h, w]` in [-1, 1].
            labels: `[B]` int64.
            generator: Of motion, noise, noise levels and dropped labels, on the device of the images.

        Returns:
            Scalar, float32.
        """
        hparams = self.hparams
        if hparams.channels == 1:
            images = images.mean(1, keepdim=True)
        clips = moving_images(images, hparams.frames, hparams.size, generator)
        place = dict(generator=generator, device=clips.device)
        noise = torch.randn(clips.shape, **place)
        sigma = torch.rand(len(clips), **place)
        sigma = hparams.shift * sigma / (1 + (hparams.shift - 1) * sigma)
        dropped = torch.rand(len(clips), **place) < hparams.drop_label
        labels = labels.masked_fill(dropped, hparams.num_classes)
        noisy = torch.lerp(clips, noise, sigma.view(-1, 1, 1, 1, 1))
        condition = label_embeds(labels, hparams.num_classes)
        velocity = self.net(noisy, sigma * TRAIN_TIMESTEPS, encoder_hidden_states=condition, return_dict=False)[0]
        return nn.functional.mse_loss(velocity.float(), noise - clips)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.loss(*batch, self._generator(self.trainer.current_epoch, batch_idx, self.global_rank))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss on held-out images, with the same motion and noise in each validation."""
        loss = self.loss(*batch, self._generator(-1, batch_idx, self.global_rank))
        self.log("val/loss", loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, linear warm-up and cosine, stepped per update."""
        hparams = self.hparams
        decayed = {name: p.ndim > 1 and "table" not in name for name, p in self.net.named_parameters()}
        groups = [
            {"params": [p for name, p in self.net.named_parameters() if decayed[name] == on], "weight_decay": decay}
            for on, decay in ((True, hparams.weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=(0.9, 0.99))
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("the learning rate schedule needs an end: set trainer.max_epochs or trainer.max_steps")

        def factor(step: int) -> float:
            if step < hparams.warmup_steps:
                return (step + 1) / hparams.warmup_steps
            progress = (step - hparams.warmup_steps) / max(1, total - hparams.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        """Write the pipeline; the callback of averaged weights has put them in place by now."""
        if self.hparams.pipeline and self.trainer.is_global_zero:
            save_pipeline(self.hparams.pipeline, self.hparams, self.net.state_dict(), self._class_names())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the names of the classes."""
        checkpoint["zoo"] = {"class_names": self._class_names()}

    def _class_names(self) -> list[str] | None:
        names = getattr(self.trainer.datamodule, "class_names", None)
        return None if names is None else [str(name) for name in names]


def save_pipeline(
    folder: str | Path, hparams: Any, weights: dict[str, Tensor], class_names: list[str] | None = None
) -> None:
    """Write trained weights as a pipeline, `zoo.heads.video_dit.VideoDiTPipeline`, in half precision.

    Args:
        folder: Where to.
        hparams: Arguments of `VideoDiffusion`.
        weights: State dict of its network.
        class_names: Name of each class.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from zoo.heads.video_dit import VideoDiTPipeline

    net = create_video_dit(
        hparams["model"], hparams["num_classes"], hparams["channels"], **(hparams["model_kwargs"] or {})
    )
    net.load_state_dict(weights)
    pipe = VideoDiTPipeline(
        net.half(),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=hparams["shift"]),
        class_names=class_names,
        sample_size=hparams["size"],
        num_frames=hparams["frames"],
    )
    pipe.save_pretrained(folder)


def export_pipeline(checkpoint: str | Path, folder: str | Path) -> None:
    """Turn a checkpoint of `VideoDiffusion` into a pipeline folder; averaged weights where there are any.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is not one of `VideoDiffusion`.
    """
    content = read_checkpoint(checkpoint)
    hparams = content.get("hyper_parameters", {})
    if "drop_label" not in hparams:
        raise ValueError(f"{checkpoint} is not a checkpoint of zoo.train.video.VideoDiffusion")
    weights = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
    save_pipeline(folder, hparams, weights, content.get("zoo", {}).get("class_names"))
