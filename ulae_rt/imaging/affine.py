"""Affine alignment with SimpleITK: one matrix, the same one every time."""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging.grid import (
    LPS,
    Affine,
    Grid,
    from_sitk,
    network_input,
    to_sitk,
    working_grid,
)
from ulae_rt.imaging.nifti import Volume
from ulae_rt.imaging.similarity import correlation

Point = NDArray[np.float64]

AffineMode = Literal["none", "com", "affine"]
AFFINE_MODES: tuple[AffineMode, ...] = ("none", "com", "affine")

# Both images are brought to 2 mm once: an affine of a brain gains nothing from finer voxels.
SPACING_MM = 2.0
SHAPE = (96, 112, 96)
# Shrink factor of the 2 mm images, and sigma of the smoothing before it in mm; coarse to fine.
LEVELS = ((4, 4.0), (2, 3.0), (1, 0.0))
# Heads lie back, turn and tilt in the scanner: starts of the search, degrees about R, A and S.
STARTS_DEG = ((-30, 0, 30), (-20, 0, 20), (-25, 0, 25))
CANDIDATES = 3
MAX_STEPS = 20
# A step that moves the head's surface by less, or gains less correlation, is the last one.
LAST_STEP_MM = 0.02
LAST_GAIN = 1e-6
MAX_DAMPING = 100.0
# Linear parts of a step are measured by what they move this far from the centre.
HEAD_RADIUS_MM = 60.0
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
    signs = LPS.diagonal()[:3]
    pair = _Pair(moving_small, fixed_small)
    found = LPS @ _search(pair, signs * moving_centre, signs * fixed_centre) @ LPS
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


@dataclass(frozen=True)
class _Pair:
    """Both images at one resolution. Worlds are LPS mm, ITK's, in all that follows."""

    moving: sitk.Image
    fixed: sitk.Image

    def shrunk(self, factor: int, sigma_mm: float) -> "_Pair":
        """Smoothed and of every factor-th voxel."""
        if factor == 1:
            return self
        return _Pair(*(_shrunk(image, factor, sigma_mm) for image in (self.moving, self.fixed)))

    def moved(self, matrix: Affine) -> NDArray[np.float32]:
        """The moving image at matrix x for every voxel x of the fixed one, (X, Y, Z)."""
        transform = sitk.AffineTransform(3)
        transform.SetMatrix(matrix[:3, :3].ravel().tolist())
        transform.SetTranslation(matrix[:3, 3].tolist())
        return np.asarray(
            from_sitk(sitk.Resample(self.moving, self.fixed, transform, sitk.sitkLinear))
        )


def _shrunk(image: sitk.Image, factor: int, sigma_mm: float) -> sitk.Image:
    shrunk: sitk.Image = sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, sigma_mm), [factor] * 3)
    return shrunk


def _search(pair: _Pair, moving_centre: Point, fixed_centre: Point) -> Affine:
    """Rotations on a coarse grid, the best few refined, the best of those made affine."""
    pyramid = [pair.shrunk(factor, sigma_mm) for factor, sigma_mm in LEVELS]
    coarse = pyramid[0]
    target = from_sitk(coarse.fixed)
    starts = [
        _turned(angles, moving_centre, fixed_centre) for angles in itertools.product(*STARTS_DEG)
    ]
    starts.sort(key=lambda start: correlation(coarse.moved(start), target), reverse=True)
    refined = [
        _optimise(coarse, start, fixed_centre, SIMILARITY_STEPS) for start in starts[:CANDIDATES]
    ]
    matrix, _ = max(refined, key=lambda found: found[1])
    for level in pyramid:
        matrix, _ = _optimise(level, matrix, fixed_centre, AFFINE_STEPS)
    return matrix


def _turned(angles_deg: tuple[float, ...], moving_centre: Point, fixed_centre: Point) -> Affine:
    """Fixed centre onto moving centre, turned about it."""
    rotation = sitk.Euler3DTransform()
    rotation.SetRotation(*np.deg2rad(angles_deg).tolist())
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(rotation.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = moving_centre - matrix[:3, :3] @ fixed_centre
    return matrix


def _similarity_steps() -> NDArray[np.float64]:
    """Rows: three rotations, scaling and three shifts, each a flattened (3, 4) step."""
    rows = np.zeros((7, 3, 4))
    rows[0, 1, 2], rows[0, 2, 1] = -1, 1
    rows[1, 2, 0], rows[1, 0, 2] = -1, 1
    rows[2, 0, 1], rows[2, 1, 0] = -1, 1
    rows[3, :, :3] = np.eye(3)
    rows[4:, :, 3] = np.eye(3)
    return rows.reshape(7, 12)


SIMILARITY_STEPS = _similarity_steps()
AFFINE_STEPS = np.eye(12)


def _optimise(
    pair: _Pair, matrix: Affine, centre: Point, steps: NDArray[np.float64]
) -> tuple[Affine, float]:
    """Gauss-Newton with damping on sum (gain M(matrix x) + offset - F(x))^2.

    With gain and offset free, its minimum over the matrix is the maximum of the correlation.

    Args:
        pair: the images.
        matrix: (4, 4), where to start.
        centre: (3,), about which steps turn and scale.
        steps: (K, 12), the directions a step may take, each a flattened (3, 4) matrix of mm at
            `HEAD_RADIUS_MM` from the centre.

    Returns:
        The matrix, and the correlation it reaches.
    """
    fixed = from_sitk(pair.fixed)
    moved = pair.moved(matrix)
    reached = correlation(moved, fixed)
    damping = 0.0
    for _ in range(MAX_STEPS):
        hessian, gradient = _normal_equations(moved, fixed, pair.fixed, centre, steps)
        while True:
            step = _solved(hessian, gradient, damping, steps)
            about = np.eye(4)
            about[:3, 3] = centre
            move = np.eye(4)
            move[:3, :3] += step[:, :3] / HEAD_RADIUS_MM
            move[:3, 3] = step[:, 3]
            candidate = matrix @ about @ move @ np.linalg.inv(about)
            moved = pair.moved(candidate)
            gain = correlation(moved, fixed) - reached
            if gain >= 0:
                break
            damping = max(4 * damping, 0.01)
            if damping > MAX_DAMPING:
                return matrix, reached
        matrix, reached, damping = candidate, reached + gain, damping / 4
        if gain < LAST_GAIN or np.abs(step).sum(axis=1).max() < LAST_STEP_MM:
            break
    return matrix, reached


def _normal_equations(
    moved: NDArray[np.float32],
    fixed: NDArray[np.float32],
    grid: sitk.Image,
    centre: Point,
    steps: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """J J^T (K + 2, K + 2) and J F (K + 2,); the last two unknowns are gain and offset."""
    slopes = [np.gradient(moved, axis=axis) for axis in range(3)]
    # What is dark and flat in both images tells nothing, and that is most of the voxels.
    used = (fixed > 0) | (moved > 0)
    index = np.flatnonzero(used)
    to_world = np.array(grid.GetDirection()).reshape(3, 3) * np.array(grid.GetSpacing())
    points = to_world @ np.stack(np.unravel_index(index, fixed.shape))
    points += (np.array(grid.GetOrigin()) - centre)[:, None]
    where = (points / HEAD_RADIUS_MM).astype(np.float32)
    flat = np.stack([slope[used] for slope in slopes])
    slope_mm = np.linalg.inv(to_world).T.astype(np.float32) @ flat
    columns = np.empty((14, index.size), np.float32)
    for row in range(3):
        columns[4 * row : 4 * row + 3] = slope_mm[row] * where
        columns[4 * row + 3] = slope_mm[row]
    columns[12] = moved[used]
    columns[13] = 1
    basis = np.zeros((len(steps) + 2, 14))
    basis[:-2, :12] = steps
    basis[-2, 12] = basis[-1, 13] = 1
    square = (columns @ columns.T).astype(np.float64)
    square[13, 13] = fixed.size  # the dark voxels do count for the offset
    right = (columns @ fixed[used]).astype(np.float64)
    return basis @ square @ basis.T, basis @ right


def _solved(
    hessian: NDArray[np.float64],
    gradient: NDArray[np.float64],
    damping: float,
    steps: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The step as (3, 4)."""
    count = len(steps)
    damped = hessian.copy()
    motion = np.arange(count)
    # The constant keeps a flat image solvable: its step is then zero.
    damped[motion, motion] += damping * hessian[motion, motion] + 1e-6
    solution = np.linalg.lstsq(damped, gradient, rcond=None)[0]
    # An image of opposite contrast has a negative gain; steps must not run away near zero.
    gain = max(float(solution[count]), 0.1)
    return np.asarray((solution[:count] @ steps).reshape(3, 4) / gain)
