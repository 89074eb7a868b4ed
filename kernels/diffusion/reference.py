"""Specification of ``diffusion`` in plain torch."""

import torch
from torch import Tensor


def diffusion_reference(disp: Tensor) -> Tensor:
    """A third of the summed mean squared forward differences; see the public ``diffusion``."""
    disp = disp.to(torch.promote_types(disp.dtype, torch.float32))
    total = disp.new_zeros(())
    for axis in (2, 3, 4):
        if disp.shape[axis] > 1:
            total = total + disp.diff(dim=axis).square().mean()
    return total / 3
