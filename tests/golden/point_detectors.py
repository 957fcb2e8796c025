"""Runners of the golden cases of heads and whole detectors of both point cloud families."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.convert.scatterformer import convert
from zoo.heads.bev_ops import ClassNMS, Grid
from zoo.heads.center_point import CenterHead, FlatFormerCenterHead, ScatterFormerCenterHead
from zoo.heads.detections import Targets
from zoo.heads.point_detectors import FlatFormerDetector, ScatterFormerDetector
from zoo.heads.transfusion import TransFusionHead

from . import fill, pc_inputs

FAR = [-1e6] * 3 + [1e6] * 3


class DetectorCase:
    """One case, as described in the folders' README: inputs by generator, weights by name."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self.kind, self.kwargs, self.name = self.spec["kind"], self.spec["kwargs"], self.spec["case"]
        self.compared: set[str] = set()

    def weights(self) -> dict[str, Tensor]:
        state = fill.state_dict(self.spec["params"])
        for name, (scale, shift) in self.spec["overrides"].items():
            state[name] = state[name] * scale + shift
        return state

    def load(self, model: nn.Module) -> None:
        assert sum(p.numel() for p in model.parameters()) == self.spec["num_params"]
        model.load_state_dict(self.weights())
        model.eval()

    def input(self, name: str):
        arguments = dict(self.spec["inputs"][name])
        generator = arguments.pop("generator")
        if generator == "fill.image":
            return fill.image(arguments["name"], arguments["shape"])
        arguments.pop("z", None)
        return getattr(pc_inputs, generator.removeprefix("pc_inputs."))(**arguments)

    def check(self, name: str, actual: Tensor, **tolerance: float) -> None:
        """Compare with the expected values, thinned as the case's description says, at the case's tolerance."""
        if name not in self.expected:
            return
        expected = self.expected[name]
        actual = actual.detach()
        if actual.shape != expected.shape:
            actual = thin(actual, expected.shape)
        tolerance = tolerance or dict(rtol=self.spec["rtol"], atol=self.spec["atol"])
        torch.testing.assert_close(actual.to(expected.dtype), expected, **tolerance, msg=lambda text: f"{name}: {text}")
        self.compared.add(name)

    def check_loss(self, name: str, actual: Tensor) -> None:
        self.check(name, actual.view(1))

    def check_detections(self, sample: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Compare boxes of a sample as a set for each label: nearest centres belong together."""
        expected = [self.expected[f"det{sample}.{name}"] for name in ("boxes", "scores", "labels")]
        assert labels.bincount().tolist() == expected[2].bincount().tolist(), f"det{sample}: labels"
        for label in labels.unique():
            mine, theirs = labels == label, expected[2] == label
            a, b = boxes[mine], expected[0][theirs]
            # Boxes of one centre differ in height.
            nearest = torch.cdist(b[:, :6].double(), a[:, :6].double()).argmin(1)
            assert len(nearest.unique()) == len(nearest), f"det{sample}: label {int(label)} is not one to one"
            turns = torch.round((a[nearest][:, 6] - b[:, 6]) / (2 * np.pi)) * (2 * np.pi)
            a = a[nearest].clone()
            a[:, 6] -= turns
            settings = dict(rtol=self.spec["rtol"], atol=self.spec["atol"])
            torch.testing.assert_close(a, b, **settings, msg=lambda text: f"det{sample}.boxes: {text}")
            torch.testing.assert_close(scores[mine][nearest], expected[1][theirs], **settings)
        self.compared |= {f"det{sample}.{name}" for name in ("boxes", "scores", "labels")}

    def check_gradients(self, loss: Tensor, tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if f"grad.{name}" in self.expected]
        if names:
            grads = torch.autograd.grad(loss, [tensors[name] for name in names], retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                largest = self.expected[f"grad.{name}"].abs().max().item()
                self.check(f"grad.{name}", grad, rtol=self.spec["rtol"], atol=self.spec["atol"] * min(1, largest))

    def finish(self) -> None:
        """Every expected output must have been compared."""
        missing = set(self.expected) - self.compared
        assert not missing, f"outputs never compared: {sorted(missing)}"


def thin(x: Tensor, shape: torch.Size) -> Tensor:
    """Every n-th entry along each axis, with n such that the given shape remains."""
    assert x.dim() == len(shape)
    for axis, size in enumerate(shape):
        step = -(-x.shape[axis] // size)
        x = x[(slice(None),) * axis + (slice(None, None, step),)]
    assert x.shape == shape, f"{tuple(x.shape)} is no thinning to {tuple(shape)}"
    return x


def flatformer_head(kwargs: dict) -> FlatFormerCenterHead:
    """The head that an official configuration describes."""
    (task,) = kwargs["tasks"]
    coder, test = kwargs["bbox_coder"], kwargs["test_cfg"]
    cell = [size * coder["out_size_factor"] for size in coder["voxel_size"]]
    return FlatFormerCenterHead(
        kwargs["in_channels"],
        num_classes=task["num_class"],
        grid=Grid(tuple(coder["pc_range"]), tuple(cell)),
        limits=coder["post_center_range"],
        nms=ClassNMS(test["nms_thr"], test["pre_max_size"], test["post_max_size"]),
        score_threshold=coder["score_threshold"],
        max_candidates=coder["max_num"],
        min_radius=kwargs["train_cfg"]["min_radius"],
    )


def scatterformer_center_head(kwargs: dict) -> ScatterFormerCenterHead:
    config = kwargs["dense_head"]
    assigner, post = config["TARGET_ASSIGNER_CONFIG"], config["POST_PROCESSING"]
    nms = post["NMS_CONFIG"]
    stride = assigner["FEATURE_MAP_STRIDE"]
    return ScatterFormerCenterHead(
        kwargs["input_channels"],
        config["SHARED_CONV_CHANNEL"],
        iou_power=post["IOU_RECTIFIER"],
        num_classes=len(kwargs["class_names"]),
        grid=Grid(tuple(kwargs["point_cloud_range"][:2]), tuple(size * stride for size in kwargs["voxel_size"][:2])),
        limits=post["POST_CENTER_LIMIT_RANGE"],
        nms=ClassNMS(nms["NMS_THRESH"], nms["NMS_PRE_MAXSIZE"], nms["NMS_POST_MAXSIZE"]),
        score_threshold=post["SCORE_THRESH"],
        max_candidates=post["MAX_OBJ_PER_SAMPLE"],
        min_radius=assigner["MIN_RADIUS"],
    )


def ground_truth(case: DetectorCase, clockwise: bool) -> list[Targets]:
    boxes, labels = case.input("gt")
    if clockwise:
        boxes = [torch.cat([b[:, :6], -b[:, 6:7], b[:, 7:]], 1) for b in boxes]
    return [Targets(b, label) for b, label in zip(boxes, labels, strict=True)]


# Losses of the zoo by the names under which the official code logs them.
FLATFORMER_LOSSES = {f"loss.task0.{name}": name for name in ("loss_heatmap", "loss_bbox", "loss_iou")}
SCATTERFORMER_LOSSES = {
    "loss.total": "loss",
    "loss.rpn_loss": "loss",
    "loss.hm_loss_head_0": "loss_heatmap",
    "loss.loc_loss_head_0": "loss_bbox",
    "loss.iou_loss_head_0": "loss_iou",
    "loss.iou_reg_loss_head_0": "loss_iou_reg",
}


def check_center(case: DetectorCase, head: CenterHead, maps: dict[str, Tensor]) -> Tensor:
    """Maps, targets, losses and boxes of a CenterPoint head; the summed loss."""
    flat = isinstance(head, FlatFormerCenterHead)
    for name, value in maps.items():
        case.check(f"task0.{name}" if flat else f"head0.{name}", value)
    truth = ground_truth(case, clockwise=flat)
    goal = head.targets(truth, maps[head.heat_name].shape[2:])
    case.check("target0.heatmap", goal.heatmap)
    for name in ("ind", "mask"):
        case.check(f"target0.{name}", {"ind": goal.index, "mask": goal.mask}[name], rtol=0, atol=0)
    case.check("target0.anno_box" if flat else "target0.boxes", goal.rows)
    losses = head.loss(maps, truth)
    for official, name in (FLATFORMER_LOSSES if flat else SCATTERFORMER_LOSSES).items():
        case.check_loss(official, losses[name])
    for sample, found in enumerate(head.decode(maps).split()):
        boxes = head.official(found.boxes) if flat else found.boxes
        case.check_detections(sample, boxes, found.scores, found.labels if flat else found.labels + 1)
    return losses["loss"]


def run_center(case: DetectorCase, head: CenterHead) -> None:
    case.load(head)
    x = case.input("x").requires_grad_()
    loss = check_center(case, head, head(x))
    case.check_gradients(loss, {"x": x, **dict(head.named_parameters())})


def run_flatformer_head(case: DetectorCase) -> None:
    run_center(case, flatformer_head(case.kwargs))


def run_scatterformer_center(case: DetectorCase) -> None:
    run_center(case, scatterformer_center_head(case.kwargs))


SMALL = ("pedestrian", "traffic_cone")


def transfusion_head(kwargs: dict) -> TransFusionHead:
    config, extent, names = kwargs["dense_head"], kwargs["point_cloud_range"], kwargs["class_names"]
    stride = config["TARGET_ASSIGNER_CONFIG"]["FEATURE_MAP_STRIDE"]
    post, nms = config["POST_PROCESSING"], config["NMS_CONFIG"]
    # The published code suppresses the small classes alone, with its former radius as the threshold.
    small = [names.index(name) for name in SMALL]
    rules = dict.fromkeys(small, (0.175, nms["NMS_PRE_MAXSIZE"], nms["NMS_POST_MAXSIZE"]))
    everything = (2.0, config["NUM_PROPOSALS"], config["NUM_PROPOSALS"])
    return TransFusionHead(
        kwargs["input_channels"],
        len(names),
        Grid(tuple(extent[:2]), tuple(size * stride for size in kwargs["voxel_size"][:2])),
        extent,
        post["POST_CENTER_RANGE"],
        ClassNMS(*zip(*(rules.get(c, everything) for c in range(len(names))), strict=True)),
        small=small,
        num_proposals=config["NUM_PROPOSALS"],
        radius=config["QUERY_RADIUS"],
        channels=config["HIDDEN_CHANNEL"],
        heads=config["NUM_HEADS"],
        ffn_channels=config["FFN_CHANNEL"],
        dropout=config["DROPOUT"],
        score_threshold=post["SCORE_THRESH"],
    )


TRANSFUSION_LOSSES = {
    "loss.total": "loss",
    "loss.loss_trans": "loss",
    "loss.matched_ious": "matched_ious",
    **{f"loss.{name}": name for name in ("loss_heatmap", "loss_cls", "loss_bbox", "loss_iou", "loss_iou_reg")},
}


def check_transfusion(case: DetectorCase, head: TransFusionHead, maps: dict[str, Tensor]) -> Tensor:
    """Predictions, matching, losses and boxes of a TransFusion head; the summed loss."""
    case.check("query_labels", maps["query_labels"], rtol=0, atol=0)
    for name, value in maps.items():
        case.check(f"pred.{name}", value)
    truth = ground_truth(case, clockwise=False)
    goal = head.targets(maps, truth)
    case.check("target.labels", goal.labels, rtol=0, atol=0)
    case.check("target.bbox_weight_any", goal.matched, rtol=0, atol=0)
    case.check("target.bbox", goal.rows)
    case.check("target.heatmap", goal.heatmap)
    losses = head.loss(maps, truth)
    for official, name in TRANSFUSION_LOSSES.items():
        case.check_loss(official, losses[name])
    for sample, found in enumerate(head.decode(maps).split()):
        case.check_detections(sample, found.boxes, found.scores, found.labels + 1)
    return losses["loss"]


def run_transfusion(case: DetectorCase) -> None:
    head = transfusion_head(case.kwargs)
    case.load(head)
    x = case.input("x").requires_grad_()
    loss = check_transfusion(case, head, head(x))
    case.check_gradients(loss, {"x": x, **dict(head.named_parameters())})


def run_flatformer_detector(case: DetectorCase) -> None:
    config = case.kwargs["flatformer"]
    detector = FlatFormerDetector(
        voxel_size=case.kwargs["voxel_size"],
        point_range=case.kwargs["point_cloud_range"],
        clamp=True,
        num_heads=config["num_heads"],
        num_blocks=config["num_blocks"],
        channels=config["in_channels"],
        window=config["window_shape"][0],
        group_size=config["group_size"],
    )
    detector.bbox_head = flatformer_head(case.kwargs["head"])
    case.load(detector)
    points = case.input("points")
    features, voxels = detector.vfe_module(points)
    coords = voxels.coords
    case.check("voxel_coords", coords)
    case.check("voxel_features", features)
    bev = detector.encode(features, voxels)
    b, _, y, x = coords.long().unbind(1)
    case.check("bev_tokens", bev[b, :, y, x])
    neck = detector.neck_map(bev)
    case.check("neck", neck)
    check_center(case, detector.head, detector.head(neck))
    whole = detector(points)
    assert [len(found.scores) for found in whole] == case.spec["measured"]["num_det"]


def run_scatterformer_detector(case: DetectorCase) -> None:
    config, kwargs = case.kwargs["model"], case.kwargs
    encoder, backbone, cascade = config["VFE"], config["BACKBONE_3D"], config["BACKBONE_2D"]
    assert encoder["NUM_FILTERS"] == [64, 64] and cascade["DOWN_STRIDES"] == [1, 2, 2]
    detector = ScatterFormerDetector(
        classes=kwargs["class_names"],
        voxel_size=kwargs["voxel_size"],
        point_range=kwargs["point_cloud_range"],
        channels=backbone["FEATURE_DIM"],
        window=backbone["WIN_SIZE"],
        cascades=cascade["NUM_LAYERS"],
        cascade_blocks=cascade["NUM_SBB"],
        nms_threshold=1.0,
        iou_power=0.5,
    )
    head = dict(kwargs, dense_head=config["DENSE_HEAD"], input_channels=cascade["FEATURE_DIM"])
    transfusion = config["DENSE_HEAD"]["NAME"] == "TransFusionHead"
    detector.dense_head = transfusion_head(head) if transfusion else scatterformer_center_head(head)
    assert sum(p.numel() for p in detector.parameters()) == case.spec["num_params"]
    detector.load_state_dict(convert(case.weights()))
    detector.eval()
    points = case.input("points")
    features, voxels = detector.vfe_module(points)
    case.check("voxel_coords", voxels.coords)
    case.check("voxel_features", features)
    pillars, cells = detector.backbone_3d.forward_pillars(features, voxels, is_sorted=True)
    b, _, y, x = cells.coords.long().unbind(1)
    order = ((b * 10000 + y) * 10000 + x).argsort()
    case.check("bev_tokens_coords", cells.coords[order])
    case.check("bev_tokens", pillars[order])
    neck = detector.neck_map(detector.encode(features, voxels))
    case.check("neck", neck)
    check = check_transfusion if transfusion else check_center
    check(case, detector.head, detector.head(neck))
    whole = detector(points)
    assert [len(found.scores) for found in whole] == case.spec["measured"]["num_det"]
