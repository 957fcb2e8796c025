"""Image classification: a timm model, timm's optimizer, schedule and regularisation as a LightningModule."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ThroughputMonitor
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy

from zoo.factory import create_model
from zoo.train.checks import check_ranges
from zoo.train.distillation import Distillation, Distiller
from zoo.train.seeding import mix_seed, run_seed, seed_global
from zoo.train.sharding import check_callbacks, compile_blocks, shard


def _logits_and_embedding(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    features = net.forward_features(x)
    return net.forward_head(features), net.forward_head(features, pre_logits=True)


RANGES = {
    **dict.fromkeys(("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "mixup", "cutmix"), (0, math.inf)),
    **dict.fromkeys(("label_smoothing", "mix_prob", "mix_switch_prob"), (0, 1)),
}


class ImageClassifier(LightningModule):
    """Trains an image classifier.

    Args:
        model: Model name with an optional tag, as ``zoo.create_model`` takes it.
        num_classes: Number of classes; the command line takes it from the data.
        pretrained: Whether to start from pretrained weights.
        model_kwargs: Further arguments of the model, such as ``drop_path_rate``.
        compile: Whether to train through ``torch.compile``; block by block where the model is sharded.
        grad_checkpointing: Whether to compute the activations of blocks again in the backward pass instead of keeping
            them, which saves memory and costs time.
        channels_last: Whether to keep images and convolution weights in channels-last memory format.
        optimizer: Name of an optimizer of timm (``timm.optim.list_optimizers()``).
        lr: Peak learning rate.
        weight_decay: Weight decay; not applied to biases, norms and what the model exempts.
        layer_decay: Factor of the learning rate from each layer to the one below; None for one rate.
        optimizer_kwargs: Further arguments of the optimizer, such as ``{betas: [0.9, 0.95]}``.
        scheduler: Learning rate schedule of timm: cosine, tanh, poly, step, multistep or constant.
        warmup_epochs: Epochs of linear warm-up, included in the trainer's epochs.
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end of the schedule.
        scheduler_kwargs: Further arguments of ``timm.scheduler.create_scheduler_v2``, in epochs; the trainer's epochs
            include ``cooldown_epochs``.
        loss: Cross-entropy (ce) or binary cross-entropy (bce).
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of the Beta distribution of Mixup, 0 for none.
        cutmix: Alpha of the Beta distribution of CutMix, 0 for none.
        mix_prob: Probability that a batch (or pair) is mixed.
        mix_switch_prob: Probability of CutMix instead of Mixup where both are on.
        mix_mode: Whether one draw mixes a whole batch, each pair of images or each image.
        distillation: Settings of knowledge distillation, None for none.

    Raises:
        ValueError: An unknown model, or a number outside of its range.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        channels_last: bool = False,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        scheduler: str = "cosine",
        warmup_epochs: float = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        scheduler_kwargs: dict[str, Any] | None = None,
        loss: Literal["ce", "bce"] = "ce",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        mix_mode: Literal["batch", "pair", "elem"] = "batch",
        distillation: Distillation | None = None,
    ):
        check_ranges(locals(), RANGES)
        super().__init__()
        # A checkpoint holds plain types only, so that it loads with weights_only=True.
        if isinstance(distillation, dict):
            distillation = Distillation(**distillation)
        self.save_hyperparameters(ignore=["distillation"])
        self.hparams["distillation"] = vars(distillation).copy() if distillation else None

        self.net = create_model(model, pretrained=pretrained, num_classes=num_classes, **(model_kwargs or {}))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self.memory_format)
        if grad_checkpointing:
            self.net.set_grad_checkpointing(True)
        width = getattr(self.net, "head_hidden_size", None) or self.net.num_features
        self.distiller = Distiller(distillation, width, num_classes) if distillation else None
        self._forward_both = _logits_and_embedding
        if compile:
            self.net.compile()
            self._forward_both = torch.compile(_logits_and_embedding)
        self._build_losses()
        self._build_metrics()

    def _build_losses(self) -> None:
        hparams = self.hparams
        self.mix = None
        if hparams.mixup > 0 or hparams.cutmix > 0:
            self.mix = Mixup(
                mixup_alpha=hparams.mixup,
                cutmix_alpha=hparams.cutmix,
                prob=hparams.mix_prob,
                switch_prob=hparams.mix_switch_prob,
                mode=hparams.mix_mode,
                label_smoothing=hparams.label_smoothing,
                num_classes=hparams.num_classes,
            )
        if hparams.loss == "bce":
            # Mixup smooths the targets that it makes.
            self.criterion = BinaryCrossEntropy(smoothing=0.0 if self.mix else hparams.label_smoothing)
        elif self.mix:
            self.criterion = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(hparams.label_smoothing)

    def _build_metrics(self) -> None:
        classes = self.hparams.num_classes
        metrics = {"acc": 1} | ({"acc5": 5} if classes > 5 else {})
        for stage in ("val", "test"):
            for name, k in metrics.items():
                setattr(self, f"{stage}_{name}", MulticlassAccuracy(classes, top_k=k, average="micro"))

    def configure_model(self) -> None:
        """Shard the model where the strategy asks for it (FSDP2); otherwise there is nothing to do.

        Raises:
            ValueError: Weights are to be averaged, or a teacher to be distilled, under this strategy.
        """
        mesh = self.device_mesh
        if mesh is None or isinstance(self.net, FSDPModule):
            return
        check_callbacks(self.trainer.callbacks)
        if self.distiller is not None:
            raise ValueError("distillation is not available with strategy=fsdp: use strategy=ddp")
        if self.hparams.compile:
            # `compile` of the whole network would trace through the gathering of its parts.
            self.net._compiled_call_impl = None
            compile_blocks(self.net)
        if self.trainer.strategy._layer_sync is not None:
            # trainer.sync_batchnorm: Lightning's own conversion comes too late for a sharded model.
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        shard(self.net, mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Take from the data module what depends on the images: the teacher's normalisation, the size of a step."""
        if self.hparams.compile and self.trainer.world_size > 1:
            # DDP's splitting of graphs refuses those with checkpoints inside; blocks of several families have them.
            torch._dynamo.config.optimize_ddp = False
        data = self.trainer.datamodule
        if not hasattr(data, "data_config"):
            return
        if self.distiller is not None:
            self.distiller.set_input_stats(data.data_config["mean"], data.data_config["std"])
        if stage == "fit" and any(isinstance(c, ThroughputMonitor) for c in self.trainer.callbacks):
            self.flops_per_batch = self._count_flops(data.data_config["input_size"]) * data.hparams.batch_size

    @torch.no_grad()
    def _count_flops(self, input_size: Sequence[int]) -> int:
        """FLOPs of a training step per image: forward once, backward about twice that."""
        training = self.net.training
        self.net.eval()
        with FlopCounterMode(display=False) as counter:
            # Not the module's own call, which may be compiled.
            _logits_and_embedding(self.net, torch.zeros(1, *input_size, device=self.device))
        self.net.train(training)
        return 3 * counter.get_total_flops()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.net(x.contiguous(memory_format=self.memory_format))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the random draws of a step a function of its place in the run, whatever happened before."""
        seed_global(mix_seed(run_seed(), self.trainer.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        x, target = batch
        if self.mix is not None:
            if len(x) % 2:
                raise ValueError(f"Mixup and CutMix pair the images of a batch: batch_size must be even, got {len(x)}")
            x, target = self.mix(x, target)
        if self.distiller is None:
            loss = self.criterion(self(x), target)
        else:
            loss = self._distillation_loss(x.contiguous(memory_format=self.memory_format), target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _distillation_loss(self, x: Tensor, target: Tensor) -> Tensor:
        settings = self.distiller.settings
        logits, embedding = self._forward_both(self.net, x)
        soft, feature, probe_logits = self.distiller.losses(x, logits, embedding)
        label = self.criterion(logits, target)
        probe = self.criterion(probe_logits, target)
        self.log_dict({"train/label": label, "train/soft": soft, "train/feature": feature, "train/probe": probe})
        # The probe learns from the labels on frozen embeddings; no gradient of its loss reaches the student.
        return (1 - settings.alpha) * label + settings.alpha * soft + settings.feature_weight * feature + probe

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, target = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits.float(), target)
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(x))
        for name in ("acc", "acc5"):
            metric = getattr(self, f"{stage}_{name}", None)
            if metric is not None:
                metric(logits, target)
                self.log(f"{stage}/{name}", metric, on_epoch=True, prog_bar=name == "acc", batch_size=len(x))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss on validation images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss on test images."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities of a batch of images, with or without labels."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(x).float().softmax(-1)

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimizer and a schedule that is stepped per update."""
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.net,
            opt=hparams.optimizer,
            lr=hparams.lr,
            weight_decay=hparams.weight_decay,
            layer_decay=hparams.layer_decay,
            **(hparams.optimizer_kwargs or {}),
        )
        if self.distiller is not None:
            optimizer.add_param_group({"params": list(self.distiller.parameters()), "weight_decay": 0.0})
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"}}

    def _scheduler(self, optimizer: torch.optim.Optimizer):
        hparams = self.hparams
        updates = self.trainer.estimated_stepping_batches
        if math.isinf(updates):
            raise ValueError("the learning rate schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        # With max_steps alone the trainer has not looked at the data yet.
        self.trainer.fit_loop.setup_data()
        per_epoch = max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))
        kwargs = hparams.scheduler_kwargs or {}
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=hparams.scheduler,
            # timm counts the cooldown on top, the trainer's epochs include it.
            num_epochs=updates / per_epoch - kwargs.get("cooldown_epochs", 0),
            warmup_epochs=hparams.warmup_epochs,
            warmup_lr=hparams.warmup_lr,
            min_lr=hparams.min_lr,
            step_on_epochs=False,
            updates_per_epoch=per_epoch,
            **kwargs,
        )
        if scheduler is None:
            raise ValueError(f"timm has no scheduler {hparams.scheduler!r}; 'constant' keeps the learning rate")
        return scheduler

    def lr_scheduler_step(self, scheduler, metric: Any) -> None:
        """Set the learning rate of the next update from the number of updates done."""
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exported model needs beside its weights."""
        data = self.trainer.datamodule
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        checkpoint["zoo"] = {"data_config": getattr(data, "data_config", None), "metrics": metrics}
