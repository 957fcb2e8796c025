"""Benchmarks: ``zoo bench`` times the ops and the models against their peers in one run.

Suites are YAML data (``benchmarks/suites`` in a checkout, ``zoo/suites`` in an installed package), results are CSV
rows.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of ``zoo bench``.

    Args:
        argv: Arguments after the command's name; ``None`` reads them from ``sys.argv``.

    Returns:
        Exit status: 0 for success, 1 where an op was refused or a measurement failed, 2 for a usage error.
    """
    from zoo.bench.runner import main as run

    return run(argv)
