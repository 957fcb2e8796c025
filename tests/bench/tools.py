"""What the tests of the benchmark runner share."""

from __future__ import annotations

import csv

import torch

from zoo.bench import main

CPU = torch.device("cpu")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quick(*args):
    return main([*args, "--quick", "--device", "cpu"])
