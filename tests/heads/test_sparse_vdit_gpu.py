"""Plans on a GPU: kernels against the reference on the CPU, compilation, and offloading between the two."""

from __future__ import annotations

import pytest
import torch

from zoo.heads import sparse_vdit

from .sparse_vdit_models import BUILDERS, GRID, TEXT, Tiny, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The kernels have no smaller tiles.
TILE = (16, 16)


def on_gpu(name: str) -> Tiny:
    tiny = build(name)
    tiny.model.cuda()
    tiny.inputs = {key: move(value) for key, value in tiny.inputs.items()}
    return tiny


def move(value):
    if isinstance(value, tuple):
        return tuple(map(move, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", BUILDERS)
def test_gpu_equals_cpu(name, backend) -> None:
    cpu, gpu = build(name), on_gpu(name)
    plan = cpu.plan(tile=TILE, bins=2)
    with sparse_vdit.use(cpu.model, plan):
        expected = cpu()
    dense = gpu()
    with sparse_vdit.use(gpu.model, plan, backend=backend):
        torch.testing.assert_close(gpu().cpu(), expected, rtol=5e-3, atol=5e-3)
    assert torch.equal(gpu(), dense)


@pytest.mark.parametrize("name", BUILDERS)
def test_compiled_model(name) -> None:
    gpu = on_gpu(name)
    plan = gpu.plan(tile=TILE, bins=2, calibrated={"grid": list(GRID), "text_length": TEXT})
    with sparse_vdit.use(gpu.model, plan, backend="triton"):
        times = (700, 100)
        expected = [gpu(timestep=torch.tensor([t, t]).cuda()) for t in times]
        torch._dynamo.reset()
        compiled = torch.compile(gpu.model, fullgraph=True)
        for t, value in zip(times, expected, strict=True):
            with torch.no_grad():
                call = {**gpu.inputs, "timestep": torch.tensor([t, t]).cuda()}
                torch.testing.assert_close(compiled(**call, return_dict=False)[0], value, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("plan_first", [True, False])
def test_group_offload(plan_first) -> None:
    """Weights wait in main memory; the tables follow the activations."""
    gpu = on_gpu("wan")
    plan = gpu.plan(tile=TILE, calibrated={"grid": list(GRID)})
    with sparse_vdit.use(gpu.model, plan):
        expected = gpu()
    offload = dict(onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1)
    gpu.model.cpu()
    if not plan_first:
        gpu.model.enable_group_offload(**offload)
    with sparse_vdit.use(gpu.model, plan):
        if plan_first:
            gpu.model.enable_group_offload(**offload)
        torch.testing.assert_close(gpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    gpu = on_gpu("wan")
    gpu.model.to(dtype)
    gpu.inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in gpu.inputs.items()}
    with sparse_vdit.use(gpu.model, gpu.plan(tile=TILE), backend="reference"):
        expected = gpu()
    with sparse_vdit.use(gpu.model, gpu.plan(tile=TILE), backend="triton"):
        torch.testing.assert_close(gpu(), expected, rtol=5e-2, atol=5e-2)


def test_search_on_the_gpu() -> None:
    gpu = on_gpu("wan")
    calls = [{**gpu.inputs, "timestep": torch.tensor([t, t]).cuda()} for t in (900, 500, 100)]
    settings = dict(bins=3, dense_steps=0, tile=TILE, progress=False, backend="triton")
    plan = sparse_vdit.search(gpu.model, calls, density=0.5, **settings)
    assert plan.search["device"] == torch.cuda.get_device_name()
    # At this size every pattern takes the time of a launch: no share below 1 is sure to be met.
    timed = sparse_vdit.search(gpu.model, calls, time=1.0, **settings)
    assert len(timed.search["costs"]) == len(sparse_vdit.CANDIDATES)
    assert plan.report().measure("cuda", torch.float32, "triton").measured["dense_ms"] > 0
