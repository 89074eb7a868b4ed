"""The public ``diffusion``."""

from torch import Tensor

from ulae_rt.kernels._check import check_displacement
from ulae_rt.kernels.diffusion.reference import diffusion_reference


def diffusion(disp: Tensor) -> Tensor:
    """Smoothness of a displacement: its mean squared forward differences, averaged over the axes.

        (mean (d_d u)^2 + mean (d_h u)^2 + mean (d_w u)^2) / 3,  d_i u = u(p + e_i) - u(p)

    each mean over the batch, the components and the differences that exist; an axis of one voxel
    adds 0.

    Args:
        disp: (B, 3, D, H, W), voxels.

    Returns:
        A scalar in float32, or float64 for float64 input.

    Raises:
        ShapeError: if there are not 3 components.
        DtypeError: if it is not of a floating type.

    Source: ULAE-net, Eq. 4 as the released code computes it (smoothloss, ULAE/Loss.py at ac89ce5).
    """
    check_displacement("diffusion", "disp", disp)
    return diffusion_reference(disp)
