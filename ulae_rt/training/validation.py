"""Dice and folding of a network on prepared, labelled scans."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulae_rt.convolutions import exact_convolutions
from ulae_rt.displacement import upsample_displacement
from ulae_rt.kernels import warp
from ulae_rt.losses import jacobian_determinant
from ulae_rt.metrics import mean_dice
from ulae_rt.model import UlaeNet
from ulae_rt.training.data import load_labels, load_scan


class Validation(NamedTuple):
    """Means over the pairs.

    Attributes:
        dice: of all labels, at the scans' full resolution.
        baseline: the same with a zero displacement.
        folding_percent: of the fixed brain's voxels whose Jacobian determinant is not positive.
    """

    dice: float
    baseline: float
    folding_percent: float


def first_pairs(scans: list[Path], count: int) -> list[tuple[Path, Path]]:
    """``count`` ordered pairs that spread over all scans: neighbours first, then farther apart."""
    number = len(scans)
    pairs = [
        (scans[i], scans[(i + gap) % number]) for gap in range(1, number) for i in range(number)
    ]
    return pairs[:count]


@torch.no_grad()
def validate(
    model: UlaeNet, pairs: list[tuple[Path, Path]], pool: int, device: torch.device
) -> Validation:
    """Register every pair and compare the carried labels of the moving scan with the fixed's."""
    model.eval()
    rows = []
    for moving, fixed in pairs:
        images = [load_scan(path, pool)[None].to(device) for path in (moving, fixed)]
        with exact_convolutions():  # as register does
            disp = upsample_displacement(model.displacement(*images), pool)
        source, target = load_labels(moving), load_labels(fixed)
        moved = carry_labels(source, disp)
        folded = jacobian_determinant(disp)[0] <= 0
        brain = torch.from_numpy(target[:-1, :-1, :-1] > 0).to(device)
        rows.append(
            (
                mean_dice(moved, target),
                mean_dice(source, target),
                100 * float((folded & brain).sum() / brain.sum()),
            )
        )
    model.train()
    return Validation(*(float(np.mean(column)) for column in zip(*rows, strict=True)))


def carry_labels(labels: NDArray[np.int32], disp: Tensor) -> NDArray[np.int32]:
    """(D, H, W) labels at p + disp(p), nearest voxel."""
    image = torch.from_numpy(labels)[None, None].to(disp.device, torch.float32)
    moved = warp(image, disp, mode="nearest")[0, 0].to("cpu", torch.int32)
    return moved.numpy()
