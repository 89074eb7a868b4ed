"""The public ``upsample_concat`` and the operators behind it."""

from typing import Any

import torch
from torch import Tensor

from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_volume, is_whole
from ulae_rt.kernels._features import fake_features
from ulae_rt.kernels.upsample_concat.reference import upsample_concat_reference


@torch.library.custom_op("ulae_rt::upsample_concat", mutates_args=())
def _upsample_concat(x: Tensor, skip: Tensor, width: int) -> Tensor:
    _launch.check_available(x)
    from ulae_rt.kernels.upsample_concat import kernel

    return kernel.launch_forward(x, skip, width=width)


@_upsample_concat.register_fake
def _(x: Tensor, skip: Tensor, width: int) -> Tensor:
    return fake_features((x.shape[0], width, *skip.shape[2:]), x)


@torch.library.custom_op("ulae_rt::upsample_concat_backward", mutates_args=())
def _upsample_concat_backward(grad: Tensor, channels: int) -> Tensor:
    """Gradient to ``x``, which has the first ``channels`` of ``grad``."""
    _launch.check_available(grad)
    from ulae_rt.kernels.upsample_concat import kernel

    return kernel.launch_backward(grad, channels=channels)


@_upsample_concat_backward.register_fake
def _(grad: Tensor, channels: int) -> Tensor:
    return fake_features((grad.shape[0], channels, *(size // 2 for size in grad.shape[2:])), grad)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.channels = inputs[0].shape[1], inputs[1].shape[1]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_x, need_skip, _ = ctx.needs_input_grad
    C, S = ctx.channels
    by_x = _upsample_concat_backward(grad, C) if need_x else None
    # A view, as of torch.cat: whoever needs it in other memory copies it once.
    return by_x, grad[:, C : C + S] if need_skip else None, None


_upsample_concat.register_autograd(_gradients, setup_context=_save)


def upsample_concat(x: Tensor, skip: Tensor, *, width: int | None = None) -> Tensor:
    """Features at twice the size, trilinear with ``align_corners=False``, then those of ``skip``.

        out[:, :C] = up_d(up_h(up_w(x))),  up(x)[i] = 3/4 x[i // 2] + 1/4 x[i // 2 ± 1],
        out[:, C:C + S] = skip
        out[:, C + S:] = 0

    with + for odd i, - for even i, and the voxel of the face where there is no other. The kernel
    reads ``x`` and ``skip`` and writes the result, each once; the upsampled features never exist
    on their own. Its backward gathers: the same bits in every run.

    Args:
        x: (B, C, D, H, W), any floating type; channels_last_3d is what the kernels read, another
            layout is copied.
        skip: (B, S, 2 D, 2 H, 2 W) in ``x``'s type.
        width: channels of the result, C + S by default. In a multiple of eight, rows of two-byte
            channels begin at multiples of 16 bytes: what they are then written and read by
            (16 + 2 channels to 24) is whole 128-bit accesses.

    Returns:
        (B, width, 2 D, 2 H, 2 W) in ``x``'s type; computed in float32, or float64 for float64. What
        is not ``x``'s and not ``skip``'s is zero, and its gradient is ignored.

    Raises:
        ShapeError: if either has not five axes, or ``skip`` not the batch and twice the size.
        DtypeError: if they are not of one floating type.
        UsageError: if ``width`` is less than C + S.

    Source: ULAE-net section 2.3; the decoder of ULAE/ULAE.py at ac89ce5.
    """
    check_volume("upsample_concat", "x", x)
    check_volume("upsample_concat", "skip", skip)
    expected = (x.shape[0], skip.shape[1], *(2 * size for size in x.shape[2:]))
    if tuple(skip.shape) != expected:
        raise ShapeError(
            f"upsample_concat: skip has shape {tuple(skip.shape)}, expected {expected}",
            "it has the batch and twice the size of x",
        )
    if skip.dtype != x.dtype:
        raise DtypeError(
            f"upsample_concat: skip is {skip.dtype}, expected {x.dtype} as x", "convert one of them"
        )
    if skip.device != x.device:
        raise ShapeError(f"upsample_concat: skip is on {skip.device}, expected {x.device} as x")
    channels = x.shape[1] + skip.shape[1]
    if width is None:
        width = channels
    if not is_whole(width) or width < channels:
        raise UsageError(
            f"upsample_concat: width is {width}, expected at least the {x.shape[1]} channels of x "
            f"and the {skip.shape[1]} of skip",
            f"leave it out for {channels}",
        )
    if _launch.uses_triton(x):
        out: Tensor = _upsample_concat(x, skip, width)
        return out
    return upsample_concat_reference(x, skip, width)
