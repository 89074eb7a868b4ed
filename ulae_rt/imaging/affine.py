"""Affine alignment with SimpleITK: one matrix, the same one every time."""

import itertools
from typing import Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging.grid import (
    LPS,
    Affine,
    Grid,
    network_input,
    to_sitk,
    working_grid,
)
from ulae_rt.imaging.nifti import Volume

AffineMode = Literal["none", "com", "affine"]
AFFINE_MODES: tuple[AffineMode, ...] = ("none", "com", "affine")

# Both images are brought to 2 mm once: an affine of a brain gains nothing from finer voxels.
SPACING_MM = 2.0
SHAPE = (96, 112, 96)
# Shrink factor of the 2 mm images, sigma in mm, part of the voxels used.
LEVELS = ((4, 4.0, 1.0), (2, 2.0, 1.0), (1, 1.0, 0.25))
AS_GIVEN = ((1, 0.0, 1.0),)
# Heads lie back, turn and tilt in the scanner: starts of the search, degrees about R, A and S.
STARTS_DEG = ((-30, 0, 30), (-20, 0, 20), (-25, 0, 25))
CANDIDATES = 3
DETERMINANT = (0.3, 3.0)


def register_affine(moving: Volume, fixed: Volume, mode: AffineMode = "affine") -> Affine:
    """Find the matrix that takes a fixed world point to its moving world point.

    Args:
        moving: the volume to align, as `with_background` gives it.
        fixed: the volume it is aligned to, likewise.
        mode: ``none`` trusts the headers, ``com`` moves centre of mass onto centre of mass,
            ``affine`` starts there, tries rotations on 8 mm copies, then optimises 12
            parameters for correlation at 8, 4 and 2 mm.

    Returns:
        (4, 4) float64, FIXED RAS mm to MOVING RAS mm (pull-back, as a warp's direction).

    Raises:
        GeometryError: the matrix found shrinks or grows a brain beyond belief.
    """
    if mode not in AFFINE_MODES:
        raise UsageError(
            f"affine is {mode!r}, expected one of {', '.join(AFFINE_MODES)}", "see register -h"
        )
    if mode == "none":
        return np.eye(4)
    fixed_small, fixed_centre = _small(fixed)
    moving_small, moving_centre = _small(moving)
    if mode == "com":
        matrix = np.eye(4)
        matrix[:3, 3] = moving_centre - fixed_centre
        return matrix
    found = _search(moving_small, fixed_small, moving_centre, fixed_centre)
    determinant = float(np.linalg.det(found[:3, :3]))
    if not DETERMINANT[0] <= determinant <= DETERMINANT[1]:
        raise GeometryError(
            f"affine alignment of {moving.name} failed: it scales volume by {determinant:.2f}, "
            f"expected {DETERMINANT[0]} to {DETERMINANT[1]}",
            "use --affine com, and check that both images show one whole skull-stripped brain",
        )
    return found


def _small(volume: Volume) -> tuple[sitk.Image, NDArray[np.float64]]:
    """A 2 mm copy in [0, 1] around the brain, and its centre of mass in RAS mm."""
    grid, _ = working_grid(volume, SHAPE, SPACING_MM)
    data = network_input(volume, grid)
    return to_sitk(data, grid.affine), _centre_of_mass(data, grid)


def _centre_of_mass(data: NDArray[np.float32], grid: Grid) -> NDArray[np.float64]:
    total = float(data.sum(dtype=np.float64))
    index = [
        float((data.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64) @ np.arange(n)) / total)
        for axis, n in enumerate(data.shape)
    ]
    return np.asarray((grid.affine @ [*index, 1.0])[:3])


def _search(
    moving: sitk.Image,
    fixed: sitk.Image,
    moving_centre: NDArray[np.float64],
    fixed_centre: NDArray[np.float64],
) -> Affine:
    """Rotations on a coarse grid, the best few refined, the best of those made affine."""
    start = sitk.Similarity3DTransform()
    start.SetCenter((LPS[:3, :3] @ fixed_centre).tolist())
    start.SetTranslation((LPS[:3, :3] @ (moving_centre - fixed_centre)).tolist())
    # Smoothed and shrunk to 8 mm once, so that trying a start costs a millisecond.
    factor, sigma_mm, _ = LEVELS[0]
    small_fixed = _shrunk(fixed, factor, sigma_mm)
    small_moving = _shrunk(moving, factor, sigma_mm)
    scored = []
    for angles in itertools.product(*STARTS_DEG):
        candidate = _rotated(start, angles)
        method = _method(AS_GIVEN)
        method.SetInitialTransform(candidate, inPlace=True)
        scored.append((method.MetricEvaluate(small_fixed, small_moving), angles))
    refined = []
    for _, angles in sorted(scored)[:CANDIDATES]:
        candidate = _rotated(start, angles)
        refined.append((_optimise(small_moving, small_fixed, candidate, AS_GIVEN), candidate))
    best = min(refined, key=lambda pair: pair[0])[1]
    affine = sitk.AffineTransform(3)
    affine.SetCenter(best.GetCenter())
    affine.SetMatrix(best.GetMatrix())
    affine.SetTranslation(best.GetTranslation())
    _optimise(moving, fixed, affine, LEVELS)
    return _matrix(affine)


def _rotated(
    start: sitk.Similarity3DTransform, angles_deg: tuple[float, ...]
) -> sitk.Similarity3DTransform:
    """``start`` with a rotation about the three world axes, one after the other."""
    rotation = sitk.Euler3DTransform()
    rotation.SetRotation(*np.deg2rad(angles_deg).tolist())
    versor = sitk.VersorTransform()
    versor.SetMatrix(rotation.GetMatrix())
    rotated = sitk.Similarity3DTransform(start)
    rotated.SetRotation(versor.GetVersor())
    return rotated


def _shrunk(image: sitk.Image, factor: int, sigma_mm: float) -> sitk.Image:
    shrunk: sitk.Image = sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, sigma_mm), [factor] * 3)
    return shrunk


def _method(levels: tuple[tuple[int, float, float], ...]) -> sitk.ImageRegistrationMethod:
    """Correlation over the same voxels every time, one step length whatever the image."""
    method = sitk.ImageRegistrationMethod()
    # The order in which threads add up their parts would show in the last digits.
    method.SetNumberOfThreads(1)
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel([part for _, _, part in levels], 1)
    method.SetShrinkFactorsPerLevel([factor for factor, _, _ in levels])
    method.SetSmoothingSigmasPerLevel([sigma for _, sigma, _ in levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=0.01, numberOfIterations=100, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    return method


def _optimise(
    moving: sitk.Image,
    fixed: sitk.Image,
    transform: sitk.Transform,
    levels: tuple[tuple[int, float, float], ...],
) -> float:
    """Optimise ``transform`` in place; returns the metric, lower is better."""
    method = _method(levels)
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:  # ITK: all samples map outside the moving image
        raise GeometryError(
            f"affine alignment failed: {str(error).strip().splitlines()[-1]}",
            "use --affine com, and check that both images show one whole skull-stripped brain",
        ) from None
    return float(method.GetMetricValue())


def _matrix(transform: sitk.AffineTransform) -> Affine:
    """(4, 4) in RAS mm of an ITK transform, its centre folded in."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    centre, translation = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    matrix[:3, 3] = translation + centre - matrix[:3, :3] @ centre
    return np.asarray(LPS @ matrix @ LPS)
