"""`tile_sparse_attention` with queries and keys in FP8: its error, its limits, its kernel on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.kernels import tile_sparse_attention
from zoo.kernels.tile_sparse import Diagonal, Full, Layout, MultiDiagonal, Skip, VerticalStripe, pattern_table

FP8 = torch.float8_e4m3fn
PATTERNS = (Full(), Diagonal(0.5), MultiDiagonal(0.7), VerticalStripe(frames=(0, -1)), Skip())


def make(layout: Layout, D: int, dtype: torch.dtype, device: str, offset: float = 0.0) -> tuple[list[Tensor], dict]:
    """Queries and keys in the memory of [B, S, M, D], the keys with an offset in each channel."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v = (randn(2, layout.tokens, len(PATTERNS), D).transpose(1, 2) for _ in range(3))
    k = k + offset * randn(D)
    args = dict(pattern_ids=torch.arange(len(PATTERNS), device=device), patterns=PATTERNS, layout=layout)
    if layout.text:
        args["text_length"] = torch.tensor([layout.text, layout.text // 2], device=device)
    return [x.to(dtype) for x in (q, k, v)], args


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("layout", [Layout((3, 8, 10), 30, "last"), Layout((5, 7, 9), tile=(64, 32))], ids=str)
def test_error_of_normal_queries_and_keys(layout: Layout, offset: float) -> None:
    """Three bits of mantissa cost 4 % of the output's norm, and an offset that all keys share nothing more."""
    inputs, args = make(layout, 64, torch.bfloat16, "cpu", offset)
    exact = tile_sparse_attention(*(x.double() for x in inputs), **args)
    out = tile_sparse_attention(*inputs, **args, qk_dtype=FP8)
    assert out.dtype == torch.bfloat16 and out.stride() == inputs[0].stride()
    assert 0.01 < distance(out, exact) < 0.045
    assert (out[:, -1] == 0).all()


def test_rounded_numbers_are_exact() -> None:
    """Nothing is lost of numbers that FP8 holds: integers up to 7 under the scale of a power of two."""
    layout = Layout((2, 3, 3), 4, "first", (8, 4))
    q, k, v = (torch.randint(-6, 7, (1, len(PATTERNS), layout.tokens, 16)).double() for _ in range(3))
    q[..., 0] = k[..., 0] = 7
    # The mean of the video's keys is zero.
    k[:, :, 4:] -= k[:, :, 4:].flip(2)
    k[:, :, 4:, 0] = torch.tensor([7, -7]).repeat(9)
    k[:, :, 4:, 1:] = (k[:, :, 4:, 1:] / 2).trunc()
    args = (torch.arange(len(PATTERNS)), PATTERNS, layout)
    settings = dict(scale=0.02, qk_dtype=FP8)
    out = tile_sparse_attention(q.float(), k.float(), v.float(), *args, **settings)
    torch.testing.assert_close(out, tile_sparse_attention(q, k, v, *args, scale=0.02).float())


def test_padded_text_changes_nothing() -> None:
    inputs, args = make(Layout((3, 4, 5), 20, "last", (32, 16)), 32, torch.float32, "cpu")
    padded = [x.clone() for x in inputs]
    for x in padded[1:]:
        x[1, :, -10:] = float("nan")
    settings = dict(args, qk_dtype=FP8)
    torch.testing.assert_close(tile_sparse_attention(*padded, **settings), tile_sparse_attention(*inputs, **settings))


def test_training_and_other_dtypes_are_refused() -> None:
    inputs, args = make(Layout((2, 3, 3)), 32, torch.float32, "cpu")
    with pytest.raises(ValueError, match="qk_dtype must be None or torch.float8_e4m3fn, got torch.float8_e5m2"):
        tile_sparse_attention(*inputs, **args, qk_dtype=torch.float8_e5m2)
    leaf = inputs[2].clone().requires_grad_()
    with pytest.raises(ValueError, match="has no gradients: leave it out for training"):
        tile_sparse_attention(*inputs[:2], leaf, **args, qk_dtype=FP8)
    with torch.no_grad():
        tile_sparse_attention(*inputs[:2], leaf, **args, qk_dtype=FP8)


class _OnGpu(Tensor):
    """A tensor that claims to lie on a GPU."""

    device = torch.device("cuda")


def test_a_gpu_without_fp8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels.tile_sparse.op import _check_fp8

    x = torch.zeros(1).as_subclass(_OnGpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for backend in ("auto", "triton"):
        with pytest.raises(NotImplementedError, match="compute capability 8.9 or more, got 8.0: leave it out"):
            _check_fp8(FP8, backend, x)
    _check_fp8(FP8, "reference", x)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    _check_fp8(FP8, "triton", x)


def test_compiles_into_one_graph() -> None:
    inputs, args = make(Layout((2, 3, 3), 4, "last", (16, 16)), 32, torch.float32, "cpu")
    args["patterns"] = pattern_table(PATTERNS, args["layout"])
    function = torch.compile(
        lambda *x: tile_sparse_attention(*x, **args, qk_dtype=FP8), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(function(*inputs), tile_sparse_attention(*inputs, **args, qk_dtype=FP8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [24, 64, 128])
@pytest.mark.parametrize(
    "layout",
    [
        Layout((11, 13, 17), 226, "last"),
        Layout((5, 7, 11), 45, "first", (64, 32)),
        Layout((4, 8, 16), tile=(128, 128)),
        Layout((3, 9, 10), 30, "first", (64, 32), "element"),
    ],
    ids=str,
)
def test_kernel_rounds_as_the_reference(layout: Layout, D: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    inputs, args = make(layout, D, dtype, "cuda", 10.0)
    exact = tile_sparse_attention(*(x.double() for x in inputs), **args, backend="reference")
    expected = tile_sparse_attention(*inputs, **args, qk_dtype=FP8, backend="reference")
    out = tile_sparse_attention(*inputs, **args, qk_dtype=FP8, backend="triton")
    assert out.isfinite().all() and out.stride() == expected.stride()
    # Numbers halfway between two of FP8 may go either way, as sums of the mean differ in their last bit.
    assert distance(out, expected) < 0.01
    assert distance(out, exact) < 1.1 * distance(expected, exact)
