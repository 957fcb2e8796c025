"""A diffusers pipeline of the small video DiTs: class labels in, clips out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from zoo.backbones.video_dit import label_embeds

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "video_dit_nano.zoo_fashion_mnist"


class VideoDiTOutput(BaseOutput):
    """Clips.

    Attributes:
        frames: `np`: array `[B, F, H, W, C]` in [0, 1]; `pt`: tensor `[B, F, C, H, W]` in [0, 1]; `pil`: a list of
            images for each clip; `latent`: tensor `[B, C, F, H, W]` in about [-1, 1].
    """

    frames: object


class VideoDiTPipeline(DiffusionPipeline):
    """Generates clips of given classes.

    Sampling integrates the flow from noise to clips with Euler's method (flow matching, arXiv:2210.02747).

    Args:
        transformer: From `zoo.backbones.video_dit`.
        scheduler: The noise levels.
        class_names: Name of each class; None if they have none.
        sample_size: Height and width that the model was trained on, pixels.
        num_frames: Frames that it was trained on.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        class_names: Sequence[str] | None = None,
        sample_size: int = 32,
        num_frames: int = 8,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        names = None if class_names is None else list(class_names)
        self.register_to_config(class_names=names, sample_size=sample_size, num_frames=num_frames)

    @property
    def num_classes(self) -> int:
        """Number of classes, without the one of no label."""
        return self.transformer.config.text_dim - 1

    @torch.no_grad()
    def __call__(
        self,
        prompt: int | str | Sequence[int | str],
        num_frames: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
    ) -> VideoDiTOutput:
        """Generate one clip for each class label.

        Args:
            prompt: Class numbers or names. The name of the argument is that of other pipelines, so that
                `zoo.sparse_vdit.search(pipe, ["Sneaker"])` and `zoo vdit` work as with them.
            num_frames: Frames of a clip; those of the training by default.
            num_inference_steps: Denoising steps.
            guidance_scale: Strength of classifier-free guidance; 1 is none.
            generator: Of the first noise.
            output_type: `np`, `pt`, `pil` or `latent`, see `VideoDiTOutput`.

        Returns:
            The clips.

        Raises:
            ValueError: An unknown class or output type, or fewer than one step or frame.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        frames = self.config.num_frames if num_frames is None else num_frames
        if frames < 1 or num_inference_steps < 1:
            raise ValueError(f"needs at least one frame and step, got {frames} and {num_inference_steps}")
        device, dtype = self._execution_device, self.transformer.dtype
        numbers = torch.tensor(self._numbers(prompt), device=device)
        guided = guidance_scale != 1
        if guided:
            numbers = torch.cat([numbers, torch.full_like(numbers, self.num_classes)])
        condition = label_embeds(numbers, self.num_classes, dtype)
        count = len(numbers) // 2 if guided else len(numbers)
        size = self.config.sample_size
        shape = (count, self.transformer.config.in_channels, frames, size, size)
        # [B, C, F, H, W]; in float32, as many small steps are added up.
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            both = torch.cat([x, x]) if guided else x
            velocity = self.transformer(
                both.to(dtype), t.expand(len(both)), encoder_hidden_states=condition, return_dict=False
            )[0].float()
            if guided:
                labelled, unlabelled = velocity.chunk(2)
                velocity = unlabelled + guidance_scale * (labelled - unlabelled)
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return VideoDiTOutput(frames=x if output_type == "latent" else _decode(x, output_type))

    def _numbers(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """Class numbers of labels."""
        names = self.config.class_names or []
        numbers = []
        for label in [labels] if isinstance(labels, (int, str)) else labels:
            number = names.index(label) if label in names else label
            number = int(number) if isinstance(number, str) and number.isdecimal() else number
            if isinstance(number, str) or not 0 <= number < self.num_classes:
                known = f": {', '.join(names)}" if names else ""
                raise ValueError(f"no class {label!r}; there are {self.num_classes}{known}")
            numbers.append(number)
        if not numbers:
            raise ValueError("prompt must hold at least one class")
        return numbers


def _decode(x: Tensor, output_type: str):
    """Pixels `[B, C, F, H, W]` in [-1, 1] as the output type says."""
    # [B, C, F, H, W] -> [B, F, C, H, W]
    frames = ((x + 1) / 2).clamp(0, 1).transpose(1, 2).cpu()
    if output_type == "pt":
        return frames
    # [B, F, C, H, W] -> [B, F, H, W, C]
    arrays = frames.permute(0, 1, 3, 4, 2).numpy()
    if output_type == "np":
        return arrays
    from PIL import Image

    pixels = (arrays * 255).round().astype("uint8")
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return [[Image.fromarray(frame) for frame in clip] for clip in pixels]


def is_video_dit(folder: str | Path) -> bool:
    """Whether a folder holds a pipeline of this class, which diffusers alone does not know."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return False
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == VideoDiTPipeline.__name__


def load_video_dit(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> VideoDiTPipeline:
    """Load a trained pipeline from a folder, by default the weights that come with the package.

    Raises:
        FileNotFoundError: There is no pipeline; the message says how to train one.
    """
    path = WEIGHTS if folder is None else Path(folder)
    if not is_video_dit(path):
        what = "This package has no embedded video DiT" if folder is None else f"{path} holds no video DiT pipeline"
        raise FileNotFoundError(
            f"{what}. Train one on a GPU with `zoo fit --config video/video_dit_nano`, which writes the folder "
            "video_dit_nano, then give that folder (`zoo vdit demo --model video_dit_nano`)."
        )
    return VideoDiTPipeline.from_pretrained(path, dtype=dtype)
