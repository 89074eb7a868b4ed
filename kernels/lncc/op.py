"""The public ``lncc`` and ``multi_window_lncc``."""

from collections.abc import Sequence

from torch import Tensor

from ulae_rt.errors import UsageError
from ulae_rt.kernels._check import check_same, check_volume, check_window
from ulae_rt.kernels.lncc.reference import multi_window_lncc_reference


def multi_window_lncc(
    x: Tensor, y: Tensor, windows: Sequence[int] = (11, 9, 7), eps: float = 1e-5
) -> Tensor:
    """Squared local normalised cross-correlation, one mean a window.

    With S the sum over a w^3 box (zero outside the volume) and n = w^3 always:

        X = S_xy - S_x S_y / n,  V_x = S_xx - S_x^2 / n,  V_y = S_yy - S_y^2 / n
        cc = X^2 / (V_x V_y + eps),  out[k] = mean over voxels of cc with w = windows[k]

    Args:
        x: (B, C, D, H, W), any floating type.
        y: the same shape.
        windows: odd box sizes in voxels, at least one.
        eps: added to the denominator.

    Returns:
        (K,) in float32, or float64 when either input is.

    Raises:
        ShapeError: if the shapes differ.
        DtypeError: if either is not of a floating type.
        UsageError: for an empty list, an even or non-positive window.

    Source: ULAE-net, Eq. 3; NCC in ULAE/Loss.py at ac89ce5 (window sums by dense convolution).
    """
    check_volume("lncc", "x", x)
    check_volume("lncc", "y", y)
    check_same("lncc", x, y)
    if not windows:
        raise UsageError("lncc: windows is empty, expected at least one odd size")
    for window in windows:
        check_window("lncc", window)
    return multi_window_lncc_reference(x, y, windows=windows, eps=eps)


def lncc(x: Tensor, y: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Squared local normalised cross-correlation of one window, a scalar.

    ``multi_window_lncc(x, y, (window,), eps)[0]``: formula, arguments and errors are given there.
    """
    return multi_window_lncc(x, y, (window,), eps)[0]
