"""`zoo bench`: everything after the command goes to the benchmark runner."""


def run(command: str, argv: list[str]) -> int:
    from zoo.bench import main

    return main(argv) or 0
