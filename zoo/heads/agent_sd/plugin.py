"""Installing AgentSD on a diffusers UNet and taking it off again."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as stock
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from zoo.heads.agent_sd.processor import Layer
from zoo.heads.agent_sd.schedule import MIN_MERGE_TOKENS, SCHEDULE, Context, Phase, check_schedule

MODES = ("fast", "official")
# Processors of plain softmax attention: AgentSD may take their place, and runs them on merged tokens.
PLAIN_PROCESSORS = (
    stock.AttnProcessor,
    stock.AttnProcessor2_0,
    stock.FusedAttnProcessor2_0,
    stock.SlicedAttnProcessor,
    stock.XFormersAttnProcessor,
)
_HANDLE = "_zoo_agent_sd"


class AgentSDHandle:
    """AgentSD as installed on one UNet. As a context manager it is removed at the end of the block.

    Attributes:
        unet: The UNet.
        layers: Names of the transformer blocks that may merge tokens.
        settings: Everything that `apply` was given or chose.
    """

    def __init__(self, unet: UNet2DConditionModel, blocks: dict[str, nn.Module], settings: Context) -> None:
        self.unet, self.settings, self.layers = unet, settings, list(blocks)
        self._layers = [Layer(block, i, settings) for i, block in enumerate(blocks.values())]
        self._hooks = []

    def _install(self, crossattn: bool, mlp: bool) -> None:
        self._hooks = [self.unet.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer in self._layers:
            layer.install(crossattn, mlp)
        self.unet.__dict__[_HANDLE] = self

    def _begin(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.settings.begin(sample, args[1] if len(args) > 1 else kwargs["timestep"])

    def remove(self) -> None:
        """Restore the UNet as it was: the same processors, no hooks. Removing again does nothing."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.uninstall()
        self._hooks = []
        if self.unet.__dict__.get(_HANDLE) is self:
            del self.unet.__dict__[_HANDLE]

    def __enter__(self) -> AgentSDHandle:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"AgentSDHandle({len(self.layers)} blocks, {'installed' if self._hooks else 'removed'}, {self.settings})"


def _unet_of(pipe_or_unet) -> UNet2DConditionModel:
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    # What torch.compile returns wraps the model.
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        received = type(pipe_or_unet).__name__ + ("" if unet is pipe_or_unet else f" with {type(unet).__name__}")
        raise ValueError(
            "AgentSD needs a UNet2DConditionModel, or a pipeline with one as `unet` (Stable Diffusion 1.x, 2.x, XL); "
            f"got {received}."
        )
    return unet


def _downsample_of(name: str, unet: UNet2DConditionModel) -> int:
    """How often the latent is halved for a block, by its name."""
    last = len(unet.down_blocks) - 1
    part, index, *_ = name.split(".")
    level = {"down_blocks": lambda: int(index), "up_blocks": lambda: last - int(index)}.get(part, lambda: last)()
    return 2**level


def _blocks_of(unet: UNet2DConditionModel, max_downsample: int | None) -> dict[str, nn.Module]:
    """Transformer blocks at the levels where tokens merge, by name."""
    blocks = {
        name: block
        for name, block in unet.named_modules()
        if isinstance(block, BasicTransformerBlock) and not block.only_cross_attention
    }
    if not blocks:
        raise ValueError("this UNet2DConditionModel has no self-attention in a BasicTransformerBlock to speed up.")
    levels = {name: _downsample_of(name, unet) for name in blocks}
    finest = min(levels.values())
    limit = finest if max_downsample is None else max_downsample
    if limit < finest:
        raise ValueError(
            f"the finest transformer blocks of this UNet work at 1/{finest} of the latent's resolution: max_downsample "
            f"must be at least {finest}, got {max_downsample}."
        )
    return {name: block for name, block in blocks.items() if levels[name] <= limit}


def _check_processors(blocks: dict[str, nn.Module], crossattn: bool) -> None:
    for name, block in blocks.items():
        for part in ("attn1", "attn2") if crossattn else ("attn1",):
            attn = getattr(block, part)
            if attn is not None and type(attn.processor) not in PLAIN_PROCESSORS:
                raise NotImplementedError(
                    f"AgentSD takes the place of plain attention, but {name}.{part} has a "
                    f"{type(attn.processor).__name__}: restore the default (unet.set_default_attn_processor()) or "
                    "remove the other plug-in first."
                )


def apply(
    pipe_or_unet,
    ratio: float = 0.4,
    *,
    mode: str = "fast",
    schedule: Sequence[Phase] = SCHEDULE,
    max_downsample: int | None = None,
    use_rand: bool | None = None,
    seed: int | None = None,
    min_merge_tokens: int | None = None,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
) -> AgentSDHandle:
    """Speed up the self-attention of a Stable Diffusion UNet, without training.

    In the first part of the denoising loop queries read from a few agent tokens, means of similar tokens; after it the
    most similar tokens are merged before softmax attention and copied back behind it. Pipelines find their place in
    the loop by the scheduler's timesteps, whatever their number; a UNet alone by the noise level of the timestep.
    Attention runs on `zoo.kernels.agent_attention` and on the processors that were there. Any latent size works,
    gradients flow through everything but the choice of tokens, and batches may hold classifier-free guidance.

    Modes:
        "official": The published method: tokens merge in every phase and destinations are drawn at random.
        "fast": The same agents and phases, but fixed destinations, no merging where agents run (attention through them
            is linear already) and none in softmax layers of fewer than `min_merge_tokens` tokens. Bit for bit
            reproducible.

    Load adapters and choose attention backends before, and call `apply` before `torch.compile`: a whole compiled UNet
    breaks its graph once, where the timestep is read; `unet.compile_repeated_blocks(fullgraph=True)` does not. Random
    destinations break the graph in every block. Applying again replaces the former settings.

    Args:
        pipe_or_unet: A `UNet2DConditionModel`, or a pipeline with one as `unet`.
        ratio: Fraction of the tokens to merge, 0 to 1; published for 0.1 to 0.5.
        mode: "fast" or "official".
        schedule: Phases in their order. The default is published for 50 steps; other numbers of steps change phase at
            the same fraction of them.
        max_downsample: Coarsest level that takes part, 1 for the latent's own resolution, 2 for half of it and so on.
            By default the finest level that has attention: 1 for Stable Diffusion 1.x and 2.x, 2 for XL.
        use_rand: Draw the destinations at random; by default in mode "official" only. Batches of odd size never do.
        seed: Seed of the draw, which starts again with each phase and run. None forks torch's generator instead.
        min_merge_tokens: Fewest tokens for which softmax layers merge; 0 in mode "official", 9216 (768 x 768 pixels of
            Stable Diffusion 1.x) in mode "fast".
        merge_crossattn, merge_mlp: Merge tokens in cross-attention and in the feed-forward too; mode "official" only.
        k_scale2: Exponent k of the second softmax's factor, head_dim**(-k / 2).
        k_shortcut: Factor on the values that agent attention adds to its output.

    Returns:
        A handle: `handle.remove()`, or a `with` statement, restores the UNet exactly.

    Raises:
        ValueError: No UNet2DConditionModel with transformer blocks, or an argument out of its range.
        NotImplementedError: Another plug-in's attention processor is installed. Calls of the UNet raise it for masks
            over image tokens.

    Source: Agent Attention, arXiv:2312.08874.
    """
    unet = _unet_of(pipe_or_unet)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be a fraction of the tokens in [0, 1], got {ratio}.")
    fast = mode == "fast"
    if fast and (merge_crossattn or merge_mlp):
        raise ValueError("merge_crossattn and merge_mlp belong to mode='official': mode 'fast' merges no tokens there.")
    blocks = _blocks_of(unet, max_downsample)
    settings = Context(
        ratio=ratio,
        fast=fast,
        schedule=check_schedule(schedule),
        use_rand=not fast if use_rand is None else use_rand,
        seed=seed,
        min_merge_tokens=(MIN_MERGE_TOKENS if fast else 0) if min_merge_tokens is None else min_merge_tokens,
        k_scale2=k_scale2,
        k_shortcut=k_shortcut,
    )
    remove(unet)
    _check_processors(blocks, merge_crossattn)
    if unet is not pipe_or_unet and hasattr(pipe_or_unet, "scheduler"):
        settings.follow(pipe_or_unet)
    handle = AgentSDHandle(unet, blocks, settings)
    handle._install(merge_crossattn, merge_mlp)
    return handle


def remove(pipe_or_unet) -> bool:
    """Remove AgentSD from a UNet or from that of a pipeline; returns whether it was there.

    Raises:
        ValueError: There is no UNet2DConditionModel.
    """
    handle = _unet_of(pipe_or_unet).__dict__.get(_HANDLE)
    if handle is not None:
        handle.remove()
    return handle is not None
