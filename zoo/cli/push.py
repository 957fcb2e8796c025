"""`zoo push`: model folder -> hub."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="model folder (config.json, model.safetensors, README.md)")
    parser.add_argument("repo", help="repository, org/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")


def run(args: argparse.Namespace) -> int:
    from zoo import hub

    url = hub.push(args.folder, args.repo, private=args.private, revision=args.revision, create_pr=args.create_pr)
    print(f"uploaded: {url}")
    return 0
