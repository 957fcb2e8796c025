"""AgentSD: Stable Diffusion with merged tokens and agent attention, without training.

    handle = zoo.agent_sd.apply(pipe, ratio=0.4)
    image = pipe(prompt).images[0]
    handle.remove()

    with zoo.agent_sd.apply(pipe, mode="official", seed=0):
        image = pipe(prompt).images[0]

Paper: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874.
"""

from zoo.heads.agent_sd.plugin import AgentSDHandle, apply, remove
from zoo.heads.agent_sd.schedule import SCHEDULE, Phase

__all__ = ["SCHEDULE", "AgentSDHandle", "Phase", "apply", "remove"]
