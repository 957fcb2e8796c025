"""Object detection in images: a backbone with a detector's head, step schedules and COCO's metrics.

For point clouds see `zoo.train.detection`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.heads.image_detection import create_image_detector
from zoo.train.detection import DetectionModule, parameter_groups
from zoo.train.image_metrics import RECALLS, THRESHOLDS

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
_LOGGED = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


class ObjectDetector(DetectionModule):
    """Trains a detector of `zoo.heads.image_detection.create_image_detector` with AdamW.

    Validation and test log COCO's average precision, `val/map`, `val/map_50` and so on, of boxes and, of Mask R-CNN,
    of masks (`val/mask_map`), by torchmetrics, which needs pycocotools.

    Args:
        backbone: Name of an image model of this package or of timm.
        num_classes: Number of classes; the command line takes it from the data.
        head: RetinaNet or Mask R-CNN.
        pretrained_backbone: Whether the backbone starts from pretrained weights.
        backbone_kwargs: Further arguments of the backbone, such as ``drop_path_rate``.
        detector_kwargs: Arguments of ``ImageDetector``, such as ``min_size``.
        lr: Peak learning rate.
        weight_decay: Decay of AdamW.
        no_decay: Parameters whose name has one of these parts are not decayed.
        betas: Of AdamW.
        milestones: Epochs after which the learning rate is multiplied by `gamma`.
        gamma: Factor of the learning rate at each milestone.
        warmup_steps: Updates of linear warm-up.
        warmup_factor: Share of the learning rate at the start of the warm-up.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        head: Literal["retinanet", "mask_rcnn"] = "retinanet",
        pretrained_backbone: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
        detector_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        no_decay: Sequence[str] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        milestones: Sequence[int] = (8, 11),
        gamma: float = 0.1,
        warmup_steps: int = 500,
        warmup_factor: float = 1e-3,
    ) -> None:
        super().__init__()
        # A checkpoint holds plain types only, so that it loads with weights_only=True.
        no_decay, betas, milestones = list(no_decay), list(betas), list(milestones)
        self.save_hyperparameters()
        # Heads are random at first, whatever the backbone: the command line must not measure them.
        self.hparams["pretrained"] = False
        self.net = create_image_detector(
            backbone, head, num_classes, pretrained_backbone, backbone_kwargs=backbone_kwargs, **(detector_kwargs or {})
        )
        kinds = {"": "bbox", "mask_": "segm"} if head == "mask_rcnn" else {"": "bbox"}
        self.kinds = kinds
        self.metrics = torch.nn.ModuleDict()

    def _metric(self, stage: str) -> Metric:
        """The metric of a stage, made at the first use: training alone needs no pycocotools."""
        if stage not in self.metrics:
            self.metrics[stage] = coco_metric(tuple(self.kinds.values())).to(self.device)
        return self.metrics[stage]

    def on_validation_epoch_start(self) -> None:
        """Look for the metric before time is spent."""
        self._metric("val").reset()

    def on_test_epoch_start(self) -> None:
        """Look for the metric before time is spent."""
        self._metric("test").reset()

    def _evaluate(self, batch: Batch, stage: str) -> None:
        self._metric(stage).update(self.net(batch[0]), batch[1])

    def _log_metrics(self, stage: str) -> None:
        metric = self._metric(stage)
        results = metric.compute()
        for prefix, kind in self.kinds.items():
            # torchmetrics prefixes names where it measures more than one kind.
            source = f"{kind}_" if len(self.kinds) > 1 else ""
            for name in _LOGGED:
                self.log(f"{stage}/{prefix}{name}", results[source + name].float(), prog_bar=name == "map")
        metric.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with warm-up and steps at the milestones, counted in updates."""
        hparams, updates, epochs = self.hparams, self.trainer.estimated_stepping_batches, self.trainer.max_epochs
        if math.isinf(updates) or not epochs or epochs < 0:
            raise ValueError("milestones are epochs of a run: set trainer.max_epochs")
        groups = parameter_groups(self.net, hparams.weight_decay, hparams.no_decay)
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=tuple(hparams.betas))
        per_epoch = max(1, updates // epochs)

        def factor(update: int) -> float:
            passed = sum(update >= epoch * per_epoch for epoch in hparams.milestones)
            warm = min(1.0, update / max(1, hparams.warmup_steps))
            return hparams.gamma**passed * (hparams.warmup_factor + (1 - hparams.warmup_factor) * warm)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a user of the weights needs beside them."""
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        data = getattr(self.trainer.datamodule, "data_config", None)
        # COCO's number for what does not occur is -1.
        metrics = {key: value for key, value in metrics.items() if value >= 0}
        checkpoint["zoo"] = {"data_config": data, "metrics": metrics}


def coco_metric(kinds: tuple[str, ...]) -> Metric:
    """torchmetrics' mean average precision of "bbox" and "segm"; of masks it leaves out images without objects.

    Raises:
        ImportError: Neither pycocotools nor faster-coco-eval is there.
    """
    from torchmetrics.detection import MeanAveragePrecision

    # COCO's own numbers; those of torchmetrics are rounded to float32, which moves results at ties.
    options = dict(iou_thresholds=THRESHOLDS.tolist(), rec_thresholds=RECALLS.tolist())
    error = None
    for backend in ("pycocotools", "faster_coco_eval"):
        try:
            return MeanAveragePrecision(iou_type=kinds, backend=backend, **options)
        except ImportError as missing:
            error = missing
    raise ImportError("COCO's metrics need pycocotools: pip install 'attention-zoo[detection]'") from error
