import numpy as np
import pytest
import SimpleITK as sitk

from ulae_rt.metrics import dice_per_label, mean_dice


def test_dice_by_hand() -> None:
    x = np.array([1, 1, 1, 2, 2, 0, 0, 3])
    y = np.array([1, 1, 0, 2, 0, 2, 0, 0])
    scores = dice_per_label(x, y)
    assert scores[1] == pytest.approx(2 * 2 / (3 + 2))
    assert scores[2] == pytest.approx(2 * 1 / (2 + 2))
    assert np.isnan(scores[3])  # label 3 is in one map only
    assert mean_dice(x, y) == pytest.approx((0.8 + 0.5) / 2)


def test_asked_labels_that_do_not_exist_are_nan() -> None:
    x = np.array([1, 2])
    assert np.isnan(dice_per_label(x, x, labels=[7])[7])


def test_dice_agrees_with_simpleitk() -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 6, (9, 8, 7))
    y = np.where(random.random(x.shape) < 0.7, x, random.integers(0, 6, x.shape))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(sitk.GetImageFromArray(x), sitk.GetImageFromArray(y))
    for label, score in dice_per_label(x, y).items():
        assert score == pytest.approx(overlap.GetDiceCoefficient(label), abs=1e-12)
