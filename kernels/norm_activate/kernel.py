"""Triton kernels of ``norm_activate`` and their launchers.

Memory is rows of channels, one row a voxel. A program takes a tile of rows and sums down its
columns; a small kernel merges the tiles' sums, always in the same order; a second reading does the
rest, from the last tile to the first, because the last ones read are what the L2 cache still has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._features import allocate_features, channels_last
from ulae_rt.kernels.norm_activate.reference import NEGATIVE_SLOPE, NORM_EPS

# Wider rows are cut: 64 channels are a whole 128-byte line already in half precision.
_MOST_CHANNELS = 64


@triton.jit
def _tile_of(chunk, N, C: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's start, offsets from it and mask; its channels (1, CHANNELS), and rows (b, c)."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    b = tl.program_id(2).to(tl.int64)
    first = chunk.to(tl.int64) * VOXELS
    rows = tl.arange(0, VOXELS)[:, None]
    mask = (rows < N - first) & (c < C)
    return (b * N + first) * C, rows * C + c, mask, c, b * C + c


@triton.jit(do_not_specialize=["N", "chunks"])
def _norm_statistics_kernel(
    x_ptr, partials_ptr, N, chunks, C: tl.constexpr,
    ACC: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Per tile and channel, the first voxel, and the sums of the distances from it and squares.

    The squares lose to cancellation what the first voxels of all tiles vary more than the rest,
    not what the features are away from 0.
    """
    chunk = tl.program_id(0)
    start, at, mask, c, row = _tile_of(chunk, N, C, VOXELS, CHANNELS)
    pivot = tl.load(x_ptr + start + c, mask=c < C, other=0.0).to(ACC)
    x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(ACC)
    distance = tl.where(mask, x - pivot, 0.0)
    plane = tl.num_programs(2).to(tl.int64) * C * chunks
    out_ptr = partials_ptr + row * chunks + chunk
    tl.store(out_ptr, pivot, mask=c < C)
    tl.store(out_ptr + plane, tl.sum(distance, axis=0, keep_dims=True), mask=c < C)
    squares = tl.sum(distance * distance, axis=0, keep_dims=True)
    tl.store(out_ptr + 2 * plane, squares, mask=c < C)


@triton.jit(do_not_specialize=["N", "chunks"])
def _norm_merge_kernel(
    partials_ptr, mean_ptr, rstd_ptr, N, chunks,
    EPS: tl.constexpr, VOXELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One (b, c) a program: the tiles' sums merged about the first voxel.

    In float64, where the difference of two squares leaves enough.
    """
    row = tl.program_id(0)
    partials_ptr += row.to(tl.int64) * chunks
    plane = tl.num_programs(0).to(tl.int64) * chunks
    origin = tl.load(partials_ptr).to(tl.float64)
    sums = tl.zeros([TILE], tl.float64)
    squares = tl.zeros([TILE], tl.float64)
    for first in range(0, chunks, TILE):
        chunk = first + tl.arange(0, TILE)
        inside = chunk < chunks
        at_ptr = partials_ptr + chunk
        pivot = tl.load(at_ptr, mask=inside, other=0.0).to(tl.float64)
        distances = tl.load(at_ptr + plane, mask=inside, other=0.0).to(tl.float64)
        square = tl.load(at_ptr + 2 * plane, mask=inside, other=0.0).to(tl.float64)
        offset = tl.where(inside, pivot - origin, 0.0)
        count = tl.minimum(N - chunk.to(tl.int64) * VOXELS, VOXELS).to(tl.float64)
        sums += distances + count * offset
        squares += square + offset * (2.0 * distances + count * offset)
    voxels = N.to(tl.float64)
    mean = tl.sum(sums) / voxels
    variance = tl.maximum(tl.sum(squares) / voxels - mean * mean, 0.0)
    tl.store(mean_ptr + row, origin + mean)
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt(variance + EPS))


@triton.jit(do_not_specialize=["N"])
def _norm_forward_kernel(
    x_ptr, mean_ptr, rstd_ptr, y_ptr, N, C: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    start, at, mask, c, row = _tile_of(chunk, N, C, VOXELS, CHANNELS)
    mean = tl.load(mean_ptr + row, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=c < C, other=0.0)
    # The mean in two parts: a large one would round by as much as the features vary.
    high = mean.to(ACC)
    low = (mean - high.to(tl.float64)).to(ACC)
    x = tl.load(x_ptr + start + at, mask=mask, other=0.0).to(ACC)
    normal = ((x - high) - low) * rstd
    tl.store(y_ptr + start + at, tl.where(normal > 0, normal, SLOPE * normal), mask=mask)


@triton.jit
def _before_activation(grad_ptr, y_ptr, at, mask, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """The gradient before the activation, and the normalised input."""
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
    up = y > 0
    return tl.where(up, grad, SLOPE * grad), tl.where(up, y, (1.0 / SLOPE) * y)


@triton.jit(do_not_specialize=["N", "chunks"])
def _norm_sums_kernel(
    grad_ptr, y_ptr, partials_ptr, N, chunks, C: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Per tile and channel, the sums of g and of g h."""
    chunk = tl.program_id(0)
    start, at, mask, c, row = _tile_of(chunk, N, C, VOXELS, CHANNELS)
    g, h = _before_activation(grad_ptr + start, y_ptr + start, at, mask, SLOPE, ACC)
    out_ptr = partials_ptr + row * chunks + chunk
    tl.store(out_ptr, tl.sum(g, axis=0, keep_dims=True), mask=c < C)
    out_ptr += tl.num_programs(2).to(tl.int64) * C * chunks
    tl.store(out_ptr, tl.sum(g * h, axis=0, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=["N", "chunks"])
def _norm_means_kernel(partials_ptr, means_ptr, N, chunks, TILE: tl.constexpr):
    """One row of the tiles' sums a program: what they come to over the voxels."""
    row = tl.program_id(0)
    partials_ptr += row.to(tl.int64) * chunks
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, chunks, TILE):
        chunk = first + tl.arange(0, TILE)
        total += tl.load(partials_ptr + chunk, mask=chunk < chunks, other=0.0).to(tl.float64)
    tl.store(means_ptr + row, tl.sum(total) / N.to(tl.float64))


@triton.jit(do_not_specialize=["N"])
def _norm_backward_kernel(
    grad_ptr, y_ptr, means_ptr, rstd_ptr, grad_x_ptr, N, C: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    start, at, mask, c, row = _tile_of(chunk, N, C, VOXELS, CHANNELS)
    rows = tl.num_programs(2) * C
    mean_g = tl.load(means_ptr + row, mask=c < C, other=0.0)
    mean_gh = tl.load(means_ptr + rows + row, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=c < C, other=0.0)
    g, h = _before_activation(grad_ptr + start, y_ptr + start, at, mask, SLOPE, ACC)
    tl.store(grad_x_ptr + start + at, (g - mean_g - h * mean_gh) * rstd, mask=mask)


class _Tiles:
    """How features are cut into tiles of VOXELS rows and CHANNELS columns."""

    def __init__(self, x: Tensor) -> None:
        self.batch, self.channels, *sizes = x.shape
        self.voxels = sizes[0] * sizes[1] * sizes[2]
        arch = _launch.architecture(x)
        tile = launch_config("norm_activate", self.channels, x.dtype, arch)
        self.merge = launch_config("norm_activate_merge", self.channels, x.dtype, arch)
        width = min(triton.next_power_of_2(self.channels), _MOST_CHANNELS)
        height = tile.tile[0] // width
        self.chunks = triton.cdiv(self.voxels, height)
        self.grid = (self.chunks, triton.cdiv(self.channels, width), self.batch)
        self.constants = {
            "C": self.channels, "ACC": _launch.compute_type(x),
            "VOXELS": height, "CHANNELS": width, "num_warps": tile.warps,
        }  # fmt: skip

    def partials(self, count: int, x: Tensor) -> Tensor:
        """Room for ``count`` numbers a tile and channel."""
        shape = (count, self.batch, self.channels, self.chunks)
        return _launch.allocate(shape, _launch.compute_dtype(x), x)


def launch_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """``norm_activate``, channels_last_3d in ``x``'s type, and 1 / sqrt(variance + eps), (B, C)."""
    x = channels_last(x)
    tiles = _Tiles(x)
    partials = tiles.partials(3, x)
    mean = _launch.allocate(x.shape[:2], torch.float64, x)
    rstd = _launch.allocate(x.shape[:2], _launch.compute_dtype(x), x)
    y = allocate_features(x.shape, x.dtype, x)
    with torch.cuda.device_of(x):
        _norm_statistics_kernel[tiles.grid](
            x, partials, tiles.voxels, tiles.chunks, **tiles.constants
        )
        _norm_merge_kernel[(mean.numel(),)](
            partials, mean, rstd, tiles.voxels, tiles.chunks, EPS=NORM_EPS,
            VOXELS=tiles.constants["VOXELS"],
            TILE=tiles.merge.tile[0], num_warps=tiles.merge.warps,
        )  # fmt: skip
        _norm_forward_kernel[tiles.grid](
            x, mean, rstd, y, tiles.voxels, SLOPE=NEGATIVE_SLOPE, **tiles.constants
        )
    return y, rstd


def launch_backward(grad: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    """Gradient to ``x``, channels_last_3d, from the results of the forward."""
    grad, y = channels_last(grad), channels_last(y)
    tiles = _Tiles(y)
    partials = tiles.partials(2, y)
    means = _launch.allocate((2, *rstd.shape), rstd.dtype, y)
    grad_x = allocate_features(y.shape, y.dtype, y)
    with torch.cuda.device_of(y):
        _norm_sums_kernel[tiles.grid](
            grad, y, partials, tiles.voxels, tiles.chunks, SLOPE=NEGATIVE_SLOPE, **tiles.constants
        )
        _norm_means_kernel[(means.numel(),)](
            partials, means, tiles.voxels, tiles.chunks,
            TILE=tiles.merge.tile[0], num_warps=tiles.merge.warps,
        )  # fmt: skip
        _norm_backward_kernel[tiles.grid](
            grad, y, means, rstd, grad_x, tiles.voxels, SLOPE=NEGATIVE_SLOPE, **tiles.constants
        )
    return grad_x
