"""Displacements by hand values, by ITK reading the files, and Jacobians by closed forms."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates

from _support.arrays import assert_arrays_close, assert_labels_agree
from _support.brains import GEOMETRIES, centre_of, grid_affine, save_brain, world
from _support.tolerances import TOL
from ulae_rt.errors import ShapeError
from ulae_rt.imaging.grid import Grid, grid_of, resample, working_grid
from ulae_rt.imaging.nifti import read_volume, volume_from_array, write_volume
from ulae_rt.imaging.transform import (
    Deformation,
    folding,
    jacobian_determinant,
    warp_image,
)
from ulae_rt.imaging.warpfile import Warp

SHAPE = (64, 80, 64)
TILT = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, -0.05, 0.08) @ np.diag([1.05, 0.95, 1.1]), [3.0, -4.0, 2.0]
)


def smooth_disp(shape=SHAPE, amplitude=2.5) -> np.ndarray:
    """(3, D, H, W) voxels, smooth, no component or axis like another."""
    d, h, w = (np.linspace(0, 2 * np.pi, n) for n in shape)
    parts = (
        np.sin(d)[:, None, None] * np.cos(h)[None, :, None] * np.ones(shape[2]),
        0.7 * np.cos(h)[None, :, None] * np.sin(2 * w) * np.ones((shape[0], 1, 1)),
        1.2 * np.sin(d + 1)[:, None, None] * np.cos(w) * np.ones((1, shape[1], 1)),
    )
    return (amplitude * np.stack(parts)).astype(np.float32)


def itk_applies(warp_file, moving_file, reference_file, interpolator=sitk.sitkLinear):
    """What a user of SimpleITK does with the three files; shares nothing with the package."""
    field = sitk.ReadImage(str(warp_file), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    pixel = sitk.sitkFloat32 if interpolator == sitk.sitkLinear else sitk.sitkUnknown
    moved = sitk.Resample(
        sitk.ReadImage(str(moving_file)),
        sitk.ReadImage(str(reference_file)),
        transform,
        interpolator,
        0.0,
        pixel,
    )
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


@pytest.mark.parametrize("moving_name", ["RAS", "LIA", "oblique"])
@pytest.mark.parametrize("fixed_name", GEOMETRIES)
def test_itk_applying_our_files_gives_our_files(tmp_path, fixed_name, moving_name):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES[fixed_name]))
    moving = read_volume(save_brain(tmp_path / "m.nii.gz", *GEOMETRIES[moving_name]))
    grid, _ = working_grid(fixed, SHAPE)
    there = nib.affines.from_matvec(np.eye(3), centre_of(moving.shape, moving.affine))
    here = nib.affines.from_matvec(np.eye(3), -centre_of(fixed.shape, fixed.affine))
    affine = there @ TILT @ here
    disp = Deformation(smooth_disp(), grid, affine).sample(grid_of(fixed))
    labels = np.digitize(moving.data, [1, 60, 90, 120, 160]).astype(np.uint8)
    write_volume(tmp_path / "ml.nii.gz", labels, moving)
    Warp(disp, fixed).save(tmp_path / "w.nii.gz")
    moved = warp_image(moving, disp, grid_of(fixed))
    write_volume(tmp_path / "o.nii.gz", moved, fixed)
    seen = itk_applies(tmp_path / "w.nii.gz", tmp_path / "m.nii.gz", tmp_path / "f.nii.gz")
    ours = nib.load(tmp_path / "o.nii.gz").get_fdata()
    assert np.corrcoef(ours.ravel(), fixed.data.ravel())[0, 1] > 0.5  # the brains do meet
    inside = (slice(2, -2),) * 3
    assert_arrays_close("ITK", ours[inside], seen[inside], TOL["image by ITK"])

    moved_labels = warp_image(
        read_volume(tmp_path / "ml.nii.gz", kind="labels"), disp, grid_of(fixed), "nearest"
    )
    assert moved_labels.dtype == np.uint8
    seen = itk_applies(
        tmp_path / "w.nii.gz",
        tmp_path / "ml.nii.gz",
        tmp_path / "f.nii.gz",
        sitk.sitkNearestNeighbor,
    )
    assert_labels_agree("ITK", moved_labels, seen, TOL["label ties"])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_displacement_on_the_grid_lands_where_the_formula_says(name):
    shape, affine = GEOMETRIES[name]
    fixed = Grid(shape, affine)
    centre = centre_of(shape, affine)
    grid = Grid((40, 44, 36), nib.affines.from_matvec(np.eye(3) * 2, centre - [37.3, 44.1, 33.7]))
    u = smooth_disp(grid.shape)
    disp = Deformation(u, grid, TILT).sample(fixed)
    assert disp.dtype == np.float32

    points = world(shape, affine)
    index = nib.affines.apply_affine(np.linalg.inv(grid.affine), points)
    at = np.moveaxis(index, -1, 0)
    u_mm = 2 * np.stack([map_coordinates(c, at, order=1, mode="nearest") for c in u], -1)
    expected = nib.affines.apply_affine(TILT, points + u_mm) - points
    assert_arrays_close("formula", disp, expected, TOL["displacement float32"])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_shift_to_the_right_is_three_mm_in_world_whatever_the_axes(tmp_path, name):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES[name]))
    grid, _ = working_grid(fixed, SHAPE)
    u = np.zeros((3, *SHAPE), np.float32)
    u[0] = 3
    disp = Deformation(u, grid, np.eye(4)).sample(grid_of(fixed))
    right = np.broadcast_to([3, 0, 0], disp.shape)
    assert_arrays_close("shift", disp, right, TOL["displacement of a few mm float32"])
    # moved(x) = moving(x + 3 R): one voxel of bright, 3 mm to the right of where it is found
    spot = volume_from_array(
        np.zeros((9, 9, 9), np.float32), np.diag([1.0, 1, 1, 1]), name="moving", kind="labels"
    )
    spot.data[6, 4, 4] = 1
    target = Grid((9, 9, 9), np.eye(4))
    shift = np.zeros((9, 9, 9, 3), np.float32)
    shift[..., 0] = 3
    moved = warp_image(spot, shift, target)
    assert np.argwhere(moved == 1).tolist() == [[3, 4, 4]]


def test_zero_displacement_and_no_affine_is_the_identity(tmp_path):
    for name in ("RAS", "LIA", "PSR"):
        fixed = read_volume(save_brain(tmp_path / f"{name}.nii.gz", *GEOMETRIES[name]))
        grid, _ = working_grid(fixed, SHAPE)
        disp = Deformation(np.zeros((3, *SHAPE), np.float32), grid, np.eye(4)).sample(
            grid_of(fixed)
        )
        assert not disp.any()
        assert np.array_equal(warp_image(fixed, disp, grid_of(fixed)), fixed.data)
        assert np.array_equal(jacobian_determinant(disp, fixed.affine) == 1, disp[..., 0] == 0)


def test_the_half_resolution_grid_lies_between_its_voxels():
    # u = x along R at 1 mm; pooled by 2 the values are block means, at block centres
    grid = Grid((8, 8, 8), nib.affines.from_matvec(np.eye(3), [5, 6, 7]))
    pooled = grid.pooled(2)
    assert pooled.affine[:3, 3].tolist() == [5.5, 6.5, 7.5]
    ramp = np.broadcast_to(np.arange(8)[:, None, None], (8, 8, 8))
    u = np.zeros((3, 4, 4, 4), np.float32)
    u[0] = ramp.reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5)) / 2  # in voxels of 2 mm
    disp = Deformation(u, pooled, np.eye(4)).sample(grid)
    expected = [0.5, 1, 2, 3, 4, 5, 6, 6.5]  # linear inside, clamped at both ends
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("pooled", disp[:, 3, 3, 0], expected, few)


def test_a_displacement_of_another_grid_is_refused():
    with pytest.raises(ShapeError, match=r"expected \(3, 4, 4, 4\)"):
        Deformation(np.zeros((3, 4, 4, 5), np.float32), Grid((4, 4, 4), np.eye(4)), np.eye(4))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_jacobian_of_a_linear_map_is_its_determinant(name):
    shape, affine = GEOMETRIES[name]
    disp = Deformation(np.zeros((3, 4, 4, 4), np.float32), Grid((4, 4, 4), np.eye(4)), TILT)
    jacobian = jacobian_determinant(disp.sample(Grid(shape, affine)), affine)
    assert jacobian.dtype == np.float32
    assert_arrays_close("linear", jacobian, np.linalg.det(TILT[:3, :3]), TOL["jacobian float32"])


def test_jacobian_of_a_known_field_on_an_oblique_grid():
    shape, affine = grid_affine((24, 30, 40), (0.5, 0.7, 0.4), "LIP", (25, -15, 10))
    points = world(shape, affine)
    x, y, z = np.moveaxis(points, -1, 0)
    disp = np.stack([0.1 * x * y, 0.05 * y * z, 0.08 * x * z], -1).astype(np.float32)
    zero = np.zeros_like(x)
    gradient = np.stack(
        [
            np.stack([1 + 0.1 * y, 0.1 * x, zero], -1),
            np.stack([zero, 1 + 0.05 * z, 0.05 * y], -1),
            np.stack([0.08 * z, zero, 1 + 0.08 * x], -1),
        ],
        -2,
    )
    inside = (slice(1, -1),) * 3  # central differences of a quadratic are exact
    found, expected = jacobian_determinant(disp, affine), np.linalg.det(gradient)
    assert_arrays_close("quadratic", found[inside], expected[inside], TOL["jacobian float32"])


def test_folding_counts_the_image_and_the_brain():
    jacobian = np.ones((10, 10, 10), np.float32)
    jacobian[0] = -1
    jacobian[1, 0] = 0
    brain = np.zeros((10, 10, 10), bool)
    brain[1:3] = True
    result = folding(jacobian, brain)
    assert result.image_percent == pytest.approx(11)
    assert result.brain_percent == pytest.approx(5)


def test_one_interpolation_only(tmp_path):
    """A fixed grid and a moving grid that agree, whatever the working grid: values untouched."""
    shape, affine = grid_affine((40, 50, 36), (1.2, 1.1, 1.4), angles_deg=(5, 0, 10))
    volume = read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine))
    grid, _ = working_grid(volume, SHAPE)
    zero = Deformation(np.zeros((3, *SHAPE), np.float32), grid, np.eye(4))
    moved = warp_image(volume, zero.sample(grid_of(volume)), grid_of(volume))
    assert_arrays_close("moved", moved, volume.data, TOL["image on its own voxels"])


def test_resampling_through_an_affine_is_the_warp_of_its_displacement(tmp_path):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["oblique"]))
    moving = read_volume(save_brain(tmp_path / "m.nii.gz", *GEOMETRIES["LIA"]))
    zero = Deformation(np.zeros((3, 4, 4, 4), np.float32), Grid((4, 4, 4), np.eye(4)), TILT)
    moved = warp_image(moving, zero.sample(grid_of(fixed)), grid_of(fixed))
    inside = (slice(2, -2),) * 3
    direct = resample(moving, grid_of(fixed), TILT)
    assert_arrays_close("direct", direct[inside], moved[inside], TOL["image in our own two ways"])
