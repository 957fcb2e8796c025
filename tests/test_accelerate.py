"""timm's models on this package's ops: the same numbers, the same parameters, and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from safetensors.torch import save
from timm.layers.halo_attn import HaloAttn
from torch import nn

import zoo
from tests import hub_server
from tests.test_hub import server  # noqa: F401  a fixture
from zoo.backbones.halo import HaloAttention
from zoo.hub import HubError

# Name, smallest legal size and number of halo layers.
MODELS = [
    ("halonet26t", 256, 3),
    ("halonet50ts", 256, 5),
    ("sehalonet33ts", 256, 4),
    ("eca_halonext26ts", 256, 3),
    ("haloregnetz_b", 224, 5),
    ("halo2botnet50ts_256", 128, 5),
    ("lamhalobotnet50ts_256", 128, 3),
    ("halonet_h1", 256, 19),
]
NAMES = [name for name, _, _ in MODELS]
TINY = dict(dim=16, num_heads=2, block_size=4, halo_size=1)


def narrow(name: str, size: int = 256, **kwargs) -> nn.Module:
    """A thin copy of timm's model whose attention branches are not switched off by zero norms."""
    torch.manual_seed(0)
    if "botnet" in name:
        kwargs["img_size"] = size
    if "regnetz" not in name:  # its convolutions have groups of 16 channels
        kwargs["width_factor"] = 0.25
    return timm.create_model(name, zero_init_last=False, num_classes=10, **kwargs)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), HaloAttn(**TINY), nn.Sequential(HaloAttn(**TINY)))


def assert_equal_to_rounding(actual: torch.Tensor, expected: torch.Tensor, name: str = "", bound: float = 1e-5) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error <= bound, f"{name} is off by {error:.1e} of the largest value"


@pytest.mark.parametrize(("name", "size", "count"), MODELS)
def test_timm_models_keep_their_numbers(name, size, count):
    # In float64, so that batch norms in training mode do not magnify rounding.
    expected = narrow(name, size).double().train()
    model = copy.deepcopy(expected)
    assert zoo.accelerate(model) is model
    assert len(zoo.accelerated(model)) == count
    assert all(isinstance(model.get_submodule(layer), HaloAttention) for layer in zoo.accelerated(model))
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for net in (model, expected):
        image = x.clone().requires_grad_()
        out = net(image)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients = {key: p.grad for key, p in net.named_parameters()}
        results.append({"output": out.detach(), "image": image.grad, **gradients, **dict(net.named_buffers())})
    for key, value in results[1].items():
        if value.is_floating_point() and value.abs().max() > 1e-9:
            assert_equal_to_rounding(results[0][key], value, key)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(TINY),
        dict(TINY, stride=2),
        dict(TINY, stride=2, avg_down=True),
        dict(TINY, block_size=3, stride=2),
        dict(TINY, dim_out=24, dim_head=4, qkv_bias=True, scale_pos_embed=True),
        dict(TINY, qk_ratio=0.5, halo_size=0),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layers_keep_their_numbers_in_float32(arguments, memory_format):
    torch.manual_seed(0)
    layer = HaloAttn(**arguments)
    side = 3 * layer.block_size
    x = torch.randn(2, 16, side, 2 * side).to(memory_format=memory_format)
    results = []
    for net in (layer, zoo.accelerate(copy.deepcopy(layer))):
        image = x.detach().requires_grad_()
        out = net(image)
        assert out.is_contiguous(memory_format=memory_format) or net is layer
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append({"output": out, "input": image.grad, **{key: p.grad for key, p in net.named_parameters()}})
    for key, value in results[0].items():
        assert_equal_to_rounding(results[1][key], value, key)


def test_parameters_stay_the_same_objects():
    model = small_net().eval()
    before = {key: (id(p), p.clone()) for key, p in model.named_parameters()}
    keys, modules = list(model.state_dict()), [id(m) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zoo.accelerate(model)
    assert list(model.state_dict()) == keys
    assert [id(m) for m in model.modules()] == modules
    assert not any(m.training for m in model.modules())
    for key, p in model.named_parameters():
        assert id(p) == before[key][0]
        assert torch.equal(p, before[key][1])
    model.train()(torch.randn(2, 3, 10, 10)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[key][1]) for key, p in model.named_parameters() if "kv" in key)


def test_hooks_stay():
    model, calls = small_net(), []
    model[2].register_forward_hook(lambda *args: calls.append("forward"))
    model[2].q.register_forward_hook(lambda *args: calls.append("q"))
    zoo.accelerate(model)(torch.randn(1, 3, 10, 10))
    assert calls == ["q", "forward"]


def test_device_and_dtype_stay():
    meta = zoo.accelerate(timm.create_model("halonet26t", device="meta", dtype=torch.bfloat16))
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    half = zoo.accelerate(small_net().bfloat16())
    assert half(torch.randn(1, 3, 10, 10).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert zoo.accelerate(small_net())(torch.randn(1, 3, 10, 10)).dtype == torch.bfloat16


def test_restore_gives_timms_layers_back():
    model, x = small_net(), torch.randn(2, 3, 10, 10)
    native = HaloAttention(**TINY)
    model.append(native)
    expected = model(x)
    zoo.accelerate(model)
    assert zoo.accelerated(model) == ["2", "3.0"]
    assert zoo.restore(model) is model
    assert zoo.accelerated(model) == []
    assert type(model[2]) is type(model[3][0]) is HaloAttn
    # A layer that was of this package from the start is not the other's to restore.
    assert type(native) is HaloAttention
    assert torch.equal(model(x), expected)
    assert not [key for key in model[2].__dict__ if "accelerated" in key]


def test_accelerating_again_changes_nothing():
    model = zoo.accelerate(zoo.accelerate(small_net()))
    assert zoo.accelerated(model) == ["2", "3.0"]
    assert type(zoo.restore(model)[2]) is HaloAttn


def test_a_single_layer():
    layer = HaloAttn(**TINY)
    assert zoo.accelerate(layer) is layer
    assert zoo.accelerated(layer) == [""]
    assert isinstance(layer, HaloAttention)


def test_nothing_to_accelerate():
    with pytest.raises(ValueError, match="nothing to accelerate in Linear: zoo.accelerate replaces timm's HaloAttn"):
        zoo.accelerate(nn.Linear(2, 2))

    class Own(HaloAttn):
        pass

    with pytest.raises(ValueError, match="nothing to accelerate"):
        zoo.accelerate(Own(**TINY))


def test_sizes_that_timm_refuses():
    model = narrow("halonet26t")
    x = torch.randn(2, 3, 161, 97)
    with pytest.raises(AssertionError):
        model(x)
    zoo.accelerate(model)(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_copies_and_files():
    model, x = zoo.accelerate(small_net().eval()), torch.randn(1, 3, 9, 12)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain = small_net().eval()
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), zoo.accelerate(plain)):
        assert torch.equal(twin(x), expected)
        assert zoo.accelerated(twin) == ["2", "3.0"]
        assert type(zoo.restore(twin)[2]) is HaloAttn
    assert zoo.accelerated(model) == ["2", "3.0"]


def test_compiles_and_exports():
    torch.compiler.reset()
    model, x = zoo.accelerate(small_net().eval()), torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), expected)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exports_with_a_dynamic_batch():
    model = zoo.accelerate(small_net().eval())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 9, 12),), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(5, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_tracing_keeps_the_layer():
    model, x = zoo.accelerate(narrow("halonet26t")).eval(), torch.randn(1, 3, 96, 64)
    nodes = timm.models.get_graph_node_names(model)[1]
    traced = timm.models.create_feature_extractor(model, [nodes[-1]])
    with torch.no_grad():
        torch.testing.assert_close(next(iter(traced(x).values())), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_create_model_accelerates(name):
    model = zoo.create_model(name, device="meta")
    assert zoo.accelerated(model)
    assert not zoo.accelerated(timm.create_model(name, device="meta"))
    assert list(model.state_dict()) == list(timm.create_model(name, device="meta").state_dict())


def test_create_model_leaves_others_alone():
    assert not zoo.accelerated(zoo.create_model("test_convnext"))
    features = zoo.create_model("halonet26t", features_only=True, width_factor=0.25)
    assert len(zoo.accelerated(features)) == 3
    with torch.no_grad():
        assert [m.shape[-2:] for m in features(torch.randn(1, 3, 70, 70))][-1] == (3, 3)


def test_weights_come_from_timms_repository(server):  # noqa: F811
    source = narrow("halonet50ts").eval()
    weights = save({key: value.contiguous() for key, value in source.state_dict().items()})
    server.repos["timm/halonet50ts.a1h_in1k"] = hub_server.Repo({"model.safetensors": weights})
    options = dict(width_factor=0.25, pretrained_cfg_overlay=dict(num_classes=10), num_classes=10)
    model = zoo.create_model("halonet50ts.a1h_in1k", pretrained=True, **options).eval()
    assert any(path.startswith("/timm/halonet50ts.a1h_in1k/resolve") for _, path in server.requests)
    assert len(zoo.accelerated(model)) == 5
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert_equal_to_rounding(model(x), source(x))
    with pytest.raises(HubError, match="does not exist"):
        zoo.create_model("halonet26t.a1h_in1k", pretrained=True)


def test_weights_from_a_file(tmp_path):
    source = narrow("halonet26t")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=10)
    model = zoo.create_model(
        "halonet26t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, width_factor=0.25
    )
    assert zoo.accelerated(model)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_no_weights_no_model():
    with pytest.raises(HubError, match="No pretrained weights exist for 'halonet_h1'"):
        zoo.create_model("halonet_h1", pretrained=True)


# Layers of timm's networks: strided and pooled queries, 24 and 72 channels per head, four heads.
ON_A_GPU = [
    dict(dim=128, num_heads=4),
    dict(dim=256),
    dict(dim=512, halo_size=2, stride=2),
    dict(dim=576, block_size=7, halo_size=2, qk_ratio=0.33),
    dict(dim=864, block_size=7, halo_size=2, qk_ratio=0.33, stride=2),
    dict(dim=128, dim_head=16, halo_size=2, qkv_bias=True, scale_pos_embed=True),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arguments", ON_A_GPU, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
def test_layers_on_a_gpu_are_as_exact_as_timms(arguments, dtype):
    """Under autocast, output and gradients lie at most twice as far from float64 as timm's own."""
    torch.manual_seed(0)
    layer = HaloAttn(**arguments)
    side = 2 * layer.block_size
    x = torch.randn(3, arguments["dim"], side, 2 * side).to(memory_format=torch.channels_last)

    def run(net, image, enabled):
        net, image = net.train(), image.detach().requires_grad_()
        with torch.autocast("cuda", dtype, enabled=enabled):
            out = net(image)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        grads = torch.autograd.grad(out, [image, *net.parameters()], grad)
        return [t.double().cpu() for t in (out.detach(), *grads)]

    exact = run(copy.deepcopy(layer).double(), x.double(), False)
    half = dtype != torch.float32
    plain = run(copy.deepcopy(layer).cuda(), x.cuda(), half)
    ours = run(zoo.accelerate(copy.deepcopy(layer).cuda()), x.cuda(), half)
    names = ["output", "input", *dict(layer.named_parameters())]
    for name, e, p, a in zip(names, exact, plain, ours, strict=True):
        allowed = 2 * (p - e).abs().max() + 1e-5 * e.abs().max()
        assert (a - e).abs().max() <= allowed, f"{name}: error {(a - e).abs().max():.3g}, allowed {allowed:.3g}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_on_a_gpu_trains_compiled():
    torch.compiler.reset()
    expected = narrow("halonet26t").cuda().train()
    model = zoo.accelerate(copy.deepcopy(expected))
    x = torch.randn(4, 3, 256, 256, device="cuda").to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = [net(x) for net in (compiled, expected)]
        for out in outputs:
            (out * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
    assert_equal_to_rounding(*outputs, name="output", bound=1e-3)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_equal_to_rounding(ours.grad, theirs.grad, name, bound=2e-2)
