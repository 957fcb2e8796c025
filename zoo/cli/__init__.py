"""The `zoo` command.

Each command is a small module with `add_arguments(parser)` and `run(args) -> int`; it imports what is heavy inside
`run`, so that help and mistakes in arguments are answered at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

# command: (module, one line of help)
COMMANDS = {
    "list": ("zoo.cli.list_models", "list the models with size, cost and weights"),
    "info": ("zoo.cli.info", "describe one model"),
    "predict": ("zoo.cli.predict", "classify images, or find objects in point clouds"),
    "fit": ("zoo.cli.lightning", "train a model"),
    "validate": ("zoo.cli.lightning", "measure a model on validation data"),
    "test": ("zoo.cli.lightning", "measure a model on test data"),
    "export": ("zoo.cli.export", "turn a training checkpoint into a model folder"),
    "convert": ("zoo.cli.convert", "turn an official checkpoint into a model folder"),
    "push": ("zoo.cli.push", "upload a model folder to a hub"),
    "pull": ("zoo.cli.pull", "download a model folder from a hub and verify it"),
    "bench": ("zoo.cli.bench", "time the ops and models"),
    "vdit": ("zoo.cli.vdit", "search, apply or describe sparse attention plans of video diffusion models"),
    "vlm": ("zoo.cli.vlm", "time vision-language models with fewer visual tokens"),
    "app": ("zoo.cli.app", "serve a web page to try the models"),
    "demo": ("zoo.cli.demo", "predict, train, export and reload a small model"),
}

# These have parsers of their own, so even --help goes through to them.
PASS_THROUGH = ("fit", "validate", "test", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage.

    Args:
        argv: Arguments without the program name; None means those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv[:1]
    argv = argv[1:] if debug else argv
    try:
        if argv and argv[0] in PASS_THROUGH:
            return _module(argv[0]).run(argv[0], argv[1:])
        args = _parser(argv[0] if argv else None).parse_args(argv)
        return _module(args.command).run(args)
    except SystemExit as error:
        # argparse leaves this way: 0 after --help, 2 on wrong usage.
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`zoo list | head`) has left.
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug or not _is_users(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1


def _parser(command: str | None) -> argparse.ArgumentParser:
    import zoo

    parser = argparse.ArgumentParser(prog="zoo", description="Efficient attention models for vision.")
    parser.add_argument("--version", action="version", version=f"zoo {zoo.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error (put it first)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def _module(command: str):
    return importlib.import_module(COMMANDS[command][0])


def _is_users(error: Exception) -> bool:
    """Tell an error that the user can mend from a defect of the program."""
    from zoo.hub import HubError

    return isinstance(error, (HubError, ValueError, OSError, ImportError))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
