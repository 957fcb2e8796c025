"""The benchmark runner: suites, the correctness gate, rows, plot. Times themselves are never asserted."""

from __future__ import annotations

import pytest
import torch

from zoo.bench import main, models, report, runner, suites, timing, video_steps
from zoo.bench.ops import OPS

from .conftest import Square, WrongGradient
from .tools import CPU, quick, rows_of


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


def test_plot(toy, tmp_path):
    quick(toy(lambda inputs: inputs["x"] ** 2), "--out", str(tmp_path))
    assert main(["--plot", str(tmp_path / "toy.csv")]) == 0
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_marks_wall_times_among_gpu_times():
    from matplotlib.figure import Figure

    common = {"unit": "ms", "config": "small batch=2", "p20": "", "p50": "1.5", "p80": ""}
    rows = [{**common, "provider": name, "metric": f"{name}_time"} for name in ("gpu", "wall")]
    axis = Figure().subplots()
    report.draw_panel(axis, "toy", rows, ["gpu", "wall"])
    assert [text.get_text() for text in axis.texts] == ["1.5", "1.5 (wall time)"]
    assert axis.get_xlabel() == "gpu time (ms), lower is better"


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_columns(toy, tmp_path):
    assert main([toy(lambda inputs: inputs["x"] ** 2), "--quick", "--out", str(tmp_path)]) == 0
    for row in rows_of(tmp_path / "toy.csv"):
        assert row["metric"] == "gpu_time"
        assert float(row["memory_mib"]) > 0
        assert float(row["roofline_percent"]) >= 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_op_that_waits_has_wall_times(toy, tmp_path):
    """The capture fails; what comes after it is measured all the same."""

    def waits(inputs):
        torch.cuda.synchronize()
        return inputs["x"] ** 2

    assert main([toy(waits), "--quick", "--out", str(tmp_path)]) == 0
    metrics = {(row["mode"], row["provider"]): row["metric"] for row in rows_of(tmp_path / "toy.csv")}
    modes = ("forward", "forward+backward")
    assert metrics == {
        (mode, name): metric for mode in modes for name, metric in (("zoo", "wall_time"), ("plain", "gpu_time"))
    }
