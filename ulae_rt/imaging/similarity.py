"""How alike two images are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Values are clipped this many widths (5th to 95th percentile) outside those two percentiles: no
# brain reaches so far, and what does would decide alone.
REACH = 1.0
# Every so many-th value is looked at for the percentiles.
STEP = 31


def correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Pearson correlation of two arrays of one shape, -1 to 1; 0 where one of them is constant.

    In float64, of values clipped to `REACH` widths around their 5th to 95th percentile.
    """
    a, b = _centred(x), _centred(y)
    # Not BLAS: its threads spin for longer than this takes when the cores are busy.
    products = [float((p * q).sum()) for p, q in ((a, b), (a, a), (b, b))]
    norm = (products[1] * products[2]) ** 0.5
    return products[0] / norm if norm > 0 else 0.0


def _centred(x: NDArray[Any]) -> NDArray[np.float64]:
    """Clipped, less the mean, in units of the width."""
    if x.size == 0:
        return np.zeros(0)
    values = x.astype(np.float64)
    some = values.ravel()[:: STEP if x.size > 100 * STEP else 1]
    low, high = np.quantile(some, (0.05, 0.95))
    if high > low:
        width = high - low
        np.clip(values, low - REACH * width, high + REACH * width, out=values)
        values /= width
    return np.asarray(values - values.mean())
