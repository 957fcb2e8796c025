"""Detectors on feature pyramids: the batched loss against torchvision's, backbones, sizes, labels and messages."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from zoo.heads.image_detection import ImageDetector, create_image_detector, match_anchors

SMALL = dict(channels=16, min_size=64, max_size=128)


def detector(head: str = "retinanet", backbone: str = "resnet10t", classes: int = 3, **kwargs) -> ImageDetector:
    torch.manual_seed(0)
    return create_image_detector(backbone, head, classes, **(SMALL | kwargs))


def target(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(labels), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return dict(boxes=corners, labels=torch.tensor(labels, dtype=torch.int64), masks=masks)


IMAGES = [torch.linspace(0, 1, 3 * h * w).view(3, h, w) for h, w in ((64, 80), (50, 45), (64, 64))]
TARGETS = [
    target([[4, 4, 40, 40], [30, 10, 75, 60]], [0, 2], (64, 80)),
    target([], [], (50, 45)),
    target([[8, 8, 24, 30]], [1], (64, 64)),
]


def test_loss_is_that_of_torchvision(monkeypatch) -> None:
    """In one batch: several objects, none, one; gradients too."""
    net = detector(extra_levels=False, norm_groups=4)
    losses = net.loss(IMAGES, TARGETS)
    losses["loss"].backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(type(net.net), "compute_loss", RetinaNet.compute_loss)
    expected = net.loss(IMAGES, TARGETS)
    expected["loss"].backward()
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    for grad, parameter in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_matching_is_that_of_torchvision() -> None:
    torch.manual_seed(0)
    corners = torch.rand(400, 2) * 50
    anchors = torch.cat([corners, corners + 5 + torch.rand(400, 2) * 30], 1)
    corners = torch.rand(3, 5, 2) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(3, 5, 2) * 30], -1)
    valid = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5]).bool()
    found = match_anchors(anchors, boxes, valid, 0.4, 0.5)
    for row, candidates, kept in zip(found[:2], boxes, valid, strict=False):
        expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(candidates[kept], anchors))
        assert torch.equal(row, expected)
    assert {-2, -1} <= set(found.unique().tolist()) and (found[2] == -1).all()


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_results(head) -> None:
    """Sizes of their own for each image; labels from 0; the best result first."""
    options = dict(score_thresh=0.0) if head == "retinanet" else dict(box_score_thresh=0.0)
    net = detector(head, options=options).eval()
    with torch.no_grad():
        found = net(IMAGES)
    for image, result in zip(IMAGES, found, strict=True):
        height, width = image.shape[-2:]
        n = len(result["labels"])
        assert n > 0 and result["boxes"].shape == (n, 4) and result["scores"].shape == (n,)
        assert result["labels"].min() >= 0 and result["labels"].max() < 3
        assert (result["scores"].diff() <= 0).all()
        assert (result["boxes"] >= 0).all() and (result["boxes"][:, 2] <= width).all()
        assert (result["boxes"][:, 3] <= height).all()
        assert ("masks" in result) == (head == "mask_rcnn")
        if head == "mask_rcnn":
            assert result["masks"].shape == (n, height, width) and result["masks"].dtype == torch.bool


LEARNING = {
    "retinanet": (16, dict(norm_groups=4)),
    # Few proposals, because its heads are wide.
    "mask_rcnn": (6, dict(options=dict(box_batch_size_per_image=16, rpn_post_nms_top_n_train=50))),
}


@pytest.mark.parametrize("head", sorted(LEARNING))
def test_learns_a_batch(head) -> None:
    steps, options = LEARNING[head]
    net = detector(head, **options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        # The same proposals are sampled in each step.
        torch.manual_seed(0)
        loss = net.loss(IMAGES, TARGETS)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        ("biformer_nano", [8, 16, 32]),
        ("halo_nano", [8, 16, 32]),
        ("favit_nano", [8, 16]),
        ("convnext_atto", [8, 16, 32]),
    ],
)
def test_backbones(backbone, strides) -> None:
    net = detector(backbone=backbone, extra_levels=False).eval()
    assert net.net.backbone.strides == strides
    with torch.no_grad():
        maps = net.net.backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps.values()] == [(1, 16, 64 // s, 96 // s) for s in strides]


def test_channels_last_backbone_and_levels() -> None:
    """Swin gives maps of [B, H, W, C]; Mask R-CNN starts at stride 4 and adds a pooled level."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=64, pretrained=False)
    net = create_image_detector(swin, "mask_rcnn", 3, **SMALL)
    assert net.net.backbone.reader.nhwc and net.net.backbone.strides == [4, 8, 16, 32, 64]
    with torch.no_grad():
        maps = net.net.backbone(torch.rand(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps.values()] == [16, 8, 4, 2, 1]
    assert detector().net.backbone.strides == [8, 16, 32, 64, 128]


def test_anchors_keep_their_precision_in_autocast() -> None:
    """A map of bfloat16 would round coordinates to a few pixels."""
    net = detector().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = list(net.net.backbone(torch.rand(1, 3, 64, 512)).values())
        anchors = net.net.anchors(torch.rand(1, 3, 64, 512), maps)
    centres = (anchors[:, 0] + anchors[:, 2])[: 8 * 64 * 9 : 9] / 2
    assert torch.equal(centres.view(8, 64)[0], torch.arange(64) * 8.0)


def test_state_dict_is_a_contract() -> None:
    net = create_image_detector("biformer_nano", "retinanet", 3)
    prefixes = {".".join(key.split(".")[:3]) for key in net.state_dict()}
    assert {"net.backbone.backbone", "net.backbone.fpn", "net.head.classification_head"} <= prefixes
    assert sum(p.numel() for p in net.net.head.parameters()) == 8 * (256 * 256 * 9 + 256) + 63 * (256 * 9 + 1)


def test_messages() -> None:
    net = detector()
    with pytest.raises(ValueError, match="head must be 'retinanet' or 'mask_rcnn', got 'fcos'"):
        detector("fcos")
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        detector(classes=0)
    with pytest.raises(ValueError, match="norm_groups is for RetinaNet"):
        detector("mask_rcnn", norm_groups=8)
    with pytest.raises(ValueError, match="Unknown model"):
        detector(backbone="resnet10tt")
    with pytest.raises(ValueError, match="gives no feature maps"):
        create_image_detector(torch.nn.Identity())
    with pytest.raises(ValueError, match="need the name of a backbone"):
        create_image_detector(timm.create_model("resnet10t", features_only=True), pretrained_backbone=True)
    with pytest.raises(ValueError, match="call eval"):
        net(IMAGES)
    with pytest.raises(ValueError, match="call train"):
        detector().eval().loss(IMAGES, TARGETS)
    with pytest.raises(ValueError, match=r"image 0 must be floating-point \[3, H, W\] .* got torch.uint8"):
        net.loss([torch.zeros(3, 8, 8, dtype=torch.uint8)], TARGETS[:1])
    with pytest.raises(ValueError, match="got 3 images and 2 targets"):
        net.loss(IMAGES, TARGETS[:2])
    with pytest.raises(ValueError, match="target 0 has labels 0 to 2, but num_classes is 2"):
        detector(classes=2).loss(IMAGES, TARGETS)
    with pytest.raises(ValueError, match="target 0 has no masks"):
        detector("mask_rcnn").loss(IMAGES[:1], [{k: v for k, v in TARGETS[0].items() if k != "masks"}])
    with pytest.raises(ValueError, match=r"target 0 has boxes of shape \(1, 4\) for 2 labels"):
        net.loss(IMAGES[:1], [dict(boxes=torch.ones(1, 4), labels=torch.zeros(2).long())])
