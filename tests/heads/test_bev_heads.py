"""Heads on bird's-eye-view maps: targets and boxes are inverse, losses have gradients, hostile targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zoo.heads import bev_ops, transfusion
from zoo.heads.bev_ops import BatchDetections, ClassNMS, Grid
from zoo.heads.center_point import CenterHead, FlatFormerCenterHead, ScatterFormerCenterHead
from zoo.heads.detections import Targets
from zoo.heads.transfusion import PositionEmbedding, TransFusionHead

SIZE = (24, 32)
GRID = Grid((-8.0, -6.0), (0.5, 0.5))
EVERYWHERE = (-1e3, -1e3, -1e3, 1e3, 1e3, 1e3)


def center_head(flavour: str) -> CenterHead:
    settings = dict(num_classes=2, grid=GRID, limits=EVERYWHERE, nms=ClassNMS((0.5, 0.2), (100, 50), (30, 20)))
    if flavour == "flat":
        return FlatFormerCenterHead(8, 8, **settings)
    return ScatterFormerCenterHead(8, 8, iou_power=(0.5, 0.5), **settings)


def transfusion_head() -> TransFusionHead:
    nms = ClassNMS((2.0, 0.3), (20, 20), (20, 20))
    return TransFusionHead(
        8, 2, GRID, (-8, -6, -2, 8, 6, 4), EVERYWHERE, nms, small=(1,), num_proposals=12, radius=2, channels=16, heads=2
    )


def truth(seed: int = 0, n: int = 5, columns: int = 9) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 9, generator=generator)
    low = torch.tensor([-7.5, -5.5, -1, 1, 0.5, 1, -3, -2, -2.0])
    high = torch.tensor([7.5, 5.5, 1, 5, 2, 2, 3, 2, 2.0])
    return Targets((low + u * (high - low))[:, :columns], torch.arange(n) % 2)


def perfect_maps(head: CenterHead, targets: list[Targets]) -> dict[str, Tensor]:
    """Maps that a head would give if it knew the answer."""
    goal = head.targets(targets, SIZE)
    B = len(targets)
    maps = {name: torch.zeros(B, channels, *SIZE) for name, channels in head.branches.items()}
    maps[head.heat_name] = torch.where(goal.heatmap == 1, 8.0, -8.0)
    maps["iou"] += 1
    column = 0
    for name, channels in head.regression.items():
        for b in range(B):
            for k in goal.mask[b].nonzero()[:, 0]:
                maps[name][b].flatten(1)[:, goal.index[b, k]] = goal.rows[b, k, column : column + channels]
        column += channels
    return maps


@pytest.mark.parametrize("flavour", ["flat", "scatter"])
def test_perfect_maps_give_the_truth_back(flavour: str) -> None:
    head, targets = center_head(flavour).eval(), [truth(1), truth(2, 3)]
    maps = perfect_maps(head, targets)
    for found, true in zip(head.decode(maps).split(), targets, strict=True):
        columns = found.boxes.shape[1]
        assert columns == head.columns and len(found.boxes) == len(true.boxes)
        order = torch.cdist(true.boxes[:, :3], found.boxes[:, :3]).argmin(1)
        torch.testing.assert_close(found.boxes[order], true.boxes[:, :columns], rtol=1e-4, atol=1e-4)
        assert torch.equal(found.labels[order], true.labels)
    losses = head.loss(maps, targets)
    assert losses["loss"] < 0.05 and losses["loss_bbox"] < 1e-4 and losses["loss_iou"] < 1e-3


@pytest.mark.parametrize("flavour", ["flat", "scatter"])
def test_loss_falls_by_its_gradient(flavour: str) -> None:
    torch.manual_seed(0)
    head, x, targets = center_head(flavour), torch.randn(2, 8, *SIZE), [truth(1), truth(2)]
    before = head.loss(head(x), targets)
    before["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    with torch.no_grad():
        for p in head.parameters():
            p -= 1e-3 * p.grad / (p.grad.norm() + 1e-6)
    assert head.loss(head(x), targets)["loss"] < before["loss"]


HEADS = {"flat": lambda: center_head("flat"), "scatter": lambda: center_head("scatter"), "fusion": transfusion_head}


@pytest.mark.parametrize("name", HEADS)
def test_samples_without_objects_and_odd_objects(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]()
    x = torch.randn(3, 8, *SIZE)
    nothing = Targets(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    odd = Targets(
        torch.tensor([[0.0, 0, 0, 0, 1, 1, 0], [1e4, 0, 0, 2, 1, 1, 0], [1, 1, 0, 2, 1, 1, 0], [2, 2, 0, 2, 1, 1, 0]]),
        torch.tensor([0, 0, 7, -1]),
    )
    for targets in ([nothing] * 3, [nothing, truth(1), odd]):
        losses = head.loss(head(x), targets)
        assert all(value.isfinite() for value in losses.values())
        losses["loss"].backward()


def test_flatformer_leaves_out_what_lies_outside_and_scatterformer_moves_it() -> None:
    box = torch.tensor([[0.0, -6.8, 0, 4, 2, 1.5, 0.3], [0.0, -6.3, 0, 4, 2, 1.5, 0.3]])
    targets = [Targets(box, torch.zeros(2, dtype=torch.int64))]
    flat, scatter = (center_head(f).targets(targets, SIZE) for f in ("flat", "scatter"))
    # Cells count towards zero: up to one cell outside is the first row.
    assert flat.mask.tolist() == [[False, True]] and flat.heatmap.sum() > 0
    assert scatter.mask.tolist() == [[True, True]] and scatter.index.tolist() == [[16, 16]]
    torch.testing.assert_close(scatter.boxes[0], box)


def test_more_objects_than_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.heads.center_point.MAX_OBJECTS", 3)
    flat, scatter = (center_head(f).targets([truth(1, 5), truth(2, 1)], SIZE) for f in ("flat", "scatter"))
    for goal in (flat, scatter):
        assert goal.mask.sum(1).tolist() == [3, 1]
        assert (goal.heatmap[0] == 1).sum() == 3
    # Labels 0 1 0 1 0: by class the three of class 0 come first.
    assert (flat.heatmap[0, 0] == 1).sum() == 3 and (scatter.heatmap[0, 0] == 1).sum() == 2


def test_gaussians() -> None:
    cells, radius = torch.tensor([[2, 1], [3, 1], [0, 4]]), torch.tensor([1, 2, 0])
    heat = bev_ops.draw_gaussians((1, 1, 6, 8), torch.tensor([0, 0, -1]), cells, radius)[0, 0]
    y, x = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    expected = torch.zeros(6, 8)
    for (cx, cy), r in (((2, 1), 1), ((3, 1), 2)):
        near = ((x - cx).abs() <= r) & ((y - cy).abs() <= r)
        value = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
        expected = torch.maximum(expected, value * near)
    torch.testing.assert_close(heat, expected)


def test_axis_aligned_diou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0.7], [0, 0, 0, 2, 2, 2, 0]])
    b = torch.tensor([[0.0, 0, 0, 2, 2, 2, -2.0], [4, 0, 0, 2, 2, 2, 0]])
    torch.testing.assert_close(bev_ops.axis_aligned_diou(a, b), torch.tensor([1.0, -16 / (36 + 4 + 4)]))


def test_suppression_by_class() -> None:
    box = torch.tensor([0.0, 0, 0, 4, 2, 1.5, 0])
    boxes = torch.stack([box, box, box, box + torch.tensor([9.0, 0, 0, 0, 0, 0, 0]), box, box]).expand(2, 6, 7)
    scores = torch.tensor([[0.5, 0.9, 0.8, 0.3, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    labels = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    valid = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    found = ClassNMS((0.5, 2.0), (10, 10), (5, 2))(boxes, scores, labels, valid)
    assert isinstance(found, BatchDetections) and found.boxes.shape == (2, 6, 7)
    first, second = found.split()
    # Class 0 is suppressed, class 1 keeps its two best.
    assert first.scores.tolist() == pytest.approx([0.9, 0.3, 0.8, 0.7]) and first.labels.tolist() == [0, 0, 1, 1]
    assert second.scores.tolist() == pytest.approx([0.3])
    only_best = ClassNMS((0.5, 2.0), (1, 1), (5, 2))(boxes, scores, labels, valid)
    assert only_best.count.tolist() == [2, 1]


def test_transfusion_keys_of_a_map_with_border_repeats() -> None:
    """Attention by projecting each cell once equals attention to gathered cells, as published."""
    torch.manual_seed(0)
    layer = transfusion_head().decoder.eval()
    feature, query, cells = torch.randn(2, 16, 5, 7), torch.randn(2, 3, 16), torch.tensor([[0, 17, 34], [6, 28, 20]])
    place = torch.stack([cells % 7, cells // 7], -1)
    out = layer._attend_around(query, place, feature)
    for b in range(2):
        for p in range(3):
            near = [
                (min(max(int(place[b, p, 0]) + i, 0), 6), min(max(int(place[b, p, 1]) + j, 0), 4))
                for j in range(-2, 3)
                for i in range(-2, 3)
            ]
            position = layer.cross_posembed(torch.tensor(near) + 0.5)
            memory = torch.stack([feature[b, :, y, x] for x, y in near]) + position
            expected, _ = layer.multihead_attn(query[b, p][None, None], memory[None], memory[None])
            torch.testing.assert_close(out[b, p], expected[0, 0], rtol=1e-4, atol=1e-5)


def test_weighted_norm_counts_positions() -> None:
    torch.manual_seed(0)
    embedding = PositionEmbedding(8)
    positions, counts = torch.rand(6, 2), torch.tensor([3, 1, 4, 0, 2, 1])
    repeated = positions.repeat_interleave(counts, 0)
    twin = PositionEmbedding(8)
    twin.load_state_dict(embedding.state_dict())
    expected = twin(repeated)
    out = embedding(positions, counts.float()).repeat_interleave(counts, 0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedding.state_dict(), twin.state_dict())


def test_self_attention_of_one_token() -> None:
    torch.manual_seed(0)
    layer, x = transfusion_head().decoder.eval(), torch.randn(2, 3, 16)
    token = x.reshape(6, 1, 16)
    torch.testing.assert_close(layer._attend_itself(x).reshape(6, 1, 16), layer.self_attn(token, token, token)[0])


def test_transfusion_matches_each_object_once() -> None:
    torch.manual_seed(0)
    head, targets = transfusion_head(), [truth(1, 5), truth(2, 2)]
    goal = head.targets(head(torch.randn(2, 8, *SIZE)), targets)
    assert goal.matched.sum(1).tolist() == [5, 2]
    for b, true in enumerate(targets):
        mine = goal.boxes[b, goal.matched[b]]
        assert (torch.cdist(mine, true.boxes[:, :7]).argmin(1).unique()).numel() == len(true.boxes)


def test_hungarian_takes_infinite_costs() -> None:
    rows, columns = transfusion._hungarian(torch.tensor([[math.inf, 1.0], [math.nan, math.inf], [0.5, 2.0]]))
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 2: 0}


@pytest.mark.parametrize("name", HEADS)
def test_half_precision_of_the_network(name: str) -> None:
    torch.manual_seed(0)
    head, x = HEADS[name](), torch.randn(1, 8, *SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head.loss(head(x), [truth(1)])
    assert losses["loss"].isfinite() and losses["loss"].dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([Targets(torch.zeros(2, 8), torch.zeros(2).long())], "must be boxes .K, 7 or 9."),
        ([Targets(torch.zeros(2, 7), torch.zeros(3).long())], r"got \(2, 7\) and \(3,\)"),
        ([], "targets of no sample"),
    ],
)
def test_wrong_targets_are_named(targets: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        center_head("flat").targets(targets, SIZE)


def test_settings_of_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match="one value a class"):
        ClassNMS((0.5,), (1, 2), (3, 4))
    with pytest.raises(ValueError, match="iou_power needs one value a class"):
        ScatterFormerCenterHead(8, 8, iou_power=(0.5,), num_classes=2, grid=GRID, limits=EVERYWHERE, nms=nn.Identity())
