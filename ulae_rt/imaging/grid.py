"""Grids, resampling between them, and intensities: what the network sees of a scan."""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.nifti import Volume

# What resamples imports it: training has only headers to compare, also where there is no ITK.
if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

Interpolation = Literal["linear", "nearest"]
Affine = NDArray[np.float64]

WORKING_SHAPE = (160, 192, 160)
# The maximum of a scan is one bright vessel or a spike: over 20 OASIS scans the median of the
# brain lies at 0.27 to 0.57 of it, but at 0.60 to 0.65 of the 99.9th percentile.
NORMALISATION = "p99.9"
NORMALISATIONS = ("max", "p99.9")
# Their largest ratio to the 95th percentile that is still a brain's, and their usual one. Of 22
# stripped T1 scans: p99.9 1.05 to 1.12 (T2 1.7, after contrast agent 2.5), maximum 1.1 to 3.5.
LARGEST = {"max": 5.0, "p99.9": 1.3}
USUAL = {"max": 2.0, "p99.9": 1.1}
# World RAS to world LPS and back.
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Specks outside the head must not move the centre: this part of the brain voxels is ignored at
# each end of each axis.
SPECKS = 2e-4
# Less than this outside the grid is specks too, or the cut end of the spinal cord.
CUT_OFF = 1e-3
NO_OVERLAP = 0.9
# Rounding in a header, in voxels.
EPSILON = 1e-4
# Values below 0 by less than this part of the brightness are rounding, of an interpolation say.
ROUNDING = 0.05
# A value that fewer of the voxels have than this is no background.
FEW_VOXELS = 0.01
# Voxels that are looked at to find the background.
SEEN = 60_000
# What two headers of one grid may differ by: a quaternion in single precision, 200 mm away.
SAME_GRID_MM = 0.01
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


def gap_mm(grid: Grid, other: Grid) -> float:
    """How far apart the corners of two grids of one shape lie; 0 within a header's rounding."""
    corners = np.array(np.meshgrid(*([0, n - 1] for n in grid.shape), 1)).reshape(4, -1)
    gap = float(np.linalg.norm((grid.affine - other.affine) @ corners, axis=0).max())
    return gap if gap > SAME_GRID_MM else 0.0


def with_background(volume: Volume) -> Volume:
    """The volume with 0 outside the brain and values above 0 inside, as all below expects.

    What is decided here is decided by many voxels and by no single one. A volume whose background
    is 0 and that has no negative values is returned as it is; negative values within rounding (5 %
    of the brightness) become 0. Beyond that, as in z-scored scans, in CT or where a constant was
    added, the commonest corner value is taken for the background and the rest is shifted above 0,
    with a warning. A warning is also logged where the background has no one value, as with the
    skull on, and where some voxels are so bright that `intensity_scale` leaves them out.
    """
    cleaned = _zero_background(volume)
    warn_outliers(cleaned)
    return cleaned


def _zero_background(volume: Volume) -> Volume:
    data = volume.data
    seen = _some_voxels(data)
    lowest = float(data.min())
    corners, counts = np.unique(data[[0, -1]][:, [0, -1]][:, :, [0, -1]], return_counts=True)
    background = float(corners[np.argmax(counts)])
    low, high = _range_of(seen[seen != 0])
    is_negative = low < -ROUNDING * abs(high)
    has_zeros = np.count_nonzero(seen == 0) > FEW_VOXELS * seen.size
    has_background = np.count_nonzero(seen == background) > FEW_VOXELS * seen.size
    if is_negative or (has_background and not has_zeros):
        logger.warning(
            "%s has values down to %.4g; %.4g is taken for the background and the rest is shifted",
            volume.name,
            lowest,
            background + 0.0,  # not -0
        )
        low, high = _range_of(seen[seen != background])
        faintest = 1e-3 * max(high - low, 1e-6 * abs(high))
        floor = max(lowest, low - 0.5 * (high - low))
        shifted = data.astype(np.float32) - np.float32(floor - faintest)
        np.maximum(shifted, np.float32(faintest), out=shifted)
        return replace(volume, data=shifted * (data != background))
    if not has_zeros:
        logger.warning(
            "%s has no background: nearly every voxel is above 0, and all of it is taken for the "
            "brain; expected a skull-stripped image with 0 around the brain",
            volume.name,
        )
    if lowest < -max(abs(high), 1e-6 * abs(lowest)):
        logger.warning(
            "%s: single voxels are down to %.4g, as far below 0 as its brain is above: they are "
            "taken for 0",
            volume.name,
            lowest,
        )
    return volume if lowest >= 0 else replace(volume, data=np.maximum(data, 0))


def _range_of(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2nd and the 95th percentile: what one voxel in a hundred, however far off, leaves alone.

    (0, 0) of nothing.
    """
    if values.size == 0:
        return 0.0, 0.0
    low, high = np.quantile(values, (0.02, 0.95))
    return float(low), float(high)


def _some_voxels(data: NDArray[Any]) -> NDArray[np.float64]:
    """Some ten thousands of a volume's voxels, evenly spread over it."""
    step = max(1, int((data.size / SEEN) ** (1 / 3)))
    return data[::step, ::step, ::step].astype(np.float64).ravel()


def _to_world(affine: Affine, index: list[NDArray[Any]]) -> NDArray[np.float64]:
    """(3, N) RAS mm of voxel indices, given axis by axis."""
    rows = [sum(affine[r, c] * index[c] for c in range(3)) + affine[r, 3] for r in range(3)]
    return np.stack(rows).astype(np.float64, copy=False)


def _all_points(volume: Volume) -> NDArray[np.float64]:
    """(3, N) RAS mm of the brain's voxels; of one in step^3 where there are very many."""
    step = 1
    while volume.data.size / step**3 > MAX_POINTS:
        step += 1
    mask = volume.data[::step, ::step, ::step] > 0
    return _to_world(volume.affine, [axis * step for axis in np.nonzero(mask)])


def _outline(volume: Volume) -> NDArray[np.float64]:
    """(3, N) RAS mm of the brain's first and last voxel on each line along the first array axis.

    They have the same convex hull as the brain, hence the same bounding box in any direction, at
    a hundredth of the points.
    """
    mask = volume.data > 0
    j, k = np.nonzero(mask.any(axis=0))
    if j.size == 0:
        raise ImageError(f"{volume.name} has no voxel above 0", "check how it was masked")
    lines = mask[:, j, k]
    first = lines.argmax(axis=0)
    last = mask.shape[0] - 1 - lines[::-1].argmax(axis=0)
    index = [np.concatenate(pair) for pair in ((first, last), (j, j), (k, k))]
    return _to_world(volume.affine, index)


def working_grid(
    volume: Volume,
    shape: tuple[int, int, int] = WORKING_SHAPE,
    spacing_mm: float = 1.0,
) -> tuple[Grid, float]:
    """The axis-aligned RAS grid centred on a volume's brain.

    The grid's first point is snapped to the nearest voxel centre, so that a volume which is
    at the grid's spacing and axis-aligned, in whatever order and direction its axes run, is
    copied and not interpolated.

    Args:
        volume: the image whose brain (voxels above 0) is centred.
        shape: (D, H, W), along R, A, S.
        spacing_mm: of the grid, isotropic.

    Returns:
        The grid, and the fraction of the brain's voxels that lies outside it (0 to 1).
    """
    extent = (np.array(shape) - 1) * spacing_mm
    outline = _outline(volume)
    low, high = outline.min(axis=1), outline.max(axis=1)
    if (high - low > extent).any():
        # Specks far from the head must not take the grid with them.
        points = np.sort(_all_points(volume), axis=1)
        trim = int(points.shape[1] * SPECKS)
        low, high = points[:, trim], points[:, -1 - trim]
    first = (low + high - extent) / 2
    voxel = np.rint(np.linalg.inv(volume.affine) @ [*first, 1.0])
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = (volume.affine @ voxel)[:3]
    grid = Grid(shape, affine)
    return grid, cut_off(volume, grid, outline=outline)


def cut_off(
    volume: Volume,
    grid: Grid,
    to_grid: Affine | None = None,
    outline: NDArray[np.float64] | None = None,
) -> float:
    """Fraction (0 to 1) of a brain's voxels further than half a voxel outside ``grid``.

    Args:
        volume: the brain, voxels above 0.
        grid: the working grid.
        to_grid: (4, 4), the volume's RAS mm to the grid's RAS mm; the identity by default.
        outline: the brain's outline, where it is known already.
    """
    to_index = np.linalg.inv(grid.affine) @ (np.eye(4) if to_grid is None else to_grid)
    if not _outside(_outline(volume) if outline is None else outline, to_index, grid).any():
        return 0.0
    return float(_outside(_all_points(volume), to_index, grid).mean())


def _outside(points: NDArray[np.float64], to_index: Affine, grid: Grid) -> NDArray[np.bool_]:
    outside = np.zeros(points.shape[1], dtype=bool)
    for axis, size in enumerate(grid.shape):
        index = to_index[axis, :3] @ points + to_index[axis, 3]
        outside |= (index < -0.5 - EPSILON) | (index > size - 0.5 + EPSILON)
    return outside


def warn_cut_off(fraction: float, name: str, grid: Grid) -> None:
    """Say that part of a brain lies outside the working grid, where it cannot be registered.

    Raises:
        GeometryError: nearly all of it does, so that there is nothing to register.
    """
    if fraction > NO_OVERLAP:
        raise GeometryError(
            f"{100 * fraction:.3g} % of the brain of {name} lies outside the fixed brain's grid",
            "use --affine affine or --affine com, and check the two headers",
        )
    if fraction > CUT_OFF:
        logger.warning(
            "%s: %.2g %% of the brain lies outside the %s working grid and is cut off; "
            "it follows the displacement at the grid's edge",
            name,
            100 * fraction,
            "x".join(map(str, grid.shape)),
        )


def to_sitk(data: NDArray[Any], affine: Affine) -> "sitk.Image":
    """An ITK image (LPS) of ``data`` (X, Y, Z), or (X, Y, Z, 3) for a vector image."""
    import SimpleITK as sitk

    is_vector = data.ndim == 4
    axes = (2, 1, 0, 3) if is_vector else (2, 1, 0)
    image = sitk.GetImageFromArray(data.transpose(axes), isVector=is_vector)
    set_geometry(image, affine)
    return image


def set_geometry(image: "sitk.Image", affine: Affine) -> None:
    """Give an ITK image the grid of ``affine``, voxel index to RAS mm."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())


def reference(grid: Grid) -> "sitk.Image":
    """An image of one byte a voxel, to tell ITK a grid."""
    import SimpleITK as sitk

    image = sitk.Image(list(grid.shape), sitk.sitkUInt8)
    set_geometry(image, grid.affine)
    return image


def from_sitk(image: "sitk.Image") -> NDArray[Any]:
    """The values of an ITK image as (X, Y, Z[, 3])."""
    import SimpleITK as sitk

    data = sitk.GetArrayFromImage(image)
    return data.transpose((2, 1, 0, 3) if data.ndim == 4 else (2, 1, 0))


def affine_to_sitk(matrix: Affine) -> "sitk.AffineTransform":
    """An ITK transform (LPS) of ``matrix`` (4, 4), RAS mm to RAS mm."""
    import SimpleITK as sitk

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

    Args:
        volume: what is sampled.
        grid: where it is sampled.
        transform: (4, 4), grid's RAS mm to the volume's RAS mm; the identity by default.
        interp: ``linear`` gives float32, ``nearest`` keeps the type.

    Returns:
        ``grid.shape``, (D, H, W) along the grid's axes, C order.
    """
    import SimpleITK as sitk

    image = to_sitk(volume.data, volume.affine)
    matrix = np.eye(4) if transform is None else transform
    method = sitk.sitkLinear if interp == "linear" else sitk.sitkNearestNeighbor
    pixel = sitk.sitkFloat32 if interp == "linear" else image.GetPixelID()
    sampled = sitk.Resample(image, reference(grid), affine_to_sitk(matrix), method, 0.0, pixel)
    return np.ascontiguousarray(from_sitk(sampled))


def pool(data: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means over factor^3 blocks: (D, H, W) to (D/factor, H/factor, W/factor)."""
    if factor == 1:
        return data
    d, h, w = (n // factor for n in data.shape)
    blocks = data.reshape(d, factor, h, factor, w, factor)
    return np.asarray(blocks.mean(axis=(1, 3, 5), dtype=np.float32))


def intensity_scale(volume: Volume, normalisation: str = NORMALISATION) -> float:
    """The value of a scan that becomes 1.

    ``max`` is the maximum (the paper's), ``p99.9`` the 99.9th percentile of the brain, the voxels
    above 0. Both are of the file's own voxels, before any interpolation or cropping. Where either
    is further above the 95th percentile than any scan it was taken from (`LARGEST`), some voxels
    are no brain, and the scale is what it usually is of that percentile (`USUAL`).

    Raises:
        UsageError: an unknown normalisation.
        ImageError: no voxel above 0.
    """
    if normalisation not in NORMALISATIONS:
        raise UsageError(
            f"normalisation is {normalisation!r}, expected one of {', '.join(NORMALISATIONS)}",
            "the checkpoint is of another version",
        )
    brightness = volume.brightness
    scale = brightness.maximum if normalisation == "max" else brightness.p999
    if scale > LARGEST[normalisation] * brightness.p95:
        return USUAL[normalisation] * brightness.p95
    return scale


def warn_outliers(volume: Volume) -> None:
    """Say so if some of a brain's voxels are far too bright to be brain; see `intensity_scale`."""
    if not (volume.data > 0).any():
        return  # said where the brain is looked for
    brightness = volume.brightness
    if brightness.p999 > LARGEST["p99.9"] * brightness.p95:
        logger.warning(
            "%s: the brightest 0.1 %% of its voxels are %.3g times as bright as the brain's 95th "
            "percentile, expected up to %.3g: they are clipped; look for a piece of skull, "
            "vessels with contrast agent or an artefact",
            volume.name,
            brightness.p999 / brightness.p95,
            LARGEST["p99.9"],
        )
    elif brightness.maximum > LARGEST["max"] * brightness.p95:
        logger.warning(
            "%s: single voxels are up to %.3g times as bright as the brain's 95th percentile: "
            "they are clipped",
            volume.name,
            brightness.maximum / brightness.p95,
        )


def _averaged(volume: Volume, grid: Grid, transform: Affine | None) -> Volume:
    """A volume much finer than ``grid``, as means over blocks of about the grid's spacing.

    Detail that the grid cannot hold must not turn into noise on it.
    """
    import SimpleITK as sitk

    matrix = np.eye(4) if transform is None else transform
    # One step of the grid in voxels of the volume, along the axis of each that it follows most.
    step = np.abs(np.linalg.inv(volume.affine) @ matrix @ grid.affine)[:3, :3].max(axis=1)
    factors = [max(1, int(voxels + 1 / 3)) for voxels in step]
    if max(factors) == 1:
        return volume
    image = sitk.BinShrink(
        sitk.Cast(to_sitk(volume.data, volume.affine), sitk.sitkFloat32), factors
    )
    block = np.diag([*factors, 1.0])
    block[:3, 3] = (np.array(factors) - 1) / 2
    return replace(volume, data=from_sitk(image), affine=volume.affine @ block)


def network_input(
    volume: Volume,
    grid: Grid,
    transform: Affine | None = None,
    normalisation: str = NORMALISATION,
) -> NDArray[np.float32]:
    """A scan as the network sees it: on ``grid``, (D, H, W) float32, clipped to [0, 1].

    Args:
        volume: as `with_background` gives it.
        grid: the working grid.
        transform: (4, 4), grid's RAS mm to the volume's RAS mm; the identity by default.
        normalisation: see `intensity_scale`.
    """
    data: NDArray[np.float32] = resample(_averaged(volume, grid, transform), grid, transform)
    data /= np.float32(intensity_scale(volume, normalisation))
    return np.clip(data, 0, 1, out=data)
