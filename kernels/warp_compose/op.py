"""The public ``warp_compose`` and the operators behind it."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_displacement, check_factor, check_volume
from ulae_rt.kernels.warp_compose.reference import warp_compose_reference


@torch.library.custom_op("ulae_rt::warp_compose", mutates_args=())
def _warp_compose(
    image: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int
) -> tuple[Tensor, Tensor]:
    _launch.check_available(image)
    from ulae_rt.kernels.warp_compose import kernel

    return kernel.launch_forward(image, disp_a, disp_b, factor=factor)


@_warp_compose.register_fake
def _(image: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(disp_a.dtype, disp_b.dtype)
    return image.new_empty(image.shape), disp_a.new_empty(disp_a.shape, dtype=dtype)


@torch.library.custom_op("ulae_rt::warp_compose_backward", mutates_args=())
def _warp_compose_backward(
    grad_warped: Tensor,
    grad_out: Tensor,
    image: Tensor,
    disp_a: Tensor,
    disp_b: Tensor,
    factor: int,
    need_image: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the three inputs; an empty tensor for one that is not needed."""
    _launch.check_available(image)
    from ulae_rt.kernels.warp_compose import kernel

    by_image, by_a, by_b = kernel.launch_backward(
        grad_warped,
        grad_out,
        image,
        disp_a,
        disp_b,
        factor=factor,
        needs=(need_image, need_a, need_b),
    )
    return (
        _launch.present(by_image, image),
        _launch.present(by_a, disp_a),
        _launch.present(by_b, disp_b),
    )


@_warp_compose_backward.register_fake
def _(
    grad_warped: Tensor,
    grad_out: Tensor,
    image: Tensor,
    disp_a: Tensor,
    disp_b: Tensor,
    factor: int,
    need_image: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        image.new_empty(image.shape if need_image else 0),
        disp_a.new_empty(disp_a.shape if need_a else 0),
        disp_b.new_empty(disp_b.shape if need_b else 0),
    )


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]
) -> None:
    ctx.factor = inputs[3]
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx: Any, grad_warped: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = _warp_compose_backward(grad_warped, grad_out, *ctx.saved_tensors, ctx.factor, *needs)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None


_warp_compose.register_autograd(_gradients, setup_context=_save)


def warp_compose(
    image: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int = 1
) -> tuple[Tensor, Tensor]:
    """Warp an image and carry a displacement through the same sampling points.

        (warp(image, disp_b), compose(disp_a, disp_b))

    Args:
        image: (B, C, D, H, W).
        disp_a: (B, 3, D, H, W), voxels, components in (d, h, w) order.
        disp_b: (B, 3, D / factor, H / factor, W / factor), its own voxels, the same order.
        factor: ``disp_b`` is first brought to the full grid as by
            :func:`ulae_rt.kernels.resize_displacement`.

    Returns:
        (B, C, D, H, W) and (B, 3, D, H, W).

    Raises:
        ShapeError: if a batch or grid does not fit, or a displacement has not 3 components.
        DtypeError: if one is not of a floating type.
        UsageError: for another ``factor``.

    Source: ULAE-net, Eq. 2: M_2 and Phi_2 are sampled at the same points.
    """
    check_volume("warp_compose", "image", image)
    check_factor("warp_compose", factor)
    check_displacement("warp_compose", "disp_a", disp_a, like=image)
    check_displacement("warp_compose", "disp_b", disp_b, like=image, factor=factor)
    if _launch.uses_triton(image):
        warped, out = _warp_compose(image, disp_a, disp_b, factor)
        return warped, out
    return warp_compose_reference(image, disp_a, disp_b, factor)
