"""Warp files: one displacement, in the ways that other tools read."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import Grid, gap_mm, grid_of
from ulae_rt.imaging.nifti import (
    SUFFIXES,
    Outputs,
    PathLike,
    Volume,
    check_file,
    checked_shape,
    image_on_grid,
    open_image,
    output_error,
    read_data,
    save_image,
    volume_without_values,
)
from ulae_rt.imaging.transform import LPS_SIGNS, Displacement

WarpFormat = Literal["itk", "ras", "voxel", "l2r"]
WARP_FORMATS: tuple[WarpFormat, ...] = get_args(WarpFormat)
# In voxels of one grid, which the reader has to know.
VOXEL_FORMATS: tuple[WarpFormat, ...] = ("voxel", "l2r")
NPZ = ".npz"

INTENT_VECTOR = 1007  # 1006 (DISPVECT) would make ITK flip x and y on reading
# How a 4-D file says what it is; nothing in NIfTI's own codes does.
INTENT_NAMES: dict[WarpFormat, str] = {
    "ras": "disp-ras-mm", "voxel": "disp-voxel", "l2r": "disp-l2r",
}  # fmt: skip
# A displacement's mean slope: an affine of a brain stays far below 1 on all three axes, and a file
# of positions has 1 on all of them, whatever its unit and its signs.
ABSOLUTE_SLOPE = 0.75
ABSOLUTE_REST = 0.25


@dataclass(frozen=True)
class Warp:
    """A displacement on the fixed image's grid.

    Attributes:
        disp: (X, Y, Z, 3) float32, RAS mm: the fixed point x comes from the moving point
            x + disp(x), the affine included.
        grid: the fixed image, for its grid and header; its values are not used.
        moving: the moving image's grid; None where a file did not say it.
    """

    disp: Displacement
    grid: Volume
    moving: Grid | None = None

    def save(self, path: PathLike, fmt: WarpFormat = "itk", *, overwrite: bool = False) -> None:
        """Write a warp file; see `write_warp`."""
        suffixes = {Path(path): warp_suffixes(fmt)}
        with Outputs([path], overwrite=overwrite, suffixes=suffixes) as outputs:
            write_warp(self, outputs.temporary(path), fmt)
            outputs.commit()


def warp_suffixes(fmt: WarpFormat) -> Sequence[str]:
    """How the name of a warp file of a format may end."""
    return (*SUFFIXES, NPZ) if fmt == "l2r" else SUFFIXES


def write_warp(warp: Warp, path: PathLike, fmt: WarpFormat = "itk") -> None:
    """Write a warp to a path that has been checked: as `warp_to_image`, or ``.npz`` for l2r.

    Raises:
        GeometryError, UsageError: see `warp_to_image`.
        OutputError: the file cannot be written.
    """
    if not str(path).lower().endswith(NPZ):
        save_image(warp_to_image(warp, fmt), path)
        return
    values = _stored(warp, fmt)
    try:
        with open(path, "wb") as file:
            np.savez_compressed(file, disp=values)
    except OSError as error:
        raise output_error(path, error) from None


def warp_to_image(warp: Warp, fmt: WarpFormat = "itk") -> nib.Nifti1Image:
    """A warp as a NIfTI image on the fixed grid, float32.

    - ``itk``: 5-D (X, Y, Z, 1, 3), intent 1007, LPS mm: ITK, ANTs, Slicer, FireANTs.
    - ``ras``: 4-D (X, Y, Z, 3), RAS mm: FreeSurfer's disp-ras, SynthMorph, NiftyReg.
    - ``voxel``: 4-D (X, Y, Z, 3), voxels of the fixed grid, component c along array axis c, as
      VoxelMorph has it: fixed voxel i comes from i + v(i), an index into the fixed grid extended
      over the moving image's world, v = S^-1 disp with S the grid's 3 x 3.
    - ``l2r``: the same numbers, for Learn2Reg:
      ``map_coordinates(moving, identity + disp.transpose(3, 0, 1, 2))``. There i + v(i) is an
      index into the moving array, so it is refused where the two images have not one grid: the
      numbers would have to hold the difference of the grids as well, the Jacobian that is judged
      with the labels would be of that too, and no reader could tell.

    sform and qform are both the affine that was used, so that no reader can take another.

    Raises:
        GeometryError: l2r, of images on two grids.
        UsageError: l2r, of a warp whose moving image is not known; an unknown format.

    Source: Learn2Reg, github.com/MDL-UzL/L2R, evaluation/L2RTest/evaluation.py at 00106df.
    """
    fixed = warp.grid
    image = image_on_grid(_stored(warp, fmt), fixed, fixed.affine)
    if fmt == "itk":
        image.header.set_intent(INTENT_VECTOR, allow_unknown=True)
    else:
        image.header.set_intent("none", name=INTENT_NAMES[fmt])
    return image


def _stored(warp: Warp, fmt: WarpFormat) -> NDArray[np.float32]:
    """The numbers of a file."""
    if fmt == "itk":
        return (warp.disp * LPS_SIGNS)[:, :, :, None, :]
    if fmt == "ras":
        return warp.disp
    if fmt == "l2r":
        if warp.moving is None:
            raise UsageError(
                "format l2r needs the moving image's grid, and the warp does not say it",
                "give Warp(disp, grid, moving)",
            )
        check_one_grid(grid_of(warp.grid), warp.moving)
    elif fmt != "voxel":
        raise UsageError(
            f"warp format is {fmt!r}, expected one of {', '.join(WARP_FORMATS)}", "see -h"
        )
    inverse = np.linalg.inv(warp.grid.affine[:3, :3]).astype(np.float32)
    return np.asarray(warp.disp @ inverse.T)


def check_one_grid(fixed: Grid, moving: Grid) -> None:
    """Refuse format l2r for a moving image on another grid than the fixed image's.

    Raises:
        GeometryError: the shapes or the affines differ.
    """
    if difference := _difference(moving, fixed):
        raise GeometryError(
            f"format l2r needs the moving image on the fixed image's grid: {difference}",
            "resample the moving image to the fixed image's grid first, or write another format",
        )


def read_warp(path: PathLike, fmt: WarpFormat | None = None, fixed: Volume | None = None) -> Warp:
    """Read a warp file.

    Args:
        path: a 5-D ITK or 4-D NIfTI displacement, or Learn2Reg's ``.npz`` with one array.
        fmt: needed for a 4-D file that another tool wrote, which does not say its unit; an
            ``.npz`` is l2r.
        fixed: the fixed image, which voxel displacements are of: needed for l2r, whose header, if
            any, is not looked at, as in Learn2Reg itself.

    Raises:
        ImageError: not a displacement, or damaged.
        GeometryError: in voxels, and ``fixed`` is another grid than the file's.
        UsageError: a 4-D file without ``fmt``, or another format than ``fmt`` says; l2r without
            ``fixed``.
    """
    if str(path).lower().endswith(NPZ):
        if fmt not in (None, "l2r"):
            raise UsageError(f"{path} is a warp of format l2r, not {fmt}", "leave the format out")
        return _read_npz(Path(path), fixed)
    image = open_image(path)
    name, shape = str(path), image.shape
    is_itk = len(shape) == 5 and shape[3:] == (1, 3)
    if not is_itk and not (len(shape) == 4 and shape[3] == 3):
        raise ImageError(
            f"{name} has size {'x'.join(map(str, shape))}, expected XxYxZx1x3 or XxYxZx3",
            "give a dense displacement in NIfTI, as register -w writes",
        )
    spatial = checked_shape(shape[:3], name)
    intent = int(image.header["intent_code"])
    if is_itk and intent != INTENT_VECTOR:
        raise ImageError(
            f"{name} has intent {intent}, expected {INTENT_VECTOR} (vector)",
            "other tools read it otherwise; write it again from the tool that made it",
        )
    stored = image.header.get_intent()[2]
    known: dict[str, WarpFormat] = {text: each for each, text in INTENT_NAMES.items()}
    found = "itk" if is_itk else known.get(stored, fmt)
    if found is None:
        raise UsageError(
            f"{name} does not say its unit", "say it with --warp-format: ras, voxel or l2r"
        )
    if fmt is not None and fmt != found:
        raise UsageError(f"{name} is a warp of format {found}, not {fmt}", "leave the format out")
    if found == "l2r":
        data = read_data(image, name).astype(np.float32, copy=False)
        return _of_fixed(data, name, fixed)
    header = volume_without_values(image, spatial, name)
    grid, affine = grid_of(header), header.affine
    data = read_data(image, name).astype(np.float32, copy=False).reshape(*spatial, 3)
    if found == "voxel" and fixed is not None and (off := _difference(grid, grid_of(fixed))):
        raise GeometryError(
            f"{name} is in voxels of its own grid, and {fixed.name} is another: {off}",
            "give the fixed image that it was made for, or write the warp as itk or ras, which any "
            "grid inside can use",
        )
    _check_displacement(data, np.eye(3) if found == "voxel" else affine[:3, :3], name)
    return Warp(_in_ras_mm(data, found, affine), header)


def _read_npz(path: Path, fixed: Volume | None) -> Warp:
    check_file(path)
    name = str(path)
    if fixed is None:
        raise _without_fixed(name)
    wanted = int(np.prod(fixed.shape)) * 3
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {each.filename: each.file_size for each in archive.infolist()}
        if len(sizes) != 1:
            raise ImageError(
                f"{name} holds {len(sizes)} arrays, expected 1", "keep the displacement alone"
            )
        # Before it is unpacked: what is small in the file may be endless in memory.
        if next(iter(sizes.values())) > 16 * wanted + 4096:
            raise _of_another_shape(name, "more numbers than that", fixed)
        with np.load(path) as arrays:
            data = arrays[next(iter(arrays))]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"{name} is truncated or damaged: {error}", "make it again") from None
    if not isinstance(data, np.ndarray) or data.dtype.kind not in "iuf":
        raise ImageError(f"{name} holds no array of numbers", "make it again")
    return _of_fixed(data.astype(np.float32, copy=False), name, fixed)


def _of_fixed(data: NDArray[np.float32], name: str, fixed: Volume | None) -> Warp:
    """Learn2Reg's numbers, which lie on the fixed image's grid whatever their header says."""
    if fixed is None:
        raise _without_fixed(name)
    if data.shape != (*fixed.shape, 3):
        raise _of_another_shape(name, "x".join(map(str, data.shape)), fixed)
    _check_displacement(data, np.eye(3), name)
    return Warp(_in_ras_mm(data, "l2r", fixed.affine), fixed, grid_of(fixed))


def _without_fixed(name: str) -> UsageError:
    return UsageError(
        f"{name} is in voxels of the fixed image, which is not given", "read it with fixed="
    )


def _of_another_shape(name: str, shape: str, fixed: Volume) -> GeometryError:
    return GeometryError(
        f"{name} has size {shape}, expected {'x'.join(map(str, fixed.shape))}x3, the grid of "
        f"{fixed.name}",
        "give the fixed image that the warp was made for; mind the order of the axes",
    )


def _difference(grid: Grid, expected: Grid) -> str:
    """How ``grid`` differs from ``expected``, in words; nothing where it does not."""
    if grid.shape != expected.shape:
        return " voxels instead of ".join("x".join(map(str, g.shape)) for g in (grid, expected))
    gap = gap_mm(grid, expected)
    return "" if gap == 0 else f"they lie up to {gap:.3g} mm apart"


def _check_displacement(data: NDArray[np.float32], unit: NDArray[Any], name: str) -> None:
    """Refuse NaN, Inf, and positions instead of displacements.

    ``unit`` (3, 3): a step of one voxel along each axis, in the file's unit.
    """
    if not np.isfinite(data).all():
        raise ImageError(f"{name} has NaN or Inf displacements", "make it again")
    per_voxel = np.stack(
        [
            (data.take(-1, axis).mean((0, 1)) - data.take(0, axis).mean((0, 1))) / (n - 1)
            for axis, n in enumerate(data.shape[:3])
        ],
        axis=1,
    )
    slope = np.abs(per_voxel @ np.linalg.inv(unit))
    diagonal = np.diag(slope)
    if (diagonal > ABSOLUTE_SLOPE).all() and (slope - np.diag(diagonal) < ABSOLUTE_REST).all():
        raise ImageError(
            f"{name} holds positions, as SPM's y_ files do, expected displacements",
            "subtract each voxel's own position first, e.g. with mri_warp_convert --inspm",
        )


def _in_ras_mm(data: NDArray[np.float32], fmt: WarpFormat, affine: NDArray[Any]) -> Displacement:
    if fmt == "itk":
        return data * LPS_SIGNS
    if fmt in VOXEL_FORMATS:
        return np.asarray(data @ affine[:3, :3].T.astype(np.float32))
    return data
