"""The fast inference of detectors in point clouds: padding with NaN, sizes of graphs, and nothing that waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from zoo.backbones.padded_graphs import CloudBuffer, CloudGraphs
from zoo.backbones.point_layers import DynamicVFE, FoldedVFE
from zoo.heads.map_convs import FUSED, ConvReLU, fuse_convs
from zoo.heads.point_runtime import PointRuntime, fold_norms
from zoo.kernels.rotated_iou import reference as rotated_iou

from .test_point_detectors import NAMES, assert_same, build, cloud

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAN = float("nan")
# Of voxels, of the two stages and of the pillars.
ROWS = (1024, 1024, 1024, 512)
SIZE, RANGE = (0.5, 0.5, 2.0), (-8.0, -8.0, -2.0, 8.0, 8.0, 4.0)


class NothingWaits(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: reading the device, sizes that depend on data, copies from the host."""

    refused = {
        "_local_scalar_dense", "equal", "is_nonzero", "lift_fresh", "masked_select", "nonzero", "repeat_interleave",
        "unique_consecutive", "unique_dim", "_unique", "_unique2",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if op.namespace == "aten" and (name in self.refused or (name == "index" and self._masks(args[1]))):
            raise AssertionError(f"{op} waits for the device.")
        self.calls += 1
        return op(*args, **(kwargs or {}))

    @staticmethod
    def _masks(indices: list[Tensor | None]) -> bool:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def padded(cloud: Tensor, rows: int) -> Tensor:
    return torch.cat([cloud, cloud.new_full((rows - len(cloud), cloud.shape[1]), NAN)])


def encoder(channels: tuple[int, ...], **settings) -> DynamicVFE:
    torch.manual_seed(0)
    vfe = DynamicVFE(5, channels, SIZE, RANGE, **settings).eval()
    for module in vfe.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return vfe


@pytest.fixture
def small_rooms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("zoo.heads.point_runtime.ROWS", 64)
    monkeypatch.setattr("zoo.heads.point_runtime.POINTS", 128)
    monkeypatch.setattr("zoo.heads.point_runtime.PATIENCE", 2)


@pytest.mark.parametrize("settings", [{}, dict(clamp=False, order="xyz", half_width=True), dict(with_distance=True)])
@pytest.mark.parametrize("channels", [(12,), (16, 24), (16, 20, 24)], ids=str)
@torch.no_grad()
def test_folded_encoder_is_the_encoder(channels: tuple[int, ...], settings: dict) -> None:
    vfe, clouds = encoder(channels, **settings), [cloud(600), cloud(0), cloud(200, 1)]
    expected, voxels = vfe(clouds)
    for capacity in (None, 900):
        actual, found = FoldedVFE(vfe)(torch.cat(clouds), [600, 0, 200], capacity)
        assert torch.equal(found.coords[: len(voxels.coords)], voxels.coords)
        torch.testing.assert_close(actual[: len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert actual.isfinite().all()


@pytest.mark.parametrize("clamp", [False, True])
@torch.no_grad()
def test_padding_with_nan_changes_no_bit_of_the_voxels(clamp: bool) -> None:
    folded, clouds = FoldedVFE(encoder((16, 24), clamp=clamp)), [cloud(600), cloud(0), cloud(200, 1)]
    expected, voxels = folded(torch.cat(clouds), [600, 0, 200], 900)
    for rows in (600, 641, 5000):
        actual, found = folded(torch.cat([padded(c, rows) for c in clouds]), [rows] * 3, 900)
        assert torch.equal(found.coords, voxels.coords) and found.num == voxels.num
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_with_nan_changes_no_bit_of_the_boxes(name: str) -> None:
    runtime, clouds = build(name).accelerate(padded=True), [cloud(900), cloud(0), cloud(300, 2)]
    boxes = [runtime._graphs(clouds, points, ROWS) for points in (900, 1024, 4321)]
    assert boxes[0][0].count[0] > 3
    for found, numbers in boxes[1:]:
        assert torch.equal(numbers, boxes[0][1])
        assert all(torch.equal(a, b) for a, b in zip(found, boxes[0][0], strict=True))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_nothing_waits_between_points_and_boxes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suppress = rotated_iou.nms

    def by_kernel(*args: Tensor) -> Tensor:
        # A GPU has a kernel for this, which its own tests judge.
        with _disable_current_modes():
            return suppress(*args)

    monkeypatch.setattr(rotated_iou, "nms", by_kernel)
    runtime, clouds = build(name).accelerate(padded=True), [cloud(900), cloud(0)]
    expected = runtime._graphs(clouds, 1024, ROWS)
    with NothingWaits() as mode:
        found = runtime._graphs(clouds, 1024, ROWS)
    assert torch.equal(found[0].boxes, expected[0].boxes) and mode.calls > 100


def test_what_waits_is_refused() -> None:
    x = torch.randn(5)
    for wait in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.unique(),
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: x.masked_select(x > 0),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
            wait()


@pytest.mark.parametrize("name", NAMES)
def test_hostile_clouds(name: str, small_rooms: None) -> None:
    detector, points = build(name), cloud(500)
    runtime = detector.accelerate(padded=True)
    far, broken = points + torch.tensor([100.0, 0, 0, 0, 0]), torch.full((300, 5), NAN)
    crowded = torch.cat([points, cloud(30000, 4) * 0.05])
    strided = torch.cat([points, points], 1)[:, :5]
    for batch in (points, points[:0], points[:1], far, crowded, broken, strided, torch.cat([broken, points, far])):
        assert_same(runtime([batch])[0], detector([batch])[0])
    assert runtime([]) == []
    with torch.inference_mode():
        assert_same(runtime([points])[0], detector([points])[0])
    assert_same(runtime([points])[0], detector([points])[0])
    assert len(runtime._graphs.graphs) <= 4


def test_results_outlive_the_next_batch() -> None:
    runtime = build("flatformer_nano").accelerate(padded=True)
    found = runtime([cloud(800)])[0]
    kept = [x.clone() for x in found]
    runtime([cloud(700, 1)])
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_one_graph_serves_scans_of_a_sensor() -> None:
    """The number of points and voxels varies from scan to scan; sizes follow only if it changes a lot."""
    runtime = build("flatformer_nano").accelerate(padded=True)
    for seed, points in enumerate((3000, 2900, 3100, 0, 3050, 1000)):
        runtime([cloud(points, seed)])
    assert len(runtime._graphs.graphs) == 1
    runtime([cloud(3000), cloud(2000)])
    assert [key[0] for key in runtime._graphs.graphs] == [1, 2]


def test_room_follows_the_points(small_rooms: None) -> None:
    runtime: PointRuntime = build("flatformer_nano").accelerate(padded=True)
    rooms = []
    for points in (100, 200, 4000, 100, 4000, 100, 100, 100):
        runtime([cloud(points)])
        rooms.append(runtime._rooms[1].points)
    # A single small scan takes nothing away, two in a row do.
    large = rooms[2]
    assert rooms == [128, 256, large, large, large, large, 128, 128] and 4000 < large < 4500


def test_buffer_forgets_the_batch_before() -> None:
    buffer = CloudBuffer((2, 10, 5), torch.device("cpu"))
    for sizes in ((3, 7), (10, 0), (0, 2), (0, 0), (4, 10)):
        clouds = [cloud(n, seed) for seed, n in enumerate(sizes)]
        buffer.load(clouds)
        for place, points in zip(buffer.cloud, clouds, strict=True):
            assert torch.equal(place[: len(points)], points) and place[len(points) :].isnan().all()


def test_buffer_is_filled_by_few_launches() -> None:
    for samples in (1, 4):
        buffer = CloudBuffer((samples, 500, 5), torch.device("cpu"))
        buffer.load([cloud(400)] * samples)
        seen: list[str] = []

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None, seen=seen):
                seen.append(op.overloadpacket.__name__)
                return op(*args, **(kwargs or {}))

        with Seen():
            buffer.load([cloud(300)] * samples)
        copies = [name for name in seen if "copy" in name]
        assert copies == (["copy_", "copy_"] if samples == 1 else ["_foreach_copy_"])


def test_the_graph_unused_for_longest_goes() -> None:
    graphs = CloudGraphs(lambda points, capacity: points.nansum() + capacity, max_graphs=2)
    for points, capacity in ((8, 1), (8, 2), (8, 1), (16, 3)):
        out = graphs([torch.ones(5, 2)], points, capacity)
        assert out == 10 + capacity
    assert list(graphs.graphs) == [(1, 8, 1), (1, 16, 3)]
    graphs.clear()
    assert not graphs.graphs
    with pytest.raises(ValueError, match="max_graphs must be positive, got 0"):
        CloudGraphs(graphs.function, 0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_fused_convolutions_change_nothing(name: str) -> None:
    detector = build(name)
    x, expected = torch.randn(1, *detector.map_shape), fold_norms(build(name))
    fused = fuse_convs(fold_norms(detector))
    assert sum(isinstance(m, ConvReLU) for m in fused.modules()) > 10
    assert not any(isinstance(m, tuple(FUSED)) for m in fused.modules())
    torch.testing.assert_close(fused.dense(x), expected.dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize(("added", "after"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_convolution_with_sum_and_relu(added: bool, after: bool, device: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    layers = [nn.Conv2d(16, 24, 3, 1, 1), nn.Conv2d(16, 24, 3, 2, 1), nn.ConvTranspose2d(16, 24, 1, 1)]
    for conv in (*layers, nn.ConvTranspose2d(16, 24, 2, 2), nn.ConvTranspose2d(16, 24, 1, 2)):
        x = torch.randn(2, 16, 20, 14).to(device, dtype, memory_format=torch.channels_last)
        exact = conv.to(device)(x.float())
        other = torch.randn_like(exact).to(dtype) if added else None
        exact = exact.relu() + other if after else (exact if other is None else exact + other).relu()
        fused = ConvReLU(conv.to(dtype, memory_format=torch.channels_last))
        kept = None if other is None else other.clone()
        out = fused(x, other, after)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.float(), exact.float(), rtol=1e-2, atol=1e-2)
        assert other is None or torch.equal(other, kept)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_graphs_from_points_to_boxes(name: str) -> None:
    detector = build(name).cuda()
    runtime = detector.accelerate(dtype=torch.float32, max_graphs=2)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for sizes in ((1500,), (1400,), (0,), (1,), (900, 0, 300), (1600,), (60000,), (1500,)):
            batch = [cloud(n, seed).cuda() for seed, n in enumerate(sizes)]
            for found, expected in zip(runtime(batch), detector(batch), strict=True):
                assert_same(found, expected, 2e-3)
        assert len(runtime._graphs.graphs) == 2
        batch, room = [cloud(1500).cuda()], runtime._rooms[1]
        runtime(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            runtime._graphs(batch, room.points, room.rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_two_million_points() -> None:
    detector = build("flatformer_nano").cuda()
    batch = [cloud(2_000_000).cuda()]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_same(detector.accelerate(dtype=torch.float32)(batch)[0], detector(batch)[0], 2e-3)
