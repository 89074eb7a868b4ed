"""Specification of ``resize_displacement`` in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.kernels import _launch
from ulae_rt.kernels._separable import along_axes


def resize_displacement_reference(disp: Tensor, factor: int) -> Tensor:
    """``factor`` times ``disp`` on a grid ``factor`` times as fine; see the public function."""
    if factor == 1:
        return disp
    if _launch.arranged_for_cpu(disp) and disp.dtype in (torch.float32, torch.float64):
        return _resize_axes(factor * disp, factor)
    return F.interpolate(
        factor * disp, scale_factor=float(factor), mode="trilinear", align_corners=True
    )


def _resize_axes(x: Tensor, factor: int) -> Tensor:
    """One axis after the other, each a matrix product.

    On two cores up to five times as fast as torch's upsampling, which computes coordinates in
    float32 too: at 160x192x160 they are off by 1e-5 of a coarse voxel, these by nothing.
    """
    along_d, along_h, along_w = (_interpolation(size, factor).to(x.dtype) for size in x.shape[2:])
    return along_axes(x, along_d, along_h, along_w)


def _interpolation(size: int, factor: int) -> Tensor:
    """(factor size, size): linear interpolation with ``align_corners=True``."""
    fine = torch.arange(factor * size, dtype=torch.float64)
    fine = fine * ((size - 1) / max(factor * size - 1, 1))
    return (1 - (fine[:, None] - torch.arange(size)).abs()).clamp_min(0)
