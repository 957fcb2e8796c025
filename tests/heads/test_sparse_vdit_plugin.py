"""Plans on diffusers models: exactness, undoing, noise levels, grids, and life beside the rest of diffusers."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file

from zoo.heads import sparse_vdit
from zoo.heads.sparse_vdit import context, processors

from .sparse_vdit_models import BUILDERS, GRID, HEADS, PATTERNS, TEXT, build

ALL = pytest.mark.parametrize("name", BUILDERS)


def snapshot(model) -> dict:
    """Everything that a plan could leave behind."""
    return {
        "processors": [(n, id(m.processor)) for n, m in model.named_modules() if hasattr(m, "processor")],
        "hooks": len(model._forward_pre_hooks),
        "attributes": sorted(vars(model)),
        "state": list(model.state_dict()),
    }


@ALL
def test_full_plan_is_the_stock_model(name) -> None:
    tiny = build(name)
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.full_plan()) as handle:
        assert torch.equal(tiny(), dense)
        assert not any(p.active for p in handle.hook.processors)


@ALL
def test_full_heads_beside_sparse_ones_are_the_stock_heads(name) -> None:
    """The sparse path with every head full differs by rounding only: projections, rotation and text order agree."""
    tiny = build(name)
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.full_plan()) as handle:
        handle.hook.sparse = [[True] * len(handle.hook.processors)]
        torch.testing.assert_close(tiny(), dense, rtol=1e-5, atol=2e-6)
        assert all(p.active for p in handle.hook.processors)


def test_queries_and_keys_in_fp8() -> None:
    tiny = build("hunyuan")
    with sparse_vdit.use(tiny.model, tiny.plan()):
        expected = tiny()
    with sparse_vdit.use(tiny.model, tiny.plan(), qk_dtype=torch.float8_e4m3fn):
        out = tiny()
    assert 1e-5 < (out - expected).norm() / expected.norm() < 0.05


@ALL
def test_remove_restores_the_model(name) -> None:
    tiny = build(name)
    before, dense = snapshot(tiny.model), tiny()
    handle = sparse_vdit.apply_plan(tiny.model, tiny.plan())
    assert (tiny() - dense).abs().max() > 1e-3
    assert handle.hook.step.layout.grid == GRID
    assert list(tiny.model.state_dict()) == before["state"]
    handle.remove()
    handle.remove()
    assert snapshot(tiny.model) == before
    assert torch.equal(tiny(), dense)


@ALL
def test_signatures_name_every_argument(name) -> None:
    """`Attention.forward` drops arguments that the processor's call does not name, rotary embeddings among them."""
    tiny = build(name)
    with sparse_vdit.use(tiny.model, tiny.plan()) as handle:
        for processor, stock in zip(handle.hook.processors, handle._stock, strict=True):
            assert list(inspect.signature(processor.__call__).parameters) == list(
                inspect.signature(stock.__call__).parameters
            )


@ALL
def test_gradients_flow(name) -> None:
    tiny = build(name)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        tiny.model(**tiny.inputs, return_dict=False)[0].square().sum().backward()
    first = tiny.model.get_submodule(tiny.plan().layers[0])
    assert first.to_q.weight.grad.abs().max() > 0


@ALL
def test_deep_copy_has_a_plan_of_its_own(name) -> None:
    tiny = build(name)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        sparse = tiny()
        clone = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.zero_()
        assert torch.equal(clone(**tiny.inputs, return_dict=False)[0], sparse)


@ALL
def test_saved_models_are_plain(name, tmp_path) -> None:
    tiny = build(name)
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.plan()):
        tiny.model.save_pretrained(tmp_path)
    cls = type(tiny.model)
    loaded = cls.from_config(cls.load_config(tmp_path)).eval()
    loaded.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tiny.inputs, return_dict=False)[0], dense)


@ALL
def test_patterns_follow_the_noise_level(name) -> None:
    """Plans of one bin each, put together: the level of the call decides, whatever the number of steps."""
    tiny = build(name)
    both = tiny.plan(bins=2)
    sign = tiny.model.__class__.__name__ == "MochiTransformer3DModel"
    for b, level in enumerate((0.3, 0.8)):
        # Mochi counts time from noise to clean.
        t = 1000 * (1 - level if sign else level)
        call = dict(timestep=torch.tensor([t, t]).to(tiny.inputs["timestep"].dtype))
        with sparse_vdit.use(tiny.model, tiny.plan(assign=[both.assign[b]])):
            expected = tiny(**call)
        with sparse_vdit.use(tiny.model, both) as handle:
            assert torch.equal(tiny(**call), expected)
            assert handle.hook.step.sigma == pytest.approx(level, abs=2e-3)


def test_layers_that_are_full_in_a_bin_run_stock_there() -> None:
    tiny = build("wan")
    full = [[0] * HEADS] * 2
    plan = tiny.plan(bins=2, assign=[full, tiny.plan().assign[0]])
    call = dict(timestep=torch.tensor([100, 100]))
    dense = tiny(**call)
    with sparse_vdit.use(tiny.model, plan) as handle:
        assert torch.equal(tiny(**call), dense)
        assert not any(p.active for p in handle.hook.processors)
        tiny()
        assert all(p.active for p in handle.hook.processors)


def test_time_of_each_token_counts_by_its_noisiest() -> None:
    """Wan 2.2 gives every token a time; the conditioning frame has none."""
    assert context.noise_level(torch.tensor([[0.0, 900.0, 900.0]]), False) == pytest.approx(0.9)
    assert context.noise_level(torch.tensor([100.0, 1000.0]), True) == pytest.approx(0.9)
    assert context.noise_level(500, False) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["hunyuan", "mochi"])
def test_padded_text_changes_nothing(name) -> None:
    tiny = build(name)
    text, padding = tiny.inputs["encoder_hidden_states"].clone(), ~tiny.inputs["encoder_attention_mask"].bool()
    text[padding] += 3
    with sparse_vdit.use(tiny.model, tiny.plan()):
        torch.testing.assert_close(tiny(encoder_hidden_states=text), tiny())


def test_mochi_gathers_valid_text_as_the_stock_processor_does() -> None:
    tiny = build("mochi")
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    dense = tiny(encoder_attention_mask=mask)
    with sparse_vdit.use(tiny.model, tiny.full_plan()) as handle:
        handle.hook.sparse = [[True] * 2]
        torch.testing.assert_close(tiny(encoder_attention_mask=mask), dense, rtol=1e-4, atol=1e-4)


def test_refiner_of_hunyuan_is_left_alone() -> None:
    tiny = build("hunyuan")
    with sparse_vdit.use(tiny.model, tiny.plan()):
        ours = [
            n
            for n, m in tiny.model.named_modules()
            if isinstance(getattr(m, "processor", None), processors.SparseProcessor)
        ]
        assert ours == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


def test_masks_of_queries_and_keys_are_dense() -> None:
    tiny = build("hunyuan")
    block = tiny.model.single_transformer_blocks[0]
    seen = []

    def spy(module, args, kwargs):
        mask = kwargs["attention_mask"]
        seen.append(kwargs)
        return args, dict(kwargs, attention_mask=mask.expand(-1, -1, mask.shape[-1], -1))

    dense = tiny()
    block.attn.register_forward_pre_hook(spy, with_kwargs=True)
    full = [[0] * HEADS, tiny.plan().assign[0][1]]
    with sparse_vdit.use(tiny.model, tiny.plan(assign=[full])):
        torch.testing.assert_close(tiny(), dense)
    assert seen


def test_no_square_mask_is_made(monkeypatch) -> None:
    """HunyuanVideo's mask becomes a length of each sample."""
    tiny, seen = build("hunyuan"), []
    real = context.tile_sparse_attention

    def spy(*args, text_length, **kwargs):
        seen.append(text_length.tolist())
        return real(*args, text_length=text_length, **kwargs)

    monkeypatch.setattr(context, "tile_sparse_attention", spy)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        tiny()
    assert seen == [[TEXT, 5]] * 2


def test_unknown_grid_is_dense_with_one_warning() -> None:
    tiny = build("ltx")
    coords = torch.rand(2, 3, 60)
    dense = tiny(video_coords=coords)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        with pytest.warns(UserWarning, match="token grid of this call is unknown") as caught:
            assert torch.equal(tiny(video_coords=coords), dense)
            assert torch.equal(tiny(video_coords=coords), dense)
        assert len(caught) == 1
        # A known grid is sparse again.
        assert (tiny() - dense).abs().max() > 1e-3


def test_tokens_that_do_not_fit_the_grid_are_dense() -> None:
    tiny = build("ltx")
    tiny.inputs.update(num_frames=2, video_coords=None, rope_interpolation_scale=None)
    tiny.model.rope.forward = lambda hidden_states, *args: (torch.ones(2, 60, 64), torch.zeros(2, 60, 64))
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.plan()), pytest.warns(UserWarning, match="60 tokens where the token grid"):
        assert torch.equal(tiny(), dense)


def blocks_plan(tiny):
    patterns = [*PATTERNS, {"pattern": "vertical_stripe", "blocks": [0, 6], "block_size": 8}]
    assign = [[[5] * HEADS] * 2]
    return tiny.plan(patterns=patterns, assign=assign, calibrated={"grid": list(GRID)})


def test_blocks_are_bound_to_their_grid() -> None:
    tiny = build("wan")
    other = dict(hidden_states=torch.randn(2, 4, 3, 8, 12))
    dense, plan = tiny(**other), blocks_plan(tiny)
    with warnings.catch_warnings(), sparse_vdit.use(tiny.model, plan):
        warnings.simplefilter("error")
        assert (tiny() - build("wan")()).abs().max() > 1e-4
    with sparse_vdit.use(tiny.model, plan), pytest.warns(UserWarning, match="blocks of the token grid"):
        assert torch.equal(tiny(**other), dense)
    with sparse_vdit.use(tiny.model, plan, on_mismatch="error"), pytest.raises(ValueError, match="Search a plan for"):
        tiny(**other)
    with sparse_vdit.use(tiny.model, plan, on_mismatch="nearest") as handle:
        assert (tiny(**other) - dense).abs().max() > 1e-4
        # 60 tokens became 72: the tokens 48..56 lie at 57.6..67.2.
        assert handle.hook.fitting((3, 4, 6))[5].blocks == (0, 1, 7, 8)


def test_wrong_use_is_refused() -> None:
    tiny, plan = build("wan"), build("wan").plan()
    with pytest.raises(NotImplementedError, match="got Linear"):
        sparse_vdit.apply_plan(torch.nn.Linear(1, 1), plan)
    with pytest.raises(ValueError, match="no component 'transformer'"):
        sparse_vdit.apply_plan(object(), plan)
    with pytest.raises(ValueError, match="on_mismatch must be one of"):
        sparse_vdit.apply_plan(tiny.model, plan, on_mismatch="nope")
    with pytest.raises(ValueError, match="backend must be one of"):
        sparse_vdit.apply_plan(tiny.model, plan, backend="nope")
    with pytest.raises(ValueError, match="the class is WanTransformer3DModel there"):
        sparse_vdit.apply_plan(build("ltx").model, plan)
    deeper = dict(plan.model, layers=[*plan.layers, "blocks.2.attn1"])
    with pytest.raises(ValueError, match="no layer 'blocks.2.attn1'"):
        sparse_vdit.apply_plan(tiny.model, tiny.plan(model=deeper, assign=[[[0] * HEADS] * 3]))
    with pytest.raises(ValueError, match="text_position"):
        sparse_vdit.apply_plan(tiny.model, tiny.plan(text_position="last"))
    with sparse_vdit.use(tiny.model, plan), pytest.raises(ValueError, match="remove it first"):
        sparse_vdit.apply_plan(tiny.model, plan)
    tiny.model.blocks[1].attn1.processor = lambda *args: None
    before = snapshot(tiny.model)
    with pytest.raises(ValueError, match="can only replace WanAttnProcessor"):
        sparse_vdit.apply_plan(tiny.model, plan)
    assert snapshot(tiny.model) == before


def test_two_experts_have_a_plan_each() -> None:
    pipe = type("Pipe", (), {})()
    high, low = build("wan"), build("wan")
    pipe.transformer, pipe.transformer_2 = high.model, low.model
    dense = high()
    with sparse_vdit.use(pipe, {"transformer": high.plan(), "transformer_2": low.full_plan()}):
        assert (high() - dense).abs().max() > 1e-3
        assert torch.equal(low(), dense)
    assert torch.equal(high(), dense)
    before = snapshot(high.model)
    with pytest.raises(ValueError, match="no component"):
        sparse_vdit.apply_plan(pipe, {"transformer": high.plan(), "transformer_3": low.plan()})
    assert snapshot(high.model) == before


def test_fused_projections() -> None:
    tiny = build("wan")
    with sparse_vdit.use(tiny.model, tiny.plan()):
        expected = tiny()
        # Wan's own fusing keeps the processors, so it may come at any time.
        tiny.model.fuse_qkv_projections()
        torch.testing.assert_close(tiny(), expected, rtol=1e-4, atol=1e-5)


def test_fusing_cogvideox_needs_the_plan_afterwards() -> None:
    tiny = build("cogvideox1.5")
    with sparse_vdit.use(tiny.model, tiny.plan()) as handle:
        expected = tiny()
        tiny.model.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="FusedCogVideoXAttnProcessor2_0 after the plan was applied"):
            tiny()
        handle.remove()
        assert type(tiny.model.transformer_blocks[0].attn1.processor).__name__.startswith("Fused")
    with sparse_vdit.use(tiny.model, tiny.plan()):
        torch.testing.assert_close(tiny(), expected, rtol=1e-4, atol=1e-5)


def compiled_frames(tiny) -> int:
    """Compile each block on its own, run, and count the graphs. CogVideoX names no repeated blocks for diffusers."""
    blocks = tiny.model.blocks if hasattr(tiny.model, "blocks") else tiny.model.transformer_blocks
    expected = tiny()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(tiny(), expected)
    return counter.frame_count


@ALL
def test_compiled_blocks_share_graphs(name) -> None:
    """As many graphs as the stock model has, one or two for all blocks, although the plans of the layers differ."""
    tiny = build(name)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        frames = compiled_frames(tiny)
    assert frames <= compiled_frames(build(name)) <= 2


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_compiled_model_follows_the_noise_level(name) -> None:
    tiny = build(name)
    plan = tiny.plan(bins=2, calibrated={"grid": list(GRID), "text_length": TEXT})
    with sparse_vdit.use(tiny.model, plan):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(tiny.model, backend=counter, fullgraph=True)
        found, frames = {}, []
        for t in (700, 100, 710, 120):
            with torch.no_grad():
                found[t] = compiled(**{**tiny.inputs, "timestep": torch.tensor([t, t])}, return_dict=False)[0]
            frames.append(counter.frame_count)
        for t, out in found.items():
            torch.testing.assert_close(out, tiny(timestep=torch.tensor([t, t])))
    # One for the hook and one for the model; the noise level is data.
    assert frames == [2] * 4


def test_plans_come_and_go_on_a_compiled_model() -> None:
    tiny = build("wan")
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.plan()):
        sparse = tiny()
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, backend="eager")

    def run():
        with torch.no_grad():
            return compiled(**tiny.inputs, return_dict=False)[0]

    torch.testing.assert_close(run(), dense)
    with sparse_vdit.use(compiled, tiny.plan()):
        torch.testing.assert_close(run(), sparse)
    torch.testing.assert_close(run(), dense)


@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan", "cogvideox1.5", "mochi"])
def test_first_block_cache(name) -> None:
    tiny = build(name)
    tiny.model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with tiny.model.cache_context("cond"):
        dense = tiny()
        with sparse_vdit.use(tiny.model, tiny.plan()):
            assert (tiny() - dense).abs().max() > 1e-3
        tiny.model.disable_cache()
    with sparse_vdit.use(tiny.model, tiny.plan()):
        sparse = tiny()
        tiny.model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
        with tiny.model.cache_context("cond"):
            torch.testing.assert_close(tiny(), sparse)


def test_pyramid_attention_broadcast() -> None:
    tiny, time = build("cogvideox1.5"), 700
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: time
    )
    with sparse_vdit.use(tiny.model, tiny.plan()):
        sparse = tiny()
        tiny.model.enable_cache(config)
        torch.testing.assert_close(tiny(), sparse)


@pytest.mark.parametrize("plan_first", [True, False])
def test_group_offload(plan_first) -> None:
    pytest.importorskip("accelerate")
    tiny = build("wan")
    with sparse_vdit.use(tiny.model, tiny.plan()):
        sparse = tiny()
    offload = dict(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    if not plan_first:
        tiny.model.enable_group_offload(**offload)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        if plan_first:
            tiny.model.enable_group_offload(**offload)
        torch.testing.assert_close(tiny(), sparse)


@pytest.mark.parametrize("plan_first", [True, False])
def test_cpu_offload(plan_first) -> None:
    accelerate = pytest.importorskip("accelerate")
    tiny = build("wan")
    with sparse_vdit.use(tiny.model, tiny.plan()):
        sparse = tiny()
    if not plan_first:
        accelerate.cpu_offload(tiny.model, torch.device("cpu"))
    with sparse_vdit.use(tiny.model, tiny.plan()):
        if plan_first:
            accelerate.cpu_offload(tiny.model, torch.device("cpu"))
        torch.testing.assert_close(tiny(), sparse)


def test_layerwise_casting() -> None:
    tiny = build("wan")
    tiny.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.full_plan()) as handle:
        handle.hook.sparse = [[True] * 2]
        torch.testing.assert_close(tiny(), dense, rtol=1e-4, atol=1e-4)


def test_bfloat16_models() -> None:
    tiny = build("wan")
    tiny.model.bfloat16()
    tiny.inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    dense = tiny()
    with sparse_vdit.use(tiny.model, tiny.full_plan()) as handle:
        handle.hook.sparse = [[True] * 2]
        out = tiny()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, dense, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["wan", "cogvideox1.5", "hunyuan"])
def test_adapters(name) -> None:
    """Projections are called as modules, so an adapter in them counts."""
    peft = pytest.importorskip("peft")
    tiny = build(name)
    with sparse_vdit.use(tiny.model, tiny.plan()):
        plain = tiny()
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        tiny.model.add_adapter(config)
        assert (tiny() - plain).abs().max() > 1e-3
        tiny.model.disable_adapters()
        torch.testing.assert_close(tiny(), plain)


def test_attention_backend_is_kept() -> None:
    tiny = build("wan")
    dense = tiny()
    handle = sparse_vdit.apply_plan(tiny.model, tiny.full_plan())
    tiny.model.set_attention_backend("_native_math")
    try:
        torch.testing.assert_close(tiny(), dense)
        assert handle.hook.processors[0]._attention_backend is not None
        handle.remove()
        assert tiny.model.blocks[0].attn1.processor._attention_backend is not None
    finally:
        tiny.model.reset_attention_backend()


def test_layer_skip_guiders_find_the_processors() -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    processors.register_with_skip_guiders()
    x, text = torch.zeros(1), torch.ones(1)
    skip = AttentionProcessorRegistry.get(processors.SparseWanProcessor).skip_processor_output_fn
    assert skip(None, hidden_states=x) is x
    skip = AttentionProcessorRegistry.get(processors.SparseMochiProcessor).skip_processor_output_fn
    assert skip(None, x, encoder_hidden_states=text) == (x, text)


def test_one_call_of_the_op_a_layer(monkeypatch) -> None:
    tiny, calls = build("wan"), []
    real = context.tile_sparse_attention
    monkeypatch.setattr(context, "tile_sparse_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    with sparse_vdit.use(tiny.model, tiny.plan()):
        tiny()
    assert len(calls) == 2


def test_public_name_is_lazy() -> None:
    code = """if True:
        import sys, zoo
        assert "diffusers" not in sys.modules
        assert "sparse_vdit" in dir(zoo)
        assert callable(zoo.sparse_vdit.search) and callable(zoo.sparse_vdit.apply_plan)
        """
    subprocess.run([sys.executable, "-c", code], check=True)
