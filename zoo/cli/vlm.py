"""`zoo vlm`: vision-language models with fewer visual tokens."""

import argparse
import importlib
import importlib.util

# action: (module with add_arguments(parser) and run(args), one line of help)
ACTIONS = {
    "profile": ("zoo.cli.vlm_profile", "time a model at several budgets and methods of token dropping"),
    "demo": ("zoo.cli.vlm_demo", "small trained model: accuracy, time and kept tokens at several budgets"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (module, text) in ACTIONS.items():
        sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        importlib.import_module(module).add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("zoo vlm needs transformers: pip install 'attention-zoo[transformers]'")
    return importlib.import_module(ACTIONS[args.action][0]).run(args)
