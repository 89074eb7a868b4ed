"""The affine finds what is known, the same every time, and says when it cannot."""

import nibabel as nib
import numpy as np
import pytest

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, centre_of, grid_affine, real_brain, save_brain
from _support.tolerances import TOL
from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging import affine as affine_module
from ulae_rt.imaging.affine import register_affine
from ulae_rt.imaging.nifti import read_volume

# Fixed RAS mm to moving RAS mm: 10 degrees about an odd axis, 1.1 in size, 15 mm away.
KNOWN = nib.affines.from_matvec(
    nib.quaternions.angle_axis2mat(np.deg2rad(10), [1, 2, 3]) * 1.1, [12.0, -8.0, 4.0]
)
CORNERS = np.array(
    [[x, y, z] for x in (-60, 60) for y in (-75, 75) for z in (-55, 55)], dtype=float
)


def error_mm(found, expected, points=CORNERS):
    apply = nib.affines.apply_affine
    return np.linalg.norm(apply(found, points) - apply(expected, points), axis=1).max()


# A real head at 2 mm, all of it in view.
HEAD = (88, 104, 88), (2, 2, 2)


@pytest.fixture(scope="module")
def head(samples):
    return real_brain(samples[0])


@pytest.fixture(scope="module")
def fixed(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("fixed") / "f.nii.gz"
    return read_volume(save_brain(path, *grid_affine(*HEAD), brain=head))


@pytest.fixture(scope="module")
def moving(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("moving") / "m.nii.gz"
    grid = grid_affine((100, 120, 100), (2, 2, 2), codes="LIA", centre=(12, -8, 4))
    return read_volume(save_brain(path, *grid, pull=np.linalg.inv(KNOWN), brain=head))


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
    assert error_mm(register_affine(read_volume(moving), fixed), turn) < 0.5


def test_none_trusts_the_headers(moving, fixed):
    assert np.array_equal(register_affine(moving, fixed, "none"), np.eye(4))


def test_com_moves_centre_onto_centre(tmp_path):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["RAS"]))
    shape, affine = GEOMETRIES["far"]
    moving = read_volume(save_brain(tmp_path / "m.nii.gz", shape, affine))
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
