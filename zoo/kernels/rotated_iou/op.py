"""The registered ops of rotated overlap and suppression, and their public functions.

None of them is differentiable: detectors use them for targets, costs and decisions, detached from the boxes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.kernels._dispatch import refuse, use_triton
from zoo.kernels.rotated_iou import reference

# Words of the conflict matrix that the greedy kernel holds for a row: 32 rectangles each.
MAX_GROUP = 8192
MAX_GROUPS = 65535


@torch.library.custom_op("zoo::rotated_overlap", mutates_args=(), device_types="cuda")
def _overlap(a: Tensor, b: Tensor, aligned: bool) -> Tensor:
    from zoo.kernels.rotated_iou import triton

    return triton.overlap(a, b, aligned)


@_overlap.register_kernel("cpu")
def _(a, b, aligned):
    return _reference_overlap(a, b, aligned)


@_overlap.register_fake
def _(a, b, aligned):
    return a.new_empty((a.shape[0],) if aligned else (a.shape[0], b.shape[0]))


@torch.library.custom_op("zoo::rotated_nms", mutates_args=(), device_types="cuda")
def _nms(boxes: Tensor, count: Tensor, threshold: Tensor) -> Tensor:
    """[G, N, 5] best first, int32 [G], float32 [G] -> bool [G, N]; see `reference.nms`."""
    from zoo.kernels.rotated_iou import triton

    return triton.nms(boxes, count, threshold)


@_nms.register_kernel("cpu")
def _(boxes, count, threshold):
    return reference.nms(boxes, count, threshold)


@_nms.register_fake
def _(boxes, count, threshold):
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def _reference_overlap(a: Tensor, b: Tensor, aligned: bool) -> Tensor:
    """[N, 5], [M, 5] -> [N, M] or [N]. Pairs whose circumscribed circles are apart are left out."""
    if aligned:
        return reference.overlap(a, b)
    out = a.new_zeros(len(a), len(b))
    radius_a, radius_b = (x[:, 2:4].norm(dim=-1) / 2 for x in (a, b))
    far = (a[:, None, :2] - b[:, :2]).square().sum(-1)
    # A pair with NaN is near, so that its overlap is NaN too.
    near = ~(far > (radius_a[:, None] + radius_b).square())
    i, j = near.nonzero(as_tuple=True)
    for part in range(0, len(i), reference.MAX_PAIRS):
        rows, cols = i[part : part + reference.MAX_PAIRS], j[part : part + reference.MAX_PAIRS]
        out[rows, cols] = reference.overlap(a[rows], b[cols])
    return out


def can_run(boxes: Tensor, group: int = 0, raise_error: bool = False) -> bool:
    """Whether the Triton kernels take these rectangles.

    Args:
        boxes: Rectangles.
        group: Rectangles of a group in suppression, 0 for overlaps.
        raise_error: Raise with the reason instead of returning False.

    Raises:
        NotImplementedError: With `raise_error`, naming the feature, its limit and the value received.
    """
    reasons = []
    if not boxes.is_cuda:
        reasons.append(f"it needs CUDA tensors, got device {boxes.device}.")
    if boxes.dtype != torch.float32:
        reasons.append(f"it computes in float32, got {boxes.dtype}.")
    if group > MAX_GROUP:
        reasons.append(f"its limit is {MAX_GROUP} rectangles a group, got {group}; give a smaller `limit`.")
    groups = math.prod(boxes.shape[:-2])
    if groups > MAX_GROUPS:
        reasons.append(f"its limit is {MAX_GROUPS} groups, got {groups}.")
    return refuse(reasons, "rotated_iou", raise_error)


def _prepare(name: str, boxes: Tensor, sizes: tuple[int, ...], dims: int | None = 2) -> Tensor:
    if (
        not boxes.is_floating_point()
        or boxes.shape[-1:] not in [(s,) for s in sizes]
        or dims not in (None, boxes.dim())
    ):
        shape = f"[{'N' if dims else '..., N'}, {' or '.join(map(str, sizes))}]"
        raise ValueError(f"{name} must be floating point {shape}, got {boxes.dtype} {tuple(boxes.shape)}.")
    # Half precision holds no coordinates of a scene.
    return boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))


def _check_pair(a: Tensor, b: Tensor, aligned: bool) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"a and b need one dtype and device, got {a.dtype} {a.device} and {b.dtype} {b.device}.")
    if aligned and len(a) != len(b):
        raise ValueError(f"aligned pairs need as many a as b, got {len(a)} and {len(b)}.")


def rotated_overlap(a: Tensor, b: Tensor, *, aligned: bool = False, backend: str = "auto") -> Tensor:
    """Areas of intersection of rotated rectangles.

    Args:
        a: Rectangles [N, 5]: centre x, y, sizes dx, dy, and the angle in radians counter-clockwise from +x to the side
            dx. For angles that count clockwise negate them (of both).
        b: Rectangles [M, 5] of the same dtype.
        aligned: Take pairs of equal position (N = M) instead of all pairs.
        backend: "auto", "triton" or "reference".

    Returns:
        [N, M], or [N] with `aligned`; in units of area, float32 (float64 on the reference). Not differentiable.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    a, b = _prepare("a", a, (5,)), _prepare("b", b, (5,))
    _check_pair(a, b, aligned)
    if use_triton(backend, lambda explain: can_run(a, raise_error=explain)):
        return torch.ops.zoo.rotated_overlap(a, b, aligned)
    return _reference_overlap(a, b, aligned)


def rectangles(boxes: Tensor) -> Tensor:
    """The rectangles [..., 5] that boxes (x, y, z, dx, dy, dz, yaw, ...) [..., 7 or more] cover seen from above."""
    return torch.cat([boxes[..., :2], boxes[..., 3:5], boxes[..., 6:7]], -1)  # no list of indices: it would be copied


def rotated_iou(a: Tensor, b: Tensor, *, aligned: bool = False, backend: str = "auto") -> Tensor:
    """Intersection over union of rotated rectangles [N, 5] and [M, 5], or boxes of 7 columns seen from above.

    Arguments, result and errors are those of `rotated_overlap`; boxes are (x, y, z, dx, dy, dz, yaw).
    """
    a, b = (_prepare(name, x, (5, 7)) for name, x in (("a", a), ("b", b)))
    a, b = (rectangles(x) if x.shape[-1] == 7 else x for x in (a, b))
    inter = rotated_overlap(a, b, aligned=aligned, backend=backend)
    area_a, area_b = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    union = (area_a if aligned else area_a[:, None]) + area_b - inter
    return inter / union.clamp(min=reference.EPSILON)


def rotated_iou_3d(
    a: Tensor, b: Tensor, *, aligned: bool = False, z_bottom: bool = False, backend: str = "auto"
) -> Tensor:
    """Intersection over union of volumes of upright boxes.

    Args:
        a: Boxes [N, 7]: x, y, z, dx, dy, dz, yaw, as in `rotated_overlap`.
        b: Boxes [M, 7].
        aligned: Take pairs of equal position instead of all pairs.
        z_bottom: z is the bottom of a box and not its centre.
        backend: "auto", "triton" or "reference".

    Returns:
        [N, M], or [N] with `aligned`. Not differentiable.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    a, b = _prepare("a", a, (7,)), _prepare("b", b, (7,))
    inter = rotated_overlap(rectangles(a), rectangles(b), aligned=aligned, backend=backend)
    shift = 0.0 if z_bottom else 0.5
    low_a, low_b = a[:, 2] - shift * a[:, 5], b[:, 2] - shift * b[:, 5]
    high_a, high_b, volume_a, volume_b = low_a + a[:, 5], low_b + b[:, 5], a[:, 3:6].prod(-1), b[:, 3:6].prod(-1)
    if not aligned:
        low_a, high_a, volume_a = low_a[:, None], high_a[:, None], volume_a[:, None]
    inter = inter * (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0)
    return inter / (volume_a + volume_b - inter).clamp(min=1e-6)


def rotated_nms(
    boxes: Tensor,
    scores: Tensor,
    threshold: float | Tensor,
    *,
    max_output: int,
    limit: int | None = None,
    group_limit: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of rotated rectangles, for many groups (samples, classes) at once.

    Sizes of the results do not depend on values, and nothing is copied to the host on the Triton path: it can be
    captured in a CUDA graph.

    Args:
        boxes: Rectangles [..., N, 5] as in `rotated_overlap`, float32 (float64 on the reference).
        scores: [..., N]. Entries of -inf or NaN are absent rectangles. Equal scores keep their order.
        threshold: A rectangle is dropped if its intersection over union with a kept one of a higher score exceeds this;
            a number, or a tensor of the shape of the groups.
        max_output: Places for the result of a group, K.
        limit: Only the best so many of a group take part; all by default.
        group_limit: The same for each group, a tensor of the shape of the groups, where they differ.
        backend: "auto", "triton" or "reference".

    Returns:
        int64 [..., K], positions of the kept rectangles, best first, 0 beyond their count; and int32 [...], the count,
        at most K.

    Raises:
        ValueError: Shapes, dtypes or sizes do not fit.
        NotImplementedError: `backend="triton"` where the kernels cannot run.
    """
    boxes = _prepare("boxes", boxes, (5,), None)
    if boxes.dim() < 2 or scores.shape != boxes.shape[:-1]:
        raise ValueError(f"scores must be {list(boxes.shape[:-1])} as the boxes are, got {tuple(scores.shape)}.")
    if max_output < 0 or (limit is not None and limit < 0):
        raise ValueError(f"max_output and limit must not be negative, got {max_output} and {limit}.")
    shape, size = scores.shape[:-1], min(scores.shape[-1], scores.shape[-1] if limit is None else limit)
    scores = scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores = scores[None].flatten(0, -2)  # [G, N]
    best, order = scores.sort(dim=-1, descending=True, stable=True)
    order = order[:, :size]
    ranked = boxes[None].flatten(0, boxes.dim() - 2).gather(1, order[..., None].expand(-1, -1, 5))
    count = (best[:, :size] > -torch.inf).sum(-1, dtype=torch.int32)
    if group_limit is not None:
        count = torch.minimum(count, group_limit.expand(shape).reshape(-1).to(torch.int32))
    if isinstance(threshold, Tensor):
        threshold = threshold.to(boxes.dtype).expand(shape).reshape(-1)
    else:
        threshold = boxes.new_full((len(scores),), threshold)
    if use_triton(backend, lambda explain: can_run(ranked, size, explain)):
        keep = torch.ops.zoo.rotated_nms(ranked, count, threshold.contiguous())
    else:
        keep = reference.nms(ranked, count, threshold)
    index, count = _compact(order, keep, max_output)
    return index.view(*shape, max_output), count.view(shape)


def _compact(order: Tensor, keep: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions [G, size] of the kept, in their order, and how many they are."""
    place = keep.cumsum(-1)
    # One place more takes what is dropped.
    target = torch.where(keep & (place <= size), place - 1, size)
    index = order.new_zeros(len(order), size + 1).scatter_(1, target, order)
    index[:, size] = 0
    return index[:, :size], keep.sum(-1, dtype=torch.int32).clamp(max=size)
