"""Heads of semantic segmentation on backbones of this package and of timm."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.heads.segmentation import FeaturePyramid, SemanticFPNHead, create_segmenter
from zoo.hub import HubError

SMALL = {"semantic_fpn": dict(pyramid_channels=16, channels=8), "upernet": dict(channels=16)}
HEADS = sorted(SMALL)


def small(backbone: str = "biformer_nano", head: str = "semantic_fpn", num_classes: int = 5, **kwargs):
    torch.manual_seed(0)
    return create_segmenter(backbone, head, num_classes, head_kwargs=SMALL[head], **kwargs)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("biformer_nano", dict(extra_norms=True)),
        ("agent_nano", {}),
        ("favit_nano", {}),
        ("halo_nano", {}),
        ("agent_deit_tiny", dict(depth=3)),
        ("resnet10t", {}),
        ("pvt_v2_b0", {}),
    ],
)
def test_logits_at_the_size_of_the_image(backbone, kwargs, head) -> None:
    net = small(backbone, head, backbone_kwargs=kwargs).eval()
    with torch.no_grad():
        logits = net(torch.randn(1, 3, 75, 101))
    assert logits.shape == (1, 5, 75, 101) and logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_features_with_channels_last(head) -> None:
    """timm's Swin gives maps [B, H, W, C]; its other extractor gives the same ones as [B, C, H, W]."""
    options = dict(img_size=(64, 96), embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=4)
    net, other = (
        small("swin_tiny_patch4_window7_224", head, backbone_kwargs=options | extra).eval()
        for extra in ({}, dict(feature_cls="getter"))
    )
    assert net.reader.nhwc and not other.reader.nhwc
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = net(x)
        assert logits.shape == (2, 5, 64, 96)
        torch.testing.assert_close(other(x), logits)


def test_finest_map_has_stride_4() -> None:
    net = small("resnet10t")
    assert net.backbone.feature_info.reduction() == [2, 4, 8, 16, 32] and net.reader.levels == [1, 2, 3, 4]
    assert [x.shape[1] for x in net.forward_features(torch.randn(1, 3, 64, 64))] == [64, 128, 256, 512]


def test_published_widths() -> None:
    """BiFormer-S on ADE20K: 256 and 128 channels, up to three convolutions a level; 512 and 256 for UPerNet."""
    with torch.device("meta"):
        fpn = create_segmenter("biformer_small").head
        net = create_segmenter("biformer_small", "upernet")
    assert [conv.out_channels for conv in fpn.pyramid.outputs] == [256] * 4
    assert [len(scale) for scale in fpn.scales] == [1, 1, 2, 3]
    assert fpn.classifier[1].weight.shape == (150, 128, 1, 1) and fpn.classifier[0].p == 0.1
    assert net.head.pooling.fuse[0].weight.shape == (512, 512 + 4 * 512, 3, 3)
    assert net.head.fuse[0].weight.shape == (512, 4 * 512, 3, 3)
    # On the third stage.
    assert net.auxiliary.conv[0].weight.shape == (256, 256, 3, 3)


@pytest.mark.parametrize(
    ("size", "params", "gmacs"), [("tiny", 61, 954), ("small", 81, 1043), ("base", 121, 1196)], ids=lambda x: str(x)
)
def test_published_cost(size, params, gmacs) -> None:
    """UPerNet on Agent-Swin at 512 x 2048, parameters and operations as published (method: arXiv:2312.08874)."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = create_segmenter(f"agent_swin_{size}", "upernet", backbone_kwargs=dict(extra_norms=True)).eval()
        net.forward_training(torch.empty(1, 3, 512, 2048))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params, abs=0.7)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_pyramid_adds_from_the_top() -> None:
    pyramid = FeaturePyramid([1, 1], 1)
    for conv in (*pyramid.laterals, *pyramid.outputs):
        nn.init.dirac_(conv.weight)
    fine, coarse = torch.rand(1, 1, 3, 5), torch.rand(1, 1, 2, 3)
    found = pyramid([fine, coarse])
    rows, cols = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1, 1, 2])
    torch.testing.assert_close(found[0], fine + coarse[..., rows, :][..., cols])
    torch.testing.assert_close(found[1], coarse)


def test_levels_are_summed() -> None:
    """Constant maps stay constant up to the border's zero padding, so that the sum can be told."""
    head = SemanticFPNHead([1, 1, 1], [4, 8, 16], 1, pyramid_channels=1, channels=1).eval()
    for name, parameter in head.named_parameters():
        if parameter.ndim == 4:
            nn.init.dirac_(parameter)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    maps = [torch.full((1, 1, side, side), value) for side, value in ((8, 1.0), (4, 10.0), (2, 100.0))]
    found = head(maps)
    # The pyramid: 111, 110 and 100.
    torch.testing.assert_close(found, torch.full((1, 1, 8, 8), 321.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_everything(head) -> None:
    net = small(head=head, auxiliary=True, backbone_kwargs=dict(extra_norms=True))
    x = torch.randn(2, 3, 65, 70, requires_grad=True)
    logits, auxiliary = net.forward_training(x)
    assert logits.shape == auxiliary.shape == (2, 5, 65, 70)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert x.grad.abs().sum() > 0
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("head", HEADS)
def test_overfits_one_batch(head) -> None:
    net = small(head=head, num_classes=3, dropout=0.0)
    x, target = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    target[0, :32], target[1, :, 32:] = 1, 2
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 and losses[-1] < 0.2, losses


def test_names_of_the_weights() -> None:
    """Checkpoints name them, so that they must not change."""
    nets = {head: small("resnet10t", head) for head in HEADS}
    names = {
        head: {name.rsplit(".", 1)[0] for name, _ in net.named_parameters() if not name.startswith("backbone.")}
        for head, net in nets.items()
    }
    blocks = ("0.0", "1.0", "2.0", "2.1", "3.0", "3.1", "3.2")
    assert names["semantic_fpn"] == (
        {f"head.pyramid.{part}.{i}" for part in ("laterals", "outputs") for i in range(4)}
        | {f"head.scales.{block}.{i}" for block in blocks for i in (0, 1)}
        | {"head.classifier.1"}
    )
    assert names["upernet"] == (
        {f"head.{part}.{k}.{i}" for part in ("laterals", "outputs") for k in range(3) for i in (0, 1)}
        | {f"head.pooling.pools.{k}.{i}" for k in range(4) for i in (0, 1)}
        | {f"head.{part}.{i}" for part in ("pooling.fuse", "fuse") for i in (0, 1)}
        | {"auxiliary.conv.0", "auxiliary.conv.1", "auxiliary.classifier.1", "head.classifier.1"}
    )


def test_pretrained_backbone() -> None:
    full = timm.create_model("biformer_nano.zoo_clothing10", pretrained=True)
    net = create_segmenter(
        "biformer_nano.zoo_clothing10", num_classes=4, pretrained_backbone=True, backbone_kwargs=dict(extra_norms=True)
    ).eval()
    expected = full.eval().forward_intermediates(torch.ones(1, 3, 64, 64), intermediates_only=True)
    for norm, found, one in zip(
        net.backbone.model.extra_norms, net.forward_features(torch.ones(1, 3, 64, 64)), expected, strict=True
    ):
        torch.testing.assert_close(found, norm(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(HubError, match="No pretrained weights"):
        create_segmenter("biformer_base", pretrained_backbone=True)


def test_takes_a_model() -> None:
    backbone = timm.create_model("resnet10t", features_only=True, out_indices=(1, 3))
    net = create_segmenter(backbone, num_classes=2, head_kwargs=SMALL["semantic_fpn"]).eval()
    assert net.backbone is backbone and net(torch.randn(1, 3, 40, 40)).shape == (1, 2, 40, 40)
    with pytest.raises(ValueError, match="need the name of a backbone"):
        create_segmenter(backbone, pretrained_backbone=True)


def test_synchronised_norms_keep_their_activation() -> None:
    net = small("resnet10t")
    activations = sum(isinstance(m, nn.ReLU) for m in net.head.modules())
    head = nn.SyncBatchNorm.convert_sync_batchnorm(net.head)
    assert sum(isinstance(m, nn.ReLU) for m in head.modules()) == activations == 7
    assert not any(isinstance(m, nn.BatchNorm2d) for m in head.modules())


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match='head must be "semantic_fpn" or "upernet", got \'fpn\''):
        create_segmenter("resnet10t", "fpn")
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        create_segmenter("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="Unknown model 'biformer_nan'"):
        create_segmenter("biformer_nan")
    with pytest.raises(ValueError, match="ResNet gives no feature maps: create it with features_only=True"):
        create_segmenter(timm.create_model("resnet10t"))
    net = small("resnet10t", "upernet")
    with pytest.raises(ValueError, match=r"floating-point \[B, C, H, W\], got torch.float32 of shape \(3, 32, 32\)"):
        net(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="got torch.uint8"):
        net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="needs more than one image in training"):
        net(torch.zeros(1, 3, 64, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head", HEADS)
def test_gpu(head) -> None:
    """The kernels of a backbone under a head: logits as on the CPU, finite gradients under bf16 autocast."""
    # Without routing, whose choices may turn on a rounding error.
    net, x = small("halo_nano", head, auxiliary=True).eval(), torch.randn(2, 3, 129, 150)
    with torch.no_grad():
        expected = net(x)
        net, x = net.cuda(), x.cuda()
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            torch.testing.assert_close(net(x).cpu(), expected, rtol=1e-3, atol=1e-4)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
    net.train()
    with torch.autocast("cuda", torch.bfloat16):
        logits, auxiliary = net.forward_training(x)
    (logits.float().square().mean() + auxiliary.float().square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
