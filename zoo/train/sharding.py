"""Fully sharded data parallel training (FSDP2) through Lightning: the strategy, and what is sharded as a unit."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

# Gathering and reducing cost the host some launches a unit, so that each small block by itself would wait for the host.
UNIT_PARAMETERS = 4_000_000


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with all processes in one group of data, and checkpoints in one ordinary file.

    ``zoo fit --trainer.strategy=fsdp`` stands for it. Lightning's own ``fsdp`` is FSDP1, which hands flattened
    parameters to the optimizer: the rule that spares biases and norms from weight decay goes by a parameter's number of
    dimensions, so that it would spare all of them.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let data be divided among all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The repeated blocks of an image model: modules of a ``blocks`` list, or else of a class named ``...Block``."""
    named = [(name.split("."), module) for name, module in net.named_modules()]
    listed = [module for path, module in named if path[-1].isdigit() and path[-2:-1] == ["blocks"]]
    return listed or [module for _, module in named if type(module).__name__.endswith("Block")]


def units_of(net: nn.Module) -> list[list[nn.Module]]:
    """Consecutive blocks that are gathered together: as few as have `UNIT_PARAMETERS`, and what is left at the end."""
    units, size = [[]], 0
    for block in blocks_of(net):
        if size >= UNIT_PARAMETERS:
            units.append([])
            size = 0
        units[-1].append(block)
        size += sum(p.numel() for p in block.parameters())
    return [unit for unit in units if unit]


def shard(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model in place over a mesh of one dimension, some blocks at a time and then the rest as a unit.

    Args:
        net: An image model. Parameters become DTensors of the same shapes under the same names.
        mesh: Devices to shard over.

    Returns:
        The model.
    """
    # Sharding takes contiguous parameters only. Images may still be channels-last.
    net.to(memory_format=torch.contiguous_format)
    for unit in units_of(net):
        fully_shard(unit, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def compile_blocks(net: nn.Module) -> nn.Module:
    """Compile each block in place instead of the whole model, so that gathering and reducing stay outside of graphs."""
    blocks = blocks_of(net)
    # Blocks that differ in a constant, such as the rate of drop path, are compiled each for itself.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, len(blocks) + 8)
    for block in blocks:
        # Stages differ in size, which must not turn sizes into variables.
        block.compile(dynamic=False)
    return net


def check_callbacks(callbacks: list[object]) -> None:
    """Refuse averaging of weights, which copies the whole model.

    Raises:
        ValueError: There is such a callback.
    """
    found = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
    if found:
        raise ValueError(
            f"{found[0]} cannot average a sharded model: leave the callback out with strategy=fsdp, or train with "
            "strategy=ddp"
        )
