"""Point clouds: simulated scenes, data modules, augmentation, metrics, file formats."""

from zoo.train.lidar.augment import LidarAugmentation
from zoo.train.lidar.data import FrameFolderData, PointCloudDataModule, SimulatedLidarData
from zoo.train.lidar.frames import Frame
from zoo.train.lidar.kitti import KittiData
from zoo.train.lidar.metrics import BoxAveragePrecision
from zoo.train.lidar.nuscenes import NuScenesData
from zoo.train.lidar.nuscenes_metrics import NuScenesDetectionScore
from zoo.train.lidar.simulator import LidarSimulator, SpinningSensor

__all__ = [
    "BoxAveragePrecision",
    "Frame",
    "FrameFolderData",
    "KittiData",
    "LidarAugmentation",
    "LidarSimulator",
    "NuScenesData",
    "NuScenesDetectionScore",
    "PointCloudDataModule",
    "SimulatedLidarData",
    "SpinningSensor",
]
