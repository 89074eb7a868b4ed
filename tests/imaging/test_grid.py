"""Grids: what stands for blocks of voxels, and how far two of them lie apart."""

import nibabel as nib
import numpy as np
import pytest

from _support.brains import GEOMETRIES, centre_of
from ulae_rt.imaging.grid import Grid, gap_mm


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_grid_of_means_has_the_blocks_centres(name):
    shape, affine = GEOMETRIES[name]
    pooled = Grid(shape, affine).pooled(2)
    assert pooled.shape == tuple(n // 2 for n in shape)
    first = nib.affines.apply_affine(affine, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(pooled.affine[:3, 3], first, atol=1e-12)
    # An even grid and that of its blocks have one middle.
    middle = centre_of(pooled.shape, pooled.affine)
    np.testing.assert_allclose(middle, centre_of(shape, affine), atol=1e-12)


def test_grids_are_one_within_a_headers_rounding():
    grid = Grid((100, 120, 90), np.eye(4))
    for mm, expected in ((0.005, 0.0), (0.02, 0.02)):
        moved = Grid(grid.shape, nib.affines.from_matvec(np.eye(3), [0, mm, 0]))
        assert gap_mm(grid, moved) == pytest.approx(expected)
    turned = np.eye(4)
    turned[0, 1] = 1e-3  # 0.119 mm at the last voxel, 0 at the first
    assert gap_mm(grid, Grid(grid.shape, turned)) == pytest.approx(0.119)
