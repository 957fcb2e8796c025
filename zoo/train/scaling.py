"""Training on one device and on several: throughput, equality of the loss, and a sharded checkpoint on one device.

    python -m zoo.train.scaling                        # biformer_small on two GPUs, a few minutes
    python -m zoo.train.scaling --device cpu --model agent_nano --size 32 --batch 2 --eager

Starts its own processes, first those of all devices and then a single one. Measured with random images on the device:

- throughput of training steps (bfloat16 autocast, forward, backward, fused AdamW) with DDP, with FSDP2 (units of
  some blocks) and on one device, eager and with every block compiled, at the same batch a device. The speed-up is that
  over one device in the same way of running;
- loss over some steps in float32 from the same weights at the same global batch, with batch norm over all devices;
- logits of the sharded model after these steps, and those of a plain model that has loaded its full state dict.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from zoo.bench import report, suites, timing
from zoo.factory import create_model
from zoo.train.sharding import compile_blocks, shard

SUITE = "scaling"
SAMPLES = 3
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    model: str
    size: int
    # Images of a device in a step of throughput, and of all devices in a step of the loss.
    batch: int
    loss_batch: int
    steps: int
    loss_steps: int
    compiled: tuple[bool, ...]
    device: str
    folder: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among all."""

    rank: int
    world: int
    device: torch.device


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo.train.scaling", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="biformer_small", help="image model (default: biformer_small)")
    add("--size", type=int, default=224, help="side of the images in pixels")
    add("--batch", type=int, default=256, help="images of a device in a step of throughput (default: 256)")
    add("--loss-batch", type=int, default=64, help="images of all devices in a step of the loss")
    add("--devices", type=int, default=2, help="number of devices to compare with one")
    add("--steps", type=int, default=5, help=f"steps of each of the {SAMPLES} samples of throughput")
    add("--loss-steps", type=int, default=20, help="steps of the loss")
    add("--eager", action="store_true", help="leave the compiled models out")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="folder of the CSV file (default: as for zoo bench)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and append rows to ``scaling.csv``.

    Returns:
        Exit status: 0.

    Raises:
        ValueError: There are fewer devices than asked for, or they cannot share the batch of the loss.
    """
    args = parse(argv)
    if args.devices < 2 or args.loss_batch % args.devices:
        raise ValueError(f"needs two devices or more that divide --loss-batch {args.loss_batch}, got {args.devices}")
    if args.device == "cuda" and torch.cuda.device_count() < args.devices:
        raise ValueError(f"--devices {args.devices}: torch sees {torch.cuda.device_count()} GPUs here")
    with tempfile.TemporaryDirectory() as folder:
        compiled = (False,) if args.eager else (False, True)
        names = ("model", "size", "batch", "loss_batch", "steps", "loss_steps", "device")
        plan = Plan(**{name: getattr(args, name) for name in names}, compiled=compiled, folder=folder)
        several, single = launch(plan, args.devices), launch(plan, 1)
    rows = make_rows(plan, args.devices, several, single)
    report.show(SUITE, rows)
    show_losses({**single["losses"], **several["losses"]})
    path = (args.out or suites.results_folder()) / f"{SUITE}.csv"
    report.append(path, rows)
    print(f"{len(rows)} rows appended to {path}")
    return 0


def launch(plan: Plan, world: int) -> dict[str, Any]:
    """Run `worker` in processes of its own and return what the first one has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (world, port, plan), nprocs=world)
    return torch.load(Path(plan.folder, f"results{world}.pt"), weights_only=True)


def worker(rank: int, world: int, port: int, plan: Plan) -> None:
    """One process: join the others, measure everything, let the first one write results."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device(plan.device, rank) if plan.on_gpu else torch.device("cpu")
    if plan.on_gpu:
        torch.cuda.set_device(device)
    place = Place(rank, world, device)
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group(
        "nccl" if plan.on_gpu else "gloo", timeout=timeout, device_id=device if plan.on_gpu else None
    )
    try:
        results = measure_all(plan, place)
        if rank == 0:
            torch.save(results, Path(plan.folder, f"results{world}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure_all(plan: Plan, place: Place) -> dict[str, Any]:
    """Throughput in every way of running, then losses and the checkpoint."""
    ways = ("single",) if place.world == 1 else ("ddp", "fsdp")
    throughput, losses, checkpoint = {}, {}, {}
    for compiled in plan.compiled:
        for way in ways:
            progress(place, f"throughput: {place.world} x {plan.device}, {way}, compiled={compiled}")
            torch.compiler.reset()
            throughput[f"{way} {int(compiled)}"] = measure_throughput(plan, place, way, compiled)
    for way in ways:
        progress(place, f"loss: {place.world} x {plan.device}, {way}")
        net, losses[way] = measure_loss(plan, place, way)
        if way == "fsdp":
            save_sharded(net, plan, place)
        del net
    if place.world == 1 and sharded_path(plan).exists():
        checkpoint = compare_sharded(plan, place)
    return {"throughput": throughput, "losses": losses, "checkpoint": checkpoint}


def progress(place: Place, text: str) -> None:
    """Tell what is measured, once."""
    if place.rank == 0:
        print(text, flush=True)


def build(plan: Plan, place: Place, way: str, compiled: bool, sync_norm: bool = False) -> nn.Module:
    """The model of all ways with equal weights, ready for training."""
    torch.manual_seed(0)
    net = create_model(plan.model, num_classes=CLASSES, **size_argument(plan))
    net = net.to(place.device, memory_format=torch.channels_last).train()
    # The CPU has no batch norm over several processes.
    if sync_norm and place.world > 1 and plan.on_gpu:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if compiled:
        # DDP's splitting of graphs refuses those with checkpoints inside.
        torch._dynamo.config.optimize_ddp = False
        compile_blocks(net)
    if way == "ddp":
        return DistributedDataParallel(
            net, device_ids=[place.device] if plan.on_gpu else None, gradient_as_bucket_view=True
        )
    if way == "fsdp":
        return shard(net, init_device_mesh(plan.device, (place.world,)))
    return net


def size_argument(plan: Plan) -> dict[str, int]:
    """The keyword by which a model of fixed input size takes another one."""
    from zoo.bench import models

    return models.size_argument(plan.model, plan.size)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """AdamW in one launch."""
    return torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.05, fused=True)


def measure_throughput(plan: Plan, place: Place, way: str, compiled: bool) -> dict[str, Any]:
    """Images a second of all devices (20th, 50th, 80th percentile) and peak memory of one in MiB."""
    memory = timing.SteadyMemory(place.device)
    net = build(plan, place, way, compiled)
    step = training_step(net, plan, place)
    for _ in range(4 if plan.on_gpu else 1):
        step()
    peak = memory.measure(step)
    seconds = []
    for _ in range(SAMPLES):
        timing.synchronize(place.device)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(plan.steps):
            step()
        timing.synchronize(place.device)
        seconds.append((time.perf_counter() - start) / plan.steps)
    rates = timing.percentiles(seconds).rate(plan.batch * place.world)
    return {**rates._asdict(), "memory_mib": peak}


def training_step(net: nn.Module, plan: Plan, place: Place) -> Callable[[], Tensor]:
    """A step on one batch of random images that stays on the device."""
    optimizer = optimizer_of(net)
    images, target = random_batch(plan.batch, plan.size, seed=place.rank)
    images = images.to(place.device, memory_format=torch.channels_last)
    target = target.to(place.device)

    def step() -> Tensor:
        with torch.autocast(plan.device, torch.bfloat16):
            loss = F.cross_entropy(net(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def random_batch(batch: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and classes that depend on the seed alone, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (batch,), generator=generator)


def measure_loss(plan: Plan, place: Place, way: str) -> tuple[nn.Module, list[float]]:
    """Train in float32 on batches that all worlds share; return the model and the mean loss of each step."""
    # Parts of a batch may run by other algorithms than the whole: no rounding to TF32 on the way.
    torch.backends.cudnn.allow_tf32 = False
    net = build(plan, place, way, compiled=False, sync_norm=True)
    optimizer = optimizer_of(net)
    losses = []
    for step in range(plan.loss_steps):
        images, target = random_batch(plan.loss_batch, plan.size, seed=step % 4)
        part = slice(place.rank, None, place.world)
        images = images[part].to(place.device, memory_format=torch.channels_last)
        loss = F.cross_entropy(net(images), target[part].to(place.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(float(mean) / place.world)
    return net, losses


def sharded_path(plan: Plan) -> Path:
    """File of the full state dict of the sharded model with its logits."""
    return Path(plan.folder, "sharded.pt")


def save_sharded(net: nn.Module, plan: Plan, place: Place) -> None:
    """Gather the state dict of a sharded model and write it with logits of fixed images."""
    logits = evaluate(net, plan, place)
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if place.rank == 0:
        torch.save({"state": state, "logits": logits}, sharded_path(plan))


def compare_sharded(plan: Plan, place: Place) -> dict[str, float]:
    """Load the sharded run's weights into a plain model; largest difference of logits, and their largest value."""
    saved = torch.load(sharded_path(plan), weights_only=True)
    net = build(plan, place, "single", compiled=False)
    net.load_state_dict(saved["state"], strict=True)
    difference = (evaluate(net, plan, place) - saved["logits"]).abs().max()
    return {"difference": float(difference), "largest": float(saved["logits"].abs().max())}


@torch.no_grad()
def evaluate(net: nn.Module, plan: Plan, place: Place) -> Tensor:
    """Logits of eight images in evaluation mode, on the CPU."""
    images, _ = random_batch(8, plan.size, seed=100)
    net.eval()
    return net(images.to(place.device, memory_format=torch.channels_last)).float().cpu()


def make_rows(plan: Plan, world: int, several: dict[str, Any], single: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of all results; the speed-up is that over one device, compiled against compiled."""
    device = torch.device(plan.device, 0) if plan.on_gpu else torch.device("cpu")
    rows = []
    for devices, results in ((1, single), (world, several)):
        for key, values in results["throughput"].items():
            way, compiled = key.split()
            config = (
                f"devices={devices} batch={plan.batch} size={plan.size} compile={'blocks' if int(compiled) else 'none'}"
            )
            values = {**values, "speedup": values["p50"] / single["throughput"][f"single {compiled}"]["p50"]}
            columns = dict(mode="train", dtype="bfloat16", metric="throughput", unit="img/s")
            rows.append(row(plan, device, provider=way, config=config, **columns, **values))
    config = f"devices={world} batch={plan.loss_batch} size={plan.size} steps={plan.loss_steps}"
    for way, losses in several["losses"].items():
        gap = max(abs(a - b) for a, b in zip(losses, single["losses"]["single"], strict=True))
        columns = dict(mode="loss", dtype="float32", metric="largest_loss_difference")
        rows.append(row(plan, device, provider=way, config=config, **columns, p50=gap))
    columns = dict(mode="checkpoint", dtype="float32", metric="largest_logit_difference")
    rows.append(row(plan, device, provider="fsdp", config=config, **columns, p50=single["checkpoint"]["difference"]))
    return rows


def row(plan: Plan, device: torch.device, **values: Any) -> dict[str, Any]:
    """A row of this suite."""
    return report.make_row(device, suite=SUITE, name=plan.model, **values)


def show_losses(losses: dict[str, list[float]]) -> None:
    """Print the losses of every step side by side."""
    print("step  " + "  ".join(f"{way:>10}" for way in losses))
    for step, values in enumerate(zip(*losses.values(), strict=True)):
        print(f"{step:4d}  " + "  ".join(f"{value:10.6f}" for value in values))


if __name__ == "__main__":
    raise SystemExit(main())
