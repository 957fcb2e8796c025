"""Agent attention: a few agent tokens gather from all keys and hand on to all queries."""

from zoo.kernels.agent.op import agent_attention
from zoo.kernels.agent.reference import AgentBias

__all__ = ["AgentBias", "agent_attention"]
