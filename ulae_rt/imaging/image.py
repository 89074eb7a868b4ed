"""A volume as a tensor on a device: what everything between reading and writing works on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulae_rt.errors import ImageError
from ulae_rt.imaging.grid import Affine, Grid, Interpolation
from ulae_rt.imaging.nifti import Brightness, Volume
from ulae_rt.imaging.transfers import to_device, to_host
from ulae_rt.kernels.sample_world.op import sample_world


@dataclass(frozen=True)
class Image:
    """A volume on a device.

    Its axes are those of the file in the order of memory: the first axis of a tensor is the last
    one of a NIfTI array, so that nothing has to be turned on the way from a file or back to it.

    Attributes:
        voxels: (1, 1, D, H, W); an image's are float32, a label map's have the file's type.
        affine: (4, 4) float64, index (d, h, w) to world RAS mm.
        name: what to call it in a message.
    """

    voxels: Tensor
    affine: Affine
    name: str

    @property
    def grid(self) -> Grid:
        """The grid its voxels lie on."""
        d, h, w = self.voxels.shape[2:]
        return Grid((d, h, w), self.affine)

    @cached_property
    def brightness(self) -> Brightness:
        """Of its voxels above 0; computed when it is first asked for.

        Raises:
            ImageError: there is none.
        """
        brain = self.voxels[self.voxels > 0]
        if brain.numel() == 0:
            raise ImageError(f"{self.name} has no voxel above 0", "check how it was masked")
        places = [1 + int(part * (brain.numel() - 1)) for part in (0.95, 0.999)]
        quantiles = [brain.kthvalue(place).values for place in places]
        return Brightness(*torch.stack([*quantiles, brain.amax()]).tolist())


def image_of(volume: Volume, device: str | torch.device = "cpu") -> Image:
    """A volume of intensities on a device, in float32; it is sent there in the file's type."""
    image = labels_of(volume, device)
    return replace(image, voxels=image.voxels.float())


def labels_of(volume: Volume, device: str | torch.device = "cpu") -> Image:
    """A label map on a device, in the file's type."""
    return Image(in_file_order(volume.data, device), volume.affine[:, [2, 1, 0, 3]], volume.name)


def file_order(grid: Grid) -> Grid:
    """The grid of a NIfTI array as that of its tensor, or the other way."""
    d, h, w = grid.shape
    return Grid((w, h, d), grid.affine[:, [2, 1, 0, 3]])


def in_file_order(data: NDArray[Any], device: str | torch.device = "cpu") -> Tensor:
    """(X, Y, Z) to (1, 1, Z, Y, X) on a device; the same memory where that can be."""
    native = np.asarray(data, data.dtype.newbyteorder("="))
    return to_device(native.transpose(2, 1, 0), device)[None, None]


def as_array(voxels: Tensor) -> NDArray[Any]:
    """(1, 1, D, H, W) on any device to (W, H, D), as `in_file_order` had it."""
    return to_host(voxels[0, 0]).transpose(2, 1, 0)


def bounding_box(mask: Tensor) -> tuple[slice, slice, slice]:
    """The smallest box that holds what a mask (D, H, W) has; all of it where it is empty."""
    ends = []
    for dims in ((1, 2), (0, 2), (0, 1)):
        occupied = mask.any(dims[1]).any(dims[0]).nonzero()
        size = mask.shape[3 - sum(dims)]
        first, stop = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, size)
        ends.append(slice(first, stop))
    return ends[0], ends[1], ends[2]


def matrix_between(
    to: Affine, grid: Grid, transform: Affine | None, device: torch.device
) -> Tensor:
    """(1, 3, 4) float64: from voxels of ``grid`` to voxels of an image with the affine ``to``."""
    world = grid.affine if transform is None else transform @ grid.affine
    return torch.from_numpy((np.linalg.inv(to) @ world)[None, :3]).to(device)


def resample(
    image: Image, grid: Grid, transform: Affine | None = None, interp: Interpolation = "linear"
) -> Tensor:
    """Sample an image on a grid, 0 outside it.

        out[p] = image(transform(grid.affine p))

    Args:
        image: what is sampled.
        grid: where it is sampled.
        transform: (4, 4), grid's RAS mm to the image's RAS mm; the identity by default.
        interp: ``linear``, or ``nearest`` for label maps.

    Returns:
        (1, 1, *grid.shape) in the image's type.
    """
    matrix = matrix_between(image.affine, grid, transform, image.voxels.device)
    return sample_world(image.voxels, matrix, shape=grid.shape, mode=interp)
