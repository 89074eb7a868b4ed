"""Specification of ``world_jacobian`` in plain torch, any device and type."""

import torch
from torch import Tensor

# Slices whose nine derivatives exist at a time: they stay in the cache.
_SLAB = 4


def world_jacobian_reference(disp: Tensor, matrix: Tensor) -> Tensor:
    """``det(S + d disp / d i) / det S``; see :func:`ulae_rt.kernels.world_jacobian`.

    Differences over two voxels are not halved: 8 det(S + d / 2) is det(2 S + d).
    """
    wide = torch.promote_types(disp.dtype, torch.float32)
    batch, _, depth, height, width = disp.shape
    out = disp.new_empty((batch, 1, depth, height, width), dtype=wide)
    scales = (1 / (8 * torch.linalg.det(matrix.double()))).to(wide)
    steps = (2 * matrix).to(wide)
    for b, field in enumerate(disp):
        for first in range(0, depth, _SLAB):
            end = min(first + _SLAB, depth)
            # With the neighbours that there are.
            low, high = max(first - 1, 0), min(end + 1, depth)
            slab = field[:, low:high].to(wide)
            inside = slice(first - low, end - low)
            here = slab[:, inside]
            columns = (
                _twice_slope(slab, 1)[:, inside],
                _twice_slope(here, 2),
                _twice_slope(here, 3),
            )
            for column, step in zip(columns, steps[b].t(), strict=True):
                column.add_(step.view(3, 1, 1, 1))
            determinant = _determinant(*columns).mul_(scales[b])
            if not here.sum().isfinite():  # no difference inside reads the voxel itself
                determinant.masked_fill_(~here.isfinite().all(dim=0), torch.nan)
            out[b, 0, first:end] = determinant
    return out


def _twice_slope(x: Tensor, axis: int) -> Tensor:
    """Twice the derivative along an axis: central, and one-sided at its two ends."""
    slope = torch.empty_like(x)
    last = x.shape[axis] - 1
    torch.sub(
        x.narrow(axis, 2, last - 1), x.narrow(axis, 0, last - 1),
        out=slope.narrow(axis, 1, last - 1),
    )  # fmt: skip
    for end, upper in ((0, 1), (last, last)):
        step = x.select(axis, upper) - x.select(axis, upper - 1)
        slope.select(axis, end).copy_(step.mul_(2))
    return slope


def _determinant(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Of the matrices whose columns are ``a``, ``b`` and ``c``, each (3, ...)."""
    total = a[0] * _minor(b, c, 1, 2)
    total.addcmul_(a[1], _minor(b, c, 2, 0))
    return total.addcmul_(a[2], _minor(b, c, 0, 1))


def _minor(b: Tensor, c: Tensor, row: int, other: int) -> Tensor:
    return (b[row] * c[other]).addcmul_(b[other], c[row], value=-1)
