"""Where SimpleITK and its LPS world are met: grids, images and transforms, there and back."""

from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.imaging.grid import LPS, Affine


def to_sitk(data: NDArray[Any], affine: Affine) -> sitk.Image:
    """An ITK image (LPS) of ``data`` (X, Y, Z), or (X, Y, Z, 3) for a vector image."""
    is_vector = data.ndim == 4
    axes = (2, 1, 0, 3) if is_vector else (2, 1, 0)
    image = sitk.GetImageFromArray(data.transpose(axes), isVector=is_vector)
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


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
