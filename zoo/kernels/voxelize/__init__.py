"""Dynamic voxelisation of point clouds, and means and maxima over voxels."""

from zoo.kernels.voxelize.op import group_points, make_grid, point_features, segment_max, segment_mean, voxelize
from zoo.kernels.voxelize.reference import Grid, Grouping, Voxels

__all__ = [
    "Grid",
    "Grouping",
    "Voxels",
    "group_points",
    "make_grid",
    "point_features",
    "segment_max",
    "segment_mean",
    "voxelize",
]
