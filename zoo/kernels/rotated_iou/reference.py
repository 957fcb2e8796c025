"""Overlap of rotated rectangles and greedy suppression in plain PyTorch: the definition, the CPU path, the test oracle.

A rectangle is (x, y, dx, dy, yaw): its centre, its sizes and the angle counter-clockwise from +x to the side dx.

The area of A and B together needs no polygon. In the frame of B, an axis-aligned rectangle of half sizes w and h, and
with A's boundary walked counter-clockwise, Green's theorem gives

    |A n B| = sum over A's edges of the integral of clamp(x, -w, w) dy over the part of the edge with |y| <= h

(clamp(x) has the derivative 1 inside B's columns and 0 outside). Along an edge clamp(x) is linear between the two
points where it leaves the edge's own ends, so the integral has a closed form. It is continuous in all ten numbers:
parallel, touching and equal rectangles need no special case and no margin.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Divisors below this are replaced: what they divide has no weight.
TINY = 1e-30
EPSILON = 1e-8
# Pairs whose overlap is computed at once on a CPU; a pair takes some dozens of floats.
MAX_PAIRS = 1 << 18


def _edge(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """Integral of clamp(x, -w, w) dy over the part of the edge with |y| <= h."""
    dx, dy = x1 - x0, y1 - y0
    start, end = torch.minimum(torch.maximum(y0, -h), h), torch.minimum(torch.maximum(y1, -h), h)
    divisor = torch.where(dy.abs() < TINY, 1, dy)
    xs = x0 + ((start - y0) / divisor).clamp(0, 1) * dx
    xe = x1 - ((y1 - end) / divisor).clamp(0, 1) * dx
    cs, ce = torch.minimum(torch.maximum(xs, -w), w), torch.minimum(torch.maximum(xe, -w), w)
    # Shares of the edge over which clamp(x) stays at its first and at its last value.
    run = (xe - xs).abs()
    shares = ((cs - xs).abs() - (xe - ce).abs()) / torch.where(run < TINY, 1, run)
    return (end - start) * 0.5 * (cs + ce + shares * (cs - ce))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Areas of intersection of rectangles [..., 5], which broadcast: [...]."""
    ax, ay, aw, ah, angle_a = a.unbind(-1)
    bx, by, bw, bh, angle_b = b.unbind(-1)
    # A's centre and half sides, as vectors, in the frame of B.
    cos, sin = angle_b.cos(), angle_b.sin()
    rx, ry = cos * (ax - bx) + sin * (ay - by), cos * (ay - by) - sin * (ax - bx)
    cos, sin = (angle_a - angle_b).cos(), (angle_a - angle_b).sin()
    ux, uy, vx, vy = cos * aw / 2, sin * aw / 2, -sin * ah / 2, cos * ah / 2
    xs = (rx + ux + vx, rx - ux + vx, rx - ux - vx, rx + ux - vx)
    ys = (ry + uy + vy, ry - uy + vy, ry - uy - vy, ry + uy - vy)
    area = sum(_edge(xs[i - 1], ys[i - 1], xs[i], ys[i], bw / 2, bh / 2) for i in range(4))
    return area.clamp(min=0)


def nms(boxes: Tensor, count: Tensor, threshold: Tensor) -> Tensor:
    """Greedy suppression of each group's rectangles, which come best first; see `op._nms`.

    Args:
        boxes: [G, N, 5].
        count: int32 [G], how many of the N are there.
        threshold: [G].

    Returns:
        bool [G, N], which are kept.
    """
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for g, n in enumerate(count.tolist()):
        n = min(n, boxes.shape[1])
        first, second = conflicts(boxes[g, :n], threshold[g])
        keep[g, :n] = greedy(first, second, n)
    return keep


def conflicts(boxes: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs first < second of rectangles [N, 5] with an intersection over union above the threshold."""
    radius = boxes[:, 2:4].norm(dim=-1) / 2
    found = []
    rows = max(1, MAX_PAIRS // max(1, len(boxes)))
    for start in range(0, len(boxes), rows):
        # Rectangles meet only where their circumscribed circles do.
        row = slice(start, start + rows)
        far = (boxes[row, None, :2] - boxes[None, :, :2]).square().sum(-1)
        near = (far <= (radius[row, None] + radius).square()).triu(start + 1)
        first, second = near.nonzero(as_tuple=True)
        first = first + start
        inter = overlap(boxes[first], boxes[second])
        area = boxes[:, 2] * boxes[:, 3]
        union = area[first] + area[second] - inter
        meet = inter > threshold * union.clamp(min=EPSILON)
        found.append((first[meet], second[meet]))
    if not found:
        return (torch.zeros(0, dtype=torch.int64, device=boxes.device),) * 2
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def greedy(first: Tensor, second: Tensor, n: int) -> Tensor:
    """bool [n]: kept are those that no kept one before them conflicts with.

    The rule is applied to all at once until nothing changes. A decision depends on earlier ones alone, so after t
    rounds the first t are final, and the only fixed point is the greedy choice. Chains of conflicts are short.
    """
    keep = torch.ones(n, dtype=torch.bool, device=first.device)
    while True:
        rest = torch.ones_like(keep)
        rest[second[keep[first]]] = False
        if torch.equal(rest, keep):
            return keep
        keep = rest
