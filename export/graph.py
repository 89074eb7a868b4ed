"""The network as it is exported: what only depends on the weights is worked out beforehand."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE, NORM_EPS
from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import ConvBlock, FoldedWeights, MovingBlock, conv3d


class InferenceGraph(nn.Module):
    """``(moving, fixed) -> (moved, disp)``, the same function as :meth:`UlaeNet.predict`.

    Args:
        model: a network in eval mode with float32 parameters on the CPU; it is not changed.
    """

    def __init__(self, model: UlaeNet) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for name, block in dict(self.model.named_modules()).items():
            if isinstance(block, MovingBlock):
                self.model.set_submodule(name, _ConstantMovingBlock(block))
            elif isinstance(block, ConvBlock):
                self.model.set_submodule(name, _ExplicitConvBlock(block))
        self.eval().requires_grad_(False)

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, D, H, W) each to (B, 1, D, H, W) and (B, 3, D, H, W) in voxels."""
        moved, disp = self.model.predict(moving, fixed)
        return moved, disp


class _ConstantMovingBlock(MovingBlock):
    """A moving block whose folded weights are stored: traced, the folding is 1000 nodes more."""

    def __init__(self, block: MovingBlock) -> None:
        nn.Module.__init__(self)
        with torch.no_grad():
            # In float64, so that folding adds no rounding of its own to the exported weights.
            weights = copy.deepcopy(block).double().folded()
        self.register_buffer("bias", weights.bias.float())
        self.register_buffer("fixed", weights.fixed.float())
        self.register_buffer("mean", weights.mean.float())
        self.dilations = tuple(weights.dilated)
        for dilation, kernel in weights.dilated.items():
            self.register_buffer(f"dilated{dilation}", kernel.float())

    def folded(self) -> FoldedWeights:
        dilated = {d: self.get_buffer(f"dilated{d}") for d in self.dilations}
        bias, fixed, mean = (self.get_buffer(name) for name in ("bias", "fixed", "mean"))
        return FoldedWeights(bias, fixed, mean, dilated)


class _ExplicitConvBlock(ConvBlock):
    """A convolution block with its normalisation spelt out, each row summed before the rest.

    ONNX Runtime's InstanceNormalization adds up a whole channel in one float32: at 160x192x160
    its result is off by 4e-3, which becomes hundredths of a voxel.
    """

    def __init__(self, block: ConvBlock) -> None:
        nn.Sequential.__init__(self, *block)
        self.stride = block.stride

    def forward(self, x: Tensor) -> Tensor:
        weight = self.get_parameter("0.weight")
        x = conv3d(x, weight, stride=self.stride, padding=1)
        x = x - _mean(x)
        return F.leaky_relu(x * (_mean(x * x) + NORM_EPS).rsqrt(), NEGATIVE_SLOPE)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=4, keepdim=True).mean(dim=(2, 3), keepdim=True)
