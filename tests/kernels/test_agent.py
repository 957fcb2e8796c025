"""The op `agent_attention`: its reference, its kernels on a GPU, and its life under torch's transformations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import AgentBias, agent_attention
from zoo.kernels.agent import reference
from zoo.kernels.agent.op import can_run

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
PARTS = ("block", "row", "column", "extra")

# (B, grid, key grid or None, C, heads, agents, biased sides, extra token, block cells). Grids that tiles do not divide,
# one image, head dimensions that are no power of two, 9 to 256 agents, keys on a grid of their own.
PROBLEMS = {
    "stage1": (2, (56, 56), None, 96, 3, 9, "key query", False, (7, 7)),
    "stage2": (3, (28, 28), None, 192, 6, 16, "key query", False, (7, 7)),
    "stage3": (5, (14, 14), None, 384, 12, 49, "key query", False, (7, 7)),
    "class_token": (2, (14, 14), None, 192, 3, 49, "key query", True, (7, 7)),
    "many_agents": (2, (24, 24), None, 192, 3, 81, "key query", True, (7, 7)),
    "uneven": (1, (13, 29), None, 120, 3, 12, "key query", False, (7, 7)),
    "small_grid": (2, (3, 5), None, 64, 2, 9, "key query", False, (7, 7)),
    "same_grid": (2, (7, 7), None, 64, 2, 9, "key query", False, (7, 7)),
    "large_block": (1, (9, 40), None, 32, 2, 4, "key query", True, (20, 17)),
    "reduced_keys": (2, (20, 17), (5, 9), 64, 2, 9, "key query", False, (7, 7)),
    "key_bias": (2, (11, 10), None, 96, 2, 25, "key", False, (7, 7)),
    "query_bias": (2, (11, 10), None, 96, 2, 25, "query", True, (7, 7)),
    "one_agent": (2, (11, 10), None, 32, 2, 1, "key query", False, (7, 7)),
    "high_resolution": (1, (96, 96), None, 64, 2, 49, "key query", False, (7, 7)),
    "diffusion": (2, (64, 40), (37, 53), 320, 8, 256, "", False, None),
    "diffusion_narrow": (1, (1, 1009), (1, 307), 128, 2, 200, "", False, None),
    "wide_head": (2, (17, 12), None, 256, 2, 49, "key query", False, (7, 7)),
    "many_images": (70, (5, 9), None, 32, 1, 9, "key query", False, (7, 7)),
}


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict, list[str]]:
    """Leaves, an output gradient, the sizes and the names of the leaves.

    Tokens are views of a packed projection; the query bias is stored with agents last, as official models store it.
    """
    B, grid, key_grid, C, heads, n, sides, extra, cells = PROBLEMS[name]
    generator = torch.Generator(device).manual_seed(7)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    def bias(H: int, W: int) -> list[Tensor]:
        full = [randn(heads, n, *cells), randn(heads, H, n).mT, randn(heads, W, n).mT, randn(heads, n)]
        return full if extra else full[:3]

    lead, (H, W), (KH, KW) = int(extra), grid, key_grid or grid
    q, k, v = randn(B, lead + H * W, 3 * C).split(C, -1)
    if key_grid:
        k, v = randn(B, lead + KH * KW, 2 * C).split(C, -1)
    leaves, names = [q, randn(B, n, C), k, v], ["q", "agents", "k", "v"]
    for side, size in (("key", (KH, KW)), ("query", (H, W))):
        if side in sides:
            leaves += bias(*size)
            names += [f"{side}_bias.{part}" for part in PARTS[: 4 if extra else 3]]
    return leaves, randn(*q.shape), dict(heads=heads, grid=grid, key_grid=key_grid), names


def call(names: list[str], function=agent_attention, **args):
    """The op as a function of its leaves alone."""

    def op(*leaves: Tensor) -> Tensor:
        named = dict(zip(names, leaves, strict=True))
        for side in ("key_bias", "query_bias"):
            parts = {part: named.pop(f"{side}.{part}") for part in PARTS if f"{side}.{part}" in named}
            named[side] = AgentBias(**parts) if parts else None
        return function(**named, **args)

    return op


def by_loops(q, agents, k, v, heads, grid, key_grid, key_bias, query_bias, scale, query_scale) -> Tensor:
    """The definition, one head and one row at a time, the bias interpolated by hand."""

    def source(i: int, cells: int, size: int) -> tuple[int, int, float]:
        x = min(max((i + 0.5) * cells / size - 0.5, 0.0), cells - 1.0)
        return int(x), min(int(x) + 1, cells - 1), x - int(x)

    def position(bias: AgentBias, head: int, agent: int, size: tuple[int, int]) -> Tensor:
        H, W = size
        block = bias.block[head, agent]
        values = [] if bias.extra is None else [bias.extra[head, agent]]
        for y in range(H):
            for x in range(W):
                (y0, y1, fy), (x0, x1, fx) = source(y, block.shape[0], H), source(x, block.shape[1], W)
                upper = block[y0, x0] * (1 - fx) + block[y0, x1] * fx
                lower = block[y1, x0] * (1 - fx) + block[y1, x1] * fx
                values.append(upper * (1 - fy) + lower * fy + bias.row[head, agent, y] + bias.column[head, agent, x])
        return torch.stack(values)

    B, N, C = q.shape
    n, D = agents.shape[1], C // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        key_rows = torch.stack([position(key_bias, head, j, key_grid) for j in range(n)])
        query_rows = torch.stack([position(query_bias, head, j, grid) for j in range(n)])
        c = slice(head * D, (head + 1) * D)
        for b in range(B):
            values = [
                (scale * k[b, :, c] @ agents[b, j, c] + key_rows[j]).softmax(0) @ v[b, :, c] for j in range(n)
            ]  # fmt: skip
            for t in range(N):
                weights = (query_scale * agents[b, :, c] @ q[b, t, c] + query_rows[:, t]).softmax(0)
                out[b, t, c] = weights @ torch.stack(values)
    return out


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """A problem small enough for loops and numeric gradients."""
    monkeypatch.setitem(PROBLEMS, "small", (2, (4, 6), (2, 5), 8, 2, 3, "key query", True, (3, 4)))
    return make("small", torch.float64, "cpu")


def test_reference_is_the_definition(small) -> None:
    leaves, _, args, names = small
    scales = dict(scale=0.3, query_scale=0.9)
    expected = call(names, by_loops, **args, **scales)(*leaves)
    torch.testing.assert_close(call(names, **args, **scales)(*leaves), expected)


def test_scales_default_to_the_head_dimension() -> None:
    q, a, k = torch.randn(1, 7, 8), torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    expected = agent_attention(q, a, k, k, heads=2, scale=0.5, query_scale=0.5)
    torch.testing.assert_close(agent_attention(q, a, k, k, heads=2), expected)


def test_bias_of_the_blocks_own_size_is_not_interpolated() -> None:
    bias = AgentBias(torch.randn(2, 3, 7, 7), torch.zeros(2, 3, 7), torch.zeros(2, 3, 7), torch.randn(2, 3))
    full = reference.expand_bias(bias, (7, 7))
    assert torch.equal(full[..., 1:], bias.block.flatten(2)) and torch.equal(full[..., 0], bias.extra)


def test_reference_gradcheck(small) -> None:
    leaves, _, args, names = small
    leaves = [x.detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(call(names, **args, query_scale=0.9), leaves, fast_mode=True)


def registered(q, agents, k, v, heads, grid, key_grid, key_bias, query_bias, scale, query_scale) -> Tensor:
    """The registered op, which the public function takes on a GPU only."""
    none = (None,) * 4
    settings = heads, grid, key_grid, scale, query_scale
    return torch.ops.zoo.agent_attention(q, agents, k, v, *(key_bias or none), *(query_bias or none), *settings)[0]


@pytest.mark.parametrize("name", ["small", "key_bias", "query_bias"])
def test_written_out_gradients_equal_autograd(name: str, small) -> None:
    leaves, grad, args, names = make(name, torch.float64, "cpu")
    args = dict(args, key_grid=args["key_grid"] or args["grid"], scale=0.4, query_scale=0.9)
    expected = with_gradients(call(names, **args), leaves, grad)
    torch.testing.assert_close(with_gradients(call(names, registered, **args), leaves, grad), expected)


def test_empty_batch() -> None:
    x = torch.randn(0, 6, 8)
    assert agent_attention(x, x[:, :2], x, x, heads=2).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=3), "heads must divide the 8 channels, got 3"),
        (dict(q=torch.randn(2, 6)), r"q must be \[B, tokens, C\], got shape \(2, 6\)"),
        (dict(agents=torch.randn(2, 3, 8)), "q and agents need equal batch and channels"),
        (dict(v=torch.randn(1, 5, 8)), "k and v need one shape"),
        (dict(v=torch.randn(1, 6, 8).double()), "need one dtype"),
        (dict(grid=None), "key_bias needs key_grid"),
        (dict(grid=None, key_grid=(2, 3)), "query_bias needs grid"),
        (dict(grid=(2, 2)), r"key_grid 2 x 2 with 0 extra token\(s\) does not cover 6 tokens"),
        (dict(row=torch.randn(2, 3, 3)), r"key_bias.row must be \[2, 3, 2\], got \(2, 3, 3\)"),
        (dict(column=torch.randn(2, 3, 3, 1)), r"key_bias.column must be \[2, 3, 3\]"),
        (dict(block=torch.randn(1, 3, 7, 7)), r"key_bias.block must be \[2, 3, h, w\]"),
        (dict(extra=torch.randn(2, 3)), r"key_grid 2 x 3 with 1 extra token\(s\) does not cover 6 tokens"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    x = torch.randn(1, 6, 8)
    bias = AgentBias(torch.randn(2, 3, 7, 7), torch.randn(2, 3, 2), torch.randn(2, 3, 3))
    parts = {part: change[part] for part in PARTS if part in change}
    args = dict(q=x, agents=x[:, :3], k=x, v=x, heads=2, grid=(2, 3), query_bias=bias, key_bias=bias._replace(**parts))
    with pytest.raises(ValueError, match=message):
        agent_attention(**{**args, **{key: value for key, value in change.items() if key not in PARTS}})


def test_explicit_triton_explains_its_refusal() -> None:
    x = torch.randn(1, 4, 8)
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        agent_attention(x, x, x, x, heads=1, backend="triton")


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    is_cuda = True

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __getattr__(self, name: str):
        return getattr(self.x, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(agents=257), "it takes 1 to 256 agents, got 257"),
        (dict(agents=129, biased=True), "limit with a position bias is 128 agents, got 129"),
        (dict(channels=400), "limit is a head dimension of 128, got 200"),
        (dict(channels=256, agents=200), "limit is 32768 bytes for the agents of a head.*200 agents of 128 channels"),
        (dict(tokens=2**20 + 1), "limit is 1048576 tokens, got q"),
        (dict(tokens=2**20, stride=2**11), "limit is an image of 2147483648 elements, got q"),
        (dict(batch=65536), "limit is a batch of 65535"),
        (dict(query_scale=-1.0), "scales must be positive, got 0.1 and -1.0"),
        (dict(keys=0), "needs at least one key"),
        (dict(dtype=torch.float64), "takes float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_limits_of_the_kernels_are_explained(change: dict, message: str) -> None:
    def run(
        agents=9, channels=64, tokens=5, keys=4, batch=1, stride=64, biased=False, query_scale=0.1, dtype=torch.float16
    ) -> bool:  # fmt: skip
        def tensor(length: int) -> _OnGpu:
            x = torch.empty(1, dtype=dtype, device="meta")
            return _OnGpu(x.as_strided((batch, length, channels), (0, stride, 1)))

        q, k = tensor(tokens), tensor(keys)
        return can_run(q, tensor(agents), k, k, 2, 0.1, query_scale, biased, raise_error=True)

    assert run()
    with pytest.raises(NotImplementedError, match=message) as error:
        run(**change)
    assert "backend='reference'" in str(error.value)


@EACH_DEVICE
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(device: str, biased: bool) -> None:
    q, k, v = torch.randn(2, 13, 96, device=device).split(32, -1)
    agents = torch.randn(2, 5, 32, device=device)
    shapes = [(2, 5, 7, 7), (2, 5, 3), (2, 5, 4), (2, 5)] * 2
    biases = [torch.randn(shape, device=device) if biased else None for shape in shapes]
    tensors = [None if x is None else x.detach().requires_grad_() for x in (q, agents, k, v, *biases)]
    torch.library.opcheck(torch.ops.zoo.agent_attention, (*tensors, 2, [3, 4], [3, 4], 0.3, 0.7))


class Layer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(2, 4, 7, 7), (2, 4, 5), (2, 4, 6)] * 2
        biases = [nn.Parameter(torch.randn(s, generator=generator, device=device)) for s in shapes]
        self.key_bias, self.query_bias = nn.ParameterList(biases[:3]), nn.ParameterList(biases[3:])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        agents = q.unflatten(1, (2, 15)).mean(2).repeat(1, 2, 1)  # [B, 4, C]
        biases = dict(key_bias=AgentBias(*self.key_bias), query_bias=AgentBias(*self.query_bias))
        return agent_attention(q, agents, k, v, heads=2, grid=(5, 6), **biases)


@EACH_DEVICE
def test_compile_full_graph(device: str) -> None:
    inputs = [torch.randn(2, 30, 32, device=device) for _ in range(3)]
    layer = Layer(device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(inputs[0])
    for a, b in zip(with_gradients(compiled, inputs, grad), with_gradients(layer, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@EACH_DEVICE
def test_export(device: str) -> None:
    layer = Layer(device)
    inputs = tuple(torch.randn(2, 30, 32, device=device) for _ in range(3))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(layer, inputs, dynamic_shapes=(batch, batch, batch))
    more = tuple(torch.randn(3, 30, 32, device=device) for _ in range(3))
    torch.testing.assert_close(program.module()(*more), layer(*more))


@EACH_DEVICE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    inputs = [torch.randn(1, 30, 32, device=device, requires_grad=True) for _ in range(3)]
    layer = Layer(device)
    with torch.autocast(device, dtype=dtype):
        out = layer(*inputs)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (*inputs, *layer.parameters()))
    expected = layer(*inputs)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    leaves, grad, args, names = make(name, dtype, "cuda")
    args = dict(args, query_scale=0.4)
    if name.startswith("diffusion") and dtype == torch.float32:
        pytest.skip("more agents than the kernels take in float32")
    assert_as_exact_as_torch(
        call(names, **args, backend="triton"), call(names, **args, backend="reference"), leaves, grad, names
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "high_resolution", "many_images"])
def test_kernel_is_deterministic(name: str) -> None:
    leaves, grad, args, names = make(name, torch.bfloat16, "cuda")
    runs = [with_gradients(call(names, **args, backend="triton"), leaves, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
def test_kernel_takes_biases_in_float32_beside_half_inputs() -> None:
    leaves, grad, args, names = make("class_token", torch.float32, "cuda")
    grads = {}
    for backend in ("triton", "reference"):
        inputs = [x.detach().requires_grad_() for x in leaves]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = call(names, **args, backend=backend)(*inputs)
        grads[backend] = [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]
    for name, a, b in zip(["out", *names], grads["triton"], grads["reference"], strict=True):
        assert a.dtype == b.dtype, name
        assert (a - b).norm() <= 0.02 * b.norm(), name


@gpu
def test_memory_of_the_kernels_is_linear_in_tokens() -> None:
    """Logits and weights of both softmaxes alone would take 12 times as much as the queries, in float32."""
    leaves = [torch.randn(16, 9216, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    agents = torch.randn(16, 49, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = leaves
    agent_attention(q, agents, k, v, heads=2).sum().backward()
    for x in (*leaves, agents):
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    agent_attention(q, agents, k, v, heads=2).sum().backward()
    assert torch.cuda.max_memory_allocated() - start < 8 * q.numel() * q.element_size()
