"""Specification of ``diffusion`` in plain torch."""

import torch
from torch import Tensor


def diffusion_reference(disp: Tensor) -> Tensor:
    """A third of the summed mean squared forward differences; see the public ``diffusion``."""
    disp = disp.to(torch.promote_types(disp.dtype, torch.float32))
    total = disp.new_zeros(())
    for axis in (2, 3, 4):
        steps = disp.diff(dim=axis)
        # Not mean(): of no differences at all that is NaN.
        total = total + steps.square().sum() / max(steps.numel(), 1)
    return total / 3


def diffusion_gradient_reference(disp: Tensor, weight: float) -> Tensor:
    """Gradient of ``weight`` times :func:`diffusion_reference`, in ``disp``'s type.

    Each difference pulls its two ends towards each other.
    """
    wide = disp.to(torch.promote_types(disp.dtype, torch.float32))
    grad = torch.zeros_like(wide)
    for axis in (2, 3, 4):
        steps = wide.diff(dim=axis)
        size = steps.shape[axis]
        pull = steps * (2 * weight / (3 * max(steps.numel(), 1)))
        grad.narrow(axis, 0, size).sub_(pull)
        grad.narrow(axis, 1, size).add_(pull)
    return grad.to(disp.dtype)
