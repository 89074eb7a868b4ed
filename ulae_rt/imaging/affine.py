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

Point = NDArray[np.float64]

AffineMode = Literal["none", "com", "affine"]
AFFINE_MODES: tuple[AffineMode, ...] = ("none", "com", "affine")

# Both images are brought to 2 mm once: an affine of a brain gains nothing from finer voxels.
SPACING_MM = 2.0
SHAPE = (96, 112, 96)
# Shrink factor of the 2 mm images, sigma in mm of the smoothing before it, part of the voxels that
# is looked at, and iterations at most; coarse to fine.
LEVELS = ((4, 4.0, 1.0, 20), (2, 3.0, 0.5, 10), (1, 0.0, 0.1, 8))
# Heads lie back, turn and tilt in the scanner: starts of the search, degrees about R, A and S.
STARTS_DEG = ((-30, 0, 30), (-20, 0, 20), (-25, 0, 25))
CANDIDATES = 3
CANDIDATE_ITERATIONS = 8
# Of the correlation over the last iterations; at 1e-4 it stops up to a millimetre short.
LAST_GAIN = 1e-5
LAST_ITERATIONS = 5
DETERMINANT = (0.3, 3.0)


def register_affine(moving: Volume, fixed: Volume, mode: AffineMode = "affine") -> Affine:
    """Find the matrix that takes a fixed world point to its moving world point.

    Args:
        moving: the volume to align, as `with_background` gives it.
        fixed: the volume it is aligned to, likewise.
        mode: ``none`` trusts the headers, ``com`` moves centre of mass onto centre of mass,
            ``affine`` starts there, tries rotations on 8 mm copies, refines the best as
            similarities, then optimises all 12 parameters at 8, 4 and 2 mm.

    Returns:
        (4, 4) float64, FIXED RAS mm to MOVING RAS mm (pull-back, as a warp's direction). Every
        run gives the same bits; where ITK has another number of threads, sums are rounded
        differently, which moved no brain tried by 1e-4 mm.

    Raises:
        GeometryError: the matrix found shrinks or grows a brain beyond belief.
    """
    if mode not in AFFINE_MODES:
        raise UsageError(
            f"affine is {mode!r}, expected one of {', '.join(AFFINE_MODES)}",
            "give 'affine', or leave it out",
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
    moving: sitk.Image, fixed: sitk.Image, moving_centre: Point, fixed_centre: Point
) -> Affine:
    """Rotations on a coarse grid, the best few refined, the best of those made affine."""
    pyramid = [
        (_shrunk(moving, factor, sigma_mm), _shrunk(fixed, factor, sigma_mm))
        for factor, sigma_mm, _, _ in LEVELS
    ]
    coarse = pyramid[0]
    starts = [
        _turned(angles, moving_centre, fixed_centre) for angles in itertools.product(*STARTS_DEG)
    ]
    starts.sort(key=lambda start: _method(start).MetricEvaluate(coarse[1], coarse[0]))
    refined = [
        (_optimise(*coarse, start, CANDIDATE_ITERATIONS), start) for start in starts[:CANDIDATES]
    ]
    _, best = min(refined, key=lambda found: found[0])
    affine = sitk.AffineTransform(3)
    # Turning and scaling about the brain keeps them apart from shifting it.
    affine.SetCenter(best.GetCenter())
    affine.SetMatrix(best.GetMatrix())
    affine.SetTranslation(best.GetTranslation())
    for pair, (_, _, part, iterations) in zip(pyramid, LEVELS, strict=True):
        _optimise(*pair, affine, iterations, part)
    return _matrix(affine)


def _shrunk(image: sitk.Image, factor: int, sigma_mm: float) -> sitk.Image:
    if factor == 1:
        return image
    shrunk: sitk.Image = sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, sigma_mm), [factor] * 3)
    return shrunk


def _turned(
    angles_deg: tuple[float, ...], moving_centre: Point, fixed_centre: Point
) -> sitk.Similarity3DTransform:
    """Fixed centre onto moving centre, turned about it."""
    rotation = sitk.Euler3DTransform()
    rotation.SetRotation(*np.deg2rad(angles_deg).tolist())
    turned = sitk.Similarity3DTransform()
    turned.SetMatrix(rotation.GetMatrix())
    turned.SetCenter((LPS[:3, :3] @ fixed_centre).tolist())
    turned.SetTranslation((LPS[:3, :3] @ (moving_centre - fixed_centre)).tolist())
    return turned


def _method(
    transform: sitk.Transform, iterations: int = 1, part: float = 1.0
) -> sitk.ImageRegistrationMethod:
    """Correlation over the same voxels every time, climbed by conjugate gradients."""
    method = sitk.ImageRegistrationMethod()
    method.SetInitialTransform(transform, inPlace=True)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricAsCorrelation()
    if part < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(part, seed=1)
    # A millimetre counts as much when it comes from a turn as from a shift.
    method.SetOptimizerScalesFromPhysicalShift()
    # A rough line search: the next direction is worth more than the last digit along this one.
    method.SetOptimizerAsConjugateGradientLineSearch(
        learningRate=1.0,
        numberOfIterations=iterations,
        convergenceMinimumValue=LAST_GAIN,
        convergenceWindowSize=LAST_ITERATIONS,
        lineSearchEpsilon=0.1,
        lineSearchMaximumIterations=8,
    )
    return method


def _optimise(
    moving: sitk.Image,
    fixed: sitk.Image,
    transform: sitk.Transform,
    iterations: int,
    part: float = 1.0,
) -> float:
    """Optimise ``transform`` in place; returns the metric, lower is better."""
    method = _method(transform, iterations, part)
    method.Execute(fixed, moving)
    return float(method.GetMetricValue())


def _matrix(transform: sitk.AffineTransform) -> Affine:
    """(4, 4) in RAS mm of an ITK transform, its centre folded in."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    centre, translation = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    matrix[:3, 3] = translation + centre - matrix[:3, :3] @ centre
    return np.asarray(LPS @ matrix @ LPS)
