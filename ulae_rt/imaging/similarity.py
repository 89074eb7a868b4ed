"""How alike two images are."""

import numpy as np
import torch
from torch import Tensor

# Values are clipped this many widths (5th to 95th percentile) outside those two percentiles: no
# brain reaches so far, and what does would decide alone.
REACH = 1.0
# Every so many-th value is looked at for the percentiles.
STEP = 31


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of two tensors of one shape, -1 to 1; 0 where one of them is constant.

    In float64, of values clipped to `REACH` widths around their 5th to 95th percentile.
    """
    a, b = _centred(x), _centred(y)
    products = torch.stack([(p * q).sum() for p, q in ((a, b), (a, a), (b, b))]).tolist()
    norm = (products[1] * products[2]) ** 0.5
    return products[0] / norm if norm > 0 else 0.0


def _centred(x: Tensor) -> Tensor:
    """Clipped, less the mean, in units of the width; float64."""
    values = x.flatten().double()
    if values.numel() == 0:
        return values
    some = values[:: STEP if values.numel() > 100 * STEP else 1]
    low, high = np.quantile(some.cpu().numpy(), (0.05, 0.95))
    if high > low:
        width = high - low
        values = values.clamp(low - REACH * width, high + REACH * width).div_(width)
    return values - values.mean()
