"""The one table of tolerances, each with its reason, and the comparison that prints its evidence.

A tolerance is never loosened by environment, device or flag; widening one is a line in CHANGELOG.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """The largest absolute difference that passes, and why it is that one."""

    absolute: float
    reason: str


TOL = {
    "exact": Tolerance(0.0, "the same operations on the same numbers in the same order"),
    # The network, voxels at displacements of 15 and more (intensities in [0, 1] for images).
    "network float64": Tolerance(
        1e-10, "1.6e-13 measured: rounding only; asked for is 1e-4, which would hide a wrong layer"
    ),
    "network float32": Tolerance(
        1e-3,
        "the figure promised to users; 4e-5 to 2e-4 measured with random, hence rough, weights",
    ),
    "network bfloat16": Tolerance(
        1.0,
        "8 bits of mantissa through 30 layers: 2 to 3 % RMS, 0.2 to 0.5 voxel at worst measured",
    ),
    "network float32 exported": Tolerance(
        1e-4, "float32, where oneDNN may pick another kernel for another graph"
    ),
    # Layers in float64.
    "block float64": Tolerance(1e-12, "sums of 200 to 3,000 products of order 1 in another order"),
    "block float64 gradient": Tolerance(1e-9, "sums of squares of those, up to 1e5 in size"),
    # Ops.
    "op float64": Tolerance(1e-11, "rounding: values up to 20 from sums of up to 1,331 terms"),
    "op float32": Tolerance(
        1e-5, "values up to 4; coordinates of up to 25 voxels carry 2e-6 in float32"
    ),
    "norm float32": Tolerance(
        2e-6, "values up to 2 and means of 256 of them; an offset of 1e4 is subtracted exactly"
    ),
    "identity": Tolerance(
        2e-6, "a float32 coordinate below 23, normalised and back, is itself within 1.1e-6"
    ),
    "warp float32": Tolerance(
        1e-4, "float32 coordinates of 50 voxels carry 4e-6; times slopes of up to 10 a voxel"
    ),
    "second interpolation": Tolerance(
        0.025, "interpolating twice: curvature 0.2^2 / 8 an axis, and the kinks of the fields"
    ),
    "lncc float32": Tolerance(1e-5, "variances lose 1e-7 * S^2 / n, a thousandth of eps at most"),
    "lncc of itself": Tolerance(1e-4, "eps = 1e-5 in a denominator of at least 1"),
    "lncc offset float64": Tolerance(1e-6, "the same cancellation, from 1e-16"),
    "lncc offset 10 float32": Tolerance(1e-5, "5e-8 measured: roundings average out"),
    "lncc offset 1000 float32": Tolerance(
        0.05, "0.023 measured: S^2 / n is 7e8, float32 steps by 64, a variance is 60"
    ),
    "lncc float32, any offset": Tolerance(
        1e-6, "1e-8 measured of the kernels: a pivot takes what the values have in common"
    ),
    "lncc gradient float32, any offset": Tolerance(1e-5, "of the largest; 5e-7 measured"),
    "lncc flat float32": Tolerance(0.02, "rounding of S^2 / n against eps alone"),
    # Training.
    "losses of 4 steps": Tolerance(1e-5, "sums in another order; 4e-7 measured"),
    "losses of 20 interpreted steps": Tolerance(
        1e-5, "1.2e-7 measured: the convolutions are the same, only the kernels' sums are not"
    ),
    "losses of 20 steps": Tolerance(
        1e-3,
        "1.3e-4 measured between two CPU convolutions (48^3, 8 channels) while the loss falls by "
        "0.4: Adam takes a whole step even along a gradient that is all rounding",
    ),
    "lncc gradient float32": Tolerance(1e-3, "of the largest: two cancelling terms where flat"),
}


class Errors(NamedTuple):
    """Largest and root-mean-square difference, and a line that says where the largest is."""

    largest: float
    rms: float
    line: str


def report(name: str, actual: Tensor, expected: Tensor) -> Errors:
    """How far ``actual`` is from ``expected``; NaN counts as infinitely far."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} against {expected.shape}"
    found, truth = actual.detach().double(), expected.detach().double()
    error = (found - truth).abs()
    # NaN on both sides is no agreement: a test that wants it compares isnan() itself.
    error = error.nan_to_num(nan=torch.inf)
    worst = float(error.max())
    rms = float(error.square().mean().sqrt())
    ratio = rms / max(float(truth.square().mean().sqrt()), 1e-300)
    flat = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    return Errors(
        worst,
        rms,
        f"{name}: max abs {worst:.3e}, RMS ratio {ratio:.3e}, worst at {index}: "
        f"{float(found.flatten()[flat]):.9g} against {float(truth.flatten()[flat]):.9g}",
    )


def assert_close(name: str, actual: Tensor, expected: Tensor, tol: Tolerance) -> None:
    """Fail with the evidence when the two differ anywhere by more than ``tol``."""
    worst, _, line = report(name, actual, expected)
    print(line)
    assert worst <= tol.absolute, f"{line}; allowed {tol.absolute:.1e} ({tol.reason})"


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """Fail unless the two are equal bit for bit (types included)."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} against {expected.dtype}"
    assert_close(name, actual, expected, TOL["exact"])
