"""`zoo app`: what stands behind the tabs, and that the page is built where Gradio is installed."""

import builtins

import numpy as np
import pytest
from PIL import Image

from zoo.app import page, views
from zoo.cli import main
from zoo.heads.sparse_vdit.plan import SparsePlan
from zoo.hub import HubError


@pytest.fixture(scope="module")
def photo():
    return Image.open(views.SAMPLES / "dress.jpg")


def test_models_come_with_the_package():
    assert "biformer_nano.zoo_clothing10" in views.image_models()
    assert all("video" not in name for name in views.image_models())
    assert views.DETECTOR in views.point_models()
    assert len(views.sample_images()) == 4


def test_routing_follows_the_place(photo):
    model = "biformer_nano.zoo_clothing10"
    labels, first, text = views.classify(photo, model, 0.1, 0.1)
    same, second, _ = views.classify(photo, model, 0.9, 0.9)
    assert max(labels, key=labels.get) == "dress"
    assert labels == same
    assert len(labels) == 5
    assert "of 16 regions" in text
    # The query region is framed in yellow: top left, then bottom right.
    yellow = [np.argwhere((np.asarray(p) == (255, 214, 10)).all(-1)).mean(0) for p in (first, second)]
    assert (yellow[0] < 120).all() and (yellow[1] > 264).all()


def test_agents_are_drawn(photo):
    _, first, text = views.classify(photo, "agent_nano.zoo_clothing10", 0.0, 0.0)
    _, second, _ = views.classify(photo, "agent_nano.zoo_clothing10", 1.0, 1.0)
    assert "agent 1 of 16" in text
    assert np.asarray(first).std() > 0
    assert (np.asarray(first) != np.asarray(second)).any()


def test_families_without_maps_say_so(photo):
    labels, picture, text = views.classify(photo, "favit_nano.zoo_clothing10", 0.5, 0.5)
    assert max(labels, key=labels.get) == "dress"
    assert picture.size == (384, 384)
    assert "no maps" in text


@pytest.mark.parametrize(("image", "x", "message"), [(None, 0.5, "image"), ("photo", 1.5, "0 to 1")])
def test_classify_refuses(photo, image, x, message):
    with pytest.raises(ValueError, match=message):
        views.classify(photo if image else None, "biformer_nano.zoo_clothing10", x, 0.5)


def test_cells():
    assert [views._cell((2, 3), place) for place in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.2))] == [0, 2, 3, 5, 1]


def test_missing_language_model_is_told(tmp_path):
    pytest.importorskip("transformers")
    picture, text = views.drop_tokens(str(tmp_path), 0, "", "hired", 0.2)
    assert picture is None
    assert "zoo.train.vlm" in text


def test_language_model_answers_with_fewer_tokens(monkeypatch):
    pytest.importorskip("transformers")
    from zoo.heads.tiny_vlm import build_processor, build_tiny_vlm

    processor = build_processor()
    model = build_tiny_vlm().eval()
    side = model.config.vision_config.image_size
    image = Image.new("RGB", (side, side), (200, 100, 50))
    samples = [(image, [{"question": "what is here ?", "answer": ""}])]
    monkeypatch.setattr(views, "_vision_language", lambda folder: (model, processor, samples))
    picture, text = views.drop_tokens("", 0, "", "spatial", 0.25)
    patches = (side // model.config.vision_config.patch_size) ** 2
    assert f"({patches // 4} of {patches} tokens)" in text
    assert text.startswith("what is here ?")
    bright = (np.asarray(picture)[..., 0] == 200).mean()
    assert bright == pytest.approx(0.25, abs=0.02)
    assert views.drop_tokens("", 3, "", "spatial", 1)[1].endswith("(all tokens)")


def test_embedded_plan_is_drawn():
    picture, text = views.show_plan("")
    plan = SparsePlan.from_pretrained(views.PLAN)
    assert "density" in text
    colours = {colour for _, colour in picture.getcolors(1 << 16)}
    used = {plan.patterns[i]["pattern"] for layers in plan.assign for ids in layers for i in ids}
    assert {views.PATTERN_COLOURS[name] for name in used} <= colours


def test_map_of_a_plan_has_a_cell_for_each_head():
    layers = ["blocks.0.attn1.processor", "blocks.1.attn1.processor"]
    plan = SparsePlan(
        model={"class": "Toy", "layers": layers, "heads": 3, "head_dim": 8},
        text_position="none",
        tile=(16, 16),
        granularity="block",
        bins=(0.0, 1.0),
        patterns=({"pattern": "full"}, {"pattern": "skip"}),
        assign=(((0, 1, 0), (1, 1, 0)),),
    )
    pixels = np.asarray(views.draw_plan(plan))
    cells = [
        [tuple(pixels[views.HEADER + row * views.CELL + 5, head * views.CELL + 5]) for head in range(3)]
        for row in range(2)
    ]
    full, skip = views.PATTERN_COLOURS["full"], views.PATTERN_COLOURS["skip"]
    assert cells == [[full, skip, full], [skip, skip, full]]


def test_missing_plan():
    with pytest.raises((FileNotFoundError, ValueError, HubError)):
        views.show_plan("/no/such/plan.json")


def test_points_without_weights(monkeypatch):
    def none(name):
        raise HubError("No pretrained weights exist")

    monkeypatch.setattr(views, "_detector", none)
    picture, text = views.detect(None, 1, views.DETECTOR, 0.3)
    assert max(picture.size) == 800
    assert text.startswith("Points only")
    # The simulated scene's own boxes are white.
    assert (np.asarray(picture) == 255).all(-1).sum() > 100


def test_boxes_of_a_detector(monkeypatch, tmp_path):
    class Detector:
        classes = ("vehicle",)

        def predict(self, cloud, score):
            assert cloud.columns[:3] == ("x", "y", "z")
            box = dict(x=0.0, y=0.0, z=0.0, dx=8.0, dy=8.0, dz=2.0, yaw=0.0)
            return {"boxes": [{"label": "vehicle", "score": 0.9, **box}]}

    monkeypatch.setattr(views, "_detector", lambda name: Detector())
    path = tmp_path / "scan.npy"
    np.save(path, np.random.default_rng(0).uniform(-10, 10, (500, 4)).astype(np.float32))
    picture, text = views.detect(str(path), 0, "mine", 0.3)
    assert text == "1 boxes by mine."
    reddish = np.asarray(picture).astype(int)
    assert ((reddish - (255, 176, 0)) ** 2).sum(-1).min() < 100


def test_page_has_its_tabs(monkeypatch):
    gradio = pytest.importorskip("gradio")

    def no_network(*args, **kwargs):
        raise AssertionError("the page asked for the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    built = page.build()
    assert isinstance(built, gradio.Blocks)
    tabs = [block.label for block in built.blocks.values() if isinstance(block, gradio.Tab)]
    assert tabs == ["Classify", "Drop visual tokens", "Sparse plans", "Point clouds"]


def test_errors_are_shown_to_the_user():
    gradio = pytest.importorskip("gradio")
    told = page._told(gradio, views.classify)
    with pytest.raises(gradio.Error, match="choose an image"):
        told(None, "biformer_nano.zoo_clothing10", 0.5, 0.5)


def test_missing_gradio_names_the_extra(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["app"]) == 1
    assert "attention-zoo[app]" in capsys.readouterr().err
