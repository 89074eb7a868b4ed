"""The public ``lncc``, ``multi_window_lncc`` and ``weighted_lncc``, the operators behind them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ulae_rt.errors import DtypeError, UsageError
from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_same, check_volume, check_window
from ulae_rt.kernels.lncc.reference import AgainstOne, multi_window_lncc_reference


@torch.library.custom_op("ulae_rt::lncc", mutates_args=())
def _lncc(x: Tensor, y: Tensor, windows: list[int], eps: float) -> Tensor:
    _launch.check_available(x)
    from ulae_rt.kernels.lncc import kernel

    return kernel.launch_forward(x, y, windows=windows, eps=eps)


@_lncc.register_fake
def _(x: Tensor, y: Tensor, windows: list[int], eps: float) -> Tensor:
    return x.new_empty(len(windows), dtype=_launch.compute_dtype(x, y))


@torch.library.custom_op("ulae_rt::lncc_gradient", mutates_args=())
def _lncc_gradient(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    windows: list[int],
    eps: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, and the gradients of ``(weights * means).sum()``; an empty one if not needed."""
    _launch.check_available(x)
    from ulae_rt.kernels.lncc import kernel

    means, by_x, by_y = kernel.launch_gradient(
        x, y, weights, windows=windows, eps=eps, need_x=need_x, need_y=need_y,
        dtypes=(x.dtype, y.dtype),
    )  # fmt: skip
    return means, _launch.present(by_x, x), _launch.present(by_y, y)


@_lncc_gradient.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    windows: list[int],
    eps: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(len(windows), dtype=_launch.compute_dtype(x, y)),
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, list[int], float], output: Tensor) -> None:
    x, y, *ctx.options = inputs
    ctx.save_for_backward(x, y)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    need_x, need_y = ctx.needs_input_grad[:2]
    _, by_x, by_y = _lncc_gradient(x, y, grad, *ctx.options, need_x, need_y)
    return by_x if need_x else None, by_y if need_y else None, None, None


_lncc.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("ulae_rt::weighted_lncc", mutates_args=())
def _weighted_lncc(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    windows: list[int],
    eps: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of the means, the means, and the sum's gradients, empty if not needed.

    The gradients stay in the type computed in until the backward pass has multiplied them: a mean
    over millions of voxels has gradients below what float16 can hold, which loss scaling is for.
    """
    _launch.check_available(x)
    from ulae_rt.kernels.lncc import kernel

    dtype = _launch.compute_dtype(x, y)
    means, by_x, by_y = kernel.launch_gradient(
        x, y, weights, windows=windows, eps=eps, need_x=need_x, need_y=need_y,
        dtypes=(dtype, dtype),
    )  # fmt: skip
    total = (weights * means).sum()
    return total, means, _launch.present(by_x, means), _launch.present(by_y, means)


@_weighted_lncc.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    windows: list[int],
    eps: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _launch.compute_dtype(x, y)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(len(windows), dtype=dtype),
        x.new_empty(x.shape if need_x else 0, dtype=dtype),
        y.new_empty(y.shape if need_y else 0, dtype=dtype),
    )


@torch.library.custom_op("ulae_rt::weighted_lncc_backward", mutates_args=())
def _weighted_lncc_backward(
    grad: Tensor, by_x: Tensor, by_y: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """``grad`` times the gradients that were found, in the types of ``x`` and ``y``.

    An operator, and of ``x`` and ``y``, because it has no derivative: a product would have one,
    in which the gradients were constants.
    """
    return (grad * by_x).to(x.dtype), (grad * by_y).to(y.dtype)


@_weighted_lncc_backward.register_fake
def _(grad: Tensor, by_x: Tensor, by_y: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return by_x.new_empty(by_x.shape, dtype=x.dtype), by_y.new_empty(by_y.shape, dtype=y.dtype)


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y = inputs[:2]
    _, means, by_x, by_y = output
    ctx.mark_non_differentiable(means, by_x, by_y)
    ctx.save_for_backward(by_x, by_y, x, y)


def _weighted_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_y = ctx.needs_input_grad[:2]
    by_x, by_y = _weighted_lncc_backward(grad, *ctx.saved_tensors)
    return by_x if need_x else None, by_y if need_y else None, None, None, None, None, None


_weighted_lncc.register_autograd(_weighted_gradients, setup_context=_save_weighted)


def _check(x: Tensor, y: Tensor, windows: Sequence[int]) -> None:
    check_volume("lncc", "x", x)
    check_volume("lncc", "y", y)
    check_same("lncc", x, y)
    if not windows:
        raise UsageError("lncc: windows is empty, expected at least one odd size")
    for window in windows:
        check_window("lncc", window)


def multi_window_lncc(
    x: Tensor, y: Tensor, windows: Sequence[int] = (11, 9, 7), eps: float = 1e-5
) -> Tensor:
    """Squared local normalised cross-correlation, one mean a window.

    With S the sum over a w^3 box (zero outside the volume) and n = w^3 always:

        X = S_xy - S_x S_y / n,  V_x = S_xx - S_x^2 / n,  V_y = S_yy - S_y^2 / n
        cc = X^2 / (V_x V_y + eps),  out[k] = mean over voxels of cc with w = windows[k]

    Args:
        x: (B, C, D, H, W), any floating type.
        y: the same shape.
        windows: odd box sizes in voxels, at least one. On a GPU each is compiled on its first
            call, in seconds up to about 13, in minutes from about 21 on.
        eps: added to the denominator.

    Returns:
        (K,) in float32, or float64 when either input is.

    Raises:
        ShapeError: if the shapes differ.
        DtypeError: if either is not of a floating type.
        UsageError: for an empty list, an even or non-positive window.

    Source: ULAE-net, Eq. 3; NCC in ULAE/Loss.py at ac89ce5 (window sums by dense convolution).
    """
    _check(x, y, windows)
    if _launch.uses_triton(x):
        means: Tensor = _lncc(x, y, list(windows), eps)
        return means
    return multi_window_lncc_reference(x, y, windows=windows, eps=eps)


def weighted_lncc(
    x: Tensor,
    y: Tensor,
    windows: Sequence[int],
    weights: Sequence[float],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of :func:`multi_window_lncc`, and the means it is made of.

        total = sum_k weights[k] * means[k]

    Where a gradient will be asked for, the kernels find it together with the value: the backward
    pass only multiplies it.

    Args:
        x: (B, C, D, H, W), any floating type.
        y: the same shape.
        windows: odd box sizes in voxels, at least one.
        weights: one number a window.
        eps: added to the denominator.

    Returns:
        The total, a scalar, and the means, (K,), which carry no gradient; both in float32, or
        float64 when either input is.

    Raises:
        ShapeError: if the shapes differ.
        DtypeError: if either is not of a floating type.
        UsageError: for an empty list, an even or non-positive window, or another number of weights.

    Source: ULAE-net, Eq. 3 and the sum over windows of Eq. 5.
    """
    _check(x, y, windows)
    if len(weights) != len(windows):
        raise UsageError(
            f"lncc: {len(weights)} weights for {len(windows)} windows, expected one for each"
        )
    # Fills on the device: to bring a list there, the host would have to wait for it.
    dtype = _launch.compute_dtype(x, y)
    factors = torch.stack([x.new_full((), weight, dtype=dtype) for weight in weights])
    if not _launch.uses_triton(x):
        means = multi_window_lncc_reference(x, y, windows=windows, eps=eps)
    elif torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        total, means, *_ = _weighted_lncc(
            x, y, factors, list(windows), eps, x.requires_grad, y.requires_grad
        )
        return total, means.detach()
    else:
        means = _lncc(x, y, list(windows), eps)
    return (factors * means).sum(), means.detach()


def lncc(x: Tensor, y: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Squared local normalised cross-correlation of one window, a scalar.

    ``multi_window_lncc(x, y, (window,), eps)[0]``: formula, arguments and errors are given there.
    """
    return multi_window_lncc(x, y, (window,), eps)[0]


class LnccTo:
    """:func:`lncc` of many images against one that stays, each with its gradient by the image.

    The gradient is the closed form, so that nothing is recorded for autograd, and on a CPU the
    sums over the image that stays are taken once.

    Example:
        >>> lncc_to_fixed = LnccTo(fixed, window=5)
        >>> similarity, slope = lncc_to_fixed(moved)

    Args:
        y: (B, C, D, H, W), float32 or float64.
        window: odd box size in voxels.
        eps: added to the denominator.

    Raises:
        ShapeError, DtypeError, UsageError: as :func:`multi_window_lncc`; a call also where ``x`` is
            not of ``y``'s shape, device and type.

    Source: ULAE-net, Eq. 3.
    """

    def __init__(self, y: Tensor, window: int = 9, eps: float = 1e-5) -> None:
        _check(y, y, (window,))
        if y.dtype not in (torch.float32, torch.float64):
            raise DtypeError(
                f"lncc: y is {y.dtype}, expected float32 or float64", "convert it: y.float()"
            )
        self._y, self._window, self._eps = y.detach(), window, eps
        self._reference: AgainstOne | None = None
        if _launch.uses_triton(y):
            self._weight = y.new_ones(1)
        else:
            self._reference = AgainstOne(self._y, window, eps)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, a scalar, and its gradient by ``x``, (B, C, D, H, W); both without a graph."""
        _check(x, self._y, (self._window,))
        if x.dtype != self._y.dtype:
            raise DtypeError(
                f"lncc: x is {x.dtype}, expected {self._y.dtype} as y", f"x.to({self._y.dtype})"
            )
        with torch.no_grad():
            if self._reference is not None:
                return self._reference(x)
            value, _, by_x, _ = _weighted_lncc(
                x, self._y, self._weight, [self._window], self._eps, True, False
            )
        return value, by_x
