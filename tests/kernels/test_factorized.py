"""The ops of factorized self-attention: their references, their kernels on a GPU, and torch's transformations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import cross_window_pool, factorized_attention
from zoo.kernels.factorized import reference
from zoo.kernels.factorized.op import MAX_HELD_KEYS, can_pool, can_run

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
NAMES = ["q", "k_global", "v_global", "k_local", "v_local", "k_dilated", "v_dilated"]

# (B, N, global keys, global channels, local keys, heads, head dim, groups): the stages of B1 at 224 pixels, of B0
# and B3, odd token counts, batch 1, and more global keys than a program holds.
PROBLEMS = {
    "stage1": (2, 56 * 56, 49, 8, 49, 1, 28, 2),
    "stage2": (2, 28 * 28, 49, 16, 49, 2, 28, 2),
    "stage3": (2, 14 * 14, 49, 32, 49, 4, 28, 2),
    "stage4": (2, 7 * 7, 49, 64, 49, 8, 56, 1),
    "narrow": (1, 29 * 27, 42, 4, 49, 1, 14, 2),
    "wide": (1, 25 * 50, 25, 96, 49, 2, 84, 1),
    "one_token": (3, 1, 1, 8, 49, 1, 28, 2),
    "all_keys_held": (1, 300, 128, 8, 121, 2, 12, 2),
    "walked": (1, 97 * 33, 129, 12, 49, 1, 42, 2),
    "walked_far": (1, 128 * 96, 1000, 8, 49, 1, 28, 2),
}
# (B, H, W, heads, head dim, window, dilations, fusion)
POOLS = {
    "stage1": (2, 56, 56, 1, 28, 7, (1, 8), "official"),
    "stage2": (2, 28, 28, 2, 28, 7, (1, 4), "official"),
    "stage3": (2, 14, 14, 4, 28, 7, (1, 2), "official"),
    "stage4": (2, 7, 7, 8, 56, 7, (1,), "official"),
    "odd": (1, 29, 27, 2, 14, 7, (1, 4), "official"),
    "odd_mean": (1, 25, 50, 1, 14, 7, (1, 8), "window_mean"),
    "smaller_than_a_window": (1, 5, 3, 2, 14, 7, (1, 8), "official"),
    "one_row": (2, 1, 9, 1, 28, 7, (1, 2), "official"),
    "many_windows": (1, 150, 125, 1, 42, 7, (1, 8), "official"),
    "other_window": (1, 30, 31, 3, 20, 5, (2, 3), "official"),
}


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Inputs as the layer has them, keys and global values as strided halves, and an output gradient."""
    B, N, NG, CG, L, heads, D, groups = PROBLEMS[name]
    generator = torch.Generator(device).manual_seed(7)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    C = CG + groups * heads * D
    inputs = [randn(B, N, 2 * C)[..., C:], *randn(B, NG, 2 * CG).chunk(2, -1)]
    for _ in range(groups):
        inputs += [randn(B, L, heads, 2 * D)[..., :D], randn(B, L, heads, D)]
    return inputs, randn(B, N, C)


def make_pool(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, dict]:
    """A map as a slice of a wider one, an output gradient and the arguments of `cross_window_pool`."""
    B, H, W, heads, D, window, dilations, fusion = POOLS[name]
    generator = torch.Generator(device).manual_seed(7)
    C = len(dilations) * heads * D
    x = torch.randn(B, H, W, C + 8, generator=generator, device=device).to(dtype)[..., 8:]
    grad = torch.randn(len(dilations), B, window, window, heads * D, generator=generator, device=device).to(dtype)
    return x, grad, dict(heads=heads, window=window, dilations=dilations, fusion=fusion)


def pool_by_loops(x: Tensor, heads: int, window: int, dilation: int, fusion: str) -> Tensor:
    """The definition of one group, window by window, on a map that torch can pad by reflection."""
    B, H, W, C = x.shape
    span, D = dilation * (window - 1) + 1, C // heads
    x = x.permute(0, 3, 1, 2)
    x = F.pad(x, (0, -W % span, 0, -H % span), mode="reflect")
    out = x.new_zeros(B, window, window, C)
    for b in range(B):
        for ky in range(window):
            for kx in range(window):
                for m in range(heads):
                    values = []  # one list of D values a window
                    for top in range(0, x.shape[2], span):
                        for left in range(0, x.shape[3], span):
                            y, z = top + ky * dilation, left + kx * dilation
                            values.append(x[b, m * D : (m + 1) * D, y, z])
                    flat = torch.stack(values)  # [windows, D]
                    if fusion == "official":
                        fused = F.adaptive_avg_pool1d(flat.flatten()[None], D)[0]
                    else:
                        fused = flat.mean(0)
                    out[b, ky, kx, m * D : (m + 1) * D] = fused
    return out


def attention_by_loops(q: Tensor, *keys: Tensor) -> Tensor:
    """The definition, token by token."""
    CG, groups, heads, D = keys[0].shape[2], (len(keys) - 2) // 2, keys[2].shape[2], keys[2].shape[3]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            p = (keys[0][b] @ q[b, n, :CG] / math.sqrt(CG)).softmax(0)
            out[b, n, :CG] = p @ keys[1][b]
            for g in range(groups):
                for m in range(heads):
                    first = CG + (m * groups + g) * D
                    k, v = keys[2 + 2 * g][b, :, m], keys[3 + 2 * g][b, :, m]
                    p = (k @ q[b, n, first : first + D] / math.sqrt(D)).softmax(0)
                    start = CG + (g * heads + m) * D
                    out[b, n, start : start + D] = p @ v
    return out


@pytest.mark.parametrize("fusion", reference.FUSIONS)
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (11, 8)])
def test_pooling_is_the_definition(size: tuple[int, int], fusion: str) -> None:
    x = torch.randn(2, *size, 2 * 2 * 5, dtype=torch.float64)
    out = cross_window_pool(x, 2, window=3, dilations=(1, 2), fusion=fusion)
    expected = [pool_by_loops(g, 2, 3, d, fusion) for g, d in zip(x.chunk(2, -1), (1, 2), strict=True)]
    torch.testing.assert_close(out, torch.stack(expected))


def test_fusions_differ_unless_there_is_one_window() -> None:
    x = torch.randn(1, 7, 7, 14)
    one = [cross_window_pool(x, 2, fusion=fusion) for fusion in reference.FUSIONS]
    torch.testing.assert_close(one[0], one[1])
    torch.testing.assert_close(one[0][0], x)
    x = torch.randn(1, 14, 14, 14)
    four = [cross_window_pool(x, 2, fusion=fusion) for fusion in reference.FUSIONS]
    assert (four[0] - four[1]).abs().max() > 0.1


@pytest.mark.parametrize("size", [2, 3, 8])
def test_reflection_continues_that_of_torch(size: int) -> None:
    """Where torch's padding is defined the rule is torch's, and beyond it is torch's applied again and again."""
    x = torch.arange(size, dtype=torch.float32)[None, None]
    index = reference.reflect_index(torch.arange(5 * size), size)
    while x.shape[-1] < 5 * size:
        x = F.pad(x, (0, x.shape[-1] - 1 if x.shape[-1] == size else 2 * (size - 1)), mode="reflect")
    assert torch.equal(index, x[0, 0, : 5 * size].long())


def test_reflection_of_one_row_repeats_it() -> None:
    assert reference.reflect_index(torch.arange(9), 1).tolist() == [0] * 9


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_the_definition(groups: int) -> None:
    q = torch.randn(2, 6, 4 + groups * 2 * 3, dtype=torch.float64)
    keys = [*torch.randn(2, 2, 5, 4, dtype=torch.float64), *torch.randn(2 * groups, 2, 9, 2, 3, dtype=torch.float64)]
    torch.testing.assert_close(factorized_attention(q, *keys), attention_by_loops(q, *keys))


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_gradcheck(groups: int) -> None:
    inputs = [torch.randn(1, 5, 2 + groups * 2 * 3), *torch.randn(2, 1, 4, 2), *torch.randn(2 * groups, 1, 4, 2, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(reference.factorized_attention, inputs)


@pytest.mark.parametrize("fusion", reference.FUSIONS)
def test_pooling_gradcheck(fusion: str) -> None:
    x = torch.randn(1, 4, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.cross_window_pool(x, 2, 3, [1, 2], fusion), x)


@pytest.mark.parametrize("name", ["narrow", "stage4"])
def test_written_out_attention_gradients_equal_autograd(name: str) -> None:
    inputs, grad = make(name, torch.float64, "cpu")
    _, *expected = with_gradients(reference.factorized_attention, inputs, grad)
    inputs += [None] * (7 - len(inputs))
    torch.testing.assert_close(list(reference.factorized_attention_backward(grad, *inputs)), expected)


@pytest.mark.parametrize("name", POOLS)
def test_written_out_pooling_gradient_equals_autograd(name: str) -> None:
    x, grad, args = make_pool(name, torch.float64, "cpu")
    _, expected = with_gradients(lambda x: reference.cross_window_pool(x, **args), [x], grad)
    dx = reference.cross_window_pool_backward(
        grad, list(x.shape[1:3]), args["heads"], args["dilations"], args["fusion"]
    )  # fmt: skip
    torch.testing.assert_close(dx, expected)


def test_empty_batch() -> None:
    assert cross_window_pool(torch.randn(0, 8, 8, 14), 1).shape == (1, 0, 7, 7, 14)
    out = factorized_attention(torch.randn(0, 5, 10), *torch.randn(2, 0, 4, 2), *torch.randn(4, 0, 4, 2, 2))
    assert out.shape == (0, 5, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(8, 8, 16)), r"x must be a map \[B, H, W, C\]"),
        (dict(heads=0), "must be positive"),
        (dict(dilations=()), "must be positive"),
        (dict(heads=3), "2 groups of 3 heads must divide the channels of x, got 16"),
        (dict(fusion="max"), r"fusion must be one of \('official', 'window_mean'\), got 'max'"),
    ],
)
def test_wrong_pooling_arguments_are_named(change: dict, message: str) -> None:
    args = dict(dict(x=torch.randn(1, 8, 8, 16), heads=2, dilations=(1, 2)), **change)
    with pytest.raises(ValueError, match=message):
        cross_window_pool(args.pop("x"), args.pop("heads"), **args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(1, 2, 3, 10)), r"q must be tokens \[B, N, C\]"),
        (dict(q=torch.randn(1, 6, 9)), "q needs the channels of all groups together, 10, got 9"),
        (dict(k_global=torch.randn(2, 4, 2)), r"k_global must be \[B, L, Cg\] with B = 1"),
        (dict(v_local=torch.randn(1, 4, 2, 3)), "v_local must have the shape of k_local"),
        (dict(v_dilated=None), "v_dilated must have the shape of k_dilated"),
        (dict(k_dilated=None), "v_dilated needs k_dilated"),
        (dict(k_dilated=torch.randn(1, 5, 2, 2), v_dilated=torch.randn(1, 5, 2, 2)), "k_dilated must have the shape"),
        (dict(k_global=torch.randn(1, 0, 2), v_global=torch.randn(1, 0, 2)), "at least one key"),
        (dict(q=torch.randn(1, 6, 10).double()), "need one dtype, got"),
    ],
)
def test_wrong_attention_arguments_are_named(change: dict, message: str) -> None:
    shapes = [(1, 6, 10), *[(1, 4, 2)] * 2, *[(1, 4, 2, 2)] * 4]
    args = {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}
    with pytest.raises(ValueError, match=message):
        factorized_attention(**dict(args, **change))


def test_explicit_triton_explains_its_refusal() -> None:
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        cross_window_pool(torch.randn(1, 8, 8, 14), 1, backend="triton")
    inputs, _ = make("stage4", torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu.*backend='reference'"):
        factorized_attention(*inputs, backend="triton")


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.x = torch.empty(*shape, device="meta", dtype=dtype)

    is_cuda = True

    def __getattr__(self, name: str):
        return getattr(self.x, name)


def test_limits_of_the_kernels_are_explained() -> None:
    q, k = _OnGpu(1, 9, 64, dtype=torch.bfloat16), _OnGpu(1, 49, 1, 28)
    assert can_run(q, _OnGpu(1, 5000, 8), k)
    for keys, message in (
        ((_OnGpu(1, 9, 8), _OnGpu(1, 169, 1, 28)), "limit is 128 local keys, got 169"),
        ((_OnGpu(1, 9, 136), k), "limit is 128 channels in the global group with"),
        (
            (_OnGpu(1, 9, 8), _OnGpu(1, 49, 1, 130)),
            "limit is 128 channels in a local head with torch.bfloat16, got 130",
        ),
    ):
        with pytest.raises(NotImplementedError, match=message):
            can_run(q, *keys, raise_error=True)
    with pytest.raises(NotImplementedError, match="limit is 64 channels in a local head with torch.float32, got 84"):
        can_run(_OnGpu(1, 9, 64), _OnGpu(1, 9, 8), _OnGpu(1, 49, 1, 84), raise_error=True)
    with pytest.raises(NotImplementedError, match="limit is an image of"):
        can_run(_OnGpu(1, 2**25, 64), _OnGpu(1, 9, 8), k, raise_error=True)
    with pytest.raises(NotImplementedError, match="limit is 2 channel groups, got 3"):
        can_pool(_OnGpu(1, 9, 9, 12), 1, 7, (1, 2, 3), raise_error=True)
    with pytest.raises(NotImplementedError, match="limit is a window of 11 positions, got 13"):
        can_pool(_OnGpu(1, 9, 9, 12), 1, 13, (1,), raise_error=True)
    with pytest.raises(NotImplementedError, match="limit is 2097152 values of one position and head, got 8388608"):
        can_pool(_OnGpu(1, 512, 512, 32), 1, 1, (1,), raise_error=True)


class Layer(nn.Module):
    """Both ops after one another, as in the attention layer."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        local, dilated = cross_window_pool(x, 2, window=3, dilations=(1, 2)).unflatten(-1, (2, -1)).flatten(2, 3)
        q = torch.cat([k.mean(1, keepdim=True).expand(-1, x[0, :, :, 0].numel(), -1), x.flatten(1, 2)], -1)
        return factorized_attention(q, k, v, local, local, dilated, dilated)


def layer_inputs(device: str, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, *size, device=device) for size in ((5, 7, 16), (6, 4), (6, 4))]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("groups", [1, 2])
def test_opcheck(device: str, groups: int) -> None:
    x = torch.randn(2, 5, 6, 12, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.zoo.cross_window_pool, (x, 2, 3, [1, 2][:groups], "official"))
    shapes = [(2, 9, 4 + groups * 6), *[(2, 5, 4)] * 2, *[(2, 9, 2, 3)] * 2 * groups]
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    torch.library.opcheck(torch.ops.zoo.factorized_attention, (*inputs, *[None] * (7 - len(inputs))))


@gpu
def test_opcheck_of_a_walk() -> None:
    inputs = [x.detach().requires_grad_() for x in make("walked", torch.float32, "cuda")[0]]
    torch.library.opcheck(torch.ops.zoo.factorized_attention, tuple(inputs))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_registered_ops_equal_the_public_functions(device: str) -> None:
    """On a CPU the public functions call the reference; the registered ops serve exported programs."""
    x, grad, args = make_pool("odd", torch.float32, device)
    op = torch.ops.zoo.cross_window_pool
    settings = (args["heads"], args["window"], list(args["dilations"]), args["fusion"])
    torch.testing.assert_close(
        with_gradients(lambda x: op(x, *settings), [x], grad),
        with_gradients(lambda x: cross_window_pool(x, **args), [x], grad),
    )
    for name in ("narrow", "stage4"):
        inputs, grad = make(name, torch.float32, device)
        absent = [None] * (7 - len(inputs))
        torch.testing.assert_close(
            with_gradients(lambda *x, a=absent: torch.ops.zoo.factorized_attention(*x, *a)[0], inputs, grad),
            with_gradients(factorized_attention, inputs, grad),
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compile_full_graph(device: str) -> None:
    inputs = layer_inputs(device)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    grad = torch.randn(2, 35, 20, device=device)
    for a, b in zip(with_gradients(compiled, inputs, grad), with_gradients(Layer(), inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_export(device: str) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Layer(), tuple(layer_inputs(device)), dynamic_shapes=(batch, batch, batch))
    more = layer_inputs(device, batch=3)
    torch.testing.assert_close(program.module()(*more), Layer()(*more))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    x, k, v = layer_inputs(device)
    with torch.autocast(device, dtype=dtype):
        assert cross_window_pool(x, 2, window=3).dtype == dtype
        assert Layer()(x, k, v).dtype == dtype


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_are_those_of_the_products(groups: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    B, N, NG, CG, L, heads, D = 2, 9, 5, 4, 9, 2, 3
    shapes = [(B, N, CG + groups * heads * D), *[(B, NG, CG)] * 2, *[(B, L, heads, D)] * 2 * groups]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as forward:
        out, _ = torch.ops.zoo.factorized_attention(*inputs, *[None] * (7 - len(inputs)))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    product = 2 * B * N * (NG * CG + L * groups * heads * D)
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_attention_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    inputs, grad = make(name, dtype, "cuda")
    if name == "wide" and dtype == torch.float32:
        pytest.skip("beyond the kernels' limit")
    assert_as_exact_as_torch(
        lambda *x: factorized_attention(*x, backend="triton"),
        lambda *x: factorized_attention(*x, backend="reference"),
        inputs, grad, NAMES[: len(inputs)],
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_pooling_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    x, grad, args = make_pool(name, dtype, "cuda")
    assert_as_exact_as_torch(
        lambda x: cross_window_pool(x, **args, backend="triton"),
        lambda x: cross_window_pool(x, **args, backend="reference"),
        [x], grad, ["x"],
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("name", ["stage1", "stage4", "walked"])
def test_backward_is_deterministic(name: str) -> None:
    inputs, grad = make(name, torch.bfloat16, "cuda")
    runs = [with_gradients(factorized_attention, inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
def test_memory_is_linear_in_tokens() -> None:
    """A 256 x 256 map has 1024 global keys: its probabilities would take 128 MiB, the queries take 8."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 256**2, 64), *[(1, 1024, 8)] * 2, *[(1, 49, 1, 28)] * 4]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator) for s in shapes]
    assert shapes[1][1] > MAX_HELD_KEYS
    inputs = [x.requires_grad_() for x in inputs]
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    factorized_attention(*inputs).sum().backward()
    assert torch.cuda.max_memory_allocated() - start < 8 * inputs[0].numel() * 2
