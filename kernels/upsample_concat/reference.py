"""Specification of ``upsample_concat`` in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.kernels import _launch


def upsample_concat_reference(x: Tensor, skip: Tensor) -> Tensor:
    """``x`` at twice its size, then ``skip``, along the channels; see the public function."""
    if _launch.arranged_for_cpu(x, skip):
        return _upsample_into_concatenation(x, skip)
    fine = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
    return torch.cat((fine, skip), dim=1)


def _upsample_into_concatenation(x: Tensor, skip: Tensor) -> Tensor:
    """One axis after the other, the last pass into its place: there is no upsampled tensor.

    16 + 2 channels to 160x192x160, two thirds of the time and half the memory of its own. In half
    precision each pass rounds.
    """
    batch, channels = x.shape[:2]
    out = _features((batch, channels + skip.shape[1], *skip.shape[2:]), x)
    out[:, channels:].copy_(skip)
    for axis in (4, 3):
        shape = list(x.shape)
        shape[axis] *= 2
        x = _upsample_axis(x, axis, _features(shape, x))
    _upsample_axis(x, 2, out[:, :channels])
    return out


def _features(shape: list[int] | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last_3d)


def _upsample_axis(x: Tensor, axis: int, out: Tensor) -> Tensor:
    """``x`` at twice the size of one axis, written to ``out``."""
    size = x.shape[axis]
    even, odd = out.unflatten(axis, (size, 2)).unbind(axis + 1)
    upper, lower = x.narrow(axis, 1, size - 1), x.narrow(axis, 0, size - 1)
    torch.lerp(upper, lower, 0.25, out=even.narrow(axis, 1, size - 1))
    torch.lerp(lower, upper, 0.25, out=odd.narrow(axis, 0, size - 1))
    even.select(axis, 0).copy_(x.select(axis, 0))
    odd.select(axis, size - 1).copy_(x.select(axis, size - 1))
    return out
