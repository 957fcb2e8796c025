"""The op `halo_attention`: its reference, its kernels on a GPU, and its life under torch's transformations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import halo_attention
from zoo.kernels.halo import reference
from zoo.kernels.halo.op import can_run
from zoo.kernels.halo.reference import Geometry, query_size

from .oracle import DTYPES, assert_as_exact_as_torch, with_gradients

gpu = pytest.mark.gpu
NAMES = ["q", "kv", "height_rel", "width_rel"]

# (B, H, W, dqk, dv, arguments): the maps of timm's models and of the paper, odd sizes, batch 1, strided queries, no
# halo, a halo beyond half a block, heads that are no power of two, keys and values of different width.
PROBLEMS = {
    "stage2": (2, 64, 64, 16, 16, dict(heads=8, block=8, halo=3)),
    "stage3": (2, 32, 32, 32, 32, dict(heads=8, block=8, halo=3)),
    "stage4": (2, 16, 16, 64, 64, dict(heads=8, block=8, halo=2)),
    "strided": (2, 16, 16, 64, 64, dict(heads=8, block=8, halo=2, stride=2)),
    "regnet": (2, 14, 14, 12, 36, dict(heads=8, block=7, halo=2)),
    "paper_h5": (1, 28, 28, 16, 40, dict(heads=4, block=14, halo=2)),
    "paper_h6": (1, 16, 24, 16, 48, dict(heads=4, block=8, halo=4)),
    "paper_h7": (1, 19, 19, 16, 64, dict(heads=8, block=10, halo=3)),
    "odd": (2, 13, 18, 16, 16, dict(heads=2, block=8, halo=3)),
    "odd_strided": (2, 13, 19, 16, 20, dict(heads=2, block=8, halo=3, stride=2)),
    "narrow": (1, 9, 30, 32, 16, dict(heads=3, block=8, halo=2)),
    "one_block": (1, 5, 3, 16, 16, dict(heads=1, block=8, halo=3)),
    "no_halo": (2, 12, 10, 20, 32, dict(heads=2, block=4, halo=0)),
    "wide_halo": (1, 11, 9, 20, 24, dict(heads=2, block=4, halo=3)),
    "wider_than_a_block": (1, 10, 9, 16, 16, dict(heads=1, block=3, halo=4)),
    "single_pixels": (1, 6, 5, 8, 8, dict(heads=2, block=1, halo=2)),
    "scaled_position": (2, 13, 18, 16, 16, dict(heads=2, block=8, halo=3, scale_position=True)),
    "scale": (1, 16, 16, 16, 16, dict(heads=2, block=8, halo=2, scale=0.05)),
    "masked": (2, 13, 18, 16, 16, dict(heads=2, block=8, halo=3, mask_border=True)),
    "masked_strided": (1, 13, 18, 16, 32, dict(heads=2, block=8, halo=3, stride=2, mask_border=True)),
    "masked_tile": (1, 18, 13, 16, 16, dict(heads=2, block=8, halo=5, mask_border=True)),
    "wide_head": (1, 16, 9, 128, 128, dict(heads=2, block=8, halo=3)),
    "large_block": (1, 40, 33, 32, 32, dict(heads=1, block=29, halo=3)),
}


def make(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict]:
    """Maps as permuted convolution outputs (q) and as a slice of a wider map (kv), tables, an output gradient."""
    B, H, W, dqk, dv, args = PROBLEMS[name]
    heads, window = args["heads"], args["block"] + 2 * args["halo"]
    generator = torch.Generator(device).manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    size = query_size((H, W), args.get("stride", 1))
    q = randn(B, heads * dqk, *size).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    kv = randn(B, H, W, heads * (dqk + dv) + 16)[..., 16:]
    tables = [randn(2 * window - 1, dqk) * dqk**-0.5 for _ in range(2)]
    return [q, kv, *tables], randn(B, *size, heads * dv), args


def settings(name: str) -> tuple:
    """Arguments of the reference functions after the tensors."""
    *_, dqk, _, args = PROBLEMS[name]
    geometry = Geometry(args["heads"], args["block"], args["halo"], args.get("stride", 1))
    scale = args.get("scale", dqk**-0.5)
    return geometry, scale, args.get("scale_position", False), args.get("mask_border", False)


def by_loops(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, *, heads, block, halo, stride=1, scale=None,
             scale_position=False, mask_border=False) -> Tensor:  # fmt: skip
    """The definition, query by query."""
    (B, H, W, _), (_, QH, QW, C), w = kv.shape, q.shape, block + 2 * halo
    d = C // heads
    kv = kv.unflatten(-1, (heads, -1))
    out = q.new_zeros(B, QH, QW, heads, kv.shape[-1] - d)
    scale = d**-0.5 if scale is None else scale
    for row in range(QH):
        for col in range(QW):
            # The block that holds the query's pixel, its window's corner, and the query's number within the block.
            block_row, block_col = row * stride // block, col * stride // block
            top, left = block_row * block - halo, block_col * block - halo
            qy, qx = row - block_row * (block // stride), col - block_col * (block // stride)
            for b in range(B):
                for m in range(heads):
                    query, logits, values = q[b, row, col, m * d : (m + 1) * d], [], []
                    for ky in range(w):
                        for kx in range(w):
                            on_map = 0 <= top + ky < H and 0 <= left + kx < W
                            if mask_border and not on_map:
                                continue
                            pixel = kv[b, top + ky, left + kx, m] if on_map else torch.zeros_like(kv[0, 0, 0, 0])
                            position = query @ (height_rel[ky - qy + w - 1] + width_rel[kx - qx + w - 1])
                            logits.append(scale * (query @ pixel[:d]) + position * (scale if scale_position else 1))
                            values.append(pixel[d:])
                    out[b, row, col, m] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out.flatten(3)


SMALL = dict(heads=2, block=4, halo=1)


@pytest.mark.parametrize(
    "change",
    [dict(), dict(stride=2), dict(halo=0), dict(halo=3), dict(scale_position=True, scale=0.3), dict(mask_border=True)],
    ids=str,
)
def test_reference_is_the_definition(change: dict) -> None:
    args = {**SMALL, **change}
    window = args["block"] + 2 * args["halo"]
    q = torch.randn(1, *query_size((5, 6), args.get("stride", 1)), 2 * 3, dtype=torch.float64)
    kv = torch.randn(1, 5, 6, 2 * (3 + 5), dtype=torch.float64)
    tables = torch.randn(2, 2 * window - 1, 3, dtype=torch.float64)
    torch.testing.assert_close(halo_attention(q, kv, *tables, **args), by_loops(q, kv, *tables, **args))


@pytest.mark.parametrize("name", ["masked", "odd_strided", "wide_halo", "scaled_position"])
def test_written_out_gradients_equal_autograd(name: str) -> None:
    inputs, grad, _ = make(name, torch.float64, "cpu")
    _, *expected = with_gradients(lambda *x: reference.halo_attention(*x, *settings(name)), inputs, grad)
    actual = reference.halo_attention_backward(grad, *inputs, *settings(name))
    torch.testing.assert_close(list(actual), expected)


@pytest.mark.parametrize("change", [dict(), dict(stride=2, mask_border=True), dict(scale_position=True)], ids=str)
def test_reference_gradcheck(change: dict) -> None:
    args = {**SMALL, **change}
    q = torch.randn(1, *query_size((3, 5), args.get("stride", 1)), 2 * 2, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(1, 3, 5, 2 * (2 + 3), dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(11, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: halo_attention(*x, **args), (q, kv, *tables))


def test_pixels_off_the_map_take_part_unless_masked() -> None:
    q, kv, table = torch.zeros(1, 4, 4, 1), torch.ones(1, 4, 4, 2), torch.zeros(11, 1)
    kept = halo_attention(q, kv, table, table, heads=1, block=4, halo=1)
    masked = halo_attention(q, kv, table, table, heads=1, block=4, halo=1, mask_border=True)
    # All logits are zero: 16 of the 36 pixels of the window have a value.
    torch.testing.assert_close(kept, torch.full_like(q, 16 / 36))
    torch.testing.assert_close(masked, torch.ones_like(q))


def test_position_logits_off_the_map_count() -> None:
    q, kv = torch.ones(1, 2, 2, 1), torch.ones(1, 2, 2, 2)
    kv[..., 0] = 0
    rise = torch.arange(7.0)[:, None]
    out = halo_attention(q, kv, rise, torch.zeros(7, 1), heads=1, block=2, halo=1, scale=1.0)
    # Rows of the window weigh exp(0) ... exp(3); two of four columns and the middle two rows are on the map.
    weight = torch.arange(4.0).softmax(0)
    torch.testing.assert_close(out, torch.full_like(out, 0.5 * (weight[1] + weight[2]).item()))


def test_unreached_rows_of_the_tables_get_no_gradient() -> None:
    inputs, grad, args = make("odd", torch.float64, "cpu")
    _, _, _, *tables = with_gradients(lambda *x: halo_attention(*x, **args), inputs, grad)
    for table in tables:
        assert (table[:6] == 0).all() and (table[6:].abs().amax(1) > 0).all()


def test_padding_the_map_changes_nothing() -> None:
    (q, kv, *tables), _, args = make("odd", torch.float64, "cpu")
    padded = [nn.functional.pad(x, (0, 0, 0, 6, 0, 3)) for x in (q, kv)]
    expected = halo_attention(*padded, *tables, **args)[:, :13, :18]
    torch.testing.assert_close(halo_attention(q, kv, *tables, **args), expected)


def test_empty_batch() -> None:
    q, kv, table = torch.randn(0, 4, 4, 8), torch.randn(0, 4, 4, 16), torch.randn(11, 8)
    assert halo_attention(q, kv, table, table, heads=1, block=4, halo=1).shape == (0, 4, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=3), "heads must divide the channels of q and of kv"),
        (dict(heads=0), "heads and block must be positive"),
        (dict(halo=-1), "halo not negative"),
        (dict(stride=3), "stride must be 1 or 2, got 3"),
        (dict(block=5, stride=2), "needs an even block, got block=5"),
        (dict(stride=2), r"q must be \[1, 3, 4\] and channels"),
        (dict(halo=2), r"height_rel must be \[15, 4\]"),
        (dict(width_rel=torch.randn(11, 8)), r"width_rel must be \[11, 4\]"),
        (dict(q=torch.randn(5, 7, 8)), r"q must be a map \[B, H, W, C\]"),
        (dict(kv=torch.randn(1, 5, 7, 8)), "kv needs more channels than q"),
        (dict(kv=torch.randn(1, 5, 7, 24).double()), "need one dtype"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    table = torch.randn(11, 4)
    args = dict(q=torch.randn(1, 5, 7, 8), kv=torch.randn(1, 5, 7, 24), height_rel=table, width_rel=table, **SMALL)
    with pytest.raises(ValueError, match=message):
        halo_attention(**{**args, **change})


def test_explicit_triton_explains_its_refusal() -> None:
    inputs, _, args = make("odd", torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got device cpu"):
        halo_attention(*inputs, **args, backend="triton")


class _OnGpu:
    """A tensor that claims to lie on a GPU."""

    def __init__(self, *shape: int) -> None:
        self.x = torch.empty(shape, device="meta")

    is_cuda = True

    def __getattr__(self, name: str):
        return getattr(self.x, name)


@pytest.mark.parametrize(
    ("geometry", "channels", "scale", "message"),
    [
        (Geometry(1, 8, 3, 1), (256, 320), 1.0, "query head dimension of 128, got 256"),
        (Geometry(2, 8, 3, 1), (32, 432), 1.0, "value head dimension of 128, got 200"),
        (Geometry(2, 32, 3, 1), (32, 64), 1.0, "64 relative positions along a side, .* got 69 for block 32 and halo 3"),
        (Geometry(2, 8, 3, 1), (32, 64), 0.0, r"scale must lie above 0 in torch.float32, got 0.0"),
    ],
)
def test_limits_of_the_kernels_are_explained(geometry: Geometry, channels: tuple, scale: float, message: str) -> None:
    q, kv = (_OnGpu(1, 4, 4, c) for c in channels)
    assert not can_run(q, kv, geometry, scale)
    with pytest.raises(NotImplementedError, match=message):
        can_run(q, kv, geometry, scale, raise_error=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("name", ["odd", "masked_strided"])
def test_opcheck(name: str, device: str) -> None:
    inputs, _, _ = make(name, torch.float32, device)
    geometry, *rest = settings(name)
    torch.library.opcheck(torch.ops.zoo.halo_attention, (*(x.requires_grad_() for x in inputs), *geometry, *rest))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(2, 19, 16))

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return halo_attention(q, kv, *self.tables, heads=2, block=4, halo=3, stride=2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compile_full_graph(device: str) -> None:
    layer = Layer().to(device)
    inputs = [torch.randn(2, 3, 4, 32, device=device), torch.randn(2, 5, 7, 72, device=device)]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grad = torch.randn(2, 3, 4, 40, device=device)
    for a, b in zip(with_gradients(compiled, inputs, grad), with_gradients(layer, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_export(device: str) -> None:
    layer = Layer().to(device)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 3, 4, 32, device=device), torch.randn(batch, 5, 7, 72, device=device)

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(layer, inputs(2), dynamic_shapes=(batch, batch))
    more = inputs(3)
    torch.testing.assert_close(program.module()(*more), layer(*more))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_region_dtype(device: str, dtype: torch.dtype) -> None:
    (q, kv, *tables), _, args = make("odd", torch.float32, device)
    tables = [x.requires_grad_() for x in tables]
    with torch.autocast(device, dtype=dtype):
        out = halo_attention(q.to(dtype), kv.to(dtype), *tables, **args)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), tables))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [x.to("meta") for x in make("odd", torch.float32, "cpu")[0]]
    geometry, *rest = settings("odd")
    with FlopCounterMode(display=False) as counter:
        torch.ops.zoo.halo_attention(*inputs, *geometry, *rest)
    # Two products of 14 x 14 keys and two table rows for each of 14 rows or columns, 16 channels, 2 heads.
    assert counter.get_total_flops() == 2 * (2 * 13 * 18) * 2 * 16 * (2 * 14 * 14 + 2 * 14)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    inputs, grad, args = make(name, dtype, "cuda")
    assert_as_exact_as_torch(
        lambda *x: halo_attention(*x, **args, backend="triton"),
        lambda *x: halo_attention(*x, **args, backend="reference"),
        inputs,
        grad,
        NAMES,
    )


@gpu
def test_kernel_sums_table_gradients_over_many_blocks() -> None:
    """More tiles than partial sums: each program adds several."""
    q, kv = torch.randn(3, 200, 200, 16, device="cuda"), torch.randn(3, 200, 200, 32, device="cuda")
    tables = [torch.randn(11, 16, device="cuda") / 4 for _ in range(2)]
    args = dict(heads=1, block=4, halo=1)
    assert_as_exact_as_torch(
        lambda *x: halo_attention(*x, **args, backend="triton"),
        lambda *x: halo_attention(*x, **args, backend="reference"),
        [q, kv, *tables], torch.randn_like(q), NAMES,
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("name", ["stage3", "strided", "regnet", "wide_halo"])
def test_backward_is_deterministic(name: str) -> None:
    inputs, grad, args = make(name, torch.bfloat16, "cuda")
    runs = [with_gradients(lambda *x: halo_attention(*x, **args), inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@gpu
def test_kernel_copies_no_window() -> None:
    q = torch.randn(1, 512, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kv = torch.randn(1, 512, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(27, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    halo_attention(q, kv, table, table, heads=1, block=8, halo=3).sum().backward()
    # The output, its gradient, three gradients, R (half of q) and statistics; windows alone would take six maps.
    assert torch.cuda.max_memory_allocated() - start < 8 * q.numel() * q.element_size()


@gpu
def test_kernel_takes_large_logits_in_float16() -> None:
    """Position logits divided by the scale are beyond float16."""
    (q, kv, *tables), grad, args = make("masked", torch.float16, "cuda")
    args = dict(args, scale=0.01, backend="triton")
    results = with_gradients(lambda *x: halo_attention(*x, **args), [q * 200, kv, *tables], grad)
    assert all(torch.isfinite(x).all() for x in results)
