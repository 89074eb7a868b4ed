"""Numpy arrays held to the table of tolerances."""

import numpy as np
import torch
from numpy.typing import ArrayLike

from _support.tolerances import Tolerance, assert_close


def assert_arrays_close(name: str, actual: ArrayLike, expected: ArrayLike, tol: Tolerance) -> None:
    """`assert_close` for arrays of any type; ``expected`` may be one number for all."""
    found = np.array(actual, dtype=np.float64)
    truth = np.array(expected, dtype=np.float64)
    if truth.ndim == 0:
        truth = np.full(found.shape, truth)
    assert_close(name, torch.from_numpy(found), torch.from_numpy(truth), tol)


def assert_labels_agree(
    name: str, actual: np.ndarray, expected: np.ndarray, tol: Tolerance
) -> None:
    """Fail when a larger share of the voxels than ``tol`` has another label."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} against {expected.shape}"
    differ = np.count_nonzero(actual != expected)
    line = f"{name}: {differ} of {actual.size} voxels differ, {differ / actual.size:.1e}"
    print(line)
    assert differ / actual.size <= tol.absolute, (
        f"{line}; allowed {tol.absolute:.1e} ({tol.reason})"
    )
