"""`zoo fit`, `zoo validate` and `zoo test`: everything after the command goes to Lightning's own command line."""


def run(command: str, argv: list[str]) -> int:
    from zoo.train.cli import main

    return main([command, *argv]) or 0
