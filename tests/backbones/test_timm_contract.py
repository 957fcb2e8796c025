"""What timm and its users expect of an image model, for every model that zoo registers.

A model is tested by existing: nothing here names one. Sizes are small, so that the file runs on a CPU. By default
models run only where none smaller is built of the same kinds of layers, and the others are checked on the meta device;
`-m slow` runs the others as well.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2

import zoo  # noqa: F401  registers the models


def registered() -> list[str]:
    """Image models of zoo's own modules."""
    names = timm.list_models()
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith("zoo.backbones")]


@functools.cache
def size_of(name: str) -> tuple[int, int]:
    """Number of modules, which is what tracing costs, and of parameters."""
    model = timm.create_model(name, device="meta")
    return sum(1 for _ in model.modules()), sum(p.numel() for p in model.parameters())


@functools.cache
def kind_of(name: str) -> tuple[type, frozenset[type]]:
    """The model's class and those of its layers. Variants of one kind differ in size only."""
    model = timm.create_model(name, device="meta")
    return type(model), frozenset(type(module) for module in model.modules())


def smallest_of_each(names: list[str], key) -> list[str]:
    smallest: dict[object, str] = {}
    for name in sorted(names, key=lambda name: size_of(name)[1]):
        smallest.setdefault(key(name), name)
    return sorted(smallest.values())


NAMES = registered()
RUNNING = [name for name in smallest_of_each(NAMES, kind_of) if size_of(name)[1] < 50e6]
# Tracing a deep variant costs minutes and shows what a shallow one of its class shows.
SHALLOW = [name for name in RUNNING if size_of(name)[0] < 300]
SMALLEST = smallest_of_each(NAMES, lambda name: kind_of(name)[0])

every_model = pytest.mark.parametrize("name", NAMES)
running_model = pytest.mark.parametrize(
    "name", [name if name in RUNNING else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
shallow_model = pytest.mark.parametrize("name", SHALLOW)
small_model = pytest.mark.parametrize("name", SMALLEST)


@functools.cache
def prototype(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def make(name: str) -> torch.nn.Module:
    """A model in eval mode that the test may change."""
    return copy.deepcopy(prototype(name))


def side_of(name: str) -> int:
    """A small input size that the model accepts."""
    cfg = get_pretrained_cfg(name)
    if cfg.fixed_input_size:
        return cfg.input_size[-1]
    return max(64, cfg.min_input_size[-1] if cfg.min_input_size else 0)


def images(name: str, batch: int = 2, size: tuple[int, int] | None = None, chans: int = 3) -> torch.Tensor:
    height, width = size or (side_of(name),) * 2
    return torch.randn(batch, chans, height, width, generator=torch.Generator().manual_seed(1))


def flexible(name: str) -> bool:
    return not get_pretrained_cfg(name).fixed_input_size


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def has_tokens(model: torch.nn.Module) -> bool:
    """Whether features are tokens [B, prefix + N, C] instead of maps [B, C, H, W]."""
    return hasattr(model, "num_prefix_tokens")


def channels(model: torch.nn.Module, features: torch.Tensor) -> int:
    return features.shape[-1 if has_tokens(model) else 1]


def as_map(model: torch.nn.Module, features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Features as the map that `forward_intermediates` gives."""
    if not has_tokens(model):
        return features
    return features[:, model.num_prefix_tokens :].transpose(1, 2).reshape(like.shape)


def test_models_are_registered():
    assert NAMES
    assert SMALLEST


@running_model
def test_forward_and_gradient_checkpointing(name):
    model, x = make(name).train(), images(name)
    results = []
    for enable in (False, True):
        run = copy.deepcopy(model)
        run.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        out = run(x)
        out.square().mean().backward()
        results.append((out.detach(), {key: p.grad for key, p in run.named_parameters()}))
    (plain, plain_grads), (saved, saved_grads) = results
    assert plain.shape == (2, 10)
    assert plain.isfinite().all()
    assert_same(saved, plain)
    for key, grad in plain_grads.items():
        torch.testing.assert_close(saved_grads[key], grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@running_model
def test_backward_reaches_every_parameter(name):
    model = make(name).train()
    model(images(name)).mean().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_default_cfg_tells_the_truth(name):
    cfg = get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name, device="meta").eval()
        x = torch.empty(1, *cfg.input_size)
    keys = set(model.state_dict())
    for prefix in (cfg.classifier, cfg.first_conv):
        for one in (prefix,) if isinstance(prefix, str) else prefix:
            assert f"{one}.weight" in keys
    assert cfg.num_classes == model.num_classes
    assert cfg.architecture == name
    features = model.forward_features(x)
    assert has_tokens(model) or tuple(features.shape[-2:]) == tuple(cfg.pool_size)
    assert channels(model, features) == model.num_features
    assert model.forward_head(features).shape == (1, cfg.num_classes)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)

    model.reset_classifier(0)
    assert model.forward_head(features).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    if "pruned" not in name:
        unpooled = timm.create_model(name, num_classes=0, global_pool="", device="meta").eval()
        assert unpooled.forward_head(features).shape == features.shape


@running_model
def test_reset_classifier_to_another_number(name):
    model = timm.create_model(name, device="meta").eval()
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model.get_classifier().out_features == 5
    assert model(torch.empty(1, 3, side_of(name), side_of(name), device="meta")).shape == (1, 5)


@running_model
@pytest.mark.parametrize("chans", [1, 4])
def test_other_input_channels(name, chans):
    model = timm.create_model(name, in_chans=chans, device="meta").eval()
    assert model.in_chans == chans
    assert model(images(name, 1, chans=chans).to("meta")).shape == (1, model.num_classes)


@running_model
def test_forward_is_head_of_features(name):
    model, x = make(name), images(name)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[0] == 2 and channels(model, features) == model.num_features
        assert features.isfinite().all()
        assert_same(model.forward_head(features), model(x))


@running_model
def test_channels_last(name):
    model, x = make(name).to(memory_format=torch.channels_last), images(name)
    with torch.no_grad():
        assert_same(model(x.to(memory_format=torch.channels_last)), prototype(name)(x))


@running_model
def test_batch_does_not_matter(name):
    model, x = make(name), images(name)
    with torch.no_grad():
        assert_same(model(x)[1:], model(x[1:]))


@running_model
def test_forward_intermediates(name):
    model, x = make(name), images(name, 1)
    count = len(model.feature_info)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert_same(final, model.forward_features(x))
        assert len(maps) == count
        for info, feature in zip(model.feature_info, maps, strict=True):
            assert feature.shape[1] == info["num_chs"]
            assert feature.shape[-1] == side_of(name) // info["reduction"]
            assert feature.isfinite().all()

        def same(indices, expected):
            found = model.forward_intermediates(x, indices=indices, intermediates_only=True)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)

        same(2, maps[-2:])
        same([0, 2], [maps[0], maps[2]])
        same([-1], maps[-1:])
        same([0, -2], [maps[0], maps[count - 2]])
        for wrong in ([count], [-count - 1], count + 1):
            with pytest.raises((AssertionError, IndexError, ValueError)):
                model.forward_intermediates(x, indices=wrong)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert_same(early[0], maps[1])
        normed = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
        assert_same(normed[0], as_map(model, final, normed[0]))


@running_model
def test_stop_early_skips_the_rest(name):
    model, x = make(name), images(name, 1)
    calls = []
    deep = model.get_submodule(model.feature_info[-1]["module"])
    deep.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert not calls


@running_model
def test_prune_intermediate_layers(name):
    model, x = make(name), images(name, 1)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        before = sum(p.numel() for p in model.parameters())
        take = model.prune_intermediate_layers([0, 1], prune_norm=True, prune_head=True)
        assert list(take) == [0, 1]
        assert sum(p.numel() for p in model.parameters()) < before
        found = model.forward_intermediates(x, indices=take, intermediates_only=True)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@shallow_model
@pytest.mark.parametrize("kind", ["default", "getter", "fx"])
def test_features_only(name, kind):
    options = {} if kind == "default" else {"feature_cls": kind}
    model = timm.create_model(name, features_only=True, **options).eval()
    size = (97, 131) if flexible(name) else (side_of(name),) * 2
    with torch.no_grad():
        maps = model(images(name, 1, size))
    assert len(maps) == len(model.feature_info.channels()) == len(model.feature_info.reduction())
    if kind == "fx" and has_tokens(prototype(name)):
        # What a layer returns is all that tracing sees of it.
        assert [feature.shape[-1] for feature in maps] == model.feature_info.channels()
        return
    for feature, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape[1] == channels
        for side, length in zip(size, feature.shape[2:], strict=True):
            assert side // reduction <= length <= math.ceil(side / reduction)
        assert feature.isfinite().all()


@running_model
@pytest.mark.parametrize("kind", ["default", "getter"])
def test_features_only_takes_indices(name, kind):
    options = {} if kind == "default" else {"feature_cls": kind}
    model = timm.create_model(name, features_only=True, out_indices=(1, -1), device="meta", **options)
    full = timm.create_model(name, device="meta").feature_info
    expected = [full[1]["num_chs"], full[-1]["num_chs"]]
    assert model.feature_info.channels() == expected
    maps = model(torch.empty(1, 3, side_of(name), side_of(name), device="meta"))
    assert [feature.shape[1] for feature in maps] == expected


@small_model
def test_three_feature_extractors_agree(name):
    x, results = images(name, 1), []
    for options in ({}, {"feature_cls": "getter"}, {"feature_cls": "fx"}):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(timm.create_model(name, features_only=True, **options).eval()(x))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same(two if two.dim() == 4 else as_map(prototype(name), two, one), one)


@shallow_model
def test_fx_extraction(name):
    # timm's own tracer, torchvision's with the modules and functions that are marked as leaves.
    from timm.models import create_feature_extractor, get_graph_node_names

    model, x = make(name), images(name)
    train_nodes, eval_nodes = get_graph_node_names(model)
    assert train_nodes == eval_nodes
    traced = create_feature_extractor(model, [eval_nodes[-1]])
    with torch.no_grad():
        assert_same(next(iter(traced(x).values())), model(x))
    traced.train()
    next(iter(traced(x).values())).mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


@every_model
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_covers_every_parameter(name, coarse):
    from timm.models import group_parameters

    model = timm.create_model(name, device="meta")
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    named = [key for keys in groups.values() for key in keys]
    assert sorted(named) == sorted(key for key, _ in model.named_parameters())
    assert len(groups) > 2
    matcher = model.group_matcher(coarse=coarse)
    assert covered_by(model, matcher) == set(named)


def covered_by(model, matcher) -> set[str]:
    """Parameters that some pattern names; timm puts all others into its last group without a word."""
    import re

    patterns = []
    for spec in matcher.values():
        for one in spec if isinstance(spec, (list, tuple)) else [spec]:
            patterns.append(one if isinstance(one, str) else one[0])
    return {key for key, _ in model.named_parameters() if any(re.match(pattern, key) for pattern in patterns)}


@every_model
def test_layer_decay_grows_with_depth(name):
    model = timm.create_model(name, device="meta")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    cfg = get_pretrained_cfg(name)
    first = scale[id(model.get_parameter(f"{cfg.first_conv}.weight"))]
    last = scale[id(model.get_parameter(f"{cfg.classifier}.weight"))]
    assert first == min(scale.values()) < last == max(scale.values()) == 1.0


@every_model
def test_no_weight_decay_names_exist(name):
    model = timm.create_model(name, device="meta")
    names = model.no_weight_decay()
    assert isinstance(names, set)
    assert names <= {key for key, _ in model.named_parameters()}


@every_model
def test_construction_on_a_device_and_in_a_dtype(name):
    meta = timm.create_model(name, device="meta")
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    half = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    floating = [b for b in half.buffers() if b.is_floating_point()]
    assert all(b.dtype == torch.bfloat16 for b in floating)


@shallow_model
def test_bfloat16_runs(name):
    model = make(name).to(torch.bfloat16)
    with torch.no_grad():
        out = model(images(name, 1).bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@running_model
def test_materialised_from_meta(name):
    model = timm.create_model(name, num_classes=10, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(prototype(name).state_dict())
    x = images(name, 1)
    with torch.no_grad():
        assert_same(model(x), prototype(name)(x))


@every_model
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", no_such_argument=1)


@every_model
def test_rates_are_accepted(name):
    model = timm.create_model(name, drop_rate=0.1, drop_path_rate=0.1, global_pool="avg", device="meta")
    assert any(type(module).__name__ == "DropPath" for module in model.modules())


@shallow_model
def test_copies_are_equal(name):
    model, x = make(name), images(name, 1)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = timm.create_model(name, num_classes=10).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(twin(x), expected)


@shallow_model
def test_hub_folder_round_trip(name, tmp_path):
    model, x = make(name), images(name, 1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert (tmp_path / "config.json").exists()
    assert (tmp_path / "model.safetensors").exists()
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.num_classes == 10
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@small_model
def test_pretrained_file_adapts_to_channels_and_classes(name, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, in_chans=1, num_classes=7
    ).eval()
    with torch.no_grad():
        assert model(images(name, 1, chans=1)).shape == (1, 7)


@every_model
def test_pretrained_without_weights_raises(name):
    cfg = get_pretrained_cfg(name)
    if cfg.has_weights:
        pytest.skip("the default tag has weights")
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model(name, pretrained=True)


@every_model
def test_unknown_tag_raises(name):
    with pytest.raises(RuntimeError, match="no_such_tag"):
        timm.create_model(f"{name}.no_such_tag", pretrained=True)


@shallow_model
@pytest.mark.parametrize("size", [(256, 192), (97, 131)])
def test_odd_inputs(name, size):
    if not flexible(name):
        pytest.skip("fixed input size")
    model = make(name).train()
    out = model(images(name, 2, size))
    assert out.shape == (2, 10)
    out.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@shallow_model
def test_large_odd_input(name):
    if not flexible(name):
        pytest.skip("fixed input size")
    model = make(name)
    out = model(images(name, 1, (600, 500)))
    assert out.isfinite().all()
    out.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@small_model
def test_export(name):
    model, x = make(name), images(name, 1)
    program = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        assert_same(program.module()(x), model(x))


@small_model
def test_compiles_without_graph_breaks(name):
    torch.compiler.reset()
    model, x = make(name), images(name, 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), model(x))


@pytest.mark.slow
@small_model
def test_compiles_for_training(name):
    torch.compiler.reset()
    model, x = make(name).train(), images(name, 2)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@shallow_model
def test_every_shallow_model_compiles(name):
    torch.compiler.reset()
    model, x = make(name), images(name, 1)
    with torch.no_grad():
        assert_same(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
        assert_same(torch.export.export(model, (x,), strict=False).module()(x), model(x))
