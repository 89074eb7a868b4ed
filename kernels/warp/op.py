"""The public ``warp`` and the operators behind it."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_choice, check_displacement, check_factor, check_volume
from ulae_rt.kernels.warp.reference import warp_reference

PADDINGS = ("zeros", "border")
MODES = ("linear", "nearest")


@torch.library.custom_op("ulae_rt::warp", mutates_args=())
def _warp(image: Tensor, disp: Tensor, padding: str, mode: str, factor: int) -> Tensor:
    _launch.check_available(image)
    from ulae_rt.kernels.warp import kernel

    return kernel.launch_forward(image, disp, padding=padding, mode=mode, factor=factor)


@_warp.register_fake
def _(image: Tensor, disp: Tensor, padding: str, mode: str, factor: int) -> Tensor:
    return image.new_empty(image.shape)


@torch.library.custom_op("ulae_rt::warp_backward", mutates_args=())
def _warp_backward(
    grad: Tensor,
    image: Tensor,
    disp: Tensor,
    padding: str,
    mode: str,
    factor: int,
    need_image: bool,
    need_disp: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to image and displacement; an empty tensor for one that is not needed."""
    _launch.check_available(image)
    from ulae_rt.kernels.warp import kernel

    gradients = kernel.launch_backward(
        grad,
        image,
        disp,
        padding=padding,
        mode=mode,
        factor=factor,
        need_image=need_image,
        need_disp=need_disp,
    )
    return _launch.present(gradients[0], grad), _launch.present(gradients[1], grad)


@_warp_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    disp: Tensor,
    padding: str,
    mode: str,
    factor: int,
    need_image: bool,
    need_disp: bool,
) -> tuple[Tensor, Tensor]:
    return (
        image.new_empty(image.shape if need_image else 0),
        disp.new_empty(disp.shape if need_disp else 0),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str, str, int], output: Tensor) -> None:
    image, disp, *ctx.options = inputs
    ctx.save_for_backward(image, disp)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, disp = ctx.saved_tensors
    need_image, need_disp = ctx.needs_input_grad[:2]
    # The nearest voxel does not change under a small displacement.
    flat = "nearest" in ctx.options
    by_image, by_disp = None, torch.zeros_like(disp) if need_disp and flat else None
    need_disp = need_disp and not flat
    if need_image or need_disp:
        found = _warp_backward(grad, image, disp, *ctx.options, need_image, need_disp)
        by_image = found[0] if need_image else None
        by_disp = found[1] if need_disp else by_disp
    return by_image, by_disp, None, None, None


_warp.register_autograd(_gradients, setup_context=_save)


def warp(
    image: Tensor, disp: Tensor, padding: str = "zeros", mode: str = "linear", factor: int = 1
) -> Tensor:
    """Sample ``image`` at ``p + disp(p)``.

        out[b, c, p] = sum over q of image[b, c, q] * prod_i max(0, 1 - |p_i + disp_i(p) - q_i|)

    Args:
        image: (B, C, D, H, W), any floating type.
        disp: (B, 3, D / factor, H / factor, W / factor), its own voxels, components in (d, h, w)
            order, any floating type. A NaN samples nothing: 0.
        padding: what lies outside the volume: ``zeros``, or ``border`` (the nearest voxel of it).
        mode: ``linear``, or ``nearest`` for label maps (no gradient to ``disp``).
        factor: ``disp`` is first brought to the image's grid as by
            :func:`ulae_rt.kernels.resize_displacement`.

    Returns:
        (B, C, D, H, W) in ``image``'s type; computed in float32, or float64 when either is.

    Raises:
        ShapeError: if the batch or grid of ``disp`` differs, or it has not 3 components.
        DtypeError: if either is not of a floating type.
        UsageError: for another ``padding``, ``mode`` or ``factor``.

    Source: ULAE-net, the operation "∘" of Eq. 2; SpatialTransformer in ULAE/ULAE.py at ac89ce5.
    """
    check_volume("warp", "image", image)
    check_factor("warp", factor)
    check_displacement("warp", "disp", disp, like=image, factor=factor)
    check_choice("warp", "padding", padding, PADDINGS)
    check_choice("warp", "mode", mode, MODES)
    if _launch.uses_triton(image):
        out: Tensor = _warp(image, disp, padding, mode, factor)
        return out
    return warp_reference(image, disp, padding=padding, mode=mode, factor=factor)
