"""The public ``compose`` and the operators behind it."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_displacement, check_factor
from ulae_rt.kernels.compose.reference import compose_reference


@torch.library.custom_op("ulae_rt::compose", mutates_args=())
def _compose(disp_a: Tensor, disp_b: Tensor, factor: int) -> Tensor:
    _launch.check_available(disp_a)
    from ulae_rt.kernels.compose import kernel

    return kernel.launch_forward(disp_a, disp_b, factor=factor)


@_compose.register_fake
def _(disp_a: Tensor, disp_b: Tensor, factor: int) -> Tensor:
    dtype = torch.promote_types(disp_a.dtype, disp_b.dtype)
    return disp_a.new_empty(disp_a.shape, dtype=dtype)


@torch.library.custom_op("ulae_rt::compose_backward", mutates_args=())
def _compose_backward(
    grad: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to both displacements; an empty tensor for one that is not needed."""
    _launch.check_available(disp_a)
    from ulae_rt.kernels.compose import kernel

    by_a, by_b = kernel.launch_backward(
        grad, disp_a, disp_b, factor=factor, need_a=need_a, need_b=need_b
    )
    return _launch.present(by_a, disp_a), _launch.present(by_b, disp_b)


@_compose_backward.register_fake
def _(
    grad: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    return (
        disp_a.new_empty(disp_a.shape if need_a else 0),
        disp_b.new_empty(disp_b.shape if need_b else 0),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.factor = inputs[2]
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = _compose_backward(grad, *ctx.saved_tensors, ctx.factor, *needs)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None


_compose.register_autograd(_gradients, setup_context=_save)


def compose(disp_a: Tensor, disp_b: Tensor, factor: int = 1) -> Tensor:
    """The displacement that warps first by ``disp_a``, then by ``disp_b``.

        out(p) = disp_a(p + disp_b(p)) + disp_b(p)

    so that ``warp(warp(x, disp_a), disp_b)`` is ``warp(x, out)`` with one interpolation of x.
    ``disp_a`` is zero outside its volume.

    Args:
        disp_a: (B, 3, D, H, W), voxels, components in (d, h, w) order.
        disp_b: (B, 3, D / factor, H / factor, W / factor), its own voxels, the same order.
        factor: ``disp_b`` is first brought to the full grid as by
            :func:`ulae_rt.kernels.resize_displacement`.

    Returns:
        (B, 3, D, H, W).

    Raises:
        ShapeError: if the shapes do not fit or there are not 3 components.
        DtypeError: if either is not of a floating type.
        UsageError: for another ``factor``.

    Source: ULAE-net, Eq. 2.
    """
    check_displacement("compose", "disp_a", disp_a)
    check_factor("compose", factor)
    check_displacement("compose", "disp_b", disp_b, like=disp_a, factor=factor)
    if _launch.uses_triton(disp_a):
        out: Tensor = _compose(disp_a, disp_b, factor)
        return out
    return compose_reference(disp_a, disp_b, factor)
