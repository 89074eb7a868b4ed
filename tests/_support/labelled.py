"""A pair of small heads with label maps, whose right displacement is known."""

from pathlib import Path

import nibabel as nib
import numpy as np

from _support.brains import grid_affine, world
from ulae_rt.batching.pairs import Pair

# Where the moving head lies when the fixed one lies at 0, RAS mm.
SHIFT = np.array([2.0, -1.0, 3.0])
MOVING = grid_affine((26, 30, 24), codes="LIA", centre=(2, -1, 3))
FIXED = grid_affine((22, 18, 14), (1, 1.4, 1.7), "PSR", (15, -10, 20))


def head(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness and labels of a head about 0: four quarters (1 to 4) around a core (9)."""
    x, y, z = np.moveaxis(points, -1, 0)
    inside = (x / 9) ** 2 + (y / 10) ** 2 + (z / 8) ** 2 < 1
    core = (x / 4) ** 2 + (y / 4) ** 2 + (z / 3) ** 2 < 1
    labels = np.where(core, 9, 1 + (x > 0) + 2 * (y > 0)) * inside
    return (labels * 20 + 30 * inside).astype(np.float32), labels.astype(np.int16)


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    """Write an image with both of its forms."""
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def labelled_pair(folder: Path, name: str = "a") -> Pair:
    """The head on two grids, the moving one `SHIFT` further in the world."""
    paths = {}
    for role, (shape, affine), shift in (("moving", MOVING, SHIFT), ("fixed", FIXED, 0)):
        image, labels = head(world(shape, affine) - shift)
        paths[role] = save(folder / f"{name}_{role}.nii.gz", image, affine)
        paths[f"{role}_labels"] = save(folder / f"{name}_{role}_labels.nii.gz", labels, affine)
    return Pair(name, **paths)
