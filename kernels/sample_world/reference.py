"""Specification of ``sample_world`` in plain torch, any device and type."""

import torch
from torch import Tensor

from ulae_rt.kernels._tall_plane import TallPlane, affine_points
from ulae_rt.kernels.resize.reference import resize_displacement_reference

# Slices of the output whose points exist at a time: they stay in the cache.
_SLAB = 8
_AS_SIGNED = {
    torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64,
}  # fmt: skip


def sample_world_reference(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None,
    disp_matrix: Tensor | None,
    *,
    shape: tuple[int, int, int],
    mode: str,
    factor: int = 1,
) -> Tensor:
    """``out(p) = image(M p + N u(p))``; see :func:`ulae_rt.kernels.sample_world`.

    Points are computed in float64 and only a slab of them exists at a time.
    """
    if disp is not None:
        wide = torch.promote_types(disp.dtype, torch.float32)
        disp = resize_displacement_reference(disp.to(wide), factor)
    if image.dtype in _AS_SIGNED:  # few of torch's operations know the unsigned types
        sampled_bits = sample_world_reference(
            image.view(_AS_SIGNED[image.dtype]), matrix, disp, disp_matrix, shape=shape, mode=mode
        )
        return sampled_bits.view(image.dtype)
    steps = (matrix[:, :, :3] if disp_matrix is None else disp_matrix).double()
    out = image.new_empty((len(matrix), image.shape[1], *shape))
    for b, volume in enumerate(image.expand(len(matrix), -1, -1, -1, -1)):
        sampled = TallPlane(volume) if mode == "linear" else _Nearest(volume)
        for slab, points in affine_points(matrix[b].double(), shape, _SLAB):
            if disp is not None:
                _displace(points, disp[b, :, slab].double(), steps[b])
            outside = _brought_inside(points, volume.shape[1:])
            values = sampled(*points)
            if outside is not None:
                values.masked_fill_(outside, 0)
            out[b, :, slab] = values
    return out


def _displace(points: list[Tensor], u: Tensor, steps: Tensor) -> None:
    """Add ``steps`` (3, 3) times the displacement to the three coordinates of the points."""
    for x, row in zip(points, steps, strict=True):
        for component, step in zip(u, row, strict=True):
            x.addcmul_(component, step)


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
