"""Small, randomly initialised UNets and a pipeline around them, and calls that suit them."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from zoo.heads.agent_sd import Phase

TEXT = 12
AGENTS_ONLY = (Phase(1.0, (4, 4), 0.95),)
MERGING_ONLY = (Phase(1.0, (2, 2), 0.5),)


def make_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Two levels; attention at the latent's own resolution and, in the middle, at half of it."""
    torch.manual_seed(seed)
    config = (
        dict(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=TEXT,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        | config
    )
    return UNet2DConditionModel(**config).eval()


def make_small_unet() -> UNet2DConditionModel:
    """One level, three transformer blocks."""
    return make_unet(
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
    )


def make_xl_unet(**config) -> UNet2DConditionModel:
    """As in Stable Diffusion XL no attention at the latent's own resolution."""
    return make_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def latents(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))


def denoise(unet, x: Tensor, timestep=900) -> Tensor:
    text = torch.randn(1, 5, TEXT, generator=torch.Generator().manual_seed(2)).to(x).expand(x.shape[0], -1, -1)
    with torch.no_grad():
        return unet(x, timestep, text).sample


class Watch:
    """Tokens that enter the self-attention of each block, and agents (0: none), call by call."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.rows = []
        for name, module in unet.named_modules():
            if name.endswith("attn1.to_k"):
                module.register_forward_hook(lambda m, args, out: self.rows.append([args[0].shape[1], 0]))
            if name.endswith("attn1.to_q"):
                module.register_forward_hook(self._queries)

    def _queries(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        # The queries of agents are projected after the keys.
        if self.rows and module is self._last:
            self.rows[-1][1] = args[0].shape[1]
        self._last = None if self.rows and module is self._last else module

    _last = None

    def take(self) -> list[tuple[int, int]]:
        rows, self.rows = [tuple(row) for row in self.rows], []
        return rows


class TinyPipeline(DiffusionPipeline):
    """The denoising loop of Stable Diffusion with classifier-free guidance."""

    def __init__(self, unet, scheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, strength: float = 1.0) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x, text = latents(1) * self.scheduler.init_noise_sigma, torch.zeros(2, 5, TEXT)
        for t in self.scheduler.timesteps[steps - int(steps * strength) :]:
            noise = self.unet(self.scheduler.scale_model_input(torch.cat((x, x)), t), t, text).sample
            uncond, cond = noise.chunk(2)
            x = self.scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
        return x


def make_pipeline(scheduler: str = "DDIMScheduler", unet=None, **config) -> TinyPipeline:
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1) | config
    if scheduler == "PNDMScheduler":
        config["skip_prk_steps"] = True
    return TinyPipeline(unet or make_unet(), getattr(diffusers, scheduler)(**config))


def phases(pipe: TinyPipeline, steps: int, **kwargs) -> list[bool]:
    """Whether agents ran, for each call of the UNet in a run of the pipeline."""
    watch = Watch(pipe.unet)
    pipe(steps, **kwargs)
    rows = watch.take()
    finest = [row[1] > 0 for row in rows if row[0] > 64]
    assert len(finest) % 3 == 0
    return finest[::3]


def merged_by_loops(x: Tensor, y: Tensor, dst: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Merged y of one image and what unmerging gives, by the definition; zero tokens are like nothing."""
    N = len(x)
    unit = [t / t.norm() if t.norm() > 0 else t for t in x]
    best = {}
    for t in set(range(N)) - set(dst):
        scores = [float(unit[t] @ unit[d]) for d in dst]
        best[t] = (max(scores), dst[scores.index(max(scores))])
    sources = sorted(best, key=lambda t: (-best[t][0], t))
    moved = {t: best[t][1] for t in sources[:count]} | {d: d for d in dst}
    kept = [t for t in range(N) if t not in moved]
    means = {d: torch.stack([y[t] for t in moved if moved[t] == d]).mean(0) for d in dst}
    return torch.stack([y[t] for t in kept] + [means[d] for d in dst]), torch.stack(
        [means[moved[t]] if t in moved else y[t] for t in range(N)]
    )
