"""Specification of ``warp``: trilinear sampling in plain torch, any device and float type."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.kernels.resize.reference import resize_displacement_reference

_MODES = {"linear": "bilinear", "nearest": "nearest"}


def sampling_grid(disp: Tensor) -> Tensor:
    """The points ``p + disp(p)`` in grid_sample's normalised coordinates.

    Voxel x of an axis of S voxels is ``(2 x + 1) / S - 1`` there (``align_corners=False``), which,
    unlike ``2 x / (S - 1) - 1``, is also defined for an axis of one voxel and costs no accuracy.

    Args:
        disp: (B, 3, D, H, W), voxels, components in (d, h, w) order, float32 or float64.

    Returns:
        (B, D, H, W, 3), components in (w, h, d) order.
    """
    columns = []
    for axis, size in enumerate(disp.shape[2:]):
        index = torch.arange(size, dtype=disp.dtype, device=disp.device)
        centre = ((2 * index + 1) / size - 1).view([-1 if i == axis else 1 for i in range(3)])
        columns.append(torch.add(centre, disp[:, axis], alpha=2 / size))
    return torch.stack(columns[::-1], dim=-1)


def sample(image: Tensor, grid: Tensor, padding: str, mode: str) -> Tensor:
    """grid_sample, with the work split over the CPU's threads.

    torch parallelises grid_sample over the batch only; slabs of the grid become a batch that
    shares one image (two cores, 160x192x160: 255 ms to 149 ms). An exported graph has no slabs:
    other runtimes split the work themselves, and it must not depend on the exporting machine's
    cores.
    """
    batch, depth = grid.shape[:2]
    split = image.device.type == "cpu" and batch == 1 and not torch.compiler.is_exporting()
    slabs = torch.get_num_threads() if split else 1
    while depth % slabs:
        slabs -= 1
    if slabs > 1:
        image = image.expand(slabs, -1, -1, -1, -1)
        grid = grid.reshape(slabs, depth // slabs, *grid.shape[2:])
    out = F.grid_sample(image, grid, _MODES[mode], padding, align_corners=False)
    if slabs > 1:
        out = out.transpose(0, 1).reshape(1, out.shape[1], depth, *out.shape[3:])
    return out


def warp_reference(
    image: Tensor, disp: Tensor, *, padding: str, mode: str, factor: int = 1
) -> Tensor:
    """``out(p) = image(p + disp(p))``; see :func:`ulae_rt.kernels.warp` for the contract."""
    accumulate = torch.promote_types(torch.promote_types(image.dtype, disp.dtype), torch.float32)
    grid = sampling_grid(resize_displacement_reference(disp.to(accumulate), factor))
    return sample(image.to(accumulate), grid, padding, mode).to(image.dtype)
