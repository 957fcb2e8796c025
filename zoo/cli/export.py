"""`zoo export`: training checkpoint -> model folder."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint that `zoo fit` wrote (.ckpt)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--weights",
        choices=["auto", "ema", "raw"],
        default="auto",
        help="averaged or last weights (default: averaged where the run averaged)",
    )
    parser.add_argument("--half", action="store_true", help="store fp16 weights")


def run(args: argparse.Namespace) -> int:
    from zoo import hub

    folder = export(args.checkpoint, args.out, weights=args.weights, half=args.half)
    print(f"wrote {folder} ({(folder / hub.WEIGHTS).stat().st_size / 1e6:.2f} MB); load it as 'local-dir:{folder}'")
    return 0


def export(checkpoint: str, out: str, *, weights: str = "auto", half: bool = False):
    """Write the model of a training checkpoint in the hub layout and return the folder."""
    from zoo import hub
    from zoo.train.export import load_lightning_checkpoint

    model, info = load_lightning_checkpoint(checkpoint, weights=weights)
    data_config = dict(info["data_config"] or {})
    label_names = data_config.pop("label_names", None)
    # The checkpoint also logs learning rates and training losses, which say nothing about the weights.
    measured = {name: value for name, value in info["metrics"].items() if name.startswith(("val/", "test/"))}
    metrics = {name: float(value) for name, value in measured.items()}
    return hub.save_model(
        model, out, metrics=metrics, label_names=label_names, data_config=data_config or None, half=half
    )
