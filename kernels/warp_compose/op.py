"""The public ``warp_compose``."""

from torch import Tensor

from ulae_rt.kernels._check import check_displacement, check_volume
from ulae_rt.kernels.warp_compose.reference import warp_compose_reference


def warp_compose(image: Tensor, disp_a: Tensor, disp_b: Tensor) -> tuple[Tensor, Tensor]:
    """Warp an image and carry a displacement through the same sampling points.

        (warp(image, disp_b), compose(disp_a, disp_b))

    Args:
        image: (B, C, D, H, W).
        disp_a: (B, 3, D, H, W), voxels, components in (d, h, w) order.
        disp_b: the same shape and order.

    Returns:
        (B, C, D, H, W) and (B, 3, D, H, W).

    Raises:
        ShapeError: if a batch or grid differs, or a displacement has not 3 components.
        DtypeError: if one is not of a floating type.

    Source: ULAE-net, Eq. 2: M_2 and Phi_2 are sampled at the same points.
    """
    check_volume("warp_compose", "image", image)
    check_displacement("warp_compose", "disp_a", disp_a, like=image)
    check_displacement("warp_compose", "disp_b", disp_b, like=image)
    return warp_compose_reference(image, disp_a, disp_b)
