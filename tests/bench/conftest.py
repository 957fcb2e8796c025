"""Suites that tests write, and an op that is right or wrong on demand."""

from __future__ import annotations

import pytest
import torch
import yaml

from zoo.bench.ops import OPS, Op


class Square(Op):
    """x squared, right or wrong on demand."""

    leaves = ("x",)

    def __init__(self, ours, peer=None):
        self.functions = {"zoo": ours, "plain": lambda inputs: inputs["x"] * inputs["x"]}
        if peer:
            self.functions["peer"] = peer

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(shape["batch"], 8, generator=generator, device=device).to(dtype)
        return {"x": x.requires_grad_()}

    def providers(self, device):
        return self.functions

    def bytes(self, shape, dtype, backward):
        return 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.fixture
def write_suite(tmp_path):
    def write(**data):
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(data))
        return str(path)

    return write


@pytest.fixture
def toy(monkeypatch, write_suite):
    """A suite of one op named ``toy``."""

    def make(*functions):
        monkeypatch.setitem(OPS, "toy", Square(*functions))
        return write_suite(ops=["toy"], shapes=[{"name": "small", "batch": 2}])

    return make
