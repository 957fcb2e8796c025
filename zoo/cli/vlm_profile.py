"""`zoo vlm profile`: prefill, decoding and memory of a vision-language model at several budgets of visual tokens."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.cli.arguments import pick_device, positive

RANDOM = ("llava-1.5-7b", "llava-next-7b", "llava-next-mistral-7b", "tiny")
LAUNCHES = ("eager", "static", "graph")
COLUMNS = (
    "model", "method", "budget", "options", "launch", "batch", "image", "visual_tokens", "prompt_tokens", "new_tokens",
    "ttft_ms_p20", "ttft_ms", "ttft_ms_p80", "step_ms", "tokens_per_s", "kv_mib", "peak_gib", "ttft_speedup", "dtype",
    "device", "torch", "transformers", "zoo", "commit", "timestamp",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", nargs="?", help="a hub repository or a folder")
    model.add_argument("--random", choices=RANDOM, help="random weights of this architecture, made on the device")
    parser.add_argument("--budgets", nargs="+", type=_budget, default=[0.4, 0.2], help="fractions or numbers (0.4 0.2)")
    parser.add_argument("--methods", nargs="+", default=["hired"], help="methods of token dropping (hired)")
    parser.add_argument(
        "--launch",
        nargs="+",
        choices=LAUNCHES,
        default=["eager"],
        help="eager: generate() as it is; static: its static cache, whose decoding transformers compiles; "
        "graph: prefill and decoding recorded as CUDA graphs (handle.capture), needs exact counts (eager)",
    )
    parser.add_argument("--official", action="store_true", help="hired: counts as published, not exact")
    parser.add_argument("--allocation", default="official", help="hired: how sub-images share (default: %(default)s)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="prompts at a time (1)")
    parser.add_argument("--new-tokens", type=positive, default=16, help="tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--size", type=positive, nargs=2, default=[672, 672], metavar=("H", "W"), help="image (672 672)"
    )
    parser.add_argument("--text-tokens", type=positive, default=60, help="of the prompt (default: %(default)s)")
    parser.add_argument("--image", type=Path, help="image file, with --prompt: goes through the model's processor")
    parser.add_argument("--prompt", help="question about --image")
    parser.add_argument(
        "--samples",
        type=positive,
        default=10,
        help="timed runs to the first token; a third as many to the last (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument("--attention", help="attention implementation of transformers (default: the model's)")
    parser.add_argument("--device", help="device (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, help="CSV file to append to")


def run(args: argparse.Namespace) -> int:
    import torch

    if (args.image is None) != (args.prompt is None):
        raise ValueError("--image and --prompt belong together.")
    if args.image and args.random:
        raise ValueError("--image needs a model with a processor; random weights have none.")
    check_settings(args)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = load_model(args, device, dtype)
    model.generation_config.eos_token_id = None
    rows = []
    for batch in args.batch:
        inputs = make_inputs(args, model, batch, device, dtype)
        for row in profile(args, model, inputs):
            rows.append(row)
            if args.out:
                append(args.out, row)
    show(rows)
    if args.out:
        print(f"wrote {args.out}")
    return 0


# The model and its inputs


def random_config(name: str) -> tuple[Any, Any]:
    """Class and configuration of an architecture, as on the hub."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    vision = dict(
        model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = dict(
        model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    common = dict(image_token_id=32000, vision_feature_layer=-2, vision_feature_select_strategy="default")
    if name == "tiny":
        vision |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=56)
        text |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
        text |= dict(num_key_value_heads=4, vocab_size=256)
        common["image_token_id"] = 255
    if name == "llava-next-mistral-7b":
        text |= dict(model_type="mistral", intermediate_size=14336, num_key_value_heads=8, sliding_window=None)
        text |= dict(max_position_embeddings=32768)
    if name == "llava-1.5-7b":
        return LlavaForConditionalGeneration, LlavaConfig(vision_config=vision, text_config=text, **common)
    side = vision["image_size"]
    grids = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    common["image_grid_pinpoints"] = [[side * h, side * w] for h, w in grids]
    return LlavaNextForConditionalGeneration, LlavaNextConfig(vision_config=vision, text_config=text, **common)


def load_model(args: argparse.Namespace, device: Any, dtype: Any) -> Any:
    """The model to measure, in evaluation mode on the device."""
    import torch

    attention = {"attn_implementation": args.attention} if args.attention else {}
    if args.model:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype, **attention)
        return model.eval().to(device)
    cls, config = random_config(args.random)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with device:
            model = cls._from_config(config, **attention)
    finally:
        torch.set_default_dtype(default)
    return model.eval().to(device)


def make_inputs(args: argparse.Namespace, model: Any, batch: int, device: Any, dtype: Any) -> dict[str, Any]:
    """Inputs of `batch` equal prompts with one image each, on the device."""
    import torch

    if args.image:
        from PIL import Image
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(args.model)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.prompt}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        image = Image.open(args.image).convert("RGB")
        inputs = processor(images=[image] * batch, text=[text] * batch, return_tensors="pt")
        return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}

    from zoo.heads.token_dropping.families import family_of
    from zoo.heads.token_dropping.packing import Packer

    family = family_of(model)
    tower = family.tower()
    pixels = torch.randn(batch, 3, tower.pixels, tower.pixels)
    sizes = {}
    if family.has_newline:
        sizes = {"image_sizes": torch.tensor([args.size] * batch)}
        partitions = family._image(tower, tuple(args.size)).partitions
        pixels = torch.randn(batch, partitions, 3, tower.pixels, tower.pixels)
    pixels, (image, *_) = pixels.to(device, dtype), family.images(tower, pixels, **sizes)[1]
    count = Packer(has_newline=family.has_newline).stock_lengths([image])[0]
    image_token, size = model.config.image_token_id, model.get_input_embeddings().num_embeddings
    # The first ids, which every tokenizer has, without those of special tokens.
    words = torch.tensor([i for i in range(3, min(size, 200)) if i != image_token])
    text = words[torch.randint(len(words), (batch, args.text_tokens))]
    before, after = text.tensor_split([args.text_tokens // 2], 1)
    ids = torch.cat((before, torch.full((batch, count), image_token), after), 1)
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "pixel_values": pixels}
    return {**inputs, **{name: x.to(device) for name, x in sizes.items()}}


# Measuring


def settings(args: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, budget, arguments of apply): the stock model first."""
    yield "stock", 1.0, {"method": "spatial"}
    for method in args.methods:
        options = {"exact": not args.official, "allocation": args.allocation} if method == "hired" else {}
        for budget in args.budgets:
            yield method, budget, {"method": method, **options}


def check_settings(args: argparse.Namespace) -> None:
    """Let a wrong method or budget end the command before a model is loaded.

    Raises:
        ValueError: There is one.
    """
    from zoo.heads.token_dropping import create_method

    for _, budget, options in settings(args):
        create_method(options["method"], budget, **{k: v for k, v in options.items() if k != "method"})


def profile(args: argparse.Namespace, model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each setting and way to launch; what does not go is said and left out."""
    from zoo.heads import token_dropping

    stock: dict[str, float] = {}
    for launch in args.launch:
        for name, budget, options in settings(args):
            try:
                with token_dropping.apply(model, budget, **options) as handle:
                    row = measure(args, handle, inputs, launch)
            except (NotImplementedError, ValueError) as error:
                print(f"{name} at {budget}, {launch}: {error}")
                continue
            if name == "stock":
                stock[launch] = row["ttft_ms"]
            told = {k: v for k, v in options.items() if k != "method"}
            yield {
                **describe(args, model, inputs),
                **row,
                "method": name,
                "budget": budget,
                "options": " ".join(f"{k}={v}" for k, v in told.items()),
                "launch": launch,
                # Against the stock model with the plain launches, if they were measured.
                "ttft_speedup": stock.get("eager", stock.get(launch, row["ttft_ms"])) / row["ttft_ms"],
            }


def measure(args: argparse.Namespace, handle: Any, inputs: dict[str, Any], launch: str) -> dict[str, Any]:
    """Times, sizes and memory of one setting."""
    import gc

    import torch
    import torch._dynamo

    from zoo.bench.timing import synchronize, wall_time

    device = inputs["input_ids"].device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    # generate() would go on with a larger static cache of an earlier setting.
    handle.model.__dict__.pop("_previous_max_cache_length", None)
    torch._dynamo.reset()
    first, several, sizes = calls(args, handle, inputs, launch)
    cache_bytes, visual_tokens, prompt_tokens = sizes()
    with torch.no_grad():
        prefill = wall_time([first], device, args.samples, 0.0)
        # A run of many tokens says as much as several of the first one.
        whole = wall_time([several], device, -(-args.samples // 3), 0.0) if args.new_tokens > 1 else prefill
    synchronize(device)
    step = (whole.p50 - prefill.p50) / max(args.new_tokens - 1, 1)
    return {
        "visual_tokens": visual_tokens,
        "prompt_tokens": prompt_tokens,
        "ttft_ms_p20": prefill.p20 * 1e3,
        "ttft_ms": prefill.p50 * 1e3,
        "ttft_ms_p80": prefill.p80 * 1e3,
        "step_ms": step * 1e3,
        "tokens_per_s": inputs["input_ids"].shape[0] * args.new_tokens / whole.p50,
        "kv_mib": cache_bytes / 2**20,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else "",
    }


def calls(args: argparse.Namespace, handle: Any, inputs: dict[str, Any], launch: str) -> tuple[Any, Any, Any]:
    """Functions: to the first token, all new tokens, and (cache bytes, visual tokens of an image, prompt tokens)."""
    model, image_token = handle.model, handle.model.config.image_token_id
    full = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"][0] == image_token).sum())
    if launch == "graph":
        runner = handle.capture(inputs, args.new_tokens)
        lost = full - runner.prompt_length
        sizes = runner.cache_bytes, visual - lost, runner.prompt_length
        return lambda: runner.prefill(inputs), lambda: runner.generate(inputs), lambda: sizes
    static = {"cache_implementation": "static"} if launch == "static" else {}
    common = dict(do_sample=False, pad_token_id=0, **static)

    def several() -> Any:
        return model.generate(**inputs, max_new_tokens=args.new_tokens, **common)

    def sizes() -> tuple[int, int, int]:
        out = model.generate(**inputs, max_new_tokens=args.new_tokens, return_dict_in_generate=True, **common)
        layers = out.past_key_values.layers
        prompt = (handle.prompt_length if handle.active else None) or full
        return sum(x.keys.nbytes + x.values.nbytes for x in layers), visual - (full - prompt), prompt

    return lambda: model.generate(**inputs, max_new_tokens=1, **common), several, sizes


# Results


def describe(args: argparse.Namespace, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a call share."""
    import datetime

    import transformers

    from zoo.bench.report import environment

    device = inputs["input_ids"].device
    seen = {name: value for name, value in environment(device).items() if name in COLUMNS}
    H, W = inputs["image_sizes"][0].tolist() if "image_sizes" in inputs else inputs["pixel_values"].shape[-2:]
    return {
        "model": args.model or f"random {args.random}",
        "batch": inputs["input_ids"].shape[0],
        "image": f"{H}x{W}",
        "new_tokens": args.new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "transformers": transformers.__version__,
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **seen,
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, with a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                raise ValueError(f"{path} has other columns than this version writes; choose another file.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})


def show(rows: list[dict[str, Any]]) -> None:
    """Print results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['model']}, {rows[0]['device']}, {rows[0]['dtype']}" if rows else "no results")
    names = {
        "method": "method", "budget": "budget", "launch": "launch", "batch": "batch", "visual_tokens": "visual tokens",
        "ttft_ms": "TTFT ms", "ttft_speedup": "speed-up", "step_ms": "ms a step", "tokens_per_s": "tokens/s",
        "kv_mib": "KV MiB", "peak_gib": "peak GiB",
    }  # fmt: skip
    for title in names.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row[name] for name in names)))
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def _budget(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction and no number of tokens") from None
