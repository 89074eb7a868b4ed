"""The public ``moving_block`` and the operator behind it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_volume, is_whole
from ulae_rt.kernels._features import fake_features
from ulae_rt.kernels.moving_block.reference import moving_block_reference


@torch.library.custom_op("ulae_rt::moving_block", mutates_args=())
def _moving_block(
    x: Tensor, fixed_term: Tensor, mean_term: Tensor, kernels: Tensor, dilations: Sequence[int]
) -> Tensor:
    _launch.check_available(x)
    from ulae_rt.kernels.moving_block import kernel

    return kernel.launch_forward(x, fixed_term, mean_term, kernels, dilations=dilations)


@_moving_block.register_fake
def _(
    x: Tensor, fixed_term: Tensor, mean_term: Tensor, kernels: Tensor, dilations: Sequence[int]
) -> Tensor:
    return fake_features(fixed_term.shape, x)


def moving_block(
    x: Tensor, fixed_term: Tensor, mean_term: Tensor, kernels: Tensor, dilations: Sequence[int]
) -> Tensor:
    """A block of the moving path: dilated convolutions with stride 2, two terms, LeakyReLU(0.2).

        out = leaky_relu(fixed_term + mean_term + sum_i conv3d(x, kernels[i], stride=2,
                                                  padding=dilations[i], dilation=dilations[i]))

    :class:`ulae_rt.model.blocks.MovingBlock` with its branches folded. The kernel is one launch: it
    reads ``fixed_term`` and writes the result once, and no branch's result ever exists. Products
    and sums are of float32 (float64 for float64) and rounded once; the same bits in every run. It
    is for inference: there is no gradient.

    Args:
        x: (B, Cin, D, H, W), any floating type; channels_last_3d is what the kernel reads, another
            layout is copied.
        fixed_term: (B, Cout, (D + 1) // 2, (H + 1) // 2, (W + 1) // 2) in ``x``'s type and layout:
            what the fixed path's features add, the same in all three stages.
        mean_term: (B, Cout), float32 (float64 for float64): what the biases and the mean of ``x``
            add.
        kernels: (n, Cout, Cin, 3, 3, 3) in ``x``'s type, one a branch. The kernel reads memory of
            (n, 3, 3, 3, Cin, Cout); another layout is copied.
        dilations: the n branches' distances between taps in voxels of ``x``, positive.

    Returns:
        As ``fixed_term`` in shape and type, channels_last_3d.

    Raises:
        ShapeError: if a shape is none of the above, or the tensors are not on one device.
        DtypeError: if a type is not.
        UsageError: if a dilation is not positive, or a gradient would be needed.

    Source: ULAE-net section 2.2; Uncoupled_Encoding_Block, ULAE/ULAE.py at ac89ce5.
    """
    check_volume("moving_block", "x", x)
    whole = isinstance(dilations, Sequence) and all(map(is_whole, dilations))
    if not whole or not dilations or min(dilations) < 1:
        raise UsageError(f"moving_block: dilations are {dilations}, expected positive integers")
    B, C, *sizes = x.shape
    n, channels = len(dilations), kernels.shape[1] if kernels.ndim == 6 else 0
    if channels == 0 or tuple(kernels.shape) != (n, channels, C, 3, 3, 3):
        raise ShapeError(
            f"moving_block: kernels has shape {tuple(kernels.shape)}, expected "
            f"({n}, Cout, {C}, 3, 3, 3)",
            "it has one kernel for each dilation, and the channels of x",
        )
    _check("kernels", kernels, kernels.shape, x.dtype, x)
    halves = [(size + 1) // 2 for size in sizes]
    _check("fixed_term", fixed_term, (B, channels, *halves), x.dtype, x)
    _check("mean_term", mean_term, (B, channels), _launch.compute_dtype(x), x)
    if torch.is_grad_enabled():
        given = {"x": x, "fixed_term": fixed_term, "mean_term": mean_term, "kernels": kernels}
        for name, tensor in given.items():
            if tensor.requires_grad:
                raise UsageError(
                    f"moving_block: {name} requires a gradient, and this operation has none",
                    "call it under torch.no_grad()",
                )
    if _launch.uses_triton(x):
        out: Tensor = _moving_block(x, fixed_term, mean_term, kernels, dilations)
        return out
    return moving_block_reference(x, fixed_term, mean_term, kernels, dilations)


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """``tensor`` has this shape and type, and is where ``x`` is."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(
            f"moving_block: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}",
            "it has the batch of x, the channels of kernels, and half the size of x rounded up",
        )
    if tensor.dtype != dtype:
        raise DtypeError(
            f"moving_block: {name} is {tensor.dtype}, expected {dtype} for x of {x.dtype}",
            "convert one of them",
        )
    if tensor.device != x.device:
        raise ShapeError(f"moving_block: {name} is on {tensor.device}, expected {x.device} as x")
