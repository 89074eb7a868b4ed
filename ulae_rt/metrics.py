"""Agreement of label maps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def dice_per_label(
    x: NDArray[np.integer], y: NDArray[np.integer], labels: Sequence[int] | None = None
) -> dict[int, float]:
    """``2 |X and Y| / (|X| + |Y|)`` of each label.

    Args:
        x: label map, any shape, non-negative integers.
        y: the same shape.
        labels: which ones; None: every non-zero label of either map.

    Returns:
        Label to Dice in [0, 1]; NaN for a label that one of the maps does not have at all.
    """
    size = int(max(x.max(), y.max())) + 1
    in_x = np.bincount(x.ravel(), minlength=size)
    in_y = np.bincount(y.ravel(), minlength=size)
    both = np.bincount(x[x == y].ravel(), minlength=size)
    if labels is None:
        labels = [int(v) for v in np.flatnonzero(in_x + in_y) if v]
    scores = {}
    for label in labels:
        present = label < size and in_x[label] and in_y[label]
        scores[label] = 2.0 * both[label] / (in_x[label] + in_y[label]) if present else np.nan
    return scores


def mean_dice(x: NDArray[np.integer], y: NDArray[np.integer]) -> float:
    """Mean of :func:`dice_per_label` over the labels both maps have."""
    return float(np.nanmean(list(dice_per_label(x, y).values())))
