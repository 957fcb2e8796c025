"""Where the partitions of an image lie, and the order in which their tokens reach the language model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageGrid:
    """One image as its partitions: the whole image, then gh x gw sub-images row by row.

    Attributes:
        grid: (gh, gw) sub-images; (0, 0) where the whole image is the only partition.
        size: (H, W) of the original in pixels.
        side: S, patches along a side of a partition.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    side: int

    @property
    def partitions(self) -> int:
        """Number of partitions, the whole image included."""
        return 1 + self.grid[0] * self.grid[1]
