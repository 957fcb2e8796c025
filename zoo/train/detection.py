"""3D detection: a point cloud detector, its loss, one-cycle schedules and box metrics as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from zoo.factory import create_model
from zoo.heads.detections import Targets
from zoo.train.lidar.metrics import BoxAveragePrecision
from zoo.train.lidar.nuscenes_metrics import NuScenesDetectionScore
from zoo.train.seeding import mix_seed, run_seed, seed_global

Batch = tuple[list[Tensor], list[Targets]]


class DetectionModule(LightningModule):
    """Steps of detectors in images and point clouds.

    A subclass sets `net`, which takes inputs and gives what it finds and whose `loss` takes inputs and targets, and
    says how results of a stage are taken in (`_evaluate`) and logged (`_log_metrics`).
    """

    net: torch.nn.Module

    def forward(self, inputs: list[Tensor]) -> list[Any]:
        """What is found in each input."""
        return self.net(inputs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the random draws of a step a function of its place in the run, whatever happened before."""
        seed_global(mix_seed(run_seed(), self.trainer.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        losses = self.net.loss(*batch)
        self.log("train/loss", losses["loss"], prog_bar=True, batch_size=len(batch[0]))
        parts = {f"train/{name}": value for name, value in losses.items() if name != "loss"}
        self.log_dict(parts, batch_size=len(batch[0]))
        return losses["loss"]

    def _evaluate(self, batch: tuple[list[Tensor], list[Any]], stage: str) -> None:
        raise NotImplementedError

    def _log_metrics(self, stage: str) -> None:
        raise NotImplementedError

    def validation_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> None:
        """Detections of a validation batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> None:
        """Detections of a test batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[list[Tensor], list[Any]], batch_idx: int) -> list[Any]:
        """Detections of a batch."""
        return self.net(batch[0])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation set."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics("test")


class PointCloudDetector(DetectionModule):
    """Trains a detector of `zoo.create_model` on point clouds.

    The learning rate follows one cycle by cosines: from `lr / div_factor` to `lr` within the first `pct_start` of the
    updates, then to `lr / div_factor / final_div_factor`.

    Args:
        model: Name of the detector.
        num_classes: Number of classes, which must be the detector's; the command line takes it from the data.
        pretrained: Whether to start from pretrained weights.
        model_kwargs: Further arguments of the detector.
        lr: Peak learning rate.
        weight_decay: Decay of AdamW.
        no_decay: Parameters whose name has one of these parts are not decayed.
        betas: Of AdamW; the first one is replaced where `momentum` is given.
        pct_start: Share of the updates up to the peak.
        div_factor: Peak over first learning rate.
        final_div_factor: First over last learning rate.
        momentum: First beta at the start and end, and at the peak, which moves against the learning rate; None keeps
            that of `betas`.
        evaluation: Average precision by overlap (iou) or the nuScenes detection score (nuscenes).
        iou_thresholds: Threshold of each class for the former; None means 0.7 for the first class and 0.5 for others.
        iou_points: Recalls at which precision is read, as in ``BoxAveragePrecision``.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        no_decay: Sequence[str] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        pct_start: float = 0.1,
        div_factor: float = 100.0,
        final_div_factor: float = 1e3,
        momentum: tuple[float, float] | None = None,
        evaluation: Literal["iou", "nuscenes"] = "iou",
        iou_thresholds: Sequence[float] | None = None,
        iou_points: Literal["11", "40", "all"] = "all",
    ) -> None:
        super().__init__()
        # A checkpoint holds plain types only, so that it loads with weights_only=True.
        no_decay, betas = list(no_decay), list(betas)
        iou_thresholds = None if iou_thresholds is None else list(iou_thresholds)
        self.save_hyperparameters()
        self.net = create_model(model, pretrained=pretrained, **(model_kwargs or {}))
        if len(self.net.classes) != num_classes:
            raise ValueError(
                f"{model} has {len(self.net.classes)} classes ({', '.join(self.net.classes)}), the data {num_classes}"
            )
        self.metrics = torch.nn.ModuleDict({stage: torch.nn.ModuleDict(self._metrics()) for stage in ("val", "test")})

    def _metrics(self) -> dict[str, Metric]:
        classes, hparams = self.net.classes, self.hparams
        if hparams.evaluation == "nuscenes":
            return {"nuscenes": NuScenesDetectionScore(classes)}
        thresholds = hparams.iou_thresholds or [0.7] + [0.5] * (len(classes) - 1)
        return {view: BoxAveragePrecision(classes, thresholds, view, hparams.iou_points) for view in ("bev", "3d")}

    def _evaluate(self, batch: Batch, stage: str) -> None:
        points, targets = batch
        found = self.net(points)
        for metric in self.metrics[stage].values():
            metric.update(found, targets)

    def _log_metrics(self, stage: str) -> None:
        for view, metric in self.metrics[stage].items():
            values = {f"{stage}/{view}/{name}": value.float() for name, value in metric.compute().items()}
            self.log_dict(values, sync_dist=True)
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the measured results, which an exported model carries."""
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        # Classes that do not occur have no result.
        checkpoint["zoo"] = {"metrics": {key: value for key, value in metrics.items() if not math.isnan(value)}}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with its one-cycle schedule, stepped per update."""
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("the learning rate schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        hparams = self.hparams
        optimizer = torch.optim.AdamW(
            parameter_groups(self.net, hparams.weight_decay, hparams.no_decay),
            lr=hparams.lr,
            betas=tuple(hparams.betas),
        )
        momentum = hparams.momentum
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, hparams.lr, total_steps=int(total), pct_start=hparams.pct_start, div_factor=hparams.div_factor,
            final_div_factor=hparams.final_div_factor, cycle_momentum=momentum is not None,
            max_momentum=max(momentum or (0.95,)), base_momentum=min(momentum or (0.85,)),
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(net: torch.nn.Module, weight_decay: float, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of an optimizer: parameters whose name has one of the parts in `no_decay` are not decayed."""
    exempt, decayed = [], []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            (exempt if any(part in name for part in no_decay) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
