"""The training objective, Eq. 3 to 5, and the one term this project adds to it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ulae_rt.kernels import diffusion, weighted_lncc

# A voxel counts as about to fold below this Jacobian determinant.
FOLDING_MARGIN = 0.1


class Loss(NamedTuple):
    """Eq. 5 and its parts, scalars; ``folding`` is 0 where it was not asked for."""

    total: Tensor
    similarity: Tensor
    smoothness: Tensor
    folding: Tensor


def registration_loss(
    moved: Tensor,
    fixed: Tensor,
    disp: Tensor,
    *,
    windows: Sequence[int] = (11, 9, 7),
    gamma: float = 0.5,
    smoothness: float = 1.0,
    folding: float = 0.0,
) -> Loss:
    """Eq. 5, and a penalty on folded voxels.

        total = - sum_i gamma^(i-1) NCC_{w_i}(moved, fixed)
                + smoothness * diffusion(disp) + folding * folding_penalty(disp)

    Args:
        moved: (B, 1, D, H, W), W of Eq. 2, or M_3 as the released code trains.
        fixed: the same shape.
        disp: (B, 3, D, H, W), Phi in voxels.
        windows: window sizes in voxels, in the order of their weights.
        gamma: ratio of each window's weight to the one before.
        smoothness: lambda of Eq. 5; the smoothness is the released code's mean.
        folding: weight of the penalty; 0 is the paper's loss.

    Returns:
        The total to minimise and its unweighted parts.

    Source: ULAE-net, Eq. 3 to 5.
    """
    weights = [gamma**i for i in range(len(windows))]
    similarity = -weighted_lncc(moved, fixed, windows, weights)[0]
    smooth = diffusion(disp)
    fold = folding_penalty(disp) if folding else smooth.new_zeros(())
    return Loss(similarity + smoothness * smooth + folding * fold, similarity, smooth, fold)


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
