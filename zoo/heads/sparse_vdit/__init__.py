"""Sparse-vDiT: sparse attention patterns for video diffusion transformers, searched once and applied without training.

    plan = zoo.sparse_vdit.search(pipe, ["a cat on a skateboard"], density=0.3)
    plan.save("plan.json")
    with zoo.sparse_vdit.use(pipe, plan):
        video = pipe("a dog in the rain").frames

Works on stock diffusers pipelines of CogVideoX 1.0 and 1.5, HunyuanVideo, LTX-Video, Mochi, Wan 2.1 and Wan 2.2; needs
diffusers.

Paper: Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers,
arXiv:2506.03065. The paper leaves window widths, tiles and the treatment of text open; those are defined in
`zoo.kernels.tile_sparse.patterns`.
"""

from zoo.heads.sparse_vdit.calibrate import calibrate_blocks
from zoo.heads.sparse_vdit.plan import SparsePlan, uniform_plan
from zoo.heads.sparse_vdit.plugin import PlanHandle, PlanHandles, apply_plan, describe_model, use
from zoo.heads.sparse_vdit.search import CANDIDATES, search

__all__ = [
    "CANDIDATES",
    "PlanHandle",
    "PlanHandles",
    "SparsePlan",
    "apply_plan",
    "calibrate_blocks",
    "describe_model",
    "search",
    "uniform_plan",
    "use",
]
