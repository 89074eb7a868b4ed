"""What a caller may give as a scan: a path, an image in memory, an array with its affine."""

import logging
import os
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.arguments import PathLike, path_of
from ulae_rt.errors import UsageError
from ulae_rt.imaging.nifti import (
    Kind,
    Volume,
    read_volume,
    volume_from_array,
    volume_from_image,
)

logger = logging.getLogger(__name__)

Scan = PathLike | Volume | nib.Nifti1Image | tuple[NDArray[Any], NDArray[Any]]


def as_volume(scan: Scan, name: str, kind: Kind = "image") -> Volume:
    """Read or check one input of a registration; ``name`` is for messages about arrays."""
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | os.PathLike):
        return read_volume(path_of(scan, name), kind=kind)
    if isinstance(scan, tuple):
        if len(scan) != 2:
            raise UsageError(
                f"{name} is a tuple of {len(scan)}, expected (array, affine)",
                "give a path, a nibabel image, or (array, affine)",
            )
        return volume_from_array(*scan, name=name, kind=kind)
    anything: Any = scan
    if anything is None or isinstance(anything, np.ndarray):
        raise UsageError(
            f"{name} is {'nothing' if anything is None else 'an array alone'}, expected a scan",
            "give a path, a nibabel image, or (array, affine) with the affine to RAS mm",
        )
    return volume_from_image(scan, name=name, kind=kind)


def warn_same(moving: Volume, fixed: Volume) -> None:
    """Say so if a pair is one image twice."""
    same_file = moving.path is not None and fixed.path is not None
    same_file = same_file and os.path.samefile(str(moving.path), str(fixed.path))
    if same_file or (
        moving.shape == fixed.shape
        and np.array_equal(moving.affine, fixed.affine)
        and np.array_equal(moving.data, fixed.data)
    ):
        logger.warning("moving and fixed are the same image: there is nothing to align")
