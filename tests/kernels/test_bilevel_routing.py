"""The op `bilevel_routing`: its reference, its kernels on a GPU, and its life under torch's transformations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import bilevel_attention, bilevel_routing, route_regions
from zoo.kernels.bilevel_routing import reference
from zoo.kernels.bilevel_routing.op import can_route, can_run

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu

# (B, H, W, C, heads, region, topk, mask_padding): divisible and padded maps, regions of 1 to 64 tokens, head
# dimensions that are no power of two, batch 1, one region, all regions.
PROBLEMS = {
    "stage1": (2, 56, 56, 64, 2, (8, 8), 1, False),
    "stage2": (2, 28, 28, 128, 4, (4, 4), 4, False),
    "stage3": (2, 14, 14, 256, 8, (2, 2), 16, False),
    "stage3_wide": (1, 32, 32, 64, 2, (4, 4), 16, False),
    "one_token_regions": (1, 7, 7, 32, 1, (1, 1), 12, False),
    "two_token_regions": (1, 9, 6, 32, 2, (1, 2), 20, False),
    "uneven": (2, 12, 20, 96, 3, (3, 5), 5, False),
    "padded": (2, 19, 23, 64, 2, (2, 3), 4, False),
    "padded_masked": (2, 19, 23, 64, 2, (2, 3), 4, True),
    "padded_masked_dense": (1, 13, 11, 32, 1, (2, 2), 16, True),
    "odd_head": (1, 12, 9, 60, 3, (3, 3), 2, False),
    "wide_head": (1, 12, 12, 256, 2, (4, 4), 3, False),
    "large_region": (1, 46, 34, 40, 2, (23, 17), 2, False),
    "single_region": (1, 5, 9, 32, 2, (5, 9), 1, False),
}


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict]:
    """Inputs as views of a packed map, an output gradient and the arguments of `bilevel_attention`."""
    B, H, W, C, heads, region, topk, mask = PROBLEMS[name]
    generator = torch.Generator(device).manual_seed(7)
    qkv = torch.randn(B, H, W, 3 * C, generator=generator, device=device).to(dtype)
    inputs = list(qkv.split(C, -1))
    grad = torch.randn(B, H, W, C, generator=generator, device=device).to(dtype)
    index = route_regions(inputs[0], inputs[1], region, topk, backend="reference").index
    return inputs, grad, dict(index=index, heads=heads, region=region, mask_padding=mask, distinct=True)


def by_loops(q: Tensor, k: Tensor, v: Tensor, index: Tensor, heads: int, region, scale: float, mask: bool) -> Tensor:
    """The definition, token by token."""
    B, H, W, C = q.shape
    cols, d = math.ceil(W / region[1]), C // heads
    out = torch.zeros_like(q)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                g = (y // region[0]) * cols + x // region[1]
                keys, values = [], []
                for r in index[b, g].tolist():
                    for ty in range(region[0]):
                        for tx in range(region[1]):
                            ky, kx = (r // cols) * region[0] + ty, (r % cols) * region[1] + tx
                            if ky < H and kx < W:
                                keys.append(k[b, ky, kx])
                                values.append(v[b, ky, kx])
                            elif not mask:
                                keys.append(torch.zeros_like(k[b, 0, 0]))
                                values.append(torch.zeros_like(v[b, 0, 0]))
                key, value = (torch.stack(t).view(-1, heads, d) for t in (keys, values))
                p = (torch.einsum("md,lmd->lm", q[b, y, x].view(heads, d), key) * scale).softmax(0)
                out[b, y, x] = torch.einsum("lm,lmd->md", p, value).flatten()
    return out


@pytest.mark.parametrize("mask", [False, True])
def test_reference_is_the_definition(mask: bool) -> None:
    q, k, v = torch.randn(3, 1, 5, 7, 8, dtype=torch.float64)
    index = route_regions(q, k, (2, 3), 3).index
    expected = by_loops(q, k, v, index, 2, (2, 3), 0.3, mask)
    actual = bilevel_attention(q, k, v, index, heads=2, region=(2, 3), scale=0.3, mask_padding=mask)
    torch.testing.assert_close(actual, expected)


def test_routing_takes_the_nearest_regions_by_mean() -> None:
    q, k = torch.randn(2, 1, 5, 7, 8, dtype=torch.float64)
    routing = route_regions(q, k, (2, 3), 3, scale=0.5)
    assert routing.grid == (3, 3) and routing.index.dtype == torch.int32
    means = [
        torch.stack([x[0, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].mean((0, 1)) for r in range(3) for c in range(3)])
        for x in (q, k)
    ]
    value, index = (0.5 * means[0] @ means[1].T).topk(3)
    assert torch.equal(routing.index[0].long(), index)
    torch.testing.assert_close(routing.weight[0].double(), value.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [False, True])
def test_reference_gradcheck(mask: bool) -> None:
    q, k, v = torch.randn(3, 1, 4, 5, 4, dtype=torch.float64).requires_grad_().unbind()
    index = route_regions(q, k, (2, 2), 2).index
    weight = torch.rand(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: reference.bilevel_attention(*x[:3], index, 2, (2, 2), (2, 2), 0.5, mask, x[3]), (q, k, v, weight)
    )


@pytest.mark.parametrize("name", ["padded", "padded_masked", "uneven"])
def test_written_out_gradients_equal_autograd(name: str) -> None:
    inputs, grad, args = make(name, torch.float64, "cpu")
    settings = (args["index"], args["heads"], args["region"], args["region"], 0.2, args["mask_padding"])
    _, *expected = with_gradients(lambda *x: reference.bilevel_attention(*x, *settings), inputs, grad)
    torch.testing.assert_close(list(reference.bilevel_attention_backward(grad, *inputs, *settings)), expected)


def test_memory_is_linear_in_tokens() -> None:
    """A 600 x 500 map in 49 regions: its probabilities would take 23 GB a head."""
    q, k, v = torch.randn(3, 1, 600, 500, 4)
    out = bilevel_routing(q, k, v, heads=1, region=(86, 72), topk=1)
    assert out.shape == q.shape and torch.isfinite(out).all()


def test_padding_takes_part_unless_masked() -> None:
    q, k, v = torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 4), torch.ones(1, 3, 3, 4)
    # The last region has one token and three paddings of logit 0.
    corner = torch.full((1, 4, 1), 3)
    kept = bilevel_attention(q, k, v, corner, heads=1, region=(2, 2))
    masked = bilevel_attention(q, k, v, corner, heads=1, region=(2, 2), mask_padding=True)
    torch.testing.assert_close(kept, torch.full_like(v, 0.25))
    torch.testing.assert_close(masked, torch.ones_like(v))


def test_empty_batch() -> None:
    q = torch.randn(0, 4, 4, 8)
    assert bilevel_routing(q, q, q, heads=1, region=(2, 2), topk=2).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topk=5), "topk must lie between 1 and the number of regions, 4"),
        (dict(topk=0), "topk must lie between 1"),
        (dict(heads=3), "heads must divide"),
        (dict(region=(0, 2)), "region must be two positive sizes"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(q=torch.randn(4, 4, 8)), r"q must be a map \[B, H, W, C\]"),
        (dict(v=torch.randn(1, 4, 3, 8)), "equal batch and map size"),
        (dict(v=torch.randn(1, 4, 4, 8).double()), "need one dtype"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    x = torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match=message):
        bilevel_routing(**dict(dict(q=x, k=x, v=x, heads=1, region=(2, 2), topk=2), **change))


def test_wrong_index_is_named() -> None:
    x = torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"index must be \[1, 4, K\]"):
        bilevel_attention(x, x, x, torch.zeros(1, 5, 2, dtype=torch.int32), heads=1, region=(2, 2))
    with pytest.raises(ValueError, match="index must hold integers"):
        bilevel_attention(x, x, x, torch.zeros(1, 4, 2), heads=1, region=(2, 2))


def test_explicit_triton_explains_its_refusal() -> None:
    x = torch.randn(1, 4, 4, 8)
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        bilevel_routing(x, x, x, heads=1, region=(2, 2), topk=2, backend="triton")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_opcheck(device: str) -> None:
    q, k, v = (torch.randn(2, 5, 6, 32, device=device, requires_grad=True) for _ in range(3))
    index = route_regions(q, k, (2, 3), 2).index
    torch.library.opcheck(
        torch.ops.zoo.bilevel_attention, (q, k, v, index, 2, [2, 3], [2, 3], 0.2, False, True)
    )  # fmt: skip
    torch.library.opcheck(torch.ops.zoo.route_regions, (q.detach(), k.detach(), [2, 3], [2, 3], 2, 1.0))


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bilevel_routing(q, k, v, heads=2, region=(2, 3), topk=2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compile_full_graph(device: str) -> None:
    inputs = [torch.randn(2, 5, 6, 32, device=device) for _ in range(3)]
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(inputs[0])
    for a, b in zip(with_gradients(compiled, inputs, grad), with_gradients(Layer(), inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_export(device: str) -> None:
    inputs = tuple(torch.randn(2, 5, 6, 32, device=device) for _ in range(3))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Layer(), inputs, dynamic_shapes=(batch, batch, batch))
    more = tuple(torch.randn(3, 5, 6, 32, device=device) for _ in range(3))
    torch.testing.assert_close(program.module()(*more), Layer()(*more))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 4, 6, 32, device=device) for _ in range(3))
    with torch.autocast(device, dtype=dtype):
        out = bilevel_routing(q, k, v, heads=2, region=(2, 3), topk=2)
    assert out.dtype == dtype


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    inputs, grad, args = make(name, dtype, "cuda")
    assert_as_exact_as_torch(
        lambda *x: bilevel_attention(*x, **args, backend="triton"),
        lambda *x: bilevel_attention(*x, **args, backend="reference"),
        inputs,
        grad,
        ["q", "k", "v"],
    )


@gpu
def test_kernel_on_a_graph_of_its_own_per_head() -> None:
    q = torch.randn(2, 12, 20, 32, device="cuda")
    k, v = torch.randn(2, 2, 8, 12, 32, device="cuda")
    index = torch.randn(2, 2, 16, 24, device="cuda").topk(5).indices
    args = dict(index=index, heads=2, region=(3, 5), kv_region=(2, 2))
    assert_as_exact_as_torch(
        lambda *x: bilevel_attention(*x, **args, backend="triton"),
        lambda *x: bilevel_attention(*x, **args, backend="reference"),
        [q, k, v], torch.randn_like(q), ["q", "k", "v"],
    )  # fmt: skip


@gpu
def test_kernel_counts_a_region_named_twice() -> None:
    q, k, v = torch.randn(3, 1, 6, 6, 32, device="cuda")
    index = torch.tensor([0, 0, 3], device="cuda").expand(1, 9, 3)
    args = dict(heads=1, region=(2, 2))
    torch.testing.assert_close(
        bilevel_attention(q, k, v, index, **args, backend="triton"),
        bilevel_attention(q, k, v, index, **args, backend="reference"),
    )


@gpu
@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_backward_is_deterministic(name: str) -> None:
    inputs, grad, args = make(name, torch.bfloat16, "cuda")
    runs = [with_gradients(lambda *x: bilevel_attention(*x, **args), inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_routes_as_float64(name: str) -> None:
    (q, k, _), _, args = make(name, torch.bfloat16, "cuda")
    region, topk = args["region"], args["index"].shape[-1]
    routing = route_regions(q, k, region, topk, backend="triton")
    logits = reference.affinity(
        reference.region_mean(q.double(), region), reference.region_mean(k.double(), region), 1.0
    )  # fmt: skip
    ordered = logits.sort(-1, descending=True).values
    # Rows whose last kept and first dropped affinity differ by float32 rounding may go either way.
    gap = ordered[..., topk - 1] - ordered[..., topk] if topk < ordered.shape[-1] else torch.ones_like(ordered[..., 0])
    clear = gap > 1e-5 * logits.abs().max()
    assert clear.float().mean() > 0.95
    expected = logits.topk(topk).indices.sort(-1).values
    assert torch.equal(routing.index.long().sort(-1).values[clear], expected[clear])
    torch.testing.assert_close(routing.weight.sum(-1), torch.ones_like(routing.weight[..., 0]))


@gpu
def test_kernel_on_a_large_map() -> None:
    q, k, v = torch.randn(3, 1, 600, 500, 32, device="cuda", dtype=torch.bfloat16).requires_grad_().unbind()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    bilevel_routing(q, k, v, heads=1, region=(86, 72), topk=4).sum().backward()
    assert torch.cuda.max_memory_allocated() - start < 12 * q.numel() * q.element_size()


def test_limits_of_the_kernels_are_explained() -> None:
    x = torch.empty(1, 4, 4, 1, device="meta").expand(1, 4, 4, 512)
    with pytest.raises(NotImplementedError, match="head dimension of 128, got 512") as error:
        can_run(_OnGpu(x), _OnGpu(x), x, heads=1, scale=1.0, raise_error=True)
    assert "backend='reference'" in str(error.value)
    with pytest.raises(NotImplementedError, match="the scale must be positive, got -1.0"):
        can_run(_OnGpu(x), _OnGpu(x), x, heads=8, scale=-1.0, raise_error=True)
    large = torch.empty(1, 2**16, 2**15, 1, device="meta")
    with pytest.raises(NotImplementedError, match="limit is an image of"):
        can_run(_OnGpu(large), _OnGpu(large), large, heads=1, scale=1.0, raise_error=True)
    many = torch.empty(1, 2048, 1024, 1, device="meta")
    with pytest.raises(NotImplementedError, match="limit is an image of 1048576 tokens"):
        can_run(_OnGpu(many), _OnGpu(many), many, heads=1, scale=1.0, raise_error=True)
    with pytest.raises(NotImplementedError, match="limit is 1024 regions, got 2000"):
        can_route(_OnGpu(x), _OnGpu(x), 2000, raise_error=True)


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    is_cuda = True

    def __getattr__(self, name: str):
        return getattr(self.x, name)
