"""Specification of ``lncc`` and ``multi_window_lncc`` in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulae_rt.kernels._separable import along_axes


def box_sum(x: Tensor, window: int) -> Tensor:
    """(B, C, D, H, W) to the same shape: the sum over a window^3 box, zero outside."""
    bands = []
    for size in x.shape[2:]:
        index = torch.arange(size, device=x.device)
        bands.append(((index[:, None] - index).abs() <= window // 2).to(x.dtype))
    return along_axes(x, *bands)


class _Means(torch.autograd.Function):
    """The means, and the gradients of each by both images where they will be asked for.

    A window's sums enter the sum of cc of every voxel around them, and a box is symmetric; so
    with B the sum over a box, and a, v and b what cc changes by with X, V_x and V_y at a voxel,

        d sum(cc) / dx = y B(a) + 2 x B(v) - B(a S_y + 2 v S_x) / n

    and alike by y. Autograd would keep every sum of every window, and find the same in twice the
    time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, windows: Sequence[int], eps: float) -> Tensor:
        need_x, need_y = ctx.needs_input_grad[:2]
        channels = x.shape[1]
        moments = torch.cat((x, y, x * y, x * x, y * y), dim=1)
        means = []
        gradients: tuple[list[Tensor], list[Tensor]] = ([], [])
        for window in windows:
            n = window**3
            s_x, s_y, s_xy, s_xx, s_yy = box_sum(moments, window).split(channels, dim=1)
            cross = s_xy - s_x * s_y / n
            # Only rounding makes a variance negative, or X^2 larger than V_x V_y (Cauchy-Schwarz).
            # Left alone, the one would bring the denominator to zero, and the other, over a
            # variance that rounding took away, would give a cc of millions.
            var_x, var_y = s_xx - s_x * s_x / n, s_yy - s_y * s_y / n
            real_x, real_y = var_x >= 0, var_y >= 0
            var_x, var_y = var_x.clamp_min(0), var_y.clamp_min(0)
            product = var_x * var_y
            square = cross * cross
            below = product + eps
            cc = torch.minimum(square, product) / below
            means.append(cc.mean())
            if not (need_x or need_y):
                continue
            # How much of the minimum is the square: at a tie half of it, as torch has it.
            share = ((square <= product).to(x.dtype) + (square < product).to(x.dtype)) / 2
            by_cross = 2 * cross * share / below / cc.numel()
            by_product = (1 - share - cc) / below / cc.numel()
            for needed, image, other, s_image, s_other, by_var, found in (
                (need_x, x, y, s_x, s_y, by_product * var_y * real_x, gradients[0]),
                (need_y, y, x, s_y, s_x, by_product * var_x * real_y, gradients[1]),
            ):
                if needed:
                    means_part = by_cross * s_other + 2 * by_var * s_image
                    parts = torch.cat((by_cross, by_var, means_part), dim=1)
                    a, v, m = box_sum(parts, window).split(channels, dim=1)
                    found.append(other * a + 2 * image * v - m / n)
        ctx.counts = [len(found) for found in gradients]
        ctx.save_for_backward(*gradients[0], *gradients[1])
        return torch.stack(means)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        every = ctx.saved_tensors
        by_x, by_y = every[: ctx.counts[0]], every[ctx.counts[0] :]
        sums = [
            sum((g * part for g, part in zip(grad, parts, strict=True)), torch.zeros(()).to(grad))
            if parts
            else None
            for parts in (by_x, by_y)
        ]
        return sums[0], sums[1], None, None


def multi_window_lncc_reference(
    x: Tensor, y: Tensor, *, windows: Sequence[int], eps: float
) -> Tensor:
    """(K,) means of cc; see :func:`ulae_rt.kernels.multi_window_lncc` for the contract."""
    accumulate = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    means: Tensor = _Means.apply(x.to(accumulate), y.to(accumulate), windows, eps)
    return means


class AgainstOne:
    """The mean of cc of many images x against one image y that stays, and its gradient by x.

    The sums over y are taken once, and what `_Means` says of the gradient holds here too.

    Args:
        y: (B, C, D, H, W).
        window: odd.
        eps: added to the denominator.
    """

    def __init__(self, y: Tensor, window: int, eps: float) -> None:
        self._y, self._window, self._eps = y, window, eps
        sums = box_sum(torch.cat((y, y * y), dim=1), window)
        self._sum, square_sum = sums.split(y.shape[1], dim=1)
        self._variance = (square_sum - self._sum * self._sum / window**3).clamp_min_(0)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, a scalar, and its gradient, of ``x``'s shape."""
        channels, n = x.shape[1], self._window**3
        sums = box_sum(torch.cat((x, x * self._y, x * x), dim=1), self._window)
        s_x, cross, var_x = sums.split(channels, dim=1)
        cross.addcmul_(s_x, self._sum, value=-1 / n)
        var_x.addcmul_(s_x, s_x, value=-1 / n)
        # Only rounding makes a variance negative; it says nothing then.
        real = var_x >= 0
        product = var_x.clamp_min_(0).mul_(self._variance)
        square = cross * cross
        below = product + self._eps
        cc = torch.minimum(square, product).div_(below)
        share = ((square <= product).to(x.dtype) + (square < product)).div_(2)
        below.mul_(cc.numel())
        by_cross = cross.mul_(share).div_(below).mul_(2)
        by_var = (1 - share).sub_(cc).div_(below).mul_(self._variance).mul_(real)
        both = (by_cross * self._sum).addcmul_(by_var, s_x, value=2)
        a, v, m = box_sum(torch.cat((by_cross, by_var, both), dim=1), self._window).split(
            channels, dim=1
        )
        gradient = a.mul_(self._y).addcmul_(v, x, value=2).sub_(m, alpha=1 / n)
        return cc.mean(), gradient
