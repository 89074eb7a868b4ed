"""Specification of ``norm_activate`` in plain torch, arranged for the CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.kernels import _launch

NEGATIVE_SLOPE = 0.2
NORM_EPS = 1e-5


def norm_activate_reference(x: Tensor) -> Tensor:
    """InstanceNorm without affine, then LeakyReLU; see the public ``norm_activate``."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _NormActivate.apply(x)  # type: ignore[no-any-return]
    return _norm_activate(x)[0]


class _NormActivate(torch.autograd.Function):
    """Forward as without gradients; the backward in closed form.

    torch's backward of the group norm is slow on channels_last_3d (forward and backward of 16
    channels, 80x96x80, bf16, two cores: 253 ms, with this one 55 ms). Only the output is kept,
    which the next convolution keeps anyway: with h the normalised input and g the gradient after
    the activation's,

        dx = rstd * (g - mean(g) - h * mean(g * h)),  h = y where y > 0, y / 0.2 elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, rstd = _norm_activate(x)
        ctx.save_for_backward(y, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, rstd = ctx.saved_tensors
        h = F.leaky_relu(y, 1 / NEGATIVE_SLOPE)
        g: Tensor = torch.ops.aten.leaky_relu_backward(grad, y, NEGATIVE_SLOPE, True)
        voxels = y[0, 0].numel()
        mean_g = g.sum(dim=(2, 3, 4), keepdim=True) / voxels
        mean_gh = (g * h).sum(dim=(2, 3, 4), keepdim=True) / voxels
        grad_x: Tensor = (g - mean_g - h * mean_gh) * rstd[:, :, None, None, None]
        return grad_x


def _norm_activate(x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and 1 / sqrt(variance + eps) as (B, C)."""
    if _launch.traces_for_cpu():
        # A traced tensor does not have the layout that it will have. Where it has, this is nothing.
        x = x.contiguous(memory_format=torch.channels_last_3d)
    y, rstd = _normalise_planes(x) if _sums_badly(x) else _normalise(x)
    return F.leaky_relu_(y, NEGATIVE_SLOPE), rstd


def _sums_badly(x: Tensor) -> bool:
    # In channels_last_3d torch's CPU adds up a whole channel in one float32: at 160x192x160 the
    # normalised features are off by 6e-3, at 2^16 voxels by less than 1e-4. Half precision rounds
    # by more than that anyway.
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x[0, 0].numel() > 2**16
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and not x.is_contiguous()
    )


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    # A group norm of one channel a group is the instance norm, and the one of the two that
    # torch's CPU runs on channels_last_3d without a copy to the default layout and back.
    batch, channels, *sizes = x.shape
    voxels = sizes[0] * sizes[1] * sizes[2]
    y, _, rstd = torch.native_group_norm(x, None, None, batch, channels, voxels, channels, NORM_EPS)
    return y, rstd


def _normalise_planes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each plane by itself, then the planes' statistics merged in float64 (error 1e-5)."""
    batch, channels, depth, height, width = x.shape
    planes = x.transpose(1, 2).reshape(batch * depth, channels, height, width)
    y, *statistics = torch.native_group_norm(
        planes, None, None, batch * depth, channels, height * width, channels, NORM_EPS
    )
    mean, plane_rstd = (each.double().view(batch, depth, channels) for each in statistics)
    offset = mean - mean.mean(dim=1, keepdim=True)
    variance = plane_rstd**-2 - NORM_EPS
    rstd = ((variance + offset**2).mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()
    scale, shift = (
        each.to(y.dtype).view(batch * depth, channels, 1, 1)
        for each in (rstd / plane_rstd, rstd * offset)
    )
    torch.addcmul(shift, y, scale, out=y)
    y = y.view(batch, depth, channels, height, width).transpose(1, 2)
    return y, rstd[:, 0].to(y.dtype)
