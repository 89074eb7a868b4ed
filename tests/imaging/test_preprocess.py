"""The working grid, what is cut off by it, and intensities."""

import logging
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, grid_affine, save_brain
from _support.tolerances import TOL
from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import Grid
from ulae_rt.imaging.image import as_array, image_of, resample
from ulae_rt.imaging.nifti import read_volume, volume_from_array
from ulae_rt.imaging.preprocess import (
    cut_off,
    intensity_scale,
    network_input,
    shrunk,
    warn_cut_off,
    with_background,
    with_background_on_host,
    working_grid,
)

# Of an interpolation at a voxel, where the image is 0.
ROUNDING = 1e-9


def image(data, affine=None, name="scan"):
    return image_of(volume_from_array(data, np.eye(4) if affine is None else affine, name=name))


def on(grid, scan):
    """The scan's values at the voxels of a grid, (D, H, W)."""
    return resample(scan, grid)[0, 0].numpy()


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LIA", "PSR"])
@pytest.mark.parametrize("centre", [(0, 0, 0), (-90.5, 33.25, 210.125)])
def test_aligned_1mm_scans_are_copied_not_interpolated(tmp_path, codes, centre):
    shape, affine = grid_affine((60, 76, 56), (1, 1, 1), codes, (0, 0, 0), centre)
    scan = read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine))
    grid, lost = working_grid(image_of(scan), (64, 80, 64))
    assert lost == 0
    copied = resample(image_of(scan), grid, interp="nearest")[0, 0].numpy()
    assert np.array_equal(np.unique(copied), np.unique([0, *scan.data.ravel()]))
    assert copied.sum(dtype=np.float64) == scan.data.sum(dtype=np.float64)
    tol = TOL["image on its own voxels"]
    assert_arrays_close("linear", on(grid, image_of(scan)), copied, tol)
    # RAS order: the grid's own affine has no turn
    assert np.array_equal(grid.affine[:3, :3], np.eye(3))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_grid_is_centred_on_the_brain(tmp_path, name):
    shape, affine = GEOMETRIES[name]
    scan = image_of(read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine)))
    grid, lost = working_grid(scan, (64, 80, 64))
    assert lost == 0
    inside = np.argwhere(on(grid, scan) > ROUNDING)
    margins = inside.min(0), np.array(grid.shape) - 1 - inside.max(0)
    assert np.abs(margins[0] - margins[1]).max() <= 4  # voxels of 2 mm end where they end
    voxel = nib.affines.apply_affine(np.linalg.inv(affine), grid.affine[:3, 3])
    assert_arrays_close("first voxel", voxel, np.rint(voxel), TOL["voxel by the header"])


def test_a_brain_that_fits_exactly_is_not_cut(tmp_path):
    for codes in ("RAS", "LPI"):
        shape, affine = grid_affine((20, 24, 20), codes=codes)
        data = np.zeros(shape, np.uint8)
        data[2:18, 3:19, 1:17] = 100
        _, lost = working_grid(image(data, affine), (16, 16, 16))
        assert lost == 0


def test_a_brain_that_does_not_fit_says_how_much_is_lost(caplog):
    data = np.zeros((40, 20, 20), np.uint8)
    data[5:35, 5:15, 5:15] = 100
    scan = image(data)
    grid, lost = working_grid(scan, (24, 16, 16))
    assert lost == pytest.approx(6 / 30)
    with caplog.at_level(logging.WARNING):
        warn_cut_off(lost, "scan", grid)
    assert "scan: 20 % of the brain lies outside the 24x16x16 working grid" in caplog.text
    with pytest.raises(GeometryError, match="95 % of the brain of scan lies outside"):
        warn_cut_off(0.95, "scan", grid)


def test_specks_do_not_take_the_grid_with_them():
    data = np.zeros((100, 40, 40), np.uint8)
    data[10:40, 5:35, 5:35] = 100
    data[98, 20, 20] = 100
    grid, lost = working_grid(image(data), (32, 32, 32))
    assert 0 < lost < 1e-3
    assert 8 <= grid.affine[0, 3] <= 10


def test_cut_off_through_an_affine():
    data = np.zeros((20, 20, 20), np.uint8)
    data[5:15, 5:15, 5:15] = 1
    data[5, 5, 5] = 2
    grid = Grid((10, 10, 10), nib.affines.from_matvec(np.eye(3), [5, 5, 5]))
    scan = image(data)
    assert cut_off(scan, grid) == 0
    shift = nib.affines.from_matvec(np.eye(3), [3, 0, 0])
    assert cut_off(scan, grid, shift) == pytest.approx(0.3)


def test_a_scan_of_nothing_above_zero_is_refused():
    scan = image(np.eye(3)[None] * np.ones((3, 1, 1)))
    scan = replace(scan, voxels=torch.zeros_like(scan.voxels))
    with pytest.raises(ImageError, match="no voxel above 0"):
        working_grid(scan)
    with pytest.raises(ImageError, match="no voxel above 0"):
        intensity_scale(scan)


def test_z_scores_are_shifted_and_the_background_stays_dark(caplog):
    data = np.zeros((12, 12, 12), np.float32)
    data[3:9, 3:9, 3:9] = np.random.default_rng(0).normal(size=(6, 6, 6))
    with caplog.at_level(logging.WARNING):
        fixed = with_background(image(data))
    assert "0 is taken for the background" in caplog.text
    brain, found = data != 0, as_array(fixed.voxels)
    assert np.array_equal(found > 0, brain)
    similar = np.corrcoef(found[brain], data[brain])[0, 1]
    assert_arrays_close("correlation", similar, 1, TOL["correlation float32"])


def test_hounsfield_units_get_a_dark_background():
    data = np.full((12, 12, 12), -1024, np.int16)
    data[3:9, 3:9, 3:9] = 40
    data[5, 5, 5] = -10
    fixed = with_background(image(data))
    assert np.array_equal(as_array(fixed.voxels) > 0, data != -1024)


def test_ringing_below_zero_is_clipped_in_silence(caplog):
    data = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    data[:2] = 0
    data[0, 0, 0] = -0.01
    assert with_background(image(data)).voxels.min() == 0
    assert caplog.text == ""


def test_scans_without_negatives_are_not_copied():
    scan = image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10))
    assert with_background(scan) is scan


def test_on_the_host_it_is_the_same():
    data = np.full((12, 13, 14), -1024, np.int16)
    data[3:9, 3:10, 3:11] = np.arange(6 * 7 * 8).reshape(6, 7, 8)
    found = with_background_on_host(volume_from_array(data, np.diag([1, 2, 3, 1]), name="ct"))
    assert np.array_equal(found.data, as_array(with_background(image(data)).voxels))
    assert np.array_equal(found.affine, np.diag([1, 2, 3, 1]))


def test_one_bright_voxel_does_not_darken_the_brain():
    data = np.zeros((30, 30, 30), np.float32)
    data[5:25, 5:25, 5:25] = np.linspace(50, 100, 8000).reshape(20, 20, 20)
    scan = image(data)
    spiked_data = np.where(np.indices(data.shape).sum(0) == 45, 0, data)
    spiked_data[15, 15, 15] = 5000
    spiked = image(spiked_data)
    assert intensity_scale(scan) == pytest.approx(100, rel=0.01)
    assert intensity_scale(spiked) == pytest.approx(100, rel=0.01)
    assert intensity_scale(spiked, "max") < 250
    spiked = image(np.minimum(spiked_data, 400))
    assert intensity_scale(spiked, "max") == 400
    with pytest.raises(UsageError, match="normalisation is 'z', expected one of max"):
        intensity_scale(scan, "z")


def test_what_the_network_sees_is_float32_from_0_to_1(tmp_path):
    scan = image_of(read_volume(save_brain(tmp_path / "a.nii.gz", *GEOMETRIES["oblique-PIR"])))
    grid, _ = working_grid(scan, (64, 80, 64))
    seen = network_input(scan, grid)
    assert seen.shape == (1, 1, 64, 80, 64)
    assert seen.dtype == torch.float32
    assert seen.is_contiguous()
    assert seen.min() == 0
    assert 0.95 < seen.max() <= 1


def test_a_fine_scan_is_averaged_not_picked_from():
    noise = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    fine = image(noise, np.diag([0.25, 0.25, 0.25, 1]))
    grid = Grid((8, 8, 8), nib.affines.from_matvec(np.eye(3), [1.375] * 3))
    seen = network_input(fine, grid, None, "max")
    blocks = noise.reshape(10, 4, 10, 4, 10, 4).mean((1, 3, 5))[1:9, 1:9, 1:9]
    assert_arrays_close("means", seen[0, 0].numpy(), blocks / noise.max(), TOL["intensity float32"])


def test_shrinking_is_the_mean_of_blocks_and_keeps_their_centres():
    data = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    scan = image(data, np.diag([1.0, 2, 3, 1]))
    assert shrunk(scan, (1, 1, 1)) is scan
    # The axes of a tensor are those of the file in the order of memory: 3 along Z, 2 along Y.
    found = shrunk(scan, (3, 2, 1))
    means = data[:, :, :6].reshape(5, 3, 2, 2, 3).mean((2, 4))
    assert_arrays_close("means", as_array(found.voxels), means, TOL["exact"])
    assert nib.affines.apply_affine(found.affine, [0, 0, 0]).tolist() == [0, 1, 3]
    assert nib.affines.apply_affine(found.affine, [1, 1, 1]).tolist() == [1, 5, 12]


@pytest.mark.parametrize("angles", [(0, 0, 0), (25, -15, 40), (90, 0, 180)])
def test_a_grid_in_a_pose_of_its_own_is_centred_and_holds_the_head(tmp_path, angles):
    shape, affine = grid_affine((60, 76, 56), angles_deg=angles, centre=(40, -200, 70))
    scan = image_of(read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine)))
    axes = affine[:3, :3] * 0.9
    grid, lost = working_grid(scan, (72, 88, 72), axes)
    assert lost == 0
    assert_arrays_close("axes", grid.affine[:3, :3], axes, TOL["exact"])
    inside = np.argwhere(on(grid, scan) > ROUNDING)
    margins = inside.min(0), np.array(grid.shape) - 1 - inside.max(0)
    assert np.abs(margins[0] - margins[1]).max() <= 2


@pytest.mark.parametrize("codes", ["RAS", "LIA"])
def test_on_the_coarse_grid_it_is_the_mean_of_what_it_is_on_the_fine_one(tmp_path, codes):
    shape, affine = grid_affine((60, 76, 56), (1, 1, 1), codes)
    scan = image_of(read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine)))
    grid, _ = working_grid(scan, (64, 80, 64))
    fine, coarse = network_input(scan, grid), network_input(scan, grid, factor=2)
    assert float((coarse > 0).double().mean()) > 0.05
    expected = torch.nn.functional.avg_pool3d(fine, 2).numpy()
    assert_arrays_close("coarse", coarse.numpy(), expected, TOL["network input"])


def test_a_spike_does_not_brighten_its_neighbours_on_the_coarse_grid():
    data = np.zeros((24, 24, 24), np.float32)
    data[4:20, 4:20, 4:20] = 100 + np.arange(16)
    grid, _ = working_grid(image(data), (24, 24, 24))
    spiked = data.copy()
    spiked[11, 11, 11] = 1e6
    plain, changed = (network_input(image(x), grid, factor=2) for x in (data, spiked))
    assert float((plain - changed).abs().max()) < 0.1


def test_slices_thicker_than_the_grid_are_not_averaged_with_each_other():
    data = np.zeros((40, 40, 8), np.float32)
    data[8:32, 8:32, 1:7] = 100 * 1.5 ** np.arange(6)
    scan = image(data, np.diag([1.0, 1.0, 5.0, 1.0]))
    grid, _ = working_grid(scan, (48, 48, 48))
    fine = torch.nn.functional.avg_pool3d(network_input(scan, grid), 2)
    coarse = network_input(scan, grid, factor=2)
    middle = (slice(None), slice(None), slice(9, 15), slice(9, 15))
    # A mean of two slices would be off by a fifth.
    assert float((fine[middle] - coarse[middle]).abs().max()) < 0.03
