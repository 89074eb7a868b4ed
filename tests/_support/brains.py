"""Brains of any orientation and obliquity, synthetic and real, as NIfTI files."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.ndimage import map_coordinates

# Blobs in RAS mm about the centre: centre, radius, brightness. No two halves are alike.
BLOBS = (
    ((0, 0, 0), (26, 34, 24), 90),
    ((-12, 8, 6), (7, 9, 6), 70),
    ((10, -14, 4), (8, 6, 8), -50),
    ((14, 16, -8), (5, 5, 6), 80),
    ((-8, -20, -10), (9, 5, 4), 60),
    ((2, 4, 15), (5, 12, 5), -45),
)


def brain_at(points: np.ndarray) -> np.ndarray:
    """Brightness (0 to 200) at ``points`` (..., 3), RAS mm; 0 outside the head, smooth inside.

    Its brightest voxels stand out no more than a brain's do.
    """
    values = np.zeros(points.shape[:-1])
    for centre, radius, height in BLOBS:
        distance = (((points - np.array(centre)) / np.array(radius)) ** 2).sum(-1)
        values += height * np.clip(1.2 - distance, 0, 1) ** 0.5
    return 200 * (1 - np.exp(-np.maximum(values, 0) / 60))


def real_brain(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The scan at ``path`` as `brain_at`: the middle of its grid lies at 0.

    The blobs are nearly round; only folds tell a turn of an affine from a stretch.
    """
    scan = nib.load(path)
    data = np.asarray(scan.dataobj, dtype=np.float32)
    to_index = np.linalg.inv(scan.affine)
    centre = centre_of(data.shape, scan.affine)

    def at(points: np.ndarray) -> np.ndarray:
        index = nib.affines.apply_affine(to_index, points + centre)
        return map_coordinates(data, np.moveaxis(index, -1, 0), order=1)

    return at


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """(X, Y, Z, 3) RAS mm of every voxel."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def centre_of(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """RAS mm of the middle of a grid."""
    return nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)


def grid_affine(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1, 1, 1),
    codes: str = "RAS",
    angles_deg: tuple[float, float, float] = (0, 0, 0),
    centre: tuple[float, float, float] = (0, 0, 0),
) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of a grid of RAS size ``shape``, its axes then renamed to ``codes``."""
    rotation = nib.eulerangles.euler2mat(*np.deg2rad(angles_deg)[::-1])
    matrix = rotation @ np.diag(spacing)
    origin = np.array(centre) - matrix @ ((np.array(shape) - 1) / 2)
    affine = nib.affines.from_matvec(matrix, origin)
    change = ornt_transform(io_orientation(np.diag((*spacing, 1))), axcodes2ornt(codes))
    order = np.argsort(change[:, 0])
    return tuple(shape[i] for i in order), affine @ inv_ornt_aff(change, shape)


def save_brain(
    path: Path,
    shape: tuple[int, ...],
    affine: np.ndarray,
    pull: np.ndarray | None = None,
    dtype: type = np.int16,
    brain: Callable[[np.ndarray], np.ndarray] = brain_at,
) -> Path:
    """Write ``brain`` in the centre of a grid.

    ``pull`` (4, 4) takes this file's RAS mm to the RAS mm at which the brain lies about 0.
    """
    points = world(shape, affine)
    if pull is None:
        pull = nib.affines.from_matvec(np.eye(3), -centre_of(shape, affine))
    points = nib.affines.apply_affine(pull, points)
    data = brain(points)
    data = data.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(data).astype(dtype)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


# Orientation, obliquity and anisotropy: what scanners and converters really write.
GEOMETRIES = {
    "RAS": grid_affine((60, 76, 56)),
    "LAS": grid_affine((60, 76, 56), codes="LAS"),
    "LIA": grid_affine((60, 76, 56), codes="LIA"),
    "PSR": grid_affine((60, 76, 56), codes="PSR"),
    "far": grid_affine((60, 76, 56), centre=(-90, -290, 210)),
    "anisotropic": grid_affine((60, 60, 30), (1, 1.3, 2), codes="LPS"),
    "oblique": grid_affine((64, 64, 36), (1, 1.3, 2), angles_deg=(20, -10, 15)),
    "oblique-PIR": grid_affine((64, 64, 36), (1, 1.3, 2), "PIR", (20, -10, 15), (12, -30, 40)),
}
