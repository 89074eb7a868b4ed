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
    "gram difference quotient": Tolerance(
        1e-7, "of sums of up to 2,000, rounded by 5e-13, over 2e-5: 1e-9 measured"
    ),
    "gram float64": Tolerance(
        1e-13, "of the lengths of two rows: thousands of products in another order; 6e-15 measured"
    ),
    "gram float32": Tolerance(
        2e-6,
        "of the lengths of two rows: the eighth power of one value has eight of its roundings, "
        "1.2e-6 measured; 1.4e-7 of many points",
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
    "network input": Tolerance(1e-6, "float32 means of the same numbers in another order"),
    # Displacements, mm (or voxels of about one).
    "displacement float32": Tolerance(
        1e-5, "float32 steps by 7.6e-6 at 64 mm and rounds to half of it: 3.8e-6 measured at 71 mm"
    ),
    "displacement of a few mm float32": Tolerance(
        1e-6, "float32 steps by 4.8e-7 at 4 mm and rounds to half of it: 8.5e-8 measured"
    ),
    "inverse between its voxels": Tolerance(
        0.05, "an inverse curves between its voxels, where it is interpolated: 0.016 measured"
    ),
    "voxel by the header": Tolerance(
        3e-5, "an oblique header's float32 axes are 2.7e-6 mm off; 2.1e-6 voxel measured"
    ),
    "centre of mass": Tolerance(
        1e-5, "a voxel whose brightness rounds up, 1 of 7e6 at 30 mm, moves it by 4e-6; 0 measured"
    ),
    "jacobian float32": Tolerance(
        1e-5, "nine differences of displacements of 26 mm, rounded to 9.5e-7: 3.2e-6 measured"
    ),
    # Images of 0 to 159 whose edges rise by up to 70 a mm: a wrong sign or axis shows as tens.
    "image by ITK": Tolerance(
        2e-3, "SimpleITK reads an oblique header's axes 4e-6 mm off; 1.8e-4 measured"
    ),
    "image by others": Tolerance(
        1e-3, "ANTs, greedy, scipy: float32 headers and warps, 1.6e-6 mm off; 1.1e-4 measured"
    ),
    "image in our own two ways": Tolerance(
        5e-4, "a displacement rounded to float32 once more, by 5e-7 mm at 10; 3.1e-5 measured"
    ),
    "image on its own voxels": Tolerance(
        1e-10,
        "a row of 4,300 is found in float64 to 4.5e-13 of itself, times up to 182 from one voxel "
        "to the next: 8e-11; 3.2e-11 measured",
    ),
    "label ties": Tolerance(
        1e-4, "share of voxels: one of the smallest image's 15,840; 1 of 147,456 measured"
    ),
    "intensity float32": Tolerance(2e-6, "means of 64 values from 0 to 1: 1.2e-7 measured"),
    "correlation float32": Tolerance(
        5e-14, "of values that are rounded by 6e-8: 1 less the square of that; 2.6e-15 measured"
    ),
    "similarity of one image": Tolerance(
        3e-8, "resampled in our own two ways, which differ by 3e-5 of 158; 1.4e-9 measured"
    ),
    # The network, as an engine.
    "network float32, one by one": Tolerance(
        1e-4, "oneDNN may pick another kernel for another batch; 7e-6 of 3 voxels measured"
    ),
    "small network bfloat16": Tolerance(
        0.5, "8 bits of mantissa: 0.021 voxel measured at displacements of 2.8"
    ),
    # What is measured of a registration.
    "measure float64": Tolerance(
        1e-14, "float64 values of up to 6 from the same numbers in another order: 4.4e-16 measured"
    ),
    "sdlogj float32": Tolerance(
        3e-7, "logarithms of float32 determinants, each off by 6e-8: 1.5e-8 measured"
    ),
    "six decimals": Tolerance(
        1e-6, "an average and its two parts, each rounded in a table by up to 5e-7; 0 measured"
    ),
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
