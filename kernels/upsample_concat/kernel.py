"""Triton kernels of ``upsample_concat`` and their launchers.

Memory is rows of channels, one row a voxel. Fine voxel i of an axis takes 3/4 of its nearer coarse
voxel, i // 2, and 1/4 of that one's neighbour on its own side, at the faces of itself. So the fine
voxels 2 k - 1 and 2 k share the coarse ones k - 1 and k: a program makes the four fine rows along w
that share four coarse ones, keeps two of those for the next four, and so on along h. Its backward
makes two by two coarse rows from the six by six fine ones that read them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._features import allocate_features, channels_last

# Wider rows are cut: 64 channels are a whole 128-byte line already in half precision.
_MOST_CHANNELS = 64


@triton.jit
def _rows_of(deep, down, W, VOXELS: tl.constexpr):
    """Batch index, slice, row and columns (VOXELS, 1) of this program."""
    program = tl.program_id(0)
    across = tl.cdiv(W, VOXELS)
    w = (program % across) * VOXELS + tl.arange(0, VOXELS)[:, None]
    program = program // across
    h = program % down
    program = program // down
    return (program // deep).to(tl.int64), program % deep, h, w


@triton.jit
def _channels(C: tl.constexpr, CHANNELS: tl.constexpr, inside):
    """Channels (1, CHANNELS) of this program, and the mask of its voxels and channels."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return c, inside & (c < C)


@triton.jit
def _mix(a, b, t):
    return a + t * (b - a)


@triton.jit
def _upsampled_row(ptr, near, far, mask, ACC: tl.constexpr):
    """A coarse row of ``x`` at the fine columns."""
    a = tl.load(ptr + near, mask=mask, other=0.0).to(ACC)
    return _mix(a, tl.load(ptr + far, mask=mask, other=0.0).to(ACC), 0.25)


@triton.jit
def _store_row(
    out_ptr, skip_ptr, value, b, d, h, w, D, H, W, inside,
    C: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One fine row: ``value``, ``skip`` and zeros side by side; nothing if there is no such row."""
    inside = inside & (d >= 0) & (d < D) & (h >= 0) & (h < H)
    row = ((b * D + d) * H + h) * W
    out_ptr += row * WIDTH
    c, mask = _channels(C, CHANNELS, inside)
    tl.store(out_ptr + (w * WIDTH + c), value, mask=mask)
    c, mask = _channels(WIDTH - C, REST, inside)
    skip = tl.load(skip_ptr + row * S + (w * S + c), mask=mask & (c < S), other=0.0)
    tl.store(out_ptr + C + (w * WIDTH + c), skip, mask=mask)


@triton.jit(do_not_specialize=["D", "H", "W"])
def _upsample_concat_forward_kernel(
    x_ptr, skip_ptr, out_ptr, D, H, W, C: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Sizes are the coarse ones. Slice d and row h lie between coarse d - 1 and d, h - 1 and h."""
    b, d, first, w = _rows_of(D + 1, tl.cdiv(H + 1, ROWS), 2 * W, VOXELS)
    first = first * ROWS
    inside = w < 2 * W
    c, mask = _channels(C, CHANNELS, inside)
    near = w // 2
    far = tl.minimum(tl.maximum(near + 2 * (w % 2) - 1, 0), W - 1) * C + c
    near = near * C + c
    x_0_ptr = x_ptr + (b * D + tl.maximum(d - 1, 0)) * H * W * C
    x_1_ptr = x_ptr + (b * D + tl.minimum(d, D - 1)) * H * W * C
    start = tl.maximum(first - 1, 0).to(tl.int64) * W * C
    x_00 = _upsampled_row(x_0_ptr + start, near, far, mask, ACC)
    x_10 = _upsampled_row(x_1_ptr + start, near, far, mask, ACC)
    for h in range(first, tl.minimum(first + ROWS, H + 1)):
        start = tl.minimum(h, H - 1).to(tl.int64) * W * C
        x_01 = _upsampled_row(x_0_ptr + start, near, far, mask, ACC)
        x_11 = _upsampled_row(x_1_ptr + start, near, far, mask, ACC)
        for side in tl.static_range(2):
            low = _mix(x_00, x_01, 0.25 + 0.5 * side)
            high = _mix(x_10, x_11, 0.25 + 0.5 * side)
            row = 2 * h - 1 + side
            _store_row(
                out_ptr, skip_ptr, _mix(low, high, 0.25), b, 2 * d - 1, row, w,
                2 * D, 2 * H, 2 * W, inside, C, S, WIDTH, CHANNELS, REST,
            )  # fmt: skip
            _store_row(
                out_ptr, skip_ptr, _mix(low, high, 0.75), b, 2 * d, row, w,
                2 * D, 2 * H, 2 * W, inside, C, S, WIDTH, CHANNELS, REST,
            )  # fmt: skip
        x_00 = x_01
        x_10 = x_11


@triton.jit
def _own(at_face):
    """What a fine voxel takes of the coarse one it lies in: all of it at a face of the volume."""
    return tl.where(at_face, 1.0, 0.75)


@triton.jit
def _downsampled_row(ptr, inside, w, W, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """Adjoint of :func:`_upsampled_row`: from the fine voxels 2 w - 1 to 2 w + 2 to w."""
    before = tl.load(ptr - STRIDE, mask=inside & (w > 0), other=0.0).to(ACC)
    first = tl.load(ptr, mask=inside, other=0.0).to(ACC)
    second = tl.load(ptr + STRIDE, mask=inside, other=0.0).to(ACC)
    after = tl.load(ptr + 2 * STRIDE, mask=inside & (w < W - 1), other=0.0).to(ACC)
    return _own(w == 0) * first + _own(w == W - 1) * second + 0.25 * (before + after)


@triton.jit
def _downsampled_slice(ptr, inside, h, w, H, W, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """Adjoint of a fine slice along h and w: coarse rows h (even) and h + 1, from fine row 2 h."""
    down = 2 * W * STRIDE
    low = 0.25 * _downsampled_row(ptr - down, inside & (h > 0), w, W, STRIDE, ACC)
    low += _own(h == 0) * _downsampled_row(ptr, inside, w, W, STRIDE, ACC)
    row = _downsampled_row(ptr + down, inside, w, W, STRIDE, ACC)
    low += _own(h == H - 1) * row
    high = 0.25 * row
    inside = inside & (h + 1 < H)
    row = _downsampled_row(ptr + 2 * down, inside, w, W, STRIDE, ACC)
    low += 0.25 * row
    high += 0.75 * row
    high += _own(h == H - 2) * _downsampled_row(ptr + 3 * down, inside, w, W, STRIDE, ACC)
    inside = inside & (h + 2 < H)
    high += 0.25 * _downsampled_row(ptr + 4 * down, inside, w, W, STRIDE, ACC)
    return low, high


@triton.jit
def _taken(fine, coarse, size):
    """What fine voxel ``fine`` takes of coarse voxel ``coarse``."""
    near = fine // 2
    far = tl.minimum(tl.maximum(near + 2 * (fine % 2) - 1, 0), size - 1)
    return tl.where(near == coarse, 0.75, 0.0) + tl.where(far == coarse, 0.25, 0.0)


@triton.jit(do_not_specialize=["D", "H", "W"])
def _upsample_concat_backward_kernel(
    grad_ptr, grad_x_ptr, D, H, W, C: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sizes are the coarse ones. A voxel's row of the gradient is STRIDE long, of which C count."""
    b, d, h, w = _rows_of(tl.cdiv(D, 2), tl.cdiv(H, 2), W, VOXELS)
    d, h = 2 * d, 2 * h
    c, mask = _channels(C, CHANNELS, w < W)
    x_00 = tl.zeros([VOXELS, CHANNELS], ACC)
    x_01 = tl.zeros([VOXELS, CHANNELS], ACC)
    x_10 = tl.zeros([VOXELS, CHANNELS], ACC)
    x_11 = tl.zeros([VOXELS, CHANNELS], ACC)
    for fine in range(tl.maximum(2 * d - 1, 0), tl.minimum(2 * d + 5, 2 * D)):
        row_ptr = grad_ptr + ((b * 2 * D + fine) * 2 * H + 2 * h) * 2 * W * STRIDE
        fine_ptr = row_ptr + (2 * w * STRIDE + c)
        low, high = _downsampled_slice(fine_ptr, mask, h, w, H, W, STRIDE, ACC)
        by_0, by_1 = _taken(fine, d, D), _taken(fine, d + 1, D)
        x_00 += by_0 * low
        x_01 += by_0 * high
        x_10 += by_1 * low
        x_11 += by_1 * high
    out_ptr = grad_x_ptr + ((b * D + d) * H + h) * W * C
    at = w * C + c
    down, deep = W * C, H.to(tl.int64) * W * C
    tl.store(out_ptr + at, x_00, mask=mask)
    tl.store(out_ptr + down + at, x_01, mask=mask & (h + 1 < H))
    tl.store(out_ptr + deep + at, x_10, mask=mask & (d + 1 < D))
    tl.store(out_ptr + deep + down + at, x_11, mask=mask & (d + 1 < D) & (h + 1 < H))


def _lanes(channels: int) -> int:
    return min(int(triton.next_power_of_2(channels)), _MOST_CHANNELS)


def _columns(elements: int, channels: int, columns: int) -> int:
    """Voxels of a tile of as many elements, in a row of ``columns``."""
    return min(elements // _lanes(channels), int(triton.next_power_of_2(columns)))


def launch_forward(x: Tensor, skip: Tensor, *, width: int) -> Tensor:
    """``upsample_concat``; (B, width, 2 D, 2 H, 2 W), channels_last_3d."""
    x, skip = channels_last(x), channels_last(skip)
    B, C, D, H, W = x.shape
    S = skip.shape[1]
    out = allocate_features((B, width, *skip.shape[2:]), x.dtype, x)
    config = launch_config("upsample_concat_forward", 2 * W, x.dtype, _launch.architecture(x))
    rows, voxels = config.tile[0], _columns(config.tile[1], C, 2 * W)
    blocks = max(triton.cdiv(C, _MOST_CHANNELS), triton.cdiv(width - C, _MOST_CHANNELS))
    grid = (B * (D + 1) * triton.cdiv(H + 1, rows) * triton.cdiv(2 * W, voxels), blocks)
    with torch.cuda.device_of(x):
        _upsample_concat_forward_kernel[grid](
            x, skip, out, D, H, W, C=C, S=S, WIDTH=width, ACC=_launch.compute_type(x),
            ROWS=rows, VOXELS=voxels, CHANNELS=_lanes(C), REST=_lanes(width - C),
            num_warps=config.warps,
        )  # fmt: skip
    return out


def launch_backward(grad: Tensor, *, channels: int) -> Tensor:
    """Gradient to ``x``, the first ``channels``: (B, C, D, H, W), channels_last_3d."""
    grad = channels_last(grad)
    B, stride, *sizes = grad.shape
    D, H, W = (size // 2 for size in sizes)
    grad_x = allocate_features((B, channels, D, H, W), grad.dtype, grad)
    config = launch_config("upsample_concat_backward", W, grad.dtype, _launch.architecture(grad))
    voxels = _columns(config.tile[0], channels, W)
    grid = (
        B * triton.cdiv(D, 2) * triton.cdiv(H, 2) * triton.cdiv(W, voxels),
        triton.cdiv(channels, _MOST_CHANNELS),
    )
    with torch.cuda.device_of(grad):
        _upsample_concat_backward_kernel[grid](
            grad, grad_x, D, H, W, C=channels, STRIDE=stride, ACC=_launch.compute_type(grad),
            VOXELS=voxels, CHANNELS=_lanes(channels), num_warps=config.warps,
        )  # fmt: skip
    return grad_x
