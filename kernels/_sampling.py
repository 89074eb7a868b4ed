"""Triton pieces of every kernel that samples a volume at displaced points.

A program computes a tile of rows and columns of one slice, one lane a voxel, rows of consecutive
lanes: neighbouring lanes then sample neighbouring points, and the eight corners of a warp's points
come from a few cache lines. Sampling points never exist in memory.

Offsets within a volume are 32-bit unless the volume needs more; the start of a volume is a 64-bit
scalar. Lanes whose point is outside are masked, and a NaN or infinite coordinate counts as outside
before it becomes an index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import LaunchConfig


@triton.jit
def tile_of(D, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr, WIDE: tl.constexpr):
    """Batch index, slice, rows (TILE_H, 1), columns (1, TILE_W) and mask of this program."""
    program = tl.program_id(0)
    across = tl.cdiv(W, TILE_W)
    down = tl.cdiv(H, TILE_H)
    w = (program % across) * TILE_W + tl.arange(0, TILE_W)[None, :]
    program = program // across
    h = (program % down) * TILE_H + tl.arange(0, TILE_H)[:, None]
    program = program // down
    d = program % D
    b = (program // D).to(tl.int64)
    if WIDE:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
    return b, d, h, w, (h < H) & (w < W)


@triton.jit
def volume_size(D, H, W):
    """Voxels of one volume, 64-bit."""
    return D.to(tl.int64) * H * W


@triton.jit
def coarse_axis(index, size, FACTOR: tl.constexpr, ACC: tl.constexpr):
    """Lower and upper neighbour of fine voxel ``index`` on ``size`` coarse ones, upper's weight."""
    if ACC.is_fp64():
        step = (size - 1).to(ACC) / (size * FACTOR - 1).to(ACC)
    else:
        step = tl.div_rn((size - 1).to(ACC), (size * FACTOR - 1).to(ACC))
    position = index.to(ACC) * step
    lower = tl.minimum(position.to(index.dtype), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), position - lower.to(ACC)


@triton.jit
def _mix(a, b, t):
    return a + t * (b - a)


@triton.jit
def _upsampled(ptr, d, h, w, H, W, mask, ACC: tl.constexpr):
    """Trilinear mean of eight coarse voxels; each axis is (lower, upper, weight of the upper)."""
    r00 = (d[0] * H + h[0]) * W
    r01 = (d[0] * H + h[1]) * W
    r10 = (d[1] * H + h[0]) * W
    r11 = (d[1] * H + h[1]) * W
    a00 = tl.load(ptr + (r00 + w[0]), mask=mask, other=0.0).to(ACC)
    b00 = tl.load(ptr + (r00 + w[1]), mask=mask, other=0.0).to(ACC)
    a01 = tl.load(ptr + (r01 + w[0]), mask=mask, other=0.0).to(ACC)
    b01 = tl.load(ptr + (r01 + w[1]), mask=mask, other=0.0).to(ACC)
    a10 = tl.load(ptr + (r10 + w[0]), mask=mask, other=0.0).to(ACC)
    b10 = tl.load(ptr + (r10 + w[1]), mask=mask, other=0.0).to(ACC)
    a11 = tl.load(ptr + (r11 + w[0]), mask=mask, other=0.0).to(ACC)
    b11 = tl.load(ptr + (r11 + w[1]), mask=mask, other=0.0).to(ACC)
    low = _mix(_mix(a00, b00, w[2]), _mix(a01, b01, w[2]), h[2])
    high = _mix(_mix(a10, b10, w[2]), _mix(a11, b11, w[2]), h[2])
    return _mix(low, high, d[2])


@triton.jit
def displacement(ptr, b, d, h, w, D, H, W, mask, FACTOR: tl.constexpr, ACC: tl.constexpr):
    """The three components at fine voxels, from a field at 1 / FACTOR resolution.

    A coarse field is in coarse voxels: it is multiplied by FACTOR and resized trilinearly with
    align_corners=True, in registers.
    """
    if FACTOR == 1:
        voxels = volume_size(D, H, W)
        start = ptr + b * 3 * voxels
        at = (d * H + h) * W + w
        u_d = tl.load(start + at, mask=mask, other=0.0).to(ACC)
        u_h = tl.load(start + voxels + at, mask=mask, other=0.0).to(ACC)
        u_w = tl.load(start + 2 * voxels + at, mask=mask, other=0.0).to(ACC)
    else:
        depth = D // FACTOR
        height = H // FACTOR
        width = W // FACTOR
        voxels = volume_size(depth, height, width)
        start = ptr + b * 3 * voxels
        on_d = coarse_axis(d, depth, FACTOR, ACC)
        on_h = coarse_axis(h, height, FACTOR, ACC)
        on_w = coarse_axis(w, width, FACTOR, ACC)
        u_d = FACTOR * _upsampled(start, on_d, on_h, on_w, height, width, mask, ACC)
        u_h = FACTOR * _upsampled(start + voxels, on_d, on_h, on_w, height, width, mask, ACC)
        u_w = FACTOR * _upsampled(start + 2 * voxels, on_d, on_h, on_w, height, width, mask, ACC)
    return u_d, u_h, u_w


@triton.jit
def _axis(position, size, BORDER: tl.constexpr, INDEX: tl.constexpr):
    """One axis of a cell.

    Lower and upper index, whether each is inside, the weight of the upper, and whether the value
    moves with the position (beyond a border it does not: at it neither, as in grid_sample).
    """
    number = position == position  # not so for NaN
    if BORDER:
        last = (size - 1).to(position.dtype)
        moves = (position > 0) & (position < last)
        position = tl.where(number, tl.minimum(tl.maximum(position, 0.0), last), -2.0)
        floor = tl.floor(position)
        lower = floor.to(INDEX)
        upper = tl.minimum(lower + 1, size - 1)
        in_lower = number
        in_upper = number
    else:
        moves = number
        beyond = (size + 1).to(position.dtype)
        position = tl.where(number, tl.minimum(tl.maximum(position, -2.0), beyond), -2.0)
        floor = tl.floor(position)
        lower = floor.to(INDEX)
        upper = lower + 1
        in_lower = (lower >= 0) & (lower < size)
        in_upper = (upper >= 0) & (upper < size)
    return lower, upper, in_lower, in_upper, position - floor, moves


@triton.jit
def cell(d, h, w, u, D, H, W, BORDER: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """The three axes (see ``_axis``) of the cell around voxel (d, h, w) displaced by ``u``."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    return (
        _axis(d.to(ACC) + u[0], D, BORDER, INDEX),
        _axis(h.to(ACC) + u[1], H, BORDER, INDEX),
        _axis(w.to(ACC) + u[2], W, BORDER, INDEX),
    )


@triton.jit
def _rounded(axis):
    """Nearest index of an axis (a half goes to the even one) and whether it is inside."""
    up = (axis[4] > 0.5) | ((axis[4] == 0.5) & (axis[0] % 2 != 0))
    return tl.where(up, axis[1], axis[0]), tl.where(up, axis[3], axis[2])


@triton.jit
def nearest_value(ptr, cells, H, W, mask):
    """The voxel nearest to each point, 0 outside."""
    d, in_d = _rounded(cells[0])
    h, in_h = _rounded(cells[1])
    w, in_w = _rounded(cells[2])
    return tl.load(ptr + ((d * H + h) * W + w), mask=mask & in_d & in_h & in_w, other=0.0)


@triton.jit
def scatter_nearest(ptr, value, cells, H, W, mask, scale, FIXED: tl.constexpr):
    """Adjoint of :func:`nearest_value`; ``scale`` and FIXED as in :func:`scatter`."""
    d, in_d = _rounded(cells[0])
    h, in_h = _rounded(cells[1])
    w, in_w = _rounded(cells[2])
    _add(ptr + ((d * H + h) * W + w), value, mask & in_d & in_h & in_w, scale, FIXED)


@triton.jit
def corners(ptr, cells, H, W, mask, ACC: tl.constexpr):
    """The eight voxels of each cell, 0 outside, in the order of their binary (d, h, w) number."""
    d, h, w = cells
    r00 = (d[0] * H + h[0]) * W
    r01 = (d[0] * H + h[1]) * W
    r10 = (d[1] * H + h[0]) * W
    r11 = (d[1] * H + h[1]) * W
    m00 = mask & d[2] & h[2]
    m01 = mask & d[2] & h[3]
    m10 = mask & d[3] & h[2]
    m11 = mask & d[3] & h[3]
    return (
        tl.load(ptr + (r00 + w[0]), mask=m00 & w[2], other=0.0).to(ACC),
        tl.load(ptr + (r00 + w[1]), mask=m00 & w[3], other=0.0).to(ACC),
        tl.load(ptr + (r01 + w[0]), mask=m01 & w[2], other=0.0).to(ACC),
        tl.load(ptr + (r01 + w[1]), mask=m01 & w[3], other=0.0).to(ACC),
        tl.load(ptr + (r10 + w[0]), mask=m10 & w[2], other=0.0).to(ACC),
        tl.load(ptr + (r10 + w[1]), mask=m10 & w[3], other=0.0).to(ACC),
        tl.load(ptr + (r11 + w[0]), mask=m11 & w[2], other=0.0).to(ACC),
        tl.load(ptr + (r11 + w[1]), mask=m11 & w[3], other=0.0).to(ACC),
    )


@triton.jit
def interpolate(v, cells):
    """Trilinear mean of a cell's corners."""
    t_d, t_h, t_w = cells[0][4], cells[1][4], cells[2][4]
    low = _mix(_mix(v[0], v[1], t_w), _mix(v[2], v[3], t_w), t_h)
    high = _mix(_mix(v[4], v[5], t_w), _mix(v[6], v[7], t_w), t_h)
    return _mix(low, high, t_d)


@triton.jit
def slopes(v, cells):
    """Derivatives of :func:`interpolate` by the point's three coordinates."""
    t_d, t_h, t_w = cells[0][4], cells[1][4], cells[2][4]
    e00, e01 = _mix(v[0], v[1], t_w), _mix(v[2], v[3], t_w)
    e10, e11 = _mix(v[4], v[5], t_w), _mix(v[6], v[7], t_w)
    by_d = _mix(e10, e11, t_h) - _mix(e00, e01, t_h)
    by_h = _mix(e01 - e00, e11 - e10, t_d)
    low = _mix(v[1] - v[0], v[3] - v[2], t_h)
    high = _mix(v[5] - v[4], v[7] - v[6], t_h)
    by_w = _mix(low, high, t_d)
    return (
        tl.where(cells[0][5], by_d, 0.0),
        tl.where(cells[1][5], by_h, 0.0),
        tl.where(cells[2][5], by_w, 0.0),
    )


@triton.jit
def _add(ptr, value, mask, scale, FIXED: tl.constexpr):
    # The sum of integers does not depend on the order in which atomics arrive.
    if FIXED:
        value = tl.floor(value.to(tl.float64) * scale + 0.5).to(tl.int64)
    tl.atomic_add(ptr, value, mask=mask, sem="relaxed")


@triton.jit
def scatter(ptr, value, cells, H, W, mask, scale, FIXED: tl.constexpr):
    """Adjoint of :func:`corners` and :func:`interpolate`: ``value`` added to the eight voxels.

    With FIXED, as 64-bit integers in units of 1 / ``scale``.
    """
    d, h, w = cells
    t_d, t_h, t_w = d[4], h[4], w[4]
    r00 = (d[0] * H + h[0]) * W
    r01 = (d[0] * H + h[1]) * W
    r10 = (d[1] * H + h[0]) * W
    r11 = (d[1] * H + h[1]) * W
    m00 = mask & d[2] & h[2]
    m01 = mask & d[2] & h[3]
    m10 = mask & d[3] & h[2]
    m11 = mask & d[3] & h[3]
    v00 = value * (1 - t_d) * (1 - t_h)
    v01 = value * (1 - t_d) * t_h
    v10 = value * t_d * (1 - t_h)
    v11 = value * t_d * t_h
    _add(ptr + (r00 + w[0]), v00 * (1 - t_w), m00 & w[2], scale, FIXED)
    _add(ptr + (r00 + w[1]), v00 * t_w, m00 & w[3], scale, FIXED)
    _add(ptr + (r01 + w[0]), v01 * (1 - t_w), m01 & w[2], scale, FIXED)
    _add(ptr + (r01 + w[1]), v01 * t_w, m01 & w[3], scale, FIXED)
    _add(ptr + (r10 + w[0]), v10 * (1 - t_w), m10 & w[2], scale, FIXED)
    _add(ptr + (r10 + w[1]), v10 * t_w, m10 & w[3], scale, FIXED)
    _add(ptr + (r11 + w[0]), v11 * (1 - t_w), m11 & w[2], scale, FIXED)
    _add(ptr + (r11 + w[1]), v11 * t_w, m11 & w[3], scale, FIXED)


def tile_grid(shape: torch.Size, config: LaunchConfig) -> tuple[int]:
    """Programs for a (B, C, D, H, W) volume: one dimension, which alone may be that long."""
    B, _, D, H, W = shape
    return (B * D * triton.cdiv(H, config.tile[0]) * triton.cdiv(W, config.tile[1]),)


class ScatteredSums:
    """Where :func:`scatter` adds up the gradient of a sampled volume.

    Atomics arrive in any order, so float sums differ in their last bits from run to run. Under
    ``torch.use_deterministic_algorithms(True)`` the sums are 64-bit integers in units of
    ``1 / scale``, which have no order. The unit follows from the largest gradient so that even all
    voxels falling onto one cannot overflow: for 2^23 voxels it is 2^-38 of that gradient.

    Args:
        shape: (B, C, D, H, W) of the volume.
        grads: what will be scattered into it.
    """

    def __init__(self, shape: torch.Size, *grads: Tensor) -> None:
        self.fixed = torch.are_deterministic_algorithms_enabled()
        grad = grads[0]
        if self.fixed:
            largest = torch.stack([g.detach().abs().amax().double() for g in grads]).amax()
            # A NaN or Inf among the gradients makes the scale, and so every sum, NaN.
            largest = torch.where(largest == 0, 1.0, largest)
            self.scale = 2.0**61 / (largest * shape[2:].numel())
            self.total = torch.zeros(shape, dtype=torch.int64, device=grad.device)
        else:
            self.scale = grad
            dtype = _launch.compute_dtype(*grads)
            self.total = torch.zeros(shape, dtype=dtype, device=grad.device)

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """The sums in ``dtype``."""
        if self.fixed:
            return (self.total.double() / self.scale).to(dtype)
        return self.total.to(dtype)
