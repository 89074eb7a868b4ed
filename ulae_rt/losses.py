"""The training objective, Eq. 3 to 5, and the two terms this project adds to it."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    scores = []
    for moving, fixed, field in zip(labels.moving, labels.fixed, disp, strict=True):
        source, target = moving[0].long(), fixed[0].long()
        missed, met = _carried(source, target, field, labels.number)
        present = torch.zeros(2, labels.number, device=disp.device)
        for row, values in zip(present, (source, target), strict=True):
            values = values.flatten()
            row.index_add_(0, values, torch.ones_like(values, dtype=present.dtype))
        both = (present[:, 1:] > 0).all(dim=0)
        dice = 2 * met[1:] / (missed[1:] + met[1:] + present[1, 1:]).clamp_min(1e-6)
        scores.append((dice * both).sum() / both.sum().clamp_min(1))
    return torch.stack(scores).mean()


def _carried(source: Tensor, target: Tensor, disp: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """How much of each label is carried to where another one is, and to where it is itself.

    Args:
        source: (D, H, W) integers, the moving map.
        target: the same shape, the fixed one.
        disp: (3, D, H, W), voxels.
        number: above the largest of the integers.

    Returns:
        (number,) twice, of which the background's have no meaning.
    """
    # Two layers of background, a cell's two corners, stand for all that is farther out.
    padded = F.pad(source, [2] * 6)
    first = torch.zeros_like(target)
    fractions = []
    for axis, (u, size, stride) in enumerate(zip(disp, source.shape, padded.stride(), strict=True)):
        index = torch.arange(size, device=disp.device, dtype=disp.dtype)
        at = u + index.view([-1 if i == axis else 1 for i in range(3)])
        below = at.detach().floor()
        fractions.append((at - below).flatten())
        first += stride * (below.nan_to_num_(-2).clamp_(-2, size).long() + 2)
    first, target = first.flatten(), target.flatten()
    if disp.device.type == "cpu":
        # Where all corners are background, as in two thirds of a volume, there is nothing to do.
        # A GPU has done it before the host would know where.
        labelled = F.max_pool3d((padded > 0).float()[None], 2, stride=1)
        labelled = F.pad(labelled, [0, 1] * 3).flatten() > 0
        there = labelled[first].nonzero()[:, 0]
        first, target, *fractions = (x[there] for x in (first, target, *fractions))
    source = padded.flatten()
    found = disp.new_zeros(2 * number)
    for corner in product((0, 1), repeat=3):
        offset = sum(k * stride for k, stride in zip(corner, padded.stride(), strict=True))
        label = source[first + offset]
        d, h, w = (f if k else 1 - f for f, k in zip(fractions, corner, strict=True))
        found = found.index_add(0, label + number * (label == target), d * h * w)
    missed, met = found.split(number)
    return missed, met


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
