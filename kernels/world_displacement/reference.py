"""Specification of ``world_displacement`` in plain torch, any device and type."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ulae_rt.kernels._tall_plane import TallPlane, affine_points

# Axes of two grids that stray from one another by less than this, in voxels of the field over the
# whole output, are the same axes: the rounding of a header.
_ALIGNED = 1e-3
# Slices of the output that are interpolated at a time: they stay in the cache.
_SLAB = 4


def world_displacement_reference(
    disp: Tensor,
    to_field: Tensor,
    linear: Tensor,
    offset: Tensor,
    *,
    shape: tuple[int, int, int],
) -> Tensor:
    """``out(p) = L u(T p) + O p``; see :func:`ulae_rt.kernels.world_displacement`.

    L is applied to the field's own voxels, of which there are fewer than of the output. Points and
    offsets are computed in float64, and only a slab of them exists at a time.
    """
    wide = torch.promote_types(disp.dtype, torch.float32)
    mixed = (linear.to(wide) @ disp.to(wide).flatten(2)).view(disp.shape)
    out = mixed.new_empty((len(disp), 3, *shape))
    for b, field in enumerate(mixed):
        matrix = to_field[b].double()
        if not matrix.isfinite().all():
            out[b] = torch.nan
            continue
        axes = _common_axes(matrix, shape)
        # A product with a whole axis would spread what is not finite along all of it.
        if axes is not None and field.isfinite().all():
            slabs = _separable_slabs(field, matrix, axes, shape)
        else:
            slabs = _general_slabs(field, matrix, shape)
        offsets = affine_points(offset[b].double(), shape, _SLAB)
        for (slab, moved), values in zip(offsets, slabs, strict=True):
            for component, coordinate, value in zip(out[b], moved, values, strict=True):
                component[slab] = coordinate.add_(value)
    return out


def _common_axes(matrix: Tensor, shape: tuple[int, int, int]) -> list[int] | None:
    """The output's axis that each axis of the field runs along; None if one runs along none."""
    linear = matrix[:, :3].cpu()
    along = linear.abs().argmax(dim=1, keepdim=True)
    strays = linear.scatter(1, along, 0.0).abs() @ _last_index(shape)
    axes: list[int] = along.flatten().tolist()
    return axes if sorted(axes) == [0, 1, 2] and float(strays.max()) < _ALIGNED else None


def _last_index(shape: tuple[int, int, int]) -> Tensor:
    return torch.tensor(shape, dtype=torch.float64) - 1


def _separable_slabs(
    field: Tensor, matrix: Tensor, axes: list[int], shape: tuple[int, int, int]
) -> Iterator[Tensor]:
    """The field (3, D, H, W) at the output's voxels, (3, slices, H', W') at a time.

    One axis after the other, each a matrix product.
    """
    # Axes that stray are right in the middle of the output.
    middle = matrix[:, :3].cpu() @ (_last_index(shape) / 2) + matrix[:, 3].cpu()
    along: dict[int, Tensor] = {}
    for axis, output_axis in enumerate(axes):
        size, last = shape[output_axis], field.shape[axis + 1] - 1
        index = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        position = (middle[axis] + float(matrix[axis, output_axis]) * index).clamp_(0, last)
        voxels = torch.arange(last + 1, dtype=torch.float64)
        weights = (1 - (position[:, None] - voxels).abs()).clamp_min(0)
        along[output_axis] = weights.to(field)
    # The field's axes in the output's order.
    field = field.permute(0, *(1 + axes.index(axis) for axis in range(3)))
    slices = along[1] @ (field @ along[2].t())
    for rows in along[0].split(_SLAB):
        # Few of the field's slices reach these of the output.
        used = rows.any(dim=0).nonzero()
        window = slice(int(used[0]), int(used[-1]) + 1)
        yield (rows[:, window] @ slices[:, window].flatten(2)).unflatten(2, shape[1:])


def _general_slabs(field: Tensor, matrix: Tensor, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """:func:`_separable_slabs` for any matrix, in float64."""
    sampled = TallPlane(field)
    for _, points in affine_points(matrix, shape, _SLAB):
        for x, size in zip(points, field.shape[1:], strict=True):
            x.clamp_(0, size - 1)
        yield sampled(*points)
