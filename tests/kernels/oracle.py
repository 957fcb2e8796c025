"""How an op is judged: against its reference in float64, by what plain torch loses in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of `function` and its gradients with respect to every input."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_as_exact_as_torch(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, names: list[str]
) -> None:
    """Error to the float64 reference at most twice that of the reference run in the inputs' own dtype.

    That holds for the root mean square. The largest error of few thousand values is a matter of luck, so it may be four
    times the reference's: backward kernels take sum(do * out) from a rounded `out`, which the reference does not.
    Gradients may vanish where there is nothing to choose from; then they are judged by the size of the output's.
    """
    exact = with_gradients(reference, [x.double() for x in inputs], grad.double())
    plain = with_gradients(reference, inputs, grad)
    actual = with_gradients(op, inputs, grad)
    for name, e, p, a in zip(["out", *names], exact, plain, actual, strict=True):
        assert a.shape == e.shape and a.dtype == p.dtype, f"{name}: {a.shape} {a.dtype}, expected {e.shape} {p.dtype}"
        assert torch.isfinite(a).all(), f"{name} is not finite"
        size = e.abs().max() if name == "out" else torch.maximum(e.abs().max(), grad.double().abs().max())
        for kind, factor, measure in (("root mean square", 2, _root_mean_square), ("largest", 4, _largest)):
            allowed = factor * measure(p.double() - e) + 1e-5 * size
            error = measure(a.double() - e)
            assert error <= allowed, f"{name}: {kind} error {error:.3g}, allowed {allowed:.3g}"


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()
