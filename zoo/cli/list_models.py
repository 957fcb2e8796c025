"""`zoo list`: a table of the models."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="?", default="", help="wildcard filter, for instance 'biformer*'")
    parser.add_argument("--pretrained", action="store_true", help="only models with weights")
    parser.add_argument("--json", action="store_true", help="print JSON, one model a line")


def run(args: argparse.Namespace) -> int:
    import zoo

    infos = [zoo.model_info(name) for name in zoo.list_models(args.filter)]
    if args.pretrained:
        infos = [info for info in infos if info.weights]
    if args.json:
        for info in infos:
            print(json.dumps(info.to_dict()))
    elif not infos:
        raise ValueError(f"No model matches '{args.filter}'. `zoo list` shows all models.")
    else:
        from rich.console import Console

        Console().print(model_table(infos))
    return 0


def model_table(infos: list):
    """Return the rich table of some `ModelInfo`."""
    from rich.table import Table

    table = Table("model", title="Models")
    table.add_column("params (M)", justify="right")
    table.add_column("GMACs", justify="right")
    table.add_column("input", justify="right")
    table.add_column("weights")
    for info in infos:
        table.add_row(*model_cells(info))
    return table


def model_cells(info) -> tuple[str, ...]:
    """Name, parameters in millions, GMACs, input and weights of a `ModelInfo`, as text."""
    weights = ", ".join(describe_weights(w, 1) for w in info.weights) or ("convert" if info.get_weights else "none")
    size = "x".join(map(str, info.input_size[1:]))
    return info.name, f"{info.params / 1e6:.2f}", f"{info.gmacs:.2f}", size, weights


def describe_weights(weights, most: int | None = None) -> str:
    """Return the tag of a `WeightsInfo` with its measured results, or with the first of them."""
    tag = weights.name.partition(".")[2] or "default"
    return " ".join([tag, *(f"{key} {value:g}" for key, value in list(weights.metrics.items())[:most])])
