"""Steps of whole video transformers of diffusers, dense and under a sparse plan, split into attention and the rest.

Models have the width of the released ones, random weights made on the device, and all layers or as many as the suite
says. Providers:

- ``stock``: the model as diffusers runs it, torch's attention preferring cuDNN.
- ``dense``: the attention processors of a sparse plan, in which torch's attention (cuDNN alone on a GPU) takes all
  pairs, without a mask. The baseline: HunyuanVideo's own mask would keep it from the fast kernels.
- ``zoo``: the same processors under the plan; ``zoo_fp8`` with queries and keys in FP8.

Attention is what happens between projected, normalised and rotated queries, keys and values, and the output
projection.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.bench import report, suites, timing

if TYPE_CHECKING:
    from zoo.bench.runner import Options, Outcome
    from zoo.heads.sparse_vdit import SparsePlan
    from zoo.kernels.tile_sparse import Layout

PROVIDERS = ("stock", "dense", "zoo", "zoo_fp8")
COMPILE_MODES = ("none", "default")
BASELINE = "dense"
# Relative distance of `dense` from `stock` that rounding in 16 bits may leave behind some forty layers.
MAX_DISTANCE = 0.1
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Released(NamedTuple):
    """A released model.

    Attributes:
        cls: Its class in diffusers.
        config: Where it differs from the defaults of the class.
        layers: Number of layers, by the argument that sets it.
        inputs: From its configuration, the suite's entry and a maker of random tensors, the arguments of a call.
    """

    cls: str
    config: dict[str, Any]
    layers: dict[str, int]
    inputs: Callable[[Any, Mapping[str, Any], Callable[..., Tensor]], dict[str, Any]]


def _wan_inputs(config: Any, entry: Mapping[str, Any], randn: Callable[..., Tensor]) -> dict[str, Any]:
    _, p_h, p_w = config.patch_size
    size = (entry["frames"], entry["height"] * p_h, entry["width"] * p_w)
    return {
        "hidden_states": randn(1, config.in_channels, *size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, entry["text"], config.text_dim),
    }


def _hunyuan_inputs(config: Any, entry: Mapping[str, Any], randn: Callable[..., Tensor]) -> dict[str, Any]:
    p = config.patch_size
    size = (entry["frames"], entry["height"] * p, entry["width"] * p)
    return {
        "hidden_states": randn(1, config.in_channels, *size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, entry["text"], config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, entry["text"], dtype=torch.int64),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "guidance": 1000 * randn(1),
    }


def _cogvideox_inputs(config: Any, entry: Mapping[str, Any], randn: Callable[..., Tensor]) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    p, frames, plane = config.patch_size, entry["frames"], (entry["height"], entry["width"])
    rotary = get_3d_rotary_pos_embed(
        config.attention_head_dim, None, grid_size=plane, temporal_size=frames, grid_type="slice", max_size=plane
    )
    return {
        "hidden_states": randn(1, frames * config.patch_size_t, config.in_channels, plane[0] * p, plane[1] * p),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, entry["text"], config.text_embed_dim),
        "image_rotary_emb": rotary,
    }


MODELS = {
    "wan_14b": Released("WanTransformer3DModel", {}, {"num_layers": 40}, _wan_inputs),
    "hunyuan": Released(
        "HunyuanVideoTransformer3DModel", {}, {"num_layers": 20, "num_single_layers": 40}, _hunyuan_inputs
    ),
    "cogvideox15_5b": Released(
        "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=48, sample_width=300, sample_height=300, sample_frames=81, patch_size_t=2,
            use_rotary_positional_embeddings=True, patch_bias=False,
        ),
        {"num_layers": 42},
        _cogvideox_inputs,
    ),
}  # fmt: skip


def layer_config(released: Released, count: int | None) -> dict[str, int]:
    """Arguments for about `count` layers in the released proportion; None leaves all."""
    total = sum(released.layers.values())
    share = 1 if count is None else count / total
    return {name: max(1, round(number * share)) for name, number in released.layers.items()}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(entry: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A transformer of random weights, made on the device in its dtype, save what diffusers keeps in float32."""
    import diffusers

    released = MODELS[entry["model"]]
    config = {**released.config, **layer_config(released, entry.get("layers")), **entry.get("config", {})}
    torch.manual_seed(0)
    with _default_dtype(dtype), device:
        model = getattr(diffusers, released.cls)(**config)
    precise = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        if any(part in precise for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def make_inputs(model: nn.Module, entry: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of a call at the token grid of the entry."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    inputs = MODELS[entry["model"]].inputs(model.config, entry, randn)
    move = lambda x: tuple(y.to(device) for y in x) if isinstance(x, tuple) else x.to(device)  # noqa: E731
    return {name: move(value) for name, value in inputs.items()}


def mixed_plan(model: nn.Module, entry: Mapping[str, Any]) -> SparsePlan:
    """A plan of a mean density: the search's default candidates in turn, between full heads (or skipped ones)."""
    from zoo.heads.sparse_vdit import CANDIDATES, SparsePlan, describe_model
    from zoo.heads.sparse_vdit.context import family_of
    from zoo.kernels.tile_sparse import DEFAULT_TILE, density, pattern_from_dict

    described, position = describe_model(model), family_of(model).text_position
    text = 0 if position == "none" else entry["text"]
    grid = (entry["frames"], entry["height"], entry["width"])
    patterns = [{"pattern": "full"}, {"pattern": "skip"}, *(c for c in CANDIDATES if c["pattern"] != "skip")]
    fields = dict(text_position=position, tile=DEFAULT_TILE, granularity="block", bins=(0, 1), patterns=patterns)
    calibrated = {"grid": list(grid), "text_length": text}
    empty = SparsePlan(described, assign=[[[0] * described["heads"]] * len(described["layers"])], **fields)
    layout: Layout = empty.layout(grid, text)
    shares = [density(pattern_from_dict(c), layout) for c in patterns[2:]]
    mean, target = sum(shares) / len(shares), entry["density"]
    # Heads that are not sparse: full ones lift the mean, skipped ones lower it.
    other, share = (0, (target - mean) / max(1 - mean, 1e-9)) if target >= mean else (1, 1 - target / mean)
    ids, taken = [], 0
    for head in range(described["heads"] * len(described["layers"])):
        if int((head + 1) * share) > int(head * share):
            ids.append(other)
        else:
            ids.append(2 + taken % len(shares))
            taken += 1
    M = described["heads"]
    assign = [[ids[start : start + M] for start in range(0, len(ids), M)]]
    return SparsePlan(described, assign=assign, calibrated=calibrated, **fields)


class Clock:
    """Sums up time spans of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spans = device, []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Take the time of a block."""
        begin = self._now()
        yield
        self.spans.append((begin, self._now()))

    def read(self) -> float:
        """Seconds since the last reading."""
        timing.synchronize(self.device)
        on_gpu = self.device.type == "cuda"
        spans = [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in self.spans]
        self.spans.clear()
        return sum(spans)


class TimedAttention:
    """The attention of one run, sparse or dense, and its clock; the last one made is at work."""

    current: TimedAttention

    def __init__(self, step: Any, dense: bool, device: torch.device) -> None:
        self.step, self.dense, self.clock = step, dense, Clock(device)
        TimedAttention.current = self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, text_length: Tensor | None) -> Tensor:
        from zoo.kernels.tile_sparse import tile_sparse_attention

        step = self.step
        with self.clock.span():
            if self.dense:
                return dense_attention(q, k, v)
            options = dict(text_length=text_length, qk_dtype=step.qk_dtype, backend=step.backend)
            return tile_sparse_attention(q, k, v, ids, step.table, step.layout, **options)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all pairs, in q's order of memory; cuDNN's on a GPU."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v)
    return out if out.stride() == q.stride() else torch.empty_like(q).copy_(out)


# A registered op, so that compiled blocks take the time of attention too.
@torch.library.custom_op("zoo_bench::video_attention", mutates_args=())
def _video_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, text_length: Tensor | None) -> Tensor:
    return TimedAttention.current(q, k, v, ids, text_length)


@_video_attention.register_fake
def _(q, k, v, ids, text_length):
    return torch.empty_like(q)


@contextlib.contextmanager
def installed(model: nn.Module, plan: SparsePlan, provider: str, device: torch.device) -> Iterator[TimedAttention]:
    """The plan's processors on a model, with the timed attention of a provider."""
    from zoo.heads.sparse_vdit.context import Step
    from zoo.heads.sparse_vdit.plugin import _install

    class TimedStep(Step):
        def attention(self, layer, ids, q, k, v, text_length):
            return torch.ops.zoo_bench.video_attention(q, k, v, ids, text_length)

    # The kernels, where there is a GPU, whether or not "auto" takes them.
    backend = "triton" if device.type == "cuda" else "auto"
    step = TimedStep(backend, torch.float8_e4m3fn if provider == "zoo_fp8" else None)
    with _install(model, plan, step, "error"):
        yield TimedAttention(step, provider == BASELINE, device)


@contextlib.contextmanager
def compiled(model: nn.Module, mode: str, **settings: Any) -> Iterator[None]:
    """Blocks of the model compiled one by one, as diffusers compiles repeated blocks; settings of `torch.compile`."""
    from zoo.heads.sparse_vdit.context import family_of

    blocks = [block for name in family_of(model).layers for block in model.get_submodule(name)]
    torch.compiler.reset()
    if mode != "none":
        for block in blocks:
            block.compile(dynamic=False, **settings)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


class Measured(NamedTuple):
    """Seconds of whole steps and of their attention (None where it was not timed), peak memory in MiB, an output."""

    step: list[float]
    attention: list[float] | None
    memory: float | None
    out: Tensor


def measure(call: Callable[[], Tensor], clock: Clock | None, device: torch.device, samples: int) -> Measured:
    """Time some steps after one that compiles."""
    call()
    timing.synchronize(device)
    on_gpu = device.type == "cuda"
    if clock:
        clock.read()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    steps, attention = [], []
    for _ in range(samples):
        start = time.perf_counter()
        out = call()
        timing.synchronize(device)
        steps.append(time.perf_counter() - start)
        if clock:
            attention.append(clock.read())
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None
    return Measured(steps, attention if clock else None, memory, out)


def run_provider(
    provider: str, model: nn.Module, plan: SparsePlan, inputs: dict[str, Any], device: torch.device, samples: int
) -> Measured:
    """Time one provider."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    if provider == "stock":
        preference = sdpa_kernel(PREFERRED, set_priority=True) if device.type == "cuda" else contextlib.nullcontext()
        with preference:
            return measure(call, None, device, samples)
    with installed(model, plan, provider, device) as attention:
        return measure(call, attention.clock, device, samples)


def table_time(plan: SparsePlan, device: torch.device) -> float:
    """Seconds to build the tables of a plan, which all layers and steps of a video share."""
    from zoo.kernels.tile_sparse import patterns

    layout = plan.layout(tuple(plan.calibrated["grid"]), plan.calibrated["text_length"])
    timing.synchronize(device)
    patterns._pattern_table.cache_clear()
    start = time.perf_counter()
    patterns.pattern_table(plan.parsed(), layout, device)
    timing.synchronize(device)
    return time.perf_counter() - start


def describe(entry: Mapping[str, Any], mode: str) -> str:
    """An entry as one string."""
    released = MODELS[entry["model"]]
    layers, total = sum(layer_config(released, entry.get("layers")).values()), sum(released.layers.values())
    grid = "x".join(str(entry[name]) for name in ("frames", "height", "width"))
    return f"grid={grid} text={entry['text']} layers={layers}/{total} density={entry['density']} compile={mode}"


def rows_of(measured: Measured, tables: float | None, **columns: Any) -> list[dict[str, Any]]:
    """Rows of the whole step, of attention and the rest where attention was timed, and of building a plan's tables."""
    parts = {"step": measured.step, **({} if tables is None else {"tables": [tables]})}
    if measured.attention is not None:
        pairs = zip(measured.step, measured.attention, strict=True)
        parts |= {"attention": measured.attention, "rest": [step - attention for step, attention in pairs]}
    return [
        {
            **columns,
            "mode": mode,
            "metric": "wall_time",
            "unit": "ms",
            **timing.percentiles(seconds).scaled(1e3)._asdict(),
            "memory_mib": measured.memory if mode == "step" else None,
        }
        for mode, seconds in parts.items()
    ]


def run(suite: suites.Suite, options: Options, outcome: Outcome) -> None:
    """Time every transformer of a suite."""
    for entry in suite.settings["transformers"]:
        for dtype in options.dtypes or suite.settings.get("dtypes", ["bfloat16"]):
            modes = suite.settings.get("compile", ["none"])
            wanted = {mode: _wanted(suite, entry, dtype, mode, options) for mode in modes}
            if not any(wanted.values()):
                continue
            try:
                _run_entry(suite, entry, dtype, wanted, options, outcome)
            except Exception as error:  # out of memory: this model only
                outcome.fail(f"{entry['model']} {dtype}: {type(error).__name__}: {str(error)[:300]}")
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()


def _wanted(suite: suites.Suite, entry: Mapping[str, Any], dtype: str, mode: str, options: Options) -> list[str]:
    providers = entry.get("providers", suite.settings.get("providers", PROVIDERS[:3]))
    config = describe(entry, mode)
    return [p for p in providers if options.wants(suite.name, entry["model"], config, dtype, "step", p)]


def _run_entry(
    suite: suites.Suite, entry: Mapping[str, Any], dtype: str, wanted: dict[str, list[str]], options: Options,
    outcome: Outcome,
) -> None:  # fmt: skip
    from zoo.bench.runner import note

    device, samples = options.device, 1 if options.quick else suite.settings.get("samples", 3)
    model = build_model(entry, suites.DTYPES[dtype], device)
    inputs, plan = make_inputs(model, entry, suites.DTYPES[dtype], device), mixed_plan(model, entry)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    means = [x for layers in plan.densities() for x in layers]
    note(f"{entry['model']}: {billions:.2f} billion parameters, plan of mean density {sum(means) / len(means):.4f}")
    for mode, providers in wanted.items():
        config, found, rows = describe(entry, mode), {}, []
        for provider in providers:
            label = f"{entry['model']} [{config}] {dtype} {provider}"
            note(label)
            try:
                with compiled(model, mode):
                    found[provider] = run_provider(provider, model, plan, inputs, device, samples)
            except Exception as error:
                message = f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                note(message) if provider == "stock" else outcome.fail(message)
                continue
            problem = _problem(provider, found)
            if problem:
                outcome.fail(f"{label}: refused, no time reported: {problem}")
                continue
            columns = dict(suite=suite.name, name=entry["model"], provider=provider, config=config, dtype=dtype)
            tables = table_time(plan, device) if provider.startswith("zoo") else None
            rows += [report.make_row(device, **row) for row in rows_of(found[provider], tables, **columns)]
        _add_speedups(rows)
        outcome.add(rows)


def _problem(provider: str, found: dict[str, Measured]) -> str | None:
    """What is wrong with an output: not finite, or dense attention that differs from the stock model's."""
    out = found[provider].out
    if not bool(out.isfinite().all()):
        return "the output is not finite"
    if provider == BASELINE and "stock" in found:
        stock = found["stock"].out.double()
        distance = float((out.double() - stock).norm() / stock.norm())
        if not distance <= MAX_DISTANCE:
            return f"its output is off the stock model's by {distance:.3g} of the latter's norm"
    return None


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    """Speed-up of steps, attention and rest against the dense baseline."""
    base = {row["mode"]: row["p50"] for row in rows if row["provider"] == BASELINE}
    for row in rows:
        if row["mode"] in base:
            row["speedup"] = float(f"{base[row['mode']] / row['p50']:.4g}")
