"""The public ``norm_activate`` and the operators behind it."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_volume
from ulae_rt.kernels._features import fake_features
from ulae_rt.kernels.norm_activate.reference import norm_activate_reference


@torch.library.custom_op("ulae_rt::norm_activate", mutates_args=())
def _norm_activate(x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and 1 / sqrt(variance + eps), (B, C), which the backward needs."""
    _launch.check_available(x)
    from ulae_rt.kernels.norm_activate import kernel

    return kernel.launch_forward(x)


@_norm_activate.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return fake_features(x.shape, x), x.new_empty(x.shape[:2], dtype=_launch.compute_dtype(x))


@torch.library.custom_op("ulae_rt::norm_activate_backward", mutates_args=())
def _norm_activate_backward(grad: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    _launch.check_available(y)
    from ulae_rt.kernels.norm_activate import kernel

    return kernel.launch_backward(grad, y, rstd)


@_norm_activate_backward.register_fake
def _(grad: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    return fake_features(y.shape, y)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
    found: Tensor = _norm_activate_backward(grad, *ctx.saved_tensors)
    return found


_norm_activate.register_autograd(_gradient, setup_context=_save)


def norm_activate(x: Tensor) -> Tensor:
    """InstanceNorm without affine, then LeakyReLU(0.2).

        y = leaky_relu((x - mean) / sqrt(variance + 1e-5)),  0 for a channel that is constant

    with the mean and the biased variance of each channel over the voxels. The kernels read ``x``
    twice and write once; their backward reads the result and its gradient twice and writes once.
    It needs the result alone: ``x`` is not kept.

    Args:
        x: (B, C, D, H, W), any floating type; channels_last_3d is what the kernels read, another
            layout is copied.

    Returns:
        (B, C, D, H, W) in ``x``'s type, channels_last_3d if ``x`` is or a kernel made it. The
        kernels take statistics in float32 (float64 for float64) and merge them in float64.

    Raises:
        ShapeError: if ``x`` has not five axes.
        DtypeError: if it is not of a floating type.

    Source: ULAE-net section 2.2; the convolution blocks of ULAE/ULAE.py at ac89ce5.
    """
    check_volume("norm_activate", "x", x)
    if _launch.uses_triton(x):
        y: Tensor = _norm_activate(x)[0]
        return y
    return norm_activate_reference(x)
