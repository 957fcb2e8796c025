"""Models by name: creation, listing, description, and what is said when something does not exist."""

import json
import subprocess
import sys

import pytest
import timm
import torch

import zoo
from zoo import costs, factory, hub


def test_import_is_silent():
    # Warnings become visible, so that one hidden by default fails as well.
    code = "import zoo, timm; assert timm.list_models('biformer*') == zoo.list_models('biformer*') != []"
    flags = ["-W", "ignore::FutureWarning", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_listed_model_is_of_this_package_and_builds():
    names = zoo.list_models()
    assert "biformer_tiny" in names
    assert not {"resnet18", "test_convnext"} & set(names)
    for name in zoo.list_models(task="image-classification"):
        with torch.device("meta"):
            assert timm.create_model(name).num_classes == timm.models.get_pretrained_cfg(name).num_classes


def test_list_filters():
    assert zoo.list_models("biformer_t*") == ["biformer_tiny"]
    assert zoo.list_models("nothing*") == []
    assert "biformer_tiny" not in zoo.list_models(exclude_filters="*_tiny")
    assert all("." in name for name in zoo.list_models(pretrained=True))


def test_create_passes_arguments_on_and_knows_timm():
    assert zoo.create_model("biformer_nano", num_classes=3).num_classes == 3
    assert type(zoo.create_model("test_convnext")).__module__ == "timm.models.convnext"
    with pytest.raises(TypeError):
        zoo.create_model("test_convnext", no_such_argument=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biformer_tinny", "Unknown model 'biformer_tinny'. Did you mean biformer_tiny"),
        ("resnet1888", "Did you mean resnet"),
        ("qqqqqqqq", "Unknown model 'qqqqqqqq'. `zoo list` shows all models."),
        ("test_convnext.nope", "Unknown tag 'nope' of model 'test_convnext'. Valid tags: r160_in1k."),
        ("org/name", "Use 'hf-hub:org/name'"),
        ("ftp:org/name", "Unknown model source 'ftp'"),
        ("local-dir:", "has no model id / path"),
    ],
)
def test_wrong_names_are_explained(name, message):
    for pretrained in (False, True):
        with pytest.raises(ValueError) as caught:
            zoo.create_model(name, pretrained=pretrained)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def without_weights():
    with_weights = {name.partition(".")[0] for name in zoo.list_models(pretrained=True)}
    return [name for name in zoo.list_models() if name not in with_weights]


def test_pretrained_never_gives_a_random_model():
    assert "biformer_tiny" in without_weights()
    for name in without_weights():
        with pytest.raises(hub.HubError, match=f"No pretrained weights exist for '{name}'"):
            zoo.create_model(name, pretrained=True)
    with pytest.raises(hub.HubError) as caught:
        zoo.create_model("biformer_tiny", pretrained=True)
    for part in (timm.models.get_pretrained_cfg("biformer_tiny").origin_url, "zoo convert biformer FILE", "local-dir:"):
        assert part in str(caught.value)


def test_weights_that_the_user_names_are_used(tmp_path):
    model = zoo.create_model("biformer_nano", num_classes=4).eval()
    folder = hub.save_model(model, tmp_path / "m")
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 4}
    loaded = zoo.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), loaded(x))


def test_local_folders_are_checked(tmp_path):
    with pytest.raises(hub.HubError, match="has no config.json"):
        zoo.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "bert", "pretrained_cfg": {}}))
    with pytest.raises(ValueError, match="holds a 'bert', which is no model of this package or of timm"):
        zoo.create_model(f"local-dir:{tmp_path}")


def test_model_info_of_a_published_model():
    info = zoo.model_info("biformer_tiny")
    # Parameters and multiply-accumulates of the paper: 13.1 M and 2.2 G.
    assert info.params == 13_142_760
    assert 2.15 < info.gmacs < 2.3
    assert (info.family, info.task, info.input_size) == ("biformer", "image-classification", (3, 224, 224))
    assert "2303.08810" in info.paper
    assert info.license == "mit"
    json.dumps(info.to_dict())


@pytest.mark.parametrize(("name", "gmacs"), [("resnet18", 1.81), ("swin_tiny_patch4_window7_224", 4.5)])
def test_model_info_counts_as_papers_do(name, gmacs):
    assert zoo.model_info(name).gmacs == pytest.approx(gmacs, rel=0.01)
    assert zoo.model_info(name).params == costs.count_params(timm.create_model(name))


def test_model_info_reports_weights(monkeypatch, tmp_path):
    assert [w.name for w in zoo.model_info("test_convnext").weights] == ["test_convnext.r160_in1k"]
    with pytest.raises(ValueError, match="Unknown tag"):
        zoo.model_info("test_convnext.nope")
    # An embedded folder tells its measured results.
    monkeypatch.setattr(hub, "_EMBEDDED", tmp_path)
    folder = hub.save_model(zoo.create_model("test_convnext"), tmp_path / "test_convnext.x", metrics={"top1": 9.5})
    cfg = timm.models.PretrainedCfg(file=str(folder / "model.safetensors"), license="mit")
    monkeypatch.setattr(factory, "get_pretrained_cfg", lambda name: cfg)
    [weights] = zoo.model_info("test_convnext").weights
    assert (weights.source, weights.metrics, weights.license) == ("embedded", {"top1": 9.5}, "mit")
