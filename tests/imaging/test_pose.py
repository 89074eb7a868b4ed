"""The pose of a head by the template that is shipped, and what the network's grid makes of it."""

import logging
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from _support.brains import GEOMETRIES, centre_of, save_brain
from ulae_rt.imaging.image import image_of
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.imaging.pose import TEMPLATE, pose_of, template
from ulae_rt.imaging.preprocess import shrunk
from ulae_rt.registration.registrar import Registrar

ROTATIONS = {
    **{f"random {n}": Rotation.random(random_state=n).as_matrix() for n in range(8)},
    "180 about R": np.diag([1.0, -1, -1]),
    "180 about A": np.diag([-1.0, 1, -1]),
    "180 about S": np.diag([-1.0, -1, 1]),
}


@pytest.fixture(scope="module")
def head(samples):
    """Not the template's own brain, at 2 mm."""
    return shrunk(image_of(read_volume(samples[0])), (2, 2, 2))


@pytest.fixture(scope="module")
def pose(head):
    return pose_of(head)


def turned(affine, shape, turn):
    """An affine turned about the middle of its grid."""
    there = nib.affines.from_matvec(np.eye(3), centre_of(shape, affine))
    return there @ nib.affines.from_matvec(turn) @ np.linalg.inv(there) @ affine


def degrees(one, other):
    """The angle between two poses, whatever their sizes."""
    turn = one @ np.linalg.inv(other)
    turn /= np.cbrt(np.linalg.det(turn))
    return np.rad2deg(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))


def test_the_template_is_the_samples_means_cropped_to_the_brain(samples):
    path = samples[1].parent / TEMPLATE
    assert path.stat().st_size < 250_000
    fine, small = nib.load(samples[1]), nib.load(path)
    data = np.asarray(fine.dataobj, dtype=np.float64)
    whole = [n // 2 for n in data.shape]
    data = data[tuple(slice(2 * n) for n in whole)]
    x, y, z = whole
    means = np.rint(data.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5)))
    brain = np.argwhere(means > 0)
    # The sample itself begins where its brain does, at the neck.
    low, high = np.maximum(brain.min(0) - 1, 0), brain.max(0) + 2
    expected = means[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    np.testing.assert_array_equal(np.asarray(small.dataobj), expected)
    blocks = fine.affine @ nib.affines.from_matvec(np.eye(3) * 2, [0.5] * 3)
    np.testing.assert_allclose(small.affine, blocks @ nib.affines.from_matvec(np.eye(3), low))


def test_the_template_lies_as_itself():
    pose = pose_of(template("cpu"))
    assert degrees(pose, np.eye(3)) < 1
    assert np.cbrt(np.linalg.det(pose)) == pytest.approx(1, abs=0.01)


def test_columns_are_a_turn_of_one_length(pose):
    length = np.linalg.norm(pose, axis=0)
    np.testing.assert_allclose(length, length[0], rtol=1e-12)
    np.testing.assert_allclose(pose.T @ pose, np.eye(3) * length[0] ** 2, atol=1e-12)
    assert np.linalg.det(pose) > 0
    assert 0.8 < length[0] < 1.25
    assert degrees(pose, np.eye(3)) < 15  # Colin lies as most do


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_turned_head_has_its_pose_turned_with_it(name, head, pose):
    turn = ROTATIONS[name]
    affine = turned(head.affine, head.grid.shape, turn)
    found = pose_of(replace(head, affine=affine))
    assert degrees(found, turn @ pose) < 1
    assert np.linalg.det(found) == pytest.approx(np.linalg.det(pose), rel=0.03)
    assert np.linalg.det(found) > 0


def test_what_is_no_head_gets_the_scans_own_axes_and_it_is_told(tmp_path, caplog):
    shape, affine = GEOMETRIES["LIA"]
    blobs = image_of(read_volume(save_brain(tmp_path / "blobs.nii.gz", shape, affine)))
    with caplog.at_level(logging.WARNING):
        assert pose_of(blobs) is None
    assert "blobs.nii.gz does not look like the average brain in any pose" in caplog.text


@pytest.mark.slow  # the shipped weights, thrice
def test_how_the_fixed_head_lies_in_the_scanner_changes_nothing(samples, tmp_path: Path):
    registrar = Registrar(device="cpu")
    moving, fixed = (shrunk(image_of(read_volume(path)), (2, 2, 2)) for path in samples)

    def scan(image, affine):
        return image.voxels[0, 0].numpy(), affine

    plain = registrar(scan(moving, moving.affine), scan(fixed, fixed.affine))
    expected = torch.from_numpy(np.asarray(plain.moved.dataobj))
    brightness = float(expected.amax())
    for name in ("random 1", "180 about S"):
        affine = turned(fixed.affine, fixed.grid.shape, ROTATIONS[name])
        found = registrar(scan(moving, moving.affine), scan(fixed, affine))
        difference = torch.from_numpy(np.asarray(found.moved.dataobj)) - expected
        rms = float(difference.square().mean().sqrt()) / brightness
        print(f"{name}: {rms:.2e} of the brightest, similarity {found.stats.similarity_after:.5f}")
        assert rms < 1e-3
        assert found.stats.similarity_after == pytest.approx(plain.stats.similarity_after, abs=1e-3)
