"""`zoo pull`: hub -> model folder."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", help="repository, org/name or org/name@revision")
    parser.add_argument("--out", help="folder to write (default: the repository's name)")
    parser.add_argument("--revision", help="branch, tag or commit")


def run(args: argparse.Namespace) -> int:
    from zoo import hub

    folder = hub.pull(args.repo, args.out or args.repo.partition("@")[0].rpartition("/")[2], revision=args.revision)
    print(f"wrote {folder}; load it as 'local-dir:{folder}'")
    return 0
