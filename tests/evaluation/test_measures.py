"""One pair: measures against Learn2Reg's formulas, SimpleITK and values by hand."""

import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from _support.arrays import assert_arrays_close
from _support.brains import centre_of, grid_affine, world
from _support.labelled import FIXED, MOVING, SHIFT, labelled_pair, save
from _support.tolerances import TOL
from ulae_rt.batching.pairs import Pair
from ulae_rt.errors import EvaluationError, ShapeError
from ulae_rt.evaluation.measures import (
    Case,
    Failure,
    Registration,
    check_measurable,
    evaluate_pair,
    sd_log_jacobian,
)
from ulae_rt.evaluation.protocol import Protocol
from ulae_rt.imaging.grid import Grid
from ulae_rt.imaging.image import as_array, file_order
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.imaging.transform import in_mm, jacobian_determinant
from ulae_rt.imaging.warpfile import Warp

ZERO = Registration("zero", affine=np.eye(4))
SHIFTED = np.eye(4)
SHIFTED[:3, 3] = SHIFT
RIGHT = Registration("right", affine=SHIFTED)
ALL = Protocol.of_labels()


@pytest.fixture
def pair(tmp_path):
    return labelled_pair(tmp_path)


def rewrite(path, change):
    image = nib.load(path)
    save(path, change(np.asarray(image.dataobj)), image.affine)


def wavy(shape, affine, height=2.0):
    """A smooth displacement (X, Y, Z, 3), RAS mm."""
    points = world(shape, affine) - centre_of(shape, affine)
    return (SHIFT + height * np.sin(points[..., [1, 2, 0]] / 3)).astype(np.float32)


def warp_of(pair, path, disp, fmt="itk"):
    Warp(disp, read_volume(pair.fixed)).save(path, fmt)
    return Registration("warped", warp=path)


def one(pair, registration, protocol=ALL):
    (case,) = evaluate_pair(pair, [registration], protocol)
    assert isinstance(case, Case), case
    return case


def failed(pair, registration=ZERO):
    (failure,) = evaluate_pair(pair, [registration], ALL)
    assert isinstance(failure, Failure), failure
    assert (failure.id, failure.method) == ("a", registration.method)
    return failure.error


def test_the_right_shift_makes_labels_agree_and_none_does_not(pair):
    zero, right = evaluate_pair(pair, [ZERO, RIGHT], ALL)
    assert set(right.dice) == {1, 2, 3, 4, 9}
    # The moving map has 1 mm voxels: what is left is half of one at the borders.
    assert min(right.dice.values()) > 0.85
    assert max(right.hd95_mm.values()) < 2
    assert max(zero.dice.values()) < 0.75
    assert min(zero.hd95_mm.values()) > 2.5
    assert (zero.lost, right.lost) == (0, 0)
    assert zero.sdlogj == zero.folded_image_percent == zero.foldings == 0


@pytest.mark.parametrize("fmt", ["itk", "ras", "voxel"])
def test_dice_agrees_with_simpleitk_from_the_files_alone(pair, tmp_path, fmt):
    disp = wavy(*FIXED)
    case = one(pair, warp_of(pair, tmp_path / "warp.nii.gz", disp, fmt))
    warp_of(pair, tmp_path / "itk.nii.gz", disp)
    field = sitk.ReadImage(str(tmp_path / "itk.nii.gz"), sitk.sitkVectorFloat64)
    fixed = sitk.ReadImage(str(pair.fixed_labels))
    moving = sitk.ReadImage(str(pair.moving_labels))
    transform = sitk.DisplacementFieldTransform(field)
    moved = sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor, 0)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(fixed, moved)
    for label, dice in case.dice.items():
        theirs = overlap.GetDiceCoefficient(label)
        assert_arrays_close(f"Dice of {label}", dice, theirs, TOL["measure float64"])
        assert 0.3 < dice < 0.99


def learn2reg_determinant(disp, affine):
    """Learn2Reg's: voxel displacement, central differences, two voxels cut, in double precision."""
    voxels = np.linalg.solve(affine[:3, :3], disp.reshape(-1, 3).T).reshape(3, *disp.shape[:3])
    kernel = np.array([-0.5, 0, 0.5])
    gradient = [
        [ndimage.correlate1d(v, kernel, axis=a, mode="constant") for v in voxels] for a in range(3)
    ]
    matrix = np.moveaxis(np.array(gradient), (0, 1), (-2, -1)) + np.eye(3)
    return np.linalg.det(matrix)[2:-2, 2:-2, 2:-2]


@pytest.mark.parametrize("height", [1.0, 4.0])
def test_regularity_follows_learn2reg_s_formula(pair, tmp_path, height):
    disp = wavy(*FIXED, height)
    case = one(pair, warp_of(pair, tmp_path / "warp.nii.gz", disp))
    determinant = learn2reg_determinant(disp, FIXED[1])
    shifted = np.log((determinant + 3).clip(1e-9, 1e9)).std()
    plain = np.log(determinant.clip(1e-9, 1e9)).std()
    found = [case.sdlogj_l2r, case.sdlogj]
    assert_arrays_close("SDlogJ", found, [shifted, plain], TOL["sdlogj float32"])
    assert case.foldings == np.count_nonzero(determinant <= 0)
    assert (case.foldings > 0) == (height > 1)


def test_folding_is_of_the_image_and_of_the_brain(pair, tmp_path):
    # The first array axis runs backwards from a third of the image on.
    shape, affine = FIXED
    voxels = np.zeros((*shape, 3))
    first = shape[0] // 3
    voxels[first:, ..., 0] = -3.0 * np.arange(shape[0] - first)[:, None, None]
    disp = (voxels @ affine[:3, :3].T).astype(np.float32)
    case = one(pair, warp_of(pair, tmp_path / "warp.nii.gz", disp))
    # Central differences: plane `first` sees the mean of 1 and -2, what follows sees -2.
    folded = np.zeros(shape, bool)
    folded[first:] = True
    brain = np.asarray(nib.load(pair.fixed).dataobj) > 0
    assert case.folded_image_percent == pytest.approx(100 * folded.mean())
    assert case.folded_brain_percent == pytest.approx(100 * folded[brain].mean())
    assert case.folded_brain_percent != pytest.approx(case.folded_image_percent, abs=0.5)
    assert case.foldings == folded[2:-2, 2:-2, 2:-2].sum()


def test_learn2reg_s_distance_counts_voxels(pair):
    case = one(pair, ZERO)
    assert case.hd95_voxels.keys() == case.hd95_mm.keys()
    assert case.hd95_voxels[9] < case.hd95_mm[9]


def test_labels_that_are_missing_or_get_lost(pair):
    rewrite(pair.moving_labels, lambda data: np.where(data == 1, 0, data))
    rewrite(pair.fixed_labels, lambda data: np.where(data == 2, 0, data))
    away = np.eye(4)
    away[0, 3] = 22.0  # the fixed image sees only the moving one's right border
    case = one(pair, Registration("away", affine=away), Protocol.of_labels([1, 2, 3, 4, 9, 77]))
    assert [label for label, dice in case.dice.items() if math.isnan(dice)] == [1, 2, 77]
    assert case.dice[3] == case.dice[9] == 0
    assert math.isnan(case.hd95_mm[9])
    assert case.lost == 2
    right = one(pair, RIGHT, Protocol.of_labels([1, 2, 3, 4, 9, 77]))
    assert right.lost == 0
    assert right.dice[9] > 0.85
    assert math.isnan(right.dice[1])


def test_a_round_trip_is_as_good_as_the_way_back(pair, tmp_path):
    disp = np.broadcast_to(SHIFT, (*FIXED[0], 3)).astype(np.float32)
    there = warp_of(pair, tmp_path / "warp.nii.gz", disp)
    back = np.broadcast_to(-SHIFT + [0.3, 0, 0.4], (*MOVING[0], 3)).astype(np.float32)
    Warp(back, read_volume(pair.moving)).save(tmp_path / "back.nii.gz")
    case = one(pair, replace(there, inverse_warp=tmp_path / "back.nii.gz"))
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("there and back", case.inverse_consistency_mm, 0.5, few)
    assert math.isnan(one(pair, there).inverse_consistency_mm)


def test_learn2reg_s_warps_are_of_the_scans_grids(pair, tmp_path):
    pair = replace(pair, moving=pair.fixed, moving_labels=pair.fixed_labels)
    for name, voxels in (("warp", 1.0), ("back", -1.0)):
        disp = np.zeros((*FIXED[0], 3), np.float32)
        disp[..., 1] = voxels
        np.savez(tmp_path / f"{name}.npz", disp)
    files = {"warp": tmp_path / "warp.npz", "inverse_warp": tmp_path / "back.npz"}
    case = one(pair, Registration("l2r", **files))
    labels = np.asarray(nib.load(pair.fixed_labels).dataobj)
    moved = np.roll(labels, -1, axis=1)  # nothing lies at the border
    both = np.count_nonzero((labels == 9) & (moved == 9))
    overlap = both / np.count_nonzero(labels == 9)
    assert_arrays_close("Dice", case.dice[9], overlap, TOL["measure float64"])
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("there and back", case.inverse_consistency_mm, 0, few)


def test_landmarks_count_without_labels(pair, tmp_path):
    for name, shift in (("fixed", (0, 0, 0)), ("moving", np.add(SHIFT, (0, 0, 1)))):
        points = np.array([[1, 2, 3], [-2, 0, 1]]) + shift
        rows = [f"{i},{x},{y},{z}" for i, (x, y, z) in enumerate(points)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,x,y,z", *rows]))
    pair = replace(
        pair,
        fixed_labels=None,
        fixed_landmarks=tmp_path / "fixed.csv",
        moving_landmarks=tmp_path / "moving.csv",
    )
    case = one(pair, RIGHT)
    few = TOL["displacement of a few mm float32"]
    assert case.tre_mm == pytest.approx({"0": 1.0, "1": 1.0}, abs=few.absolute)
    assert case.dice == case.hd95_mm == {}


def test_a_registration_that_cannot_be_measured_does_not_stop_the_others(pair, tmp_path):
    elsewhere = grid_affine((22, 18, 14), (1, 1.4, 1.7), "PSR", (15, -10, 20), (0, 0, 0.5))
    other = save(tmp_path / "other.nii.gz", np.ones((18, 22, 14), np.float32), elsewhere[1])
    results = evaluate_pair(
        pair,
        [
            Registration("nothing written"),
            Registration("gone", warp=tmp_path / "gone.nii.gz"),
            Registration("no warp", warp=other),
            RIGHT,
        ],
        ALL,
    )
    assert [type(each) for each in results] == [Failure, Failure, Failure, Case]
    errors = [each.error for each in results[:3]]
    assert "its warp was not written" in errors[0]
    assert "does not exist" in errors[1]
    assert "expected XxYxZx1x3" in errors[2]


def test_grids_that_differ_are_refused_by_their_geometry(pair, tmp_path):
    shape, affine = FIXED
    disp = wavy(shape, affine)
    moved = affine.copy()
    moved[2, 3] += 0.5
    volume = read_volume(pair.fixed)
    Warp(disp, replace(volume, affine=moved)).save(tmp_path / "warp.nii.gz")
    error = failed(pair, Registration("w", warp=tmp_path / "warp.nii.gz"))
    assert "lie on grids that are 0.5 mm apart" in error
    image = nib.load(pair.fixed_labels)
    save(pair.fixed_labels, np.asarray(image.dataobj)[1:], image.affine)
    assert "fixed_labels.nii.gz has size" in failed(pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.astype(np.float32) / 2, "holds fractions, expected whole-number labels"),
        (lambda data: data - np.int16(3), "holds the label -3, expected 0 to 2147483647"),
        (lambda data: data * np.float32(2**30), "holds the label 9663676416, expected 0 to"),
    ],
)
def test_what_is_no_label_map_is_refused(pair, change, message):
    rewrite(pair.moving_labels, change)
    assert message in failed(pair)


def test_an_unreadable_scan_fails_every_method_of_its_pair(pair):
    pair.fixed.write_bytes(b"")
    results = evaluate_pair(pair, [ZERO, RIGHT], ALL)
    assert [each.method for each in results] == ["zero", "right"]
    assert all("is empty" in each.error for each in results)


def test_regularity_by_hand():
    jacobian = np.ones((5, 5, 6), np.float32)
    jacobian[2, 2, 2] = math.e
    # Two voxels are left, with logarithms 1 and 0.
    tol = TOL["sdlogj float32"]
    assert_arrays_close("e", sd_log_jacobian(jacobian), 0.5, tol)
    expected = (math.log(math.e + 3) - math.log(4)) / 2
    assert_arrays_close("shifted", sd_log_jacobian(jacobian, shift=3), expected, tol)
    jacobian[2, 2, 3] = -5
    assert_arrays_close("folded", sd_log_jacobian(jacobian), (1 + 9 * math.log(10)) / 2, tol)
    with pytest.raises(ShapeError, match=r"4x5x6 voxels, expected at least 5"):
        sd_log_jacobian(jacobian[:4])


def test_scaling_alone_is_regular():
    affine = np.diag([1.0, 2, 3, 1])
    disp = (world((6, 7, 8), affine) * 0.25).astype(np.float32)
    grid = file_order(Grid((6, 7, 8), affine))
    jacobian = as_array(jacobian_determinant(in_mm(disp), grid.affine))
    assert_arrays_close("jacobian", jacobian[3, 3, 3], 1.25**3, TOL["jacobian float32"])
    assert_arrays_close("SDlogJ", sd_log_jacobian(jacobian), 0, TOL["sdlogj float32"])


def test_pairs_without_anything_to_compare_are_said(pair):
    bare = Pair("a", pair.moving, pair.fixed)
    half = replace(bare, moving_labels=pair.moving_labels, fixed_landmarks=pair.fixed)
    with pytest.raises(
        EvaluationError, match="none of 2 pairs has labels or landmarks of both"
    ) as e:
        check_measurable([bare, half])
    assert "moving_labels and fixed_labels" in e.value.hint
    check_measurable([bare, pair])
