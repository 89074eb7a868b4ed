"""The network as it is exported: what only depends on the weights is worked out beforehand."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulae_rt.errors import ExportError
from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE, NORM_EPS
from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import ConvBlock, FoldedWeights, MovingBlock, _strided_conv3d, conv3d
from ulae_rt.model.ulae_net import STEPS

# Precision -> type of the features; None: that of the inputs.
PRECISIONS = {"fp32": None, "fp16": torch.float16}


class InferenceGraph(nn.Module):
    """``(moving, fixed) -> (moved, disp)``, the same function as :meth:`UlaeNet.predict`.

    Features are of ``precision``, and so are the weights of their convolutions. In half precision
    these stay float32: images, displacements, what is sampled and where, the coarse heads, and
    every mean over a volume with what comes of it.

    Args:
        model: a network in eval mode on the CPU, with float32 or float64 parameters; it is not
            changed.
        precision: of :data:`PRECISIONS`; ``fp32`` is the type of the parameters.

    Raises:
        ExportError: if half precision cannot hold a weight.
    """

    def __init__(self, model: UlaeNet, precision: str = "fp32") -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.feature_dtype = PRECISIONS[precision]
        for name, block in dict(self.model.named_modules()).items():
            if isinstance(block, MovingBlock):
                self.model.set_submodule(name, _FoldedMovingBlock(block))
            elif isinstance(block, ConvBlock):
                self.model.set_submodule(name, _ExplicitConvBlock(block))
        if self.model.feature_dtype is not None:
            self._store_in(self.model.feature_dtype)
        self.eval().requires_grad_(False)

    def _store_in(self, dtype: torch.dtype) -> None:
        """Weights in the type they are used in: traced, each conversion would be a node."""
        for name, block in self.model.named_modules():
            # The finest head alone is of the features' type, see UlaeNet._step.
            if isinstance(block, ConvBlock) or name == f"heads.{STEPS}":
                block.to(dtype)
            elif isinstance(block, _FoldedMovingBlock):
                block.store_in(dtype)
        for name, weight in self.model.state_dict().items():
            if not weight.isfinite().all():
                raise ExportError(
                    f"{name} holds values beyond {torch.finfo(dtype).max:g}, the largest of "
                    f"{str(dtype).removeprefix('torch.')}",
                    "export fp32, or train with weight decay",
                )

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, D, H, W) each to (B, 1, D, H, W) and (B, 3, D, H, W) in voxels."""
        moved, disp = self.model.predict(moving, fixed)
        return moved, disp


class _FoldedMovingBlock(MovingBlock):
    """A moving block whose folded weights are stored: traced, the folding is 1000 nodes more."""

    def __init__(self, block: MovingBlock) -> None:
        nn.Module.__init__(self)
        dtype = block.out.weight.dtype
        with torch.no_grad():
            # In float64, so that folding adds no rounding of its own to the exported weights.
            weights = copy.deepcopy(block).double().folded()
        self.register_buffer("bias", weights.bias.to(dtype))
        self.register_buffer("fixed", weights.fixed.to(dtype))
        self.register_buffer("mean", weights.mean.to(dtype))
        self.dilations = tuple(weights.dilated)
        for dilation, kernel in weights.dilated.items():
            self.register_buffer(f"dilated{dilation}", kernel.to(dtype))

    def store_in(self, dtype: torch.dtype) -> None:
        """Convert all but the weights of the mean."""
        mean = self.get_buffer("mean")
        self.to(dtype)
        self.mean = mean

    def folded(self) -> FoldedWeights:
        dilated = {d: self.get_buffer(f"dilated{d}") for d in self.dilations}
        bias, fixed, mean = (self.get_buffer(name) for name in ("bias", "fixed", "mean"))
        return FoldedWeights(bias, fixed, mean, dilated)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weights = self.folded()
        out = conv3d(y, weights.fixed, weights.bias)
        # A matrix product and no convolution: those of an fp16 graph are all of the features' type.
        mean = _mean(_wide(x)).flatten(1) @ weights.mean.flatten(1).T
        out = out + mean[:, :, None, None, None].to(out.dtype)
        for dilation, kernel in weights.dilated.items():
            out = out + _strided_conv3d(x, kernel, dilation)
        return F.leaky_relu(out, NEGATIVE_SLOPE)


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
        wide = _wide(x)
        wide = wide - _mean(wide)
        y = F.leaky_relu(wide * (_mean(wide * wide) + NORM_EPS).rsqrt(), NEGATIVE_SLOPE)
        return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In the type of statistics: float32 for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=4, keepdim=True).mean(dim=(2, 3), keepdim=True)
