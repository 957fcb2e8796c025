"""Searches: decisions against brute force, the run through a pipeline, resuming, and what goes wrong."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch
from PIL import Image

from zoo.heads import sparse_vdit
from zoo.heads.sparse_vdit.calibrate import ColumnMass
from zoo.heads.sparse_vdit.context import Step
from zoo.heads.sparse_vdit.decide import decide_budget, decide_paper
from zoo.heads.sparse_vdit.record import head_errors, measure_costs
from zoo.heads.sparse_vdit.search import _fingerprint, _grouping, _handled
from zoo.kernels.tile_sparse import Diagonal, Layout, Skip, VerticalStripe, tile_sparse_attention

from .sparse_vdit_models import GRID, HEADS, LATENT, TEXT, TILE, build

CANDIDATES = [
    {"pattern": "skip"},
    {"pattern": "diagonal", "window": 0.5},
    {"pattern": "multi_diagonal", "window": 0.5},
    {"pattern": "vertical_stripe", "frames": [0]},
]


class Pipeline:
    """The least of a pipeline: a schedule, and two calls of the transformer a step for guidance."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.tiny = build("wan")
        # Call and step of an interruption.
        self.stop = stop
        self.transformer = self.tiny.model
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.bar: dict = {}
        self.prompts: list[str] = []

    def set_progress_bar_config(self, **config) -> None:
        self.bar = self._progress_bar_config = config

    def __call__(self, prompt, num_inference_steps=10, generator=None, output_type="np"):
        assert output_type == "latent"
        self.prompts.append(prompt)
        x = torch.randn(1, 4, *LATENT, generator=generator)
        # A text "encoder" of the length of the prompt.
        text = torch.full((1, TEXT, 16), len(prompt) / 10)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            if (len(self.prompts), i) == self.stop:
                raise KeyboardInterrupt
            call = dict(hidden_states=x, timestep=t.expand(1), return_dict=False)
            with torch.no_grad():
                guided = self.transformer(encoder_hidden_states=text, **call)[0]
                plain = self.transformer(encoder_hidden_states=0 * text, **call)[0]
            x = self.scheduler.step(plain + 2 * (guided - plain), t, x, return_dict=False)[0]
        return x


def search(pipe, prompts=("a cat",), **changes):
    settings = dict(
        candidates=CANDIDATES, tile=TILE, generator=torch.Generator().manual_seed(3), progress=False, density=0.5
    )
    return sparse_vdit.search(pipe, list(prompts), **{**settings, **changes})


def test_paper_decision_breaks_ties_low_and_keeps_full_above_epsilon() -> None:
    mse = torch.tensor([[0.5, 0.1, 0.1], [2.0, 1.0, 0.8], [0.0, 0.0, 0.0]])
    sparsity = torch.tensor([1.0, 0.6, 0.6])
    # Losses with lambda 0.5: [.5, .3, .3], [2, 1.2, 1.0], [0, .2, .2]
    assert decide_paper(mse, sparsity, 0.5, 0.9).tolist() == [2, 0, 1]
    assert decide_paper(mse, sparsity, 0.5, 1.0001).tolist() == [2, 3, 1]


@pytest.mark.parametrize("target", [0.15, 0.4, 0.7, 1.0])
def test_budget_decision_is_near_the_best(target) -> None:
    generator = torch.Generator().manual_seed(0)
    cost, weight = torch.tensor([0.0, 0.2, 0.5]), torch.tensor([1.0, 2.0])
    error = torch.rand(2, 3, 3, generator=generator) * torch.tensor([1.0, 0.6, 0.2])
    choice = decide_budget(error, cost, weight, target)
    errors = torch.cat([torch.zeros(2, 3, 1), error], -1) * weight[:, None, None]
    costs = torch.cat([torch.ones(1), cost]).expand(2, 3, 4) * weight[:, None, None]

    def total(values, pick):
        return float(values.gather(-1, pick[..., None]).sum())

    limit = target * 3 * 3 + 1e-6
    assert total(costs, choice) <= limit
    options = (torch.tensor(o).view(2, 3) for o in itertools.product(range(4), repeat=6))
    best = min(total(errors, o) for o in options if total(costs, o) <= limit)
    # Lagrange's solution is on the convex hull; it misses the best by less than one upgrade of a head.
    assert total(errors, choice) <= best + float(errors.max()) / 2
    if target == 1.0:
        assert (choice == 0).all()


def test_budget_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="costs only 0.100: the cheapest candidates cost 0.200"):
        decide_budget(torch.rand(1, 4, 2), torch.tensor([0.2, 0.5]), torch.ones(1), 0.1)


def test_head_errors_are_those_of_the_op() -> None:
    torch.manual_seed(0)
    layout = Layout(GRID, TEXT, "last", TILE)
    q, k, v = torch.randn(3, 2, HEADS, layout.tokens, 8)
    lengths, candidates = torch.tensor([TEXT, 4]), [Skip(), Diagonal(0.5), VerticalStripe((0,))]
    errors, out = head_errors(q, k, v, layout, candidates, lengths)
    assert errors.mse.shape == (HEADS, 3)
    dense = tile_sparse_attention(q, k, v, torch.zeros(HEADS).long(), [Diagonal(9)], layout, text_length=lengths)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(errors.energy, dense.square().mean((0, 2, 3)).double())
    # A skipped head loses all that it has.
    torch.testing.assert_close(errors.mse[:, 0], errors.energy)
    other = tile_sparse_attention(q, k, v, torch.zeros(HEADS).long(), candidates[1:2], layout, text_length=lengths)
    torch.testing.assert_close(errors.mse[:, 1], (other - dense).square().mean((0, 2, 3)).double())


def test_budget_search_of_a_pipeline() -> None:
    pipe = Pipeline()
    plan = search(pipe, ["a cat", "a longer prompt"], bins=3, dense_steps=0.2, samples_per_bin=2, grid=GRID)
    sigmas = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    # Two dense steps, then 8 steps in three bins; the edges lie between steps.
    assert [plan.bin_of(s) for s in sigmas] == [3, 3, 2, 2, 2, 1, 1, 0, 0, 0]
    assert all(i == 0 for ids in plan.assign[3] for i in ids)
    weights, densities = [3, 2, 3], plan.densities()
    mean = sum(w * sum(d) / len(d) for w, d in zip(weights, densities, strict=False)) / 8
    assert 0.3 < mean <= 0.5
    assert plan.calibrated == {"grid": list(GRID), "text_length": 0, "steps": 10}
    record = plan.search
    assert record["method"] == "budget" and record["prompts"] == 2 and record["measured_steps"] == 6
    assert record["error"]["spread"] > 0 and len(record["error"]["prompts"]) == 2
    assert 0 < record["error"]["mean"] < 1
    assert sparse_vdit.SparsePlan.from_dict(plan.to_dict()) == plan
    assert pipe.prompts == ["a cat", "a longer prompt"]
    # The model is as it was, and the plan fits it.
    assert not pipe.transformer._forward_pre_hooks
    with sparse_vdit.use(pipe, plan):
        assert pipe("a dog", num_inference_steps=4, output_type="latent").isfinite().all()


def test_more_density_means_less_error() -> None:
    errors = [search(Pipeline(), density=d).search["error"]["mean"] for d in (0.3, 0.5, 0.8)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_search_is_repeatable_and_starts_each_prompt_from_its_seed() -> None:
    plans = [search(Pipeline(), ["a", "b"]) for _ in range(2)]
    assert plans[0] == plans[1]
    other = search(Pipeline(), ["a", "b"], generator=torch.Generator().manual_seed(4))
    assert other.search["error"] != plans[0].search["error"]


def test_paper_search_goes_on_with_its_choices() -> None:
    """With an epsilon that nothing meets the run is the dense one; with a huge one every head is replaced."""
    pipe, seen = Pipeline(), []
    dense = pipe("a cat", output_type="latent", generator=torch.Generator().manual_seed(3))
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    plan = search(pipe, method="paper", eps=0.0, lam=0.1, dense_steps=0)
    assert all(i == 0 for b in plan.assign for ids in b for i in ids)
    dense_last = seen[-1]
    seen.clear()
    plan = search(pipe, method="paper", eps=1e9, bins="steps", dense_steps=0.3)
    watch.remove()
    assert not torch.allclose(seen[-1], dense_last)
    assert plan.num_bins == 8
    assert all(i == 0 for ids in plan.assign[-1] for i in ids)
    assert all(i > 0 for b in plan.assign[:-1] for ids in b for i in ids)
    assert plan.search["lambda"] == 0.5
    assert dense.isfinite().all()


def test_dense_layers_stay_dense() -> None:
    plan = search(Pipeline(), dense_layers=1, density=0.3)
    for b in plan.assign:
        assert all(i == 0 for i in b[0])
    assert sum(sum(b[1]) for b in plan.assign) > 0


def test_time_budget_takes_costs() -> None:
    # A diagonal that costs as much as full attention is never worth it.
    plan = search(Pipeline(), time=0.5, costs=[0.01, 1.0, 0.4, 0.4], bins=1)
    ids = {i for b in plan.assign for layer in b for i in layer}
    assert 2 not in ids
    assert plan.search["target"] == "time" and plan.search["costs"] == [0.01, 1.0, 0.4, 0.4]
    measured = search(Pipeline(), time=0.9, bins=1).search["costs"]
    assert len(measured) == 4 and all(c > 0 for c in measured)
    costs = measure_costs([Skip()], Layout((4, 16, 16)), 2, 16, "cpu", torch.float32)
    assert costs[0] < 0.9


def test_search_resumes(tmp_path) -> None:
    state, prompts = tmp_path / "state" / "search.safetensors", ["one", "two", "three"]
    whole = search(Pipeline(), prompts)
    first = Pipeline(stop=(2, 4))
    with pytest.raises(KeyboardInterrupt):
        search(first, prompts, state=state)
    assert not first.transformer._forward_pre_hooks
    second, third = Pipeline(), Pipeline()
    assert search(second, prompts, state=state) == whole
    assert second.prompts == ["two", "three"]
    assert search(third, prompts, state=state) == whole
    assert third.prompts == []
    # Deciding anew costs nothing.
    assert search(third, prompts, state=state, density=0.3).search["value"] == 0.3
    for changes, name in (
        (dict(candidates=CANDIDATES[:2]), "candidates"),
        (dict(call_kwargs={"num_inference_steps": 8}), "prompts"),
        (dict(method="paper"), "method"),
    ):
        with pytest.raises(ValueError, match=f"another search: {name} differ"):
            search(third, prompts, state=state, **changes)


def test_search_says_what_is_wrong() -> None:
    pipe = Pipeline()
    for changes, message in (
        (dict(method="magic"), "method must be one of"),
        (dict(prompts=[]), "at least one prompt"),
        (dict(bins=0), "bins must be a positive number"),
        (dict(dense_steps=1.0), "dense_steps must be a share"),
        (dict(density=0), "target density or time must lie in"),
        (dict(dense_layers=2), "dense_layers must be less than the 2 layers"),
        (dict(candidates=[]), "candidates must be 1 to 255 patterns"),
        (dict(costs=[1.0]), "costs go with a target time"),
        (dict(candidates=[{"pattern": "spiral"}]), "pattern must be one of"),
        (dict(grid=(9, 9, 9)), r"token grid \(3, 4, 5\), expected \(9, 9, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            search(pipe, **changes)
    with pytest.raises(ValueError, match="prompts must be a list"):
        sparse_vdit.search(pipe, "a cat")
    with pytest.raises(ValueError, match="bare transformer takes mappings"):
        search(pipe.transformer)
    pipe.transformer.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match="Search first, then compile"):
        search(pipe)
    pipe.transformer = torch.compile(Pipeline().transformer, backend="eager")
    with pytest.raises(ValueError, match="Search first, then compile"):
        search(pipe)
    with pytest.raises(NotImplementedError, match="got Linear"):
        search(torch.nn.Linear(1, 1), [{}])


def test_sizes_must_agree_and_stop_the_search_at_once() -> None:
    tiny, ran = build("wan"), []
    tiny.model.register_forward_hook(lambda *args: ran.append(1))
    other = torch.randn(2, 4, 3, 8, 12)
    calls = [dict(tiny.inputs, timestep=torch.tensor([900, 900])), dict(tiny.inputs, hidden_states=other)]
    with pytest.raises(ValueError, match=r"token grid \(3, 4, 6\), expected \(3, 4, 5\)"):
        search(tiny.model, calls)
    assert len(ran) == 1
    assert not tiny.model._forward_pre_hooks


def test_models_that_break_are_reported() -> None:
    tiny = build("wan")
    with torch.no_grad():
        tiny.model.blocks[0].attn1.to_v.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        search(tiny.model, [tiny.inputs], dense_steps=0)


def test_unknown_grids_cannot_be_searched() -> None:
    tiny = build("ltx")
    call = {**tiny.inputs, "video_coords": torch.rand(2, 3, 60)}
    with pytest.warns(UserWarning, match="token grid"), pytest.raises(RuntimeError, match="Nothing was measured"):
        search(tiny.model, [call])


@pytest.mark.parametrize("name", ["cogvideox1.5", "hunyuan", "ltx", "mochi"])
def test_search_of_bare_transformers(name) -> None:
    tiny = build(name)
    calls = [{**tiny.inputs, "timestep": torch.tensor([t, t])} for t in (900, 500, 100)]
    plan = search(tiny.model, calls, bins=3, dense_steps=0, density=0.4)
    assert plan.num_bins == 3
    assert plan.calibrated["text_length"] == (0 if name == "ltx" else TEXT)
    mean = [sum(d) / len(d) for d in plan.densities()]
    assert sum(mean) / 3 <= 0.4
    dense = tiny()
    with sparse_vdit.use(tiny.model, plan):
        assert (tiny() - dense).abs().max() > 1e-4


def test_experts_share_a_schedule() -> None:
    """Wan 2.2: each transformer is searched on its own part, and dense first steps are those of the whole schedule."""
    pipe = Pipeline()
    pipe.config = type("Config", (), {"boundary_ratio": 0.7})()
    groups_of = _grouping(2, 0.2, _handled(pipe, "transformer"))
    schedule = [1.0, 0.95, 0.9, 0.8, 0.75, 0.6, 0.5, 0.4, 0.2, 0.1]
    assert groups_of(schedule) == ([0, 1], [[2, 3], [4]])
    groups_of = _grouping(2, 0.2, _handled(pipe, "transformer_2"))
    assert groups_of(schedule)[0] == [] and sum(groups_of(schedule)[1], []) == [5, 6, 7, 8, 9]


def test_fingerprint_tells_inputs_apart() -> None:
    image = Image.new("RGB", (2, 2))
    other = Image.new("RGB", (2, 2), "red")
    x = torch.ones(2, dtype=torch.bfloat16)
    inputs = [
        ["a"],
        ["b"],
        ["a", "b"],
        [{"prompt": "a"}],
        [{"image": image}],
        [{"image": other}],
        [{"x": x}],
        [{"x": -x}],
    ]
    assert len({_fingerprint(prompts, {}) for prompts in inputs}) == len(inputs)
    assert _fingerprint(["a"], {"height": 8}) != _fingerprint(["a"], {"height": 9})
    assert _fingerprint([{"x": x, "y": 1}], {}) == _fingerprint([{"y": 1, "x": x.clone()}], {})


def test_progress_bar_gives_the_pipelines_own_back(capsys) -> None:
    pipe = Pipeline()
    pipe.set_progress_bar_config(desc="mine")
    search(pipe, progress=True)
    assert pipe.bar == {"desc": "mine"}
    out, err = capsys.readouterr()
    assert out == ""


@pytest.mark.parametrize("position", ["first", "last"])
def test_column_mass_is_that_of_the_attention_matrix(position) -> None:
    layout, lengths = Layout(GRID, TEXT, position, TILE), torch.tensor([TEXT, 4])
    q, k = torch.randn(2, 2, HEADS, layout.tokens, 12).unbind()
    start = TEXT if position == "first" else 0
    token = torch.arange(layout.tokens) - (0 if position == "first" else layout.video)
    padded = (token >= lengths[:, None]) & (token < TEXT)
    padded[:, start : start + layout.video] = False
    logits = (q @ k.mT * 12**-0.5).masked_fill(padded[:, None, None], float("-inf"))
    columns = logits.softmax(-1)[:, :, start : start + layout.video, start : start + layout.video].sum((0, 1, 2))
    every = ColumnMass(rows=1000)
    every.add(q, k, layout, lengths)
    expected = torch.stack([part.sum() for part in columns.double().split(TILE[1])])
    torch.testing.assert_close(every.mass, expected, rtol=1e-5, atol=1e-6)
    best = set(expected.topk(3).indices.tolist())
    assert set(every.top(3 / len(expected))) == best and list(every.top(1)) == list(range(len(expected)))
    assert len(every.top(1e-9)) == 1
    # A few rows: evenly spaced ones, each with a sum of one over video and text.
    some = ColumnMass(rows=5)
    some.add(q, k, layout)
    assert 0 < some.mass.sum() < 2 * HEADS * 5


def test_calibrated_blocks_are_those_of_most_attention() -> None:
    pipe = Pipeline()
    dense = Pipeline()("a cat", 4, torch.Generator().manual_seed(3), "latent")
    layout = Layout(GRID, tile=TILE)
    settings = dict(tile=TILE, generator=torch.Generator().manual_seed(3), call_kwargs={"num_inference_steps": 4})
    stripe = sparse_vdit.calibrate_blocks(pipe, ["a cat"], share=0.3, **settings)
    assert len(stripe["blocks"]) == round(0.3 * layout.key_tiles[0])
    # The model is as before.
    after = pipe("a cat", 4, torch.Generator().manual_seed(3), "latent")
    assert torch.equal(after, dense)
    plan = search(pipe, candidates=[stripe], density=0.6, call_kwargs={"num_inference_steps": 4}, dense_steps=0)
    assert plan.parsed()[1] == VerticalStripe(blocks=tuple(stripe["blocks"]), block_size=TILE[1])
    assert any(i == 1 for layers in plan.assign for ids in layers for i in ids)


@pytest.mark.parametrize("change", [dict(share=0), dict(share=1.1), dict(rows=0), dict(prompts=[])])
def test_calibration_refuses_bad_arguments(change) -> None:
    with pytest.raises(ValueError, match="share must lie in|prompts must be"):
        sparse_vdit.calibrate_blocks(Pipeline(), change.pop("prompts", ["a cat"]), **change)


def test_calibration_refuses_videos_of_two_sizes() -> None:
    recorder, step = ColumnMass(4), Step()
    step.layout = Layout(GRID)
    assert recorder.begin_call(step, 2) == [True, True]
    step.layout = Layout((1, 2, 3))
    with pytest.raises(ValueError, match="all prompts need one size"):
        recorder.begin_call(step, 2)
