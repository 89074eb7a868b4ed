"""Triton kernels of ``affine_normal_equations`` and their launcher.

A program takes some points of one matrix, each lane several of them one after another, keeps every
sum in registers, adds up its lanes and stores one number a sum. A second kernel adds up the
programs in float64, always in the same order, and writes the matrices. No sum is an atomic's.

Of the 225 products of the rows with derivatives 102 are distinct, because a row is a slope times a
coordinate: 6 products of two slopes times 10 of [p, 1] with itself, 3 slopes times 4 of [p, 1]
times 3 of [1, m, f], and 6 products of those. They are float32 where the image is not float64. A
lane adds up 4 points and a program 32 lanes, so that a sum is off by at most 12 roundings (three
of the product, four of the points, five of the lanes) of 2^-24 of the sum of its absolute terms.

Without derivatives there are 3 degree + 3 sums, as m^i m^j depends on i + j alone. The products
are float64, whatever the image is: a matrix of powers is nearly singular, and m^8 of a brightness
of 65,535 leaves float32.
"""
# Triton's tuples grow by addition: it has no unpacking, and mypy no tuple of unknown length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._sampling import corners, interpolate, slopes, volume_size

# Of a matrix with derivatives.
SUMS = tl.constexpr(102)


@triton.jit
def _matrix(matrix_ptr):
    """The twelve numbers of a matrix, row by row."""
    matrix = ()
    for k in tl.static_range(12):
        matrix = matrix + (tl.load(matrix_ptr + k),)
    return matrix


@triton.jit
def _coordinate(matrix, ROW: tl.constexpr, p):
    """A coordinate in the image of the points ``p``, voxels: a row of the matrix times [p, 1]."""
    K: tl.constexpr = 4 * ROW
    return matrix[K] * p[0] + (matrix[K + 1] * p[1] + (matrix[K + 2] * p[2] + matrix[K + 3]))


@triton.jit
def _axis(x, size, WIDE: tl.constexpr):
    """One axis of a cell as :mod:`ulae_rt.kernels._sampling` has it, half a voxel inside.

    Lower index, upper index, whether they are inside (twice), the weight of the upper, and whether
    the value changes along the axis.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    last = tl.cast(size - 1, x.dtype)
    inside = (x >= -0.5) & (x < last + 0.5)  # not so for NaN
    changes = (x > 0) & (x < last)
    held = tl.where(inside, tl.minimum(tl.maximum(x, 0.0), last), 0.0)
    lower = tl.minimum(held.to(INDEX), tl.maximum(size - 2, 0))
    upper = tl.minimum(lower + 1, size - 1)
    return lower, upper, inside, inside, held - lower.to(x.dtype), changes


@triton.jit
def _beyond(x, size, cut, AXIS: tl.constexpr):
    """Whether points lie beyond a face of this axis whose bit is set in ``cut``."""
    before_first = ((cut >> (2 * AXIS)) & 1 != 0) & (x < -0.5)
    after_last = ((cut >> (2 * AXIS + 1)) & 1 != 0) & (x >= tl.cast(size - 1, x.dtype) + 0.5)
    return before_first | after_last


@triton.jit
def _sampled(
    moving_ptr, points_ptr, values_ptr, matrix, at, N, D, H, W, cut,
    DERIVATIVES: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of the points numbered ``at``: whether they count (1 or 0), m, f, the slopes and p.

    All are 0 where a point does not count. The slopes and p are 0 outside the image as well, where
    p may be infinite.
    """
    exists = at < N
    p = (
        tl.load(points_ptr + at, mask=exists, other=0.0).to(ACC),
        tl.load(points_ptr + N.to(tl.int64) + at, mask=exists, other=0.0).to(ACC),
        tl.load(points_ptr + 2 * N.to(tl.int64) + at, mask=exists, other=0.0).to(ACC),
    )
    x_d = _coordinate(matrix, 0, p)
    x_h = _coordinate(matrix, 1, p)
    x_w = _coordinate(matrix, 2, p)
    beyond = _beyond(x_d, D, cut, 0) | _beyond(x_h, H, cut, 1) | _beyond(x_w, W, cut, 2)
    counts = exists & (beyond == 0)
    f = tl.load(values_ptr + at, mask=counts, other=0.0)
    cells = (_axis(x_d, D, WIDE), _axis(x_h, H, WIDE), _axis(x_w, W, WIDE))
    inside = exists & cells[0][2] & cells[1][2] & cells[2][2]
    voxels = corners(moving_ptr, cells, H, W, inside, True, ACC)
    m = interpolate(voxels, cells)
    s = p
    if DERIVATIVES:
        s = slopes(voxels, cells, True)
        p = (tl.where(inside, p[0], 0.0), tl.where(inside, p[1], 0.0), tl.where(inside, p[2], 0.0))
    return tl.where(counts, 1.0, 0.0), m, f, s, p


@triton.jit
def _pairs(v):
    """The products of three numbers with one another, in the order of :func:`_pair`."""
    return v[0] * v[0], v[0] * v[1], v[0] * v[2], v[1] * v[1], v[1] * v[2], v[2] * v[2]


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr, TYPE: tl.constexpr):
    """``COUNT`` sums of nothing yet."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LANES], TYPE),)
    return sums


@triton.jit
def _added(sums, factor, terms, COUNT: tl.constexpr):
    """Each of ``COUNT`` sums plus ``factor`` times its term."""
    added = ()
    for k in tl.static_range(COUNT):
        added = added + (sums[k] + factor * terms[k],)
    return added


@triton.jit
def _store(partials_ptr, sums, COUNT: tl.constexpr, programs):
    """What the lanes of this program add up to, one number of each of ``COUNT`` sums."""
    for k in tl.static_range(COUNT):
        tl.store(partials_ptr + k * programs, tl.sum(sums[k]))


@triton.jit
def _program(programs):
    """Number of the matrix, 64-bit, and of the program among the ``programs`` that it has."""
    number = tl.program_id(0)
    return (number // programs).to(tl.int64), number % programs


@triton.jit
def _numbers(program, step, STEPS: tl.constexpr, LANES: tl.constexpr):
    """Numbers of the points that the lanes of ``program`` take in a step."""
    return (program.to(tl.int64) * STEPS + step) * LANES + tl.arange(0, LANES)


@triton.jit(do_not_specialize=["N", "D", "H", "W", "cut", "programs"])
def _affine_normal_equations_kernel(
    moving_ptr,  # (1 or B, D, H, W)
    points_ptr,  # (3, N)
    values_ptr,  # (N,)
    matrix_ptr,  # (B, 3, 4)
    partials_ptr,  # (B, SUMS, programs)
    N, D, H, W, cut, programs,
    SHARED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_STEPS: tl.constexpr, TILE_LANES: tl.constexpr,
):  # fmt: skip
    """The sums with derivatives. SHARED: one image for all matrices."""
    b, program = _program(programs)
    if not SHARED:
        moving_ptr += b * volume_size(D, H, W)
    matrix = _matrix(matrix_ptr + 12 * b)
    # Of two slopes, d and d, d and h, ..., times [p, 1] and [p, 1].
    dd = _zeros(10, TILE_LANES, ACC)
    dh = _zeros(10, TILE_LANES, ACC)
    dw = _zeros(10, TILE_LANES, ACC)
    hh = _zeros(10, TILE_LANES, ACC)
    hw = _zeros(10, TILE_LANES, ACC)
    ww = _zeros(10, TILE_LANES, ACC)
    # Of j times 1, m and f.
    by_1 = _zeros(12, TILE_LANES, ACC)
    by_m = _zeros(12, TILE_LANES, ACC)
    by_f = _zeros(12, TILE_LANES, ACC)
    # Of 1, m and f times one another.
    others = _zeros(6, TILE_LANES, ACC)
    for step in range(TILE_STEPS):
        at = _numbers(program, step, TILE_STEPS, TILE_LANES)
        counts, m, f, s, p = _sampled(
            moving_ptr, points_ptr, values_ptr, matrix, at, N, D, H, W, cut,
            True, ACC, WIDE,
        )  # fmt: skip
        f = f.to(ACC)
        pp = _pairs(p)
        pp = (pp[0], pp[1], pp[2], p[0], pp[3], pp[4], p[1], pp[5], p[2], 1.0)
        ss = _pairs(s)
        dd = _added(dd, ss[0], pp, 10)
        dh = _added(dh, ss[1], pp, 10)
        dw = _added(dw, ss[2], pp, 10)
        hh = _added(hh, ss[3], pp, 10)
        hw = _added(hw, ss[4], pp, 10)
        ww = _added(ww, ss[5], pp, 10)
        j = (
            s[0] * p[0], s[0] * p[1], s[0] * p[2], s[0],
            s[1] * p[0], s[1] * p[1], s[1] * p[2], s[1],
            s[2] * p[0], s[2] * p[1], s[2] * p[2], s[2],
        )  # fmt: skip
        by_1 = _added(by_1, 1.0, j, 12)
        by_m = _added(by_m, m, j, 12)
        by_f = _added(by_f, f, j, 12)
        others = _added(others, 1.0, (counts, m, f, m * m, m * f, f * f), 6)
    partials_ptr += b * SUMS * programs + program
    _store(partials_ptr, dd + dh + dw + hh + hw + ww, 60, programs)
    _store(partials_ptr + 60 * programs, by_1 + by_m + by_f, 36, programs)
    _store(partials_ptr + 96 * programs, others, 6, programs)


@triton.jit(do_not_specialize=["N", "D", "H", "W", "cut", "programs"])
def _affine_normal_equations_values_kernel(
    moving_ptr,  # (1 or B, D, H, W)
    points_ptr,  # (3, N)
    values_ptr,  # (N,)
    matrix_ptr,  # (B, 3, 4)
    partials_ptr,  # (B, 3 DEGREE + 3, programs)
    N, D, H, W, cut, programs,
    DEGREE: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_STEPS: tl.constexpr, TILE_LANES: tl.constexpr,
):  # fmt: skip
    """The sums without derivatives: 1 to m^(2 DEGREE), f to f m^DEGREE, and f^2."""
    b, program = _program(programs)
    if not SHARED:
        moving_ptr += b * volume_size(D, H, W)
    matrix = _matrix(matrix_ptr + 12 * b)
    sums = _zeros(3 * DEGREE + 3, TILE_LANES, tl.float64)
    for step in range(TILE_STEPS):
        at = _numbers(program, step, TILE_STEPS, TILE_LANES)
        counts, m, f, _, _ = _sampled(
            moving_ptr, points_ptr, values_ptr, matrix, at, N, D, H, W, cut,
            False, ACC, WIDE,
        )  # fmt: skip
        m = m.to(tl.float64)
        f = f.to(tl.float64)
        power = counts.to(tl.float64)
        powers = (power,)
        for _ in tl.static_range(2 * DEGREE):
            power = m if len(powers) == 1 else power * m
            powers = powers + (power,)
        terms = powers + (f,)
        for k in tl.static_range(1, DEGREE + 1):
            terms = terms + (f * powers[k],)
        sums = _added(sums, 1.0, terms + (f * f,), 3 * DEGREE + 3)
    partials_ptr += b * (3 * DEGREE + 3) * programs + program
    _store(partials_ptr, sums, 3 * DEGREE + 3, programs)


@triton.jit
def _pair(i, j, COUNT: tl.constexpr):
    """Number of the product of ``i`` and ``j`` among those of ``COUNT`` with one another."""
    low = tl.minimum(i, j)
    return low * (2 * COUNT - 1 - low) // 2 + tl.maximum(i, j)


@triton.jit(do_not_specialize=["programs"])
def _affine_normal_equations_sum_kernel(
    partials_ptr,  # (B, SUMS, programs)
    out_ptr,  # (B, SIZE, SIZE), float64
    programs,
    SUMS: tl.constexpr, SIZE: tl.constexpr, DERIVATIVES: tl.constexpr, DEGREE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One element of a matrix: its sum over the programs, by one program, so in one order."""
    element = tl.program_id(0)
    b = (element // (SIZE * SIZE)).to(tl.int64)
    row = element // SIZE % SIZE
    column = element % SIZE
    low = tl.minimum(row, column)
    high = tl.maximum(row, column)
    if DERIVATIVES:
        if high < 12:
            number = 10 * _pair(low // 4, high // 4, 3) + _pair(low % 4, high % 4, 4)
        elif low < 12:
            number = 60 + 12 * (high - 12) + low
        else:
            number = 96 + _pair(low - 12, high - 12, 3)
    else:
        # Products with f come after the powers, and that of f with itself is the last.
        number = low + high + tl.where(high > DEGREE, DEGREE, 0)
        number = tl.where(low > DEGREE, SUMS - 1, number)
    partials_ptr += (b * SUMS + number) * programs
    sums = tl.zeros([TILE], tl.float64)
    for first in range(0, programs, TILE):
        at = first + tl.arange(0, TILE)
        sums += tl.load(partials_ptr + at, mask=at < programs, other=0.0).to(tl.float64)
    tl.store(out_ptr + element, tl.sum(sums))


def launch_forward(
    moving: Tensor,
    points: Tensor,
    values: Tensor,
    matrix: Tensor,
    *,
    degree: int,
    derivatives: bool,
    cut: Sequence[bool],
) -> Tensor:
    """``affine_normal_equations``; (B, R, R) float64, contiguous."""
    moving = moving.contiguous()
    batch, count, (D, H, W) = len(matrix), len(values), moving.shape[2:]
    accumulate = _launch.compute_dtype(moving)
    arch = _launch.architecture(moving)
    rows = (12 if derivatives else 0) + degree + 2
    sums = SUMS.value if derivatives else 3 * degree + 3
    name = "affine_normal_equations" if derivatives else "affine_normal_equations_values"
    config = launch_config(name, count, accumulate, arch)
    steps, lanes = config.tile
    programs = triton.cdiv(count, steps * lanes)
    partials = _launch.allocate(
        (batch, sums, programs), accumulate if derivatives else torch.float64, moving
    )
    out = _launch.allocate((batch, rows, rows), torch.float64, moving)
    inputs = (
        moving, points.contiguous(), values.contiguous(), matrix.to(accumulate).contiguous(),
        partials, count, D, H, W, sum(is_cut << face for face, is_cut in enumerate(cut)), programs,
    )  # fmt: skip
    options = {
        "SHARED": len(moving) == 1, "ACC": _launch.triton_type(accumulate),
        "WIDE": _launch.wide_index(D * H * W),
        "TILE_STEPS": steps, "TILE_LANES": lanes, "num_warps": config.warps,
    }  # fmt: skip
    grid = (batch * programs,)
    with torch.cuda.device_of(moving):
        if derivatives:
            _affine_normal_equations_kernel[grid](*inputs, **options)
        else:
            _affine_normal_equations_values_kernel[grid](*inputs, DEGREE=degree, **options)
        config = launch_config("affine_normal_equations_sum", programs, partials.dtype, arch)
        _affine_normal_equations_sum_kernel[(batch * rows * rows,)](
            partials, out, programs, SUMS=sums, SIZE=rows, DERIVATIVES=derivatives, DEGREE=degree,
            TILE=config.tile[0], num_warps=config.warps,
        )  # fmt: skip
    return out
