"""Triton pieces of every kernel that samples a volume at displaced points.

A program marches through slices with a tile of rows and columns, rows of consecutive lanes:
neighbouring lanes then sample neighbouring points, the eight corners of a warp's points come from a
few cache lines, and of the two slices that a point lies between one is still in L1 from the slice
before. Sampling points never exist in memory. Backward, where atomics are what takes the time, a
program has one slice.

Offsets within a volume are 32-bit unless the volume needs more; the start of a volume is a 64-bit
scalar. Lanes whose point is outside are masked, and a NaN or infinite coordinate counts as outside
before it becomes an index.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import LaunchConfig, march, resident

# What a program does before its first slice, and reading one slice more than it has, take as long
# as this many slices.
_START = 2


@triton.jit
def slices_of(D, slices, BATCHED: tl.constexpr, WIDE: tl.constexpr):
    """Batch index of this program, its first slice and the one after its last, of ``slices``.

    The grid has three axes because a division of the program's number would cost every warp more
    than its eight corners do.
    """
    first = tl.program_id(0)
    b = tl.cast(0, tl.int64)
    if BATCHED:
        deep = tl.cdiv(D, slices)
        b = (first // deep).to(tl.int64)
        first = first % deep
    first *= slices
    end = tl.minimum(first + slices, D)
    if WIDE:
        first = first.to(tl.int64)
        end = end.to(tl.int64)
    return b, first, end


@triton.jit
def tile_of(H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr, WIDE: tl.constexpr):
    """Each lane's row, column and mask, (TILE_H TILE_W,) of this program.

    The tile has one axis, because Triton 3.6 lays two out in one order for what is read in rows and
    in another for the corners, and carries every value across.
    """
    lane = tl.arange(0, TILE_H * TILE_W)
    w = tl.program_id(1) * TILE_W + lane % TILE_W
    h = tl.program_id(2) * TILE_H + lane // TILE_W
    if WIDE:
        h = h.to(tl.int64)
    return h, w, (h < H) & (w < W)


@triton.jit
def volume_size(D, H, W):
    """Voxels of one volume, 64-bit."""
    return D.to(tl.int64) * H * W


@triton.jit
def linear_row(ptr, ROW: tl.constexpr, ACC: tl.constexpr):
    """A row of a (3, 3) matrix, three numbers.

    Rows are read before anything is stored, since that could be the matrix for all Triton knows.
    """
    ptr += 3 * ROW
    return tl.load(ptr).to(ACC), tl.load(ptr + 1).to(ACC), tl.load(ptr + 2).to(ACC)


@triton.jit
def affine_row(ptr, ROW: tl.constexpr, ACC: tl.constexpr):
    """A row of a (3, 4) matrix, four numbers; see :func:`linear_row`."""
    ptr += 4 * ROW
    return (
        tl.load(ptr).to(ACC), tl.load(ptr + 1).to(ACC),
        tl.load(ptr + 2).to(ACC), tl.load(ptr + 3).to(ACC),
    )  # fmt: skip


@triton.jit
def affine_coordinate(row, d, h, w):
    """One coordinate of where a (3, 4) matrix maps voxel (d, h, w)."""
    return row[0] * d + (row[1] * h + (row[2] * w + row[3]))


@triton.jit
def times_components(row, u):
    """A row of a (3, 3) matrix times three components."""
    return row[0] * u[0] + (row[1] * u[1] + row[2] * u[2])


@triton.jit
def coarse_axis(index, size, FACTOR: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """Where fine voxel ``index`` lies between ``size`` coarse ones, align_corners=True.

    The lower neighbour and the weight of the upper, which is the lower plus one; an axis of one
    voxel has no upper and its weight is 0.
    """
    # step = (size - 1) / (size FACTOR - 1): an approximate division, then its remainder.
    coarse = (size - 1).to(ACC)
    fine = (size * FACTOR - 1).to(ACC)
    inverse = 1.0 / fine
    step = coarse * inverse
    step += tl.fma(-step, fine, coarse) * inverse
    position = tl.cast(index, ACC) * step  # what a loop counts is an int to the interpreter
    lower = tl.minimum(position.to(tl.int64 if WIDE else tl.int32), tl.maximum(size - 2, 0))
    return lower, position - lower.to(ACC)


@triton.jit
def _mix(a, b, t):
    return a + t * (b - a)


@triton.jit
def _upsampled(ptr, t, up, W, HW, mask, ACC: tl.constexpr):
    """Trilinear mean of the eight coarse voxels from ``ptr`` on.

    ``t`` are the three weights of the upper ones, ``up`` whether there are any.
    """
    p01 = ptr + W
    p10 = ptr + HW
    p11 = p10 + W
    a00 = tl.load(ptr, mask=mask, other=0.0).to(ACC)
    b00 = tl.load(ptr + 1, mask=mask & up[2], other=0.0).to(ACC)
    a01 = tl.load(p01, mask=mask & up[1], other=0.0).to(ACC)
    b01 = tl.load(p01 + 1, mask=mask & up[1] & up[2], other=0.0).to(ACC)
    a10 = tl.load(p10, mask=mask & up[0], other=0.0).to(ACC)
    b10 = tl.load(p10 + 1, mask=mask & up[0] & up[2], other=0.0).to(ACC)
    a11 = tl.load(p11, mask=mask & up[0] & up[1], other=0.0).to(ACC)
    b11 = tl.load(p11 + 1, mask=mask & up[0] & up[1] & up[2], other=0.0).to(ACC)
    low = _mix(_mix(a00, b00, t[2]), _mix(a01, b01, t[2]), t[1])
    high = _mix(_mix(a10, b10, t[2]), _mix(a11, b11, t[2]), t[1])
    return _mix(low, high, t[0])


@triton.jit
def displacement(
    ptr, b, d, h, w, D, H, W, mask, FACTOR: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr
):
    """The three components at fine voxels, from a field at 1 / FACTOR resolution.

    A coarse field is in coarse voxels: it is multiplied by FACTOR and resized trilinearly with
    align_corners=True, in registers.
    """
    if FACTOR == 1:
        voxels = volume_size(D, H, W)
        u = load_components(ptr + b * 3 * voxels + ((d * H + h) * W + w), voxels, mask, ACC)
    else:
        depth = D // FACTOR
        height = H // FACTOR
        width = W // FACTOR
        voxels = volume_size(depth, height, width)
        on_d, t_d = coarse_axis(d, depth, FACTOR, ACC, WIDE)
        on_h, t_h = coarse_axis(h, height, FACTOR, ACC, WIDE)
        on_w, t_w = coarse_axis(w, width, FACTOR, ACC, WIDE)
        start = ptr + b * 3 * voxels + ((on_d * height + on_h) * width + on_w)
        t = (t_d, t_h, t_w)
        up = (depth > 1, height > 1, width > 1)
        slab = height * width
        u = (
            FACTOR * _upsampled(start, t, up, width, slab, mask, ACC),
            FACTOR * _upsampled(start + voxels, t, up, width, slab, mask, ACC),
            FACTOR * _upsampled(start + 2 * voxels, t, up, width, slab, mask, ACC),
        )
    return u


@triton.jit
def _axis(position, size, BORDER: tl.constexpr, INDEX: tl.constexpr, UNSIGNED: tl.constexpr):
    """One axis of a cell.

    Lower index, upper index, whether each is inside, the weight of the upper, and whether the value
    moves with the position (with a border it does not beyond it, and as in grid_sample not at it).
    """
    number = position == position  # not so for NaN
    last = tl.cast(size - 1, position.dtype)  # a size of 1 is a constant
    moves = (position > 0) & (position < last)
    if BORDER:
        position = tl.where(number, tl.minimum(tl.maximum(position, 0.0), last), 0.0)
    else:
        position = tl.where(number, tl.minimum(tl.maximum(position, -2.0), last + 2), -2.0)
    floor = tl.floor(position)
    lower = floor.to(INDEX)
    if BORDER:
        upper = tl.minimum(lower + 1, size - 1)
        in_lower = number
        in_upper = number
    else:
        upper = lower + 1
        # As unsigned numbers the negative ones are beyond every size: one comparison for two.
        in_lower = lower.to(UNSIGNED, bitcast=True) < size
        in_upper = upper.to(UNSIGNED, bitcast=True) < size
    return lower, upper, in_lower, in_upper, position - floor, moves


@triton.jit
def cell(d, h, w, u, D, H, W, BORDER: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """The three axes (see ``_axis``) of the cell around voxel (d, h, w) displaced by ``u``."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    return (
        _axis(tl.cast(d, ACC) + u[0], D, BORDER, INDEX, UNSIGNED),
        _axis(h.to(ACC) + u[1], H, BORDER, INDEX, UNSIGNED),
        _axis(w.to(ACC) + u[2], W, BORDER, INDEX, UNSIGNED),
    )


@triton.jit
def _pointers(ptr, cells, H, W, BORDER: tl.constexpr):
    """The eight corners of each cell, in the order of their binary (d, h, w) number."""
    d, h, w = cells
    p000 = ptr + ((d[0] * H + h[0]) * W + w[0])
    if BORDER:
        p001 = ptr + ((d[0] * H + h[0]) * W + w[1])
        p010 = ptr + ((d[0] * H + h[1]) * W + w[0])
        p011 = ptr + ((d[0] * H + h[1]) * W + w[1])
        p100 = ptr + ((d[1] * H + h[0]) * W + w[0])
        p101 = ptr + ((d[1] * H + h[0]) * W + w[1])
        p110 = ptr + ((d[1] * H + h[1]) * W + w[0])
        p111 = ptr + ((d[1] * H + h[1]) * W + w[1])
    else:
        # Upper is lower plus one: neighbours along w are an immediate offset of one address.
        p010 = p000 + W
        p100 = p000 + H * W
        p110 = p100 + W
        p001 = p000 + 1
        p011 = p010 + 1
        p101 = p100 + 1
        p111 = p110 + 1
    return p000, p001, p010, p011, p100, p101, p110, p111


@triton.jit
def _inside(cells, mask):
    """Whether each of the eight corners is inside."""
    d, h, w = cells
    m00 = mask & d[2] & h[2]
    m01 = mask & d[2] & h[3]
    m10 = mask & d[3] & h[2]
    m11 = mask & d[3] & h[3]
    return (
        m00 & w[2], m00 & w[3], m01 & w[2], m01 & w[3],
        m10 & w[2], m10 & w[3], m11 & w[2], m11 & w[3],
    )  # fmt: skip


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
def corners(ptr, cells, H, W, mask, BORDER: tl.constexpr, ACC: tl.constexpr):
    """The eight voxels of each cell, 0 outside, in the order of their binary (d, h, w) number."""
    p = _pointers(ptr, cells, H, W, BORDER)
    m = _inside(cells, mask)
    return (
        tl.load(p[0], mask=m[0], other=0.0).to(ACC),
        tl.load(p[1], mask=m[1], other=0.0).to(ACC),
        tl.load(p[2], mask=m[2], other=0.0).to(ACC),
        tl.load(p[3], mask=m[3], other=0.0).to(ACC),
        tl.load(p[4], mask=m[4], other=0.0).to(ACC),
        tl.load(p[5], mask=m[5], other=0.0).to(ACC),
        tl.load(p[6], mask=m[6], other=0.0).to(ACC),
        tl.load(p[7], mask=m[7], other=0.0).to(ACC),
    )


@triton.jit
def interpolate(v, cells):
    """Trilinear mean of a cell's corners."""
    t_d, t_h, t_w = cells[0][4], cells[1][4], cells[2][4]
    low = _mix(_mix(v[0], v[1], t_w), _mix(v[2], v[3], t_w), t_h)
    high = _mix(_mix(v[4], v[5], t_w), _mix(v[6], v[7], t_w), t_h)
    return _mix(low, high, t_d)


@triton.jit
def slopes(v, cells, BORDER: tl.constexpr):
    """Derivatives of :func:`interpolate` by the point's three coordinates."""
    t_d, t_h, t_w = cells[0][4], cells[1][4], cells[2][4]
    e00, e01 = _mix(v[0], v[1], t_w), _mix(v[2], v[3], t_w)
    e10, e11 = _mix(v[4], v[5], t_w), _mix(v[6], v[7], t_w)
    by_d = _mix(e10, e11, t_h) - _mix(e00, e01, t_h)
    by_h = _mix(e01 - e00, e11 - e10, t_d)
    low = _mix(v[1] - v[0], v[3] - v[2], t_h)
    high = _mix(v[5] - v[4], v[7] - v[6], t_h)
    by_w = _mix(low, high, t_d)
    if BORDER:
        by_d = tl.where(cells[0][5], by_d, 0.0)
        by_h = tl.where(cells[1][5], by_h, 0.0)
        by_w = tl.where(cells[2][5], by_w, 0.0)
    return by_d, by_h, by_w


@triton.jit
def _add(ptr, value, mask, scale, FIXED: tl.constexpr):
    # The sum of integers does not depend on the order in which atomics arrive.
    if FIXED:
        value = tl.floor(value.to(tl.float64) * scale + 0.5).to(tl.int64)
    tl.atomic_add(ptr, value, mask=mask, sem="relaxed")


@triton.jit
def scatter(ptr, value, cells, H, W, mask, scale, BORDER: tl.constexpr, FIXED: tl.constexpr):
    """Adjoint of :func:`corners` and :func:`interpolate`: ``value`` added to the eight voxels.

    With FIXED, as 64-bit integers in units of 1 / ``scale``.
    """
    t_d, t_h, t_w = cells[0][4], cells[1][4], cells[2][4]
    p = _pointers(ptr, cells, H, W, BORDER)
    m = _inside(cells, mask)
    v00 = value * (1 - t_d) * (1 - t_h)
    v01 = value * (1 - t_d) * t_h
    v10 = value * t_d * (1 - t_h)
    v11 = value * t_d * t_h
    _add(p[0], v00 * (1 - t_w), m[0], scale, FIXED)
    _add(p[1], v00 * t_w, m[1], scale, FIXED)
    _add(p[2], v01 * (1 - t_w), m[2], scale, FIXED)
    _add(p[3], v01 * t_w, m[3], scale, FIXED)
    _add(p[4], v10 * (1 - t_w), m[4], scale, FIXED)
    _add(p[5], v10 * t_w, m[5], scale, FIXED)
    _add(p[6], v11 * (1 - t_w), m[6], scale, FIXED)
    _add(p[7], v11 * t_w, m[7], scale, FIXED)


@triton.jit
def composed(ptr, cells, u, voxels, H, W, mask, ACC: tl.constexpr):
    """The displacement at ``ptr`` sampled in each cell, 0 outside, plus ``u``."""
    return (
        interpolate(corners(ptr, cells, H, W, mask, False, ACC), cells) + u[0],
        interpolate(corners(ptr + voxels, cells, H, W, mask, False, ACC), cells) + u[1],
        interpolate(corners(ptr + 2 * voxels, cells, H, W, mask, False, ACC), cells) + u[2],
    )


@triton.jit
def add_slopes(total, grad, ptr, cells, H, W, mask, BORDER: tl.constexpr, ACC: tl.constexpr):
    """``total``, three components, plus ``grad`` times the slopes of the volume at ``ptr``."""
    slope = slopes(corners(ptr, cells, H, W, mask, BORDER, ACC), cells, BORDER)
    return total[0] + grad * slope[0], total[1] + grad * slope[1], total[2] + grad * slope[2]


@triton.jit
def store_components(ptr, values, voxels, mask):
    """Three components, one volume each."""
    tl.store(ptr, values[0], mask=mask)
    tl.store(ptr + voxels, values[1], mask=mask)
    tl.store(ptr + 2 * voxels, values[2], mask=mask)


@triton.jit
def load_components(ptr, voxels, mask, ACC: tl.constexpr):
    """Three components, one volume each, past L1: it keeps what is sampled, and will be again."""
    return (
        tl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg").to(ACC),
        tl.load(ptr + voxels, mask=mask, other=0.0, cache_modifier=".cg").to(ACC),
        tl.load(ptr + 2 * voxels, mask=mask, other=0.0, cache_modifier=".cg").to(ACC),
    )


def tile_grid(shape: torch.Size, slices: int, tile: Sequence[int]) -> tuple[int, int, int]:
    """Programs for a (B, C, D, H, W) volume; only the first axis may be longer than 65,535."""
    B, _, D, H, W = shape
    down, across = tile
    return B * triton.cdiv(D, slices), triton.cdiv(W, across), triton.cdiv(H, down)


def march_through(
    shape: torch.Size, config: LaunchConfig, registers: int, like: Tensor
) -> tuple[int, tuple[int, int, int]]:
    """The slices of a program that needs ``registers`` a lane, and the grid, on ``like``'s device.

    For a (B, C, D, H, W) volume. No value depends on how many slices they are.
    """
    longest, *tile = config.tile
    # Where torch traces, sizes are symbols: whole waves are for numbers.
    D = int(shape[2])
    abreast = int(math.prod(tile_grid(shape, D, tile)))
    fit = resident(registers, config.warps, _launch.architecture(like))
    slices = march(D, longest, abreast, _launch.multiprocessors(like), fit, _START)
    return slices, tile_grid(shape, slices, tile)


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
            # A NaN or Inf among the gradients leaves no scale, and so no finite sum.
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
