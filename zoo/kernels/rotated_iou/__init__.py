"""Overlap of rotated boxes, and non-maximum suppression by it."""

from zoo.kernels.rotated_iou.op import rectangles, rotated_iou, rotated_iou_3d, rotated_nms, rotated_overlap

__all__ = ["rectangles", "rotated_iou", "rotated_iou_3d", "rotated_nms", "rotated_overlap"]
