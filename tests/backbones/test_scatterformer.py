"""ScatterFormer: padding, order and emptiness of its voxels, its parts on their own, configurations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.backbones.cascade_ded import CascadeDED
from zoo.backbones.scatterformer import (
    CONFIGS,
    CrossWindowInteraction,
    ScatteredLinearAttention,
    ScatterFormer,
)
from zoo.kernels.voxelize import Voxels

SMALL = dict(
    input_channels=8, feature_dim=16, num_heads=2, win_size=4, grid_size=(16, 12, 7), depth=1, cpe_blocks=1
)  # fmt: skip


def make_voxels(counts: tuple[int, ...], padding: int = 0, shape=(7, 12, 16), device: str = "cpu") -> Voxels:
    """Random cells sorted by sample, x, y, z, as `voxelize(order="xyz")` leaves them, then rows of padding."""
    generator, rows = torch.Generator().manual_seed(0), []
    Z, Y, X = shape
    for b, count in enumerate(counts):
        cell = torch.randperm(Z * Y * X, generator=generator)[:count].sort().values
        rows.append(torch.stack((cell * 0 + b, cell % Z, cell // Z % Y, cell // (Z * Y)), 1))
    rows.append(torch.tensor([[len(counts), 0, 0, 0]]).expand(padding, 4))
    num = torch.tensor(sum(counts), device=device) if padding else None
    return Voxels(torch.cat(rows).int().to(device), num, len(counts), shape)


def make_model(device: str = "cpu") -> ScatterFormer:
    torch.manual_seed(0)
    model = ScatterFormer(**SMALL, device=device).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return model


def test_padding_and_order_change_nothing() -> None:
    model, voxels, padded = make_model(), make_voxels((150, 0, 90)), make_voxels((150, 0, 90), 100)
    x = torch.randn(240, 8)
    with torch.no_grad():
        bev = model(x, voxels, is_sorted=True)
        model.growth = (2, 2, 1)
        with_padding = model(torch.cat((x, torch.full((100, 8), 7.0))), padded, is_sorted=True)
        order = torch.randperm(240)
        shuffled = model(x[order], voxels._replace(coords=voxels.coords[order]))
    assert bev.shape == (3, 16, 6, 8) and (bev[1] == 0).all() and bev[0].any() and bev[2].any()
    assert bev.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(with_padding, bev)
    torch.testing.assert_close(shuffled, bev)


def test_folded_norms_change_nothing() -> None:
    model, voxels, x = make_model(), make_voxels((150, 90)), torch.randn(240, 8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for values in (module.weight, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        expected = model(x, voxels, is_sorted=True)
        actual = model.fold_norms()(x, voxels, is_sorted=True)
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in model.modules()) == 2 * 1 + 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_rows_are_counted() -> None:
    """Rooms of just that many rows hold all sites."""
    model, voxels, padded = make_model(), make_voxels((150, 0, 90)), make_voxels((150, 0, 90), 1)
    x, rows = torch.randn(240, 8), model.count_rows(voxels)
    with torch.no_grad():
        expected = model(x, voxels, is_sorted=True)
        model.growth = tuple((n - 0.5) / 241 for n in rows)
        enough = model(torch.cat((x, x[:1])), padded, is_sorted=True)
        model.growth = tuple((n - 1.5) / 241 for n in rows)
        too_few = model(torch.cat((x, x[:1])), padded, is_sorted=True)
    torch.testing.assert_close(enough, expected)
    assert not torch.allclose(too_few, expected)


def test_samples_do_not_see_each_other() -> None:
    model, voxels, x = make_model(), make_voxels((150, 90)), torch.randn(240, 8)
    coords = voxels.coords[150:].clone()
    coords[:, 0] = 0
    with torch.no_grad():
        alone = model(x[150:], voxels._replace(coords=coords, batch_size=1))
        torch.testing.assert_close(model(x, voxels)[1:], alone)


@pytest.mark.parametrize("padding", [0, 20])
def test_no_voxels_give_an_empty_map(padding: int) -> None:
    with torch.no_grad():
        bev = make_model()(torch.zeros(padding, 8), make_voxels((0, 0), padding))
    assert bev.shape == (2, 16, 6, 8) and (bev == 0).all()


def test_training_reaches_every_parameter() -> None:
    model, voxels = make_model().train(), make_voxels((150, 90))
    bev = model(torch.randn(240, 8), voxels)
    (bev * torch.randn_like(bev)).sum().backward()
    # Softmax does not depend on what all keys share, the bias of the keys.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_mistakes_are_named() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"grid of z, y, x = \(7, 12, 16\), got \(7, 16, 12\)"):
        model(torch.zeros(5, 8), make_voxels((5,), shape=(7, 16, 12)))
    with pytest.raises(ValueError, match="training takes no padded voxels"):
        model.train()(torch.zeros(15, 8), make_voxels((5,), 10))
    with pytest.raises(ValueError, match="win_size must be even"):
        ScatterFormer(**{**SMALL, "win_size": 5})
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        ScatteredLinearAttention(16, 3)
    with pytest.raises(ValueError, match="conv_size be odd"):
        CrossWindowInteraction(16, 4)
    with pytest.raises(ValueError, match="divide by 4, got a map"):
        CascadeDED(8, 8, 1)(torch.zeros(1, 8, 6, 8))


@pytest.mark.parametrize(("name", "parameters"), [("waymo", 4_241_856), ("nuscenes", 4_245_184), ("nano", 554_176)])
def test_configurations_have_their_published_size(name: str, parameters: int) -> None:
    model = ScatterFormer(**CONFIGS[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_projection_where_channels_change() -> None:
    model = CascadeDED(8, 12, 2)
    assert model(torch.randn(1, 8, 8, 12)).shape == (1, 12, 8, 12)
    assert model.layers[0].encoder[0][0].downsample_layer is not None
    assert model.layers[1].encoder[0][0].downsample_layer is None


def run(model: ScatterFormer, x: Tensor, voxels: Voxels) -> Tensor:
    with torch.no_grad():
        return model(x, voxels, is_sorted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu_and_one_graph_serves_other_voxels() -> None:
    model, gpu_model = make_model(), make_model("cuda")
    gpu_model.load_state_dict(model.state_dict())
    voxels, x = make_voxels((150, 0, 90), 100), torch.randn(340, 8)
    on_gpu = make_voxels((150, 0, 90), 100, device="cuda")
    gpu_x, coords, num = x.cuda(), on_gpu.coords.clone(), on_gpu.num.clone()
    torch.testing.assert_close(run(gpu_model, gpu_x, on_gpu).cpu(), run(model, x, voxels), rtol=1e-3, atol=1e-3)
    captured_voxels = on_gpu._replace(coords=coords, num=num)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(gpu_model, gpu_x, captured_voxels)
    other = make_voxels((40, 200, 60), 40, device="cuda")
    coords.copy_(other.coords)
    num.copy_(other.num)
    graph.replay()
    torch.testing.assert_close(captured, run(gpu_model, gpu_x, other))
