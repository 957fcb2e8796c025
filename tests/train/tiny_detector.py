"""A small dense detector with the interface of the real ones, for tests of training and of the command line."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.heads.bev_ops import ClassNMS, Grid
from zoo.heads.center_point import ScatterFormerCenterHead


class TinyDetector(nn.Module):
    """Statistics of points in cells, a few convolutions, a CenterPoint head."""

    point_features = ("x", "y", "z", "intensity", "elongation")

    def __init__(
        self, classes=("car", "pedestrian", "cyclist"), reach: float = 20.0, cell: float = 0.5, width: int = 32
    ):
        super().__init__()
        self.classes, self.cell = tuple(classes), cell
        self.point_range = (-reach, -reach, -2.0, reach, reach, 4.0)
        self.size = int(2 * reach / cell)
        layers = [
            (6, width, 1, 1),
            (width, width, 1, 1),
            (width, width, 2, 2),
            (width, width, 3, 3),
            (width, width, 1, 1),
        ]
        self.body = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=p, dilation=d, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, p, d in layers
        ))  # fmt: skip
        self.head = ScatterFormerCenterHead(
            width, width, iou_power=[0.5] * len(classes), num_classes=len(classes),
            grid=Grid((-reach, -reach), (cell, cell)), limits=(-2 * reach, -2 * reach, -10, 2 * reach, 2 * reach, 10),
            nms=ClassNMS([0.2] * len(classes), [200] * len(classes), [100] * len(classes)), max_candidates=200,
            min_radius=2,
        )  # fmt: skip

    def maps(self, points: list[Tensor]) -> dict[str, Tensor]:
        return self.head(self.body(torch.stack([self._cells(p) for p in points])))

    def _cells(self, points: Tensor) -> Tensor:
        low = points.new_tensor(self.point_range[:2])
        place = (points[:, :2] - low) / self.cell
        inside = ((place >= 0) & (place < self.size)).all(1)
        place, points = place[inside], points[inside]
        cell = place.floor().long()
        index = cell[:, 1] * self.size + cell[:, 0]
        z, (u, v) = points[:, 2], (place - cell - 0.5).unbind(1)

        def reduce(values: Tensor, how: str) -> Tensor:
            return values.new_zeros(self.size**2).scatter_reduce(0, index, values, how, include_self=False)

        count = torch.zeros_like(reduce(z, "sum")).index_add(0, index, torch.ones_like(z))
        rows = [count.log1p(), reduce(z, "amax"), reduce(z, "amin"), reduce(u, "mean"), reduce(v, "mean"),
                reduce(points[:, 3], "mean")]  # fmt: skip
        return torch.stack(rows).view(len(rows), self.size, self.size)

    def loss(self, points: list[Tensor], targets) -> dict[str, Tensor]:
        return self.head.loss(self.maps(points), targets)

    def forward(self, points: list[Tensor]):
        return self.head.decode(self.maps(points)).split()
