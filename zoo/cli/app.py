"""`zoo app`: a web page to try the models."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from zoo.app import build

    build().launch(server_name=args.host, server_port=args.port, share=False, inbrowser=False)
    return 0
