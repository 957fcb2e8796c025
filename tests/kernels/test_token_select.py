"""The ops `cls_attention` and `token_select`: reference, kernels on a GPU, and torch's transformations."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels import cls_attention, token_select
from zoo.kernels.token_select import reference
from zoo.kernels.token_select.op import can_run_cls, can_run_select

from .oracle import DTYPES
from .selection_plans import PLANS, plan_of, scores_of

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def rows(B: int, T: int, C: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Queries and keys as a tower has them: strided views."""
    generator = torch.Generator(device).manual_seed(1)
    packed = torch.randn(B, T, 2 * C, generator=generator, device=device).to(dtype)
    return [packed[:, 0, :C], packed[..., C:]]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "heads", "D"), [(5, 577, 16, 64), (2, 1, 2, 16), (1, 1500, 3, 80), (3, 4096, 1, 20)]
)
def test_cls_kernel_is_as_exact_as_torch(B: int, T: int, heads: int, D: int, dtype: torch.dtype) -> None:
    q, k = (x.requires_grad_() for x in rows(B, T, heads * D, dtype, "cuda"))
    out = cls_attention(q, k, heads, backend="triton")
    exact = reference.cls_attention(q.double(), k.double(), heads, D**-0.5)
    assert out.dtype == torch.float32 and (out - exact).abs().max() <= 1e-5 * exact.abs().max()
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k), grad)
    expected = torch.autograd.grad(exact, (q, k), grad.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@gpu
@pytest.mark.parametrize("name", PLANS)
def test_select_kernel_equals_the_reference(name: str) -> None:
    plan = PLANS[name]._replace(
        **{k: v.cuda() for k, v in PLANS[name]._asdict().items() if isinstance(v, torch.Tensor)}
    )
    for first, scores in scores_of(plan, "cuda"):
        mask, budgets = token_select(first, scores, plan, backend="triton")
        expected = reference.token_select(first, scores, plan)
        assert torch.equal(budgets, expected[1]) and torch.equal(mask, expected[0])


@gpu
def test_a_selection_reads_nothing_back() -> None:
    plan = plan_of([(2, 2)] * 8, 576, base=288, rest=288, device="cuda")
    first = torch.rand(40, 576, device="cuda")
    token_select(first, first, plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_select(first, first, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reference_gradients() -> None:
    q, k = (x.double().requires_grad_() for x in rows(2, 5, 8, torch.float64, "cpu"))
    row = lambda q, k: reference.cls_attention(q, k, 2, 0.4)  # noqa: E731
    assert torch.autograd.gradcheck(row, (q, k))
    grad = torch.randn(2, 2, 5, dtype=torch.float64)
    expected = torch.autograd.grad(row(q, k), (q, k), grad)
    actual = reference.cls_attention_backward(grad, row(q, k), q, k, 2, 0.4)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", PLANS)
def test_counts_and_order(name: str) -> None:
    """Masks hold as many tokens as budgets say, none outside the candidates, and no better token is left out."""
    plan = PLANS[name]
    for first, scores in scores_of(plan):
        mask, budgets = token_select(first, scores, plan)
        assert torch.equal(mask.sum(1), budgets.long())
        candidates = torch.ones_like(mask) if plan.candidates is None else plan.candidates
        assert not (mask & ~candidates).any()
        kept = scores.masked_fill(~mask, torch.inf).min(-1).values
        left = scores.masked_fill(mask | ~candidates, -torch.inf).max(-1).values
        assert (kept >= left).all()


@pytest.mark.parametrize("name", [name for name in PLANS if name.startswith("exact") or name == "many"])
def test_exact_budgets_sum_up(name: str) -> None:
    plan = PLANS[name]
    for first, scores in scores_of(plan):
        _, budgets = token_select(first, scores, plan)
        totals = torch.zeros(len(plan.rest), dtype=torch.int32).index_add_(0, plan.image, budgets)
        assert torch.equal(totals, plan.base + plan.rest)


def test_full_sub_images_pass_on_what_they_cannot_take() -> None:
    """All content lies on the first sub-image: it fills up, and the others share the rest alike."""
    plan = plan_of([(1, 3)], 36, base=4, rest=50, hits=0, exact=True)
    first = torch.zeros(4, 36)
    first[0, 0] = 1.0
    assert token_select(first, first, plan)[1].tolist() == [4, 36, 7, 7]
    assert token_select(first, first, plan._replace(exact=False))[1].tolist() == [4, 36, 0, 0]


def test_of_equal_scores_the_earlier_is_kept() -> None:
    plan = plan_of([(0, 0)], 20, base=3)
    scores = torch.tensor([[0.0, 1, 1, 1, 1] * 4])
    assert token_select(scores, scores, plan)[0][0].nonzero().flatten().tolist() == [1, 2, 3]


def test_shares_are_cut_in_float32() -> None:
    """42, 82 and 164 of 288 patches and 432 tokens: 63, 123 and 246 exactly, 62, 122 and 245 as published."""
    plan = plan_of([(1, 3)], 576, base=0, rest=432, hits=288)
    first = torch.zeros(4, 576)
    for start, count in ((0, 42), (192, 82), (384, 164)):
        first[0, start : start + count] = 1.0
    assert token_select(first, first, plan)[1].tolist() == [0, 62, 122, 245]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    q, k = (x.clone().requires_grad_() for x in rows(2, 9, 32, torch.float32, device))
    torch.library.opcheck(torch.ops.zoo.cls_attention, (q, k, 2, 0.3))
    plan = plan_of([(1, 2)], 16, device=device)
    scores = torch.rand(3, 16, device=device)
    torch.library.opcheck(torch.ops.zoo.token_select, (scores, scores, *plan))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_export(device: str) -> None:
    class Both(torch.nn.Module):
        def forward(self, q, k):
            scores = cls_attention(q, k, 2).sum(1)
            return token_select(scores, scores, plan)[0]

    plan = plan_of([(1, 2)], 16, device=device)
    q, k = rows(3, 16, 32, torch.float32, device)
    expected = Both()(q, k)
    assert torch.equal(torch.compile(Both(), fullgraph=True, backend="aot_eager")(q, k), expected)
    assert torch.equal(torch.export.export(Both(), (q, k)).module()(q, k), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_does_not_touch_the_scores(device: str) -> None:
    q, k = rows(2, 40, 32, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        row = cls_attention(q, k, 2)
    assert torch.equal(row, cls_attention(q, k, 2))


def test_empty_batch() -> None:
    assert cls_attention(torch.zeros(0, 8), torch.zeros(0, 5, 8), 2).shape == (0, 2, 5)


def test_wrong_arguments() -> None:
    q, k = rows(2, 5, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"q must be \[B, C\]"):
        cls_attention(q[:1], k, 2)
    with pytest.raises(ValueError, match="heads must divide"):
        cls_attention(q, k, 3)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        cls_attention(q.half(), k, 2)
    plan, scores = plan_of([(1, 2)], 16), torch.rand(3, 16)
    with pytest.raises(ValueError, match="first and scores"):
        token_select(scores[:2], scores, plan)
    with pytest.raises(ValueError, match=r"plan.region must be \[1, 16\]"):
        token_select(scores, scores, plan._replace(region=plan.region[:, :4]))


def test_refusals_explain_themselves() -> None:
    q, k = rows(1, 5000, 8, torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors"):
        cls_attention(q, k, 2, backend="triton")
    assert not can_run_cls(k, 2)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        can_run_select(torch.rand(3, 16), plan_of([(1, 2)], 16), raise_error=True)
