"""The benchmark runner: suites, the correctness gate, rows, plot. Times themselves are never asserted."""

from __future__ import annotations

import csv

import pytest
import torch
import yaml

from zoo.bench import detectors, gate, main, models, report, resolution, runner, suites, timing, unet_steps, video_steps
from zoo.bench.ops import OPS, Op
from zoo.bench.ops.bilevel_routing import plain_attention, routed_block_mask, sdpa_attention
from zoo.bench.ops.tile_sparse_flex import flex, flex_kernel, gather_tokens
from zoo.kernels import _dispatch
from zoo.kernels.tile_sparse import density
from zoo.kernels.tile_sparse.patterns import tile_map

CPU = torch.device("cpu")


class Square(Op):
    """x squared, right or wrong on demand."""

    leaves = ("x",)

    def __init__(self, ours, peer=None):
        self.functions = {"zoo": ours, "plain": lambda inputs: inputs["x"] * inputs["x"]}
        if peer:
            self.functions["peer"] = peer

    def make_inputs(self, shape, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(shape["batch"], 8, generator=generator, device=device).to(dtype)
        return {"x": x.requires_grad_()}

    def providers(self, device):
        return self.functions

    def bytes(self, shape, dtype, backward):
        return 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.fixture
def write_suite(tmp_path):
    def write(**data):
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(data))
        return str(path)

    return write


@pytest.fixture
def toy(monkeypatch, write_suite):
    """A suite of one op named ``toy``."""

    def make(*functions):
        monkeypatch.setitem(OPS, "toy", Square(*functions))
        return write_suite(ops=["toy"], shapes=[{"name": "small", "batch": 2}])

    return make


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quick(*args):
    return main([*args, "--quick", "--device", "cpu"])


def test_right_op_is_timed_and_rows_are_appended(toy, tmp_path, capsys):
    suite = toy(lambda inputs: inputs["x"] ** 2)
    for _ in range(2):
        assert quick(suite, "--out", str(tmp_path / "results")) == 0
    rows = rows_of(tmp_path / "results" / "toy.csv")
    assert len(rows) == 2 * 2 * 2
    assert tuple(rows[0]) == report.COLUMNS
    first = rows[0]
    assert (first["suite"], first["name"], first["provider"], first["mode"]) == ("toy", "toy", "zoo", "forward")
    assert first["metric"] == "wall_time"
    assert float(first["p20"]) <= float(first["p50"]) <= float(first["p80"])
    for column in ("device", "torch", "zoo", "timestamp", "speedup", "eager_p50"):
        assert first[column]
    assert first["roofline_percent"] == ""
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda inputs: inputs["x"] ** 2 * 1.01, "output"),
        (lambda inputs: WrongGradient.apply(inputs["x"]), "gradient of x"),
        (lambda inputs: inputs["x"] ** 2 * float("nan"), "output is off by nan"),
        (lambda inputs: (inputs["x"] ** 2)[:1], "output is off by inf"),
    ],
)
def test_wrong_op_is_refused(toy, tmp_path, capsys, wrong, reason):
    suite = toy(wrong)
    assert quick(suite, "--out", str(tmp_path / "results")) == 1
    captured = capsys.readouterr()
    assert "refused, no time reported" in captured.err
    assert reason in captured.err
    assert not (tmp_path / "results").exists()


def test_wrong_peer_loses_its_rows_only(toy, tmp_path, capsys):
    suite = toy(lambda inputs: inputs["x"] ** 2, lambda inputs: inputs["x"])
    assert quick(suite, "--out", str(tmp_path)) == 0
    assert {row["provider"] for row in rows_of(tmp_path / "toy.csv")} == {"zoo", "plain"}
    assert "peer peer left out" in capsys.readouterr().err


def test_quick_writes_only_where_told(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "results_folder", lambda: tmp_path / "default")
    assert quick(toy(lambda inputs: inputs["x"] ** 2)) == 0
    assert not (tmp_path / "default").exists()


def test_filtered_peers_are_not_even_checked(toy, tmp_path):
    calls = []

    def peer(inputs):
        calls.append(inputs)
        return inputs["x"] ** 2

    suite = toy(lambda inputs: inputs["x"] ** 2, peer)
    assert quick(suite, "--filter", "(zoo|plain)$", "--out", str(tmp_path)) == 0
    assert {row["provider"] for row in rows_of(tmp_path / "toy.csv")} == {"zoo", "plain"}
    assert not calls


def test_a_run_that_is_cut_off_keeps_its_rows(monkeypatch, write_suite, tmp_path):
    calls = []

    def ours(inputs):
        calls.append(len(inputs["x"]))
        if calls[-1] == 3:
            raise KeyboardInterrupt
        return inputs["x"] ** 2

    monkeypatch.setitem(OPS, "toy", Square(ours))
    suite = write_suite(ops=["toy"], shapes=[{"name": "first", "batch": 2}, {"name": "second", "batch": 3}])
    with pytest.raises(KeyboardInterrupt):
        quick(suite, "--out", str(tmp_path))
    assert {row["config"] for row in rows_of(tmp_path / "toy.csv")} == {"first batch=2"}


def test_filter_and_dtype(toy, tmp_path):
    suite = toy(lambda inputs: inputs["x"] ** 2)
    options = ["--filter", "backward", "--filter", "zoo$", "--dtype", "bfloat16", "--out", str(tmp_path)]
    assert quick(suite, *options) == 0
    (row,) = rows_of(tmp_path / "toy.csv")
    assert (row["mode"], row["provider"], row["dtype"]) == ("forward+backward", "zoo", "bfloat16")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_suite"], "no suite 'no_such_suite'"),
        (["depthwise_con"], "did you mean depthwise_conv"),
        (["depthwise_conv", "--filter", "("], "no regular expression"),
        (["depthwise_conv", "--filter", "nothing like this"], "leave nothing to run"),
        (["depthwise_conv", "--device", "tpu"], "tpu"),
    ],
)
def test_usage_errors(args, message, capsys):
    try:
        status = main([*args, "--quick"])
    except RuntimeError as error:
        pytest.fail(f"an exception reached the user: {error}")
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"ops": ["depthwise_conv"]}, "lacks"),
        ({"ops": ["no_op"], "shapes": []}, "no_op"),
        ({"ops": ["depthwise_conv"], "shapes": [], "dtypes": ["int8"]}, "int8"),
        ({"ops": ["depthwise_conv"], "shapes": [], "cpu": {"colour": 1}}, "colour"),
        ({"models": ["x"], "batch": 1, "size": 1, "modes": ["forward"]}, "forward"),
        ({"title": "neither"}, "one of ops, models"),
        ({"ops": [], "models": []}, "one of ops, models"),
        ({"transformers": [], "compile": ["reduce-overhead"]}, "reduce-overhead"),
        ({"unets": []}, "lacks"),
    ],
)
def test_suite_mistakes_are_named(write_suite, data, message):
    with pytest.raises(ValueError, match=message):
        suites.load(write_suite(**data))


@pytest.mark.parametrize("name", suites.list_suites())
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("cpu", [False, True])
def test_shipped_suites_load(name, fast, cpu):
    suite = suites.load(name, fast, cpu)
    if suite.kind == "models":
        for model in suite.settings["models"]:
            assert models.provider_of(model) in ("zoo", "timm")
    elif suite.kind == "transformers":
        for entry in suite.settings["transformers"]:
            assert "density" in video_steps.describe(entry, "none")
    elif suite.kind == "ops":
        for op in suite.settings["ops"]:
            for shape in suite.settings["shapes"]:
                forward, both = (OPS[op].bytes(shape, torch.bfloat16, backward) for backward in (False, True))
                assert 0 < forward < both or (forward == both and not OPS[op].leaves)


def test_suites_of_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "zoo"
    (package / "suites").mkdir(parents=True)
    (package / "suites" / "some.yaml").write_text("")
    monkeypatch.setattr(suites, "package_root", lambda: package)
    monkeypatch.chdir(tmp_path)
    assert suites.list_suites() == ["some"]
    assert suites.results_folder() == tmp_path


@pytest.mark.parametrize("name", [name for name in suites.list_suites() if suites.load(name).kind == "ops"])
def test_op_suites_run(name, tmp_path):
    assert quick(name, "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / f"{name}.csv")
    for op in {row["name"] for row in rows}:
        assert {"zoo", OPS[op].baseline} <= {row["provider"] for row in rows if row["name"] == op}
    # Ops without gradients have one mode.
    assert {row["mode"] for row in rows} == set(suites.load(name, True, True).settings["modes"])


def test_video_suite_splits_steps(tmp_path):
    assert quick("video_steps", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "video_steps.csv")
    for name in video_steps.MODELS:
        found = {(row["provider"], row["mode"]): float(row["p50"]) for row in rows if row["name"] == name}
        parts = [(provider, mode) for provider in ("dense", "zoo") for mode in ("step", "attention", "rest")]
        assert set(found) == {("stock", "step"), *parts, ("zoo", "tables")}
        for provider in ("dense", "zoo"):
            assert found[provider, "step"] == pytest.approx(
                found[provider, "attention"] + found[provider, "rest"], rel=1e-3
            )
    assert all("layers=3/60" in row["config"] for row in rows if row["name"] == "hunyuan")


def small_entry(name):
    return next(e for e in suites.load("video_steps", True, True).settings["transformers"] if e["model"] == name)


@pytest.mark.parametrize("name", video_steps.MODELS)
def test_compiled_blocks_of_a_video_model_keep_their_split(name):
    entry = small_entry(name)
    model = video_steps.build_model(entry, torch.float32, CPU)
    inputs, plan = video_steps.make_inputs(model, entry, torch.float32, CPU), video_steps.mixed_plan(model, entry)
    stock = video_steps.run_provider("stock", model, plan, inputs, CPU, 1)
    with video_steps.compiled(model, "default", backend="eager", fullgraph=True):
        dense = video_steps.run_provider("dense", model, plan, inputs, CPU, 2)
    torch.testing.assert_close(dense.out, stock.out, rtol=1e-4, atol=1e-4)
    assert len(dense.attention) == 2
    assert all(0 < part < whole for part, whole in zip(dense.attention, dense.step, strict=True))


def test_steps_in_fp8():
    entry = small_entry("wan_14b")
    model = video_steps.build_model(entry, torch.float32, CPU)
    inputs, plan = video_steps.make_inputs(model, entry, torch.float32, CPU), video_steps.mixed_plan(model, entry)
    exact, rounded = (
        video_steps.run_provider(provider, model, plan, inputs, CPU, 1).out for provider in ("zoo", "zoo_fp8")
    )
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_dense_attention_that_differs_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(video_steps, "dense_attention", lambda q, k, v: q + v)
    assert quick("video_steps", "--out", str(tmp_path), "--filter", "wan") == 1
    assert "off the stock model's" in capsys.readouterr().err
    assert {row["provider"] for row in rows_of(tmp_path / "video_steps.csv")} == {"stock", "zoo"}


@pytest.mark.parametrize("name", video_steps.MODELS)
@pytest.mark.parametrize("target", [None, 0.1, 0.9])
def test_plans_have_the_mean_density(name, target):
    full = next(e for e in suites.load("video_steps").settings["transformers"] if e["model"] == name)
    full = {**full, "density": target or full["density"]}
    # The shape of the released model, on no device.
    model = video_steps.build_model({**full, "layers": 6}, torch.bfloat16, torch.device("meta"))
    densities = video_steps.mixed_plan(model, full).densities()[0]
    assert sum(densities) / len(densities) == pytest.approx(full["density"], abs=0.01)


@pytest.mark.parametrize(("name", "billions"), [("wan_14b", 14.3), ("hunyuan", 12.8), ("cogvideox15_5b", 5.6)])
def test_video_models_have_the_released_size(name, billions):
    model = video_steps.build_model({"model": name}, torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)


def test_unet_suite_times_both_phases(tmp_path):
    assert quick("agent_sd", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path / "agent_sd.csv")
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in unet_steps.PROVIDERS for mode in (*unet_steps.PHASES, "loop")
    }
    found = {row["mode"]: float(row["p50"]) for row in rows if row["provider"] == "fast"}
    assert found["loop"] == pytest.approx(0.4 * found["first_phase"] + 0.6 * found["second_phase"], rel=1e-3)


def test_unet_providers_do_what_they_say():
    entry = suites.load("agent_sd", True, True).settings["unets"][0]
    unet = unet_steps.build_unet(entry, torch.float32, CPU)
    inputs = unet_steps.make_inputs(unet, 128, 1, torch.float32, CPU)
    seen, outs = {}, {}
    for provider in unet_steps.PROVIDERS:
        with unet_steps.applied(unet, provider):
            for name, (timestep, _) in unet_steps.PHASES.items():
                outs[provider, name] = unet_steps.step_of(unet, inputs, timestep)()
                layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
                context = getattr(getattr(layer, "layer", None), "context", None)
                seen[provider, name] = context and context.plan(16 * 16)
    first, second = unet_steps.PHASES
    assert seen["sdpa", first] is None
    # Merging alone: half of the tokens, never agents.
    assert [(p.merged, p.agent_merged) for p in (seen["merge", first], seen["merge", second])] == [(128, 0)] * 2
    assert seen["official", first].agent_merged > 0 and seen["official", second].agent_merged == 0
    # Few tokens: softmax layers of mode "fast" merge none.
    assert seen["fast", first].agent_merged > 0 and seen["fast", second] is None
    assert torch.equal(outs["fast", second], outs["sdpa", second])


def test_unet_is_that_of_stable_diffusion():
    unet = unet_steps.build_unet({}, torch.float16, torch.device("meta"))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


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


def test_plot(toy, tmp_path):
    quick(toy(lambda inputs: inputs["x"] ** 2), "--out", str(tmp_path))
    assert main(["--plot", str(tmp_path / "toy.csv")]) == 0
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_nothing(tmp_path, capsys):
    report.append(tmp_path / "empty.csv", [])
    assert main(["--plot", str(tmp_path / "empty.csv")]) == 2
    assert "no results" in capsys.readouterr().err


def test_rows_of_another_version_are_not_mixed(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        report.append(path, [report.make_row(CPU)])


def test_percentiles_and_rates():
    timing_ = timing.percentiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing_ == pytest.approx((1.8, 3.0, 4.2))
    assert timing_.rate(6.3) == pytest.approx((1.5, 2.1, 3.5))


def test_speedup_compares_like_with_like():
    rows = [
        {"provider": "zoo", "metric": "gpu_time", "p50": 1.0, "eager_p50": 3.0},
        {"provider": "plain", "metric": "wall_time", "p50": 6.0, "eager_p50": 6.0},
    ]
    runner.add_speedups(rows, "plain")
    assert [row["speedup"] for row in rows] == [2.0, 1.0]


STAGE1 = {"batch": 64, "height": 56, "width": 56, "channels": 64, "heads": 2, "regions": 7, "topk": 1}
SMALL = {"batch": 2, "height": 12, "width": 8, "channels": 16, "heads": 2, "regions": 4, "topk": 3}


def test_floor_of_bilevel_attention():
    op, tokens = OPS["bilevel_attention"], 64 * 56 * 56
    assert op.bytes(STAGE1, torch.bfloat16, False) == 4 * tokens * 64 * 2 + 4 * 64 * 49
    assert op.flops(STAGE1, False) == 4 * tokens * 64 * 64


@pytest.mark.parametrize("name", ["bilevel_attention", "bilevel_routing"])
def test_inputs_are_views_of_a_packed_projection(name):
    inputs = OPS[name].make_inputs(SMALL, torch.bfloat16, CPU)
    for key in "qkv":
        assert inputs[key].stride(2) == 3 * 16
        assert inputs[key].is_leaf
        assert inputs[key].requires_grad
    assert inputs["region"] == (3, 2)


def test_peers_compute_the_same_function():
    inputs = OPS["bilevel_routing"].make_inputs(SMALL, torch.float64, CPU)
    torch.testing.assert_close(plain_attention(inputs), sdpa_attention(inputs))


def test_block_mask_is_the_region_graph():
    op = OPS["bilevel_attention"]
    shape = {"batch": 2, "height": 24, "width": 24, "channels": 16, "heads": 2, "regions": 3, "topk": 2}
    inputs = op.make_inputs(shape, torch.float32, CPU)
    tokens, length = 64, 576
    mask = routed_block_mask(inputs["index"], tokens)
    position = torch.arange(length)
    dense = torch.stack([mask.mask_mod(b, 0, position[:, None], position[None]) for b in range(2)])
    expected = torch.zeros(2, 9, 9, dtype=torch.bool).scatter_(2, inputs["index"].long(), True)
    expected = expected.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    assert torch.equal(dense, expected)
    # A block is listed exactly where it holds a permitted pair.
    padded = torch.zeros(2, 640, 640, dtype=torch.bool)
    padded[:, :length, :length] = expected
    blocks = padded.reshape(2, 5, 128, 5, 128).any(4).any(2)
    assert torch.equal(mask.to_dense()[:, 0].bool(), blocks)


TILES = {
    "batch": 2, "frames": 3, "height": 5, "width": 6, "heads": 6, "dim": 16, "tile": [32, 16],
    "patterns": ["diagonal 0.5", "multi_diagonal 0.4", "stripe 0", "skip", "full", "multi_diagonal 0"],
}  # fmt: skip


@pytest.mark.parametrize("text", [{}, {"text": 20}, {"text": 16, "text_position": "first"}])
def test_flex_attends_to_the_same_tiles(text):
    op = OPS["tile_sparse_attention"]
    inputs = op.make_inputs({**TILES, **text}, torch.float64, CPU)
    with torch.no_grad():
        torch.testing.assert_close(flex(inputs), op.reference(inputs))
    layout = inputs["settings"]["layout"]
    # Blocks are the tiles, whole ones but where keys fill up a tile.
    tiles = torch.stack([tile_map(pattern, layout) for pattern in inputs["head_patterns"]]).int()
    mask = inputs["flex"].mask
    assert torch.equal(mask.to_dense()[0], tiles)
    assert layout.tile == mask.BLOCK_SIZE
    filled = {layout.key_tiles[0] - 1} | ({sum(layout.key_tiles) - 1} if text.get("text") == 20 else set())
    partial = mask.kv_indices[0, 4, 0, : mask.kv_num_blocks[0, 4, 0]]
    assert set(partial.tolist()) == filled


def test_flex_without_gathers_is_forward_only():
    inputs = OPS["tile_sparse_attention"].make_inputs(TILES, torch.float32, CPU)
    with pytest.raises(NotImplementedError, match="forward only"):
        flex_kernel(inputs)
    with torch.no_grad():
        tiles = flex_kernel(inputs)
        torch.testing.assert_close(gather_tokens(tiles, inputs["flex"].place), flex(inputs), rtol=0, atol=0)


def test_density_is_told_and_the_gate_takes_each_pattern_once():
    op = OPS["tile_sparse_attention"]
    shape = {**TILES, "heads": 24}
    layout = op.layout(shape)
    mean = sum(density(pattern, layout) for pattern in op.patterns(shape)) / 6
    assert float(op.facts(shape)["density"]) == pytest.approx(mean, abs=1e-4)
    assert op.gate_shape(shape)["heads"] == 6
    assert op.gate_shape({**shape, "patterns": ["full", "skip", "full"]})["patterns"] == ["full", "skip"]


def test_routing_is_judged(monkeypatch):
    op = OPS["bilevel_routing"]
    inputs = op.make_inputs(SMALL, torch.float32, CPU)
    good = op.gate_inputs(inputs)
    assert op.invariants(good) is None
    worst = dict(good, index=15 - good["index"])
    assert op.invariants(worst) is not None
    assert "twice" in op.invariants(dict(good, index=good["index"] * 0))
    monkeypatch.setattr(op, "gate_inputs", lambda inputs: worst)
    assert "zoo" in gate.check(op, SMALL, torch.float32, CPU, ["zoo", "plain"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_columns(toy, tmp_path):
    assert main([toy(lambda inputs: inputs["x"] ** 2), "--quick", "--out", str(tmp_path)]) == 0
    for row in rows_of(tmp_path / "toy.csv"):
        assert row["metric"] == "gpu_time"
        assert float(row["memory_mib"]) > 0
        assert float(row["roofline_percent"]) >= 0


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
