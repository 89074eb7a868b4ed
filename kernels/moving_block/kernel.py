"""Triton kernels of ``moving_block`` and their launcher: one implicit matrix product.

The voxels of the result are the rows of the product and its channels the columns. Summed over are
the taps of all branches times the channels of ``x``; no matrix of them ever exists, a program reads
the taps of its voxels from ``x`` itself. A tap of a voxel is a row of channels, which is enough for
the tensor cores when there are many; of one channel the taps are gathered to such rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._features import allocate_features, channels_last
from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE

# The least and the most channels of a tile. Tensor cores sum over 16 at once, to which fewer are
# filled up; more than 32, in float64, and the operands do not fit into shared memory.
_FEWEST_CHANNELS, _MOST_CHANNELS = 16, 32


@triton.jit
def _voxels_of(D, H, W, WIDE: tl.constexpr, VOXELS: tl.constexpr):
    """This program's voxels in the result, which of them exist, and where in ``x`` their centres.

    Those that do not exist take the place of the last one, so that no tap need ask for them.
    """
    chunk = tl.program_id(0)
    deep, down, across = (D + 1) // 2, (H + 1) // 2, (W + 1) // 2
    if WIDE:
        chunk, deep = chunk.to(tl.int64), deep.to(tl.int64)
    last = deep * down * across - 1
    voxel = chunk * VOXELS + tl.arange(0, VOXELS)
    exists = voxel <= last
    voxel = tl.minimum(voxel, last)
    row = voxel // across
    return voxel, exists, 2 * (row // down), 2 * (row % down), 2 * (voxel % across)


@triton.jit
def _inside(i, size):
    """Whether there is an ``i``-th of ``size``: as unsigned numbers, those below 0 are large."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _channels(x_ptr, at, there, c, C: tl.constexpr):
    """The channels ``c`` of voxels, a last axis; 0 of those that are not ``there``."""
    mask = tl.expand_dims(there, -1) & (c < C)
    return tl.load(x_ptr + (tl.expand_dims(at, -1) + c), mask=mask, other=0.0)


@triton.jit
def _dot(x, weight, total, OPERAND: tl.constexpr):
    # Exact products: TF32 would keep 10 bits of a float32.
    return tl.dot(
        x.to(OPERAND), weight.to(OPERAND), total, input_precision="ieee", out_dtype=total.dtype
    )


@triton.jit
def _store(
    total, fixed_ptr, mean_ptr, out_ptr, voxel, exists, D, H, W,
    OUT: tl.constexpr, SLOPE: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write ``total`` (VOXELS, FEATURES) after the two terms and the activation."""
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[None, :]
    b = tl.program_id(2).to(tl.int64)
    start = b * ((D + 1) // 2) * ((H + 1) // 2) * ((W + 1) // 2) * OUT
    at = voxel[:, None] * OUT + feature
    mask = exists[:, None] & (feature < OUT)
    total += tl.load(mean_ptr + (b * OUT + feature), mask=feature < OUT, other=0.0)
    total += tl.load(fixed_ptr + start + at, mask=mask, other=0.0).to(total.dtype)
    tl.store(out_ptr + start + at, tl.where(total > 0, total, SLOPE * total), mask=mask)


@triton.jit(do_not_specialize=["D", "H", "W"])
def _moving_block_kernel(
    x_ptr, weight_ptr, fixed_ptr, mean_ptr, out_ptr, D, H, W, C: tl.constexpr, OUT: tl.constexpr,
    DILATIONS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """A step sums over the channels of three taps: one row of a branch's 3x3x3.

    The rows are dealt out to PARTS, which warps take side by side: of a small volume there are too
    few voxels to occupy a GPU.
    """
    voxel, exists, d, h, w = _voxels_of(D, H, W, WIDE, VOXELS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    x_ptr += tl.program_id(2).to(tl.int64) * D * H * W * C
    centre = ((d * H + h) * W + w) * C
    rows: tl.constexpr = 9 * len(DILATIONS)
    steps: tl.constexpr = (rows + PARTS - 1) // PARTS
    # With several parts all that follows has a first axis of them; a scalar is what one row is.
    if PARTS == 1:
        part = 0
        total = tl.zeros([VOXELS, FEATURES], ACC)
    else:
        part = tl.arange(0, PARTS)[:, None]
        total = tl.zeros([PARTS, VOXELS, FEATURES], ACC)
    for step in range(steps):
        row = part * steps + step
        dilation = row * 0
        for branch in tl.static_range(len(DILATIONS)):
            dilation = tl.where(row // 9 == branch, DILATIONS[branch], dilation)
        deep, down = (row // 3 % 3 - 1) * dilation, (row % 3 - 1) * dilation
        there_1 = _inside(d + deep, D) & _inside(h + down, H) & (row < rows)
        there_0, there_2 = there_1 & (w >= dilation), there_1 & (w + dilation < W)
        offset = deep * H + down
        if WIDE:
            offset = offset.to(tl.int64)
        at_1 = centre + offset * W * C
        at_0, at_2 = at_1 - dilation * C, at_1 + dilation * C
        for first in tl.static_range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            # All loads before the products, so that a thread waits for them once.
            x_0 = _channels(x_ptr, at_0, there_0, c, C)
            x_1 = _channels(x_ptr, at_1, there_1, c, C)
            x_2 = _channels(x_ptr, at_2, there_2, c, C)
            at = tl.expand_dims((row * 3 * C + c) * OUT, -1) + feature
            mask = tl.expand_dims((row < rows) & (c < C), -1) & (feature < OUT)
            weight_0 = tl.load(weight_ptr + at, mask=mask, other=0.0)
            weight_1 = tl.load(weight_ptr + C * OUT + at, mask=mask, other=0.0)
            weight_2 = tl.load(weight_ptr + 2 * C * OUT + at, mask=mask, other=0.0)
            total = _dot(x_0, weight_0, total, OPERAND)
            total = _dot(x_1, weight_1, total, OPERAND)
            total = _dot(x_2, weight_2, total, OPERAND)
    if PARTS > 1:
        total = tl.sum(total, axis=0)
    _store(total, fixed_ptr, mean_ptr, out_ptr, voxel, exists, D, H, W, OUT, SLOPE, FEATURES)


@triton.jit
def _reaches(i, OFFSET: tl.constexpr, size):
    """Whether ``i``, which is one of ``size``, plus OFFSET is."""
    if OFFSET < 0:
        return i >= -OFFSET
    else:
        return i < size - OFFSET


@triton.jit
def _tap(
    centre_ptr, d, h, w, D, H, W, WIDE: tl.constexpr, DILATION: tl.constexpr, TAP: tl.constexpr
):
    """One tap of each voxel; 0 outside, and for those beyond the 27th."""
    deep: tl.constexpr = (TAP // 9 - 1) * DILATION
    down: tl.constexpr = (TAP // 3 % 3 - 1) * DILATION
    along: tl.constexpr = (TAP % 3 - 1) * DILATION
    there = TAP < 27
    if TAP // 9 != 1:
        there = there & _reaches(d, deep, D)
    if TAP // 3 % 3 != 1:
        there = there & _reaches(h, down, H)
    if TAP % 3 != 1:
        there = there & _reaches(w, along, W)
    row = deep * H + down
    if WIDE:
        row = row.to(tl.int64)
    return tl.load(centre_ptr + row * W + along, mask=there, other=0.0)


@triton.jit
def _taps(
    centre_ptr, d, h, w, D, H, W,
    WIDE: tl.constexpr, DILATION: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Every STEP-th of 32 taps from FIRST on, (VOXELS, 2, 2, ...)."""
    if STEP == 32:
        return _tap(centre_ptr, d, h, w, D, H, W, WIDE, DILATION, FIRST)
    else:
        even = _taps(centre_ptr, d, h, w, D, H, W, WIDE, DILATION, FIRST, 2 * STEP)
        odd = _taps(centre_ptr, d, h, w, D, H, W, WIDE, DILATION, FIRST + STEP, 2 * STEP)
        return tl.join(even, odd)


@triton.jit(do_not_specialize=["D", "H", "W"])
def _moving_block_narrow_kernel(
    x_ptr, weight_ptr, fixed_ptr, mean_ptr, out_ptr, D, H, W, OUT: tl.constexpr,
    DILATIONS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    WIDE: tl.constexpr, VOXELS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One channel: a step sums over the 27 taps of a branch.

    A thread reads all taps of a voxel, its neighbour those of the next one, and the distances
    between taps stand in the instructions.
    """
    voxel, exists, d, h, w = _voxels_of(D, H, W, WIDE, VOXELS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[None, :]
    tap = tl.arange(0, 32)[:, None]
    mask = (tap < 27) & (feature < OUT)
    x_ptr += tl.program_id(2).to(tl.int64) * D * H * W
    centre_ptr = x_ptr + ((d * H + h) * W + w)
    total = tl.zeros([VOXELS, FEATURES], ACC)
    for branch in tl.static_range(len(DILATIONS)):
        x = _taps(centre_ptr, d, h, w, D, H, W, WIDE, DILATIONS[branch], 0, 1)
        weight = tl.load(weight_ptr + ((branch * 27 + tap) * OUT + feature), mask=mask, other=0.0)
        total = _dot(tl.reshape(x, [VOXELS, 32]), weight, total, OPERAND)
    _store(total, fixed_ptr, mean_ptr, out_ptr, voxel, exists, D, H, W, OUT, SLOPE, FEATURES)


def _channels_of_tile(channels: int) -> int:
    return min(max(int(triton.next_power_of_2(channels)), _FEWEST_CHANNELS), _MOST_CHANNELS)


def launch_forward(
    x: Tensor, fixed_term: Tensor, mean_term: Tensor, kernels: Tensor, *, dilations: Sequence[int]
) -> Tensor:
    """``moving_block``; (B, Cout, ...) as ``fixed_term``, channels_last_3d in ``x``'s type."""
    x, fixed_term = channels_last(x), channels_last(fixed_term)
    weight = kernels.permute(0, 3, 4, 5, 2, 1).contiguous()
    C, D, H, W = x.shape[1:]
    B, OUT, *sizes = fixed_term.shape
    voxels = sizes[0] * sizes[1] * sizes[2]
    out = allocate_features(fixed_term.shape, x.dtype, x)
    arch = _launch.architecture(x)
    features = _channels_of_tile(OUT)
    constants = {
        "OUT": OUT, "FEATURES": features, "SLOPE": NEGATIVE_SLOPE,
        # Of a longer one, too, only the centre is inside.
        "DILATIONS": tuple(min(dilation, max(D, H, W)) for dilation in dilations),
        "ACC": _launch.compute_type(x),
        # The interpreter multiplies the bits of a bfloat16.
        "OPERAND": _launch.triton_type(x.dtype) if arch else _launch.compute_type(x),
        "WIDE": _launch.wide_index(max(C * D * H * W, OUT * voxels)),
        # One thread block hides what another waits for. Copies ahead of time would go past the
        # L1 cache, where a row of voxels stays between its three taps.
        "num_stages": 1,
    }  # fmt: skip
    tensors = (x, weight, fixed_term, mean_term.contiguous(), out)
    with torch.cuda.device_of(x):
        if C == 1:
            config = launch_config("moving_block_narrow", sizes[2], x.dtype, arch)
            grid = (triton.cdiv(voxels, config.tile[0]), triton.cdiv(OUT, features), B)
            _moving_block_narrow_kernel[grid](
                *tensors, D, H, W, VOXELS=config.tile[0], num_warps=config.warps, **constants
            )
        else:
            config = launch_config("moving_block", sizes[2], x.dtype, arch)
            rows = config.tile[1] // features
            grid = (triton.cdiv(voxels, rows), triton.cdiv(OUT, features), B)
            _moving_block_kernel[grid](
                *tensors, D, H, W, C=C, PARTS=config.tile[0], VOXELS=rows,
                CHANNELS=_channels_of_tile(C), num_warps=config.warps, **constants,
            )  # fmt: skip
    return out
