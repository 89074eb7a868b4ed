"""Specification of ``moving_block`` in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.kernels import _launch
from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE


def moving_block_reference(
    x: Tensor, fixed_term: Tensor, mean_term: Tensor, kernels: Tensor, dilations: Sequence[int]
) -> Tensor:
    """One convolution a branch, summed before the result is rounded; see the public function."""
    exact = _launch.compute_dtype(x)
    total = fixed_term.to(exact) + mean_term[:, :, None, None, None]
    for kernel, dilation in zip(kernels, dilations, strict=True):
        total = total + F.conv3d(
            x.to(exact), kernel.to(exact), stride=2, padding=dilation, dilation=dilation
        )
    out = F.leaky_relu(total, NEGATIVE_SLOPE).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last_3d)
