"""The working grid, what is cut off by it, and intensities."""

import logging
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, centre_of, grid_affine, save_brain
from _support.tolerances import TOL
from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import (
    Grid,
    cut_off,
    intensity_scale,
    network_input,
    pool,
    resample,
    warn_cut_off,
    with_background,
    working_grid,
)
from ulae_rt.imaging.nifti import read_volume, volume_from_array


def volume(data, affine=None, name="scan"):
    return volume_from_array(data, np.eye(4) if affine is None else affine, name=name)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LIA", "PSR"])
@pytest.mark.parametrize("centre", [(0, 0, 0), (-90.5, 33.25, 210.125)])
def test_aligned_1mm_scans_are_copied_not_interpolated(tmp_path, codes, centre):
    shape, affine = grid_affine((60, 76, 56), (1, 1, 1), codes, (0, 0, 0), centre)
    scan = read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine))
    grid, lost = working_grid(scan, (64, 80, 64))
    assert lost == 0
    on_grid = resample(scan, grid)
    assert np.array_equal(np.unique(on_grid), np.unique([0, *scan.data.ravel()]))
    assert on_grid.sum(dtype=np.float64) == scan.data.sum(dtype=np.float64)
    # RAS order: the grid's own affine has no turn
    assert np.array_equal(grid.affine[:3, :3], np.eye(3))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_grid_is_centred_on_the_brain(tmp_path, name):
    shape, affine = GEOMETRIES[name]
    scan = read_volume(save_brain(tmp_path / "a.nii.gz", shape, affine))
    grid, lost = working_grid(scan, (64, 80, 64))
    assert lost == 0
    inside = np.argwhere(resample(scan, grid) > 0)
    margins = inside.min(0), np.array(grid.shape) - 1 - inside.max(0)
    assert np.abs(margins[0] - margins[1]).max() <= 4  # voxels of 2 mm end where they end
    voxel = nib.affines.apply_affine(np.linalg.inv(affine), grid.affine[:3, 3])
    assert_arrays_close("first voxel", voxel, np.rint(voxel), TOL["voxel by the header"])


def test_a_brain_that_fits_exactly_is_not_cut(tmp_path):
    for codes in ("RAS", "LPI"):
        shape, affine = grid_affine((20, 24, 20), codes=codes)
        data = np.zeros(shape, np.uint8)
        data[2:18, 3:19, 1:17] = 100
        _, lost = working_grid(volume(data, affine), (16, 16, 16))
        assert lost == 0


def test_a_brain_that_does_not_fit_says_how_much_is_lost(caplog):
    data = np.zeros((40, 20, 20), np.uint8)
    data[5:35, 5:15, 5:15] = 100
    scan = volume(data)
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
    grid, lost = working_grid(volume(data), (32, 32, 32))
    assert 0 < lost < 1e-3
    assert 8 <= grid.affine[0, 3] <= 10


def test_cut_off_through_an_affine():
    data = np.zeros((20, 20, 20), np.uint8)
    data[5:15, 5:15, 5:15] = 1
    data[5, 5, 5] = 2
    grid = Grid((10, 10, 10), nib.affines.from_matvec(np.eye(3), [5, 5, 5]))
    scan = volume(data)
    assert cut_off(scan, grid) == 0
    shift = nib.affines.from_matvec(np.eye(3), [3, 0, 0])
    assert cut_off(scan, grid, shift) == pytest.approx(0.3)


def test_a_scan_of_nothing_above_zero_is_refused():
    scan = replace(volume(np.eye(3)[None] * np.ones((3, 1, 1))), data=np.zeros((3, 3, 3)))
    with pytest.raises(ImageError, match="no voxel above 0"):
        working_grid(scan)
    with pytest.raises(ImageError, match="no voxel above 0"):
        intensity_scale(scan)


def test_z_scores_are_shifted_and_the_background_stays_dark(caplog):
    data = np.zeros((12, 12, 12), np.float32)
    data[3:9, 3:9, 3:9] = np.random.default_rng(0).normal(size=(6, 6, 6))
    with caplog.at_level(logging.WARNING):
        fixed = with_background(volume(data))
    assert "0 is taken for the background" in caplog.text
    assert np.array_equal(fixed.data > 0, data != 0)
    brain = data != 0
    similar = np.corrcoef(fixed.data[brain], data[brain])[0, 1]
    assert_arrays_close("correlation", similar, 1, TOL["correlation float32"])


def test_hounsfield_units_get_a_dark_background():
    data = np.full((12, 12, 12), -1024, np.int16)
    data[3:9, 3:9, 3:9] = 40
    data[5, 5, 5] = -10
    fixed = with_background(volume(data))
    assert np.array_equal(fixed.data > 0, data != -1024)


def test_ringing_below_zero_is_clipped_in_silence(caplog):
    data = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    data[:2] = 0
    data[0, 0, 0] = -0.01
    assert with_background(volume(data)).data.min() == 0
    assert caplog.text == ""


def test_scans_without_negatives_are_not_copied():
    scan = volume(np.arange(1000, dtype=np.int16).reshape(10, 10, 10))
    assert with_background(scan) is scan


def test_one_bright_voxel_does_not_darken_the_brain():
    data = np.zeros((30, 30, 30), np.float32)
    data[5:25, 5:25, 5:25] = np.linspace(50, 100, 8000).reshape(20, 20, 20)
    scan = volume(data)
    spiked = volume(np.where(np.indices(data.shape).sum(0) == 45, 0, data))
    spiked.data[15, 15, 15] = 5000
    assert intensity_scale(scan) == pytest.approx(100, rel=0.01)
    assert intensity_scale(spiked) == pytest.approx(100, rel=0.01)
    assert intensity_scale(spiked, "max") < 250
    spiked = replace(spiked, data=np.minimum(spiked.data, 400))
    assert intensity_scale(spiked, "max") == 400
    with pytest.raises(UsageError, match="normalisation is 'z', expected one of max"):
        intensity_scale(scan, "z")


def test_what_the_network_sees_is_float32_from_0_to_1(tmp_path):
    scan = read_volume(save_brain(tmp_path / "a.nii.gz", *GEOMETRIES["oblique-PIR"]))
    grid, _ = working_grid(scan, (64, 80, 64))
    seen = network_input(scan, grid)
    assert seen.shape == (64, 80, 64)
    assert seen.dtype == np.float32
    assert seen.flags.c_contiguous
    assert seen.min() == 0
    assert 0.95 < seen.max() <= 1


def test_a_fine_scan_is_averaged_not_picked_from():
    noise = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    fine = volume(noise, np.diag([0.25, 0.25, 0.25, 1]))
    grid = Grid((8, 8, 8), nib.affines.from_matvec(np.eye(3), [1.375] * 3))
    seen = network_input(fine, grid, None, "max")
    blocks = noise.reshape(10, 4, 10, 4, 10, 4).mean((1, 3, 5))[1:9, 1:9, 1:9]
    assert_arrays_close("means", seen, blocks / noise.max(), TOL["intensity float32"])


def test_resampling_far_outside_is_zero_and_labels_keep_their_type():
    labels = volume(np.arange(1, 28, dtype=np.uint16).reshape(3, 3, 3))
    grid = Grid((5, 5, 5), nib.affines.from_matvec(np.eye(3), [-1, -1, -1]))
    out = resample(labels, grid, interp="nearest")
    assert out.dtype == np.uint16
    assert np.array_equal(out[1:4, 1:4, 1:4], labels.data)
    assert out.sum() == labels.data.sum()


def test_pooling_is_the_mean_of_blocks():
    data = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    assert pool(data, 1) is data
    assert pool(data, 2)[0, 0, 0] == data[:2, :2, :2].mean()
    assert centre_of((4, 4, 4), np.eye(4)).tolist() == [1.5, 1.5, 1.5]
    assert Grid((4, 4, 4), np.eye(4)).pooled(2).shape == (2, 2, 2)
