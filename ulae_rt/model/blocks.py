"""The layers of ULAE-net. The type of the features decides the arithmetic; parameters keep theirs.

Features travel as channels_last_3d: with it torch's CPU convolutions run up to three times as fast
and in bf16 up to five times (bench/NOTES.md).
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulae_rt.kernels import _launch
from ulae_rt.kernels.norm_activate.op import norm_activate
from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE
from ulae_rt.kernels.upsample_concat.op import upsample_concat


def as_features(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the type and memory layout that the layers below work in."""
    return x.to(dtype=dtype, memory_format=torch.channels_last_3d)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolution in the type of ``x``, whatever the type of the parameters."""
    weight = as_features(weight, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv3d(x, weight, bias, stride, padding, dilation)


class ConvBlock(nn.Sequential):
    """3x3x3 convolution without bias, InstanceNorm, LeakyReLU(0.2).

    A Sequential of one module, so that the weight's key ends in ``0.weight`` as in the released
    checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        )
        self.stride = stride

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, in, D, H, W) to (B, out, D / stride, H / stride, W / stride).

        With ``skip``, of what :func:`ulae_rt.kernels.upsample_concat` makes of the two. Made here,
        it is freed before the normalisation takes as much memory; an argument would not be.
        """
        weight: Tensor = cast(nn.Conv3d, self[0]).weight
        if skip is not None:
            # Weights at rest are filled up already, see ulae_rt.model.program.
            multiple = channel_multiple(x.dtype, x.device.type)
            width = -(-weight.shape[1] // multiple) * multiple
            x = upsample_concat(x, skip, width=width)
            weight = padded_input(weight, width)
        x = conv3d(x, weight, stride=self.stride, padding=1)
        return norm_activate(x)


def channel_multiple(dtype: torch.dtype, device: str) -> int:
    """What the channels of a concatenation are best a multiple of, on ``cpu`` or ``cuda``.

    A tensor core's convolution reads eight channels of half precision at a time: of 18 channels
    (dc6) cuDNN copies or takes a slower kernel, of 24 it does not.
    """
    return 8 if device == "cuda" and dtype in (torch.float16, torch.bfloat16) else 1


def padded_input(weight: Tensor, channels: int) -> Tensor:
    """(out, in, ...) with zeros for further inputs, up to ``channels`` of them."""
    more = channels - weight.shape[1]
    return F.pad(weight, [0] * 6 + [0, more]) if more else weight


class FoldedWeights(NamedTuple):
    """What :class:`MovingBlock` applies: its branches after multiplication with ``out``.

    Attributes:
        bias: (out,), all biases together.
        fixed: (out, out, 1, 1, 1), applied to the fixed path's features.
        mean: (out, in), applied to the mean of the input over the volume.
        dilated: dilation to (out, in, 3, 3, 3), applied to the input with stride 2.
    """

    bias: Tensor
    fixed: Tensor
    mean: Tensor
    dilated: dict[int, Tensor]


class FixedLevel(NamedTuple):
    """One level of the fixed path, which is the same in every step.

    Attributes:
        features: (B, out, D, H, W) of the path itself.
        term: the same shape; what the moving block of this level adds of them.
        weights: of that moving block.
    """

    features: Tensor
    term: Tensor
    weights: FoldedWeights


class MovingBlock(nn.Module):
    """ASPP block of the moving path (stride 2), evaluated as the one linear operator it is.

        out( cat( pool(x), conv3(x), conv1(x), conv3_d(x), conv3_2d(x), conv3_3d(x), y ) )

    Nothing non-linear stands between the branches and the 1x1x1 convolution ``out``, so ``out`` is
    multiplied into the branches' weights: the branches are then summed instead of concatenated,
    the 1x1x1 branch is a centre tap of the 3x3x3 one, and the 7-fold concatenation never exists.
    The parameters, their names and their gradients stay those of the released code.

    Source: ULAE-net section 2.2; Uncoupled_Encoding_Block, ULAE/ULAE.py at ac89ce5.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Conv3d(in_channels, out_channels, 1)
        self.conv2 = nn.Conv3d(in_channels, out_channels, 3)
        self.ab1 = nn.Conv3d(in_channels, out_channels, 1)
        self.ab6 = nn.Conv3d(in_channels, out_channels, 3)
        self.ab12 = nn.Conv3d(in_channels, out_channels, 3)
        self.ab18 = nn.Conv3d(in_channels, out_channels, 3)
        self.out = nn.Conv3d(7 * out_channels, out_channels, 1)

    def folded(self) -> FoldedWeights:
        """The weights of the one linear operator that the branches and ``out`` make together."""
        branches = (self.conv, self.conv2, self.ab1, self.ab6, self.ab12, self.ab18)
        *mixes, mix_y = self.out.weight.flatten(1).split(self.out.out_channels, dim=1)
        pooled, near, centre, *dilated = (
            (mix @ branch.weight.flatten(1)).view_as(branch.weight)
            for mix, branch in zip(mixes, branches, strict=True)
        )
        bias = cast(Tensor, self.out.bias)
        for mix, branch in zip(mixes, branches, strict=True):
            bias = bias + mix @ branch.bias

        kernels = {1: near + F.pad(centre, [1] * 6)}
        for factor, kernel in enumerate(dilated, start=1):
            dilation = factor * self.dilation
            kernels[dilation] = kernels[dilation] + kernel if dilation in kernels else kernel
        return FoldedWeights(bias, mix_y[:, :, None, None, None], pooled.flatten(1), kernels)

    def fixed_level(self, features: Tensor) -> FixedLevel:
        """What every step has of the fixed path's features (B, out, D/2, H/2, W/2)."""
        weights = self.folded()
        return FixedLevel(features, conv3d(features, weights.fixed), weights)

    def forward(self, x: Tensor, fixed: FixedLevel) -> Tensor:
        """(B, in, D, H, W) and the fixed path's level, to the shape of its features."""
        weights = fixed.weights
        constant = constant_term(x, weights).to(fixed.term.dtype)[:, :, None, None, None]
        if constant.device.type == "cpu":
            # As long as a row of voxels: there torch adds a vector of channels alone one by one.
            constant = constant.expand(-1, -1, -1, -1, fixed.term.shape[4])
            constant = constant.contiguous(memory_format=torch.channels_last_3d)
        out = fixed.term + constant
        # In place: a convolution's gradient does not need its result.
        if x.shape[1] == 1 and _launch.arranged_for_cpu(x, *weights.dilated.values()):
            _add_gathered_conv3d(out, x, weights.dilated)
        else:
            for term in strided_convolutions(x, weights.dilated):
                out += term
        return F.leaky_relu_(out, NEGATIVE_SLOPE)


def constant_term(x: Tensor, weights: FoldedWeights) -> Tensor:
    """What a moving block adds everywhere, (B, out) in its parameters' type.

    The biases, and of the mean of x over the volume what the weights make.
    """
    mean = x.mean(dim=(2, 3, 4), dtype=weights.mean.dtype)
    return torch.addmm(weights.bias, mean, weights.mean.t())


def strided_convolutions(x: Tensor, kernels: dict[int, Tensor]) -> Iterator[Tensor]:
    """3x3x3 convolutions with stride 2 and padding equal to the dilation, one a dilation.

    Args:
        x: (B, in, D, H, W) features.
        kernels: dilation to (out, in, 3, 3, 3).
    """
    even = None
    for dilation, kernel in kernels.items():
        if dilation % 2:
            yield conv3d(x, kernel, stride=2, padding=dilation, dilation=dilation)
            continue
        if even is None:
            even = x[:, :, ::2, ::2, ::2].contiguous(memory_format=torch.channels_last_3d)
        # Every tap falls on an even voxel: half the dilation, of those alone.
        yield conv3d(even, kernel, padding=dilation // 2, dilation=dilation // 2)


# Slices of the result whose taps are gathered at a time.
_SLAB = 8


def _add_gathered_conv3d(out: Tensor, x: Tensor, kernels: dict[int, Tensor]) -> None:
    """Add what :func:`strided_convolutions` makes of one channel, all dilations at once.

    The taps become the rows of one matrix product: of an image of one channel torch's dilated
    convolutions take four times as long (80x96x80 voxels out, bf16, two cores).
    """
    channels, D, H, W = out.shape[1:]
    sources = []
    for dilation in kernels:
        step = 1 if dilation % 2 == 0 else 2  # an even one sees every second voxel alone
        reach = dilation * step // 2
        source = x[:, 0] if step == 2 else x[:, 0, ::2, ::2, ::2]
        sources.append((F.pad(source, [reach] * 6), reach, step))
    weight = torch.cat([kernel.flatten(1) for kernel in kernels.values()], dim=1).to(x.dtype).t()
    for b, d in product(range(x.shape[0]), range(0, D, _SLAB)):
        slices = min(_SLAB, D - d)
        columns = torch.empty((len(sources), 3, 3, 3, slices, H, W), dtype=x.dtype)
        for column, (padded, reach, step) in zip(columns.unbind(), sources, strict=True):
            volume = padded[b, step * d :]
            strides = [by * stride for by in (reach, step) for stride in volume.stride()]
            column.copy_(volume.as_strided(column.shape, strides))
        found = columns.view(-1, slices * H * W).t() @ weight
        out[b, :, d : d + slices].add_(found.t().view(channels, slices, H, W))
