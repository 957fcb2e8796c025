"""Model benchmarks: images per second and peak memory of inference and of a training step, and a profile by kernel."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F

from zoo.accelerate import accelerate
from zoo.backbones.padded_graphs import record
from zoo.kernels._dispatch import reference_only

# Modes of torch.compile, "none" for eager, and "graph" for the kernels of eager replayed as one CUDA graph: the time of
# the GPU alone, whatever the host. "reduce-overhead" replays CUDA graphs too.
COMPILE_MODES = ("none", "graph", "default", "reduce-overhead", "max-autotune")
# First match wins. Names of CUDA kernels, Triton kernels and, on a CPU, of aten operators.
KERNEL_GROUPS = (
    ("optimizer", r"adam|multi_tensor_apply|optimizer"),
    ("attention", r"attention|attn|flash|fmha|sdpa|bilevel|halo|route_regions|softmax"),
    ("conv", r"conv|dgrad|wgrad|implicit_gemm|depthwise|cudnn.*(fprop|engine)|im2col|nchwtonhwc|nhwctonchw"),
    ("gemm", r"gemm|cutlass|nvjet|cublas|matmul|::(mm|bmm|addmm|baddbmm)\b|splitkreduce|xmma"),
    ("norm", r"norm|batch_stats|welford"),
    (
        "elementwise",
        r"elementwise|vectorized|copy|memcpy|memset|reduce|cat|fill|pointwise|triton_(poi|red|per)|index|gather|scatter|relu"
        r"|::(add|mul|sub|div|gelu|sum|mean|clone|contiguous|to)_?\b",
    ),
)


@dataclass(frozen=True)
class Job:
    """One model in one way of running it."""

    model: str
    batch: int
    size: int
    dtype: torch.dtype
    mode: str
    compile: str
    channels_last: bool
    device: torch.device
    # What `providers_of` names: "accelerate" runs timm's model on our ops, "plain" ours without kernels.
    provider: str = ""

    @property
    def config(self) -> str:
        """The settings as one string for tables and CSV rows."""
        flags = f"compile={self.compile} channels_last={int(self.channels_last)}"
        return f"batch={self.batch} size={self.size} {flags}"


def provider_of(model: str) -> str:
    """``zoo`` for our models, ``timm`` for every other one."""
    if not timm.is_model(model):
        raise ValueError(f"unknown model {model!r}: neither zoo nor timm registers it")
    return "zoo" if timm.model_entrypoint(model).__module__.startswith("zoo.") else "timm"


def providers_of(model: str, accelerate: bool, plain: bool = False) -> list[str]:
    """Who runs a model: its own package, and where the suite asks for it `zoo.accelerate` or separate torch operations.

    Args:
        model: Name of the model.
        accelerate: Whether to run a model of timm under `zoo.accelerate` too.
        plain: Whether to run a model of ours on the references of its ops too.
    """
    own = provider_of(model)
    second = {"timm": ["accelerate"] * accelerate, "zoo": ["plain"] * plain}
    return [own, *second[own]]


def build(job: Job) -> Callable[[], Any]:
    """Make the model and its inputs and return one step.

    A step is a forward pass (``inference``), one with a backward pass (``forward+backward``), or that and an AdamW
    update (``train``).

    Raises:
        ValueError: CUDA graphs are asked for on a CPU.
    """
    if job.compile == "graph" and job.device.type != "cuda":
        raise ValueError("compile=graph replays CUDA graphs: it needs a GPU")
    step = _eager_step(job)
    if job.compile != "graph":
        return step
    return Replay(*record(step), step)


class Replay(NamedTuple):
    """A recorded step."""

    graph: torch.cuda.CUDAGraph
    out: torch.Tensor
    # Holds the model and its inputs: a graph reads their memory without keeping them alive.
    step: Callable[[], Any]

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.out


def _eager_step(job: Job) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = timm.create_model(job.model, **size_argument(job.model, job.size))
    if job.provider == "accelerate":
        accelerate(model)
    model = model.to(job.device).train(job.mode != "inference")
    images = torch.randn(job.batch, 3, job.size, job.size, device=job.device)
    if job.channels_last:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    forward = model if job.compile in ("none", "graph") else torch.compile(model, mode=job.compile)
    # float32 needs no autocast. A graph would go on reading casts that its warm-up cached, long after they are gone.
    autocast = torch.autocast(
        job.device.type, job.dtype, enabled=job.dtype != torch.float32, cache_enabled=job.compile != "graph"
    )

    if job.mode == "inference":

        def step() -> torch.Tensor:
            with kernels_of(job.provider), torch.no_grad(), autocast:
                return forward(images)

        return step

    optimizer = None
    if job.mode == "train":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.05, fused=True, capturable=job.compile == "graph"
        )
    target = torch.randint(model.num_classes, (job.batch,), device=job.device)

    def step() -> torch.Tensor:
        with kernels_of(job.provider):
            with autocast:
                loss = F.cross_entropy(forward(images), target)
            loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def kernels_of(provider: str) -> contextlib.AbstractContextManager[None]:
    """Where a provider's steps run: without our kernels for ``plain``."""
    return reference_only() if provider == "plain" else contextlib.nullcontext()


def size_argument(model: str, size: int) -> dict[str, int]:
    """The keyword by which a model of fixed input size takes another one; empty where none is needed."""
    cfg = timm.get_pretrained_cfg(model)
    return {"img_size": size} if cfg and cfg.fixed_input_size and cfg.input_size[-1] != size else {}


def kernel_group(name: str, groups: Sequence[tuple[str, str]] = KERNEL_GROUPS) -> str:
    """Group of a kernel or operator by its name."""
    for group, pattern in groups:
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return "other"


@dataclass(frozen=True)
class Profile:
    """Milliseconds per step, by group and by kernel (name, group, milliseconds, calls), the largest first."""

    groups: list[tuple[str, float]]
    kernels: list[tuple[str, str, float, float]]


def profile(job: Job, steps: int = 3) -> Profile:
    """Profile some steps of a job."""
    return profile_step(build(job), job.device, steps)


def profile_step(
    step: Callable[[], Any], device: torch.device, steps: int = 3, groups: Sequence[tuple[str, str]] = KERNEL_GROUPS
) -> Profile:
    """Profile some steps after a warm-up with torch's profiler; GPU kernels where there is a GPU, else operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    for _ in range(3 if on_gpu else 1):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profiler(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels, times = [], defaultdict(float)
    for event in recorded.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        time = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / steps
        if time > 0:
            group = kernel_group(event.key, groups)
            times[group] += time
            kernels.append((event.key, group, time, event.count / steps))
    return Profile(
        sorted(times.items(), key=lambda item: -item[1]),
        sorted(kernels, key=lambda item: -item[2]),
    )
