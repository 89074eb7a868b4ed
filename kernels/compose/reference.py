"""Specification of ``compose`` in plain torch."""

from torch import Tensor

from ulae_rt.kernels.resize.reference import resize_displacement_reference
from ulae_rt.kernels.warp.reference import warp_reference


def compose_reference(disp_a: Tensor, disp_b: Tensor, factor: int = 1) -> Tensor:
    """``disp_a(p + disp_b(p)) + disp_b(p)``; see :func:`ulae_rt.kernels.compose`."""
    disp_b = resize_displacement_reference(disp_b, factor)
    return warp_reference(disp_a, disp_b, padding="zeros", mode="linear") + disp_b
