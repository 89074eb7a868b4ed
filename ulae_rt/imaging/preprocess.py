"""Background, working grid and intensities: how a scan becomes what the network sees."""

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import Affine, Grid
from ulae_rt.imaging.image import Image, as_array, image_of, resample
from ulae_rt.imaging.nifti import Volume

logger = logging.getLogger(__name__)

WORKING_SHAPE = (160, 192, 160)
# The maximum of a scan is one bright vessel or a spike: over 20 OASIS scans the median of the
# brain lies at 0.27 to 0.57 of it, but at 0.60 to 0.65 of the 99.9th percentile.
NORMALISATION = "p99.9"
NORMALISATIONS = ("max", "p99.9")
# Their largest ratio to the 95th percentile that is still a brain's, and their usual one. Of 22
# stripped T1 scans: p99.9 1.05 to 1.12 (T2 1.7, after contrast agent 2.5), maximum 1.1 to 3.5.
LARGEST = {"max": 5.0, "p99.9": 1.3}
USUAL = {"max": 2.0, "p99.9": 1.1}
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
# Voxels of an image that are looked at to see how much of the brain lies outside a grid.
MAX_POINTS = 1_000_000


def with_background(image: Image) -> Image:
    """The image with 0 outside the brain and values above 0 inside, as all below expects.

    What is decided here is decided by many voxels and by no single one. An image whose background
    is 0 and that has no negative values is returned as it is; negative values within rounding (5 %
    of the brightness) become 0. Beyond that, as in z-scored scans, in CT or where a constant was
    added, the commonest corner value is taken for the background and the rest is shifted above 0,
    with a warning. A warning is also logged where the background has no one value, as with the
    skull on, and where some voxels are so bright that `intensity_scale` leaves them out.
    """
    cleaned = _zero_background(image)
    warn_outliers(cleaned)
    return cleaned


def with_background_on_host(volume: Volume) -> Volume:
    """`with_background` of a volume, where nothing is to be done on a device."""
    return replace(volume, data=as_array(with_background(image_of(volume)).voxels))


def _zero_background(image: Image) -> Image:
    voxels = image.voxels
    corner_values = voxels[0, 0][[0, -1]][:, [0, -1]][:, :, [0, -1]].flatten().tolist()
    corners, counts = np.unique(corner_values, return_counts=True)
    background = float(corners[np.argmax(counts)])
    seen = _some_voxels(voxels)
    lowest = float(voxels.amin())
    low, high = _range_of(seen[seen != 0])
    is_negative = low < -ROUNDING * abs(high)
    has_zeros = np.count_nonzero(seen == 0) > FEW_VOXELS * seen.size
    has_background = np.count_nonzero(seen == background) > FEW_VOXELS * seen.size
    if is_negative or (has_background and not has_zeros):
        logger.warning(
            "%s has values down to %.4g; %.4g is taken for the background and the rest is shifted",
            image.name,
            lowest,
            background + 0.0,  # not -0
        )
        low, high = _range_of(seen[seen != background])
        faintest = 1e-3 * max(high - low, 1e-6 * abs(high))
        floor = max(lowest, low - 0.5 * (high - low))
        shifted = voxels.sub(floor - faintest).clamp_(min=faintest)
        return replace(image, voxels=shifted.mul_(voxels != background))
    if not has_zeros:
        logger.warning(
            "%s has no background: nearly every voxel is above 0, and all of it is taken for the "
            "brain; expected a skull-stripped image with 0 around the brain",
            image.name,
        )
    if lowest < -max(abs(high), 1e-6 * abs(lowest)):
        logger.warning(
            "%s: single voxels are down to %.4g, as far below 0 as its brain is above: they are "
            "taken for 0",
            image.name,
            lowest,
        )
    return image if lowest >= 0 else replace(image, voxels=voxels.clamp(min=0))


def _range_of(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2nd and the 95th percentile: what one voxel in a hundred, however far off, leaves alone.

    (0, 0) of nothing.
    """
    if values.size == 0:
        return 0.0, 0.0
    low, high = np.quantile(values, (0.02, 0.95))
    return float(low), float(high)


def _some_voxels(voxels: Tensor) -> NDArray[np.float64]:
    """Some ten thousands of an image's voxels, evenly spread over it."""
    step = max(1, int((voxels.numel() / SEEN) ** (1 / 3)))
    some = voxels[0, 0, ::step, ::step, ::step].flatten().double()
    return np.asarray(some.cpu().numpy())


def _to_world(affine: Affine, index: list[Tensor]) -> Tensor:
    """(3, N) float64 RAS mm of voxel indices, given axis by axis."""
    points = torch.stack(index).double()
    matrix = torch.from_numpy(affine).to(points.device)
    return torch.addmm(matrix[:3, 3:], matrix[:3, :3], points)


def _all_points(image: Image) -> Tensor:
    """(3, N) RAS mm of the brain's voxels; of one in step^3 where there are very many."""
    step = 1
    while image.voxels.numel() / step**3 > MAX_POINTS:
        step += 1
    mask = image.voxels[0, 0, ::step, ::step, ::step] > 0
    return _to_world(image.affine, [axis * step for axis in mask.nonzero(as_tuple=True)])


def _outline(image: Image) -> Tensor:
    """(3, N) RAS mm of the brain's first and last voxel on each line along the first axis.

    They have the same convex hull as the brain, hence the same bounding box in any direction, at
    a hundredth of the points.
    """
    mask = (image.voxels[0, 0] > 0).to(torch.uint8)
    # Indices from 1 on, so that 0 says that a line has none.
    order = torch.arange(1, len(mask) + 1, dtype=torch.int32, device=mask.device)[:, None, None]
    last = (mask * order).amax(0)
    first = len(mask) - (mask * order.flip(0)).amax(0)
    h, w = last.nonzero(as_tuple=True)
    if len(h) == 0:
        raise ImageError(f"{image.name} has no voxel above 0", "check how it was masked")
    ends = torch.cat((first[h, w], last[h, w] - 1))
    return _to_world(image.affine, [ends, h.repeat(2), w.repeat(2)])


def working_grid(
    image: Image,
    shape: tuple[int, int, int] = WORKING_SHAPE,
    axes: Affine | None = None,
) -> tuple[Grid, float]:
    """The grid centred on an image's brain.

    The first point is snapped to the nearest voxel centre, so that an image which is at the grid's
    spacing and whose axes run along the grid's, in whatever order and direction, is copied and not
    interpolated.

    Args:
        image: whose brain (voxels above 0) is centred.
        shape: (D, H, W).
        axes: (3, 3), columns one step of the grid along d, h and w in the image's RAS mm, at right
            angles and of one length; by default R, A and S, 1 mm.

    Returns:
        The grid, and the fraction of the brain's voxels that lies outside it (0 to 1).
    """
    extent = np.array(shape) - 1
    affine = np.eye(4) if axes is None else np.block([[axes, np.zeros((3, 1))], [0, 0, 0, 1]])
    to_steps = torch.from_numpy(np.linalg.inv(affine[:3, :3])).to(image.voxels.device)
    outline = _outline(image)
    low, high = (bound.cpu().numpy() for bound in (to_steps @ outline).aminmax(dim=1))
    if (high - low > extent).any():
        # Specks far from the head must not take the grid with them.
        points = to_steps @ _all_points(image)
        trim = int(points.shape[1] * SPECKS)
        low, high = (
            points.kthvalue(place, dim=1).values.cpu().numpy()
            for place in (1 + trim, points.shape[1] - trim)
        )
    first = (low + high - extent) / 2
    voxel = np.rint(np.linalg.inv(image.affine) @ [*(affine[:3, :3] @ first), 1.0])
    affine[:3, 3] = (image.affine @ voxel)[:3]
    grid = Grid(shape, affine)
    return grid, cut_off(image, grid, outline=outline)


def cut_off(
    image: Image,
    grid: Grid,
    to_grid: Affine | None = None,
    outline: Tensor | None = None,
) -> float:
    """Fraction (0 to 1) of a brain's voxels further than half a voxel outside ``grid``.

    Args:
        image: the brain, voxels above 0.
        grid: the working grid.
        to_grid: (4, 4), the image's RAS mm to the grid's RAS mm; the identity by default.
        outline: the brain's outline, where it is known already.
    """
    to_index = np.linalg.inv(grid.affine) @ (np.eye(4) if to_grid is None else to_grid)
    if not _outside(_outline(image) if outline is None else outline, to_index, grid).any():
        return 0.0
    return float(_outside(_all_points(image), to_index, grid).double().mean())


def _outside(points: Tensor, to_index: Affine, grid: Grid) -> Tensor:
    matrix = torch.from_numpy(to_index).to(points.device)
    index = torch.addmm(matrix[:3, 3:], matrix[:3, :3], points)
    last = torch.tensor(grid.shape, dtype=index.dtype, device=index.device)[:, None] - 0.5
    return ((index < -0.5 - EPSILON) | (index > last + EPSILON)).any(0)


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


def intensity_scale(image: Image, normalisation: str = NORMALISATION) -> float:
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
    brightness = image.brightness
    scale = brightness.maximum if normalisation == "max" else brightness.p999
    if scale > LARGEST[normalisation] * brightness.p95:
        return USUAL[normalisation] * brightness.p95
    return scale


def warn_outliers(image: Image) -> None:
    """Say so if some of a brain's voxels are far too bright to be brain; see `intensity_scale`."""
    if not (image.voxels > 0).any():
        return  # said where the brain is looked for
    brightness = image.brightness
    if brightness.p999 > LARGEST["p99.9"] * brightness.p95:
        logger.warning(
            "%s: the brightest 0.1 %% of its voxels are %.3g times as bright as the brain's 95th "
            "percentile, expected up to %.3g: they are clipped; look for a piece of skull, "
            "vessels with contrast agent or an artefact",
            image.name,
            brightness.p999 / brightness.p95,
            LARGEST["p99.9"],
        )
    elif brightness.maximum > LARGEST["max"] * brightness.p95:
        logger.warning(
            "%s: single voxels are up to %.3g times as bright as the brain's 95th percentile: "
            "they are clipped",
            image.name,
            brightness.maximum / brightness.p95,
        )


def shrunk(image: Image, factors: tuple[int, int, int]) -> Image:
    """Means over blocks of ``factors`` voxels; voxels that fill no block are left out."""
    if max(factors) == 1:
        return image
    voxels = F.avg_pool3d(image.voxels, factors)
    block = np.diag([*factors, 1.0])
    block[:3, 3] = (np.array(factors) - 1) / 2
    return replace(image, voxels=voxels, affine=image.affine @ block)


def _averaged(image: Image, grid: Grid, transform: Affine | None) -> Image:
    """An image much finer than ``grid``, as means over blocks of about the grid's spacing.

    Detail that the grid cannot hold must not turn into noise on it.
    """
    matrix = np.eye(4) if transform is None else transform
    # One step of the grid in voxels of the image, along the axis of each that it follows most.
    step = np.abs(np.linalg.inv(image.affine) @ matrix @ grid.affine)[:3, :3].max(axis=1)
    d, h, w = (
        min(size, max(1, int(voxels + 1 / 3)))
        for voxels, size in zip(step, image.grid.shape, strict=True)
    )
    return shrunk(image, (d, h, w))


def _smoothed(image: Image, grid: Grid, transform: Affine | None, factor: int) -> Image:
    """An image whose voxels are means over boxes of about ``factor`` steps of a grid."""
    matrix = np.eye(4) if transform is None else transform
    step = np.linalg.inv(image.affine)[:3, :3] @ (matrix @ grid.affine)[:3, :3]
    d, h, w = (
        max(1, min(size, round(factor * voxels)))
        for voxels, size in zip(np.abs(step).max(axis=1), image.grid.shape, strict=True)
    )
    voxels = F.avg_pool3d(image.voxels, (d, h, w), 1, (d // 2, h // 2, w // 2))
    shift = np.eye(4)
    shift[:3, 3] = [(n - 1) / 2 - n // 2 for n in (d, h, w)]
    return replace(image, voxels=voxels, affine=image.affine @ shift)


def network_input(
    image: Image,
    grid: Grid,
    transform: Affine | None = None,
    normalisation: str = NORMALISATION,
    *,
    factor: int = 1,
) -> Tensor:
    """A scan as the network sees it: on ``grid``, (1, 1, D, H, W) float32, clipped to [0, 1].

    With a ``factor``, on the grid of means over factor^3 blocks. What is averaged is the image
    before it is sampled: where its voxels are as large as the grid's and as aligned, that is the
    mean of the samples in the block to the last digit, for an eighth of the samples.

    Args:
        image: as `with_background` gives it.
        grid: the working grid.
        transform: (4, 4), grid's RAS mm to the image's RAS mm; the identity by default.
        normalisation: see `intensity_scale`.
        factor: edge of the blocks.
    """
    scale = intensity_scale(image, normalisation)
    averaged = _averaged(image, grid, transform)
    if factor > 1:
        # Clipped first: a spike must not brighten its neighbours.
        clipped = replace(averaged, voxels=averaged.voxels.clamp(max=scale))
        averaged = _smoothed(clipped, grid, transform, factor)
    data = resample(averaged, grid.pooled(factor), transform)
    return data.div_(scale).clamp_(0, 1)
