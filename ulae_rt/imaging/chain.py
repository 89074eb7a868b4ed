"""Transforms one after the other, as antsApplyTransforms takes them, made one displacement."""

import logging
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import LPS, SAME_GRID_MM, Grid, from_sitk, grid_of, to_sitk
from ulae_rt.imaging.nifti import SUFFIXES, Volume, check_file
from ulae_rt.imaging.transform import LPS_SIGNS, Displacement, resample_displacement
from ulae_rt.imaging.warpfile import NPZ, WarpFormat, read_warp

logger = logging.getLogger(__name__)

WARP_SUFFIXES = (*SUFFIXES, NPZ)
# What ITK keeps transforms in; ANTs writes affines as .mat and composites as .h5.
ITK_SUFFIXES = (".mat", ".txt", ".tfm", ".xfm", ".h5", ".hdf5")
HDF5_SUFFIXES = (".h5", ".hdf5")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# A field that ends with less than this ends smoothly.
SMOOTH_END_MM = 0.5
INVERTED = re.compile(r"\[(?P<path>.+),\s*(?P<inverted>[01])\s*\]")


@dataclass(frozen=True)
class Field:
    """A displacement with the grid it lies on.

    Attributes:
        disp: (X, Y, Z, 3) float32, RAS mm.
        grid: of ``disp``.
        name: what to call it in a message.
    """

    disp: Displacement
    grid: Grid
    name: str


Step = Field | sitk.Transform


def transform_path(text: str) -> tuple[Path, bool]:
    """The file that ``FILE``, ``[FILE,0]`` or ``[FILE,1]`` names, and whether it is inverted."""
    match = INVERTED.fullmatch(text)
    return (Path(match["path"]), match["inverted"] == "1") if match else (Path(text), False)


def read_transform(text: str, reference: Volume, fmt: WarpFormat | None = None) -> list[Step]:
    """Read one transform, as points go through its parts.

    Args:
        text: a warp (NIfTI, or Learn2Reg's .npz), or an ITK transform file (`ITK_SUFFIXES`), which
            may be composite; ``[FILE,1]`` inverts a linear one.
        reference: the image whose grid the result will lie on; warps in voxels must be of it.
        fmt: of a warp that does not say it; see `read_warp`.

    Raises:
        ImageError, GeometryError: a file that is no such transform; see `read_warp`.
        UsageError: another kind of file, or the inverse of what is not linear.
    """
    path, inverted = transform_path(text)
    name = path.name.lower()
    if name.endswith(WARP_SUFFIXES):
        if inverted:
            raise _not_linear(path)
        warp = read_warp(path, fmt, reference)
        return [Field(warp.disp, grid_of(warp.grid), str(path))]
    if not name.endswith(ITK_SUFFIXES):
        raise UsageError(
            f"{path} is no kind of transform that is known, expected one of "
            f"{', '.join((*WARP_SUFFIXES, *ITK_SUFFIXES))}",
            "convert it first, e.g. with mri_warp_convert, c3d_affine_tool or wb_command",
        )
    return _flat(_read_itk(path, inverted), str(path))


def _read_itk(path: Path, inverted: bool) -> sitk.Transform:
    check_file(path)
    hint = (
        "give an ITK or ANTs transform; FSL's and FreeSurfer's matrices are converted with "
        "c3d_affine_tool or lta_convert --outitk"
    )
    if path.name.lower().endswith(HDF5_SUFFIXES) and not _is_whole_hdf5(path):
        raise ImageError(f"{path} is truncated, or not an HDF5 file", hint)
    try:
        transform: sitk.Transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1].split("): ")[-1].strip()
        raise ImageError(f"{path} is not a readable ITK transform: {said}", hint) from None
    if transform.GetDimension() != 3:
        raise ImageError(
            f"{path} is a transform of {transform.GetDimension()} dimensions, expected 3", hint
        )
    if inverted:
        try:
            transform = transform.GetInverse()
        except RuntimeError:
            raise _not_linear(path) from None
    return transform


def _is_whole_hdf5(path: Path) -> bool:
    """Whether a file is HDF5 and as long as it says; the HDF5 library would print pages about it.

    Source: HDF5 File Format Specification, II.A, the superblock.
    """
    with path.open("rb") as file:
        head = file.read(48)
    if len(head) < 48 or not head.startswith(HDF5_SIGNATURE):
        return False
    end_at = 40 if head[8] == 0 else 28
    end: int = struct.unpack_from("<Q", head, end_at)[0]
    return path.stat().st_size >= end


def _not_linear(path: Path) -> UsageError:
    return UsageError(
        f"{path} cannot be inverted on the way: only affine transforms can",
        "give the inverse warp: register --inverse-warp writes it, ANTs calls it 1InverseWarp",
    )


def _flat(transform: sitk.Transform, name: str) -> list[Step]:
    """The parts of an ITK transform in the order in which a point goes through them."""
    if transform.GetTransformEnum() == sitk.sitkComposite:
        composite = sitk.CompositeTransform(transform)
        composite.FlattenTransform()
        parts = range(composite.GetNumberOfTransforms())
        # ITK keeps the one that a point meets first last.
        return [step for n in reversed(parts) for step in _flat(composite.GetNthTransform(n), name)]
    if transform.GetTransformEnum() == sitk.sitkDisplacementField:
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        disp = from_sitk(image).astype(np.float32) * LPS_SIGNS
        affine = np.eye(4)
        direction = np.array(image.GetDirection()).reshape(3, 3)
        affine[:3, :3] = direction * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        _check_finite(disp, name)
        return [Field(disp, Grid(image.GetSize(), LPS @ affine), name)]
    _check_finite(np.array(transform.GetParameters()), name)
    return [transform]


def _check_finite(numbers: NDArray[Any], name: str) -> None:
    if not np.isfinite(numbers).all():
        raise ImageError(f"{name} has NaN or Inf", "make it again")


def chain_displacement(steps: Sequence[Step], reference: Grid, name: str) -> Displacement:
    """Where the voxels of ``reference`` come from, through all steps: one displacement.

        disp(x) = T_n(... T_2(T_1(x))) - x

    The first step, where it is a field, is interpolated linearly on ``reference`` (its own numbers
    if that is its grid) and must contain it. A later one is looked up where the points have got
    to; outside it they stay where they are, as with ITK and ANTs, and a warning says how many if
    the field does not end at 0, as those of ANTs do.

    Args:
        steps: as a point goes through them.
        reference: the grid of the result.
        name: of the reference, for messages.

    Returns:
        (X, Y, Z, 3) float32, RAS mm.

    Raises:
        GeometryError: the reference is not inside the field that comes first, or no point gets
            into one that comes later.
    """
    disp: Displacement | None = None
    for step in steps:
        if isinstance(step, Field):
            if disp is None:
                _check_contains(step, reference, name)
                disp = resample_displacement(step.disp, step.grid, reference)
                continue
            _check_met(step, disp, reference)
        disp = _through(step, disp, reference)
    if disp is None:
        raise UsageError("there is no transform", "give one at least")
    return disp


def _check_contains(field: Field, reference: Grid, name: str) -> None:
    corners = np.array(np.meshgrid(*([0, n - 1] for n in reference.shape), 1)).reshape(4, -1)
    index = (np.linalg.inv(field.grid.affine) @ reference.affine @ corners)[:3].T
    beyond = _beyond_mm(index, field.grid).max()
    if beyond > SAME_GRID_MM:
        raise GeometryError(
            f"{name} reaches {beyond:.3g} mm out of the field of {field.name}, which says nothing "
            "there",
            "give the fixed image that the warp was made for, or a crop or another resolution of "
            "it",
        )


def _check_met(field: Field, disp: Displacement, reference: Grid) -> None:
    to_index = np.linalg.inv(field.grid.affine)
    missed = 0.0
    for points in _pointed(disp, reference):
        beyond = _beyond_mm(points @ to_index[:3, :3].T + to_index[:3, 3], field.grid)
        missed += float(np.count_nonzero(beyond > 0)) / (beyond.size * reference.shape[2])
    if missed > 1 - 1e-9:
        raise GeometryError(
            f"no voxel gets into the field of {field.name}", "check the order of the transforms"
        )
    jump = _outermost_mm(field.disp)
    if missed > 0 and jump > SMOOTH_END_MM:
        logger.warning(
            "%.2g %% of the voxels get out of the field of %s and stay where they are, though it "
            "still moves points by up to %.3g mm where it ends",
            100 * missed,
            field.name,
            jump,
        )


def _outermost_mm(disp: Displacement) -> float:
    """The largest displacement on the faces of a field."""
    faces = [disp.take(end, axis) for axis in range(3) for end in (0, -1)]
    return max(float(np.linalg.norm(face, axis=-1).max()) for face in faces)


def away_mm(disp: Displacement, reference: Grid, image: Grid) -> float:
    """How far the points of a displacement stay away from an image; 0 if any is inside it."""
    to_index = np.linalg.inv(image.affine)
    nearest = np.inf
    for points in _pointed(disp, reference):
        index = points @ to_index[:3, :3].T + to_index[:3, 3]
        nearest = min(nearest, float(_beyond_mm(index, image).min()))
        if nearest == 0:
            break
    return nearest


def _pointed(disp: Displacement, grid: Grid) -> Iterator[NDArray[np.float64]]:
    """Points x + disp(x), (N, 3) RAS mm, of one plane of ``grid`` after the other, middle first."""
    x, y, planes = grid.shape
    index = np.stack(np.meshgrid(np.arange(x), np.arange(y), indexing="ij"), -1)
    in_plane = index @ grid.affine[:3, :2].T + grid.affine[:3, 3]
    for plane in sorted(range(planes), key=lambda k: abs(2 * k - planes)):
        yield (in_plane + grid.affine[:3, 2] * plane + disp[:, :, plane]).reshape(-1, 3)


def _beyond_mm(index: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """(N,), how far ``index`` (N, 3) lies outside a grid's outermost voxels; 0 inside."""
    last = np.array(grid.shape) - 0.5
    beyond = np.maximum(np.maximum(-0.5 - index, index - last), 0)
    return np.asarray(np.linalg.norm(beyond * np.linalg.norm(grid.affine[:3, :3], axis=0), axis=1))


def _through(step: Step, disp: Displacement | None, reference: Grid) -> Displacement:
    """T(x + disp(x)) - x, ITK's own double precision in between."""
    chain = [_as_itk(step) if isinstance(step, Field) else step]
    if disp is not None:
        chain.append(_as_itk(Field(disp, reference, "")))
    lps = LPS @ reference.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    total = sitk.TransformToDisplacementField(
        sitk.CompositeTransform(chain),  # the last is the one that a point meets first
        sitk.sitkVectorFloat64,
        list(reference.shape),
        lps[:3, 3].tolist(),
        spacing.tolist(),
        (lps[:3, :3] / spacing).ravel().tolist(),
    )
    return from_sitk(total).astype(np.float32) * LPS_SIGNS


def _as_itk(field: Field) -> sitk.Transform:
    image = to_sitk(field.disp * LPS_SIGNS, field.grid.affine)
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
