"""`zoo vdit`: sparse attention plans of video diffusion models."""

import argparse
import importlib.util
import inspect
import json
import re
import time
from pathlib import Path
from typing import Any

from zoo.cli.arguments import count, pick_device, positive, share, share_below_one

SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_search(actions.add_parser("search", help="search a plan for a pipeline"))
    _add_apply(actions.add_parser("apply", help="generate a video with a plan"))
    _add_report(actions.add_parser("report", help="draw a plan, with densities and speed"))
    _add_demo(actions.add_parser("demo", help="small trained model: dense and sparse clips side by side"))
    _add_export(actions.add_parser("export", help="turn a training checkpoint of a small video DiT into a pipeline"))


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", help="diffusers pipeline: a folder or a hub repository")
    parser.add_argument("--height", type=positive, help="pixels (default: the pipeline's)")
    parser.add_argument("--width", type=positive, help="pixels (default: the pipeline's)")
    parser.add_argument("--frames", type=positive, help="video frames (default: the pipeline's)")
    parser.add_argument("--steps", type=positive, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first noise (default: %(default)s)")
    parser.add_argument("--device", help="device (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--offload", action="store_true", help="keep idle parts of the pipeline in main memory")
    parser.add_argument("--component", default="transformer", help="transformer of the pipeline (default: %(default)s)")


def _add_search(parser: argparse.ArgumentParser) -> None:
    _add_pipeline(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    source.add_argument("--prompts", type=Path, help="text file with a prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="plan to write")
    parser.add_argument("--method", choices=("budget", "paper"), default="budget")
    parser.add_argument(
        "--density", type=share, default=0.3, help="budget: mean density to meet (default: %(default)s)"
    )
    parser.add_argument("--time", type=share, help="budget: share of the dense attention time to meet instead")
    parser.add_argument("--lam", type=float, default=0.5, help="paper: weight of the cost (default: %(default)s)")
    parser.add_argument("--eps", type=float, default=1.0, help="paper: largest loss of a sparse head (%(default)s)")
    parser.add_argument("--bins", type=_bins, default=5, help="groups of steps, or 'steps' (default: %(default)s)")
    parser.add_argument("--dense-steps", type=share_below_one, default=0.2, help="share of first steps kept (0.2)")
    parser.add_argument("--dense-layers", type=count, default=0, help="number of first layers kept (%(default)s)")
    parser.add_argument("--state", type=Path, help="file of measurements, to go on after an interruption")


def _add_apply(parser: argparse.ArgumentParser) -> None:
    _add_pipeline(parser)
    parser.add_argument("plan", help="plan: a file, a folder or a hub repository")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, required=True, help="video to write (.mp4 or .gif)")
    parser.add_argument("--fps", type=positive, default=16, help="frames a second (default: %(default)s)")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="generate the dense video too, print times and PSNR; dense is the stock attention, which in HunyuanVideo "
        "is slower than a flash kernel because of its mask",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="plan: a file, a folder or a hub repository")
    parser.add_argument("--grid", type=_grid, help="tokens, FRAMESxHEIGHTxWIDTH (default: the searched grid)")
    parser.add_argument("--text-length", type=count, help="text tokens (default: as searched)")
    parser.add_argument("--attention-share", type=share, help="share of attention in a dense pass, to predict the rest")
    parser.add_argument("--measure", action="store_true", help="time the attention here")
    parser.add_argument("--device", help="device of --measure (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="pipeline folder (default: the weights of this package)")
    parser.add_argument("--out", type=Path, default=Path("zoo_vdit_demo"), help="folder to write (%(default)s)")
    parser.add_argument("--plan", type=Path, help="plan (default: plan.json of the model's folder, or a search)")
    parser.add_argument("--labels", nargs="+", default=["0", "1", "7", "8"], help="class numbers or names (0 1 7 8)")
    parser.add_argument("--density", type=share, default=0.5, help="of the search: mean density (default: %(default)s)")
    parser.add_argument("--frames", type=positive, help="video frames (default: those of the training)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--device", help="device (default: cuda where there is one)")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint of `zoo fit --config video/video_dit_nano`")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    actions = {"search": run_search, "apply": run_apply, "report": run_report, "demo": run_demo, "export": run_export}
    return actions[args.action](args)


def run_demo(args: argparse.Namespace) -> int:
    from zoo.cli.vdit_demo import run

    return run(args)


def run_export(args: argparse.Namespace) -> int:
    from zoo.train.video import export_pipeline

    export_pipeline(args.checkpoint, args.out)
    print(f"wrote {args.out}")
    return 0


def run_search(args: argparse.Namespace) -> int:
    import torch

    from zoo.heads import sparse_vdit

    prompts = args.prompt or [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    pipe = load_pipeline(args)
    plan = sparse_vdit.search(
        pipe,
        prompts,
        method=args.method,
        density=args.density,
        time=args.time,
        lam=args.lam,
        eps=args.eps,
        bins=args.bins,
        dense_steps=args.dense_steps,
        dense_layers=args.dense_layers,
        generator=torch.Generator().manual_seed(args.seed),
        call_kwargs=_call_arguments(pipe, args),
        component=args.component,
        state=args.state,
    )
    path = plan.save(args.out)
    _print(plan.report())
    print(f"wrote {path}")
    return 0


def run_apply(args: argparse.Namespace) -> int:
    from zoo.heads import sparse_vdit

    check_video(args.out)
    plan = sparse_vdit.SparsePlan.from_pretrained(args.plan)
    pipe = load_pipeline(args)
    with sparse_vdit.use(pipe, plan, component=args.component):
        video, seconds = _generate(pipe, args)
    save_video(video, args.out, args.fps)
    print(f"wrote {args.out}: {seconds:.1f} s with the plan")
    if args.compare:
        dense, dense_seconds = _generate(pipe, args)
        path = args.out.with_stem(args.out.stem + "_dense")
        save_video(dense, path, args.fps)
        print(f"wrote {path}: {dense_seconds:.1f} s dense; {dense_seconds / seconds:.2f}x as fast with the plan")
        print(f"PSNR of the two: {psnr(video, dense):.2f} dB")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from zoo.heads.sparse_vdit import SparsePlan

    plan = SparsePlan.from_pretrained(args.plan)
    report = plan.report(args.grid, args.text_length, attention_share=args.attention_share)
    if args.measure:
        import torch

        device = pick_device(args.device)
        report = report.measure(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report)
    return 0


def load_pipeline(args: argparse.Namespace) -> Any:
    """Load a diffusers pipeline, or one of this package's small video DiTs, as the arguments say.

    Raises:
        ValueError: The device is not here, or the path is no pipeline.
        OSError: The hub has no such pipeline, or cannot be reached.
    """
    import diffusers
    import torch

    from zoo.heads.video_dit import VideoDiTPipeline, is_video_dit

    device, path = pick_device(args.device), Path(args.pipeline)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(f"'{path}' is no folder of a diffusers pipeline: it has no model_index.json.")
    cls = VideoDiTPipeline if is_video_dit(args.pipeline) else diffusers.DiffusionPipeline
    pipe = cls.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype))
    if args.offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _call_arguments(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What was said of size, steps and guidance, under the pipeline's names."""
    given = {name: getattr(args, option) for option, name in SIZES.items()} | {"guidance_scale": args.guidance}
    given = {name: value for name, value in given.items() if value is not None}
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}.")
    return given


def _generate(pipe: Any, args: argparse.Namespace) -> tuple[Any, float]:
    """Generate one video, [F, H, W, C] in [0, 1], and its wall time in seconds."""
    import torch

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    out = pipe(prompt=args.prompt, generator=generator, output_type="np", **_call_arguments(pipe, args))
    return out.frames[0], time.perf_counter() - start


def check_video(path: Path) -> None:
    """Let a video that cannot be written end the command before it is generated.

    Raises:
        ValueError: Neither .mp4 nor .gif, or a library is missing.
    """
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"--out takes a file name in .mp4 or .gif, got '{path}'.")
    missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if path.suffix.lower() == ".mp4" and missing:
        raise ValueError(f"Writing .mp4 needs {' and '.join(missing)}: install the extra 'video', or write a .gif.")


def save_video(video: Any, path: Path, fps: int) -> None:
    """Write frames [F, H, W, C] in [0, 1], grey or RGB, as a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if video.shape[-1] == 1:
        video = video.repeat(3, axis=-1)
    if path.suffix.lower() == ".gif":
        from PIL import Image

        first, *others = [Image.fromarray((frame * 255).round().astype("uint8")) for frame in video]
        first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        return
    from diffusers.utils import export_to_video

    export_to_video(list(video), str(path), fps=fps)


def psnr(video: Any, reference: Any) -> float:
    """Peak signal-to-noise ratio of two videos in [0, 1], in dB."""
    import numpy as np

    error = float(np.mean((np.asarray(video, np.float64) - np.asarray(reference, np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def _print(report: Any) -> None:
    from rich.console import Console

    # Folding or cropping a line would spoil the map on a narrow terminal.
    Console().print(report, soft_wrap=True)


def _bins(text: str) -> int | str:
    return text if text == "steps" else positive(text)


def _grid(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH")
    return tuple(map(int, match.groups()))
