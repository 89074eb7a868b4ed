"""Regular grids in world space."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ulae_rt.imaging.nifti import Volume

Interpolation = Literal["linear", "nearest"]
Affine = NDArray[np.float64]
# (X, Y, Z, 3) float32, RAS mm, as NIfTI has it.
Displacement = NDArray[np.float32]

# What two headers of one grid may differ by: a quaternion in single precision, 200 mm away.
SAME_GRID_MM = 0.01
# World RAS to world LPS and back: of points, and of a displacement's components.
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LPS_SIGNS = np.array([-1, -1, 1], np.float32)


@dataclass(frozen=True)
class Grid:
    """A regular grid: ``shape`` (D, H, W) voxels, ``affine`` (4, 4) from index to RAS mm."""

    shape: tuple[int, int, int]
    affine: Affine

    def pooled(self, factor: int) -> "Grid":
        """The grid of means over factor^3 blocks; its first centre lies inside the first block."""
        shape = self.shape[0] // factor, self.shape[1] // factor, self.shape[2] // factor
        block = np.diag([factor, factor, factor, 1.0])
        block[:3, 3] = (factor - 1) / 2
        return Grid(shape, self.affine @ block)

    def cropped(self, box: tuple[slice, slice, slice]) -> "Grid":
        """The grid of the voxels in a box of indices."""
        shape = tuple(part.stop - part.start for part in box)
        offset = np.eye(4)
        offset[:3, 3] = [part.start for part in box]
        return Grid((shape[0], shape[1], shape[2]), self.affine @ offset)


def grid_of(volume: Volume) -> Grid:
    """The grid a volume lies on."""
    return Grid(volume.shape, volume.affine)


def gap_mm(grid: Grid, other: Grid) -> float:
    """How far apart the corners of two grids of one shape lie; 0 within a header's rounding."""
    corners = np.array(np.meshgrid(*([0, n - 1] for n in grid.shape), 1)).reshape(4, -1)
    gap = float(np.linalg.norm((grid.affine - other.affine) @ corners, axis=0).max())
    return gap if gap > SAME_GRID_MM else 0.0
