"""Grids, resampling between them, and intensities: what the network sees of a scan."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.nifti import Volume

logger = logging.getLogger(__name__)

Interpolation = Literal["linear", "nearest"]
Affine = NDArray[np.float64]

WORKING_SHAPE = (160, 192, 160)
# The maximum of a scan is one bright vessel or a spike: over 20 OASIS scans the median of the
# brain lies at 0.27 to 0.57 of it, but at 0.60 to 0.65 of the 99.9th percentile.
NORMALISATION = "p99.9"
NORMALISATIONS = ("max", "p99.9")
# World RAS to world LPS and back.
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Specks outside the head must not move the centre: this part of the brain voxels is ignored at
# each end of each axis.
SPECKS = 2e-4
# Less than this outside the grid is specks too, or the cut end of the spinal cord.
CUT_OFF = 1e-3
MAX_POINTS = 16_000_000


@dataclass(frozen=True)
class Grid:
    """A regular grid: ``shape`` (D, H, W) voxels, ``affine`` (4, 4) from index to RAS mm."""

    shape: tuple[int, int, int]
    affine: Affine

    def pooled(self, factor: int) -> "Grid":
        """The grid of means over factor^3 blocks; its first centre lies inside the first block."""
        shape = self.shape[0] // factor, self.shape[1] // factor, self.shape[2] // factor
        block = np.diag([factor, factor, factor, 1.0])
        block[:3, 3] = (factor - 1) / 2
        return Grid(shape, self.affine @ block)


def grid_of(volume: Volume) -> Grid:
    """The grid a volume lies on."""
    return Grid(volume.shape, volume.affine)


def foreground_points(volume: Volume) -> NDArray[np.float64]:
    """(3, N) RAS mm: where the brain is, every voxel or, for a large volume, one in k^3."""
    step = 1
    while volume.data.size / step**3 > MAX_POINTS:
        step += 1
    mask = foreground(volume.data[::step, ::step, ::step])
    index = np.flatnonzero(mask.ravel(order="C"))
    if index.size == 0:
        raise ImageError(f"{volume.name} has no voxel above 0", "check how it was masked")
    i, j, k = np.unravel_index(index, mask.shape)
    matrix, origin = volume.affine[:3, :3] * step, volume.affine[:3, 3]
    points: NDArray[np.float64] = np.stack(
        [matrix[r, 0] * i + matrix[r, 1] * j + matrix[r, 2] * k + origin[r] for r in range(3)]
    )
    return points


def foreground(data: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a volume is not background: above 0, or off the border's value below 0."""
    if data.dtype.kind != "u" and data.min() < -0.05 * abs(float(data.max())):
        return np.asarray(data != _border_value(data))
    return np.asarray(data > 0)


def _border_value(data: NDArray[Any]) -> Any:
    """The commonest value of the eight corner voxels' neighbourhood: the background."""
    corners = data[[0, -1]][:, [0, -1]][:, :, [0, -1]]
    values, counts = np.unique(corners, return_counts=True)
    return values[np.argmax(counts)]


def working_grid(
    volume: Volume,
    shape: tuple[int, int, int] = WORKING_SHAPE,
    spacing_mm: float = 1.0,
) -> tuple[Grid, float]:
    """The axis-aligned RAS grid centred on a volume's brain.

    The grid's first point is snapped to the nearest voxel centre, so that a volume which is
    already 1 mm and axis-aligned, in whatever order and direction its axes run, is copied and
    not interpolated.

    Args:
        volume: the image whose brain (voxels above background) is centred.
        shape: (D, H, W), along R, A, S.
        spacing_mm: of the grid, isotropic.

    Returns:
        The grid, and the fraction of the brain's voxels that lies outside it (0 to 1).
    """
    points = foreground_points(volume)
    n = points.shape[1]
    ends = int(n * SPECKS), n - 1 - int(n * SPECKS)
    sorted_ends = np.partition(points, sorted(set(ends)), axis=1)
    centre = (sorted_ends[:, ends[0]] + sorted_ends[:, ends[1]]) / 2
    first = centre - (np.array(shape) - 1) / 2 * spacing_mm
    voxel = np.rint(np.linalg.inv(volume.affine) @ [*first, 1.0])
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = (volume.affine @ voxel)[:3]
    grid = Grid(shape, affine)
    return grid, fraction_outside(points, grid)


def fraction_outside(points: NDArray[np.float64], grid: Grid) -> float:
    """Fraction (0 to 1) of ``points`` (3, N) RAS mm further than half a voxel outside ``grid``."""
    inverse = np.linalg.inv(grid.affine)
    outside = np.zeros(points.shape[1], dtype=bool)
    for axis, size in enumerate(grid.shape):
        index = inverse[axis, :3] @ points + inverse[axis, 3]
        outside |= (index < -0.5 - 1e-6) | (index > size - 0.5 + 1e-6)
    return float(outside.mean())


def warn_cut_off(fraction: float, name: str, grid: Grid) -> None:
    """Say that part of a brain lies outside the working grid, where it cannot be registered."""
    if fraction > CUT_OFF:
        logger.warning(
            "%s: %.2g %% of the brain lies outside the %s working grid and is cut off; "
            "it follows the displacement at the grid's edge",
            name,
            100 * fraction,
            "x".join(map(str, grid.shape)),
        )


def to_sitk(data: NDArray[Any], affine: Affine) -> sitk.Image:
    """An ITK image (LPS) of ``data`` (X, Y, Z), or (X, Y, Z, 3) for a vector image."""
    is_vector = data.ndim == 4
    axes = (2, 1, 0, 3) if is_vector else (2, 1, 0)
    image = sitk.GetImageFromArray(data.transpose(axes), isVector=is_vector)
    set_geometry(image, affine)
    return image


def set_geometry(image: sitk.Image, affine: Affine) -> None:
    """Give an ITK image the grid of ``affine``, voxel index to RAS mm."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())


def from_sitk(image: sitk.Image) -> NDArray[Any]:
    """The values of an ITK image as (X, Y, Z[, 3])."""
    data = sitk.GetArrayFromImage(image)
    return data.transpose((2, 1, 0, 3) if data.ndim == 4 else (2, 1, 0))


def affine_to_sitk(matrix: Affine) -> sitk.AffineTransform:
    """An ITK transform (LPS) of ``matrix`` (4, 4), RAS mm to RAS mm."""
    lps = LPS @ matrix @ LPS
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def resample(
    volume: Volume,
    grid: Grid,
    transform: Affine | None = None,
    interp: Interpolation = "linear",
) -> NDArray[Any]:
    """Sample a volume on a grid, 0 outside it.

        out[p] = volume(transform(grid.affine p))

    A volume at less than about two thirds of the grid's spacing is averaged over blocks first,
    so that detail the grid cannot hold does not turn into noise.

    Args:
        volume: what is sampled.
        grid: where it is sampled.
        transform: (4, 4), grid's RAS mm to the volume's RAS mm; the identity by default.
        interp: ``linear`` gives float32, ``nearest`` keeps the type.

    Returns:
        ``grid.shape``, (D, H, W) along the grid's axes, C order.
    """
    image = to_sitk(volume.data, volume.affine)
    matrix = np.eye(4) if transform is None else transform
    if interp == "linear":
        # Length of one grid step, seen in voxels of the volume, along each of its axes.
        step = np.linalg.inv(volume.affine) @ matrix @ grid.affine
        # An axis-aligned grid and any orientation of the volume: the largest component counts.
        per_axis = np.abs(step[:3, :3]).max(axis=1)
        factors = [max(1, int(f + 1 / 3)) for f in per_axis]
        if max(factors) > 1:
            image = sitk.BinShrink(image, factors)
    method = sitk.sitkLinear if interp == "linear" else sitk.sitkNearestNeighbor
    pixel = sitk.sitkFloat32 if interp == "linear" else image.GetPixelID()
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(list(grid.shape))
    lps = LPS @ grid.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    resampler.SetOutputSpacing(spacing.tolist())
    resampler.SetOutputOrigin(lps[:3, 3].tolist())
    resampler.SetOutputDirection((lps[:3, :3] / spacing).ravel().tolist())
    resampler.SetTransform(affine_to_sitk(matrix))
    resampler.SetInterpolator(method)
    resampler.SetOutputPixelType(pixel)
    return np.ascontiguousarray(from_sitk(resampler.Execute(image)))


def pool(data: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means over factor^3 blocks: (D, H, W) to (D/factor, H/factor, W/factor)."""
    if factor == 1:
        return data
    d, h, w = (n // factor for n in data.shape)
    blocks = data.reshape(d, factor, h, factor, w, factor)
    return np.asarray(blocks.mean(axis=(1, 3, 5), dtype=np.float32))


@dataclass(frozen=True)
class IntensityRange:
    """What a scan's values are brought to [0, 1] with: (v - low) / (high - low), clipped."""

    low: float
    high: float

    def apply(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values in [0, 1], in place."""
        data -= np.float32(self.low)
        data /= np.float32(self.high - self.low)
        return np.clip(data, 0, 1, out=data)


def intensity_range(volume: Volume, normalisation: str = NORMALISATION) -> IntensityRange:
    """The values of a scan that become 0 and 1.

    ``max`` divides by the maximum (the paper's), ``p99.9`` by the 99.9th percentile of the brain
    and clips. Both are of the file's own voxels, before any interpolation or cropping.

    Negative values beyond rounding (5 % of the maximum), as in z-scored scans or in CT, are
    shifted so that the lowest is 0, and a warning says so; smaller ones are clipped at 0.

    Raises:
        UsageError: an unknown normalisation.
        ImageError: no voxel above the background.
    """
    if normalisation not in NORMALISATIONS:
        raise UsageError(
            f"normalisation is {normalisation!r}, expected one of {', '.join(NORMALISATIONS)}",
            "the checkpoint is of another version",
        )
    data = volume.data
    low, high = float(data.min()), float(data.max())
    if data.dtype.kind == "u" or low >= -0.05 * abs(high):
        low = 0.0
    else:
        logger.warning(
            "%s has negative values (down to %.4g); they are shifted so that the lowest is 0",
            volume.name,
            low,
        )
    brain = data[foreground(data)]
    if brain.size == 0:
        raise ImageError(f"{volume.name} has no voxel above 0", "check how it was masked")
    if normalisation == "p99.9":
        high = _percentile(brain, 0.999)
    if high <= low:
        raise ImageError(f"{volume.name} has no contrast", "check how it was masked")
    return IntensityRange(low, high)


def _percentile(values: NDArray[Any], part: float) -> float:
    """The value below which ``part`` of the (unsorted) values lies."""
    k = int(part * (values.size - 1))
    return float(np.partition(values, k)[k])


def check_overlap(fixed_points: NDArray[np.float64], grid: Grid, name: str) -> None:
    """Refuse a pair whose brains do not meet: there is nothing for the network to align.

    Raises:
        GeometryError: more than 90 % of the brain lies outside the working grid.
    """
    if fraction_outside(fixed_points, grid) > 0.9:
        raise GeometryError(
            f"{name} does not overlap the fixed image in world space",
            "use --affine affine or --affine com, or check the two headers",
        )
