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

from ulae_rt.arguments import PathLike, check_choice, path_of
from ulae_rt.errors import GeometryError, ImageError, UsageError
from ulae_rt.imaging.grid import LPS_SIGNS, Displacement, Grid, gap_mm, grid_of
from ulae_rt.imaging.nifti import (
    SUFFIXES,
    Outputs,
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

WarpFormat = Literal["itk", "ras", "voxel", "l2r"]
WARP_FORMATS: tuple[WarpFormat, ...] = get_args(WarpFormat)
# In voxels of one grid, which the reader has to know.
VOXEL_FORMATS: tuple[WarpFormat, ...] = ("voxel", "l2r")
NPZ = ".npz"

INTENT_VECTOR = 1007
INTENT_DISPLACEMENT = 1006  # ITK flips x and y of such a file when it reads it
# How a 4-D file says what it is; nothing in NIfTI's own codes does.
INTENT_NAMES: dict[WarpFormat, str] = {
    "ras": "disp-ras-mm", "voxel": "disp-voxel", "l2r": "disp-l2r",
}  # fmt: skip
# FSL's, from nifti1.h's list of intents and warpfns/fnirt_file_reader.cpp: millimetres of its own,
# along the axes of both images, or coefficients.
FSL_INTENTS = {
    2006: "a displacement field", 2007: "coefficients of cubic splines", 2008: "DCT coefficients",
    2009: "coefficients of quadratic splines", 2016: "topup's cubic splines",
    2017: "topup's quadratic splines", 2018: "a topup field",
}  # fmt: skip
# NiftyReg's 5-D files, which have ITK's intent: what intent_p1 counts, and the one that is read.
# Source: github.com/KCL-BMEIS/niftyreg, reg-lib/cpu/_reg_maths.h, NREG_TRANS_TYPE.
NIFTYREG = "NREG_TRANS"
NIFTYREG_KINDS = (
    "positions", "a displacement", "a grid of cubic splines", "a velocity field of positions",
    "a velocity field of displacements", "a velocity grid of splines", "a grid of linear splines",
)  # fmt: skip
NIFTYREG_DISPLACEMENT = 1
SPM = "Mapping"
AFNI_EXTENSION = 4
# A displacement's mean slope: an affine of a brain stays far below 1 on all three axes, and a file
# of positions has 1 on all of them, whatever its unit and its signs.
ABSOLUTE_SLOPE = 0.75
ABSOLUTE_REST = 0.25
# Numbers that lie this near to their own voxels' positions, relative to these, are positions: as a
# displacement they would take each voxel twice as far from the origin, shears and all.
ABSOLUTE_NEAR = 0.25


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
        path = path_of(path)
        suffixes = {path: warp_suffixes(fmt)}
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
    else:
        check_choice("warp format", fmt, WARP_FORMATS)
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
    name = str(path)
    spatial = _checked_field(image, name)
    stored = _stated_format(image, name) or fmt
    if stored is None:
        raise UsageError(
            f"{name} does not say its unit", "say it with --warp-format: ras, voxel or l2r"
        )
    if fmt is not None and fmt != stored:
        raise UsageError(f"{name} is a warp of format {stored}, not {fmt}", "leave the format out")
    if stored == "l2r":
        data = read_data(image, name).astype(np.float32, copy=False)
        return _of_fixed(data, name, fixed)
    header = volume_without_values(image, spatial, name)
    grid, affine = grid_of(header), header.affine
    data = read_data(image, name).astype(np.float32, copy=False).reshape(*spatial, 3)
    if stored == "voxel" and fixed is not None and (off := _difference(grid, grid_of(fixed))):
        raise GeometryError(
            f"{name} is in voxels of its own grid, and {fixed.name} is another: {off}",
            "give the fixed image that it was made for, or write the warp as itk or ras, which any "
            "grid inside can use",
        )
    unit = np.eye(3) if stored == "voxel" else affine[:3, :3]
    _check_displacement(data, unit, affine, name)
    return Warp(_in_ras_mm(data, stored, affine), header)


def stated_format(path: PathLike) -> WarpFormat | None:
    """The format that a warp file says it has; None where it has to be told.

    Raises:
        ImageError: no warp file, or of a tool whose numbers are others; see `read_warp`.
    """
    if str(path).lower().endswith(NPZ):
        return "l2r"
    image = open_image(path)
    _checked_field(image, str(path))
    return _stated_format(image, str(path))


_DENSE = "give a dense displacement in NIfTI, as register -w writes"


def _checked_field(image: nib.Nifti1Image, name: str) -> tuple[int, int, int]:
    """The grid's shape; refuses files that hold no field of displacements by their header."""
    shape, header = image.shape, image.header
    intent = int(header["intent_code"])
    if intent in FSL_INTENTS:
        raise ImageError(
            f"{name} is a file of FSL's: {FSL_INTENTS[intent]} (intent {intent}), in millimetres "
            "that depend on both images",
            "make it ITK's: wb_command -convert-warpfield -from-fnirt FIELD SOURCE -to-itk "
            "warp.nii.gz (add -absolute where it is; of coefficients, FIELD is what fnirtfileutils "
            "--in=COEFFICIENTS --ref=REFERENCE --out=FIELD --withaff writes)",
        )
    if not (len(shape) == 5 and shape[3:] == (1, 3)) and not (len(shape) == 4 and shape[3] == 3):
        raise ImageError(
            f"{name} has size {'x'.join(map(str, shape))}, expected XxYxZx1x3 or XxYxZx3",
            _DENSE,
        )
    if (kind := image.get_data_dtype()).kind not in "iuf":
        raise ImageError(
            f"{name} holds {'colours' if kind.names else kind.name}, expected a displacement's "
            "numbers",
            _DENSE,
        )
    return checked_shape(shape[:3], name)


def _stated_format(image: nib.Nifti1Image, name: str) -> WarpFormat | None:
    """What a field's header says its numbers are; refuses those of tools that count otherwise."""
    header = image.header
    intent, stored = int(header["intent_code"]), header.get_intent()[2]
    if stored == NIFTYREG:
        kind = float(header["intent_p1"])
        if kind == NIFTYREG_DISPLACEMENT:
            return "ras"
        kinds: dict[float, str] = dict(enumerate(NIFTYREG_KINDS))
        raise ImageError(
            f"{name} is a file of NiftyReg's that holds "
            f"{kinds.get(kind, 'what is unknown here')} (intent_p1 {kind:g}), expected "
            f"{NIFTYREG_KINDS[NIFTYREG_DISPLACEMENT]} (intent_p1 {NIFTYREG_DISPLACEMENT})",
            "make it one: reg_transform -ref FIXED -disp IN OUT",
        )
    if stored == SPM:
        raise _positions(name)
    if len(image.shape) == 4:
        return {text: fmt for fmt, text in INTENT_NAMES.items()}.get(stored)
    if intent == INTENT_VECTOR:
        return "itk"
    if any(extension.get_code() == AFNI_EXTENSION for extension in header.extensions):
        raise ImageError(
            f"{name} is a file of AFNI's with intent {intent}, expected {INTENT_VECTOR} (vector)",
            "3dQwarp's numbers are ITK's, LPS mm: give it that intent, e.g. nifti_tool -mod_hdr "
            f"-mod_field intent_code {INTENT_VECTOR} -prefix warp.nii.gz -infiles IN",
        )
    flipped = " which ITK reads with x and y flipped," if intent == INTENT_DISPLACEMENT else ""
    raise ImageError(
        f"{name} has intent {intent},{flipped} expected {INTENT_VECTOR} (vector)",
        "other tools read it otherwise; write it again from the tool that made it",
    )


def _positions(name: str) -> ImageError:
    return ImageError(
        f"{name} holds positions, as SPM's y_ files do, expected displacements",
        "subtract each voxel's own position first, e.g. with mri_warp_convert --inspm",
    )


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
    with np.errstate(over="ignore"):  # what overflows becomes Inf, which is refused by name
        data = data.astype(np.float32, copy=False)
    return _of_fixed(data, name, fixed)


def _of_fixed(data: NDArray[np.float32], name: str, fixed: Volume | None) -> Warp:
    """Learn2Reg's numbers, which lie on the fixed image's grid whatever their header says."""
    if fixed is None:
        raise _without_fixed(name)
    if data.shape != (*fixed.shape, 3):
        raise _of_another_shape(name, "x".join(map(str, data.shape)), fixed)
    _check_displacement(data, np.eye(3), fixed.affine, name)
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


def _check_displacement(
    data: NDArray[np.float32], unit: NDArray[Any], affine: NDArray[Any], name: str
) -> None:
    """Refuse NaN, Inf, and positions instead of displacements.

    Args:
        data: (X, Y, Z, 3), the numbers of the file.
        unit: (3, 3), a step of one voxel along each axis, in the file's unit.
        affine: (4, 4), of the grid, voxel index to RAS mm.
        name: for messages.
    """
    if not np.isfinite(data).all():
        raise ImageError(f"{name} has NaN or Inf displacements", "make it again")
    per_voxel = np.stack(
        [
            (
                data.take(-1, axis).mean((0, 1), np.float64)
                - data.take(0, axis).mean((0, 1), np.float64)
            )
            / (n - 1)
            for axis, n in enumerate(data.shape[:3])
        ],
        axis=1,
    )
    slope = np.abs(per_voxel @ np.linalg.inv(unit))
    diagonal = np.diag(slope)
    if (diagonal > ABSOLUTE_SLOPE).all() and (slope - np.diag(diagonal) < ABSOLUTE_REST).all():
        raise _positions(name)
    if _near_own_positions(data, affine):
        raise _positions(name)


def _near_own_positions(data: NDArray[np.float32], affine: NDArray[Any]) -> bool:
    """Whether the numbers are the voxels' own positions, nearly, whatever unit they are said to be.

    In millimetres of RAS or LPS, in voxels counted from 0 or 1, or in millimetres along the grid's
    axes. The slope alone does not show it where the unit is not the one that was said, nor in a
    crop whose deformation is steep.
    """
    picks = [np.unique(np.linspace(0, n - 1, min(n, 9)).astype(int)) for n in data.shape[:3]]
    index = np.stack(np.meshgrid(*picks, indexing="ij"), -1).reshape(-1, 3)
    values = data[tuple(index.T)].astype(np.float64)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for positions in (world, world * LPS_SIGNS, index, index + 1, index * spacing):
        away = np.abs(values - positions).mean(0)
        if (away < ABSOLUTE_NEAR * np.abs(positions).mean(0)).all():
            return True
    return False


def _in_ras_mm(data: NDArray[np.float32], fmt: WarpFormat, affine: NDArray[Any]) -> Displacement:
    if fmt == "itk":
        return data * LPS_SIGNS
    if fmt in VOXEL_FORMATS:
        return np.asarray(data @ affine[:3, :3].T.astype(np.float32))
    return data
