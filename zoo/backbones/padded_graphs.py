"""CUDA graphs for functions of voxels, whose number changes from scan to scan."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels.voxelize import Voxels


class Captured(NamedTuple):
    """A graph, the tensors that it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    features: Tensor
    voxels: Voxels
    out: Any

    def load(self, features: Tensor, voxels: Voxels) -> None:
        """Copy a scan into the first rows; the others become padding."""
        V = len(features)
        self.features[:V].copy_(features)
        self.features[V:].zero_()
        coords = self.voxels.coords
        coords[:V].copy_(voxels.coords)
        coords[V:].zero_()
        coords[V:, 0].fill_(voxels.batch_size)
        if voxels.num is None:
            self.voxels.num.fill_(V)
        else:
            self.voxels.num.copy_(voxels.num)


class PaddedGraphs:
    """Run `function(features, voxels)` as a CUDA graph, one for each number of rows rounded up.

    A small scan is bound by launches, not by work: a graph launches all kernels at once. The function must neither
    wait for the device nor change its results with padding. On a CPU, or where gradients are recorded, it is called as
    it is.

    Parameters that change in place (`load_state_dict`, an optimiser's step) are seen by the graphs; after moving or
    replacing them call `clear`. What is returned is overwritten by the next call of the same size.

    Args:
        function: Takes features [V, C] and voxels, returns tensors in any nesting.
        rows: Rows are padded to a multiple of this.
    """

    def __init__(self, function: Callable[[Tensor, Voxels], Any], rows: int = 2048) -> None:
        if rows < 1:
            raise ValueError(f"rows must be positive, got {rows}.")
        self.function, self.rows = function, rows
        self.graphs: dict[Hashable, Captured] = {}

    def clear(self) -> None:
        """Forget all graphs."""
        self.graphs.clear()

    def __call__(self, features: Tensor, voxels: Voxels) -> Any:
        """The function's result on padded voxels."""
        if not features.is_cuda or torch.is_grad_enabled():
            return self.function(features, voxels)
        V = -(-max(1, len(features)) // self.rows) * self.rows
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = V, features.shape[1:], features.dtype, features.device, voxels.batch_size, voxels.shape, autocast
        if key not in self.graphs:
            self.graphs[key] = self._capture(V, features, voxels, autocast)
        captured = self.graphs[key]
        captured.load(features, voxels)
        captured.graph.replay()
        return captured.out

    def _capture(self, V: int, features: Tensor, voxels: Voxels, autocast: Any) -> Captured:
        buffer = features.new_zeros(V, *features.shape[1:])
        num = torch.zeros((), dtype=torch.int64, device=features.device)
        padded = voxels._replace(coords=voxels.coords.new_zeros(V, 4), num=num)
        captured = Captured(torch.cuda.CUDAGraph(), buffer, padded, None)
        captured.load(features, voxels)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A cast that is kept from outside the graph would not be made again when its parameter changes.
        settings = dict(enabled=bool(autocast), dtype=autocast or torch.float16, cache_enabled=False)
        with torch.autocast("cuda", **settings):
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.function(buffer, padded)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(captured.graph):
                out = self.function(buffer, padded)
        return captured._replace(out=out)
