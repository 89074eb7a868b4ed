"""The public ``diffusion`` and ``diffusion_with_gradient``, and the operators behind them."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_displacement
from ulae_rt.kernels.diffusion.reference import diffusion_gradient_reference, diffusion_reference


@torch.library.custom_op("ulae_rt::diffusion", mutates_args=())
def _diffusion(disp: Tensor) -> Tensor:
    _launch.check_available(disp)
    from ulae_rt.kernels.diffusion import kernel

    loss, _ = kernel.launch(disp, None, need_loss=True)
    return _launch.present(loss, disp)


@_diffusion.register_fake
def _(disp: Tensor) -> Tensor:
    return disp.new_empty((), dtype=_launch.compute_dtype(disp))


@torch.library.custom_op("ulae_rt::diffusion_gradient", mutates_args=())
def _diffusion_gradient(disp: Tensor, weight: Tensor, need_loss: bool) -> tuple[Tensor, Tensor]:
    """The loss (empty where not needed), and the gradient of ``weight``, a scalar, times it."""
    _launch.check_available(disp)
    from ulae_rt.kernels.diffusion import kernel

    loss, grad = kernel.launch(disp, weight, need_loss=need_loss)
    return _launch.present(loss, disp), _launch.present(grad, disp)


@_diffusion_gradient.register_fake
def _(disp: Tensor, weight: Tensor, need_loss: bool) -> tuple[Tensor, Tensor]:
    if need_loss:
        loss = disp.new_empty((), dtype=_launch.compute_dtype(disp))
    else:
        loss = disp.new_empty(0)
    return loss, disp.new_empty(disp.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    found: tuple[Tensor, Tensor] = _diffusion_gradient(*ctx.saved_tensors, grad, False)
    return found[1]


_diffusion.register_autograd(_gradient, setup_context=_save)


def diffusion(disp: Tensor) -> Tensor:
    """Smoothness of a displacement: its mean squared forward differences, averaged over the axes.

        (mean (d_d u)^2 + mean (d_h u)^2 + mean (d_w u)^2) / 3,  d_i u = u(p + e_i) - u(p)

    each mean over the batch, the components and the differences that exist; an axis of one voxel
    adds 0.

    Args:
        disp: (B, 3, D, H, W), voxels, any floating type.

    Returns:
        A scalar in float32, or float64 for float64 input, which is also what it is computed in.
        The same bits in every run.

    Raises:
        ShapeError: if there are not 3 components.
        DtypeError: if it is not of a floating type.

    Source: ULAE-net, Eq. 4 as the released code computes it (smoothloss, ULAE/Loss.py at ac89ce5).
    """
    check_displacement("diffusion", "disp", disp)
    if _launch.uses_triton(disp):
        loss: Tensor = _diffusion(disp)
        return loss
    return diffusion_reference(disp)


def diffusion_with_gradient(disp: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """:func:`diffusion` and the gradient of ``weight`` times it, from one reading of ``disp``.

        grad(p) = weight * 2 / 3 * sum over i of ((u(p) - u(p - e_i)) - (u(p + e_i) - u(p))) / n_i

    with n_i the differences along axis i, over all components and the batch; a difference that
    does not exist counts as 0. For optimisers that step by hand: autograd sees neither result.

    Args:
        disp: (B, 3, D, H, W), voxels, any floating type. In float16 a gradient of 2 / n_i times a
            difference may underflow: give it a large ``weight``.
        weight: of the gradient; the loss is returned without it.

    Returns:
        The loss, a scalar as of :func:`diffusion`, and the gradient, as ``disp``.

    Raises:
        ShapeError: if there are not 3 components.
        DtypeError: if it is not of a floating type.

    Source: as :func:`diffusion`.
    """
    check_displacement("diffusion_with_gradient", "disp", disp)
    disp = disp.detach()
    if _launch.uses_triton(disp):
        scalar = torch.full((), weight, dtype=_launch.compute_dtype(disp), device=disp.device)
        found: tuple[Tensor, Tensor] = _diffusion_gradient(disp, scalar, True)
        return found
    return diffusion_reference(disp), diffusion_gradient_reference(disp, weight)
