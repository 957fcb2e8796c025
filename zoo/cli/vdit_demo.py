"""`zoo vdit demo`: dense and sparse clips of a small trained model from the same noise, compared."""

import argparse
import time
from pathlib import Path
from typing import Any

from zoo.cli.arguments import pick_device
from zoo.heads.sparse_vdit.plan import FILE, SparsePlan

SCALE = 4
GAP = 4
HEADER = 14


def run(args: argparse.Namespace) -> int:
    import torch

    from zoo.heads import sparse_vdit
    from zoo.heads.video_dit import load_video_dit

    device = pick_device(args.device)
    pipe = load_video_dit(args.model, torch.float32 if device.type == "cpu" else torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_frames=args.frames, num_inference_steps=args.steps, guidance_scale=args.guidance)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = find_plan(pipe, args, call)
    print(f"plan: mean density {mean_density(pipe, plan, args.frames):.2f} over the layers and bins of noise levels")
    dense, dense_seconds = generate(pipe, args.labels, args.seed, call)
    with sparse_vdit.use(pipe, plan):
        sparse, sparse_seconds = generate(pipe, args.labels, args.seed, call)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"time on {where}: dense {dense_seconds:.2f} s, sparse {sparse_seconds:.2f} s")
    if device.type == "cpu":
        print("A CPU runs the reference of sparse attention and no kernel: its time says nothing about GPUs.")
    for label, psnr, ssim in zip(args.labels, *fidelity(sparse, dense), strict=True):
        print(f"class {label}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")
    path = args.out / "dense_and_sparse.gif"
    side_by_side(dense, sparse, path)
    print(f"wrote {path}")
    return 0


def find_plan(pipe: Any, args: argparse.Namespace, call: dict[str, Any]) -> SparsePlan:
    """The plan that is asked for, the one beside the model, or a searched one, which is saved."""
    import torch

    from zoo.heads import sparse_vdit

    beside = Path(pipe.config._name_or_path) / FILE
    if args.plan is not None or beside.is_file():
        return SparsePlan.from_pretrained(args.plan or beside)
    # Other noise than that of the comparison.
    generator = torch.Generator().manual_seed(args.seed + 1)
    plan = sparse_vdit.search(
        pipe,
        [{"prompt": args.labels}],
        density=args.density,
        bins=3,
        samples_per_bin=1,
        generator=generator,
        call_kwargs=call,
    )
    print(f"wrote {plan.save(args.out / FILE)}")
    return plan


def mean_density(pipe: Any, plan: SparsePlan, frames: int | None) -> float:
    """Mean density over layers and bins, at the pipeline's token grid."""
    patch_t, patch_h, patch_w = pipe.transformer.config.patch_size
    size = pipe.config.sample_size
    grid = ((frames or pipe.config.num_frames) // patch_t, size // patch_h, size // patch_w)
    densities = plan.densities(grid, 0)
    return sum(map(sum, densities)) / (plan.num_bins * len(plan.layers))


def generate(pipe: Any, labels: list, seed: int, call: dict[str, Any]) -> tuple[Any, float]:
    """Clips `[B, F, C, H, W]` in [0, 1], and the seconds that they took after a warm-up on GPUs."""
    import torch

    if pipe.device.type == "cuda":
        # All noise levels, hence all patterns, before time is taken.
        pipe(labels, **call, output_type="pt")
        torch.cuda.synchronize(pipe.device)
    start = time.perf_counter()
    frames = pipe(labels, **call, generator=torch.Generator().manual_seed(seed), output_type="pt").frames
    return frames, time.perf_counter() - start


def fidelity(clips: Any, reference: Any) -> tuple[list[float], list[float]]:
    """PSNR in dB and SSIM of each clip `[B, F, C, H, W]` in [0, 1], over its frames."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = [float(peak_signal_noise_ratio(x, y, data_range=1.0)) for x, y in zip(clips, reference, strict=True)]
    ssim = [
        float(structural_similarity_index_measure(x, y, data_range=1.0)) for x, y in zip(clips, reference, strict=True)
    ]
    return psnr, ssim


def side_by_side(dense: Any, sparse: Any, path: Path, milliseconds: int = 120) -> None:
    """Write a GIF of clips `[B, F, C, H, W]` in [0, 1]: one row a clip, dense on the left and sparse on the right."""
    from PIL import Image

    frames = [_picture(dense[:, f], sparse[:, f]) for f in range(dense.shape[1])]
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        _title(image)
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)


def _picture(dense: Any, sparse: Any) -> Any:
    """One frame of all clips, each `[B, C, H, W]`, as RGB pixels."""
    import numpy as np

    clips, _, height, width = dense.shape
    height, width = height * SCALE, width * SCALE
    canvas = np.full((HEADER + clips * (height + GAP) - GAP, 2 * width + GAP, 3), 255, np.uint8)
    for column, images in enumerate((dense, sparse)):
        # [B, C, H, W] -> [B, H, W, C]
        pixels = (images.permute(0, 2, 3, 1).float().numpy() * 255).round().astype(np.uint8)
        pixels = pixels.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
        for row, image in enumerate(pixels):
            top, left = HEADER + row * (height + GAP), column * (width + GAP)
            canvas[top : top + height, left : left + width] = image
    return canvas


def _title(image: Any) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    for text, centre in (("dense", image.width // 4), ("sparse", 3 * image.width // 4)):
        draw.text((centre, 1), text, fill=0, anchor="ma")
