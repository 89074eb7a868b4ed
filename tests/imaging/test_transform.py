"""Displacements by hand values, by ITK reading the files, and Jacobians by closed forms."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates

from _support.arrays import assert_arrays_close, assert_labels_agree
from _support.brains import GEOMETRIES, centre_of, grid_affine, save_brain, world
from _support.tolerances import TOL, assert_close
from ulae_rt.errors import ShapeError
from ulae_rt.imaging.grid import Grid, grid_of
from ulae_rt.imaging.image import (
    as_array,
    file_order,
    image_of,
    in_file_order,
    labels_of,
    resample,
)
from ulae_rt.imaging.nifti import read_volume, volume_from_array, write_volume
from ulae_rt.imaging.preprocess import working_grid
from ulae_rt.imaging.transform import (
    Deformation,
    Field,
    add_affine,
    as_displacement,
    folding,
    in_mm,
    jacobian_determinant,
    resample_displacement,
    warp_image,
)
from ulae_rt.imaging.warpfile import Warp

SHAPE = (64, 80, 64)
TILT = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, -0.05, 0.08) @ np.diag([1.05, 0.95, 1.1]), [3.0, -4.0, 2.0]
)


def smooth_disp(shape=SHAPE, amplitude=2.5) -> torch.Tensor:
    """(1, 3, D, H, W) voxels, smooth, no component or axis like another."""
    d, h, w = (np.linspace(0, 2 * np.pi, n) for n in shape)
    parts = (
        np.sin(d)[:, None, None] * np.cos(h)[None, :, None] * np.ones(shape[2]),
        0.7 * np.cos(h)[None, :, None] * np.sin(2 * w) * np.ones((shape[0], 1, 1)),
        1.2 * np.sin(d + 1)[:, None, None] * np.cos(w) * np.ones((1, shape[1], 1)),
    )
    return torch.from_numpy((amplitude * np.stack(parts)).astype(np.float32))[None]


def file_grid(volume) -> Grid:
    """The grid of a volume as that of its tensor."""
    return file_order(grid_of(volume))


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
    grid, _ = working_grid(image_of(fixed), SHAPE)
    there = nib.affines.from_matvec(np.eye(3), centre_of(moving.shape, moving.affine))
    here = nib.affines.from_matvec(np.eye(3), -centre_of(fixed.shape, fixed.affine))
    affine = there @ TILT @ here
    disp = Deformation(smooth_disp(), grid, affine).sample(file_grid(fixed))
    labels = np.digitize(moving.data, [1, 60, 90, 120, 160]).astype(np.uint8)
    write_volume(tmp_path / "ml.nii.gz", labels, moving)
    Warp(as_displacement(disp), fixed).save(tmp_path / "w.nii.gz")
    moved = as_array(warp_image(image_of(moving), disp, file_grid(fixed)))
    write_volume(tmp_path / "o.nii.gz", moved, fixed)
    seen = itk_applies(tmp_path / "w.nii.gz", tmp_path / "m.nii.gz", tmp_path / "f.nii.gz")
    ours = nib.load(tmp_path / "o.nii.gz").get_fdata()
    assert np.corrcoef(ours.ravel(), fixed.data.ravel())[0, 1] > 0.5  # the brains do meet
    inside = (slice(2, -2),) * 3
    assert_arrays_close("ITK", ours[inside], seen[inside], TOL["image by ITK"])

    labels = labels_of(read_volume(tmp_path / "ml.nii.gz", kind="labels"))
    moved_labels = as_array(warp_image(labels, disp, file_grid(fixed), "nearest"))
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
    disp = Deformation(u, grid, TILT).sample(file_order(fixed))
    assert disp.dtype == torch.float32

    points = world(shape, affine)
    index = nib.affines.apply_affine(np.linalg.inv(grid.affine), points)
    at = np.moveaxis(index, -1, 0)
    u_mm = 2 * np.stack([map_coordinates(c, at, order=1, mode="nearest") for c in u[0]], -1)
    expected = nib.affines.apply_affine(TILT, points + u_mm) - points
    assert_arrays_close("formula", as_displacement(disp), expected, TOL["displacement float32"])
    part = as_displacement(Deformation(u, grid, TILT).network_part(file_order(fixed)))
    assert_arrays_close("without the affine", part, u_mm, TOL["displacement of a few mm float32"])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_shift_to_the_right_is_three_mm_in_world_whatever_the_axes(tmp_path, name):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES[name]))
    grid, _ = working_grid(image_of(fixed), SHAPE)
    u = torch.zeros(1, 3, *SHAPE)
    u[:, 0] = 3
    disp = as_displacement(Deformation(u, grid, np.eye(4)).sample(file_grid(fixed)))
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
    moved = as_array(warp_image(image_of(spot), in_mm(shift), file_order(target)))
    assert np.argwhere(moved == 1).tolist() == [[3, 4, 4]]


def test_zero_displacement_and_no_affine_is_the_identity(tmp_path):
    for name in ("RAS", "LIA", "PSR"):
        fixed = image_of(read_volume(save_brain(tmp_path / f"{name}.nii.gz", *GEOMETRIES[name])))
        grid, _ = working_grid(fixed, SHAPE)
        disp = Deformation(torch.zeros(1, 3, *SHAPE), grid, np.eye(4)).sample(fixed.grid)
        assert not disp.any()
        moved = warp_image(fixed, disp, fixed.grid)
        assert_close("identity", moved, fixed.voxels, TOL["image on its own voxels"])
        assert (jacobian_determinant(disp, fixed.affine) == 1).all()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_array_of_displacements_comes_back_as_it_went(name):
    shape, _ = GEOMETRIES[name]
    disp = np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)
    tensor = in_mm(disp)
    assert tensor.shape == (1, 3, *shape[::-1])
    assert tensor.is_contiguous()
    assert tensor[0, 2, 5, 4, 3] == disp[3, 4, 5, 2]
    np.testing.assert_array_equal(as_displacement(tensor), disp)


def test_a_displacement_on_another_grid_is_scipys():
    grid = Grid(*GEOMETRIES["LIA"])
    shape, affine = GEOMETRIES["oblique-PIR"]
    to = Grid(shape, affine @ nib.affines.from_matvec(np.eye(3), [-5, 7, 3]))
    disp = world(*GEOMETRIES["LIA"]).astype(np.float32) / 9 % 4
    index = nib.affines.apply_affine(np.linalg.inv(grid.affine), world(shape, to.affine))
    at = np.moveaxis(index, -1, 0)
    last = np.array(grid.shape) - 1
    assert ((index < 0) | (index > last)).any()  # clamped there
    expected = [
        map_coordinates(disp[..., c].astype(float), at, order=1, mode="nearest") for c in range(3)
    ]
    found = resample_displacement(disp, grid, to)
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("scipy", found, np.stack(expected, -1), few)
    near = Grid(grid.shape, nib.affines.from_matvec(np.eye(3), [0.005, 0, 0]) @ grid.affine)
    assert resample_displacement(disp, grid, near) is disp


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_affine_after_a_displacement_is_the_formulas(name):
    shape, affine = GEOMETRIES[name]
    disp = np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)
    points = world(shape, affine)
    found = as_displacement(add_affine(in_mm(disp), file_order(Grid(shape, affine)), TILT))
    expected = nib.affines.apply_affine(TILT, points + disp) - points
    assert_arrays_close("formula", found, expected, TOL["displacement float32"])


def test_a_field_is_scipys_anywhere():
    disp = np.random.default_rng(0).normal(size=(3, 9, 7, 8))
    points = np.random.default_rng(1).uniform(-4, 12, (5000, 3))
    expected = [map_coordinates(c, points.T, order=1, mode="nearest") for c in disp]
    found = Field(torch.from_numpy(disp)[None])(points)
    assert found.shape == (5000, 3)
    assert_arrays_close("scipy", found, np.stack(expected, -1), TOL["op float64"])


def test_the_half_resolution_grid_lies_between_its_voxels():
    # u = x along R at 1 mm; pooled by 2 the values are block means, at block centres
    grid = Grid((8, 8, 8), nib.affines.from_matvec(np.eye(3), [5, 6, 7]))
    pooled = grid.pooled(2)
    assert pooled.affine[:3, 3].tolist() == [5.5, 6.5, 7.5]
    ramp = np.broadcast_to(np.arange(8)[:, None, None], (8, 8, 8))
    u = torch.zeros(1, 3, 4, 4, 4)
    means = ramp.reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5))
    u[0, 0] = torch.from_numpy(means) / 2  # in voxels of 2 mm
    disp = Deformation(u, pooled, np.eye(4)).sample(grid)[0].numpy()
    expected = [0.5, 1, 2, 3, 4, 5, 6, 6.5]  # linear inside, clamped at both ends
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("pooled", disp[0, :, 3, 3], expected, few)


def test_a_displacement_of_another_grid_is_refused():
    grid = Grid((4, 4, 4), np.eye(4))
    for shape in ((1, 3, 4, 4, 5), (3, 4, 4, 4), (2, 3, 4, 4, 4)):
        with pytest.raises(ShapeError, match=r"expected \(1, 3, 4, 4, 4\)"):
            Deformation(torch.zeros(shape), grid, np.eye(4))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_jacobian_of_a_linear_map_is_its_determinant(name):
    fixed = file_order(Grid(*GEOMETRIES[name]))
    disp = Deformation(torch.zeros(1, 3, 4, 4, 4), Grid((4, 4, 4), np.eye(4)), TILT)
    jacobian = jacobian_determinant(disp.sample(fixed), fixed.affine)
    assert jacobian.shape == (1, 1, *fixed.shape)
    assert jacobian.dtype == torch.float32
    found = as_array(jacobian)
    assert_arrays_close("linear", found, np.linalg.det(TILT[:3, :3]), TOL["jacobian float32"])


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
    grid = file_order(Grid(shape, affine))
    found = as_array(jacobian_determinant(in_mm(disp), grid.affine))
    expected = np.linalg.det(gradient)
    assert_arrays_close("quadratic", found[inside], expected[inside], TOL["jacobian float32"])


def test_folding_counts_the_image_and_the_brain():
    jacobian = np.ones((10, 10, 10), np.float32)
    jacobian[0] = -1
    jacobian[1, 0] = 0
    brain = np.zeros((10, 10, 10), bool)
    brain[1:3] = True
    result = folding(in_file_order(jacobian), in_file_order(brain))
    assert result.image_percent == pytest.approx(11)
    assert result.brain_percent == pytest.approx(5)


def test_one_interpolation_only(tmp_path):
    """A fixed grid and a moving grid that agree, whatever the working grid: values untouched."""
    shape, affine = grid_affine((40, 50, 36), (1.2, 1.1, 1.4), angles_deg=(5, 0, 10))
    image = image_of(read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine)))
    grid, _ = working_grid(image, SHAPE)
    zero = Deformation(torch.zeros(1, 3, *SHAPE), grid, np.eye(4))
    moved = warp_image(image, zero.sample(image.grid), image.grid)
    tol = TOL["image on its own voxels"]
    assert_arrays_close("moved", as_array(moved), as_array(image.voxels), tol)


def test_resampling_through_an_affine_is_the_warp_of_its_displacement(tmp_path):
    fixed = image_of(read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["oblique"])))
    moving = image_of(read_volume(save_brain(tmp_path / "m.nii.gz", *GEOMETRIES["LIA"])))
    zero = Deformation(torch.zeros(1, 3, 4, 4, 4), Grid((4, 4, 4), np.eye(4)), TILT)
    moved = as_array(warp_image(moving, zero.sample(fixed.grid), fixed.grid))
    inside = (slice(2, -2),) * 3
    direct = as_array(resample(moving, fixed.grid, TILT))
    assert_arrays_close("direct", direct[inside], moved[inside], TOL["image in our own two ways"])
