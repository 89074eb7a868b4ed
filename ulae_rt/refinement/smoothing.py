"""Gaussian smoothing of displacements."""

import torch
from torch import Tensor

from ulae_rt.kernels._separable import along_axes

# Three standard deviations hold 99.7 % of a Gaussian.
_REACH = 3.0


class Gaussian:
    """Smooths (B, C, D, H, W) by a Gaussian along each axis, cut off at three ``sigma``.

    Every row is normalised, so that a constant stays what it is up to the border.

    Args:
        sigma: voxels; 0 changes nothing.
        sizes: (D, H, W) of what will be smoothed.
        like: type and device.
    """

    def __init__(self, sigma: float, sizes: torch.Size | tuple[int, ...], like: Tensor) -> None:
        self._matrices = [_band(sigma, size, like) for size in sizes] if sigma else []

    def __call__(self, field: Tensor) -> Tensor:
        """The field smoothed, in a new tensor; the field itself where sigma is 0."""
        return along_axes(field, *self._matrices) if self._matrices else field


def _band(sigma: float, size: int, like: Tensor) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    distance = (index[:, None] - index).abs()
    weights = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance <= max(1.0, _REACH * sigma))
    return (weights / weights.sum(dim=1, keepdim=True)).to(like)
