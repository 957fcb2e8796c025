"""FlatFormer's parts beyond the golden cases: padding, hostile clouds, precision, training, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.backbones.bev import SECOND, SECONDFPN
from zoo.backbones.flatformer import FlatFormer, FlatFormerLayer, PositionEmbedding
from zoo.backbones.padded_graphs import PaddedGraphs
from zoo.backbones.point_layers import DynamicVFE, scatter_to_map
from zoo.kernels.voxelize import Voxels

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]
RANGE = (-8.0, -8.0, -2.0, 8.0, 8.0, 4.0)


def small_vfe(**kwargs) -> DynamicVFE:
    torch.manual_seed(0)
    return DynamicVFE(5, (16, 32), (0.5, 0.5, 6.0), RANGE, **kwargs)


def small_backbone() -> FlatFormer:
    torch.manual_seed(0)
    return FlatFormer(32, 2, 1, window_shape=(5, 4), sparse_shape=(32, 32), group_size=24).eval()


def clouds(*sizes: int, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([15.0, 15.0, 5.0, 1.0, 1.0])
    return [((torch.rand(n, 5, generator=generator) - 0.5) * scale).to(device) for n in sizes]


def pad(features: Tensor, voxels: Voxels, rows: int) -> tuple[Tensor, Voxels]:
    """The same pillars in more rows, with noise for features of the padding."""
    more = rows - len(features)
    coords = torch.cat([voxels.coords, torch.tensor([[voxels.batch_size, 0, 0, 0]]).int().expand(more, 4)])
    features = torch.cat([features, 1e3 * torch.randn(more, features.shape[1])])
    return features, voxels._replace(coords=coords, num=torch.tensor(len(voxels.coords)))


@torch.no_grad()
def test_padding_does_not_reach_real_rows() -> None:
    features, voxels = small_vfe().eval()(clouds(300, 40, 500))
    backbone = small_backbone()
    padded = pad(features, voxels, len(features) + 77)
    torch.testing.assert_close(backbone.encode(*padded)[: len(features)], backbone.encode(features, voxels))
    torch.testing.assert_close(backbone(*padded), backbone(features, voxels))


@torch.no_grad()
@pytest.mark.parametrize("clamp", [True, False])
def test_encoder_with_a_capacity_gives_the_same_rows(clamp: bool) -> None:
    vfe, points = small_vfe(clamp=clamp, half_width=True, with_distance=True).eval(), clouds(300, 0, 500)
    points[0][::7, 0] += 20
    points[2][5, 3] = math.nan
    features, voxels = vfe(points)
    padded, padded_voxels = vfe(points, capacity=1000)
    n = len(features)
    assert padded_voxels.num == n and torch.equal(padded_voxels.coords[:n], voxels.coords)
    torch.testing.assert_close(padded[:n], features)
    assert (padded[n:] == 0).all()


@torch.no_grad()
def test_a_sample_alone_and_in_a_batch() -> None:
    """Samples shorter than a group, of one point and without any, at any place of a batch."""
    vfe, backbone, points = small_vfe().eval(), small_backbone(), clouds(0, 300, 1, 0, 10, 200, 0)
    bev = backbone(*vfe(points))
    assert bev.shape == (7, 32, 32, 32) and bev.is_contiguous(memory_format=torch.channels_last)
    for i, cloud in enumerate(points):
        torch.testing.assert_close(backbone(*vfe([cloud]))[0], bev[i], rtol=1e-4, atol=1e-5)
        assert len(cloud) > 0 or (bev[i] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "points", [[], [torch.zeros(0, 5)], [torch.full((9, 5), math.nan)]], ids=["no", "empty", "nan"]
)
def test_nothing_to_see(points: list[Tensor]) -> None:
    bev = small_backbone()(*small_vfe().eval()(points))
    assert bev.shape == (len(points), 32, 32, 32) and (bev == 0).all()


@torch.no_grad()
def test_points_outside_are_clamped_or_dropped() -> None:
    inside, outside = clouds(50)[0], clouds(20, seed=1)[0] + 100
    both = torch.cat([inside, outside])
    features, voxels = small_vfe(clamp=False).eval()([inside])
    same, same_voxels = small_vfe(clamp=False).eval()([both])
    assert torch.equal(voxels.coords, same_voxels.coords)
    torch.testing.assert_close(features, same)
    _, clamped = small_vfe().eval()([outside])
    assert (clamped.coords[:, 2:] == 31).all()


@torch.no_grad()
def test_order_of_points_does_not_matter() -> None:
    vfe, (cloud,) = small_vfe().eval(), clouds(400)
    features, _ = vfe([cloud])
    shuffled, _ = vfe([cloud[torch.randperm(400)]])
    torch.testing.assert_close(features, shuffled)


@pytest.mark.parametrize(
    ("cloud", "message"),
    [
        (torch.zeros(3, 4), r"float32 \[N, 5\], got torch.float32 \(3, 4\) for sample 1"),
        (torch.zeros(3, 5).double(), "got torch.float64"),
        (torch.zeros(5), r"\(5,\)"),
    ],
    ids=["columns", "dtype", "dimensions"],
)
def test_wrong_clouds_are_named(cloud: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vfe()([torch.zeros(2, 5), cloud])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="training takes no capacity, got 10"):
        small_vfe().train()(clouds(5), capacity=10)
    with pytest.raises(ValueError, match="num_heads must divide in_channels, got 3 and 32"):
        FlatFormer(32, 3)
    with pytest.raises(ValueError, match="activation must be one of"):
        FlatFormerLayer(32, 2, "swish")
    with pytest.raises(ValueError, match=r"grid of x, y = \(32, 32\), got \(16, 8\)"):
        small_backbone()(torch.zeros(0, 32), Voxels(torch.zeros(0, 4).int(), None, 1, (1, 8, 16)))
    with pytest.raises(ValueError, match="output_shape must be the grid's"):
        FlatFormer(sparse_shape=(32, 16), output_shape=(32, 16))


def test_training_reaches_every_parameter() -> None:
    vfe, backbone, points = small_vfe().train(), small_backbone().train(), clouds(300, 0, 90)
    points[0][0] = math.nan
    before = vfe.layers[0].norm.running_mean.clone()
    bev = backbone(*vfe(points))
    (bev * torch.randn_like(bev)).sum().backward()
    for name, parameter in [*vfe.named_parameters(), *backbone.named_parameters()]:
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name
    assert not torch.equal(before, vfe.layers[0].norm.running_mean)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    vfe, backbone = small_vfe().eval().to(device), small_backbone().to(device)
    points = clouds(300, 60, device=device)
    expected = backbone(*vfe(points))
    with torch.autocast(device, dtype):
        features, voxels = vfe(points)
        assert features.dtype == torch.float32
        under_autocast = backbone(features, voxels)
    halved = backbone.to(dtype)(features.to(dtype), voxels)
    assert halved.dtype == dtype
    for out in (under_autocast, halved):
        assert (out.float() - expected).abs().max() < 0.06 * expected.abs().max()


def test_position_embedding_fills_odd_widths_with_zeros() -> None:
    pe = PositionEmbedding(10, (8, 6))(torch.tensor([[0, 0, 5, 7], [0, 0, 0, 0]]).int())
    assert pe.shape == (2, 10) and (pe[:, 8:] == 0).all()
    torch.testing.assert_close(pe[0, [0, 1, 4, 5]], torch.tensor([math.sin(7), math.cos(7), math.sin(5), math.cos(5)]))


def test_normalized_positions_span_the_map() -> None:
    pe = PositionEmbedding(8, (8, 8), normalize=True)(torch.tensor([[0, 0, 0, 4]]).int())
    torch.testing.assert_close(pe[0, :2], torch.tensor([0.0, -1.0]), atol=1e-4, rtol=0)


def test_map_holds_each_pillar_at_its_cell() -> None:
    coords = torch.tensor([[0, 0, 1, 2], [1, 0, 0, 0], [2, 0, 0, 0]]).int()
    features = torch.arange(6.0).view(3, 2).requires_grad_()
    bev = scatter_to_map(features, Voxels(coords, torch.tensor(2), 2, (1, 3, 4)))
    assert bev.shape == (2, 2, 3, 4) and bev[0, :, 1, 2].tolist() == [0, 1] and bev[1, :, 0, 0].tolist() == [2, 3]
    assert bev.count_nonzero() == 3
    bev.sum().backward()
    assert features.grad.tolist() == [[1, 1], [1, 1], [0, 0]]


@torch.no_grad()
def test_compile_full_graph() -> None:
    backbone = small_backbone()
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    features, voxels = pad(*small_vfe().eval()(clouds(300, 40)), 512)
    torch.testing.assert_close(compiled(features, voxels), backbone(features, voxels))


def test_neck_names_maps_that_do_not_fit() -> None:
    x = torch.randn(1, 8, 7, 6)
    with pytest.raises(ValueError, match="one size after enlargement"):
        SECONDFPN((4, 8), (4, 4))(SECOND(8, (4, 8), (1, 1))(x))


@torch.no_grad()
def test_map_convolutions_keep_channels_last() -> None:
    x = torch.randn(1, 8, 8, 6).contiguous(memory_format=torch.channels_last)
    backbone, neck = SECOND(8, (4, 8), (1, 1)).eval(), SECONDFPN((4, 8), (4, 4)).eval()
    assert neck(backbone(x)).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_padded_graphs_on_a_cpu_call_the_function() -> None:
    backbone, (features, voxels) = small_backbone(), small_vfe().eval()(clouds(100))
    torch.testing.assert_close(PaddedGraphs(backbone)(features, voxels), backbone(features, voxels))
    with pytest.raises(ValueError, match="rows must be positive, got 0"):
        PaddedGraphs(backbone, 0)


@pytest.mark.gpu
@gpu
@torch.no_grad()
def test_padded_graphs() -> None:
    vfe, backbone = small_vfe().eval().cuda(), small_backbone().cuda()
    graphs = PaddedGraphs(backbone, rows=128)
    for sizes, autocast in [
        ((300,), False),
        ((150,), False),
        ((310,), False),
        ((90, 0, 60), False),
        ((300,), True),
    ] * 2:
        features, voxels = vfe(clouds(*sizes, device="cuda", seed=sum(sizes)))
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            torch.testing.assert_close(graphs(features, voxels), backbone(features, voxels), rtol=2e-3, atol=2e-3)
    assert len(graphs.graphs) == 4
    backbone.block_list[0].block[0].fc1.weight.mul_(2)
    torch.testing.assert_close(graphs(features, voxels), backbone(features, voxels), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@gpu
@torch.no_grad()
def test_nothing_waits_for_the_device() -> None:
    vfe, backbone, points = small_vfe().eval().cuda(), small_backbone().cuda(), clouds(300, 50, device="cuda")
    backbone(*vfe(points, capacity=512))
    torch.cuda.set_sync_debug_mode("error")
    try:
        bev = backbone(*vfe(points, capacity=512))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(bev, backbone(*vfe(points)), rtol=1e-4, atol=1e-4)
