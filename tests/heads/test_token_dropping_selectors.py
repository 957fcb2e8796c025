"""Which tokens HiRED, spatial and random selection keep, and in which order."""

from __future__ import annotations

import pytest
import torch

from zoo.heads.token_dropping import NEWLINE, create_method
from zoo.heads.token_dropping.base import Vision, check_budget
from zoo.heads.token_dropping.hired import Rule, _plan, regions, resized
from zoo.heads.token_dropping.packing import ImageGrid, Packer, shrink
from zoo.heads.token_dropping.towers import received_attention

CPU = torch.device("cpu")
IMAGES = [
    ImageGrid((2, 2), (600, 450), 6, 84),
    ImageGrid((1, 3), (80, 300), 6, 84),
    ImageGrid((0, 0), (84, 84), 6, 84),
    ImageGrid((3, 1), (400, 84), 6, 84),
]


def vision_of(images: list[ImageGrid], layers: tuple[int, ...] = (0, 2)) -> Vision:
    torch.manual_seed(0)
    P, N = sum(image.partitions for image in images), images[0].patches
    features = torch.arange(P * (N + 1), dtype=torch.float32).view(P, N + 1, 1)
    return Vision(features, 1, 2, images, {layer: torch.rand(P, N) for layer in layers})


def hired(budget, **options):
    method = create_method("hired", budget, **options)
    method._layers = (0, 2)
    return method


def kept_per_image(kept) -> list[list[int]]:
    return [x.tolist() for x in kept.source.split(kept.lengths)]


@pytest.mark.parametrize("allocation", ["official", "paper", "paper_exact", "uniform"])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.77, 1.0, 13, 10**6])
@pytest.mark.parametrize("newline", ["drop", "all"])
def test_exact_counts(allocation: str, budget: float, newline: str) -> None:
    """Known before an image is seen, and never missed."""
    method, packer, vision = (
        hired(budget, allocation=allocation, exact=True),
        Packer(newline=newline),
        vision_of(IMAGES),
    )
    lengths = method.lengths(IMAGES, packer)
    kept = method.reduce(vision, packer)
    mask = method.select(vision, packer)
    assert kept.lengths == lengths and len(kept.source) == sum(lengths)
    for image, part, length, more in zip(
        IMAGES, vision.split(mask), lengths, packer.newline_counts(IMAGES), strict=True
    ):
        available = image.patches + image.mosaic().numel()
        expected = int(available * budget) if isinstance(budget, float) else min(budget, available)
        assert part.sum() == expected and length == expected + more
        # Patches of padding are never chosen.
        assert set(part.flatten().nonzero().flatten().tolist()) <= set(range(image.patches)) | set(
            image.mosaic().flatten().tolist()
        )


@pytest.mark.parametrize("allocation", ["official", "paper", "paper_exact", "uniform"])
def test_the_budget_is_a_bound(allocation: str) -> None:
    method, vision = hired(0.3, allocation=allocation), vision_of(IMAGES)
    for image, part in zip(IMAGES, vision.split(method.select(vision, Packer())), strict=True):
        total = int(image.partitions * image.patches * 0.3)
        assert total - image.partitions <= part.sum() <= total


def test_images_do_not_depend_on_their_neighbours() -> None:
    vision = vision_of(IMAGES)
    for options in ({}, {"exact": True}):
        method = hired(0.3, allocation="paper", **options)
        together = kept_per_image(method.reduce(vision, Packer()))
        first = 0
        for i, image in enumerate(IMAGES):
            part = slice(first, first + image.partitions)
            scores = {layer: x[part] for layer, x in vision.scores.items()}
            alone = Vision(vision.features[part], 1, 2, [image], scores)
            assert method.reduce(alone, Packer()).source.tolist() == together[i]
            first += image.partitions


def test_features_follow_their_source() -> None:
    vision = vision_of(IMAGES)
    kept = hired(0.3).reduce(vision, Packer())
    first = 0
    for image, source, features in zip(
        IMAGES, kept.source.split(kept.lengths), kept.features.split(kept.lengths), strict=True
    ):
        N = image.patches
        assert torch.equal(features[:, 0].long(), (source // N + first) * (N + 1) + 1 + source % N)
        first += image.partitions


def test_order_of_a_mosaic() -> None:
    """Rows run through neighbouring sub-images; the image covers the middle columns."""
    image = ImageGrid((2, 2), (4, 2), 2, 4)
    assert image.mosaic(crop=False).tolist() == [[4, 5, 8, 9], [6, 7, 10, 11], [12, 13, 16, 17], [14, 15, 18, 19]]
    assert image.mosaic().tolist() == [[5, 8], [7, 10], [13, 16], [15, 18]]
    order = Packer(newline="all").layout([image], CPU).source.tolist()
    assert order == [0, 1, 2, 3, 5, 8, NEWLINE, 7, 10, NEWLINE, 13, 16, NEWLINE, 15, 18, NEWLINE]


def test_the_legacy_grid_swaps_rows_and_columns() -> None:
    image = ImageGrid((1, 2), (2, 4), 2, 2)
    assert image.mosaic().shape == (2, 4) and image.mosaic(legacy=True, crop=False).shape == (4, 2)


def test_newlines_of_rows_that_keep_a_token() -> None:
    image = ImageGrid((1, 2), (2, 4), 2, 2)
    vision, mask = vision_of([image]), torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    for newline, expected in (
        ("drop", [1, 11]),
        ("all", [1, NEWLINE, 11, NEWLINE]),
        ("nonempty_rows", [1, 11, NEWLINE]),
    ):
        assert Packer(newline=newline).pack(vision, mask).source.tolist() == expected
    alone, single = vision_of([ImageGrid((0, 0), (2, 2), 2, 2)]), torch.zeros(1, 4, dtype=torch.bool)
    assert Packer(newline="all").pack(alone, single).source.tolist() == [NEWLINE]
    assert Packer(newline="nonempty_rows").pack(alone, single).lengths == [0]


def test_regions() -> None:
    """Strips as published, blocks as in the paper, and the blocks of a padded canvas."""
    image = ImageGrid((2, 2), (8, 4), 4, 4)
    assert regions(image, "official").view(4, 4)[:, 0].tolist() == [1, 2, 3, 4]
    assert regions(image, "paper").view(4, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    # 8 x 4 pixels stand in the middle of 8 x 8.
    assert resized(image) == (8, 4)
    assert torch.equal(regions(image, "paper_exact"), regions(image, "paper"))
    # 3 x 1 sub-images of 4 pixels under a square image: it covers the middle one only.
    square = ImageGrid((3, 1), (4, 4), 4, 4)
    assert regions(square, "paper_exact").tolist() == [2] * 16
    assert regions(square, "paper").view(4, 4)[:, 0].tolist() == [1, 1, 2, 3]


def test_resized_rounds_up_within_the_canvas() -> None:
    assert resized(ImageGrid((1, 3), (333, 1000), 24, 336)) == (336, 1008)
    assert resized(ImageGrid((2, 2), (427, 640), 24, 336)) == (449, 672)


def test_a_mosaic_that_is_too_large_is_resampled() -> None:
    image = ImageGrid((6, 6), (2304, 2304), 27, 384)
    small = shrink(image, 9)
    assert small.shrunk == (81, 81) and small.mosaic().shape == (81, 81)
    flat = small.mosaic().flatten()
    assert flat.unique().numel() == flat.numel() and flat.min() >= 729 and flat.max() < 37 * 729
    assert shrink(ImageGrid((3, 3), (1152, 1152), 27, 384), 9).shrunk is None


@pytest.mark.parametrize("method", ["spatial", "random"])
@pytest.mark.parametrize("budget", [0.1, 0.5, 7, 10**6])
def test_blind_selectors(method: str, budget: float) -> None:
    dropper, packer, vision = create_method(method, budget), Packer(), vision_of(IMAGES)
    kept = dropper.reduce(vision, packer)
    assert kept.lengths == dropper.lengths(IMAGES, packer)
    assert torch.equal(kept.source, dropper.reduce(vision, packer).source)
    for image, source in zip(IMAGES, kept_per_image(kept), strict=True):
        available = image.patches + image.mosaic().numel()
        assert len(source) == (int(available * budget) if isinstance(budget, float) else min(budget, available))
        assert len(set(source)) == len(source)


def test_spatial_distances_are_even() -> None:
    image = ImageGrid((0, 0), (84, 84), 6, 84)
    source = create_method("spatial", 0.25).reduce(vision_of([image]), Packer()).source
    assert source.diff().unique().tolist() == [4]


def test_random_seeds() -> None:
    vision = vision_of(IMAGES)
    draws = [create_method("random", 0.5, seed=seed).select(vision, Packer()) for seed in (0, 1, None, None)]
    assert not any(torch.equal(draws[0], draw) for draw in draws[1:]) and not torch.equal(draws[2], draws[3])


def test_spatial_budget_adds_a_grid() -> None:
    vision = vision_of(IMAGES)
    plain, more = (hired(0.2, spatial_budget=s).select(vision, Packer()) for s in (0.0, 0.1))
    grid = torch.zeros(36, dtype=torch.bool)
    grid[0:35:12] = True
    assert torch.equal(more, plain | grid)


def test_alpha_shares_the_budget() -> None:
    for alpha, base in ((0.0, 0), (0.25, 13), (1.0, 36)):
        plan = _plan((IMAGES[0],), (0.3,), Rule("official", alpha, False), False, CPU)
        assert plan.base.tolist() == [base] and plan.rest.tolist() == [54 - base]


def test_budgets_are_cut_not_rounded() -> None:
    """int(20 * (1 - 0.8)) is 3: binary fractions, as published."""
    image = ImageGrid((0, 0), (84, 84), 6, 84)
    plan = _plan((image,), (0.7,), Rule("official", 0.5, False), False, CPU)
    assert plan.base.tolist() == [25]
    assert check_budget([0.5, 3], None) == [0.5, 3]


def test_received_attention() -> None:
    """Attention maps, averaged over queries and summed over heads; chunks of partitions change nothing."""
    q, k = torch.randn(2, 3, 10, 8)
    maps = torch.einsum("pqmd,pkmd->pmqk", q.unflatten(-1, (2, 4)), k.unflatten(-1, (2, 4))).mul(0.5).softmax(-1)
    torch.testing.assert_close(received_attention(q, k, 2), maps.mean(2).sum(1))
    torch.testing.assert_close(received_attention(q, k, 2).sum(-1), torch.full((3,), 2.0))
