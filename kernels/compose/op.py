"""The public ``compose``."""

from torch import Tensor

from ulae_rt.kernels._check import check_displacement
from ulae_rt.kernels.compose.reference import compose_reference


def compose(disp_a: Tensor, disp_b: Tensor) -> Tensor:
    """The displacement that warps first by ``disp_a``, then by ``disp_b``.

        out(p) = disp_a(p + disp_b(p)) + disp_b(p)

    so that ``warp(warp(x, disp_a), disp_b)`` is ``warp(x, out)`` with one interpolation of x.
    ``disp_a`` is zero outside its volume.

    Args:
        disp_a: (B, 3, D, H, W), voxels, components in (d, h, w) order.
        disp_b: the same shape and order.

    Returns:
        (B, 3, D, H, W).

    Raises:
        ShapeError: if the shapes differ or there are not 3 components.
        DtypeError: if either is not of a floating type.

    Source: ULAE-net, Eq. 2.
    """
    check_displacement("compose", "disp_a", disp_a)
    check_displacement("compose", "disp_b", disp_b, like=disp_a)
    return compose_reference(disp_a, disp_b)
