"""The correctness gate: no time without a right answer.

The bound is relative to what torch itself loses: an error of at most twice that of the plain formulation in the same
dtype, plus a small term on the scale of the result, for the output and for every gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.bench.ops import Inputs, Op, Provider, upcast

# Slack in units of the result's largest value, or of 1 for small results: orders of summation differ.
SLACK = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def evaluate(provider: Provider, inputs: Inputs, leaves: tuple[str, ...], seed: int = 1) -> dict[str, torch.Tensor]:
    """Output, and gradients of `leaves` by name for a random gradient of the output."""
    present = [name for name in leaves if name in inputs]
    with torch.set_grad_enabled(bool(present)):
        out = provider(inputs)
    if not present:
        return {"output": out.detach()}
    generator = torch.Generator(out.device).manual_seed(seed)
    # Drawn in bfloat16, so that every dtype receives the same values.
    grad = torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype)
    grads = torch.autograd.grad(out, [inputs[name] for name in present], grad)
    return {"output": out.detach(), **{f"gradient of {name}": g for name, g in zip(present, grads, strict=True)}}


def check(
    op: Op, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device, names: list[str], backward: bool = True
) -> dict[str, str]:
    """Compare the providers ``names`` with the float64 reference at one shape, gradients too with ``backward``.

    Returns:
        The reason of refusal for every provider that failed.
    """
    providers = op.providers(device)
    failures: dict[str, str] = {}
    inputs = op.make_inputs(op.gate_shape(shape), dtype, device)
    fixed = op.gate_inputs(inputs)
    problem = op.invariants(fixed)
    if problem:
        return {name: problem for name in names if name in op.ours}
    leaves = op.leaves if backward else ()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        expected = evaluate(op.reference, upcast(fixed, op.leaves), leaves)
        bounds = {}
        for name, value in evaluate(providers[op.baseline], fixed, leaves).items():
            bounds[name] = 2 * distance(value, expected[name]) + SLACK[dtype] * scale(expected[name])
        for provider in names:
            if provider == op.baseline or provider in op.alternatives:
                continue
            try:
                found = evaluate(providers[provider], dict(fixed), leaves)
            except Exception as error:  # whatever a provider raises refuses this provider alone
                failures[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                continue
            for name, bound in bounds.items():
                error = distance(found[name], expected[name])
                # Written so that NaN fails as well.
                if not error <= bound:
                    failures[provider] = f"{name} is off by {error:.2e}, allowed {bound:.2e}"
                    break
    return failures


def scale(expected: torch.Tensor) -> float:
    """Largest absolute value, at least 1."""
    return max(1.0, expected.abs().max().item()) if expected.numel() else 1.0


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; a wrong shape is infinitely far."""
    if value.shape != expected.shape:
        return float("inf")
    return (value.double() - expected).abs().max().item() if value.numel() else 0.0
