"""Small networks whose displacements are voxels, as weights files."""

from pathlib import Path

import torch
from torch import nn

from ulae_rt.model import Metadata, UlaeNet, save_checkpoint

SHAPE = (32, 48, 32)


def small_net(variant: str = "paper", channels: int = 4, accumulate: bool = True) -> UlaeNet:
    """A network with heads far above their initial 1e-5, in eval mode."""
    torch.manual_seed(0)
    model = UlaeNet(variant, channels, accumulate)
    for head in model.heads.values():
        nn.init.normal_(head.weight, 0.0, 0.02)
    return model.eval()


def small_weights(path: Path, model: UlaeNet | None = None) -> Path:
    """A weights file of :func:`small_net` for grids of :data:`SHAPE`."""
    model = small_net() if model is None else model
    metadata = Metadata(
        variant=model.variant,
        channels=model.channels,
        accumulate=model.accumulate,
        uncoupled=model.uncoupled,
        shape=SHAPE,
        spacing_mm=2.0,
        normalisation="max",
        training_data="none",
        licence="CC0",
    )
    save_checkpoint(path, model, metadata)
    return path
