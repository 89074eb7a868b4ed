"""Specification of ``affine_normal_equations`` in plain torch, any device and type."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Points whose rows exist at a time: they stay in the cache.
_CHUNK = 16_384


def affine_normal_equations_reference(
    moving: Tensor,
    points: Tensor,
    values: Tensor,
    matrix: Tensor,
    *,
    degree: int,
    derivatives: bool,
    cut: Sequence[bool],
) -> Tensor:
    """See :func:`ulae_rt.kernels.affine_normal_equations`.

    Voxels are interpolated in ``moving``'s type, at least in float32; rows and sums are float64.
    """
    dtype = torch.promote_types(moving.dtype, torch.float32)
    matrix = matrix.to(dtype)
    volumes = [volume[0].to(dtype).contiguous() for volume in moving]
    count, device = len(values), moving.device
    slope_rows = 12 if derivatives else 0
    shape = (slope_rows + degree + 2, min(count, _CHUNK))
    memory = torch.empty(shape, dtype=torch.float64, device=device)
    sums = torch.zeros((len(matrix), shape[0], shape[0]), dtype=torch.float64, device=device)
    for first in range(0, count, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, count))
        rows = memory[:, : chunk.stop - first]
        p = points[:, chunk].to(dtype)
        # [p, 1]. Where a point is nowhere the slopes are 0: no infinity must make them NaN.
        finite_p = p.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        p_1 = torch.cat((finite_p, torch.ones_like(p[:1]))).double()
        rows[-1] = values[chunk]
        for b, transform in enumerate(matrix):
            volume = volumes[b if len(volumes) > 1 else 0]
            # Not a matrix product, which torch may be told to round to TF32.
            at = torch.addcmul(transform[:, 3:], transform[:, 2:3], p[2])
            at.addcmul_(transform[:, 1:2], p[1]).addcmul_(transform[:, :1], p[0])
            value, slopes = _sampled(volume, at, derivatives)
            if slopes is not None:
                torch.mul(slopes.double()[:, None], p_1, out=rows[:12].view(3, 4, -1))
            powers = rows[slope_rows:-1]
            powers[0] = 1
            powers[1] = value
            for exponent in range(2, degree + 1):
                torch.mul(powers[exponent - 1], powers[1], out=powers[exponent])
            if any(cut):
                rows[-1] = values[chunk]  # what the last matrix cut off counts again
                rows.masked_fill_(_beyond_cut_faces(at, volume, cut), 0)
            sums[b].addmm_(rows, rows.t())
    # A matrix product rounds an element and the one across the diagonal differently.
    return sums.triu() + sums.triu(1).mT


def _beyond_cut_faces(at: Tensor, volume: Tensor, cut: Sequence[bool]) -> Tensor:
    """(N,), whether the points ``at`` (3, N) lie beyond one of the faces that cut the brain."""
    beyond = torch.zeros_like(at[0], dtype=torch.bool)
    for x, size, first, last in zip(at, volume.shape, cut[::2], cut[1::2], strict=True):
        if first:
            beyond |= x < -0.5
        if last:
            beyond |= x >= size - 0.5
    return beyond


def _sampled(volume: Tensor, at: Tensor, derivatives: bool) -> tuple[Tensor, Tensor | None]:
    """The image between its voxels at the points ``at`` (3, N), and its slopes (3, N) there."""
    last = at.new_tensor([[size - 1] for size in volume.shape])
    inside = (at >= -0.5) & (at < last + 0.5)  # not so for NaN
    outside = ~(inside[0] & inside[1] & inside[2])
    held = at.nan_to_num(0.0).clamp_(min=0).clamp_(max=last)
    lower = held.floor().clamp_(max=(last - 1).clamp_(min=0))
    corners = _corners(volume, lower.to(torch.int32 if volume.numel() < 2**31 else torch.int64))
    t_d, t_h, t_w = held.sub_(lower)
    edges = [torch.lerp(corners[i], corners[i + 1], t_w) for i in (0, 2, 4, 6)]
    near, far = (torch.lerp(edges[i], edges[i + 1], t_h) for i in (0, 2))
    value = torch.lerp(near, far, t_d).masked_fill_(outside, 0)
    if not derivatives:
        return value, None
    by_h = torch.lerp(edges[1] - edges[0], edges[3] - edges[2], t_d)
    differences = [corners[i + 1] - corners[i] for i in (0, 2, 4, 6)]
    near_by_w, far_by_w = (torch.lerp(differences[i], differences[i + 1], t_h) for i in (0, 2))
    slopes = torch.stack((far - near, by_h, torch.lerp(near_by_w, far_by_w, t_d)))
    # In the half voxel around the outermost centres the value does not change.
    still = ~((at > 0) & (at < last)) | outside
    return value, slopes.masked_fill_(still, 0)


def _corners(volume: Tensor, lower: Tensor) -> list[Tensor]:
    """The eight voxels from the indices ``lower`` (3, N) on, by their binary (d, h, w) number."""
    _, height, width = volume.shape
    first = (lower[0] * height + lower[1]) * width + lower[2]
    # An axis of one voxel has no next one.
    steps = [
        step if size > 1 else 0
        for step, size in zip((height * width, width, 1), volume.shape, strict=True)
    ]
    voxels = volume.view(-1)
    return [
        voxels[sum(itertools.compress(steps, corner)) :].index_select(0, first)
        for corner in itertools.product((0, 1), repeat=3)
    ]
