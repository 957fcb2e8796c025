"""What an adapter of an op gives: inputs, providers, the float64 reference and the roofline's counts.

Floors count every tensor once: what a perfect kernel reads and writes. ``N`` tokens of all images together, ``C``
channels, ``b`` bytes per element, ``G`` regions, ``K`` regions kept, ``L`` keys per query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Inputs = dict[str, Any]
Provider = Callable[[Inputs], torch.Tensor]


class Op:
    """Adapter of one op. Subclasses are registered in ``OPS`` under the name that suites use."""

    # Names of the inputs that receive a gradient.
    leaves: tuple[str, ...] = ()
    # Providers held to the correctness gate as ours; a wrong peer only loses its own rows.
    ours: tuple[str, ...] = ("zoo",)
    # The provider that speed-ups and error bounds refer to.
    baseline = "plain"
    # Peers that compute another function for the same purpose: timed, but not compared with the reference.
    alternatives: tuple[str, ...] = ()

    def make_inputs(self, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs of one shape; tensors named in ``leaves`` require a gradient."""
        raise NotImplementedError

    def providers(self, device: torch.device) -> dict[str, Provider]:
        """Callables of the op by provider name, ours first."""
        raise NotImplementedError

    def reference(self, inputs: Inputs) -> torch.Tensor:
        """The definition, evaluated on float64 inputs."""
        return self.providers(torch.device("cpu"))[self.baseline](inputs)

    def facts(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """What else a row's configuration tells about a shape."""
        return {}

    def gate_shape(self, shape: Mapping[str, Any]) -> Mapping[str, Any]:
        """Shape of the correctness gate; an op of many independent parts can have fewer there."""
        return shape

    def gate_inputs(self, inputs: Inputs) -> Inputs:
        """Inputs of the correctness gate; an op with discrete decisions fixes them here."""
        return inputs

    def invariants(self, inputs: Inputs) -> str | None:
        """What is wrong beyond the numbers (a bad choice of regions, say); ``None`` if all is well."""
        return None

    def bytes(self, shape: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
        """Least traffic to device memory."""
        raise NotImplementedError

    def flops(self, shape: Mapping[str, Any], backward: bool) -> int:
        """FLOPs of matrix products, which run on tensor cores; 0 for an op without any."""
        return 0


def element_size(dtype: torch.dtype) -> int:
    """Bytes per element."""
    return torch.empty((), dtype=dtype).element_size()


def input_bytes(inputs: Inputs) -> int:
    """Bytes of all tensors among the inputs."""
    return sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, torch.Tensor))


def upcast(inputs: Inputs, leaves: tuple[str, ...]) -> Inputs:
    """Float64 copy of the inputs with fresh leaves; integer tensors and numbers stay."""
    copy = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().double().requires_grad_(name in leaves)
        copy[name] = value
    return copy


def random_views(batch, height, width, channels, dtype, device, generator) -> list[torch.Tensor]:
    """Query, key and value maps as a linear layer leaves them: three strided views of one packed tensor."""
    # [B, H, W, 3C]
    packed = torch.randn(batch, height, width, 3 * channels, generator=generator, device=device, dtype=torch.float32)
    return [view.detach().requires_grad_() for view in packed.to(dtype).chunk(3, dim=-1)]
