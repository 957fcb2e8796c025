"""`zoo info`: all that is known about one model."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="model name, with or without a tag")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import zoo

    info = zoo.model_info(args.name)
    if args.json:
        print(json.dumps(info.to_dict()))
        return 0
    from rich.console import Console
    from rich.table import Table

    from zoo.cli.list_models import describe_weights

    table = Table(show_header=False, box=None)
    rows = {
        "name": info.name,
        "family": info.family,
        "task": info.task,
        "parameters": f"{info.params:,} ({info.params / 1e6:.2f} M)",
        "GMACs": f"{info.gmacs:.3f}",
        "input": " x ".join(map(str, info.input_size)),
        "license": info.license,
        "paper": info.paper,
        "weights": "\n".join(f"{describe_weights(w)} ({w.source}, {w.num_classes} classes)" for w in info.weights),
        "official weights": info.get_weights,
    }
    for key, value in rows.items():
        table.add_row(key, value or "none")
    Console().print(table)
    return 0
