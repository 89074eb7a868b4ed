"""The training objective, Eq. 3 to 5, and the two terms this project adds to it."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ulae_rt.kernels import diffusion, weighted_lncc

# A voxel counts as about to fold below this Jacobian determinant.
FOLDING_MARGIN = 0.1


class Loss(NamedTuple):
    """Eq. 5 and its parts, scalars; ``folding`` and ``labels`` are 0 where not asked for."""

    total: Tensor
    similarity: Tensor
    smoothness: Tensor
    folding: Tensor
    labels: Tensor


class Labels(NamedTuple):
    """Label maps of pairs: (B, 1, D, H, W) integers below ``number``, 0 is background."""

    moving: Tensor
    fixed: Tensor
    number: int


def registration_loss(
    moved: Tensor,
    fixed: Tensor,
    disp: Tensor,
    *,
    windows: Sequence[int] = (11, 9, 7),
    gamma: float = 0.5,
    smoothness: float = 1.0,
    folding: float = 0.0,
    labels: Labels | None = None,
    label_weight: float = 0.0,
) -> Loss:
    """Eq. 5, a penalty on folded voxels, and the overlap of labels where there are some.

        total = - sum_i gamma^(i-1) NCC_{w_i}(moved, fixed)
                + smoothness * diffusion(disp) + folding * folding_penalty(disp)
                - label_weight * label_dice(labels, disp)

    Args:
        moved: (B, 1, D, H, W), W of Eq. 2, or M_3 as the released code trains.
        fixed: the same shape.
        disp: (B, 3, D, H, W), Phi in voxels.
        windows: window sizes in voxels, in the order of their weights.
        gamma: ratio of each window's weight to the one before.
        smoothness: lambda of Eq. 5; the smoothness is the released code's mean.
        folding: weight of the penalty; 0 is the paper's loss.
        labels: of both images; None: the total has no such term.
        label_weight: its weight.

    Returns:
        The total to minimise and its unweighted parts.

    Source: ULAE-net, Eq. 3 to 5.
    """
    weights = [gamma**i for i in range(len(windows))]
    similarity = -weighted_lncc(moved, fixed, windows, weights)[0]
    smooth = diffusion(disp)
    fold = folding_penalty(disp) if folding else smooth.new_zeros(())
    overlap = label_dice(labels, disp) if labels else smooth.new_zeros(())
    total = similarity + smoothness * smooth + folding * fold - label_weight * overlap
    return Loss(total, similarity, smooth, fold, overlap)


def label_dice(labels: Labels, disp: Tensor) -> Tensor:
    """Mean Dice of the labels that both maps of a pair have, the moving one's carried linearly.

        P_l(p) = sum over q of [moving(q) = l] * prod_i max(0, 1 - |p_i + disp_i(p) - q_i|)
        Dice_l = 2 sum_p P_l(p) [fixed(p) = l] / (sum_p P_l(p) + sum_p [fixed(p) = l])

    That is ``warp`` of every label's indicator, without holding them: a voxel has at most eight
    labels around it, whatever their number.

    Args:
        labels: of B pairs.
        disp: (B, 3, D, H, W), voxels of the maps' grid.

    Returns:
        A scalar in [0, 1], differentiable by ``disp``.
    """
    sizes = disp.shape[2:]
    scores = []
    for moving, fixed, field in zip(labels.moving, labels.fixed, disp, strict=True):
        source, target = moving.flatten().long(), fixed.flatten().long()
        axes = [torch.arange(n, device=disp.device, dtype=disp.dtype) for n in sizes]
        at = [
            u + x.view([-1 if i == axis else 1 for i in range(3)])
            for axis, (u, x) in enumerate(zip(field, axes, strict=True))
        ]
        below = [x.detach().floor() for x in at]
        carried = disp.new_zeros(labels.number)
        common = disp.new_zeros(labels.number)
        for corner in product((0, 1), repeat=3):
            weight = torch.ones_like(at[0])
            index = torch.zeros_like(below[0], dtype=torch.long)
            inside = torch.ones_like(index, dtype=torch.bool)
            for x, first, step, size in zip(at, below, corner, sizes, strict=True):
                voxel = first + step
                weight = weight * (1 - (x - voxel).abs())
                inside = inside & (voxel >= 0) & (voxel < size)
                index = index * size + voxel.clamp(0, size - 1).long()
            label = source[index.flatten()] * inside.flatten()
            weight = weight.flatten()
            carried = carried.index_add(0, label, weight)
            common = common.index_add(0, label, weight * (label == target))
        present = torch.zeros(2, labels.number, device=disp.device)
        for row, values in zip(present, (source, target), strict=True):
            row.index_add_(0, values, torch.ones_like(values, dtype=present.dtype))
        both = (present[:, 1:] > 0).all(dim=0)
        dice = 2 * common[1:] / (carried[1:] + present[1, 1:]).clamp_min(1e-6)
        scores.append((dice * both).sum() / both.sum().clamp_min(1))
    return torch.stack(scores).mean()


def jacobian_determinant(disp: Tensor) -> Tensor:
    """Determinant of the gradient of p + disp(p), by forward differences.

    Args:
        disp: (B, 3, D, H, W), voxels.

    Returns:
        (B, D - 1, H - 1, W - 1): one value a cell of the grid, 1 where nothing is deformed.
    """
    corner = disp[:, :, :-1, :-1, :-1]
    columns = [
        disp[:, :, 1:, :-1, :-1] - corner,
        disp[:, :, :-1, 1:, :-1] - corner,
        disp[:, :, :-1, :-1, 1:] - corner,
    ]
    (a, b, c), (d, e, f), (g, h, i) = (
        tuple(column[:, row] + float(row == axis) for row in range(3))
        for axis, column in enumerate(columns)
    )
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def folding_penalty(disp: Tensor) -> Tensor:
    """Mean of ``max(0, FOLDING_MARGIN - det J)``, a scalar; 0 for a field far from folding."""
    return (FOLDING_MARGIN - jacobian_determinant(disp)).clamp_min(0).mean()
