"""Specification of ``resize_displacement`` in plain torch."""

from torch import Tensor
from torch.nn import functional as F


def resize_displacement_reference(disp: Tensor, factor: int) -> Tensor:
    """``factor`` times ``disp`` on a grid ``factor`` times as fine; see the public function."""
    if factor == 1:
        return disp
    return F.interpolate(
        factor * disp, scale_factor=float(factor), mode="trilinear", align_corners=True
    )
