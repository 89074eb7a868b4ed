"""Specification of ``lncc`` and ``multi_window_lncc`` in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _axis_sums(x: Tensor, window: int, axis: int) -> Tensor:
    """Sums of ``window`` neighbours along one spatial axis, zero outside."""
    radius = window // 2
    size = x.shape[axis]
    padded = F.pad(x, [0, 0] * (4 - axis) + [radius, radius])
    out = padded.narrow(axis, 0, size).clone()
    for offset in range(1, window):
        out += padded.narrow(axis, offset, size)
    return out


class _BoxSum(torch.autograd.Function):
    """Sum over a window^3 box with zero padding.

    Three passes of shifted additions: no running sum, so no drift, and no window^3 convolution.
    The box is symmetric, so the adjoint is the operation itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: int) -> Tensor:
        ctx.window = window
        for axis in (2, 3, 4):
            x = _axis_sums(x, window, axis)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return box_sum(grad, ctx.window), None


def box_sum(x: Tensor, window: int) -> Tensor:
    """(B, C, D, H, W) to the same shape: the sum over a window^3 box, zero outside."""
    total: Tensor = _BoxSum.apply(x, window)
    return total


def multi_window_lncc_reference(
    x: Tensor, y: Tensor, *, windows: Sequence[int], eps: float
) -> Tensor:
    """(K,) means of cc; see :func:`ulae_rt.kernels.multi_window_lncc` for the contract."""
    accumulate = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(accumulate), y.to(accumulate)
    channels = x.shape[1]
    moments = torch.cat((x, y, x * y, x * x, y * y), dim=1)
    means = []
    for window in windows:
        n = window**3
        s_x, s_y, s_xy, s_xx, s_yy = box_sum(moments, window).split(channels, dim=1)
        cross = s_xy - s_x * s_y / n
        # Only rounding makes a variance negative, or X^2 larger than V_x V_y (Cauchy-Schwarz).
        # Left alone, the one would bring the denominator to zero, and the other, over a variance
        # that rounding took away, would give a cc of millions.
        var_x = (s_xx - s_x * s_x / n).clamp_min(0)
        var_y = (s_yy - s_y * s_y / n).clamp_min(0)
        product = var_x * var_y
        means.append((torch.minimum(cross * cross, product) / (product + eps)).mean())
    return torch.stack(means)
