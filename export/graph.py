"""The network as it is exported: what only depends on the weights is worked out beforehand."""

import copy

import torch
from torch import Tensor, nn

from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import FoldedWeights, MovingBlock


class InferenceGraph(nn.Module):
    """``(moving, fixed) -> (moved, disp)``, the same function as :meth:`UlaeNet.predict`.

    Args:
        model: a network in eval mode with float32 parameters on the CPU; it is not changed.
    """

    def __init__(self, model: UlaeNet) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        blocks = {n: m for n, m in self.model.named_modules() if isinstance(m, MovingBlock)}
        for name, block in blocks.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, _ConstantMovingBlock(block))
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
