"""Triton kernels of the LNCC functions and their launchers.

A window's w^3 sums are taken one axis after the other, each by a march: a lane walks along the
axis in blocks of w slices and keeps the last block's sums from each slice to the block's end
(``suffix``), and this block's sum so far (``prefix``). One of each, added, is the sum of w
consecutive slices. Nothing is ever subtracted from a sum: no drift. A program of b blocks reads
one more than it has outputs for; b is such that the programs fill whole waves of the GPU.

Per window, with V voxels (one gradient; both have 5 maps where it has 3):

    planes           box over w and d of x, y, xy, x^2, y^2     reads 2 V    writes 5 V
    score            box over h, cc, its adjoint maps           reads 5 V    writes 3 V
    spread_planes    box over d of the adjoint maps             reads 3 V    writes 3 V
    gradient         box over w and h of them, the gradient     reads 6 V    writes 1 V

These 28 V are 550 MB for 160x192x160 in float32: 0.13 ms at 4.3 TB/s, and 0.38 ms for three
windows. The forward pass alone is the first two kernels without the maps, 12 V. Loads a voxel that
hit the caches: (1 + 1/b) w of each of 2 images in ``planes`` and of 3 maps in ``gradient``, 25 and
39 at w = 11, b = 8 and 6, or 17 and 26 us at one a clock on 132 multiprocessors; they and the bytes
overlap. The temporary maps, 5 V for the sums and 3 or 5 V for the adjoint ones, are used again by
the next window.

Sums of squares are taken relative to a pivot, a value out of the window itself, because
``S_xx - S_x^2 / n`` loses what the values have in common. Where a pivot changes, the sums are
shifted to the new one by the binomial formula. In a window of equal values every pivot is that
value, every sum is exactly 0 and so is the variance. Voxels outside the volume are zeros, as the
definition has it, hence minus the pivot; slices outside have the pivot 0.
"""
# Triton's tuples grow by addition: it has no unpacking, and mypy no tuple of unknown length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import LaunchConfig, launch_config, march, resident

# Of x, y, xy, x^2 and y^2.
SUMS = tl.constexpr(5)
# A lane's on sm_90 by window, with the gradient to one image; a test holds the compiler to them.
# How many programs fit at a time follows, and from it the blocks of each: no result depends on it
# but the order in which the programs' scores are added up.
REGISTERS = {
    "lncc_planes": {11: 128, 9: 88, 7: 72},
    "lncc_score": {11: 160, 9: 128, 7: 120},
    "lncc_spread_planes": {11: 32, 9: 32, 7: 32},
    "lncc_gradient": {11: 96, 9: 96, 7: 80},
}
# Of other windows, which nothing asks for yet.
_SOME_REGISTERS = 128


@triton.jit
def _program(REVERSED: tl.constexpr):
    # Every second kernel starts with what the one before it wrote last, which L2 still holds.
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    return program


@triton.jit
def _times(index, size, WIDE: tl.constexpr):
    # Offsets within a volume have 32 bits where that is enough: one instruction an access.
    if WIDE:
        index = index.to(tl.int64)
    return index * size


@triton.jit
def _slice_lanes(H, W, program, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Lanes of a program that marches along d: offsets in a slice, columns, mask; what is left."""
    plane = _times(H, W, WIDE)
    tiles = tl.cdiv(plane, TILE).to(tl.int32)
    at = _times(program % tiles, TILE, WIDE) + tl.arange(0, TILE)
    return at, at % W, at < plane, program // tiles


@triton.jit
def _row_lanes(D, H, W, program, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Lanes of a program that marches along h: slices, columns, offsets of row 0, mask."""
    at = _times(program, TILE, WIDE) + tl.arange(0, TILE)
    d = at // W
    w = at - d * W
    return d, w, d * H * W + w, d < D


@triton.jit
def _zeros(N: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros([TILE], ACC),)
    return out


@triton.jit
def _zero_suffixes(WINDOW: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    out = ()
    for _ in tl.static_range(WINDOW):
        out = out + (_zeros(N, TILE, ACC),)
    return out


@triton.jit
def _plus(a, b, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def _suffixes(slices, WINDOW: tl.constexpr, N: tl.constexpr):
    """Element i is the sum of the slices from i to the last."""
    total = slices[WINDOW - 1]
    out = (total,)
    for i in tl.static_range(1, WINDOW):
        total = _plus(total, slices[WINDOW - 1 - i], N)
        out = (total,) + out
    return out


@triton.jit
def _window_sum(prefix, suffix, i: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr):
    """Slices 0 to i of this block and, before them, the WINDOW - 1 - i last of the one before."""
    if i + 1 < WINDOW:
        prefix = _plus(prefix, suffix[i + 1], N)
    return prefix


@triton.jit
def _pair(x_ptr, y_ptr, at, mask, ACC: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
    return x, y


@triton.jit
def _map_values(maps_ptr, voxels, at, mask, MAPS: tl.constexpr):
    out = ()
    for k in tl.static_range(MAPS):
        out = out + (tl.load(maps_ptr + k * voxels + at, mask=mask, other=0.0),)
    return out


@triton.jit
def _shifted(s, n: tl.constexpr, c, q):
    """The five sums of n values less ``c``, for the values less ``q``."""
    x = c[0] - q[0]
    y = c[1] - q[1]
    s_x = s[0] + n * x
    s_y = s[1] + n * y
    return (
        s_x,
        s_y,
        s[2] + (x * s[1] + y * s_x),
        s[3] + x * (s[0] + s_x),
        s[4] + y * (s[1] + s_y),
    )


@triton.jit
def _with_voxel(s, x, y):
    return s[0] + x, s[1] + y, s[2] + x * y, s[3] + x * x, s[4] + y * y


@triton.jit
def _row_sums(
    x_ptr, y_ptr, at, w, W, mask,
    WINDOW: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The five sums over WINDOW columns, less the voxel in their middle; and that voxel."""
    c = _pair(x_ptr, y_ptr, at, mask, ACC)
    s = _zeros(SUMS, TILE, ACC)
    # LLVM unrolls this loop; unrolled before, it costs Triton's compiler half a minute.
    for k in range(1, WINDOW // 2 + 1):
        left = _pair(x_ptr - k, y_ptr - k, at, mask & (w >= k), ACC)
        right = _pair(x_ptr + k, y_ptr + k, at, mask & (w < W - k), ACC)
        s = _with_voxel(s, left[0] - c[0], left[1] - c[1])
        s = _with_voxel(s, right[0] - c[0], right[1] - c[1])
    return s, c


@triton.jit(do_not_specialize=["D", "H", "W", "blocks"])
def _lncc_planes_kernel(
    x_ptr, y_ptr, sums_ptr, D, H, W, blocks,
    WINDOW: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The five sums over WINDOW columns and slices.

    Those of slice d are less the voxels of slice d // WINDOW * WINDOW + WINDOW // 2.
    """
    at, w, lanes, program = _slice_lanes(H, W, _program(False), TILE, WIDE)
    chunks = tl.cdiv(D, blocks * WINDOW)
    volume = (program // chunks).to(tl.int64)
    plane = _times(H, W, WIDE)
    voxels = D.to(tl.int64) * H * W
    x_ptr += volume * voxels
    y_ptr += volume * voxels
    sums_ptr += volume * SUMS * voxels
    # The block before the first one that has outputs.
    start = (program % chunks) * blocks * WINDOW - WINDOW // 2 - 1
    suffix = _zero_suffixes(WINDOW, SUMS, TILE, ACC)
    q = _zeros(2, TILE, ACC)
    for block in range(blocks + 1):
        # Every window that ends in a block contains its first slice.
        ahead = start + WINDOW
        q_ahead = _pair(x_ptr, y_ptr, at + ahead * plane, lanes & (ahead < D), ACC)
        prefix = _zeros(SUMS, TILE, ACC)
        slices = ()
        for i in tl.static_range(WINDOW):
            d = start + i
            inside = lanes & (d >= 0) & (d < D)
            s, c = _row_sums(x_ptr, y_ptr, at + d * plane, w, W, inside, WINDOW, TILE, ACC)
            prefix = _plus(prefix, _shifted(s, WINDOW, c, q), SUMS)
            slices = slices + (_shifted(s, WINDOW, c, q_ahead),)
            total = _window_sum(prefix, suffix, i, WINDOW, SUMS)
            d = d - WINDOW // 2
            mask = lanes & (block > 0) & (d < D)
            for k in tl.static_range(SUMS):
                tl.store(sums_ptr + k * voxels + (at + d * plane), total[k], mask=mask)
        suffix = _suffixes(slices, WINDOW, SUMS)
        q = q_ahead
        start = ahead


@triton.jit
def _quotient(a, b, ACC: tl.constexpr):
    # Correctly rounded: a quotient of equal numbers is not above 1.
    return a / b if ACC.is_fp64() else tl.div_rn(a, b)


@triton.jit
def _correlation(total, EPS: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr):
    """cc, X, V_x, V_y and D = V_x V_y + eps of windows of 1 / INVERSE voxels."""
    s_x, s_y, s_xy, s_xx, s_yy = total
    cross = s_xy - s_x * s_y * INVERSE
    var_x = s_xx - s_x * s_x * INVERSE
    var_y = s_yy - s_y * s_y * INVERSE
    # As in the reference, and by comparisons that leave a NaN a NaN.
    var_x = tl.where(var_x < 0, 0.0, var_x)
    var_y = tl.where(var_y < 0, 0.0, var_y)
    product = var_x * var_y
    square = cross * cross
    over = square > product
    bottom = product + EPS
    cc = _quotient(tl.where(over, product, square), bottom, ACC)
    root = tl.sqrt(product)
    cross = tl.where(over, tl.where(cross < 0, -root, root), cross)
    return cc, cross, var_x, var_y, bottom


@triton.jit
def _store_adjoint(
    ptr, voxels, at, scores, mu_x, mu_y, scale, mask, BOTH: tl.constexpr, ACC: tl.constexpr
):
    """Maps whose window sums make the gradient: a, b, m_x, and with BOTH c, m_y.

    With A, B, C, M_x and M_y their sums, the gradients of ``scale`` times the sum of cc are

        g_x = y A + 2 x B - M_x,    a = 2 X / D,           m_x = a mu_y + 2 b mu_x
        g_y = x A + 2 y C - M_y,    b = -X^2 V_y / D^2,    m_y = a mu_x + 2 c mu_y
                                    c = -X^2 V_x / D^2

    Where rounding makes a variance negative or X^2 larger than V_x V_y, these use the limited
    values; autograd of the reference takes the derivative of V_x V_y in place of that of X^2. The
    two are equal: V_x V_y - X^2 is never negative, so where it is 0 its derivative is 0.
    """
    _, cross, var_x, var_y, bottom = scores
    ratio = cross / bottom
    a = 2 * ratio * scale
    b = -ratio * ratio * var_y * scale
    tl.store(ptr + at, a, mask=mask)
    tl.store(ptr + voxels + at, b, mask=mask)
    tl.store(ptr + 2 * voxels + at, a * mu_y + 2 * b * mu_x, mask=mask)
    if BOTH:
        c = -ratio * ratio * var_x * scale
        tl.store(ptr + 3 * voxels + at, c, mask=mask)
        tl.store(ptr + 4 * voxels + at, a * mu_x + 2 * c * mu_y, mask=mask)


@triton.jit(do_not_specialize=["index", "D", "H", "W", "blocks"])
def _lncc_score_kernel(
    x_ptr, y_ptr, sums_ptr, partial_ptr, maps_ptr, scale_ptr, index, D, H, W, blocks,
    MAPS: tl.constexpr, EPS: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums over WINDOW rows, cc summed over the program, and MAPS (0, 3 or 5) adjoint maps."""
    pid = _program(True)
    chunks = tl.cdiv(H, blocks * WINDOW)
    tiles = tl.cdiv(D.to(tl.int64) * W, TILE).to(tl.int32)
    program = pid // chunks
    d, w, base, lanes = _row_lanes(D, H, W, program % tiles, TILE, WIDE)
    volume = (program // tiles).to(tl.int64)
    voxels = D.to(tl.int64) * H * W
    x_ptr += volume * voxels
    y_ptr += volume * voxels
    zero_x = tl.load(x_ptr).to(ACC)
    zero_y = tl.load(y_ptr).to(ACC)
    # The voxels that the sums are less: see _lncc_planes_kernel.
    middle = d // WINDOW * WINDOW + WINDOW // 2
    has_pivot = lanes & (middle < D)
    pivot = middle * H * W + w
    sums_ptr += volume * SUMS * voxels
    maps_ptr += volume * MAPS * voxels
    scale = tl.load(scale_ptr + index) if MAPS > 0 else 0.0
    INVERSE: tl.constexpr = 1.0 / (WINDOW * WINDOW * WINDOW)
    start = (pid % chunks) * blocks * WINDOW - WINDOW // 2 - 1
    suffix = _zero_suffixes(WINDOW, SUMS, TILE, ACC)
    q = _zeros(2, TILE, ACC)
    score = tl.zeros([TILE], ACC)
    for block in range(blocks + 1):
        ahead = start + WINDOW
        q_ahead = _pair(x_ptr, y_ptr, pivot + _times(ahead, W, WIDE), has_pivot & (ahead < H), ACC)
        prefix = _zeros(SUMS, TILE, ACC)
        rows = ()
        for i in tl.static_range(WINDOW):
            h = start + i
            inside = (h >= 0) & (h < H)
            row = _times(h, W, WIDE)
            c = _pair(x_ptr, y_ptr, pivot + row, has_pivot & inside, ACC)
            s = _map_values(sums_ptr, voxels, base + row, lanes & inside, SUMS)
            prefix = _plus(prefix, _shifted(s, WINDOW * WINDOW, c, q), SUMS)
            rows = rows + (_shifted(s, WINDOW * WINDOW, c, q_ahead),)
            total = _window_sum(prefix, suffix, i, WINDOW, SUMS)
            h = h - WINDOW // 2
            mask = lanes & (block > 0) & (h < H)
            scores = _correlation(total, EPS, INVERSE, ACC)
            score += tl.where(mask, scores[0], 0.0)
            if MAPS > 0:
                # Less the volume's first voxel, which is background: there the maps are largest
                # and what they cancel to is smallest. An offset of all intensities cancels too.
                mu_x = q[0] - zero_x + total[0] * INVERSE
                mu_y = q[1] - zero_y + total[1] * INVERSE
                _store_adjoint(
                    maps_ptr, voxels, base + _times(h, W, WIDE), scores, mu_x, mu_y, scale, mask,
                    MAPS == 5, ACC,
                )  # fmt: skip
        suffix = _suffixes(rows, WINDOW, SUMS)
        q = q_ahead
        start = ahead
    tl.store(partial_ptr + pid, tl.sum(score, 0))


@triton.jit(do_not_specialize=["D", "H", "W", "blocks"])
def _lncc_spread_planes_kernel(
    in_ptr, out_ptr, D, H, W, blocks,
    MAPS: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums over WINDOW slices of each map."""
    at, _, lanes, program = _slice_lanes(H, W, _program(False), TILE, WIDE)
    chunks = tl.cdiv(D, blocks * WINDOW)
    plane = _times(H, W, WIDE)
    volume = (program // MAPS // chunks).to(tl.int64) * MAPS + program % MAPS
    in_ptr += volume * D * plane
    out_ptr += volume * D * plane
    start = (program // MAPS % chunks) * blocks * WINDOW - WINDOW // 2 - 1
    suffix = _zero_suffixes(WINDOW, 1, TILE, ACC)
    for block in range(blocks + 1):
        prefix = _zeros(1, TILE, ACC)
        slices = ()
        for i in tl.static_range(WINDOW):
            d = start + i
            inside = lanes & (d >= 0) & (d < D)
            s = (tl.load(in_ptr + (at + d * plane), mask=inside, other=0.0),)
            prefix = _plus(prefix, s, 1)
            slices = slices + (s,)
            total = _window_sum(prefix, suffix, i, WINDOW, 1)
            d = d - WINDOW // 2
            mask = lanes & (block > 0) & (d < D)
            tl.store(out_ptr + (at + d * plane), total[0], mask=mask)
        suffix = _suffixes(slices, WINDOW, 1)
        start += WINDOW


@triton.jit
def _map_row_sums(maps_ptr, voxels, at, w, W, mask, MAPS: tl.constexpr, WINDOW: tl.constexpr):
    """Sums over WINDOW columns of every map."""
    sums = _map_values(maps_ptr, voxels, at, mask, MAPS)
    for k in range(1, WINDOW // 2 + 1):
        left = _map_values(maps_ptr - k, voxels, at, mask & (w >= k), MAPS)
        right = _map_values(maps_ptr + k, voxels, at, mask & (w < W - k), MAPS)
        sums = _plus(sums, _plus(left, right, MAPS), MAPS)
    return sums


@triton.jit
def _add_to(sum_ptr, out_ptr, value, mask, FIRST: tl.constexpr):
    if not FIRST:
        value += tl.load(sum_ptr, mask=mask, other=0.0)
    tl.store(out_ptr, value, mask=mask)


@triton.jit(do_not_specialize=["D", "H", "W", "blocks"])
def _lncc_gradient_kernel(
    x_ptr, y_ptr, maps_ptr, sum_x_ptr, sum_y_ptr, out_x_ptr, out_y_ptr, D, H, W, blocks,
    MAPS: tl.constexpr, FIRST: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums over WINDOW columns and rows of the maps, and from them this window's gradients.

    They are added to ``sum`` unless FIRST, and written to ``out``, which may be the same memory.
    """
    pid = _program(True)
    chunks = tl.cdiv(H, blocks * WINDOW)
    tiles = tl.cdiv(D.to(tl.int64) * W, TILE).to(tl.int32)
    program = pid // chunks
    _, w, base, lanes = _row_lanes(D, H, W, program % tiles, TILE, WIDE)
    volume = (program // tiles).to(tl.int64)
    voxels = D.to(tl.int64) * H * W
    origin = volume * voxels
    x_ptr += origin
    y_ptr += origin
    zero_x = tl.load(x_ptr).to(ACC)
    zero_y = tl.load(y_ptr).to(ACC)
    sum_x_ptr += origin
    sum_y_ptr += origin
    out_x_ptr += origin
    out_y_ptr += origin
    maps_ptr += volume * MAPS * voxels
    start = (pid % chunks) * blocks * WINDOW - WINDOW // 2 - 1
    suffix = _zero_suffixes(WINDOW, MAPS, TILE, ACC)
    for block in range(blocks + 1):
        prefix = _zeros(MAPS, TILE, ACC)
        rows = ()
        for i in tl.static_range(WINDOW):
            h = start + i
            inside = lanes & (h >= 0) & (h < H)
            s = _map_row_sums(
                maps_ptr, voxels, base + _times(h, W, WIDE), w, W, inside, MAPS, WINDOW
            )
            prefix = _plus(prefix, s, MAPS)
            rows = rows + (s,)
            total = _window_sum(prefix, suffix, i, WINDOW, MAPS)
            h = h - WINDOW // 2
            at = base + _times(h, W, WIDE)
            mask = lanes & (block > 0) & (h < H)
            v = _pair(x_ptr, y_ptr, at, mask, ACC)
            x = v[0] - zero_x
            y = v[1] - zero_y
            by_x = y * total[0] + 2 * x * total[1] - total[2]
            _add_to(sum_x_ptr + at, out_x_ptr + at, by_x, mask, FIRST)
            if MAPS == 5:
                by_y = x * total[0] + 2 * y * total[3] - total[4]
                _add_to(sum_y_ptr + at, out_y_ptr + at, by_y, mask, FIRST)
        suffix = _suffixes(rows, WINDOW, MAPS)
        start += WINDOW


class _Volumes:
    """Two volumes and the temporary maps of one window, which the next one uses again."""

    def __init__(self, x: Tensor, y: Tensor, maps: int) -> None:
        self.x, self.y, self.maps = x.contiguous(), y.contiguous(), maps
        self.count = x.shape[0] * x.shape[1]
        D, H, W = x.shape[2:]
        self.sizes = D, H, W
        self.dtype = _launch.compute_dtype(x, y)
        self.sums = self.room(SUMS.value)
        self.adjoint = self.room(maps) if maps else self.sums

    def room(self, maps: int) -> Tensor:
        return _launch.allocate((self.count, maps, *self.sizes), self.dtype, self.x)

    def options(self, window: int, config: LaunchConfig) -> dict[str, Any]:
        return {
            "WINDOW": window, "ACC": _launch.triton_type(self.dtype),
            "WIDE": _launch.wide_index(self.x[0, 0].numel()),
            "TILE": config.tile[1], "num_warps": config.warps,
        }  # fmt: skip

    def march(
        self, kernel: str, window: int, size: int, across: int, maps: int = 1
    ) -> tuple[LaunchConfig, int, int]:
        """Along an axis of ``size``, ``across`` lanes abreast in each volume or each of its maps.

        The configuration, the blocks of a program, and how many programs there are.
        """
        arch = _launch.architecture(self.x)
        config = launch_config(kernel, self.sizes[2], self.dtype, arch)
        longest, lanes = config.tile
        columns = self.count * maps * triton.cdiv(across, lanes)
        blocks = march(
            triton.cdiv(size, window), triton.cdiv(min(size, longest), window), columns,
            _launch.multiprocessors(self.x),
            resident(REGISTERS[kernel].get(window, _SOME_REGISTERS), config.warps, arch), 1,
        )  # fmt: skip
        return config, blocks, columns * triton.cdiv(size, blocks * window)

    def score(self, window: int, eps: float, scales: Tensor | None, index: int) -> Tensor:
        """Sum of cc over all voxels, float64; the adjoint maps where there is room for them."""
        D, H, W = self.sizes
        config, blocks, programs = self.march("lncc_planes", window, D, H * W)
        _lncc_planes_kernel[(programs,)](
            self.x, self.y, self.sums, D, H, W, blocks, **self.options(window, config)
        )
        config, blocks, programs = self.march("lncc_score", window, H, D * W)
        partial = _launch.allocate((programs,), self.dtype, self.x)
        _lncc_score_kernel[(programs,)](
            self.x, self.y, self.sums, partial, self.adjoint,
            partial if scales is None else scales, index, D, H, W, blocks,
            MAPS=self.maps, EPS=eps, **self.options(window, config),
        )  # fmt: skip
        return partial.sum(dtype=torch.float64)

    def gradient(self, window: int, sums: list[Tensor], outs: list[Tensor], first: bool) -> None:
        """What the adjoint maps of one window add to the gradients."""
        D, H, W = self.sizes
        # The five sums have been used, and are at least as many.
        spread = self.sums
        config, blocks, programs = self.march("lncc_spread_planes", window, D, H * W, self.maps)
        _lncc_spread_planes_kernel[(programs,)](
            self.adjoint, spread, D, H, W, blocks,
            MAPS=self.maps, **self.options(window, config),
        )  # fmt: skip
        config, blocks, programs = self.march("lncc_gradient", window, H, D * W)
        _lncc_gradient_kernel[(programs,)](
            self.x, self.y, spread, sums[0], sums[-1], outs[0], outs[-1], D, H, W, blocks,
            MAPS=self.maps, FIRST=first, **self.options(window, config),
        )  # fmt: skip


def launch_forward(x: Tensor, y: Tensor, *, windows: list[int], eps: float) -> Tensor:
    """(K,) means of cc, in the type computed in."""
    with torch.cuda.device_of(x):
        volumes = _Volumes(x, y, maps=0)
        scores = [volumes.score(window, eps, None, 0) for window in windows]
        return (torch.stack(scores) / x.numel()).to(volumes.dtype)


def launch_gradient(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    *,
    windows: list[int],
    eps: float,
    need_x: bool,
    need_y: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Means, and the gradients to x and y of ``(weights * means).sum()``, None where not needed.

    ``dtypes`` are those of the gradients.
    """
    if not (need_x or need_y):
        return launch_forward(x, y, windows=windows, eps=eps), None, None
    if not need_x:  # the sum is symmetric
        means, by_y, _ = launch_gradient(
            y, x, weights, windows=windows, eps=eps, need_x=True, need_y=False,
            dtypes=(dtypes[1], dtypes[0]),
        )  # fmt: skip
        return means, None, by_y
    with torch.cuda.device_of(x):
        volumes = _Volumes(x, y, maps=5 if need_y else 3)
        outs = [_launch.allocate(x.shape, dtype, x) for dtype in dtypes[: 1 + need_y]]
        # Windows are added up in the type computed in, the last one into the result.
        sums = [
            out if out.dtype == volumes.dtype or len(windows) == 1 else
            _launch.allocate(x.shape, volumes.dtype, x)
            for out in outs
        ]  # fmt: skip
        scales = (weights.to(torch.float64) / x.numel()).to(volumes.dtype)
        scores = []
        for index, window in enumerate(windows):
            scores.append(volumes.score(window, eps, scales, index))
            last = index == len(windows) - 1
            volumes.gradient(window, sums, outs if last else sums, first=index == 0)
        means = (torch.stack(scores) / x.numel()).to(volumes.dtype)
        return means, outs[0], outs[1] if need_y else None
