"""The public ``resize_displacement`` and the operator behind it."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_displacement, check_factor
from ulae_rt.kernels.resize.reference import resize_displacement_reference


@torch.library.custom_op("ulae_rt::resize_displacement", mutates_args=())
def _resize(disp: Tensor, factor: int) -> Tensor:
    _launch.check_available(disp)
    from ulae_rt.kernels.resize import kernel

    return kernel.launch_forward(disp, factor=factor)


@_resize.register_fake
def _(disp: Tensor, factor: int) -> Tensor:
    return disp.new_empty([*disp.shape[:2], *(factor * size for size in disp.shape[2:])])


@torch.library.custom_op("ulae_rt::resize_displacement_backward", mutates_args=())
def _resize_backward(grad: Tensor, factor: int) -> Tensor:
    _launch.check_available(grad)
    from ulae_rt.kernels.resize import kernel

    return kernel.launch_backward(grad, factor=factor, dtype=grad.dtype)


@_resize_backward.register_fake
def _(grad: Tensor, factor: int) -> Tensor:
    return grad.new_empty([*grad.shape[:2], *(size // factor for size in grad.shape[2:])])


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.factor = inputs[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _resize_backward(grad, ctx.factor), None


_resize.register_autograd(_gradient, setup_context=_save)


def resize_displacement(disp: Tensor, factor: int) -> Tensor:
    """A displacement predicted at 1 / ``factor`` resolution, in voxels of the full grid.

    Multiplied by ``factor``, then resized trilinearly with ``align_corners=True``: full voxel i of
    an axis of n coarse ones reads the coarse coordinate ``i (n - 1) / (factor n - 1)``.

    Args:
        disp: (B, 3, D, H, W), coarse voxels.
        factor: a positive integer.

    Returns:
        (B, 3, factor D, factor H, factor W), full voxels, in ``disp``'s type.

    Raises:
        ShapeError: if there are not 3 components.
        DtypeError: if it is not of a floating type.
        UsageError: for another ``factor``.

    Source: ULAE-net section 2.3; ResizeTransform in ULAE/ULAE.py at ac89ce5.
    """
    check_displacement("resize_displacement", "disp", disp)
    check_factor("resize_displacement", factor)
    if factor == 1:
        return disp
    if _launch.uses_triton(disp):
        out: Tensor = _resize(disp, factor)
        return out
    return resize_displacement_reference(disp, factor)
