"""Linear sampling at the points of an affine matrix, by torch's CPU operators at their fastest."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def affine_points(
    matrix: Tensor, shape: tuple[int, int, int], slices: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of an output and where the matrix maps their voxels.

    Args:
        matrix: (3, 4), float64, from voxels (d, h, w) of the output's grid.
        shape: (D, H, W) of the output.
        slices: how many of them at a time.

    Yields:
        Which slices, and three coordinates of shape (slices, H, W), float64, which the caller may
        change.
    """
    axes = (torch.arange(size, dtype=torch.float64, device=matrix.device) for size in shape)
    d, h, w = (axis.view([-1 if i == n else 1 for n in range(3)]) for i, axis in enumerate(axes))
    planes = [row[3] + row[1] * h + row[2] * w for row in matrix]
    for first in range(0, shape[0], slices):
        slab = slice(first, min(first + slices, shape[0]))
        yield slab, [plane + row[0] * d[slab] for plane, row in zip(planes, matrix, strict=True)]


class TallPlane:
    """A (C, D, H, W) volume to be sampled between its voxels, in float64.

    On a CPU torch samples planes with vector instructions and volumes without, so the slices stand
    row upon row in one tall plane; the two slices that a point lies between are two channels of it.
    The points lie within the centres of the outermost voxels.
    """

    def __init__(self, volume: Tensor) -> None:
        self.channels, depth, height, width = volume.shape
        # The last slice and the last row of each slice stand twice. A point on them has no other
        # one beyond, and a NaN of the next channel or slice is not to reach it with a weight of 0.
        slice_rows = height + 1
        slices = volume.new_empty(
            (depth + 1, self.channels, slice_rows, width), dtype=torch.float64
        )
        slices[:-1, :, :-1] = volume.transpose(0, 1)
        slices[:-1, :, -1] = slices[:-1, :, -2]
        slices[-1] = slices[-2]
        self.step = self.channels * slice_rows  # rows from a slice to the next
        self.rows = (depth - 1) * self.step + slice_rows
        self.width = width
        # Twice the channels: those of one slice, and those of the next.
        self.plane = slices.as_strided(
            (1, 2 * self.channels, self.rows, width), (0, slice_rows * width, width, 1)
        )

    def __call__(self, d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """(C, slices, H', W') at points (slices, H', W'), whose memory it uses."""
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
