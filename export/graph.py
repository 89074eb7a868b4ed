"""The network as it is exported: what only depends on the weights is worked out beforehand."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulae_rt.errors import EquivalenceError, ExportError
from ulae_rt.export.proof import DEFECT_HINT
from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE, NORM_EPS
from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import (
    ConvBlock,
    FixedLevel,
    MovingBlock,
    conv3d,
    strided_convolutions,
)
from ulae_rt.model.program import FoldedMovingBlock
from ulae_rt.model.ulae_net import STEPS

# Precision -> type of the features; None: that of the inputs.
PRECISIONS = {"fp32": None, "fp16": torch.float16}

# What the rewriting is checked on: two axes of one voxel at the coarsest level and one of two,
# displacements of voxels, and rounding of 1e-13.
_CHECK_SHAPE = (16, 32, 16)
_CHECK_STD = 0.02
_CHECK_TOLERANCE = 1e-9


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
                self.model.set_submodule(name, _ExplicitMovingBlock(block))
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
            elif isinstance(block, _ExplicitMovingBlock):
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


class _ExplicitMovingBlock(FoldedMovingBlock):
    """A moving block in ONNX's operators; the folding, traced, would be 1000 nodes more."""

    def __init__(self, block: MovingBlock) -> None:
        super().__init__(block, None)

    def store_in(self, dtype: torch.dtype) -> None:
        """Convert all but what is applied to the mean."""
        wide = {name: self.get_buffer(name) for name in ("bias", "mean")}
        self.to(dtype)
        for name, value in wide.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, fixed: FixedLevel) -> Tensor:
        weights = fixed.weights
        # A matrix product and no convolution: those of an fp16 graph are all of the features' type.
        mean = _mean_of_planes(_wide(x.flatten(3))).flatten(1)
        constant = mean @ weights.mean.t() + weights.bias
        out = fixed.term + constant.view(-1, constant.shape[1], 1, 1, 1).to(fixed.term.dtype)
        for term in strided_convolutions(x, weights.dilated):
            out = out + term
        return F.leaky_relu(out, NEGATIVE_SLOPE)


class _ExplicitConvBlock(ConvBlock):
    """A convolution block with its normalisation spelt out.

    ONNX Runtime's InstanceNormalization adds up a whole channel in one float32: at 160x192x160
    its result is off by 4e-3, which becomes hundredths of a voxel. So each plane is summed by
    itself. TensorRT writes a float32 copy of what both the sums and the rest read; the sums
    therefore read a tensor of another shape, and the two passes stay in the type of the features
    (bench/NOTES.md).
    """

    def __init__(self, block: ConvBlock) -> None:
        nn.Sequential.__init__(self, *block)
        self.stride = block.stride

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat((_upsampled(x), skip), dim=1)
        weight = self.get_parameter("0.weight")
        x = conv3d(x, weight, stride=self.stride, padding=1)
        planes = _wide(x.flatten(3))
        mean, square = (_mean_of_planes(each) for each in (planes, planes * planes))
        # Without a bias before it a mean is of the order of the deviation: against float64, the
        # displacement is closer than with centred squares. Rounding may leave a variance below 0.
        scale = (F.relu(square - mean * mean) + NORM_EPS).rsqrt()
        return F.leaky_relu(_wide(x) * scale - mean * scale, NEGATIVE_SLOPE).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In the type of statistics: float32 for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_of_planes(planes: Tensor) -> Tensor:
    """(B, C, D, H * W) to (B, C, 1, 1, 1)."""
    return planes.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)[..., None]


def _upsampled(x: Tensor) -> Tensor:
    """One axis after the other, the same trilinear interpolation.

    All three at once, TensorRT reads 24 bytes of indices for each value of a small level.
    """
    for factors in ((2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0)):
        x = F.interpolate(x, scale_factor=factors, mode="trilinear", align_corners=False)
    return x


class _BranchwiseMovingBlock(MovingBlock):
    """A moving block as the paper draws it: seven branches, concatenated, and ``out``."""

    def __init__(self, block: MovingBlock) -> None:
        nn.Module.__init__(self)
        self.dilation = block.dilation
        for name, branch in block.named_children():
            self.add_module(name, branch)

    def fixed_level(self, features: Tensor) -> FixedLevel:
        return FixedLevel(features, features, self.folded())

    def forward(self, x: Tensor, fixed: FixedLevel) -> Tensor:
        y = fixed.features

        def branch(name: str, image: Tensor, dilation: int) -> Tensor:
            weight, bias = (self.get_parameter(f"{name}.{part}") for part in ("weight", "bias"))
            padding = dilation if weight.shape[-1] == 3 else 0
            return F.conv3d(image, weight, bias, 2, padding, dilation)

        pooled = branch("conv", x.mean(dim=(2, 3, 4), keepdim=True), 1)
        branches = [pooled.expand_as(y), branch("conv2", x, 1), branch("ab1", x, 1)]
        for factor, name in enumerate(("ab6", "ab12", "ab18"), start=1):
            branches.append(branch(name, x, factor * self.dilation))
        return F.leaky_relu(self.out(torch.cat((*branches, y), dim=1)), NEGATIVE_SLOPE)


def check_rewriting(model: UlaeNet) -> None:
    """Compare :class:`InferenceGraph` with the network as it was trained, in float64.

    Moving blocks are there applied branch by branch, and every fixed path and step is computed in
    full. Heads are made to displace voxels: fresh ones hardly move anything, and what is not moved
    hides a wrong warp.

    Args:
        model: the network; it is not changed.

    Raises:
        EquivalenceError: if they differ by more than 1e-9 of the largest value.
    """
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    for head in model.heads.values():
        assert isinstance(head, nn.Conv3d)
        noise = torch.randn(head.weight.shape, generator=generator, dtype=torch.float64)
        head.weight.data += _CHECK_STD * noise
    plain = copy.deepcopy(model)
    for name, block in dict(plain.named_modules()).items():
        if isinstance(block, MovingBlock):
            plain.set_submodule(name, _BranchwiseMovingBlock(block))
    images = torch.rand(2, 1, 1, *_CHECK_SHAPE, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(*images)
        found = InferenceGraph(model)(*images)
    for name, a, b in zip(("moved", "disp"), found, (expected.moved, expected.disp), strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        if not error <= _CHECK_TOLERANCE:
            raise EquivalenceError(
                f"the rewritten graph is not the network: {name} differs by {error:.1e} of its "
                f"largest value in float64, expected at most {_CHECK_TOLERANCE:.0e}",
                DEFECT_HINT,
            )
