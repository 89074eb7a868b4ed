"""How alike two images are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Pearson correlation of two arrays of one shape, -1 to 1; 0 where one of them is constant."""
    a, b = x.astype(np.float32), y.astype(np.float32)
    a -= np.float32(a.mean(dtype=np.float64))
    b -= np.float32(b.mean(dtype=np.float64))
    # Not BLAS: its threads spin for longer than this takes when the cores are busy.
    products = [float((p * q).sum(dtype=np.float64)) for p, q in ((a, b), (a, a), (b, b))]
    norm = (products[1] * products[2]) ** 0.5
    return products[0] / norm if norm > 0 else 0.0
