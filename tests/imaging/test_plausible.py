"""An affine or a similarity that can hardly be believed is told, with what to check."""

import nibabel as nib
import numpy as np
import pytest

from ulae_rt.imaging.plausible import warn_implausible_affine, warn_unlike


def affine(angles_deg=(0, 0, 0), scales=(1, 1, 1)):
    turn = nib.eulerangles.euler2mat(*np.deg2rad(angles_deg)[::-1])
    return nib.affines.from_matvec(turn @ np.diag(scales), (10, -20, 300))


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (affine((0, 0, 61)), "turns it by 61 degrees"),
        (affine((45, 0, 0), (1, 1, 0.4)), "turns it by 45 degrees and scales its volume by 0.40"),
        (affine(scales=(1.4, 1.3, 1.3)), "scales its volume by 2.37"),
        (affine(scales=(1.1, 1.2, 0.44)), "scales it by 0.44 to 1.20 along its axes"),
        (affine(scales=(-1, 1, 1)), "mirrors it"),
    ],
)
def test_what_no_brain_does_is_told(matrix, words, caplog):
    warn_implausible_affine(matrix, "m.nii", "f.nii")
    assert f"the affine from m.nii to f.nii {words}" in caplog.text.replace("\n", " ")
    assert "check that both images show one whole skull-stripped T1 brain" in caplog.text


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 10, 15), (-20, 5, -25)])
@pytest.mark.parametrize("scales", [(1, 1, 1), (0.86, 0.88, 0.93), (1.16, 1.13, 1.07)])
def test_heads_as_they_lie_pass_without_a_word(angles, scales, caplog):
    warn_implausible_affine(affine(angles, scales), "m.nii", "f.nii")
    assert not caplog.records


def test_images_that_stay_unlike_are_told(caplog):
    warn_unlike(0.5, 0.85, "m.nii", "f.nii")
    warn_unlike(0.46, None, "m.nii", "f.nii")
    assert not caplog.records
    warn_unlike(0.5, 0.66, "m.nii", "f.nii")
    assert "m.nii and f.nii have a similarity of only 0.66" in caplog.text
    warn_unlike(0.23, None, "m.nii", "g.nii")
    assert "m.nii and g.nii have a similarity of only 0.23" in caplog.text
