"""Clocks: GPU time under CUDA-graph replay, eager wall time, peak memory, and the two ceilings of the roofline."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Timing(NamedTuple):
    """20th, 50th and 80th percentile, in seconds."""

    p20: float
    p50: float
    p80: float

    def scaled(self, factor: float) -> Timing:
        """Return the percentiles multiplied by ``factor``."""
        return Timing(*(value * factor for value in self))

    def rate(self, amount: float) -> Timing:
        """Return ``amount`` per second; the slowest time gives the lowest rate."""
        return Timing(amount / self.p80, amount / self.p50, amount / self.p20)


def percentiles(values: Sequence[float]) -> Timing:
    """Return the 20th, 50th and 80th percentile with linear interpolation."""
    data = torch.tensor(sorted(values), dtype=torch.float64)
    return Timing(*torch.quantile(data, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_sets(nbytes: int, device: torch.device) -> int:
    """Number of input sets to rotate so that the L2 cache does not serve the inputs (1 on a CPU)."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, math.ceil(3 * cache / max(nbytes, 1))))


def wall_time(calls: Sequence[Call], device: torch.device, samples: int, min_seconds: float = 2e-3) -> Timing:
    """Wall time of one call, launches and host work included, over rotating ``calls``.

    A sample covers enough calls to last ``min_seconds``, one call at 0, and ends with one synchronisation.
    """
    for call in calls:
        call()
    synchronize(device)
    repeats = 1
    if min_seconds > 0:
        start = time.perf_counter()
        calls[0]()
        synchronize(device)
        repeats = max(1, min(100, math.ceil(min_seconds / max(time.perf_counter() - start, 1e-7))))
    values, turn = [], 0
    for _ in range(samples):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            calls[turn % len(calls)]()
            turn += 1
        synchronize(device)
        values.append((time.perf_counter() - start) / repeats)
    return percentiles(values)


def graph_time(calls: Sequence[Call], samples: int, min_seconds: float = 5e-3) -> Timing:
    """GPU time of one call under CUDA-graph replay: the host and its launches stay out of the number.

    One graph holds many calls that rotate over the input sets; a sample is one replay between two events, divided by
    the number of calls.

    Raises:
        RuntimeError: The calls cannot be captured (a synchronisation or an allocation on the host, for instance).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
        side.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(side)
        for call in calls:
            call()
        end.record(side)
        side.synchronize()
    torch.cuda.current_stream().wait_stream(side)
    turns = max(1, math.ceil(min_seconds / max(begin.elapsed_time(end) * 1e-3, 1e-6)))
    repeats = len(calls) * min(turns, max(1, 256 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            for turn in range(repeats):
                calls[turn % len(calls)]()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        values = []
        for _ in range(samples):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            values.append(begin.elapsed_time(end) * 1e-3 / repeats)
    finally:
        graph.reset()
    return percentiles(values)


def peak_memory(build: Callable[[], Call], device: torch.device) -> float | None:
    """Peak memory in MiB of one call together with its inputs, above what was allocated before; None on a CPU.

    ``build`` makes the inputs and returns the call. It runs twice: compilation and autotuning fall into the first turn.
    """
    if device.type != "cuda":
        return None
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        call = build()
        # Making the inputs can take more than the call does.
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del call
    return peak / 2**20


class SteadyMemory:
    """Peak memory in MiB of one step in the steady state, above what was taken at construction.

    Args:
        device: Where the step runs.
        reserved: Count what the allocator holds instead of what tensors occupy.
    """

    def __init__(self, device: torch.device, reserved: bool = False) -> None:
        self.device, self.reserved = device, reserved
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = self._peak()

    def _peak(self) -> int:
        stats = torch.cuda.max_memory_reserved if self.reserved else torch.cuda.max_memory_allocated
        return stats(self.device)

    def measure(self, step: Call) -> float | None:
        """Run ``step`` once more; None on a CPU."""
        if self.device.type != "cuda":
            return None
        if self.reserved:
            gc.collect()
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return (self._peak() - self.before) / 2**20


@functools.cache
def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes per second of a large device-to-device copy, reads and writes counted; None on a CPU.

    The better of two sizes, both far beyond the cache: very large copies can be slower.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    rates = []
    for size in (min(2**28, free // 8), min(2**30, free // 8)):
        source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
        target = torch.empty_like(source)
        timing = graph_time([functools.partial(target.copy_, source)], samples=20)
        rates.append(2 * source.numel() * 4 / timing.p50)
    return max(rates)


@functools.cache
def matmul_rate(dtype: torch.dtype, device: torch.device) -> float | None:
    """FLOP per second of a large matrix product in ``dtype``; None on a CPU."""
    if device.type != "cuda":
        return None
    size = 4096 if dtype == torch.float32 else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    timing = graph_time([lambda: a @ b], samples=10)
    return 2 * size**3 / timing.p50
