"""Affine alignment on the device: one matrix, the same one every time."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.conventions import AFFINE_MODES, AffineMode
from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging.grid import Affine
from ulae_rt.imaging.image import Image
from ulae_rt.imaging.preprocess import intensity_scale, shrunk
from ulae_rt.kernels.affine_normal_equations.op import affine_normal_equations

Matrices = NDArray[np.float64]  # (B, 4, 4)
Sums = NDArray[np.float64]  # (B, R, R)


class Resolution(NamedTuple):
    """One level of the pyramid.

    Attributes:
        spacing_mm: about that of its voxels.
        every: one of how many of the fixed image's points counts.
        margin: voxels around the fixed brain whose points count too, so that a moving brain that
            reaches further is seen to.
    """

    spacing_mm: float
    every: int
    margin: int


# Coarse to fine. An affine of a brain gains nothing from finer voxels.
RESOLUTIONS = (Resolution(8.0, 2, 2), Resolution(4.0, 2, 4), Resolution(2.0, 4, 8))
# Heads lie back, turn and tilt in the scanner: starts of the search, degrees about R, A and S.
STARTS_DEG = ((-30, -15, 0, 15, 30), (-20, -10, 0, 10, 20), (-24, -12, 0, 12, 24))
# Where none of those fits, a head may lie in any way: rotations all over, some 20 degrees apart.
ANY_STARTS = 1000
# Of 40 heads turned at random, and T2 to T1, what was found among the usual starts reached 0.964 at
# 8 mm where it was wrong and began at 0.972 where it was right.
GOOD = 0.97
# And what a head turned further has to have more, to be believed.
BETTER = 0.005
# Brightness of the one contrast as a polynomial of the other's.
DEGREE = 4
# One contrast's brightness is a line in the other's where this little is left for the polynomial
# to explain, and this much explained. T1 pairs have a ratio of 0.74 to 0.99 and correlate by 0.944
# or more in the brain at 8 mm, T2 to T1 0.28 to 0.67 and at most 0.90, FLAIR to T1 by 0.93.
LINEAR_RATIO, LINEAR_CORRELATION = 0.7, 0.94
CANDIDATES = 12
CANDIDATE_ITERATIONS = 6
ITERATIONS = 20
# How often the polynomial is found anew on a level.
MAPPINGS = 3
# Of the correlation, by an iteration that is worth another.
LAST_GAIN = 1e-6
# Of the brightness: what is darker is background.
BACKGROUND = 0.02
# A face of an image cuts the brain if it holds this part of what the brain's largest section does.
CUT = 0.1
# How far beyond the centre of mass of a cut brain that of the whole one is looked for.
MISSING_MM = (0.0, 20.0, 40.0)
# Of the fixed points, fewer that meet the moving image count against a matrix.
OVERLAP = 0.5
DETERMINANT = (0.3, 3.0)
# Damping of Levenberg's and Marquardt's steps: where it begins, and where it gives up.
DAMPING, MOST_DAMPING, LEAST_DAMPING = 1e-3, 1e4, 1e-7


def register_affine(
    moving: Image,
    fixed: Image,
    mode: AffineMode = "affine",
    *,
    resolutions: Sequence[Resolution] = RESOLUTIONS,
) -> Affine:
    """Find the matrix that takes a fixed world point to its moving world point.

    Args:
        moving: the image to align, as `with_background` gives it.
        fixed: the image it is aligned to, likewise, on the same device.
        mode: ``none`` trusts the headers, ``com`` moves centre of mass onto centre of mass,
            ``affine`` starts there, tries rotations at 8 mm, refines the best, then optimises all
            12 parameters at 8, 4 and 2 mm. It maximises Pearson's correlation, or, where the two
            are of other contrasts, that of the fixed image with the polynomial of the moving one
            that explains it best.
        resolutions: of `RESOLUTIONS` those that are gone through, from the first on.

    Returns:
        (4, 4) float64, FIXED RAS mm to MOVING RAS mm (pull-back, as a warp's direction). Every
        run gives the same bits.

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
    if mode == "com":
        matrix = np.eye(4)
        matrix[:3, 3] = _centre_of_mass(moving) - _centre_of_mass(fixed)
        return matrix
    with _one_thread():
        matrix = _search(_Pair(moving, fixed, resolutions))
    determinant = float(np.linalg.det(matrix[:3, :3]))
    if not DETERMINANT[0] <= determinant <= DETERMINANT[1]:
        raise GeometryError(
            f"affine alignment of {moving.name} failed: it scales volume by {determinant:.2f}, "
            f"expected {DETERMINANT[0]} to {DETERMINANT[1]}",
            "use --affine com, and check that both images show one whole skull-stripped brain, and "
            "that their voxel sizes are in mm",
        )
    return matrix


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU each step is too small for two threads: waiting for each other takes longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _centre_of_mass(image: Image) -> NDArray[np.float64]:
    """RAS mm."""
    voxels = image.voxels[0, 0].clamp(max=intensity_scale(image))
    sums = [voxels.sum(dim=dims, dtype=torch.float64) for dims in ((1, 2), (0, 2), (0, 1))]
    centre = [
        float(s @ torch.arange(len(s), dtype=s.dtype, device=s.device) / s.sum()) for s in sums
    ]
    return np.asarray((image.affine @ [*centre, 1.0])[:3])


def _pyramid(image: Image) -> list[Image]:
    """In [0, 1], at about the spacings of `RESOLUTIONS`, coarse to fine, on its own axes."""
    finest = RESOLUTIONS[-1].spacing_mm
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    d, h, w = (
        max(1, min(size, round(finest / mm)))
        for size, mm in zip(image.grid.shape, spacing, strict=True)
    )
    level = shrunk(image, (d, h, w))
    level = replace(level, voxels=(level.voxels / intensity_scale(image)).clamp_(0, 1))
    levels = [level]
    for resolution in RESOLUTIONS[-2::-1]:
        levels.append(_halved(levels[-1], resolution.spacing_mm))
    return levels[::-1]


def _halved(image: Image, spacing_mm: float) -> Image:
    """Smoothed by 1 3 3 1 and every second voxel kept, along axes much finer than a spacing."""
    voxels, affine = image.voxels, image.affine
    for axis, mm in enumerate(np.linalg.norm(affine[:3, :3], axis=0)):
        dim, size = axis + 2, voxels.shape[axis + 2]
        if mm > 0.75 * spacing_mm or size < 2:
            continue
        first, last = voxels.narrow(dim, 0, 1), voxels.narrow(dim, size - 1, 1)
        # One voxel more at each end, and one more where the size is odd.
        rows = torch.cat((first, voxels, *[last] * (1 + size % 2)), dim)
        number = (size + 1) // 2
        far, near, next_near, next_far = (
            _every_second(rows, dim, start, number) for start in range(4)
        )
        voxels = (far + next_far).mul_(0.125).add_(near + next_near, alpha=0.375)
        step = np.eye(4)
        step[axis, axis], step[axis, 3] = 2, 0.5
        affine = affine @ step
    return replace(image, voxels=voxels.contiguous(), affine=affine)


def _every_second(rows: Tensor, dim: int, start: int, number: int) -> Tensor:
    slices = [slice(None)] * rows.ndim
    slices[dim] = slice(start, start + 2 * number - 1, 2)
    return rows[tuple(slices)]


def _cut_faces(image: Image) -> tuple[bool, ...]:
    """Which faces of an image cut the brain: d first and last, h first and last, w likewise."""
    brain = image.voxels[0, 0] > BACKGROUND
    faces: list[bool] = []
    for dims in ((1, 2), (0, 2), (0, 1)):
        area = brain.sum(dim=dims).tolist()
        faces += [area[0] > CUT * max(area), area[-1] > CUT * max(area)]
    return tuple(faces)


@dataclass(frozen=True)
class _Level:
    """A pair at one resolution.

    Attributes:
        moving: its image.
        affine: the fixed image's, index to RAS mm.
        points: (3, N), voxels of the fixed image that count.
        values: (N,), the fixed image there.
        inner: (N,), which of them lie in the brain.
        cut: the moving image's faces that cut the brain.
    """

    moving: Image
    affine: Affine
    points: Tensor
    values: Tensor
    inner: Tensor
    cut: tuple[bool, ...]

    def sums(
        self,
        matrices: Matrices,
        moving: Tensor | None = None,
        *,
        degree: int = 1,
        derivatives: bool = False,
    ) -> Sums:
        """`affine_normal_equations` at world matrices, by the voxels' ones."""
        voxels = self.moving.voxels if moving is None else moving
        to_index = np.linalg.inv(self.moving.affine) @ matrices @ self.affine
        matrix = torch.from_numpy(to_index[:, :3]).to(voxels.device)
        return np.asarray(
            affine_normal_equations(
                voxels,
                self.points,
                self.values,
                matrix,
                degree=degree,
                derivatives=derivatives,
                cut=self.cut,
            ).cpu().numpy()
        )  # fmt: skip

    def inside(self) -> "_Level":
        """With the points of the brain alone."""
        return replace(
            self,
            points=self.points[:, self.inner].contiguous(),
            values=self.values[self.inner],
            inner=self.inner[self.inner],
        )


class _Pair:
    """Two images at some resolutions, coarse to fine."""

    def __init__(self, moving: Image, fixed: Image, resolutions: Sequence[Resolution]) -> None:
        movings, fixeds = _pyramid(moving), _pyramid(fixed)
        cut = _cut_faces(movings[-1])
        self.levels = [
            _level(m, f, resolution, cut)
            # The first of them, down to the finest that is asked for.
            for resolution, m, f in zip(resolutions, movings, fixeds, strict=False)
        ]
        # Where the whole brain's centre may lie.
        self.centres = list(
            itertools.product(
                _centres(movings[-1], cut), _centres(fixeds[-1], _cut_faces(fixeds[-1]))
            )
        )


def _centres(image: Image, cut: tuple[bool, ...]) -> list[NDArray[np.float64]]:
    """The centre of mass, and where a face cuts the brain, points further on that side; RAS mm."""
    outward = np.array(cut[1::2], float) - np.array(cut[::2], float)
    direction = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0) @ outward
    steps = MISSING_MM if direction.any() else (0.0,)
    return [_centre_of_mass(image) + step * direction for step in steps]


def _level(moving: Image, fixed: Image, resolution: Resolution, cut: tuple[bool, ...]) -> _Level:
    brain = fixed.voxels > BACKGROUND
    near = brain.float()
    width = 2 * resolution.margin + 1
    for kernel in ((width, 1, 1), (1, width, 1), (1, 1, width)):
        near = F.max_pool3d(near, kernel, 1, tuple(n // 2 for n in kernel))
    at = near[0, 0].nonzero()[:: resolution.every]
    d, h, w = at.unbind(1)
    return _Level(
        moving,
        fixed.affine,
        at.t().float().contiguous(),
        fixed.voxels[0, 0, d, h, w],
        brain[0, 0, d, h, w],
        cut,
    )


def _search(pair: _Pair) -> Affine:
    """Rotations at the coarsest level, the best few refined, the best of those at every level."""
    coarse = pair.levels[0]
    usual = [_turn(*angles) for angles in itertools.product(*STARTS_DEG)]
    matrix, correlation = _best_of(pair, coarse, usual)
    if correlation < GOOD:
        turned, correlation_turned = _best_of(pair, coarse, _any_turns(ANY_STARTS))
        if correlation_turned > correlation + BETTER:
            matrix = turned
    degree = _degree(coarse, matrix)
    matrices = matrix[None]
    for level in pair.levels:
        matrices, _ = _climb(level, matrices, ITERATIONS, degree)
    return np.asarray(matrices[0])


def _turn(r: float, a: float, s: float) -> Affine:
    """(3, 3), about the axes R, A and S, degrees."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad([r, a, s])):
        step, (i, j) = np.eye(3), ((1, 2), (2, 0), (0, 1))[axis]
        step[[i, j], [i, j]] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def _any_turns(count: int) -> list[Affine]:
    """(3, 3) each, all over, always the same."""
    q = np.random.default_rng(0).normal(size=(count, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return list(np.moveaxis(np.array(rows), 2, 0))


def _best_of(pair: _Pair, level: _Level, turns: Sequence[Affine]) -> tuple[Affine, float]:
    """The best of some rotations about the centres, those that begin best improved."""
    starts = np.tile(np.eye(4), (len(turns) * len(pair.centres), 1, 1))
    for start, (turn, (moving, fixed)) in zip(
        starts, itertools.product(turns, pair.centres), strict=True
    ):
        start[:3, :3] = turn
        start[:3, 3] = moving - turn @ fixed
    quality, _ = _explained(level.sums(starts, degree=DEGREE))
    best = np.argsort(-quality, kind="stable")[:CANDIDATES]
    matrices, quality = _climb(level, starts[best], CANDIDATE_ITERATIONS, DEGREE)
    number = int(np.argmax(quality))
    return matrices[number], float(quality[number])


def _explained(sums: Sums) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much of the fixed image the best polynomial explains, and its coefficients.

    Args:
        sums: (B, R, R) of the rows 1, m .. m^degree, f.

    Returns:
        (B,) the correlation of the polynomial and the fixed image, 0 to 1, and
        (B, degree + 1) the polynomial, the constant first.
    """
    powers, right, whole = sums[:, :-1, :-1], sums[:, :-1, -1:], sums[:, -1, -1]
    count = powers[:, 0, 0]
    # Powers of values in [0, 1] are nearly the same line: a little keeps the system solvable.
    ridge = 1e-9 * np.trace(powers, axis1=1, axis2=2)[:, None, None] + 1e-30
    coefficients = np.linalg.solve(powers + ridge * np.eye(powers.shape[1]), right)[..., 0]
    mean = right[:, 0, 0] / np.maximum(count, 1)
    total = whole - count * mean**2
    rest = whole - (coefficients * right[..., 0]).sum(1)
    explained = 1 - rest / np.where(total > 0, total, 1)
    return np.sqrt(np.clip(np.where(total > 0, explained, 0), 0, 1)), coefficients


def _degree(level: _Level, matrix: Affine) -> int:
    """1 where one contrast's brightness is a line in the other's, else `DEGREE`."""
    sums = level.inside().sums(matrix[None], degree=DEGREE)
    (line,), _ = _explained(sums[:, [0, 1, -1]][:, :, [0, 1, -1]])
    (curve,), _ = _explained(sums)
    is_linear = line >= LINEAR_CORRELATION and 1 - curve**2 > LINEAR_RATIO * (1 - line**2)
    return 1 if is_linear else DEGREE


class _Fit(NamedTuple):
    """What is found at B matrices.

    Attributes:
        matrices: (B, 4, 4), fixed RAS mm to moving RAS mm.
        quality: (B,), what is maximised: the correlation, less where hardly anything overlaps.
        gradient: (B, 12), of half the squares that are left once the moving image is scaled and
            shifted to fit best, by the voxels' matrix, downhill.
        curvature: (B, 12, 12), of the same, by Gauss and Newton.
    """

    matrices: Matrices
    quality: NDArray[np.float64]
    gradient: NDArray[np.float64]
    curvature: NDArray[np.float64]


def _climb(
    level: _Level, matrices: Matrices, iterations: int, degree: int
) -> tuple[Matrices, NDArray[np.float64]]:
    """B matrices, each improved on one level, and the correlation that each reached."""
    if degree == 1:
        best = _steps(level, level.moving.voxels, matrices, iterations)
        return best.matrices, best.quality
    for _ in range(MAPPINGS):
        _, coefficients = _explained(level.sums(matrices, degree=degree))
        mapped = _mapped(level.moving.voxels, coefficients)
        matrices = _steps(level, mapped, matrices, max(2, iterations // MAPPINGS)).matrices
    quality, _ = _explained(level.sums(matrices, degree=degree))
    return matrices, quality


def _mapped(voxels: Tensor, coefficients: NDArray[np.float64]) -> Tensor:
    """(B, 1, D, H, W): the polynomials of an image, without their constants: 0 stays 0."""
    c = torch.from_numpy(coefficients).to(voxels)[:, :, None, None, None, None]
    out = c[:, -1] * voxels
    for power in range(coefficients.shape[1] - 2, 0, -1):
        out = (out + c[:, power]) * voxels
    return out


def _fit(level: _Level, moving: Tensor, matrices: Matrices) -> _Fit:
    sums = level.sums(matrices, moving, derivatives=True)
    count = sums[:, 12, 12]
    # Everything less its mean.
    centred = sums - sums[:, :, 12, None] * sums[:, None, 12] / np.maximum(count, 1)[:, None, None]
    spread, shared, whole = centred[:, 13, 13], centred[:, 13, 14], centred[:, 14, 14]
    usable = (spread > 0) & (whole > 0)
    spread, whole = np.where(usable, spread, 1), np.where(usable, whole, 1)
    scale = np.where(usable, shared / spread, 0)[:, None]
    gradient = scale * (centred[:, :12, 14] - scale * centred[:, :12, 13])
    # The best scale follows the matrix, so what it takes up is no part of the curvature.
    by_scale = centred[:, :12, 13]
    curvature = (
        centred[:, :12, :12] - by_scale[:, :, None] * by_scale[:, None] / spread[:, None, None]
    )
    correlation = np.where(usable, shared / np.sqrt(spread * whole), 0)
    overlap = count / len(level.values)
    quality = np.abs(correlation) * np.minimum(1, overlap / OVERLAP)
    return _Fit(matrices, quality, gradient, scale[:, :, None] ** 2 * curvature)


def _steps(level: _Level, moving: Tensor, matrices: Matrices, iterations: int) -> _Fit:
    """Levenberg's and Marquardt's steps from B matrices, each as long as it gains."""
    to_moving, from_fixed = level.moving.affine, np.linalg.inv(level.affine)
    best = _fit(level, moving, matrices)
    damping = np.full(len(matrices), DAMPING)
    todo = np.arange(len(matrices))
    for _ in range(3 * iterations):
        diagonal = np.diagonal(best.curvature[todo], axis1=1, axis2=2)
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30
        damped = (
            best.curvature[todo] + np.eye(12) * (damping[todo, None] * diagonal + floor)[:, None]
        )
        change = np.linalg.solve(damped, best.gradient[todo][..., None])[..., 0]
        step = np.zeros((len(todo), 4, 4))
        step[:, :3] = change.reshape(-1, 3, 4)
        part = moving if len(moving) == 1 else moving[torch.from_numpy(todo)]
        tried = _fit(level, part, best.matrices[todo] + to_moving @ step @ from_fixed)
        gain = tried.quality - best.quality[todo]
        better = gain > 0
        for array, new in zip(best, tried, strict=True):
            array[todo[better]] = new[better]
        damping[todo] *= np.where(better, 0.1, 10)
        np.maximum(damping, LEAST_DAMPING, out=damping)
        goes_on = np.where(better, gain >= LAST_GAIN, damping[todo] < MOST_DAMPING)
        todo = todo[goes_on]
        if len(todo) == 0:
            break
    return best
