"""Saving, uploading and downloading models, against a hub on the loopback interface."""

import json
import time

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import nn

import zoo
from tests import hub_server
from zoo import hub

LABELS = [f"class {i}" for i in range(7)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return zoo.create_model("test_convnext", num_classes=7).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    return hub.save_model(model, path, label_names=LABELS, metrics={"top1": 12.5})


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.serve() as running:
        # The client reads its environment at import; these are the values it then uses.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.url)
        # The client waits seconds between attempts.
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield running


@pytest.fixture
def published(server, folder):
    server.repos["org/model"] = hub_server.Repo({path.name: path.read_bytes() for path in folder.iterdir()})
    return server


def leftovers(path):
    return [p.name for p in path.iterdir() if p.name.startswith(".") or p.name.endswith(".tmp")]


def test_save_writes_the_hub_layout(folder, model):
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_convnext"
    assert config["label_names"] == LABELS
    assert config["metrics"] == {"top1": 12.5}
    assert config["sha256"]["model.safetensors"] == hub.sha256(folder / "model.safetensors")
    # Where the weights once came from says nothing about these.
    assert not {"file", "url", "hf_hub_id"} & config["pretrained_cfg"].keys()
    assert config["pretrained_cfg"]["tag"] is None


def test_save_and_load_give_equal_predictions(folder, model):
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["label_names"] == LABELS


def test_card_names_what_hubs_and_readers_need(model, tmp_path):
    card = {"license": "mit", "datasets": ["digits"], "results": "On a held-out third.", "citation": "@article{x}"}
    path = hub.save_model(model, tmp_path / "m", card=card, metrics={"top1": 98.25})
    text = (path / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    for line in ["license: mit", "library_name: timm", "pipeline_tag: image-classification", "- digits"]:
        assert line in front
    params = sum(p.numel() for p in model.parameters()) / 1e6
    for part in ["import zoo", "| top1 | 98.25 |", "On a held-out third.", "@article{x}", f"{params:.2f} M"]:
        assert part in body
    assert "| multiply-accumulates | 0.0" in body


def test_card_can_be_given_whole(model, tmp_path):
    path = hub.save_model(model, tmp_path / "m", card="# Mine\n")
    assert (path / "README.md").read_text() == "# Mine\n"


def test_half_halves_the_file_and_loads_in_float32(model, folder, tmp_path):
    path = hub.save_model(model, tmp_path / "m", half=True)
    tensors = load_file(path / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    sizes = [(p / "model.safetensors").stat().st_size for p in (path, folder)]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    assert next(loaded.parameters()).dtype == torch.float32
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-2, rtol=1e-2)


def test_half_refuses_what_fp16_cannot_hold(tmp_path):
    model = zoo.create_model("test_convnext")
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="exceeds the range of fp16"):
        hub.save_model(model, tmp_path / "m", half=True)
    assert list(tmp_path.iterdir()) == []


def test_saved_pool_size_follows_the_input_size(tmp_path):
    model = zoo.create_model("biformer_tiny", depths=(1, 1, 1, 1), num_classes=3)
    folder = hub.save_model(model, tmp_path / "m", data_config={"input_size": [3, 96, 64]})
    assert hub.read_config(folder)["pretrained_cfg"]["pool_size"] == [3, 2]


def test_shared_and_transposed_tensors_are_saved(tmp_path):
    model = zoo.create_model("test_convnext")
    weight = model.head.fc.weight
    model.head.fc.weight = nn.Parameter(weight.detach().t().contiguous().t())
    model.head.fc.register_buffer("alias", model.head.fc.weight.data, persistent=True)
    path = hub.save_model(model, tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    assert torch.equal(tensors["head.fc.weight"], weight)
    assert torch.equal(tensors["head.fc.alias"], weight)


def test_save_refuses_what_it_cannot_describe(model, tmp_path):
    with pytest.raises(ValueError, match="no pretrained_cfg"):
        hub.save_model(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ValueError, match="3 label names for a model of 7 classes"):
        hub.save_model(model, tmp_path / "m", label_names=["a", "b", "c"])
    (tmp_path / "file").write_text("")
    with pytest.raises(hub.HubError, match="is not a folder"):
        hub.save_model(model, tmp_path / "file")


def test_a_failed_save_leaves_nothing_and_keeps_what_was_there(model, tmp_path, monkeypatch):
    path = hub.save_model(model, tmp_path / "m")
    (path / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "render_card", interrupt)
    for target in ("m", "new"):
        with pytest.raises(KeyboardInterrupt):
            hub.save_model(model, tmp_path / target, half=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_into_an_existing_folder_keeps_other_files(model, tmp_path):
    path = hub.save_model(model, tmp_path / "m")
    (path / "notes.txt").write_text("mine")
    hub.save_model(model, path, half=True)
    assert (path / "notes.txt").read_text() == "mine"
    assert hub.check_folder(path)["architecture"] == "test_convnext"
    assert leftovers(tmp_path) == []


def test_embedded_cfg_reads_a_folder(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_EMBEDDED", tmp_path)
    hub.save_model(model, tmp_path / "test_convnext.zoo_x", label_names=LABELS, data_config={"mean": (0.1, 0.2, 0.3)})
    cfg = hub.embedded_cfg("test_convnext.zoo_x")
    assert cfg["file"] == str(tmp_path / "test_convnext.zoo_x" / "model.safetensors")
    assert (cfg["num_classes"], cfg["label_names"], cfg["mean"]) == (7, tuple(LABELS), (0.1, 0.2, 0.3))
    assert hub.is_embedded(cfg["file"])
    # The dict is what timm takes, and an export of such a model does not tell where the package lies.
    timm.models.PretrainedCfg(**cfg)
    loaded = timm.create_model("test_convnext", pretrained=True, pretrained_cfg=dict(cfg, architecture="test_convnext"))
    exported = hub.save_model(loaded, tmp_path / "out")
    assert str(tmp_path) not in (exported / "config.json").read_text()
    with pytest.raises(hub.HubError, match="has no config.json"):
        hub.embedded_cfg("test_convnext.zoo_missing")


def test_push_then_pull_round_trip(server, model, folder, tmp_path):
    (folder / "optimizer.pth").write_bytes(b"not for the hub")
    try:
        url = hub.push(folder, "org/new", private=True)
    finally:
        (folder / "optimizer.pth").unlink()
    assert url.startswith(server.url + "/org/new/commit/")
    repo = server.repos["org/new"]
    assert repo.private
    assert set(repo.branches["main"]) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    path = hub.pull("org/new", tmp_path / "pulled")
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert leftovers(tmp_path) == []


def test_push_a_model_to_a_branch_and_pull_the_revision(server, model, tmp_path):
    hub.push(model, "org/new", revision="v2", metrics={"top1": 1.0})
    assert "model.safetensors" not in server.repos["org/new"].branches["main"]
    path = hub.pull("org/new@v2", tmp_path / "m")
    assert hub.check_folder(path)["metrics"] == {"top1": 1.0}
    # timm finds it under the same name.
    assert zoo.create_model("hf-hub:org/new@v2", pretrained=True).num_classes == 7


def test_push_opens_a_pull_request(published, folder):
    url = hub.push(folder, "org/model", create_pr=True)
    assert url.endswith("/org/model/discussions/1")
    with pytest.raises(hub.HubError, match="Repository 'org/absent' does not exist"):
        hub.push(folder, "org/absent", create_pr=True)


def test_push_refuses_incomplete_folders_and_forbidden_repositories(server, folder, tmp_path):
    with pytest.raises(hub.HubError, match="has no config.json"):
        hub.push(tmp_path, "org/x")
    with pytest.raises(hub.HubError, match="not a valid repository id"):
        hub.push(folder, "no-owner")
    server.faults.add("forbid")
    with pytest.raises(hub.HubError, match="refused access to 'org/x' \\(403\\)"):
        hub.push(folder, "org/x")


def test_push_names_the_switch_for_hubs_without_xet(server, folder, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(hub.HubError, match="set HF_HUB_DISABLE_XET=1"):
        hub.push(folder, "org/x")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gated", "'org/model' is gated"),
        ("truncate", "download of 'org/model' was interrupted"),
        ("corrupt", "'model.safetensors' of 'org/model' was damaged in the download"),
        ("error", "The hub failed on 'org/model' \\(500\\)"),
    ],
)
def test_faults_of_a_download_are_explained_and_leave_nothing(published, tmp_path, fault, message):
    published.faults.add(fault)
    with pytest.raises(hub.HubError, match=message) as caught:
        hub.pull("org/model", tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []
    # A damaged file must not stay in the cache either: the next try succeeds.
    published.faults.clear()
    assert hub.check_folder(hub.pull("org/model", tmp_path / "m"))


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("org/absent", "Repository 'org/absent' does not exist, or it is private"),
        ("org/model@nope", "Repository 'org/model' has no revision 'nope'"),
        ("a b/c", "'a b/c' is not a valid repository id"),
        ("model", "'model' is not a valid repository id: expected org/name"),
        ("org/pickle", "has only pickled weights \\(pytorch_model.bin\\).*`zoo convert"),
        ("org/empty", "'org/empty' has no model.safetensors"),
        ("org/noconfig", "'org/noconfig' has no config.json"),
        ("org/other", "is not the config of a timm model"),
    ],
)
def test_wrong_repositories_are_explained(published, tmp_path, repo, message):
    weights = published.repos["org/model"].branches["main"]["model.safetensors"]
    published.repos["org/pickle"] = hub_server.Repo({"config.json": b"{}", "pytorch_model.bin": b"x"})
    published.repos["org/empty"] = hub_server.Repo({"config.json": b"{}"})
    published.repos["org/noconfig"] = hub_server.Repo({"model.safetensors": weights})
    published.repos["org/other"] = hub_server.Repo({"config.json": b"{}", "model.safetensors": weights})
    with pytest.raises(hub.HubError, match=message) as caught:
        hub.pull(repo, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_pull_fetches_no_code_and_no_pickles(published, tmp_path):
    published.repos["org/model"].branches["main"] |= {"setup.py": b"x", "extra.pth": b"x", "sub/more.md": b"x"}
    path = hub.pull("org/model", tmp_path / "m")
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert names == ["README.md", "config.json", "model.safetensors", "sub/more.md"]
    assert not any(name in path for _, path in published.requests for name in ("setup.py", "extra.pth"))


def test_pull_checks_the_recorded_checksum(published, tmp_path):
    # The hub is consistent with itself, but the weights are not those that the config was written for.
    files = published.repos["org/model"].branches["main"]
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\1"
    with pytest.raises(hub.HubError, match="sha256 differs"):
        hub.pull("org/model", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_offline_uses_the_cache_and_says_so_when_it_is_empty(published, tmp_path, monkeypatch):
    hub.pull("org/model", tmp_path / "online")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(published.requests)
    path = hub.pull("org/model", tmp_path / "offline")
    assert hub.check_folder(path)
    with pytest.raises(hub.HubError, match="not in the local cache and HF_HUB_OFFLINE is set"):
        hub.pull("org/other", tmp_path / "m")
    assert len(published.requests) == count


def test_no_network(server, tmp_path, monkeypatch):
    # Nothing listens on port 1.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(hub.HubError, match="The hub cannot be reached"):
        hub.pull("org/model", tmp_path / "m")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "config", "pickle"])
def test_damaged_folders_are_explained(folder, tmp_path, damage):
    path = tmp_path / "m"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights, config = path / "model.safetensors", path / "config.json"
    data = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(data[: len(data) // 2])
        message = "is damaged"
    elif damage == "flip":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        message = "sha256 differs"
    elif damage == "remove":
        weights.unlink()
        message = "has no model.safetensors"
    elif damage == "config":
        config.write_text("{")
        message = "cannot be read"
    else:
        weights.rename(path / "model.ckpt")
        message = "only pickled weights"
    with pytest.raises(hub.HubError, match=message):
        zoo.create_model(f"local-dir:{path}", pretrained=True)


def test_detectors_travel_through_a_hub(server, tmp_path):
    torch.manual_seed(0)
    detector = zoo.create_model("flatformer_nano", classes=["car"])
    hub.push(detector, "org/lidar", card={"license": "apache-2.0"}, metrics={"ap_car": 0.8})
    assert {"README.md", "config.json", "model.safetensors"} <= set(server.repos["org/lidar"].branches["main"])
    folder = hub.pull("org/lidar", tmp_path / "pulled")
    for name in ("hf-hub:org/lidar", f"local-dir:{folder}"):
        loaded = zoo.create_model(name, pretrained=True)
        assert loaded.classes == ("car",)
        torch.testing.assert_close(loaded.state_dict(), detector.state_dict(), rtol=0, atol=0)
    random = zoo.create_model("hf-hub:org/lidar", score_threshold=0.3)
    assert random.head.score_threshold == 0.3
    del server.repos["org/lidar"].branches["main"]["model.safetensors"]
    with pytest.raises(hub.HubError, match="has no file 'model.safetensors'|no model.safetensors"):
        zoo.create_model("hf-hub:org/lidar", pretrained=True, cache_dir=tmp_path / "fresh")


def test_hub_models_of_create_model_are_explained(published):
    assert zoo.create_model("hf-hub:org/model", pretrained=True).num_classes == 7
    with pytest.raises(hub.HubError, match="does not exist"):
        zoo.create_model("hf-hub:org/absent", pretrained=True)
    with pytest.raises(hub.HubError, match="has no revision 'v9'"):
        zoo.create_model("hf-hub:org/model@v9", pretrained=True)
    published.repos["org/empty"] = hub_server.Repo({"config.json": b"{}"})
    with pytest.raises(hub.HubError, match="is not the config of a timm model"):
        zoo.create_model("hf-hub:org/empty", pretrained=True)
    published.repos["org/foreign"] = hub_server.Repo({"config.json": b'{"architecture": "bert"}'})
    with pytest.raises(ValueError, match="'org/foreign' holds a 'bert', which is no model"):
        zoo.create_model("hf-hub:org/foreign")
    config = published.repos["org/model"].branches["main"]["config.json"]
    published.repos["org/noweights"] = hub_server.Repo({"config.json": config})
    with pytest.raises(hub.HubError, match="'hf-hub:org/noweights' has no file 'model.safetensors'"):
        zoo.create_model("hf-hub:org/noweights", pretrained=True)
    published.repos["org/broken"] = hub_server.Repo({"config.json": config, "model.safetensors": b"broken"})
    with pytest.raises(hub.HubError, match="The weights of 'hf-hub:org/broken' are damaged"):
        zoo.create_model("hf-hub:org/broken", pretrained=True)
