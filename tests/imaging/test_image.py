"""Volumes as tensors: there and back, and sampled as scipy samples them."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, brain_at, centre_of, world
from _support.tolerances import TOL
from ulae_rt.errors import ImageError
from ulae_rt.imaging.grid import Grid, grid_of
from ulae_rt.imaging.image import (
    as_array,
    file_order,
    image_of,
    in_file_order,
    labels_of,
    resample,
)
from ulae_rt.imaging.nifti import volume_from_array


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f4", ">f4", "<u2", "<i4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_comes_back_as_it_went(dtype, order):
    data = np.arange(24).reshape(2, 3, 4).astype(dtype, order=order)
    voxels = in_file_order(data)
    assert voxels.shape == (1, 1, 4, 3, 2)
    assert voxels.is_contiguous()
    assert voxels[0, 0, 3, 2, 1] == data[1, 2, 3]
    found = as_array(voxels)
    assert found.dtype == data.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, data)


def test_what_a_file_holds_in_its_own_order_is_not_copied():
    data = np.asfortranarray(np.zeros((2, 3, 4), np.float32))
    assert in_file_order(data).data_ptr() == data.ctypes.data


def test_an_array_that_may_not_be_written_to_is_taken():
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    data.flags.writeable = False
    np.testing.assert_array_equal(as_array(in_file_order(data)), data)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_voxel_lies_where_its_file_says(name):
    shape, affine = GEOMETRIES[name]
    volume = volume_from_array(np.indices(shape)[0], affine, name=name)
    grid = image_of(volume).grid
    assert grid.shape == shape[::-1]
    np.testing.assert_allclose(
        world(grid.shape, grid.affine), world(shape, affine).transpose(2, 1, 0, 3), atol=1e-10
    )
    back = file_order(grid)
    assert back.shape == shape
    np.testing.assert_array_equal(back.affine, affine)
    np.testing.assert_array_equal(file_order(grid_of(volume)).affine, grid.affine)


def test_images_are_float32_and_labels_keep_their_type():
    volume = volume_from_array(np.indices((2, 3, 4))[1].astype(np.uint16), np.eye(4), name="a")
    assert image_of(volume).voxels.dtype == torch.float32
    assert labels_of(volume).voxels.dtype == torch.uint16


def test_brightness_is_of_the_voxels_above_0():
    data = np.zeros((20, 20, 20), np.float32)
    values = np.random.default_rng(0).permutation(np.arange(1, 4001))
    data[:10] = values.reshape(10, 20, 20)
    found = image_of(volume_from_array(data, np.eye(4), name="a")).brightness
    assert (found.p95, found.p999, found.maximum) == (3800, 3996, 4000)
    nothing = image_of(volume_from_array(-data, np.eye(4), name="dark"))
    with pytest.raises(ImageError, match="dark has no voxel above 0"):
        _ = nothing.brightness


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sampling_is_scipys(name):
    """Linear, on a grid of another orientation, through an affine, and 0 outside."""
    shape, affine = GEOMETRIES[name]
    data = brain_at(world(shape, affine) - centre_of(shape, affine)).astype(np.float32)
    image = image_of(volume_from_array(data, affine, name=name))
    middle = centre_of(shape, affine)
    grid = Grid(
        (30, 28, 34),
        nib.affines.from_matvec(
            nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([1.7, -1.3, 1.9]),
            middle + np.array([-20, 10, -30]),
        ),
    )
    through = nib.affines.from_matvec(np.diag([1.1, 0.9, 1.05]), middle * [-0.1, 0.1, -0.05])
    points = nib.affines.apply_affine(through, world(grid.shape, grid.affine))
    index = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(affine), points), -1, 0)
    inside = ((index >= 0) & (index <= np.array(shape)[:, None, None, None] - 1)).all(0)
    beyond = ((index < -0.5) | (index > np.array(shape)[:, None, None, None] - 0.5)).any(0)
    found = resample(image, grid, through)[0, 0].numpy()
    assert inside.sum() > 1000
    expected = map_coordinates(data, index, order=1, output=np.float64)
    tol = TOL["image in our own two ways"]
    assert_arrays_close("scipy", found[inside], expected[inside], tol)
    assert not found[beyond].any()


def test_resampling_far_outside_is_zero_and_labels_keep_their_type():
    data = np.arange(1, 28, dtype=np.uint16).reshape(3, 3, 3)
    labels = labels_of(volume_from_array(data, np.eye(4), name="labels", kind="labels"))
    grid = Grid((5, 5, 5), nib.affines.from_matvec(np.eye(3), [-1, -1, -1]))
    out = resample(labels, grid, interp="nearest")[0, 0].numpy()
    assert out.dtype == np.uint16
    assert np.array_equal(out[1:4, 1:4, 1:4], data)
    assert out.sum() == data.sum()
