"""Plans under diffusers' context parallelism: in two processes, on the CPU or two GPUs, and what runs dense instead."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig

from zoo.heads import sparse_vdit

from .sparse_vdit_models import build

TOLERANCE = {"cpu": dict(rtol=1e-5, atol=2e-6), "cuda": dict(rtol=5e-3, atol=5e-3)}
# The kernels have no smaller tiles.
TILE = {"cpu": (16, 8), "cuda": (16, 16)}


def split(tiny, device: str) -> None:
    """Give each of two processes half of the tokens, outside of attention, and half of the heads within."""
    mesh = dist.init_device_mesh(device, (1, 2), mesh_dim_names=("ring", "ulysses"))
    # diffusers counts accelerators also where it is given a mesh of none.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        tiny.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))


def gradient(tiny, plan) -> torch.Tensor:
    tiny.model(**tiny.inputs, return_dict=False)[0].square().sum().backward()
    return tiny.model.get_submodule(plan.layers[0]).to_v.weight.grad


def check_heads_over_processes(name: str, device: str, plan_first: bool) -> None:
    tiny, alone = build(name), build(name)
    for model in (tiny, alone):
        model.model.to(device)
        # Text may be split too, and 9 tokens do not go into halves; its mask stock LTX-Video cannot split.
        model.inputs["encoder_hidden_states"] = model.inputs["encoder_hidden_states"][:, :8]
        if "encoder_attention_mask" in model.inputs:
            model.inputs["encoder_attention_mask"] = None
        model.inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in model.inputs.items()}
    dense, plan = alone(), alone.plan(tile=TILE[device])
    with sparse_vdit.use(alone.model, plan):
        sparse, expected = alone(), gradient(alone, plan)
    if not plan_first:
        split(tiny, device)
    with sparse_vdit.use(tiny.model, plan) as handle:
        if plan_first:
            split(tiny, device)
        torch.testing.assert_close(tiny(), sparse, **TOLERANCE[device])
        assert all(p.active and p.parallel is not None for p in handle.hook.processors)
        # Stock LTX-Video has no gradients in parallel.
        if name == "wan":
            # A process has the gradient of its tokens.
            found = gradient(tiny, plan)
            dist.all_reduce(found)
            torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(tiny(), dense, **TOLERANCE[device])


def process(rank: int, meeting: str, device: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "Sparse attention is off")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
    check_heads_over_processes("wan", device, plan_first=False)
    check_heads_over_processes("ltx", device, plan_first=True)
    dist.destroy_process_group()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def test_heads_over_processes(device, tmp_path) -> None:
    mp.spawn(process, (str(tmp_path / "meeting"), device), nprocs=2)


def configure(handle, **settings) -> None:
    defaults = dict(ring_degree=1, ulysses_degree=1, ulysses_anything=False)
    for processor in handle.hook.processors:
        processor._parallel_config = SimpleNamespace(
            context_parallel_config=SimpleNamespace(**{**defaults, **settings})
        )


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("wan", dict(ring_degree=2), "ring attention"),
        ("wan", dict(ulysses_degree=2, ulysses_anything=True), "pads heads"),
        ("wan", dict(ulysses_degree=3), "4 heads do not divide"),
        ("hunyuan", dict(ulysses_degree=2), "splits video and text"),
    ],
)
def test_what_runs_dense(name, settings, reason) -> None:
    tiny = build(name)
    with sparse_vdit.use(tiny.model, tiny.plan()) as handle:
        tiny()
        first = handle.hook.processors[0]
        assert first.is_sparse(handle.hook.step.tokens)
        configure(handle, **settings)
        with pytest.warns(UserWarning, match=reason):
            assert not first.is_sparse(handle.hook.step.tokens)


def test_a_search_needs_one_device() -> None:
    tiny = build("wan")
    tiny.model._parallel_config = SimpleNamespace()
    with pytest.raises(ValueError, match="Search on one device"):
        sparse_vdit.search(tiny.model, [tiny.inputs], density=0.5)
