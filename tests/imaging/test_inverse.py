"""Inverse warps against closed forms and scipy, and where there is no inverse."""

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.optimize import brentq

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, centre_of, world
from _support.tolerances import TOL
from ulae_rt.errors import ShapeError
from ulae_rt.imaging.grid import Grid
from ulae_rt.imaging.inverse import TOLERANCE, inverse_consistency, invert
from ulae_rt.imaging.transform import Deformation, jacobian_determinant

TURN = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([1.1, 0.9, 1.15]), [30.0, -40.0, 20.0]
)


def grid_about(centre, shape=(40, 44, 36), spacing=2.0):
    corner = np.array(centre) - spacing * (np.array(shape) - 1) / 2
    return Grid(shape, nib.affines.from_matvec(np.eye(3) * spacing, corner))


def waves(shape, amplitude):
    """(1, 3, D, H, W) voxels; its derivatives reach 0.42 of ``amplitude``."""
    d, h, w = np.meshgrid(*(np.arange(n) / 5 for n in shape), indexing="ij")
    parts = np.sin(d) * np.cos(h), 0.7 * np.cos(h + 1) * np.sin(w), np.sin(d + 2) * np.cos(1.5 * w)
    return torch.from_numpy((amplitude * np.stack(parts)).astype(np.float32))[None]


def forward(deformation, points):
    """T at any points (..., 3), by the formula of `Deformation` and scipy."""
    grid = deformation.grid
    index = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(grid.affine), points), -1, 0)
    disp = deformation.disp[0].double().numpy()
    u = [map_coordinates(c, index, order=1, mode="nearest") for c in disp]
    return nib.affines.apply_affine(
        deformation.affine, points + np.stack(u, -1) @ grid.affine[:3, :3].T
    )


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_inverse_of_an_affine_is_exact(name):
    shape, affine = GEOMETRIES[name]
    grid = Grid((3, 4, 5), np.eye(4))
    inverse = invert(Deformation(torch.zeros(1, 3, 3, 4, 5), grid, TURN), Grid(shape, affine))
    points = world(shape, affine)
    assert inverse.dtype == np.float32
    expected = nib.affines.apply_affine(np.linalg.inv(TURN), points) - points
    assert_arrays_close("inverse", inverse, expected, TOL["displacement float32"])


@pytest.mark.parametrize("amplitude", [0.5, 2.0])
@pytest.mark.parametrize("name", ["LIA", "oblique-PIR", "anisotropic"])
def test_where_the_inverse_leads_the_warp_leads_back(name, amplitude):
    """On the moving image's own grid, of any orientation, beyond the working grid too."""
    shape, affine = GEOMETRIES[name]
    moving = Grid(shape, affine)
    # The working grid lies where the moving image's fixed points are, and covers half of them.
    middle = nib.affines.apply_affine(np.linalg.inv(TURN), centre_of(shape, affine))
    grid = grid_about(middle, (26, 30, 24))
    deformation = Deformation(waves(grid.shape, amplitude), grid, TURN)
    fixed = grid_about(middle, spacing=1.0)
    jacobian = jacobian_determinant(deformation.sample(fixed), fixed.affine)
    assert jacobian.min() > 0.1  # strong, and not folded
    assert amplitude < 1 or jacobian.min() < 0.5
    points = world(shape, affine)
    back = points + invert(deformation, moving)
    error = np.linalg.norm(forward(deformation, back) - points, axis=-1)
    # The tolerance is of the working grid's voxels, before the affine.
    print(f"there and back: {error.max():.3e} mm")
    assert error.max() < 1.15 * 2 * TOLERANCE + TOL["displacement float32"].absolute
    inside = nib.affines.apply_affine(np.linalg.inv(grid.affine), back)
    assert 0.05 < ((inside > 0) & (inside < np.array(grid.shape) - 1)).all(-1).mean() < 0.95


def test_one_axis_against_a_root_finder():
    x = np.arange(30.0)
    u = 1.8 * np.sin(x / 3)
    disp = torch.zeros(1, 3, 30, 4, 4)
    disp[0, 0] = torch.from_numpy(u)[:, None, None]
    grid = Grid((30, 4, 4), np.eye(4))
    found = invert(Deformation(disp, grid, np.eye(4)), grid)[:, 2, 2, 0]
    roots = [brentq(lambda s, z=z: s + np.interp(s, x, u) - z, -5, 35) for z in x]
    np.testing.assert_allclose(found, roots - x, atol=3 * TOLERANCE)  # its slope is above 0.4


def test_a_fold_crashes_nothing_and_is_told_apart(caplog):
    """Where the warp folds, the error says it; elsewhere the inverse is as good as ever."""
    grid = Grid((40, 36, 32), np.eye(4))
    disp = waves(grid.shape, 0.5)
    disp[0, 0, 18:22, 14:20, 14:20] += torch.tensor([4, 4, -4, -4])[:, None, None]
    deformation = Deformation(disp, grid, np.eye(4))
    sampled = deformation.sample(grid)
    assert (jacobian_determinant(sampled, grid.affine) < 0).any()
    total = sampled[0].permute(1, 2, 3, 0).numpy()  # the grid is taken for a NIfTI array's
    with caplog.at_level(logging.WARNING):
        inverse = invert(deformation, grid)
    assert not caplog.text
    assert np.isfinite(inverse).all()
    mask = np.zeros(grid.shape, bool)
    mask[4:-4, 4:-4, 4:-4] = True
    folded = inverse_consistency(total, grid, inverse, grid, mask)
    assert folded.max_mm > 1
    mask[10:30, 8:26, 8:26] = False
    left = inverse_consistency(total, grid, inverse, grid, mask)
    assert_arrays_close("there and back", left.max_mm, 0, TOL["inverse between its voxels"])


def test_inverse_consistency_by_hand():
    """There by +2 mm R, back by -1.5: half a millimetre off; at one voxel by 2.5 more."""
    fixed = Grid((10, 10, 10), np.eye(4))
    moving = Grid((6, 10, 10), nib.affines.from_matvec(np.diag([-2.0, 1, 1]), [11, 0, 0]))  # L A S
    there = np.zeros((10, 10, 10, 3), np.float32)
    back = np.zeros((6, 10, 10, 3), np.float32)
    there[..., 0], back[..., 0] = 2, -1.5
    mask = np.zeros(fixed.shape, bool)
    mask[0:10, 5, 5] = True  # go to 2..11, of which the moving image has 0 to 12
    found = inverse_consistency(there, fixed, back, moving, mask)
    assert (found.mean_mm, found.p99_mm, found.max_mm) == pytest.approx((0.5, 0.5, 0.5))
    assert found.outside_percent == 0
    there[0, 5, 5] = 4.5, 0, 0
    there[1, 5, 5] = 50, 0, 0  # out of the moving image
    found = inverse_consistency(there, fixed, back, moving, mask)
    assert found.max_mm == pytest.approx(3)
    assert found.mean_mm == pytest.approx((8 * 0.5 + 3) / 9)
    assert found.outside_percent == pytest.approx(10)


@pytest.mark.parametrize(
    ("voxels", "shift", "message"),
    [(0, 0, "the mask is empty"), (1, 99, "leads nowhere into the moving image")],
)
def test_nothing_to_measure_is_said(voxels, shift, message):
    grid = Grid((4, 4, 4), np.eye(4))
    mask = np.arange(64).reshape(grid.shape) < voxels
    there = np.full((4, 4, 4, 3), shift, np.float32)
    with pytest.raises(ShapeError, match=message):
        inverse_consistency(there, grid, there, grid, mask)
