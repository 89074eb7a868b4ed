"""The affine finds what is known, the same every time, and says when it cannot."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, centre_of, grid_affine, real_brain, save_brain
from _support.tolerances import TOL
from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging import affine as affine_module
from ulae_rt.imaging.affine import register_affine
from ulae_rt.imaging.image import image_of
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.imaging.preprocess import shrunk

# Fixed RAS mm to moving RAS mm: 10 degrees about an odd axis, 1.1 in size, 15 mm away.
KNOWN = nib.affines.from_matvec(
    nib.quaternions.angle_axis2mat(np.deg2rad(10), [1, 2, 3]) * 1.1, [12.0, -8.0, 4.0]
)
CORNERS = np.array(
    [[x, y, z] for x in (-60, 60) for y in (-75, 75) for z in (-55, 55)], dtype=float
)


def error_at(found, expected, points):
    """(N,) mm between where two matrices take points (N, 3)."""
    apply = nib.affines.apply_affine
    return np.linalg.norm(apply(found, points) - apply(expected, points), axis=1)


def error_mm(found, expected):
    return error_at(found, expected, CORNERS).max()


# A real head at 2 mm, all of it in view.
HEAD = (88, 104, 88), (2, 2, 2)


@pytest.fixture(scope="module")
def head(samples):
    return real_brain(samples[0])


@pytest.fixture(scope="module")
def fixed(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("fixed") / "f.nii.gz"
    return image_of(read_volume(save_brain(path, *grid_affine(*HEAD), brain=head)))


@pytest.fixture(scope="module")
def moving(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("moving") / "m.nii.gz"
    grid = grid_affine((100, 120, 100), (2, 2, 2), codes="LIA", centre=(12, -8, 4))
    return image_of(read_volume(save_brain(path, *grid, pull=np.linalg.inv(KNOWN), brain=head)))


@pytest.fixture(scope="module")
def found(moving, fixed):
    return register_affine(moving, fixed)


def test_a_known_affine_is_found_within_half_a_millimetre(found):
    assert error_mm(found, KNOWN) < 0.5


def test_the_same_pair_gives_the_same_matrix(found, moving, fixed):
    assert np.array_equal(register_affine(moving, fixed), found)


def test_a_turned_head_far_away_is_found(head, fixed, tmp_path):
    turn = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(*np.deg2rad([25, -20, 28])), [40, -290, 210]
    )
    moving = save_brain(
        tmp_path / "m.nii.gz",
        *grid_affine((110, 110, 75), (2, 2, 3), "PSR", (0, 0, 0), (40, -290, 210)),
        pull=np.linalg.inv(turn),
        brain=head,
    )
    assert error_mm(register_affine(image_of(read_volume(moving)), fixed), turn) < 0.5


def test_none_trusts_the_headers(moving, fixed):
    assert np.array_equal(register_affine(moving, fixed, "none"), np.eye(4))


def test_com_moves_centre_onto_centre(tmp_path):
    fixed = image_of(read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["RAS"])))
    shape, affine = GEOMETRIES["far"]
    moving = image_of(read_volume(save_brain(tmp_path / "m.nii.gz", shape, affine)))
    found = register_affine(moving, fixed, "com")
    assert np.array_equal(found[:3, :3], np.eye(3))
    offset = centre_of(shape, affine) - centre_of(*GEOMETRIES["RAS"])
    assert_arrays_close("offset", found[:3, 3], offset, TOL["centre of mass"])


def test_an_unknown_mode_is_refused(moving, fixed):
    with pytest.raises(UsageError, match="affine is 'rigid', expected one of none, com, affine"):
        register_affine(moving, fixed, "rigid")


def test_a_matrix_beyond_belief_is_refused(moving, fixed, monkeypatch):
    monkeypatch.setattr(affine_module, "_search", lambda *_: np.diag([0.6, 0.6, 0.6, 1]))
    with pytest.raises(GeometryError, match=r"scales volume by 0\.22") as caught:
        register_affine(moving, fixed)
    assert "--affine com" in caught.value.hint


@pytest.fixture(scope="module")
def people(samples):
    """Two different brains at 2 mm, moving and fixed."""
    moving, fixed = (image_of(read_volume(path)) for path in samples)
    return shrunk(moving, (2, 2, 2)), shrunk(fixed, (2, 2, 2))


@pytest.fixture(scope="module")
def between(people):
    return register_affine(*people)


def in_brain_mm(found, expected, fixed):
    """Mean distance in mm of where two matrices take the voxels of the fixed brain."""
    index = fixed.voxels[0, 0].nonzero().numpy()
    distance = error_at(found, expected, nib.affines.apply_affine(fixed.affine, index)).mean()
    print(f"apart in the brain: {distance:.3f} mm in the mean")
    return distance


def turned(image, turn):
    """An image whose header turns it about the middle of its grid, and the (4, 4) that does."""
    middle = centre_of(image.grid.shape, image.affine)
    there = nib.affines.from_matvec(np.eye(3), middle)
    turn = there @ nib.affines.from_matvec(turn) @ np.linalg.inv(there)
    return replace(image, affine=turn @ image.affine), turn


ROTATIONS = {
    **{f"random {n}": Rotation.random(random_state=n).as_matrix() for n in range(8)},
    "180 about R": np.diag([1.0, -1, -1]),
    "180 about A": np.diag([-1.0, 1, -1]),
    "180 about S": np.diag([-1.0, -1, 1]),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_head_turned_in_any_way_is_found(name, people, between):
    moving, fixed = people
    image, turn = turned(moving, ROTATIONS[name])
    found = register_affine(image, fixed)
    assert in_brain_mm(np.linalg.inv(turn) @ found, between, fixed) < 1


def cut(image, axis, keep):
    """The part of an image along an axis of its tensor; its voxels stay where they were."""
    first = np.zeros(3)
    first[axis] = keep.start or 0
    index = [slice(None)] * 5
    index[axis + 2] = keep
    affine = image.affine @ nib.affines.from_matvec(np.eye(3), first)
    return replace(image, voxels=image.voxels[tuple(index)].contiguous(), affine=affine)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("which", ["moving", "fixed"])
def test_half_a_brain_is_found_and_not_scaled_to_a_whole_one(axis, side, which, people, between):
    moving, fixed = people
    image = moving if which == "moving" else fixed
    half = image.grid.shape[axis] // 2
    part = cut(image, axis, slice(0, half) if side == "first" else slice(half, None))
    found = register_affine(*((part, fixed) if which == "moving" else (moving, part)))
    assert in_brain_mm(found, between, fixed) < 7
    scale = np.linalg.det(found[:3, :3]) / np.linalg.det(between[:3, :3])
    assert 0.8 < scale < 1.35


def test_scans_metres_apart_are_found(people, between):
    moving, fixed = people
    away = nib.affines.from_matvec(np.eye(3), [25_000, -23_000, 15_000])  # 37 m
    found = register_affine(replace(moving, affine=away @ moving.affine), fixed)
    assert in_brain_mm(np.linalg.inv(away) @ found, between, fixed) < 0.1


def test_a_brain_that_touches_its_faces_is_found(people, between):
    moving, fixed = people
    tight = moving
    for axis in range(3):
        where = (tight.voxels[0, 0] > 0).nonzero()[:, axis]
        tight = cut(tight, axis, slice(int(where.min()), int(where.max()) + 1))
    assert tight.grid.shape < moving.grid.shape
    assert in_brain_mm(register_affine(tight, fixed), between, fixed) < 1


def test_thick_slices_are_found(samples, people, between):
    """1 x 1 x 5 mm: the means of five slices."""
    moving = shrunk(image_of(read_volume(samples[0])), (5, 1, 1))
    assert np.linalg.norm(moving.affine[:3, :3], axis=0) == pytest.approx([5, 1, 1])
    assert in_brain_mm(register_affine(moving, people[1]), between, people[1]) < 2


@pytest.mark.parametrize(
    "contrast",
    [
        lambda x: torch.where(x > 0, x.max() + 1 - x, 0),
        lambda x: x.max() * (x / x.max()) ** 3,
        lambda x: x.max() * (x / x.max()) ** 0.4,
    ],
    ids=["inverted", "gamma 3", "gamma 0.4"],
)
def test_another_contrast_lands_where_the_same_one_does(contrast, people, between):
    moving, fixed = people
    other = replace(moving, voxels=contrast(moving.voxels))
    assert in_brain_mm(register_affine(other, fixed), between, fixed) < 2


def one_slice(image, axis):
    return cut(image, axis, slice(image.grid.shape[axis] // 2, image.grid.shape[axis] // 2 + 1))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("which", ["moving", "fixed"])
def test_one_slice_gives_a_matrix_or_an_error(axis, which, people):
    moving, fixed = people
    image = one_slice(moving if which == "moving" else fixed, axis)
    matrix_or_error(*((image, fixed) if which == "moving" else (moving, image)))


def matrix_or_error(moving, fixed):
    try:
        found = register_affine(moving, fixed)
    except GeometryError as error:
        found, message = None, f"{error} ({error.hint})"
    if found is None:
        assert "affine alignment of" in message
        assert "use --affine com" in message
    else:
        assert np.isfinite(found).all()
        assert 0.3 <= np.linalg.det(found[:3, :3]) <= 3


def test_a_corner_of_a_brain_gives_a_matrix_or_an_error(people):
    """A third along each axis: hardly anything overlaps."""
    moving, fixed = people
    for axis in range(3):
        where = (moving.voxels[0, 0] > 0).nonzero()[:, axis]
        low, high = int(where.min()), int(where.max()) + 1
        moving = cut(moving, axis, slice(low, low + (high - low) // 3))
    assert (moving.voxels > 0).any()
    matrix_or_error(moving, fixed)
