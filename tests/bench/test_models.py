"""Suites of models, detectors and the sweep over sizes."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import Mock

import pytest
import torch

from zoo.bench import detectors, main, models, resolution
from zoo.kernels import _dispatch

from .tools import quick, rows_of


def test_model_suite_runs(write_suite, tmp_path):
    suite = write_suite(models=["test_convnext"], batch=2, size=32)
    assert quick(suite, "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "toy.csv")
    assert [(row["mode"], row["provider"], row["unit"]) for row in rows] == [
        ("inference", "timm", "img/s"),
        ("train", "timm", "img/s"),
    ]
    assert all(float(row["p50"]) > 0 for row in rows)


def test_models_of_timm_run_under_accelerate_too(write_suite, tmp_path):
    suite = write_suite(models=["halonet26t", "biformer_nano"], accelerate=True, batch=1, size=256, modes=["inference"])
    assert quick(suite, "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "toy.csv")
    assert [(row["name"], row["provider"]) for row in rows] == [
        ("halonet26t", "timm"),
        ("halonet26t", "accelerate"),
        ("biformer_nano", "zoo"),
    ]


def test_nothing_to_accelerate_fails(write_suite, capsys):
    assert quick(write_suite(models=["test_convnext"], accelerate=True, batch=1, size=32, modes=["inference"])) == 1
    assert "nothing to accelerate" in capsys.readouterr().err


def test_unknown_model_fails(write_suite, capsys):
    assert quick(write_suite(models=["no_such_model"], batch=1, size=32)) == 1
    assert "no_such_model" in capsys.readouterr().err


def test_profile_groups_kernels(write_suite, capsys):
    suite = write_suite(models=["test_convnext"], batch=1, size=32, modes=["train"])
    assert quick(suite, "--profile") == 0
    out = capsys.readouterr().out
    assert "conv" in out
    assert "share" in out
    assert "batch=1" in out


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "gemm"),
        ("aten::addmm", "gemm"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<32>>", "attention"),
        ("_bilevel_forward_kernel", "attention"),
        ("_halo_forward_kernel", "attention"),
        ("void conv_depthwise2d_forward_kernel_generic", "conv"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16", "conv"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16>", "norm"),
        ("void cudnn::batchnorm_fwtr_nhwc_semiPersist", "norm"),
        ("triton_poi_fused_add_gelu_3", "elementwise"),
        ("void at::native::elementwise_kernel<128, 4>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("something_else", "other"),
    ],
)
def test_kernel_group(kernel, group):
    assert models.kernel_group(kernel) == group


def test_detectors_are_timed_by_stage(tmp_path):
    assert quick("detectors", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "detectors.csv")
    stages = {(row["provider"], row["mode"]) for row in rows}
    assert stages == {("module", "whole"), *(("runtime", m) for m in ("whole", "encoder", "backbone", "maps", "boxes"))}
    assert all(float(row["p50"]) > 0 for row in rows)


def test_a_scan_that_cannot_be_read_fails_alone(write_suite, tmp_path, capsys):
    path = write_suite(detectors=["flatformer_nano"], scans=["missing.bin"], providers=["module"])
    assert main([path, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "missing.bin" in capsys.readouterr().err


def test_plain_models_run_on_references(write_suite, tmp_path, monkeypatch):
    suite = write_suite(models=["test_convnext", "favit_nano"], plain=True, batch=1, size=64, modes=["train"])
    choices = []
    monkeypatch.setattr(
        "zoo.kernels.factorized.op.use_triton",
        lambda backend, can_run: choices.append(_dispatch.use_triton(backend, lambda explain: True)),
    )
    assert quick(suite, "--out", str(tmp_path)) == 0
    assert [row["provider"] for row in rows_of(tmp_path / "toy.csv")] == ["timm", "zoo", "plain"]
    half = len(choices) // 2
    assert half
    assert choices == [True] * half + [False] * half


def test_reference_only_covers_the_automatic_choice_alone():
    with pytest.raises(KeyError), _dispatch.reference_only():
        assert not _dispatch.use_triton("auto", lambda explain: True)
        assert _dispatch.use_triton("triton", lambda explain: True)
        raise KeyError
    assert _dispatch.use_triton("auto", lambda explain: True)


def test_compiled_models_follow_reference_only():
    def both(x):
        return x + 1 if _dispatch.use_triton("auto", lambda explain: True) else x - 1

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    for _ in range(2):
        assert compiled(x)[0] == 1
        with _dispatch.reference_only():
            assert compiled(x)[0] == -1


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_flat_window_forward_kernel", "attention"),
        ("_scatter_linear_kernel", "attention"),
        ("_pillar_attention_kernel", "attention"),
        ("_sparse_conv_kernel", "sparse convolution"),
        ("_sparse_depthwise_kernel", "sparse convolution"),
        ("_neighbour_kernel", "sorting and indices"),
        ("_output_key_kernel", "sorting and indices"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "sorting and indices"),
        ("_segment_max_kernel", "voxels"),
        ("_greedy_kernel", "suppression"),
        ("sm90_xmma_fprop_implicit_gemm_f16", "conv"),
        ("_bias_relu_kernel", "elementwise"),
    ],
)
def test_kinds_of_kernels_of_detectors(kernel, group):
    assert models.kernel_group(kernel, detectors.KERNEL_GROUPS) == group


def test_graphs_need_a_gpu():
    job = models.Job("test_vit", 1, 32, torch.float32, "inference", "graph", False, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a GPU"):
        models.build(job)


def test_graphs_keep_what_they_read(monkeypatch):
    kept = []

    def recorded(step):
        kept.append(weakref.ref(step))
        return Mock(), step()

    monkeypatch.setattr(models, "record", recorded)
    monkeypatch.setattr(models, "_eager_step", lambda job: lambda: torch.zeros(1))
    step = models.build(models.Job("test_vit", 1, 32, torch.float32, "train", "graph", False, torch.device("cuda", 0)))
    gc.collect()
    assert step() == 0 and kept[0]() is not None
    del step
    gc.collect()
    assert kept[0]() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["inference", "forward+backward", "train"])
def test_graphs_replay_steps(mode):
    settings = ("biformer_nano", 2, 64, torch.bfloat16, mode)
    graph, eager = (
        models.build(models.Job(*settings, compile, True, torch.device("cuda", 0))) for compile in ("graph", "none")
    )
    if mode == "inference":
        torch.testing.assert_close(graph(), eager(), rtol=2e-2, atol=2e-2)
    losses = [float(graph().mean()) for _ in range(10)]
    assert (losses[-1] < losses[0]) == (mode == "train")


def test_sweep_goes_over_sizes(tmp_path):
    assert quick("resolution", "--filter", "inference", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "resolution.csv")
    assert [(row["name"], row["provider"], row["config"]) for row in rows] == [
        (name, provider, f"size={size} batch=1")
        for name, provider in (("test_vit", "timm"), ("agent_nano", "zoo"), ("agent_nano", "plain"))
        for size in (64, 96)
    ]
    assert all(float(row["p50"]) > 0 and row["unit"] == "ms" for row in rows)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_out_of_memory_is_a_result(write_suite, tmp_path, monkeypatch, error):
    build = models.build

    def limited(job):
        if job.size > 32:
            raise error
        return build(job)

    monkeypatch.setattr(models, "build", limited)
    suite = write_suite(sweep=["test_vit"], sizes=[96, 32, 64])
    assert quick(suite, "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "toy.csv")
    # The largest size is not tried.
    assert [(row["config"], row["mode"], row["metric"]) for row in rows] == [
        (f"size={size} batch=1", mode, metric)
        for mode in resolution.MODES
        for size, metric in ((32, "step_time"), (64, "out_of_memory"))
    ]
    assert not rows[1]["p50"]
    assert main(["--plot", str(tmp_path / "toy.csv")]) == 0
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"


def test_other_failures_of_a_sweep_fail(write_suite, tmp_path, monkeypatch, capsys):
    def broken(job):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(models, "build", broken)
    assert quick(write_suite(sweep=["test_vit"], sizes=[32]), "--out", str(tmp_path)) == 1
    assert "no kernel image" in capsys.readouterr().err
    assert not (tmp_path / "toy.csv").exists()


def test_unknown_model_of_a_sweep_fails(write_suite, capsys):
    assert quick(write_suite(sweep=["no_such_model"], sizes=[32])) == 1
    assert "no_such_model" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_a_result(write_suite, tmp_path, monkeypatch):
    def full(job):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "build", full)
    assert quick(write_suite(models=["test_vit"], batch=1, size=32, modes=["train"]), "--out", str(tmp_path)) == 0
    assert [row["metric"] for row in rows_of(tmp_path / "toy.csv")] == ["out_of_memory"]
