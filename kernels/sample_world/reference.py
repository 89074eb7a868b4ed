"""Specification of ``sample_world`` in plain torch, any device and type."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.kernels.resize.reference import resize_displacement_reference

# Slices of the output whose points exist at a time: they stay in the cache.
_SLAB = 8


def sample_world_reference(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None,
    *,
    shape: tuple[int, int, int],
    mode: str,
    factor: int = 1,
) -> Tensor:
    """``out(p) = image(M (p + u(p)))``; see :func:`ulae_rt.kernels.sample_world`.

    Points are computed in float64 and only a slab of them exists at a time. On a CPU torch samples
    planes with vector instructions and volumes without, so linear sampling is done in one tall
    plane, slice upon slice; the two slices that a point lies between are two channels of it.
    """
    if disp is not None:
        wide = torch.promote_types(disp.dtype, torch.float32)
        disp = resize_displacement_reference(disp.to(wide), factor)
    out = image.new_empty((len(matrix), image.shape[1], *shape))
    for b, volume in enumerate(image.expand(len(matrix), -1, -1, -1, -1)):
        sampled = _Linear(volume) if mode == "linear" else _Nearest(volume)
        field = None if disp is None else disp[b]
        for slab, points in _slabs(matrix[b].double(), field, shape):
            outside = _brought_inside(points, volume.shape[1:])
            values = sampled(*points)
            if outside is not None:
                values.masked_fill_(outside, 0)
            out[b, :, slab] = values
    return out


def _slabs(
    matrix: Tensor, disp: Tensor | None, shape: tuple[int, int, int]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the output and the three coordinates of their points in the image, in voxels."""
    axes = (torch.arange(size, dtype=torch.float64, device=matrix.device) for size in shape)
    d, h, w = (axis.view([-1 if i == n else 1 for n in range(3)]) for i, axis in enumerate(axes))
    planes = [row[3] + row[1] * h + row[2] * w for row in matrix]
    for first in range(0, shape[0], _SLAB):
        slab = slice(first, min(first + _SLAB, shape[0]))
        points = [plane + row[0] * d[slab] for plane, row in zip(planes, matrix, strict=True)]
        if disp is not None:
            u = disp[:, slab].double()
            for x, row in zip(points, matrix, strict=True):
                for step, component in zip(row[:3], u, strict=True):
                    x.addcmul_(component, step)
        yield slab, points


def _brought_inside(points: list[Tensor], sizes: torch.Size) -> Tensor | None:
    """Move points to the centres of the outermost voxels; which were outside, None if none was.

    As in ITK half a voxel around those centres belongs to the image. A NaN does not.
    """
    outside = None
    for x, size in zip(points, sizes, strict=True):
        lowest, highest = torch.aminmax(x)
        if not (lowest >= -0.5 and highest < size - 0.5):
            beyond = ~((x >= -0.5) & (x < size - 0.5))
            outside = beyond if outside is None else outside | beyond
            x.nan_to_num_(0.0)
        x.clamp_(0, size - 1)
    return outside


class _Linear:
    """A (C, D, H, W) volume between its voxels, in float64; points lie within their centres."""

    def __init__(self, volume: Tensor) -> None:
        self.channels, depth, self.height, self.width = volume.shape
        # One more slice than there is: the last has no other one behind it, and needs none.
        slices = volume.new_empty(
            (depth + 1, self.channels, self.height, self.width), dtype=torch.float64
        )
        slices[:-1] = volume.transpose(0, 1)
        slices[-1] = slices[-2]
        self.step = self.channels * self.height  # rows from a slice to the next
        self.rows = (depth - 1) * self.step + self.height
        # Twice the channels: those of one slice, and those of the next.
        self.plane = slices.as_strided(
            (1, 2 * self.channels, self.rows, self.width),
            (0, self.height * self.width, self.width, 1),
        )

    def __call__(self, d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        first = d.floor()
        # Row r of the plane is (2 r + 1) / rows - 1 for grid_sample.
        row = h.add_(first, alpha=self.step).mul_(2 / self.rows).add_(1 / self.rows - 1)
        column = w.mul_(2 / self.width).add_(1 / self.width - 1)
        points = torch.stack((column, row), dim=-1)
        plane = self.plane.expand(len(points), -1, -1, -1)
        # Rounding must not put what lies on the last row or column half outside.
        both = F.grid_sample(plane, points, padding_mode="border", align_corners=False)
        lower, upper = both.split(self.channels, dim=1)
        return torch.lerp(lower, upper, d.sub_(first)[:, None]).transpose(0, 1)


class _Nearest:
    """The voxel nearest to a point, a half goes up as in ITK; of any type."""

    def __init__(self, volume: Tensor) -> None:
        self.sizes = volume.shape[1:]
        self.voxels = volume.flatten(1)

    def __call__(self, d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        d, h, w = (
            x.add_(0.5).floor_().clamp_(max=size - 1)
            for x, size in zip((d, h, w), self.sizes, strict=True)
        )
        at = d.mul_(self.sizes[1]).add_(h).mul_(self.sizes[2]).add_(w).long()
        return self.voxels[:, at]
