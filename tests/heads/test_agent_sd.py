"""AgentSD on small, randomly initialised UNets: installing and removing, numerics, and what users combine."""

from __future__ import annotations

import copy
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import zoo
from zoo.heads.agent_sd import Phase, processor

from .agent_sd_unets import (
    AGENTS_ONLY,
    MERGING_ONLY,
    TEXT,
    TinyPipeline,
    Watch,
    denoise,
    latents,
    make_pipeline,
    make_small_unet,
    make_unet,
    make_xl_unet,
    merged_by_loops,
    phases,
)


def state_of(unet: UNet2DConditionModel) -> dict:
    """Everything of the modules that the plug-in could have left changed."""
    out = {}
    for name, module in unet.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "hook" in key and value}
        attributes = {key for key in vars(module) if not key.startswith("_backward")}
        out[name] = (hooks, attributes, getattr(module, "processor", None))
    return out


@pytest.mark.parametrize("mode", ["fast", "official"])
def test_remove_restores_the_unet(unet, mode) -> None:
    before, x = state_of(unet), latents()
    stock = denoise(unet, x)
    handle = zoo.agent_sd.apply(unet, mode=mode, merge_crossattn=mode == "official", merge_mlp=mode == "official")
    assert not torch.allclose(denoise(unet, x), stock, atol=1e-3)
    # Nothing of a call is kept.
    assert all(layer.selection is None for layer in handle._layers)
    handle.remove()
    assert state_of(unet) == before
    assert torch.equal(denoise(unet, x), stock)
    handle.remove()
    assert not zoo.agent_sd.remove(unet)


def test_applying_again_replaces(unet) -> None:
    before, x = state_of(unet), latents()
    first = zoo.agent_sd.apply(unet, mode="official", use_rand=False, ratio=0.2)
    once = denoise(unet, x)
    zoo.agent_sd.apply(unet, mode="official", use_rand=False, ratio=0.5)
    zoo.agent_sd.apply(unet, mode="official", use_rand=False, ratio=0.2)
    assert torch.equal(denoise(unet, x), once)
    # The handle of a replaced installation has nothing left to remove.
    first.remove()
    assert torch.equal(denoise(unet, x), once)
    assert zoo.agent_sd.remove(unet)
    assert state_of(unet) == before


def test_context_manager_removes_after_an_error(unet) -> None:
    before = state_of(unet)
    with pytest.raises(RuntimeError, match="stop"), zoo.agent_sd.apply(unet):
        raise RuntimeError("stop")
    assert state_of(unet) == before


def test_refused_arguments_leave_an_installation_alone(unet) -> None:
    handle = zoo.agent_sd.apply(unet)
    with pytest.raises(ValueError, match="ratio"):
        zoo.agent_sd.apply(unet, ratio=1.5)
    assert "installed" in repr(handle)


def test_processors_of_others_survive(unet) -> None:
    handle = zoo.agent_sd.apply(unet)
    theirs = AttnProcessor2_0()
    unet.set_attn_processor(theirs)
    with pytest.warns(UserWarning, match="apply it again"):
        denoise(unet, latents())
    handle.remove()
    assert all(attn is theirs for attn in unet.attn_processors.values())


def test_sharing_a_unet_between_pipelines() -> None:
    unet = make_unet()
    first, second = make_pipeline(unet=unet), make_pipeline("EulerDiscreteScheduler", unet=unet)
    zoo.agent_sd.apply(first)
    zoo.agent_sd.apply(second, mode="official")
    assert sum(phases(second, 5)) == 2
    assert zoo.agent_sd.remove(first) and not zoo.agent_sd.remove(second)


@pytest.mark.parametrize("given, message", [
    (nn.Linear(2, 2), "got Linear"),
    (None, "got NoneType"),
    (TinyPipeline.__new__(TinyPipeline), "got TinyPipeline"),
])  # fmt: skip
def test_refuses_what_is_no_unet(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.agent_sd.apply(given)


def test_refuses_a_unet_without_self_attention() -> None:
    with pytest.raises(ValueError, match="self-attention"):
        zoo.agent_sd.apply(make_unet(only_cross_attention=True, mid_block_type=None))
    # The middle block has self-attention all the same.
    assert len(zoo.agent_sd.apply(make_unet(only_cross_attention=True)).layers) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ratio=-0.1), "ratio"),
        (dict(ratio=float("nan")), "ratio"),
        (dict(mode="quick"), "mode"),
        (dict(max_downsample=0), "max_downsample"),
        (dict(merge_mlp=True), "official"),
        (dict(schedule=[]), "phases"),
        (dict(schedule=[Phase(0.5, (2, 2), 0.5)]), "phases"),
        (dict(schedule=[Phase(1.0, (2, 2), 0.5), Phase(0.5, (2, 2), 0.5)]), "phases"),
    ],
)
def test_refuses_wrong_arguments(unet, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.agent_sd.apply(unet, **arguments)


@pytest.mark.parametrize("phase", [(0.0, (2, 2), 0.5), (1.0, (1, 1), 0.5), (1.0, (2, 2), 1.5), (1.0, (0, 2), 0.5)])
def test_refuses_wrong_phases(phase) -> None:
    with pytest.raises(ValueError):
        Phase(*phase)


def test_refuses_other_plug_ins_and_masks(unet) -> None:
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.set_processor(type("Theirs", (AttnProcessor2_0,), {})())
    # Only blocks where tokens merge matter.
    zoo.agent_sd.apply(unet)
    with pytest.raises(NotImplementedError, match="Theirs"):
        zoo.agent_sd.apply(unet, max_downsample=2)
    zoo.agent_sd.apply(unet)
    with pytest.raises(NotImplementedError, match="attention_mask"), torch.no_grad():
        unet(latents(), 900, torch.zeros(2, 5, TEXT), attention_mask=torch.ones(2, 256))


def test_text_masks_work(unet) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    text = torch.randn(2, 5, TEXT)
    zoo.agent_sd.apply(unet, mode="official", seed=0, merge_crossattn=True)
    with torch.no_grad():
        out = unet(latents(), 900, text, encoder_attention_mask=mask).sample
        text[:, 3:] = 7
        again = unet(latents(), 900, text, encoder_attention_mask=mask).sample
    assert out.isfinite().all() and not torch.equal(out, again)


# --- Numerics --------------------------------------------------------------------------------------------------------


def test_fast_mode_by_its_definition(unet) -> None:
    """Queries and keys of all tokens; agents are means of the norm's output, grouped by the block's input."""
    seen, block = {}, unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    block.attn1.register_forward_hook(lambda m, args, out: seen.update(y=args[0], out=out))
    zoo.agent_sd.apply(unet)
    denoise(unet, latents())
    attn, (x, y) = block.attn1, (seen["x"], seen["y"])
    dst = [row * 16 + column for row in range(0, 16, 4) for column in range(0, 16, 4)]
    agents = torch.stack([merged_by_loops(x[b], y[b], dst, 240)[0] for b in range(2)])

    def heads(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v, a = heads(attn.to_q(y)), heads(attn.to_k(y)), heads(attn.to_v(y)), heads(attn.to_q(agents))
    D = q.shape[-1]
    gathered = (a @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v
    out = (q @ a.transpose(-1, -2) / D**0.15).softmax(-1) @ gathered + 0.075 * v
    torch.testing.assert_close(seen["out"], attn.to_out[0](out.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fast", "official"])
@pytest.mark.parametrize("size", [(13, 22), (17, 9), (3, 40), (2, 2)])
def test_any_latent_size(unet, mode, size) -> None:
    x = latents(2, *size)
    zoo.agent_sd.apply(unet, mode=mode, min_merge_tokens=0)
    for timestep in (900, 100):
        out = denoise(unet, x, timestep)
        assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("mode", ["fast", "official"])
def test_nothing_merged_is_stock(unet, mode) -> None:
    x = latents()
    stock = denoise(unet, x)
    zoo.agent_sd.apply(unet, ratio=0.0, mode=mode, schedule=MERGING_ONLY)
    assert torch.equal(denoise(unet, x), stock)


def test_ratio_zero_leaves_agents(unet) -> None:
    watch = Watch(unet)
    zoo.agent_sd.apply(unet, ratio=0.0, mode="official")
    denoise(unet, latents())
    assert watch.take()[0] == (256, 16)


def test_zero_latents_stay_finite(unet) -> None:
    zoo.agent_sd.apply(unet, mode="official")
    for timestep in (900, 100):
        assert denoise(unet, torch.zeros(2, 4, 16, 16), timestep).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("timestep", [900, 100])
def test_half_precision(unet, dtype, timestep) -> None:
    """As near to single precision as the stock UNet, up to the tokens that rounding makes merge elsewhere."""
    x, stock = latents(), copy.deepcopy(unet)
    zoo.agent_sd.apply(unet, mode="official", use_rand=False)
    exact = denoise(unet, x, timestep)
    half = denoise(unet.to(dtype), x.to(dtype), timestep)
    assert half.dtype == dtype
    loss = (denoise(stock.to(dtype), x.to(dtype), timestep) - denoise(stock.float(), x, timestep)).abs().mean()
    assert (half - exact).abs().mean() < 0.02 + 5 * loss


def test_autocast(unet) -> None:
    zoo.agent_sd.apply(unet, mode="official", use_rand=False)
    exact = denoise(unet, latents())
    with torch.autocast("cpu", torch.bfloat16):
        half = denoise(unet, latents())
    assert (half - exact).abs().mean() < 0.05


def test_guidance_batches_are_independent(unet) -> None:
    x = torch.cat((latents(1), latents(2)[1:]))
    zoo.agent_sd.apply(unet, mode="official", use_rand=False)
    torch.testing.assert_close(denoise(unet, x)[:1], denoise(unet, x[:1]), rtol=1e-4, atol=1e-5)


def test_random_destinations_come_from_their_own_generator() -> None:
    pipe = make_pipeline()
    zoo.agent_sd.apply(pipe, mode="official", seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = pipe(5)
    assert torch.equal(torch.get_rng_state(), state)
    # Each run draws the same numbers, whatever happened in between.
    torch.rand(3)
    assert torch.equal(pipe(5), first)
    zoo.agent_sd.apply(pipe, mode="official", seed=4)
    assert not torch.equal(pipe(5), first)
    # Without a seed the draw forks torch's own generator.
    zoo.agent_sd.apply(pipe, mode="official")
    torch.manual_seed(3)
    assert torch.equal(pipe(5), first)


def test_odd_batches_draw_nothing(unet) -> None:
    zoo.agent_sd.apply(unet, mode="official", seed=0)
    odd, even = denoise(unet, latents(3)), denoise(unet, latents(2))
    zoo.agent_sd.apply(unet, mode="official", use_rand=False)
    assert torch.equal(denoise(unet, latents(3)), odd)
    assert not torch.allclose(denoise(unet, latents(2)), even, atol=1e-3)


def test_merging_of_the_other_parts(unet) -> None:
    seen = []
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    for module in (block.attn1.to_k, block.attn2.to_q, block.ff):
        module.register_forward_hook(lambda m, args, out: seen.append((args[0].shape[1], out.shape[1])))
    zoo.agent_sd.apply(unet, mode="official", merge_crossattn=True, merge_mlp=True, schedule=MERGING_ONLY)
    denoise(unet, latents())
    # Hooks of the plug-in were there later, so the feed-forward's output is seen before it is unmerged.
    assert seen == [(154, 154), (154, 154), (154, 154)]
    block.set_chunk_feed_forward(4, dim=1)
    with pytest.raises(NotImplementedError, match="chunks"):
        denoise(unet, latents())


def test_gradients_reach_every_weight_and_survive_checkpointing(unet) -> None:
    def gradients() -> list[Tensor]:
        unet.zero_grad()
        unet(latents(), 900, torch.ones(2, 5, TEXT)).sample.square().sum().backward()
        return [p.grad for p in unet.parameters()]

    zoo.agent_sd.apply(unet.train(), mode="official", schedule=AGENTS_ONLY)
    torch.manual_seed(0)
    plain = gradients()
    assert all(grad is not None for grad in plain)
    unet.enable_gradient_checkpointing()
    torch.manual_seed(0)
    zoo.agent_sd.apply(unet, mode="official", schedule=AGENTS_ONLY)
    for grad, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


# --- Together with other things --------------------------------------------------------------------------------------


def test_xl_merges_at_its_finest_level() -> None:
    unet = make_xl_unet()
    watch = Watch(unet)
    handle = zoo.agent_sd.apply(unet, mode="official")
    assert len(handle.layers) == 4
    denoise(unet, latents(2, 32, 32))
    assert watch.take() == [(154, 16)] * 4
    with pytest.raises(ValueError, match="at least 2"):
        zoo.agent_sd.apply(unet, max_downsample=1)


def test_projections_are_called_as_modules(unet) -> None:
    """As adapters replace them: a changed layer changes the result, for agents too."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * x

    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    merged = copy.deepcopy(unet)
    for name in ("to_q", "to_k", "to_v"):
        setattr(attn, name, Adapted(getattr(attn, name)))
        base = getattr(merged.down_blocks[0].attentions[0].transformer_blocks[0].attn1, name)
        base.weight.data += 0.5 * torch.eye(16)
    for model in (unet, merged):
        zoo.agent_sd.apply(model, mode="official", use_rand=False)
    torch.testing.assert_close(denoise(unet, latents()), denoise(merged, latents()), rtol=1e-4, atol=1e-5)


def test_fused_projections_and_sliced_attention(unet) -> None:
    x = latents()
    with zoo.agent_sd.apply(unet, mode="official", use_rand=False):
        expected = denoise(unet, x)
    unet.set_attention_slice(1)
    with zoo.agent_sd.apply(unet, mode="official", use_rand=False):
        torch.testing.assert_close(denoise(unet, x), expected, rtol=1e-4, atol=1e-5)
    unet.set_attn_processor(AttnProcessor2_0())
    unet.fuse_qkv_projections()
    with zoo.agent_sd.apply(unet, mode="official", use_rand=False):
        torch.testing.assert_close(denoise(unet, x), expected, rtol=1e-4, atol=1e-5)


def test_saving_and_copying(unet, tmp_path) -> None:
    keys, x = list(unet.state_dict()), latents()
    stock = denoise(unet, x)
    zoo.agent_sd.apply(make_pipeline(unet=unet), mode="official", use_rand=False)
    patched = denoise(unet, x)
    assert list(unet.state_dict()) == keys
    unet.save_pretrained(tmp_path)
    assert torch.equal(denoise(UNet2DConditionModel.from_pretrained(tmp_path).eval(), x), stock)
    copied = copy.deepcopy(unet)
    assert torch.equal(denoise(copied, x), patched)
    assert zoo.agent_sd.remove(copied)
    assert torch.equal(denoise(copied, x), stock)
    assert torch.equal(denoise(unet, x), patched)


@pytest.mark.parametrize("mode, timesteps", [("fast", (900, 100)), ("official", (900,))])
def test_compiled_unet(mode, timesteps) -> None:
    torch._dynamo.reset()
    unet, x = make_small_unet(), latents(2, 8, 8)
    stock = denoise(unet, x)
    with zoo.agent_sd.apply(unet, mode=mode, min_merge_tokens=0, seed=0):
        expected = [denoise(unet, x, t) for t in timesteps]
    handle = zoo.agent_sd.apply(unet, mode=mode, min_merge_tokens=0, seed=0)
    compiled = torch.compile(unet, backend="eager")
    for t, out in zip(timesteps, expected, strict=True):
        torch.testing.assert_close(denoise(compiled, x, t), out, rtol=1e-4, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(denoise(compiled, x), stock, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_share_one_graph_a_phase() -> None:
    torch._dynamo.reset()
    unet, x = make_small_unet(), latents(2, 8, 8)
    stock = denoise(unet, x)
    handle = zoo.agent_sd.apply(unet, min_merge_tokens=0)
    expected = [denoise(unet, x, t) for t in (900, 100)]
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for t, out in zip((900, 100), expected, strict=True):
        torch.testing.assert_close(denoise(unet, x, t), out, rtol=1e-4, atol=1e-5)
    # Three blocks, two phases; the selection may be a graph of its own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    handle.remove()
    torch.testing.assert_close(denoise(unet, x), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("xl", [False, True])
def test_stable_diffusion_pipelines(xl) -> None:
    pytest.importorskip("transformers")
    scheduler = make_pipeline("EulerDiscreteScheduler").scheduler
    modules = dict(vae=None, text_encoder=None, tokenizer=None, scheduler=scheduler)
    text = dict(prompt_embeds=torch.randn(1, 5, TEXT), negative_prompt_embeds=torch.randn(1, 5, TEXT))
    if xl:
        # Six time ids of 4 channels and a pooled text of 8.
        unet = make_xl_unet(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32
        )
        pipe = diffusers.StableDiffusionXLPipeline(**modules, unet=unet, text_encoder_2=None, tokenizer_2=None)
        text |= dict(pooled_prompt_embeds=torch.randn(1, 8), negative_pooled_prompt_embeds=torch.randn(1, 8))
    else:
        modules |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = diffusers.StableDiffusionPipeline(**modules, unet=make_unet())
    pipe.set_progress_bar_config(disable=True)
    watch, side = Watch(pipe.unet), 256 if xl else 128

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = dict(height=side, width=side, num_inference_steps=5, output_type="latent")
        return pipe(**text, **settings, generator=generator).images

    stock = run()
    watch.take()
    with zoo.agent_sd.apply(pipe, mode="official", seed=0):
        first = run()
        rows = [row for row in watch.take() if row[0] != 64]
        assert rows == [(154, 16)] * (len(rows) // 5 * 2) + [(154, 0)] * (len(rows) // 5 * 3)
        assert torch.equal(run(), first)
    assert first.isfinite().all() and not torch.allclose(first, stock, atol=1e-3)
    assert torch.equal(run(), stock)


def test_low_rank_adapters(unet) -> None:
    peft = pytest.importorskip("peft")
    x = latents()
    zoo.agent_sd.apply(unet, mode="official", use_rand=False)
    base = denoise(unet, x)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    adapted = denoise(unet, x)
    assert not torch.allclose(adapted, base, atol=1e-3)
    unet.disable_adapters()
    torch.testing.assert_close(denoise(unet, x), base)
    unet.enable_adapters()
    zoo.agent_sd.remove(unet)
    zoo.agent_sd.apply(unet, mode="official", use_rand=False)
    torch.testing.assert_close(denoise(unet, x), adapted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    # Many agents, or wide ones, are beyond the kernel.
    @pytest.mark.parametrize("agents, D", [(256, 40), (256, 64), (256, 80), (576, 40)])
    def test_attention_with_and_without_the_kernel(self, dtype, agents, D) -> None:
        torch.manual_seed(0)
        q, k, v, a = (torch.randn(2, n, 4 * D, device="cuda") for n in (2000, 1500, 1500, agents))
        settings = (4, D**-0.5, D**-0.15)
        exact = processor.attend_twice(q.double(), a.double(), k.double(), v.double(), *settings)
        inputs = [x.to(dtype) for x in (q, a, k, v)]
        error = (processor.attend_twice(*inputs, *settings) - exact).abs().max()
        assert (processor.attend(*inputs, *settings) - exact).abs().max() <= 2 * error + 1e-5

    @pytest.mark.parametrize("mode", ["fast", "official"])
    @pytest.mark.parametrize("timestep", [900, 100])
    def test_unet(self, unet, mode, timestep) -> None:
        zoo.agent_sd.apply(unet, mode=mode, min_merge_tokens=0, use_rand=False)
        exact = denoise(unet, latents(), timestep)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            unet, x = unet.to("cuda", dtype), latents().to("cuda", dtype)
            out = denoise(unet, x, timestep)
            # On average: rounding lets single tokens merge elsewhere.
            assert (out.float().cpu() - exact).abs().mean() < 0.05
            assert torch.equal(denoise(unet, x, timestep), out)

    def test_random_destinations(self, unet) -> None:
        x = latents().cuda()
        for seed in (0, None):
            outs = []
            for _ in range(2):
                zoo.agent_sd.apply(unet.cuda(), mode="official", seed=seed)
                torch.manual_seed(0)
                outs.append(denoise(unet, x))
            assert torch.equal(*outs)
        zoo.agent_sd.apply(unet, mode="official", seed=1)
        assert not torch.allclose(denoise(unet, x), outs[0], atol=1e-3)

    @pytest.mark.parametrize("timestep", [900, 100])
    def test_compiled_blocks(self, timestep) -> None:
        torch._dynamo.reset()
        unet, x = make_small_unet().cuda(), latents().cuda()
        zoo.agent_sd.apply(unet, min_merge_tokens=0)
        expected = denoise(unet, x, timestep)
        unet.compile_repeated_blocks(fullgraph=True)
        assert (denoise(unet, x, timestep) - expected).abs().mean() < 0.02


def test_importing_zoo_leaves_diffusers_out() -> None:
    subprocess.run([sys.executable, "-c", "import sys, zoo; assert 'diffusers' not in sys.modules"], check=True)
    assert "agent_sd" in dir(zoo)
    with pytest.raises(AttributeError, match="no_such"):
        zoo.no_such  # noqa: B018
