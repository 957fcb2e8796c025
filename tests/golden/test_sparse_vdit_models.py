"""Models of diffusers with a sparse plan equal an independent definition: outputs, and searches on a whole model."""

from __future__ import annotations

import json
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file
from torch import Tensor

from zoo.heads import sparse_vdit
from zoo.heads.sparse_vdit.context import family_of, noise_level
from zoo.heads.sparse_vdit.decide import decide_paper
from zoo.heads.sparse_vdit.record import Losses, head_errors
from zoo.kernels.tile_sparse import Layout, density, pattern_from_dict

from . import fill
from .cases import Case, find


class VideoCase(Case):
    """A case of this family has no kind of its own: the names of its outputs tell what it is about."""

    def __init__(self, path) -> None:
        self.spec = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self.name, self.model, self.kwargs = self.spec["case"], self.spec["model"], self.spec["kwargs"]
        self.compared: set[str] = set()
        self.kind = self._kind()

    def _kind(self) -> str:
        if hasattr(diffusers, self.model):
            return "model" if "plan" in self.kwargs else "modelsearch" if "candidates" in self.kwargs else "unknown"
        return {"sparse_vdit.search": "search"}.get(self.model, self.model)

    def check(self, name: str, actual: Tensor) -> None:
        expected = self.expected[name]
        rtol, atol = self.spec["rtol"], self.spec["atol"]
        if name == "dense":
            # Numbers of the dense HunyuanVideo are 6e-5 off those in float64, which torch's float32 meets to 2e-6.
            atol *= 2
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}"
        torch.testing.assert_close(
            actual.to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
        )
        self.compared.add(name)

    def build(self) -> torch.nn.Module:
        model = getattr(diffusers, self.model)(**self.kwargs["config"]).eval()
        model.load_state_dict(fill.state_dict(self.spec["params"]))
        assert sum(p.numel() for p in model.parameters()) == self.spec["num_params"]
        return model

    def arguments(self, inputs: dict, prefix: str) -> dict:
        return {name: read_input(f"{prefix}.{name}", spec) for name, spec in inputs.items()}


def read_input(name: str, spec: dict):
    kind = spec["kind"]
    if kind == "image":
        return fill.image(name, spec["shape"])
    if kind == "value":
        return torch.tensor(spec["value"], dtype=getattr(torch, spec["dtype"]))
    if kind == "lengths":
        return (torch.arange(spec["T"]) < torch.tensor(spec["valid"])[:, None]).to(getattr(torch, spec["dtype"]))
    if kind == "rotary":
        return get_3d_rotary_pos_embed(**spec["kwargs"])
    if kind == "python":
        return spec["value"]
    raise ValueError(f"unknown kind {kind!r} of input {name!r}")


def plan_of(model: torch.nn.Module, kwargs: dict, granularity: str = "block") -> sparse_vdit.SparsePlan:
    described = sparse_vdit.describe_model(model)
    assert described["layers"] == kwargs["layers"]
    patterns = [p for by_layer in kwargs["plan"] for p in by_layer]
    heads = described["heads"]
    assign = [[list(range(n * heads, (n + 1) * heads)) for n in range(len(kwargs["plan"]))]]
    return sparse_vdit.SparsePlan(
        described, kwargs["text_position"], kwargs["tile"], granularity, [0, 1], patterns, assign
    )


def run_model(case: VideoCase) -> None:
    model, inputs = case.build(), case.arguments(case.spec["inputs"], case.name)

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    dense = run()
    case.check("dense", dense)
    plan = plan_of(model, case.kwargs)
    full = sparse_vdit.uniform_plan(plan.model, plan.text_position, tile=plan.tile)
    with sparse_vdit.use(model, full):
        assert torch.equal(run(), dense)
    with sparse_vdit.use(model, plan_of(model, case.kwargs, "element")):
        case.check("sparse.element", run())
    seen = []
    first = model.get_submodule(plan.layers[0])
    watch = first.register_forward_hook(lambda module, args, out: seen.append(out))
    with sparse_vdit.use(model, plan) as handle:
        case.check("sparse.block", run())
        # The grid comes from the call, and is the case's.
        assert handle.hook.step.layout.grid == tuple(case.kwargs["grid"])
    watch.remove()
    returned = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
    for i, value in enumerate(returned):
        case.check(f"layer0.out{i}", value)
    assert torch.equal(run(), dense)


def run_model_search(case: VideoCase) -> None:
    """Each pair of lambda and epsilon is a search of its own, as chosen outputs go on into later layers."""
    kwargs, model = case.kwargs, case.build()
    calls = [
        dict(case.arguments(inputs, f"{case.name}.{s}"), return_dict=False)
        for s, inputs in enumerate(case.spec["inputs"])
    ]
    for i, (lam, eps) in enumerate(kwargs["pairs"]):
        samples, seen = [], []
        watch = model.register_forward_hook(lambda module, args, out, kept=samples: kept.append(out[0]))
        with mock.patch.object(Losses, "add", recording_add(seen)):
            plan = sparse_vdit.search(
                model, calls, method="paper", lam=lam, eps=eps, candidates=kwargs["candidates"], bins="steps",
                dense_steps=0, grid=kwargs["grid"], tile=kwargs["tile"], progress=False,
            )  # fmt: skip
        watch.remove()
        assert plan.search["sparsity"] == pytest.approx(kwargs["candidate_sparsity"])
        layers = len(kwargs["layers"])
        case.check(f"mse.{i}", torch.stack(seen).unflatten(0, (len(calls), layers)))
        rising = family_of(model).rising_time
        levels = [float(noise_level(call["timestep"], rising)) for call in calls]
        modes = [plan.assign[plan.bin_of(level)] for level in levels]
        check_modes(case, i, torch.tensor(modes))
        case.check(f"sample.{i}", torch.stack(samples))


def recording_add(seen: list):
    add = Losses.add

    def record(self, step, layer, errors):
        seen.append(errors.mse)
        add(self, step, layer, errors)

    return record


def check_modes(case: VideoCase, i: int, modes: Tensor) -> None:
    assert torch.equal(modes, case.expected[f"mode.{i}"].to(modes)), f"mode.{i} differs"
    counts = modes.flatten().bincount(minlength=1 + len(case.kwargs["candidates"])).tolist()
    assert counts == case.spec["expected_scalars"][str(i)]["counts"]
    case.compared.add(f"mode.{i}")


def run_search(case: VideoCase) -> None:
    kwargs = case.kwargs
    layout = Layout(kwargs["grid"], kwargs["text_tokens"], kwargs["text_position"], kwargs["tile"])
    candidates = [pattern_from_dict(p) for p in kwargs["candidates"]]
    sparsity = torch.tensor([1 - density(p, layout) for p in candidates], dtype=torch.float64)
    assert sparsity.tolist() == pytest.approx(kwargs["candidate_sparsity"])
    steps, layers = range(kwargs["steps"]), range(kwargs["layers"])
    errors = [head_errors(*search_inputs(case, s, n), layout, candidates)[0] for s in steps for n in layers]
    mse = torch.stack([e.mse for e in errors]).unflatten(0, (len(steps), len(layers)))
    case.check("mse", mse)
    case.check("energy", torch.stack([e.energy for e in errors]).unflatten(0, (len(steps), len(layers))))
    for i, (lam, eps) in enumerate(kwargs["pairs"]):
        check_modes(case, i, decide_paper(mse, sparsity, lam, eps))


def search_inputs(case: VideoCase, s: int, layer: int) -> list[Tensor]:
    """Queries, keys and values [1, M, S, D] of made-up heads: noise in which each type of head hides its pattern."""
    kwargs, name = case.kwargs, case.name
    (frames, height, width), T, M, D = kwargs["grid"], kwargs["text_tokens"], kwargs["heads"], kwargs["head_dim"]
    n = height * width
    V = frames * n
    q, k, v = (fill.image(f"{name}.{x}.{s}.{layer}", (1, V + T, M, D)).double() for x in "qkv")
    q, k = 0.3 * q, 0.3 * k
    video = slice(T, None) if kwargs["text_position"] == "first" else slice(0, V)
    i = torch.arange(V, dtype=torch.float64)
    frequency = torch.pi * torch.arange(1, D // 2 + 1) / V

    def phase(t: Tensor) -> Tensor:
        angle = t[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    for m in range(M):
        kind = kwargs["head_types"][(m + 3 * layer + s) % len(kwargs["head_types"])]
        head_q, head_k, head_v = (x[0, video, m] for x in (q, k, v))
        if kind in ("diag", "mdiag"):
            place = i if kind == "diag" else (i % n) * frames + i // n
            head_q += 2 * phase(place)
            head_k += 2 * phase(place)
        elif kind == "stripe":
            head_q[:, 0] += 6
            head_k[:n, 0] += 6
        elif kind == "skip":
            head_v *= 0.02
        elif kind == "full":
            angle = 2 * torch.pi * torch.stack([i / V, (i % n) / n])
            head_v += (2 + 4 * angle.cos().sum(0))[:, None]
        else:
            raise ValueError(f"unknown type of head {kind!r}")
    return [x.transpose(1, 2) for x in (q, k, v)]


RUNNERS = {"model": run_model, "modelsearch": run_model_search, "search": run_search}
# Masks and the op itself have a test of their own.
ELSEWHERE = ("sparse_vdit.masks", "sparse_vdit.attention")


@pytest.mark.parametrize("path", find("sparse_vdit"), ids=lambda p: p.stem)
def test_golden(path) -> None:
    case = VideoCase(path)
    if case.kind in ELSEWHERE:
        pytest.skip(f"{case.kind} is a case of the op")
    assert case.kind in RUNNERS, f"no runner for kind {case.kind!r}"
    RUNNERS[case.kind](case)
    missing = set(case.spec["outputs"]) - case.compared
    assert not missing, f"outputs never compared: {sorted(missing)}"


def test_cases_are_found() -> None:
    assert any(VideoCase(path).kind == "model" for path in find("sparse_vdit"))
