"""Warp files: one displacement, in the three ways that other tools read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import ImageError, UsageError
from ulae_rt.imaging.nifti import (
    Outputs,
    PathLike,
    Volume,
    checked_affine,
    image_on_grid,
    open_image,
    read_data,
    save_image,
)
from ulae_rt.imaging.transform import LPS_SIGNS, Displacement

WarpFormat = Literal["itk", "ras", "voxel"]
WARP_FORMATS: tuple[WarpFormat, ...] = get_args(WarpFormat)

INTENT_VECTOR = 1007  # 1006 (DISPVECT) would make ITK flip x and y on reading
# How a 4-D file says which of the two it is; nothing in NIfTI's own codes does.
INTENT_NAMES = {"ras": "disp-ras-mm", "voxel": "disp-voxel"}


@dataclass(frozen=True)
class Warp:
    """A displacement on the fixed image's grid.

    Attributes:
        disp: (X, Y, Z, 3) float32, RAS mm: the fixed point x comes from the moving point
            x + disp(x), the affine included.
        grid: the fixed image, for its grid and header; its values are not used.
    """

    disp: Displacement
    grid: Volume

    def save(self, path: PathLike, fmt: WarpFormat = "itk", *, overwrite: bool = False) -> None:
        """Write a warp file; see `warp_to_image` for the formats."""
        with Outputs([path], overwrite=overwrite) as outputs:
            save_image(warp_to_image(self.disp, self.grid, fmt), outputs.temporary(path))
            outputs.commit()


def write_warp(path: PathLike, disp: Displacement, fixed: Volume, fmt: WarpFormat = "itk") -> None:
    """Write ``disp`` (X, Y, Z, 3), RAS mm on ``fixed``'s grid; see `warp_to_image`."""
    Warp(disp, fixed).save(path, fmt, overwrite=True)


def warp_to_image(disp: Displacement, fixed: Volume, fmt: WarpFormat = "itk") -> nib.Nifti1Image:
    """A displacement as a NIfTI image on the fixed grid, float32.

    - ``itk``: 5-D (X, Y, Z, 1, 3), intent 1007, LPS mm: ITK, ANTs, Slicer, FireANTs.
    - ``ras``: 4-D (X, Y, Z, 3), RAS mm: FreeSurfer's disp-ras, SynthMorph, NiftyReg.
    - ``voxel``: 4-D (X, Y, Z, 3), voxels of the fixed grid, component c along array axis c, as
      Learn2Reg and VoxelMorph have it: fixed voxel i comes from i + v(i), an index into the
      fixed grid extended over the moving image's world, v = S^-1 disp with S the grid's 3 x 3.

    sform and qform are both the affine that was used, so that no reader can take another.
    """
    if fmt == "itk":
        values = (disp * LPS_SIGNS)[:, :, :, None, :]
    elif fmt == "ras":
        values = disp
    elif fmt == "voxel":
        inverse = np.linalg.inv(fixed.affine[:3, :3]).astype(np.float32)
        values = disp @ inverse.T
    else:
        raise UsageError(
            f"warp format is {fmt!r}, expected one of {', '.join(WARP_FORMATS)}", "see -h"
        )
    image = image_on_grid(values, fixed, fixed.affine)
    if fmt == "itk":
        image.header.set_intent(INTENT_VECTOR, allow_unknown=True)
    else:
        image.header.set_intent("none", name=INTENT_NAMES[fmt])
    return image


def read_warp(path: PathLike, fmt: WarpFormat | None = None) -> Warp:
    """Read a warp file.

    Args:
        path: a 5-D ITK or 4-D NIfTI displacement.
        fmt: needed for a 4-D file that another tool wrote, which does not say its unit.

    Raises:
        ImageError: not a displacement, or damaged.
        UsageError: a 4-D file without ``fmt``, or another format than ``fmt`` says.
    """
    image = open_image(path)
    name, shape = str(path), image.shape
    is_itk = len(shape) == 5 and shape[3:] == (1, 3)
    if not is_itk and not (len(shape) == 4 and shape[3] == 3):
        raise ImageError(
            f"{name} has size {'x'.join(map(str, shape))}, expected XxYxZx1x3 or XxYxZx3",
            "give a dense displacement in NIfTI, as register -w writes",
        )
    intent = int(image.header["intent_code"])
    if is_itk and intent != INTENT_VECTOR:
        raise ImageError(
            f"{name} has intent {intent}, expected {INTENT_VECTOR} (vector)",
            "other tools read it otherwise; write it again from the tool that made it",
        )
    stored = image.header.get_intent()[2]
    known: dict[str, WarpFormat] = {"disp-ras-mm": "ras", "disp-voxel": "voxel"}
    found = "itk" if is_itk else known.get(stored, fmt)
    if found is None:
        raise UsageError(f"{name} does not say its unit", "say whether it is 'ras' or 'voxel'")
    if fmt is not None and fmt != found:
        raise UsageError(f"{name} is a warp of format {found}, not {fmt}", "leave the format out")
    affine = checked_affine(image, name)
    data = read_data(image, name).astype(np.float32, copy=False).reshape(*shape[:3], 3)
    if not np.isfinite(data).all():
        raise ImageError(f"{name} has NaN or Inf displacements", "make it again")
    grid = Volume(np.broadcast_to(np.uint8(0), shape[:3]), affine, image.header, name, Path(path))
    return Warp(_in_ras_mm(data, found, affine), grid)


def _in_ras_mm(data: NDArray[np.float32], fmt: WarpFormat, affine: NDArray[Any]) -> Displacement:
    if fmt == "itk":
        return data * LPS_SIGNS
    if fmt == "voxel":
        return np.asarray(data @ affine[:3, :3].T.astype(np.float32))
    return data
