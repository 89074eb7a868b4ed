"""A registration that can hardly be believed says so, with what to check."""

import nibabel as nib
import numpy as np
import pytest

from ulae_rt.registration.verdict import Signs, affine_reason, judge, tell, unlike_reason


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
def test_what_no_brain_does_is_told(matrix, words):
    reason = affine_reason(matrix, "m.nii", "f.nii")
    assert f"the affine from m.nii to f.nii {words}" in reason


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 10, 15), (-20, 5, -25)])
@pytest.mark.parametrize("scales", [(1, 1, 1), (0.86, 0.88, 0.93), (1.16, 1.13, 1.07)])
def test_heads_as_they_lie_pass_without_a_word(angles, scales):
    assert affine_reason(affine(angles, scales), "m.nii", "f.nii") == ""


def test_images_that_stay_unlike_are_told():
    assert unlike_reason(0.5, 0.85, "m.nii", "f.nii") == ""
    assert unlike_reason(0.46, None, "m.nii", "f.nii") == ""
    reason = unlike_reason(0.5, 0.66, "m.nii", "f.nii")
    assert "m.nii and f.nii have a similarity of only 0.66" in reason
    assert "similarity of only 0.23" in unlike_reason(0.23, None, "m.nii", "g.nii")


# The least of 45 good pairs, and what was measured of inputs that were spoilt.
WORST_GOOD = Signs(affine((0, 0, 8), (0.86, 0.9, 0.93)), 0.940, 0.486, 0.824)
HALF_OF_THE_MOVING_BRAIN = Signs(affine(scales=(1, 1.1, 1.05)), 0.65, 0.19, 0.28)
SQUEEZED = Signs(affine((0, 0, 25), (0.58, 1.0, 1.1)), 0.87, 0.29, 0.59)
INVERTED = Signs(affine(scales=(1.05, 1.1, 1.13)), 0.94, -0.20, 0.26)
MOVING_WITH_SKULL = Signs(affine(scales=(1.06, 1.1, 1.14)), 0.43, 0.55, 0.76)
FIXED_WITH_SKULL = Signs(affine((0, 0, 18), (0.56, 0.8, 0.89)), 0.95, 0.18, 0.38)
OTHER_CONTRAST = Signs(affine(scales=(0.93, 0.95, 0.98)), 0.95, 0.24, 0.41)
UPSIDE_DOWN = Signs(affine((180, 0, 0)), 0.95, 0.54, 0.85)
NO_OVERLAP = Signs(affine(), 0.02, 0.0, 0.0)


@pytest.mark.parametrize(
    ("signs", "name", "words"),
    [
        (WORST_GOOD, "good", ()),
        (HALF_OF_THE_MOVING_BRAIN, "doubtful", ("overlap by only 0.65", "two whole brains")),
        (SQUEEZED, "failed", ("scales it by 0.58", "overlap by only 0.87", "only 0.59")),
        (INVERTED, "failed", ("a similarity of only 0.26",)),
        (MOVING_WITH_SKULL, "doubtful", ("overlap by only 0.43", "without skull")),
        (FIXED_WITH_SKULL, "failed", ("scales its volume by 0.40", "only 0.38")),
        (OTHER_CONTRAST, "doubtful", ("a similarity of only 0.41",)),
        (UPSIDE_DOWN, "doubtful", ("turns it by 180 degrees",)),
        (NO_OVERLAP, "failed", ("overlap by only 0.02",)),
    ],
)
def test_a_verdict_says_why(signs, name, words):
    verdict = judge(signs, "m.nii", "f.nii")
    assert verdict.name == name
    assert bool(verdict.reasons) == (name != "good")
    for word in words:
        assert any(word in reason for reason in verdict.reasons), (word, verdict.reasons)


def test_an_affine_alone_is_judged_by_what_it_reached():
    assert judge(Signs(affine(), 0.95, 0.5, None), "m", "f").name == "good"
    assert judge(Signs(affine(), 0.95, 0.35, None), "m", "f").name == "doubtful"
    assert judge(Signs(affine(), 0.95, 0.1, None), "m", "f").name == "failed"


def test_reasons_are_logged_one_by_one(caplog):
    tell(["the one", "100 % of the other"])
    one, other = (record.getMessage() for record in caplog.records)
    assert one.startswith("the one: look at the result")
    assert other.startswith("100 % of the other: look at the result")
    assert "check that both images show one whole skull-stripped T1 brain" in other
