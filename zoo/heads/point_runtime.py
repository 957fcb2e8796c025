"""Fast inference of detectors in point clouds.

    runtime = detector.accelerate()
    boxes, scores, labels = runtime([points])[0]

Weights are copied once, with norms folded into convolutions and linear layers. On a GPU everything after the encoder of
voxels runs in half precision and channels-last memory, and the branches of a CenterPoint head become two convolutions.
Points are padded with NaN and voxels to a capacity, so that all from the points to the suppressed boxes is one CUDA
graph for each size. The host waits once a batch, for the number of boxes; it learns then too whether the capacity was
too small, and repeats the batch with a larger one if so.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.backbones.padded_graphs import CloudGraphs
from zoo.backbones.point_layers import FoldedVFE
from zoo.backbones.scatterformer import ScatterFormer
from zoo.heads.bev_ops import BatchDetections
from zoo.heads.center_point import CenterHead
from zoo.heads.detections import Detections
from zoo.heads.map_convs import conv_relu, fuse_convs
from zoo.heads.point_base import PointDetector, drop_empty
from zoo.kernels.voxelize import Voxels, group_points

# Capacities are multiples of this, and at first this much above the number of voxels.
ROWS, MARGIN = 2048, 1.2
# The same for points, whose number a sensor keeps.
POINTS, POINT_MARGIN = 16384, 1.05
# Room that so many batches in a row could do with less than a third of is given up.
WASTE, PATIENCE = 3, 16
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
        x = conv_relu(self.shared_conv(x), self.hidden_weight, self.hidden_bias, padding=1)
        maps = F.conv2d(x, self.weight, self.bias, padding=1)
        parts = maps[:, : sum(self.sizes.values())].split(list(self.sizes.values()), 1)
        return dict(zip(self.sizes, parts, strict=True))


@dataclasses.dataclass
class Room:
    """What batches of one number of samples are padded to."""

    points: int  # rows of each cloud
    rows: tuple[int, ...]  # rows of the batch's voxels, then of the stages that have sites of their own
    spare: int = 0  # batches in a row that needed far less

    @property
    def capacity(self) -> int:
        """Rows of the batch's voxels."""
        return self.rows[0]


class PointRuntime:
    """A detector made ready for inference; it does not follow later changes of the detector's weights.

    Args:
        detector: A detector of `zoo.heads.point_detectors`, on the device where it is to run.
        dtype: Of all after the encoder of voxels; float16 on a GPU and float32 on a CPU by default.
        padded: Pad voxels and join the branches of the head, which CUDA graphs need and tensor cores like; by default
            on a GPU.
        compile: Run the convolutions through `torch.compile`: about a minute for each number of samples, then fewer
            passes over the maps.
        max_graphs: CUDA graphs that are kept, one for each size that batches were padded to; they share their memory.
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
        self.padded = self.on_gpu if padded is None else padded
        self.compiled = compile
        with torch.no_grad():
            self.detector = self._prepare(detector)
        self._maps = torch.compile(self._dense, dynamic=False) if compile else self._dense
        self._graphs = CloudGraphs(self._detect, max_graphs)
        self._rooms: dict[int, Room] = {}
        # The backbone whose later stages have more or fewer sites than there are voxels.
        self._growing = next((m for m in self.detector.children() if isinstance(m, ScatterFormer)), None)

    def _prepare(self, detector: PointDetector) -> PointDetector:
        detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self._encoder = FoldedVFE(detector.vfe_module)
        fold_norms(detector)
        for module in detector.children():
            if isinstance(module, ScatterFormer):
                module.fold_norms()
        joint = self.padded and isinstance(detector.head, CenterHead)
        self._head = JointBranches(detector.head) if joint else detector.head
        if not self.compiled:
            # A compiler joins them by itself.
            fuse_convs(detector)
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

    def _encode(self, clouds: list[Tensor], capacity: int | None = None) -> tuple[Tensor, Voxels]:
        """Features of voxels in the runtime's dtype."""
        cloud = clouds[0] if len(clouds) == 1 else torch.cat(clouds)
        features, voxels = self._encoder(cloud, [len(cloud) for cloud in clouds], capacity)
        return features.to(self.dtype), voxels

    def _detect(self, cloud: Tensor, rows: tuple[int, ...]) -> tuple[BatchDetections, Tensor]:
        """Boxes of clouds [B, P, F], and the numbers that the host waits for: boxes of each sample, voxels, whether
        some rows did not suffice."""
        B, P, _ = cloud.shape
        features, voxels = self._encoder(cloud.flatten(0, 1), [P] * B, rows[0])
        self._grow(rows)
        # Maps keep their size, so that trying convolution algorithms once pays.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.dtype != torch.float32):
            x, full = self.detector.encode_padded(features.to(self.dtype), voxels)
            found = drop_empty(self.detector.head.decode(self._maps(x)), voxels)
        return found, torch.cat([found.count.long(), voxels.num[None], full.long()[None]])

    @torch.no_grad()
    def __call__(self, points: Sequence[Tensor]) -> list[Detections]:
        """Detect objects; arguments, results and errors are those of `PointDetector.forward`."""
        clouds = self.detector.check(points)
        if not clouds:
            return []
        if not self.padded:
            return self._run_unpadded(clouds)
        room, full = self._room(clouds), True
        while full:
            found, numbers = self._graphs(clouds, room.points, room.rows)
            # The memory of a graph is written again by the next batch. These copies need not wait.
            boxes, scores, labels = (x.clone() for x in found[:3])
            *counts, voxels, full = numbers.tolist()
            if full:
                room.rows = tuple(map(max, room.rows, self._rows(clouds)))
        self._save(room, clouds, voxels)
        return [Detections(*(x[:n] for x in parts)) for *parts, n in zip(boxes, scores, labels, counts, strict=True)]

    def _room(self, clouds: list[Tensor]) -> Room:
        """What the batch is padded to."""
        most = max(map(len, clouds))
        room = self._rooms.get(len(clouds))
        if room is None:
            room = self._rooms[len(clouds)] = Room(self._bucket(most), self._rows(clouds))
        if most > room.points:
            room.points = self._bucket(most)
        return room

    def _save(self, room: Room, clouds: list[Tensor], voxels: int) -> None:
        """Less room after many small batches."""
        points = self._bucket(max(map(len, clouds)))
        far_less = points * WASTE < room.points or self._capacity(voxels) * WASTE < room.capacity
        room.spare = room.spare + 1 if far_less else 0
        if room.spare >= PATIENCE:
            room.points, room.rows, room.spare = points, self._rows(clouds), 0

    def _rows(self, clouds: list[Tensor]) -> tuple[int, ...]:
        """Rows for about what the batch has; waits for the device."""
        voxels = group_points(torch.cat(clouds), [len(cloud) for cloud in clouds], self._encoder.grid).voxels
        later = self._growing.count_rows(voxels) if self._growing else ()
        return tuple(map(self._capacity, (len(voxels.coords), *later)))

    def _grow(self, rows: tuple[int, ...]) -> None:
        """Give later stages their rows."""
        if self._growing:
            # The backbone rounds up.
            self._growing.growth = tuple((n - 0.5) / rows[0] for n in rows[1:])

    @staticmethod
    def _capacity(n: int) -> int:
        """Rows for about n voxels, always more."""
        return (int(n * MARGIN) // ROWS + 1) * ROWS

    @staticmethod
    def _bucket(points: int) -> int:
        """Room for about so many points."""
        return (int(points * POINT_MARGIN) // POINTS + 1) * POINTS

    def _run_unpadded(self, clouds: list[Tensor]) -> list[Detections]:
        features, voxels = self._encode(clouds)
        if len(features) == 0:
            return self.detector.nothing(len(clouds), features.device)
        x = self.detector.encode(features, voxels)
        return drop_empty(self.detector.head.decode(self._maps(x)), voxels).split()

    @torch.no_grad()
    def stages(self, points: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
        """The stages of a call, each ready to run on what the one before makes of these points: `encoder`, `backbone`,
        `maps` and `boxes`, which suppresses too. For measurements."""
        detector, clouds = self.detector, self.detector.check(points)
        rows = self._room(clouds).rows if self.padded else (None,)
        capacity = rows[0]
        features, voxels = self._encode(clouds, capacity)

        def backbone() -> Tensor:
            if self.padded:
                self._grow(rows)
            return detector.encode_padded(features, voxels)[0] if self.padded else detector.encode(features, voxels)

        x = backbone()
        maps = self._maps(x)
        return {
            "encoder": lambda: self._encode(clouds, capacity),
            "backbone": backbone,
            "maps": lambda: self._maps(x),
            "boxes": lambda: detector.head.decode(maps),
        }
