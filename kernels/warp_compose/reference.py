"""Specification of ``warp_compose`` in plain torch."""

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels.resize.reference import resize_displacement_reference
from ulae_rt.kernels.warp.reference import sample, sample_slices, sampling_grid


def warp_compose_reference(
    image: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int = 1
) -> tuple[Tensor, Tensor]:
    """``(warp(image, disp_b), compose(disp_a, disp_b))`` from one set of sampling points."""
    accumulate = torch.promote_types(torch.promote_types(image.dtype, disp_b.dtype), torch.float32)
    disp_b = resize_displacement_reference(disp_b, factor)
    if _launch.arranged_for_cpu(image, disp_a, disp_b):
        return sample_slices(image, disp_b), sample_slices(disp_a, disp_b) + disp_b
    grid = sampling_grid(disp_b.to(accumulate))
    warped = sample(image.to(accumulate), grid, "zeros", "linear").to(image.dtype)
    carried = sample(disp_a.to(accumulate), grid, "zeros", "linear").to(disp_a.dtype)
    return warped, carried + disp_b
