"""The command line: output, exit codes, and messages of one line."""

import argparse
import importlib.util
import json
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo import cli, hub
from zoo.cli import demo, predict
from zoo.visualize import draw_routing, routing_maps

LABELS = ["cat", "dog [old]", "bird"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = zoo.create_model("test_convnext", num_classes=3)
    return hub.save_model(model, tmp_path_factory.mktemp("m") / "model", label_names=LABELS)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "photos"
    path.mkdir()
    for name, shape in [("a.png", (40, 60, 3)), ("b [1].jpg", (33, 33, 3)), ("grey.png", (20, 50))]:
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path / name)
    (path / "notes.txt").write_text("no image")
    return path


def run(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *argv):
    """Run a command that must fail with one line, and return that line."""
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_help_and_usage(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in cli.COMMANDS)
    assert run(capsys)[0] == 2
    assert run(capsys, "nonsense")[0] == 2
    assert run(capsys, "predict", "x.png")[0] == 2
    assert run(capsys, "predict", "x.png", "--model", "m", "--topk", "0")[0] == 2
    assert zoo.__version__ in run(capsys, "--version")[1]


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in cli.PASS_THROUGH])
def test_help_of_each_command(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"usage: zoo {command}")


def test_installed_as_a_program():
    code = "import sys; from zoo.cli import main; sys.exit(main(['info', 'biformer_tinny']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: Unknown model 'biformer_tinny'. Did you mean biformer_tiny")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="Unknown model"):
        cli.main(["--debug", "info", "nothing_like_it"])


def test_a_defect_is_not_passed_off_as_a_mistake_of_the_user(monkeypatch):
    def broken(name):
        raise TypeError("defect")

    monkeypatch.setattr(zoo, "model_info", broken)
    with pytest.raises(TypeError, match="defect"):
        cli.main(["info", "biformer_tiny"])


def test_list(capsys):
    code, out, _ = run(capsys, "list", "biformer_t*", "--json")
    assert code == 0
    [info] = [json.loads(line) for line in out.splitlines()]
    assert (info["name"], info["params"]) == ("biformer_tiny", 13_142_760)
    out = run(capsys, "list", "biformer_[tn]*")[1]
    assert "biformer_tiny" in out
    assert "13.14" in out
    assert "No model matches 'zzz'" in fails(capsys, "list", "zzz")


def test_info(capsys):
    code, out, _ = run(capsys, "info", "biformer_tiny")
    assert code == 0
    assert "13,142,760" in out
    assert json.loads(run(capsys, "info", "biformer_tiny", "--json")[1])["family"] == "biformer"
    assert "Unknown model" in fails(capsys, "info", "nothing_like_it")


def test_predict_json_of_files_folders_and_wildcards(capsys, folder, photos):
    # The folder and the wildcard name the same images: each is predicted once.
    code, out, err = run(
        capsys, "predict", photos, photos / "*.png", "--model", f"local-dir:{folder}", "--json", "--batch-size", 2
    )
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(photos / n) for n in ("a.png", "b [1].jpg", "grey.png")]
    for line in lines:
        assert sorted(item["label"] for item in line["predictions"]) == sorted(LABELS)
        probabilities = [item["probability"] for item in line["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert all(LABELS[item["index"]] == item["label"] for item in line["predictions"])


def test_predict_is_independent_of_the_batch_size(capsys, folder, photos):
    outs = [
        run(capsys, "predict", photos, "--model", f"local-dir:{folder}", "--json", "--batch-size", size)[1]
        for size in (1, 32)
    ]
    for one, other in zip(*(out.splitlines() for out in outs), strict=True):
        one, other = json.loads(one)["predictions"], json.loads(other)["predictions"]
        assert [item["label"] for item in one] == [item["label"] for item in other]


def test_predict_table(capsys, folder, photos):
    code, out, _ = run(capsys, "predict", photos / "b [1].jpg", "--model", f"local-dir:{folder}", "--topk", 2)
    assert code == 0
    assert out.count("%") == 2
    assert "[1].jpg" in out


def test_predict_names_unreadable_images_and_goes_on(capsys, folder, photos):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:100])
    code, out, err = run(
        capsys,
        *("predict", photos / "broken.png", photos / "absent.png", photos / "notes.txt", photos / "a.png"),
        *("--model", f"local-dir:{folder}", "--json"),
    )
    assert code == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(photos / "a.png")]
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: '") for line in lines)
    for part in ("absent.png' does not exist", "broken.png' cannot be read", "notes.txt' cannot be read"):
        assert any(part in line for line in lines)


def test_predict_turns_photographs_upright(folder, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    # Tag 274 is the orientation; 6 says that the camera was turned by a quarter.
    exif[274] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    classifier = predict.Classifier(f"local-dir:{folder}", "cpu")
    assert torch.equal(classifier.load(tmp_path / "upright.png"), classifier.load(tmp_path / "turned.png"))


def test_predict_messages(capsys, folder, photos):
    image = photos / "a.png"
    assert "No pretrained weights exist" in fails(capsys, "predict", image, "--model", "biformer_tiny")
    assert "has no config.json" in fails(capsys, "predict", image, "--model", f"local-dir:{photos}")
    model = f"local-dir:{folder}"
    assert "Device 'nonsense' is not available" in fails(
        capsys, "predict", image, "--model", model, "--device", "nonsense"
    )
    # Nothing to predict: the model is not asked for.
    assert "'absent.png' does not exist" in fails(capsys, "predict", "absent.png", "--model", "hf-hub:org/absent")
    assert "holds no image" in fails(capsys, "predict", folder, "--model", model)


def test_class_names():
    model = zoo.create_model("test_convnext")
    assert predict.class_names(model)[0].startswith("tench")
    assert predict.class_names(zoo.create_model("test_convnext", num_classes=2)) == ["0", "1"]
    model.num_classes, model.pretrained_cfg = (
        2,
        {"label_names": {"1": "n2", "0": "n1"}, "label_descriptions": {"n1": "x"}},
    )
    assert predict.class_names(model) == ["x", "n2"]


def test_training_commands_pass_everything_on(capsys, monkeypatch):
    calls = []
    fake = types.ModuleType("zoo.train.cli")
    fake.main = calls.append
    monkeypatch.setitem(sys.modules, "zoo.train.cli", fake)
    for command in ("fit", "validate", "test"):
        assert cli.main([command, "--config", "x.yaml", "--help"]) == 0
    assert calls == [[command, "--config", "x.yaml", "--help"] for command in ("fit", "validate", "test")]

    def usage(args):
        raise SystemExit(2)

    fake.main = usage
    assert cli.main(["fit"]) == 2
    monkeypatch.setattr("zoo.bench.main", lambda args: len(args), raising=False)
    assert cli.main(["bench", "a", "b"]) == 2


def official(arch="biformer_nano", **kwargs):
    return zoo.create_model(arch, **kwargs).state_dict()


def test_convert_finds_the_architecture(capsys, tmp_path):
    # Beside its weights an official checkpoint holds the arguments of the training script.
    checkpoint = {"model": official(num_classes=5), "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    torch.save(checkpoint, tmp_path / "official.pth")
    code, out, _ = run(capsys, "convert", "biformer", tmp_path / "official.pth", "--out", tmp_path / "out")
    assert code == 0
    assert "biformer_nano" in out
    model = zoo.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(torch.equal(value, checkpoint["model"][key]) for key, value in model.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert hub.sha256(tmp_path / "official.pth") in card


class Hostile:
    def __reduce__(self):
        return (print, ("the checkpoint ran code",))


def test_convert_messages(capsys, tmp_path):
    good, out = tmp_path / "good.pth", tmp_path / "out"
    torch.save({"model": official()}, good)
    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"broken")
    torch.save({"epoch": 1}, tmp_path / "bare.pth")
    torch.save({"model": zoo.create_model("test_convnext").state_dict()}, tmp_path / "foreign.pth")
    cases = {
        ("biformer", "hostile.pth"): "could run code. Refused.",
        ("biformer", "old.pth"): "could run code. Refused.",
        ("biformer", "cut.pth"): "is damaged or is not a checkpoint",
        ("biformer", "text.pth"): "is damaged or is not a checkpoint",
        ("biformer", "empty.pth"): "is damaged or is not a checkpoint",
        ("biformer", "bad.safetensors"): "is damaged or is not a checkpoint",
        ("biformer", "bare.pth"): "holds no weights",
        ("biformer", "absent.pth"): "does not exist",
        ("biformer", "foreign.pth"): "does not fit any model of the family 'biformer'",
        ("nothing", "good.pth"): "nothing",
    }
    for (family, name), message in cases.items():
        line = fails(capsys, "convert", family, tmp_path / name, "--out", out)
        assert message in line, name
        assert "ran code" not in line
    args = ["convert", "biformer", good, "--out", out, "--model"]
    assert "does not fit 'biformer_tiny'. Closest is" in fails(capsys, *args, "biformer_tiny")
    assert "is no model of the family" in fails(capsys, *args, "test_convnext")
    assert "Unknown model 'biformer_x'" in fails(capsys, *args, "biformer_x")
    assert not out.exists()


def test_export_messages(capsys, tmp_path):
    line = fails(capsys, "export", tmp_path / "absent.ckpt", "--out", tmp_path / "out")
    assert "absent.ckpt" in line
    assert not (tmp_path / "out").exists()


def test_export_keeps_what_describes_the_weights(capsys, monkeypatch, tmp_path):
    model = zoo.create_model("test_convnext", num_classes=3)
    data_config = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "label_names": LABELS}
    info = {"data_config": data_config, "metrics": {"val/acc": torch.tensor(0.5), "lr-AdamW": 1e-3, "train/loss": 1.0}}
    monkeypatch.setattr("zoo.train.export.load_lightning_checkpoint", lambda path, weights: (model, info))
    code, out, _ = run(capsys, "export", "x.ckpt", "--out", tmp_path / "m", "--half")
    assert code == 0
    assert "MB" in out
    config = hub.check_folder(tmp_path / "m")
    assert config["metrics"] == {"val/acc": 0.5}
    assert config["label_names"] == LABELS
    assert (config["pretrained_cfg"]["input_size"], config["pretrained_cfg"]["mean"]) == ([3, 32, 32], [0.1, 0.2, 0.3])


def test_vlm_names_the_missing_extra(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert "pip install 'attention-zoo[transformers]'" in fails(capsys, "vlm", "demo")


def test_push_and_pull_messages(capsys, tmp_path):
    assert "has no config.json" in fails(capsys, "push", tmp_path, "org/model")
    assert "not a valid repository id" in fails(capsys, "pull", "nonsense", "--out", tmp_path / "m")


def test_demo_draws_predictions_and_routing(tmp_path):
    folder = hub.save_model(zoo.create_model("biformer_nano", num_classes=3), tmp_path / "m", label_names=LABELS)
    classifier = predict.Classifier(f"local-dir:{folder}", "cpu")
    inputs = [classifier.load(Image.new("RGB", (200, 150), colour)) for colour in ("red", "green")]
    predictions = list(classifier.predict(inputs))
    demo.draw_predictions(classifier, ["red", "green"], inputs, predictions, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert min(picture.size) > 300


def test_routing_maps_do_not_change_the_model():
    model = zoo.create_model("biformer_nano").train()
    x = torch.randn(2, 3, 64, 64)
    before = [name for name, module in model.named_modules() if "forward" in vars(module)]
    maps = routing_maps(model, x)
    assert model.training
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == before
    for routing in maps.values():
        regions = routing.grid[0] * routing.grid[1]
        assert routing.index.shape[:2] == (2, regions)
        assert 0 <= int(routing.index.min()) <= int(routing.index.max()) < regions
    with pytest.raises(ValueError, match="no attention layer that routes"):
        routing_maps(zoo.create_model("test_convnext"), x)


def test_draw_routing():
    image = np.full((40, 60, 3), 200, np.uint8)
    out = draw_routing(image, (2, 3), query=4, selected=[0, 4], weights=[0.2, 0.8])
    assert out.shape == image.shape
    # Region 2 is neither the query nor selected: dimmed evenly.
    assert np.unique(out[:20, 40:]).tolist() == [60]
    assert out[10, 10].mean() > 60
    assert out[20, 20].tolist() == [255, 214, 10]
    with pytest.raises(ValueError, match="Region 6 is outside"):
        draw_routing(image, (2, 3), 0, [6])
    with pytest.raises(ValueError, match="1 weights for 2 regions"):
        draw_routing(image, (2, 3), 0, [1, 2], [0.5])
