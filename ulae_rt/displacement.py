"""Displacements between a grid and that of the means over its blocks."""

from torch import Tensor
from torch.nn import functional as F


def upsample_displacement(disp: Tensor, factor: int) -> Tensor:
    """A displacement on a grid of averaged blocks, brought to the voxels that were averaged.

    (B, 3, D, H, W) in coarse voxels to (B, 3, f D, f H, f W) in fine ones; the centre of a block
    lies between its voxels, hence ``align_corners=False``.
    """
    if factor == 1:
        return disp
    return F.interpolate(
        factor * disp, scale_factor=float(factor), mode="trilinear", align_corners=False
    )


def pool_displacement(disp: Tensor, factor: int) -> Tensor:
    """The reverse: the mean over each block of ``factor`` voxels an edge, in coarse voxels."""
    return disp if factor == 1 else F.avg_pool3d(disp, factor) / factor
