"""The op `tile_sparse_attention`: its patterns and reference, its kernels on a GPU, and torch's transformations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from zoo.kernels import tile_sparse_attention
from zoo.kernels.tile_sparse import (
    Diagonal,
    Full,
    Layout,
    MultiDiagonal,
    PatternTable,
    Skip,
    VerticalStripe,
    density,
    pattern_from_dict,
    pattern_table,
    reference,
)
from zoo.kernels.tile_sparse.op import can_run
from zoo.kernels.tile_sparse.patterns import active_tiles, attention_mask, tile_map, video_order

from . import gluon_emulation
from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
NAMES = ["q", "k", "v"]
PATTERNS = (
    Full(),
    Skip(),
    Diagonal(0.5),
    Diagonal(1.2),
    MultiDiagonal(0),
    MultiDiagonal(0.7),
    VerticalStripe(frames=(0, -1)),
    VerticalStripe(every=(9, 2, 4)),
    VerticalStripe(blocks=(1, 3), block_size=5),
)

# (layout, head dim, valid text keys): even and short tiles, text before, after and none, more text than video, one
# frame, one place a frame, exact masks, no valid text.
PROBLEMS = {
    "even": (Layout((4, 8, 16), tile=(64, 64)), 64, None),
    "default_tile": (Layout((3, 9, 10), 30, "last"), 128, [30, 7]),
    "text_first": (Layout((5, 7, 11), 45, "first", (64, 32)), 64, [45, 1]),
    "exact": (Layout((3, 9, 10), 30, "first", (64, 32), "element"), 64, [30, 0]),
    "exact_wide": (Layout((3, 9, 10), 30, "last", granularity="element"), 128, None),
    "more_text": (Layout((1, 3, 5), 77, "last", (16, 16)), 32, [70, 77]),
    "one_place": (Layout((50, 1, 1), 3, "first", (32, 16)), 16, None),
    "odd_head": (Layout((2, 5, 9), 9, "last", (128, 128)), 40, None),
    "square": (Layout((6, 10, 12), 20, "last", (128, 128)), 128, None),
}


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict]:
    """Queries and keys in the memory of a packed [B, S, M, 2 * D], values contiguous; output gradient, arguments."""
    layout, D, valid = PROBLEMS[name]
    generator = torch.Generator(device).manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, M = 1 if valid is None else len(valid), len(PATTERNS)
    q, k = randn(B, layout.tokens, M, 2 * D).transpose(1, 2).split(D, -1)
    args = dict(pattern_ids=torch.arange(M, device=device).flip(0), patterns=PATTERNS, layout=layout)
    args["text_length"] = None if valid is None else torch.tensor(valid, device=device)
    return [q, k, randn(B, M, layout.tokens, D)], randn(B, M, layout.tokens, D), args


def by_masks(q: Tensor, k: Tensor, v: Tensor, pattern_ids, patterns, layout, text_length=None, scale=None) -> Tensor:
    """The definition by S x S masks, in which a row without a key gives zero."""
    masks = torch.stack([attention_mask(patterns[p], layout) for p in pattern_ids.tolist()])[None]  # [1, M, S, S]
    if text_length is not None:
        text_start = 0 if layout.text_first else layout.video
        token = torch.arange(layout.tokens) - text_start
        padded = (token >= text_length[:, None]) & (token < layout.text)  # [B, S]
        masks = masks & ~padded[:, None, None]
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = logits.masked_fill(~masks, float("-inf")).softmax(-1).nan_to_num()
    return weights @ v


def test_frames_and_places() -> None:
    """Bands of one frame in both orders, by the definition of the two."""
    layout = Layout((3, 2, 2), granularity="element")
    i = torch.arange(12)
    near = (i[:, None] - i).abs() < 4
    assert torch.equal(attention_mask(Diagonal(1), layout), near)
    rank = i % 4 * 3 + i // 4
    assert torch.equal(attention_mask(MultiDiagonal(1), layout), (rank[:, None] - rank).abs() < 4)
    # Positions 0, 1, 2 of the token-major order are the first place of the three frames.
    assert video_order(MultiDiagonal(1), layout)[:4].tolist() == [0, 4, 8, 1]


def test_stripes_are_unions() -> None:
    layout = Layout((3, 1, 4), granularity="element")
    stripe = VerticalStripe(frames=(-1, 7, -9), every=(5, 1, -1), blocks=(1,), block_size=2)
    # Frame 2 (others are out of range), 4 and 9, tokens 2 and 3.
    assert attention_mask(stripe, layout)[0].nonzero().flatten().tolist() == [2, 3, 4, 8, 9, 10, 11]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_active_tile_holds_an_allowed_pair(pattern) -> None:
    for grid, text, tile in (((3, 4, 5), 7, (8, 16)), ((2, 3, 3), 0, (4, 4)), ((5, 2, 3), 3, (16, 8))):
        position = "last" if text else "none"
        layout = Layout(grid, text, position, tile)
        order = torch.cat([video_order(pattern, layout), torch.arange(layout.video, layout.tokens)])
        exact = attention_mask(pattern, Layout(grid, text, position, tile, "element"))[order][:, order]
        starts = [
            [*range(0, layout.video, size), *range(layout.video, layout.tokens, size), layout.tokens] for size in tile
        ]
        active = [
            [bool(exact[a:b, c:d].any()) for c, d in zip(starts[1], starts[1][1:], strict=False)]
            for a, b in zip(starts[0], starts[0][1:], strict=False)
        ]
        assert tile_map(pattern, layout).tolist() == active
        assert active_tiles(pattern, layout) == sum(map(sum, active))


def test_density_of_long_videos() -> None:
    """Widths of HunyuanVideo at 720p against the closed form of a band without tiles."""
    layout = Layout((33, 45, 80), 256, "last")
    V, w = layout.video, 3600
    band = (V * (2 * w - 1) - w * (w - 1)) / V**2
    for pattern in (Diagonal(1), MultiDiagonal(1)):
        assert band < density(pattern, layout) < band + 0.01
    assert density(Full(), layout) == 1 and density(Skip(), layout) == 0
    assert 1 / 33 < density(VerticalStripe(frames=(0,)), layout) < 1 / 33 + 0.01


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dictionaries_give_patterns_back(pattern) -> None:
    assert pattern_from_dict(pattern.to_dict()) == pattern


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pattern_from_dict({"pattern": "spiral"}), "pattern must be one of .*got 'spiral'"),
        (
            lambda: pattern_from_dict({"pattern": "diagonal", "width": 3}),
            r"diagonal takes \['window'\], got \['width'\]",
        ),
        (lambda: Diagonal(-1), "window must be a width in frames, 0 or more, got -1"),
        (lambda: MultiDiagonal(float("nan")), "window must be a width .* got nan"),
        (lambda: VerticalStripe(every=(0, 1, 0)), "every must be"),
        (lambda: VerticalStripe(blocks=(-1,)), "blocks not negative"),
        (lambda: Layout((0, 3, 3)), "grid must be positive"),
        (lambda: Layout((1, 3, 3), 4), "'none' does not fit 4 text tokens"),
        (lambda: Layout((1, 3, 3), 4, "middle"), "text_position must be"),
        (lambda: Layout((1, 3, 3), tile=(0, 4)), "tile must be positive"),
        (lambda: Layout((1, 3, 3), granularity="pair"), "granularity must be"),
        (lambda: pattern_table([], Layout((1, 3, 3))), "at least one"),
        (lambda: pattern_table(["full"], Layout((1, 3, 3))), "must be a sequence of patterns"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_patterns_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


SMALL = {
    "block": (Layout((2, 3, 3), 4, "last", (4, 4)), [4, 1]),
    "element": (Layout((3, 2, 2), 3, "first", (4, 8), "element"), [3, 0]),
    "no_text": (Layout((2, 3, 3), tile=(8, 4)), None),
    "chunks": (Layout((4, 5, 6), 3, "last", (8, 4)), [2, 3]),
}


def make_small(name: str) -> tuple[list[Tensor], dict]:
    layout, valid = SMALL[name]
    torch.manual_seed(0)
    B, M = 2, len(PATTERNS)
    inputs = [torch.randn(B, M, layout.tokens, 3, dtype=torch.float64) for _ in range(3)]
    length = None if valid is None else torch.tensor(valid)
    return inputs, dict(pattern_ids=torch.arange(M), patterns=PATTERNS, layout=layout, text_length=length, scale=0.7)


@pytest.mark.parametrize("name", SMALL)
def test_reference_is_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "chunks":
        monkeypatch.setattr(reference, "CHUNK", 24)
    inputs, args = make_small(name)
    grad = torch.randn_like(inputs[0])
    actual = with_gradients(lambda *x: tile_sparse_attention(*x, **args), inputs, grad)
    # nan_to_num of a row without keys passes no gradient, but softmax makes NaN of it.
    expected = [x.nan_to_num() for x in with_gradients(lambda *x: by_masks(*x, **args), inputs, grad)]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["block", "element"])
def test_reference_gradcheck(name: str) -> None:
    inputs, args = make_small(name)
    heads = [1, 3, 5, 7]
    args["pattern_ids"] = args["pattern_ids"][heads]
    inputs = [x[:1, heads].requires_grad_() for x in inputs]
    args["text_length"] = args["text_length"][:1]
    assert torch.autograd.gradcheck(lambda *x: tile_sparse_attention(*x, **args), inputs)


def test_all_full_is_dense_attention() -> None:
    inputs, args = make_small("block")
    args |= dict(patterns=[Full()], pattern_ids=torch.zeros(len(PATTERNS), dtype=torch.int32), text_length=None)
    expected = nn.functional.scaled_dot_product_attention(*inputs, scale=0.7)
    torch.testing.assert_close(tile_sparse_attention(*inputs, **args), expected)


def test_queries_without_keys_and_skipped_heads_give_zero() -> None:
    layout = Layout((2, 3, 3), 2, "last", (4, 4))
    inputs = [torch.randn(1, 2, 20, 4) for _ in range(3)]
    length = torch.zeros(1, dtype=torch.int64)
    args = (torch.arange(2), [VerticalStripe(), Skip()], layout)
    out, *grads = with_gradients(
        lambda *x: tile_sparse_attention(*x, *args, text_length=length), inputs, torch.ones(1, 2, 20, 4)
    )
    # Text queries of the first head see the video.
    assert (out[:, 0, :18] == 0).all() and (out[:, 0, 18:] != 0).all() and (out[:, 1] == 0).all()
    dq, dk, dv = grads
    assert (dq[:, 0, :18] == 0).all() and (dv[:, 0, :18] != 0).all() and (dk[:, 0, 18:] == 0).all()
    assert all((g[:, 1] == 0).all() for g in grads)


def test_padded_text_changes_nothing() -> None:
    inputs, args = make_small("block")
    padded = [x.clone() for x in inputs]
    for x in padded[1:]:
        x[1, :, -3:] = float("nan")
    expected = tile_sparse_attention(*inputs, **args)
    torch.testing.assert_close(tile_sparse_attention(*padded, **args), expected)


def test_output_lies_in_the_order_of_the_queries() -> None:
    inputs, _, args = make("text_first", torch.float32, "cpu")
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = tile_sparse_attention(*leaves, **args)
    assert out.transpose(1, 2).is_contiguous()
    dq, _, dv = torch.autograd.grad(out.sum(), leaves)
    assert dq.transpose(1, 2).is_contiguous() and dv.is_contiguous()


def test_empty_batch() -> None:
    x = torch.randn(0, 2, 20, 4)
    layout = Layout((2, 3, 3), 2, "last")
    assert tile_sparse_attention(x, x, x, torch.zeros(2, dtype=torch.int64), [Full()], layout).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(2, 9, 21, 3)), r"q must be \[B, M, 22, D\] for 18 video and 4 text tokens, got"),
        (dict(k=torch.randn(2, 9, 22, 4).double()), "k and v must have q's shape"),
        (dict(k=torch.randn(2, 9, 22, 3)), "need one dtype"),
        (dict(pattern_ids=torch.zeros(8, dtype=torch.int64)), r"pattern_ids must be an integer tensor \[9\]"),
        (dict(pattern_ids=torch.zeros(9)), "pattern_ids must be an integer tensor"),
        (dict(pattern_ids=torch.arange(9) - 1), r"pattern_ids must lie in 0 to 8 for 9 patterns, got \[-1, 0"),
        (dict(pattern_ids=torch.zeros(9, dtype=torch.int64, device="meta")), "must be on q's device cpu, got meta"),
        (dict(patterns=pattern_table(PATTERNS, Layout((2, 3, 4)))), "table for 24 video tokens, the layout has 18"),
        (dict(text_length=torch.tensor([1])), r"text_length must be \[2\]"),
        (dict(backend="flex"), "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    inputs, args = make_small("block")
    with pytest.raises(ValueError, match=message):
        tile_sparse_attention(**{**dict(zip("qkv", inputs, strict=True)), **args, **change})


def test_explicit_triton_explains_its_refusal() -> None:
    inputs, args = make_small("block")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        tile_sparse_attention(*inputs, **args, backend="triton")


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    is_cuda = True

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float16, row: int | None = None) -> None:
        self.x = torch.empty(*shape[:-1], row or shape[-1], device="meta", dtype=dtype)[..., : shape[-1]]

    def __getattr__(self, name: str):
        return getattr(self.x, name)


@pytest.mark.parametrize(
    ("x", "layout", "scale", "message"),
    [
        (_OnGpu(1, 2, 18, 160), Layout((2, 3, 3)), 1.0, "head dimension of 128, got 160"),
        (_OnGpu(1, 2, 18, 64), Layout((2, 3, 3), tile=(128, 8)), 1.0, r"tiles have sides of .*, got \(128, 8\)"),
        (_OnGpu(1, 1, 2**21, 16), Layout((2, 1, 2**20)), 1.0, "sequence of 1048576 tokens, got 2097152"),
        (_OnGpu(1, 1, 2**20, 64, row=2**11), Layout((1, 1, 2**20)), 1.0, "from first to last token"),
        (_OnGpu(1, 2, 18, 64), Layout((2, 3, 3)), -1.0, "scale must be positive, got -1.0"),
        (_OnGpu(1, 2, 18, 64, dtype=torch.float64), Layout((2, 3, 3)), 1.0, "got torch.float64"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_limits_of_the_kernels_are_explained(x, layout: Layout, scale: float, message: str) -> None:
    assert not can_run(x, x, x, layout, scale)
    with pytest.raises(NotImplementedError, match=message):
        can_run(x, x, x, layout, scale, raise_error=True)


def op_arguments(name: str, device: str, kernels: bool) -> tuple:
    inputs, _, args = make(name, torch.float32, device)
    layout = args["layout"]
    table = pattern_table(PATTERNS, layout, device)
    return (
        *(x.requires_grad_() for x in inputs), args["pattern_ids"], *table, args["text_length"], layout.to_sizes(),
        0.3, kernels,
    )  # fmt: skip


@pytest.mark.parametrize(("device", "kernels"), [("cpu", False), pytest.param("cuda", True, marks=gpu)])
@pytest.mark.parametrize("name", ["more_text", "one_place"])
def test_opcheck(name: str, device: str, kernels: bool) -> None:
    torch.library.opcheck(torch.ops.zoo.tile_sparse_attention, op_arguments(name, device, kernels))


class Layer(nn.Module):
    """Attention of a transformer block: packed projections, and patterns of its own in a buffer."""

    layout = Layout((2, 3, 4), 5, "last", (16, 16))
    patterns = (Full(), Skip(), Diagonal(0.5), MultiDiagonal(0.5), VerticalStripe(frames=(0,)))

    def __init__(self, ids: list[int], backend: str) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids))
        self.qkv = nn.Linear(32, 96)
        self.backend = backend

    def forward(self, x: Tensor, length: Tensor, table) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()  # [B, M, S, D]
        out = tile_sparse_attention(q, k, v, self.ids, table, self.layout, text_length=length, backend=self.backend)
        return out.transpose(1, 2).flatten(2)


BACKENDS = [("cpu", "auto"), pytest.param("cuda", "triton", marks=gpu)]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_one_compiled_graph_serves_all_assignments(device: str, backend: str) -> None:
    table = pattern_table(Layer.patterns, Layer.layout, device)
    counter = CompileCounterWithBackend("aot_eager")
    x, length = torch.randn(2, 29, 32, device=device), torch.tensor([5, 2], device=device)
    for ids in ([0, 3], [2, 4], [1, 1]):
        layer = Layer(ids, backend).to(device)
        function = torch.compile(layer, backend=counter, fullgraph=True)
        for a, b in zip(
            with_gradients(lambda x, f=function: f(x, length, table), [x], torch.ones_like(x)),
            with_gradients(lambda x, f=layer: f(x, length, table), [x], torch.ones_like(x)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_compiled_code_asks_for_a_table() -> None:
    layer, x = Layer([0, 3], "auto"), torch.randn(2, 29, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compiled code needs the patterns as a pattern_table"):
        compiled(x, torch.tensor([5, 2]), Layer.patterns)


def test_tables_of_inference_serve_training() -> None:
    layout, x = Layout((2, 3, 7)), torch.randn(1, 1, 42, 4, requires_grad=True)
    args = (torch.zeros(1, dtype=torch.int64), [Diagonal(0.3)], layout)
    with torch.inference_mode():
        tile_sparse_attention(x, x, x, *args)
    tile_sparse_attention(x, x, x, *args).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_export(device: str, backend: str) -> None:
    table = pattern_table(Layer.patterns, Layer.layout, device)
    layer = Layer([3, 4], backend).to(device)

    def inputs(batch: int) -> tuple:
        return torch.randn(batch, 29, 32, device=device), torch.full((batch,), 4, device=device), table

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(layer, inputs(2), dynamic_shapes=(batch, batch, PatternTable(None, None, None)))
    more = inputs(3)
    torch.testing.assert_close(program.module()(*more), layer(*more))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, backend: str, dtype: torch.dtype) -> None:
    (q, k, v), _, args = make("more_text", torch.float32, device)
    v = v.requires_grad_()
    with torch.autocast(device, dtype=dtype):
        out = tile_sparse_attention(q.to(dtype), k.to(dtype), v, **args, backend=backend)
    assert out.dtype == dtype
    assert torch.autograd.grad(out.float().sum(), v)[0].dtype == torch.float32


def test_flops_are_those_of_the_active_tiles() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, _, args = make("text_first", torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        tile_sparse_attention(*inputs, **args)
    tiles = sum(active_tiles(p, args["layout"]) for p in PATTERNS)
    assert counter.get_total_flops() == 4 * 2 * 64 * tiles * 64 * 32


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    inputs, grad, args = make(name, dtype, "cuda")
    assert_as_exact_as_torch(
        lambda *x: tile_sparse_attention(*x, **args, backend="triton"),
        lambda *x: tile_sparse_attention(*x, **args, backend="reference"),
        inputs,
        grad,
        NAMES,
    )


@gpu
@pytest.mark.parametrize("name", ["default_tile", "text_first", "exact"])
def test_backward_is_deterministic(name: str) -> None:
    inputs, grad, args = make(name, torch.bfloat16, "cuda")

    def run() -> list[Tensor]:
        return with_gradients(lambda *x: tile_sparse_attention(*x, **args, backend="triton"), inputs, grad)

    expected = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@gpu
@pytest.mark.parametrize("tile", [(128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("form", ["generic", "hopper"])
def test_kernel_on_a_long_sequence(D: int, tile: tuple, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of tiles a head, odd at every end."""
    from zoo.kernels.tile_sparse import hopper

    if form == "generic":
        monkeypatch.setattr(hopper, "can_run", lambda *args: False)
    layout = Layout((11, 31, 33), 226, "last", tile)
    patterns = (Diagonal(1), MultiDiagonal(0.5), VerticalStripe(frames=(0,)), Full())
    q, k, v = (torch.randn(1, 4, layout.tokens, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if form == "hopper" and not hopper.can_run(layout, q, k, v):
        pytest.skip("no Hopper GPU here")
    args = (torch.arange(4, device="cuda"), patterns, layout)
    assert_as_exact_as_torch(
        lambda *x: tile_sparse_attention(*x, *args, backend="triton"),
        lambda *x: tile_sparse_attention(*x, *args, backend="reference"),
        [q, k, v], torch.randn_like(q), NAMES,
    )  # fmt: skip


@gpu
def test_kernel_needs_no_host() -> None:
    """Captured into a CUDA graph, which a synchronisation would break, and replayed with other patterns."""
    inputs, _, args = make("text_first", torch.bfloat16, "cuda")
    args["patterns"] = pattern_table(PATTERNS, args["layout"], "cuda")
    tile_sparse_attention(*inputs, **args, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tile_sparse_attention(*inputs, **args, backend="triton")
    args["pattern_ids"].copy_(args["pattern_ids"].roll(1))
    graph.replay()
    torch.testing.assert_close(out, tile_sparse_attention(*inputs, **args, backend="triton"))


@gpu
def test_kernel_makes_no_mask() -> None:
    layout = Layout((16, 32, 32), 256, "first")
    q, k, v = (
        torch.randn(1, 2, layout.tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    ids, table = torch.arange(2, device="cuda"), pattern_table([Diagonal(1), MultiDiagonal(1)], layout, "cuda")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    tile_sparse_attention(q, k, v, ids, table, layout, backend="triton").sum().backward()
    # The output, its gradient, three gradients and statistics.
    assert torch.cuda.max_memory_allocated() - start < 8 * q.numel() * q.element_size()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch):
    """The kernel for Hopper with its groups of warps as threads; copied keys of other heads are NaN."""
    from zoo.kernels.tile_sparse import gluon_hopper
    from zoo.kernels.tile_sparse.hopper import PADDING

    kernel = gluon_hopper._tile_sparse_specialised_kernel

    class Launcher:
        def __getitem__(self, grid):
            def launch(*args, num_warps: int, **kwargs) -> None:
                for program in range(grid[0]):
                    gluon_emulation.emulate(kernel, gluon_hopper, program, grid[0], args, kwargs)

            return launch

    def descriptor(x: Tensor, keys: int) -> gluon_emulation.Descriptor:
        rows = gluon_hopper.rows_of(x)
        return gluon_emulation.Descriptor(x.as_strided(rows.shape, (rows.stride, 1)), [keys, x.shape[-1]])

    def pack(k, v, ids, rows, sizes):
        B, M, S, D = k.shape
        packed = torch.full((2, B, M, S + PADDING, D), float("nan"), dtype=k.dtype)
        _, frames, frame, text, video_start, *_ = sizes
        position = torch.arange(frames * frame)
        place = torch.arange(S)
        place[video_start : video_start + len(position)] = (
            position % frames * frame + position // frames + video_start
        )  # fmt: skip
        for m in (rows[ids, 0] == MultiDiagonal.kind).nonzero().flatten():
            packed[:, :, m, :S] = torch.stack([k, v])[:, :, m][:, :, place]
            packed[:, :, m, S:] = 0
        return packed[:, :, :, :S].unbind()

    monkeypatch.setattr(gluon_hopper, "_tile_sparse_specialised_kernel", Launcher())
    monkeypatch.setattr(gluon_hopper, "_descriptor", descriptor)
    monkeypatch.setattr(gluon_hopper, "pack", pack)
    return gluon_hopper


# (layout, valid text keys): no step at all up to six, of text, of video and of both.
HOPPER = {
    "text_last": (Layout((5, 7, 11), 200, "last", (128, 64)), [200, 70]),
    "text_first": (Layout((3, 9, 10), 30, "first", (128, 128)), [30, 0]),
    "no_text": (Layout((4, 8, 8), tile=(128, 64)), None),
    "short": (Layout((1, 3, 5), 9, "last", (128, 64)), None),
}


@pytest.mark.parametrize("name", HOPPER)
def test_specialised_kernel_in_emulation(name: str, emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels.tile_sparse import triton

    layout, valid = HOPPER[name]
    monkeypatch.setitem(emulated.STAGES, (16, layout.tile[1]), 2)
    patterns = (*PATTERNS, VerticalStripe())
    B, M = 1 if valid is None else len(valid), len(patterns)
    torch.manual_seed(0)
    q, k = torch.randn(B, layout.tokens, M, 32).transpose(1, 2).split(16, -1)
    v = torch.randn(B, M, layout.tokens, 16)
    table, ids = pattern_table(patterns, layout), torch.arange(M).flip(0)
    length = None if valid is None else torch.tensor(valid)
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
    tables = triton._tables(q, ids, table, layout, length)
    emulated.forward(q, k, v, out, lse, *tables[:2], table.rows, table.tiles, tables[2], layout, 0.3)
    expected = tile_sparse_attention(q, k, v, ids, table, layout, text_length=length, scale=0.3)
    torch.testing.assert_close(out, expected)
    for m, pattern in enumerate(patterns[::-1]):
        mask = attention_mask(pattern, layout).repeat(B, 1, 1)  # [B, S, S]
        if valid is not None:
            token = torch.arange(layout.tokens) - (0 if layout.text_first else layout.video)
            mask &= ~((token >= length[:, None]) & (token < layout.text))[:, None]
        logits = (0.3 * q[:, m] @ k[:, m].mT).masked_fill(~mask, float("-inf"))
        denominator = logits.logsumexp(-1) / math.log(2)
        torch.testing.assert_close(lse[:, m], denominator.masked_fill(denominator.isinf(), float("inf")))
