"""The network as it is run and no longer trained: everything that follows from its weights, once.

What a weights file is run by and what a ``.pt2`` file holds are this one program. ONNX has a graph
of its own, in the operators it knows (``ulae_rt.export.graph``).
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from ulae_rt.kernels.moving_block.op import moving_block
from ulae_rt.model.blocks import (
    ConvBlock,
    FixedLevel,
    FoldedWeights,
    MovingBlock,
    as_features,
    constant_term,
    padded_input,
)
from ulae_rt.model.checkpoint import PRECISIONS
from ulae_rt.model.ulae_net import STEPS, UlaeNet


class InferenceProgram(nn.Module):
    """``(moving, fixed) -> (moved, disp)``: :meth:`UlaeNet.predict` with its weights at rest.

    The moving blocks' weights are folded, and all weights lie in the type, the layout and the width
    that the convolutions read them in.

    Args:
        model: in eval mode; it is not changed.
        precision: of :data:`ulae_rt.model.checkpoint.PRECISIONS`; ``fp32`` is the type of the
            model's parameters.
        multiple: to which the inputs of a convolution of concatenated features are filled up with
            zeros; see :func:`ulae_rt.model.blocks.channel_multiple`.
        fused: whether each moving block is one kernel in place of a library's convolutions and
            their sum. Only a GPU can say which is the faster one, and ``make gpu-quarter`` asks it;
            until then no command takes this.
    """

    def __init__(
        self, model: UlaeNet, precision: str, multiple: int = 1, *, fused: bool = False
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        dtype = self.model.feature_dtype = PRECISIONS[precision]
        for name, block in dict(self.model.named_modules()).items():
            if isinstance(block, MovingBlock):
                kind = FusedMovingBlock if fused else FoldedMovingBlock
                self.model.set_submodule(name, kind(block, dtype))
            elif isinstance(block, ConvBlock):
                if name.rpartition(".")[2] in _AFTER_CONCATENATION:
                    _fill_up(block, multiple)
                block.to(dtype or block.get_parameter("0.weight").dtype)
        if dtype is not None:
            # The finest head alone is of the features' type, see UlaeNet._step.
            self.model.heads[str(STEPS)].to(dtype)
        self.eval().requires_grad_(False)

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, D, H, W) each to (B, 1, D, H, W) and (B, 3, D, H, W) in voxels."""
        moved, disp = self.model.predict(moving, fixed)
        return moved, disp

    def displacement(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """The displacement alone, (B, 3, D, H, W), without the moved image's computation."""
        return self.model.displacement(moving, fixed)


# Of the decoder; they read what is upsampled beside what is skipped.
_AFTER_CONCATENATION = ("dc1", "dc2", "dc3", "dc6")


def _fill_up(block: ConvBlock, multiple: int) -> None:
    convolution = cast(nn.Conv3d, block[0])
    channels = -(-convolution.in_channels // multiple) * multiple
    weight = as_features(
        padded_input(convolution.weight.detach(), channels), convolution.weight.dtype
    )
    convolution.weight = nn.Parameter(weight)


class FoldedMovingBlock(MovingBlock):
    """A moving block with its folded weights stored in the type and layout they are used in."""

    def __init__(self, block: MovingBlock, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        wide = block.out.weight.dtype
        with torch.no_grad():
            # In float64, so that folding adds no rounding of its own to the stored weights.
            weights = copy.deepcopy(block).double().folded()
        self.register_buffer("fixed", as_features(weights.fixed, dtype or wide))
        # What comes of a mean over the volume stays wide.
        self.register_buffer("bias", weights.bias.to(wide))
        self.register_buffer("mean", weights.mean.to(wide))
        self.dilations = tuple(weights.dilated)
        for dilation, kernel in weights.dilated.items():
            self.register_buffer(f"dilated{dilation}", as_features(kernel, dtype or wide))

    def folded(self) -> FoldedWeights:
        """As stored."""
        dilated = {d: self.get_buffer(f"dilated{d}") for d in self.dilations}
        bias, fixed, mean = (self.get_buffer(name) for name in ("bias", "fixed", "mean"))
        return FoldedWeights(bias, fixed, mean, dilated)


class FusedMovingBlock(FoldedMovingBlock):
    """A moving block as one implicit matrix product, see :func:`ulae_rt.kernels.moving_block`."""

    def __init__(self, block: MovingBlock, dtype: torch.dtype | None) -> None:
        super().__init__(block, dtype)
        # (n, out, in, 3, 3, 3), whose memory is (n, 3, 3, 3, in, out), as the kernel reads it.
        dilated = torch.stack([self.get_buffer(f"dilated{d}") for d in self.dilations])
        self.register_buffer(
            "kernels", dilated.permute(0, 3, 4, 5, 2, 1).contiguous().permute(0, 5, 4, 1, 2, 3)
        )

    def forward(self, x: Tensor, fixed: FixedLevel) -> Tensor:
        """See :meth:`MovingBlock.forward`."""
        constant = constant_term(x, fixed.weights)
        return moving_block(x, fixed.term, constant, self.get_buffer("kernels"), self.dilations)
