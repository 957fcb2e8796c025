"""CUDA graphs for functions of points or voxels, whose number changes from scan to scan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels.voxelize import Voxels


def record(run: Callable[[], Any], autocast: Any = False, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture what `run` launches.

    Args:
        run: Reads and writes tensors that stay where they are, and does not wait for the device.
        autocast: Dtype of the autocast region around, or False.
        pool: Memory pool of graphs that never run at the same time.

    Returns:
        The graph, and what `run` returned, which a replay writes again.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # A cast that is kept from outside the graph would not be made again when its parameter changes.
    with torch.autocast("cuda", enabled=bool(autocast), dtype=autocast or torch.float16, cache_enabled=False):
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool):
            out = run()
    return graph, out


class Captured(NamedTuple):
    """A graph, the tensors that it reads and what it writes."""

    graph: torch.cuda.CUDAGraph | None
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
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffer = torch.zeros(V, *features.shape[1:], dtype=features.dtype, device=features.device)
            coords = torch.zeros(V, 4, dtype=torch.int32, device=features.device)
            num = torch.zeros((), dtype=torch.int64, device=features.device)
        padded = voxels._replace(coords=coords, num=num)
        captured = Captured(None, buffer, padded, None)
        captured.load(features, voxels)
        graph, out = record(lambda: self.function(buffer, padded), autocast)
        return captured._replace(graph=graph, out=out)


class CloudBuffer:
    """Place for the points of a batch; rows without a point are NaN, which voxelisation leaves out.

    Args:
        shape: Samples, points of a sample at most, columns of a point.
        device: Of the points.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            self.cloud = torch.full(shape, torch.nan, device=device)  # [B, P, F]
            self._nothing = torch.full(shape[1:], torch.nan, device=device)
        self._used = [0] * shape[0]

    def load(self, clouds: Sequence[Tensor]) -> None:
        """Copy clouds [n, F] into the first rows, and NaN over what is left of the batch before."""
        sizes, pairs = [len(cloud) for cloud in clouds], []
        for place, cloud, n, used in zip(self.cloud, clouds, sizes, self._used, strict=True):
            pairs += [(place[:n], cloud), (place[n:used], self._nothing[: max(0, used - n)])]
        pairs = [(place, rows) for place, rows in pairs if len(rows)]
        # Copies of single tensors run faster, a joint one has a single launch.
        if len(pairs) > 2:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        else:
            for place, rows in pairs:
                place.copy_(rows)
        self._used = sizes


class CloudGraphs:
    """Run `function(cloud, rows)` on batches of point clouds, one CUDA graph for each size.

    The function takes points float32 [B, P, F], of which rows of NaN are padding, and the numbers of rows that it pads
    to itself; it must neither wait for the device nor change its results with padding. On a CPU it is called as it is,
    on the same padded points. Graphs share their memory, so that what is returned is overwritten by the next call of
    any size.

    Args:
        function: Returns tensors in any nesting.
        max_graphs: Graphs that are kept; the one that was not used for longest goes.
    """

    def __init__(self, function: Callable[[Tensor, Any], Any], max_graphs: int = 4) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be positive, got {max_graphs}.")
        self.function, self.max_graphs = function, max_graphs
        self.graphs: dict[Hashable, tuple[CloudBuffer, Callable[[], Any]]] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all graphs."""
        self.graphs.clear()

    def __call__(self, clouds: Sequence[Tensor], points: int, rows: Hashable) -> Any:
        """The function's result on clouds [n, F], each padded to `points` rows."""
        key = len(clouds), points, rows
        if key in self.graphs:
            buffer, run = self.graphs.pop(key)
            buffer.load(clouds)
        else:
            while len(self.graphs) >= self.max_graphs:
                del self.graphs[next(iter(self.graphs))]
            buffer, run = self._make(clouds, points, rows)
        self.graphs[key] = buffer, run
        return run()

    def _make(self, clouds: Sequence[Tensor], points: int, rows: Hashable) -> tuple[CloudBuffer, Callable[[], Any]]:
        buffer = CloudBuffer((len(clouds), points, clouds[0].shape[1]), clouds[0].device)
        buffer.load(clouds)

        def function() -> Any:
            return self.function(buffer.cloud, rows)

        if not buffer.cloud.is_cuda:
            return buffer, function
        if not self.graphs:
            # A pool that no graph uses any more cannot be taken up again.
            self._pool = torch.cuda.graph_pool_handle()
        graph, out = record(function, pool=self._pool)

        def replay() -> Any:
            graph.replay()
            return out

        return buffer, replay
