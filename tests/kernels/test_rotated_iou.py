"""The ops of rotated overlap and suppression: references, kernels on a GPU, torch's transformations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.kernels.rotated_iou import reference as definition
from zoo.kernels.rotated_iou import rotated_iou, rotated_iou_3d, rotated_nms, rotated_overlap
from zoo.kernels.rotated_iou.op import can_run

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def boxes(*shape: int, side: float = 6.0, seed: int = 0, device: str = "cpu", dtype=torch.float32) -> Tensor:
    """Rectangles of up to 5 x 3 with centres in a square."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, 5, generator=generator, dtype=torch.float64)
    return (x * torch.tensor([side, side, 5, 3, 12]) - torch.tensor([0, 0, 0, 0, 6])).to(dtype).to(device)


def corners(box: list[float]) -> list[tuple[float, float]]:
    x, y, w, h, angle = box
    c, s = math.cos(angle), math.sin(angle)
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return [(x + (c * i * w - s * j * h) / 2, y + (s * i * w + c * j * h) / 2) for i, j in signs]


def clipped_area(a: list[float], b: list[float]) -> float:
    """Area of intersection by cutting A with the half plane of each side of B in turn."""
    polygon, cutter = corners(a), corners(b)
    for k in range(4):
        (x0, y0), (x1, y1) = cutter[k - 1], cutter[k]
        inside = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in polygon]
        cut = []
        for i, (x, y) in enumerate(polygon):
            (px, py), before, here = polygon[i - 1], inside[i - 1], inside[i]
            if (before >= 0) != (here >= 0):
                t = before / (before - here)
                cut.append((px + t * (x - px), py + t * (y - py)))
            if here >= 0:
                cut.append((x, y))
        polygon = cut
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2


def one_by_one(rectangles: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """The definition of greedy suppression."""
    kept: list[int] = []
    iou = rotated_iou(rectangles, rectangles)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if scores[i] > -math.inf and all(iou[j, i] <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("device", DEVICES)
def test_overlap_is_the_clipped_polygon(device: str) -> None:
    a, b = boxes(40, device=device, seed=1), boxes(30, device=device, seed=2)
    expected = torch.tensor([[clipped_area(x, y) for y in b.tolist()] for x in a.tolist()], device=device)
    assert (expected == 0).any() and (expected > 1).any()
    torch.testing.assert_close(rotated_overlap(a, b), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated_overlap(a[:30], b, aligned=True), expected[:30].diagonal(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, -2.5])
@pytest.mark.parametrize("turn", [0.0, 1e-8, 1e-6, math.pi / 2, math.pi, 2 * math.pi])
@pytest.mark.parametrize("shift", [0.0, 1e-7, 4.0])
def test_touching_and_equal_squares(device: str, angle: float, turn: float, shift: float) -> None:
    a = torch.tensor([[1.0, 2.0, 4.0, 4.0, angle]], device=device)
    b = torch.tensor(
        [[1 + shift * math.cos(angle), 2 + shift * math.sin(angle), 4.0, 4.0, angle + turn]], device=device
    )
    expected = 0.0 if shift == 4 else 16.0
    assert abs(rotated_overlap(a, b).item() - expected) < 5e-5


def test_contained_and_empty_rectangles() -> None:
    outer = torch.tensor([[0.0, 0, 10, 10, 0.7]])
    inner = torch.tensor([[1.0, -1, 2, 3, 2.1], [1, -1, 0, 3, 2.1], [1, -1, 0, 0, 0], [1e6, 0, 2, 2, 1]])
    torch.testing.assert_close(rotated_overlap(outer, inner), torch.tensor([[6.0, 0, 0, 0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated_overlap(inner, outer)[:, 0], torch.tensor([6.0, 0, 0, 0]), atol=1e-5, rtol=0)


def test_iou_in_three_dimensions() -> None:
    a = torch.tensor([[0.0, 0, 0, 4, 2, 2, 0.4]])
    b = torch.tensor([[0.0, 0, 1, 4, 2, 4, 0.4], [0, 0, 5, 4, 2, 2, 0.4]])
    # Heights [-1, 1] and [-1, 3] share 2 of 4; from the bottom [0, 2] and [1, 5] share 1 of 5.
    torch.testing.assert_close(rotated_iou_3d(a, b), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(rotated_iou_3d(a, b, z_bottom=True), torch.tensor([[0.2, 0.0]]))
    torch.testing.assert_close(rotated_iou_3d(a.expand(2, 7), b, aligned=True), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(rotated_iou(a, b), torch.tensor([[1.0, 1.0]]))


def test_results_do_not_depend_on_gradients() -> None:
    a = boxes(3).requires_grad_()
    assert not rotated_iou(a, a).requires_grad and not rotated_overlap(a, a, aligned=True).requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "side", "threshold"), [(1, 1, 0.5), (33, 3, 0.3), (150, 20, 0.1), (90, 4, 0.01)])
def test_suppression_is_greedy(device: str, n: int, side: float, threshold: float) -> None:
    rectangles, scores = boxes(n, side=side, device=device), torch.rand(n, device=device)
    scores[::7] = -math.inf
    scores[1:5] = 0.5
    index, count = rotated_nms(rectangles, scores, threshold, max_output=n)
    expected = one_by_one(rectangles.cpu(), scores.cpu(), threshold)
    assert index[: int(count)].tolist() == expected
    assert (index[int(count) :] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_groups_are_apart_and_have_their_own_threshold(device: str) -> None:
    rectangles, scores = boxes(2, 3, 70, side=12, device=device), torch.rand(2, 3, 70, device=device)
    # None at 0, where whether rectangles that are apart overlap is a matter of rounding.
    threshold = torch.tensor([[0.1, 0.5, 2.0], [0.01, 0.3, 0.7]], device=device)
    index, count = rotated_nms(rectangles, scores, threshold, max_output=20, limit=50)
    assert index.shape == (2, 3, 20) and count.shape == (2, 3) and count.dtype == torch.int32
    assert count[0, 2] == 20
    for b in range(2):
        for c in range(3):
            low = scores[b, c].sort(descending=True).values[50]
            best = torch.where(scores[b, c] > low, scores[b, c], -math.inf)
            expected = one_by_one(rectangles[b, c].cpu(), best.cpu(), threshold[b, c].item())[:20]
            assert index[b, c, : count[b, c]].tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_hostile_rectangles(device: str) -> None:
    rectangles = boxes(40, side=2, device=device)
    scores = torch.rand(40, device=device)
    scores[3] = math.nan
    rectangles[5] = math.nan
    rectangles[6, 2:4] = 0
    rectangles[7] = math.inf
    index, count = rotated_nms(rectangles, scores, 0.2, max_output=40)
    kept = index[: int(count)].tolist()
    # Without a score it is absent; without an overlap it suppresses nothing and nothing suppresses it.
    assert 3 not in kept and {5, 6, 7} <= set(kept)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_inputs(device: str) -> None:
    none = boxes(0, device=device)
    assert rotated_overlap(none, boxes(3, device=device)).shape == (0, 3)
    assert rotated_overlap(boxes(3, device=device), none).shape == (3, 0)
    assert rotated_overlap(none, none, aligned=True).shape == (0,)
    index, count = rotated_nms(none, none[:, 0], 0.5, max_output=4)
    assert index.tolist() == [0] * 4 and count.item() == 0
    index, count = rotated_nms(boxes(2, 0, device=device), torch.zeros(2, 0, device=device), 0.5, max_output=0)
    assert index.shape == (2, 0) and count.tolist() == [0, 0]
    assert rotated_nms(boxes(0, 5, device=device), torch.zeros(0, 5, device=device), 0.5, max_output=2)[0].numel() == 0


def test_a_long_chain_of_conflicts() -> None:
    # Each overlaps its neighbours only, so every second one stays.
    row = torch.tensor([[float(i), 0, 1.5, 1, 0] for i in range(65)])
    index, _ = rotated_nms(row, torch.arange(65.0).neg(), 0.1, max_output=65)
    assert index[:33].tolist() == list(range(0, 65, 2))


def test_crowded_scene_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rectangles, scores = boxes(60, side=3), torch.rand(60)
    whole = rotated_nms(rectangles, scores, 0.2, max_output=60), rotated_overlap(rectangles, rectangles)
    monkeypatch.setattr(definition, "MAX_PAIRS", 100)
    parts = rotated_nms(rectangles, scores, 0.2, max_output=60), rotated_overlap(rectangles, rectangles)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotated_overlap(boxes(2)[:, :4], boxes(2)), r"a must be floating point \[N, 5\], got .*\(2, 4\)"),
        (lambda: rotated_overlap(boxes(2), boxes(2).int()), "b must be floating point"),
        (lambda: rotated_overlap(boxes(2), boxes(3), aligned=True), "as many a as b, got 2 and 3"),
        (lambda: rotated_overlap(boxes(2), boxes(2).double()), "one dtype and device"),
        (lambda: rotated_iou_3d(boxes(2), boxes(2)), r"a must be floating point \[N, 7\]"),
        (lambda: rotated_nms(boxes(2), torch.zeros(3), 0.1, max_output=2), r"scores must be \[2\]"),
        (lambda: rotated_nms(boxes(2), torch.zeros(2), 0.1, max_output=-1), "must not be negative, got -1"),
        (lambda: rotated_overlap(boxes(2), boxes(2), backend="cuda"), "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    is_cuda = True

    def __init__(self, *shape: int, dtype=torch.float32) -> None:
        self.x = torch.empty(shape, device="meta", dtype=dtype)

    def __getattr__(self, name: str):
        return getattr(self.x, name)


def test_limits_of_the_kernels_are_explained() -> None:
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        rotated_overlap(boxes(2), boxes(2), backend="triton")
    with pytest.raises(NotImplementedError, match="8192 rectangles a group, got 9000"):
        can_run(_OnGpu(1, 9000, 5), 9000, raise_error=True)
    with pytest.raises(NotImplementedError, match="computes in float32, got torch.float64"):
        can_run(_OnGpu(4, 5, dtype=torch.float64), raise_error=True)
    with pytest.raises(NotImplementedError, match="65535 groups, got 70000"):
        can_run(_OnGpu(70000, 4, 5), 4, raise_error=True)
    assert can_run(_OnGpu(2, 4096, 5), 4096)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    a, b = boxes(5, device=device), boxes(4, device=device)
    torch.library.opcheck(torch.ops.zoo.rotated_overlap, (a, b, False))
    torch.library.opcheck(torch.ops.zoo.rotated_overlap, (a, a, True))
    count, threshold = torch.tensor([5, 3], dtype=torch.int32, device=device), torch.tensor([0.1, 0.4], device=device)
    torch.library.opcheck(torch.ops.zoo.rotated_nms, (boxes(2, 5, device=device), count, threshold))


@gpu
def test_compile_full_graph() -> None:
    def both(rectangles: Tensor, scores: Tensor):
        return rotated_iou(rectangles, rectangles), rotated_nms(rectangles, scores, 0.2, max_output=20)

    inputs = boxes(64, device="cuda"), torch.rand(64, device="cuda")
    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(*inputs), both(*inputs))


@gpu
@pytest.mark.parametrize(("groups", "n", "side"), [(1, 500, 60), (6, 2048, 100), (2, 4096, 50), (1, 8192, 400)])
def test_kernel_keeps_what_the_reference_keeps(groups: int, n: int, side: float) -> None:
    rectangles, scores = boxes(groups, n, side=side, device="cuda"), torch.rand(groups, n, device="cuda")
    scores[:, n // 2 :: 3] = -math.inf
    index, count = rotated_nms(rectangles, scores, 0.2, max_output=n, backend="triton")
    expected = rotated_nms(rectangles.double(), scores, 0.2, max_output=n, backend="reference")
    # An overlap at the threshold to rounding may decide either way, which then touches what follows.
    for g in range(groups):
        here, there = (set(i[g, : c[g]].tolist()) for i, c in ((index, count), expected))
        assert len(here ^ there) <= 0.002 * len(there)


@gpu
def test_suppression_in_a_cuda_graph() -> None:
    rectangles, scores = boxes(3, 300, side=20, device="cuda"), torch.rand(3, 300, device="cuda")
    rotated_nms(rectangles, scores, 0.2, max_output=100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = rotated_nms(rectangles, scores, 0.2, max_output=100, backend="triton")
    scores.copy_(torch.rand(3, 300, device="cuda"))
    graph.replay()
    torch.testing.assert_close(result, rotated_nms(rectangles, scores, 0.2, max_output=100, backend="triton"))
