"""The affine finds what is known, the same every time, and says when it cannot."""

import nibabel as nib
import numpy as np
import pytest

from _support.brains import GEOMETRIES, centre_of, grid_affine, save_brain
from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging import affine as affine_module
from ulae_rt.imaging.affine import register_affine
from ulae_rt.imaging.nifti import read_volume

# Fixed RAS mm to moving RAS mm: 10 degrees about an odd axis, 1.1 in size, 15 mm away.
KNOWN = nib.affines.from_matvec(
    nib.quaternions.angle_axis2mat(np.deg2rad(10), [1, 2, 3]) * 1.1, [12.0, -8.0, 4.0]
)
CORNERS = np.array(
    [[x, y, z] for x in (-20, 20) for y in (-28, 28) for z in (-18, 18)], dtype=float
)


def error_mm(found, expected, points=CORNERS):
    apply = nib.affines.apply_affine
    return np.linalg.norm(apply(found, points) - apply(expected, points), axis=1).max()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    fixed = save_brain(folder / "f.nii.gz", *grid_affine((64, 80, 60)))
    moving = save_brain(
        folder / "m.nii.gz",
        *grid_affine((80, 96, 76), codes="LIA", centre=(12, -8, 4)),
        pull=np.linalg.inv(KNOWN),
    )
    return read_volume(moving), read_volume(fixed)


def test_a_known_affine_is_found_within_half_a_millimetre(pair):
    found = register_affine(*pair)
    assert error_mm(found, KNOWN) < 0.5


def test_the_same_pair_gives_the_same_matrix(pair):
    assert np.array_equal(register_affine(*pair), register_affine(*pair))


def test_a_turned_head_far_away_is_found(tmp_path):
    turn = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(*np.deg2rad([25, -20, 28])), [40, -290, 210]
    )
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *grid_affine((64, 80, 60))))
    moving = read_volume(
        save_brain(
            tmp_path / "m.nii.gz",
            *grid_affine((90, 90, 60), (1, 1, 1.5), "PSR", (0, 0, 0), (40, -290, 210)),
            pull=np.linalg.inv(turn),
        )
    )
    assert error_mm(register_affine(moving, fixed), turn) < 0.5


def test_none_trusts_the_headers(pair):
    assert np.array_equal(register_affine(*pair, "none"), np.eye(4))


def test_com_moves_centre_onto_centre(tmp_path):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["RAS"]))
    shape, affine = GEOMETRIES["far"]
    moving = read_volume(save_brain(tmp_path / "m.nii.gz", shape, affine))
    found = register_affine(moving, fixed, "com")
    assert np.array_equal(found[:3, :3], np.eye(3))
    offset = centre_of(shape, affine) - centre_of(*GEOMETRIES["RAS"])
    np.testing.assert_allclose(found[:3, 3], offset, atol=0.1)


def test_an_unknown_mode_is_refused(pair):
    with pytest.raises(UsageError, match="affine is 'rigid', expected one of none, com, affine"):
        register_affine(*pair, "rigid")


def test_a_matrix_beyond_belief_is_refused(pair, monkeypatch):
    monkeypatch.setattr(affine_module, "_search", lambda *_: np.diag([0.6, 0.6, 0.6, 1]))
    with pytest.raises(GeometryError, match=r"scales volume by 0\.22") as caught:
        register_affine(*pair)
    assert "--affine com" in caught.value.hint
