"""The public ``warp``."""

from torch import Tensor

from ulae_rt.kernels._check import check_backend, check_choice, check_displacement, check_volume
from ulae_rt.kernels.warp.reference import warp_reference

PADDINGS = ("zeros", "border")
MODES = ("linear", "nearest")


def warp(image: Tensor, disp: Tensor, padding: str = "zeros", mode: str = "linear") -> Tensor:
    """Sample ``image`` at ``p + disp(p)``.

        out[b, c, p] = sum over q of image[b, c, q] * prod_i max(0, 1 - |p_i + disp_i(p) - q_i|)

    Args:
        image: (B, C, D, H, W), any floating type.
        disp: (B, 3, D, H, W), voxels, components in (d, h, w) order, any floating type.
        padding: what lies outside the volume: ``zeros``, or ``border`` (the nearest voxel of it).
        mode: ``linear``, or ``nearest`` for label maps (no gradient to ``disp``).

    Returns:
        (B, C, D, H, W) in ``image``'s type; computed in float32, or float64 when either is.

    Raises:
        ShapeError: if the batch or grid of ``disp`` differs, or it has not 3 components.
        DtypeError: if either is not of a floating type.
        UsageError: for another ``padding`` or ``mode``.

    Source: ULAE-net, the operation "∘" of Eq. 2; SpatialTransformer in ULAE/ULAE.py at ac89ce5.
    """
    check_backend()
    check_volume("warp", "image", image)
    check_displacement("warp", "disp", disp, like=image)
    check_choice("warp", "padding", padding, PADDINGS)
    check_choice("warp", "mode", mode, MODES)
    return warp_reference(image, disp, padding=padding, mode=mode)
