"""Fast inference of detectors in point clouds.

    runtime = detector.accelerate()
    boxes, scores, labels = runtime([points])[0]

Weights are copied once, with batch norms folded into convolutions. On a GPU everything after the encoder of voxels runs
in half precision and channels-last memory, and the branches of a CenterPoint head become two convolutions. Voxels are
padded to a capacity, so that all from the voxels to the suppressed boxes is one CUDA graph for each capacity and number
of samples. The host waits once a batch, for the number of boxes; it learns then too whether the capacity was too small,
and repeats the batch with a larger one if so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.backbones.padded_graphs import PaddedGraphs
from zoo.heads.bev_ops import BatchDetections
from zoo.heads.center_point import CenterHead
from zoo.heads.detections import Detections
from zoo.heads.point_base import PointDetector, drop_empty
from zoo.kernels.voxelize import Voxels

# Capacities are multiples of this, and at first this much above the number of voxels.
ROWS, MARGIN = 2048, 1.2
# A capacity that exceeds the voxels so many times is given up.
WASTE = 3
# Tensor cores take channels by eights.
CHANNELS = 8


def fold_norms(model: nn.Module) -> nn.Module:
    """Fold batch norms that directly follow a convolution into it, in place.

    Found are pairs of neighbours in a `Sequential`, and `conv` with `bn` or `conv1` with `bn1` of any other module.
    """
    for parent in model.modules():
        names = list(dict(parent.named_children()))
        if isinstance(parent, nn.Sequential):
            pairs = list(zip(names, names[1:], strict=False))
        else:
            pairs = [(name, name.replace("conv", "bn")) for name in names if name.startswith("conv")]
        for first, second in pairs:
            conv, norm = getattr(parent, first), getattr(parent, second, None)
            if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(norm, nn.BatchNorm2d):
                transposed = isinstance(conv, nn.ConvTranspose2d)
                setattr(parent, first, fuse_conv_bn_eval(conv, norm, transpose=transposed))
                setattr(parent, second, nn.Identity())
    return model


class JointBranches(nn.Module):
    """The maps of a CenterPoint head by two convolutions: all hidden layers side by side, then all maps.

    The second convolution is block-diagonal, mostly zeros, and faster than many narrow ones nonetheless.

    Args:
        head: A head in evaluation mode with its norms folded.
    """

    def __init__(self, head: CenterHead) -> None:
        super().__init__()
        branches = head.branch_modules
        first = [next(m for m in branch[0].modules() if isinstance(m, nn.Conv2d)) for branch in branches.values()]
        last = [branch[1] for branch in branches.values()]
        self.shared_conv = head.shared_conv
        self.sizes = {name: conv.out_channels for name, conv in zip(branches, last, strict=True)}
        self.register_buffer("hidden_weight", torch.cat([conv.weight.detach() for conv in first]))
        self.register_buffer("hidden_bias", torch.cat([conv.bias.detach() for conv in first]))
        hidden, out = len(self.hidden_bias), sum(self.sizes.values())
        weight = last[0].weight.new_zeros(-(-out // CHANNELS) * CHANNELS, hidden, *last[0].kernel_size)
        bias, row, column = weight.new_zeros(len(weight)), 0, 0
        for conv in last:
            rows, columns = conv.weight.shape[:2]
            weight[row : row + rows, column : column + columns] = conv.weight.detach()
            bias[row : row + rows] = conv.bias.detach()
            row, column = row + rows, column + columns
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] -> raw maps by name, as `CenterHead.forward`."""
        x = F.relu_(F.conv2d(self.shared_conv(x), self.hidden_weight, self.hidden_bias, padding=1))
        maps = F.conv2d(x, self.weight, self.bias, padding=1)
        parts = maps[:, : sum(self.sizes.values())].split(list(self.sizes.values()), 1)
        return dict(zip(self.sizes, parts, strict=True))


class PointRuntime:
    """A detector made ready for inference; it does not follow later changes of the detector's weights.

    Args:
        detector: A detector of `zoo.heads.point_detectors`, on the device where it is to run.
        dtype: Of all after the encoder of voxels; float16 on a GPU and float32 on a CPU by default.
        padded: Pad voxels and join the branches of the head, which CUDA graphs need and tensor cores like; by default
            on a GPU.
        compile: Run the convolutions through `torch.compile`: about a minute for each number of samples, then fewer
            passes over the maps.
        max_graphs: CUDA graphs that are kept, each with memory for the maps.
    """

    def __init__(
        self,
        detector: PointDetector,
        dtype: torch.dtype | None = None,
        *,
        padded: bool | None = None,
        compile: bool = False,
        max_graphs: int = 4,
    ) -> None:
        self.device = next(detector.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.dtype = dtype or (torch.float16 if self.on_gpu else torch.float32)
        self.padded, self.max_graphs = self.on_gpu if padded is None else padded, max_graphs
        with torch.no_grad():
            self.detector = self._prepare(detector)
        self._maps = torch.compile(self._dense, dynamic=False) if compile else self._dense
        self._graphs = PaddedGraphs(self._detect, ROWS)
        self._capacity: dict[int, int] = {}
        self._margin = MARGIN

    def _prepare(self, detector: PointDetector) -> PointDetector:
        detector = copy.deepcopy(detector).eval().requires_grad_(False)
        fold_norms(detector)
        joint = self.padded and isinstance(detector.head, CenterHead)
        self._head = JointBranches(detector.head) if joint else detector.head
        for module in [*detector.children(), self._head]:
            if module is not detector.vfe_module:
                self._cast(module)
        return detector

    def _cast(self, model: nn.Module) -> None:
        """Give weights their dtype and layout. Constants, which state dicts leave out, stay in float32: limits and
        thresholds of a head do not bear rounding."""
        layout = torch.channels_last if self.on_gpu else torch.contiguous_format
        for module in model.modules():
            constants = module._non_persistent_buffers_set
            buffers = {name: b for name, b in module.named_buffers(recurse=False) if name not in constants}
            for tensor in [*module.parameters(recurse=False), *buffers.values()]:
                data = tensor.data.to(self.dtype) if tensor.is_floating_point() else tensor.data
                # Only two-dimensional convolutions have such weights.
                tensor.data = data.contiguous(memory_format=layout) if data.dim() == 4 else data

    def _dense(self, x: Tensor) -> dict[str, Tensor]:
        return self._head(self.detector.neck_map(x))

    def _detect(self, features: Tensor, voxels: Voxels) -> tuple[BatchDetections, Tensor]:
        """Boxes of encoded voxels, and the numbers that the host waits for: boxes of each sample, voxels, whether the
        capacity was too small."""
        x, full = self.detector.encode_padded(features, voxels)
        found = drop_empty(self.detector.head.decode(self._maps(x)), voxels)
        return found, torch.cat([found.count.long(), torch.stack([voxels.num.long(), full.long()])])

    def _run(self, features: Tensor, voxels: Voxels) -> tuple[BatchDetections, Tensor]:
        if len(self._graphs.graphs) > self.max_graphs:
            self._graphs.clear()
        # Maps keep their size, so that trying convolution algorithms once pays.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.dtype != torch.float32):
            return self._graphs(features, voxels)

    @torch.no_grad()
    def __call__(self, points: Sequence[Tensor]) -> list[Detections]:
        """Detect objects; arguments, results and errors are those of `PointDetector.forward`."""
        clouds = self.detector.check(points)
        samples = len(clouds)
        if samples == 0:
            return []
        if not self.padded:
            return self._run_unpadded(clouds)
        capacity = self._capacity.get(samples) or self._first_capacity(clouds)
        while True:
            features, voxels = self.detector.vfe_module(clouds, capacity)
            found, numbers = self._run(features.to(self.dtype), voxels)
            *counts, voxel_count, full = numbers.tolist()
            if full and voxel_count < capacity:
                # A later stage needs more rows for a voxel than it was given.
                self._margin *= 2
            if full:
                capacity = self._capacity[samples] = max(2 * capacity, self._bucket(voxel_count))
                continue
            if self._bucket(voxel_count) * WASTE < capacity:
                self._capacity[samples] = self._bucket(voxel_count)
            break
        # The memory of a graph is written again by the next batch.
        return [
            Detections(*(x[:n].clone() for x in parts))
            for *parts, n in zip(found.boxes, found.scores, found.labels, counts, strict=True)
        ]

    def _run_unpadded(self, clouds: list[Tensor]) -> list[Detections]:
        features, voxels = self.detector.vfe_module(clouds)
        if len(features) == 0:
            return self.detector.nothing(len(clouds), features.device)
        x = self.detector.encode(features.to(self.dtype), voxels)
        return drop_empty(self.detector.head.decode(self._maps(x)), voxels).split()

    @torch.no_grad()
    def stages(self, points: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
        """The stages of a call, each ready to run on what the one before makes of these points: `encoder`, `backbone`,
        `maps` and `boxes`, which suppresses too. For measurements."""
        detector, clouds = self.detector, self.detector.check(points)
        capacity = self._first_capacity(clouds) if self.padded else None
        features, voxels = detector.vfe_module(clouds, capacity)
        features = features.to(self.dtype)

        def backbone() -> Tensor:
            return detector.encode_padded(features, voxels)[0] if self.padded else detector.encode(features, voxels)

        x = backbone()
        maps = self._maps(x)
        return {
            "encoder": lambda: detector.vfe_module(clouds, capacity),
            "backbone": backbone,
            "maps": lambda: self._maps(x),
            "boxes": lambda: detector.head.decode(maps),
        }

    def _first_capacity(self, clouds: list[Tensor]) -> int:
        _, voxels = self.detector.vfe_module(clouds)
        return self._capacity.setdefault(len(clouds), self._bucket(len(voxels.coords)))

    def _bucket(self, voxels: int) -> int:
        """Capacity for about so many voxels."""
        return (int(voxels * self._margin) // ROWS + 1) * ROWS
