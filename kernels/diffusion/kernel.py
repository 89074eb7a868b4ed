"""Triton kernels of ``diffusion`` and their launcher.

A program marches through the slices of one component with a tile of rows and columns: the slices
before and after the present one stay in registers, its other neighbours come from L1. Every voxel
is read once from memory, whether the loss is asked for, the gradient, or both: at 160x192x160 in
float32 59 MB, and 59 MB written for the gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config, march, resident
from ulae_rt.kernels._sampling import volume_size

# A lane's on sm_90, at most, to which a test holds the compiler: how many programs fit at a time.
REGISTERS = 56
# What a program does before its first slice takes as long as this many of them.
_START = 4


@triton.jit
def _share(size, ACC: tl.constexpr):
    """Voxels per difference along an axis: a mean over the differences, as one over the voxels."""
    return _ratio(size, tl.maximum(size - 1, 1), ACC)


@triton.jit
def _ratio(a, b, ACC: tl.constexpr):
    if ACC.is_fp64():
        ratio = tl.cast(a, ACC) / tl.cast(b, ACC)
    else:
        ratio = tl.div_rn(tl.cast(a, ACC), tl.cast(b, ACC))
    return ratio


@triton.jit
def _column_of(D, slices, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Volume, first slice, rows (TILE_H, 1) and columns (1, TILE_W) of this program."""
    deep = tl.cdiv(D, slices)
    volume = (tl.program_id(0) // deep).to(tl.int64)
    first = tl.program_id(0) % deep * slices
    w = tl.program_id(1) * TILE_W + tl.arange(0, TILE_W)[None, :]
    h = tl.program_id(2) * TILE_H + tl.arange(0, TILE_H)[:, None]
    return volume, first, h, w


@triton.jit
def _slice(ptr, d, plane, mask, ACC: tl.constexpr):
    """The voxels at ``ptr`` of slice ``d``, 0 where there are none."""
    return tl.load(ptr + d * plane, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["divisor", "D", "H", "slices"])
def _diffusion_kernel(
    disp_ptr, weight_ptr, partials_ptr, grad_ptr, divisor, D, H, W, slices,
    LOSS: tl.constexpr, GRAD: tl.constexpr, ACC: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Per program, the squared differences, each times its axis' share; and the gradient.

    A neighbour outside the volume is the voxel itself: its difference is 0.
    """
    volume, first, h, w = _column_of(D, slices, TILE_H, TILE_W)
    mask = (h < H) & (w < W)
    above = mask & (h > 0)
    below = mask & (h + 1 < H)
    left = mask & (w > 0)
    right = mask & (w + 1 < W)
    plane = H.to(tl.int64) * W
    start = volume * volume_size(D, H, W) + (h * W + w)
    source = disp_ptr + start
    share_d, share_h, share_w = _share(D, ACC), _share(H, ACC), _share(W, ACC)
    if GRAD:
        scale = _ratio(-2.0 * tl.load(weight_ptr).to(ACC), divisor, ACC)
        by_d, by_h, by_w = scale * share_d, scale * share_h, scale * share_w

    squares_d = tl.zeros([TILE_H, TILE_W], ACC)
    squares_h = tl.zeros([TILE_H, TILE_W], ACC)
    squares_w = tl.zeros([TILE_H, TILE_W], ACC)
    end = tl.minimum(first + slices, D)
    last = tl.minimum(end, D - 1)
    here = _slice(source, first, plane, mask, ACC)
    after = _slice(source, tl.minimum(first + 1, last), plane, mask, ACC)
    ahead = _slice(source, tl.minimum(first + 2, last), plane, mask, ACC)
    last_d = here - _slice(source, tl.maximum(first - 1, 0), plane, mask, ACC)
    for d in range(first, end):
        # Two iterations before it is needed, as long as its way from memory.
        third = _slice(source, tl.minimum(d + 3, last), plane, mask, ACC)
        at_ptr = source + d * plane
        up_d = after - here
        up_h = tl.load(at_ptr + W, mask=below, other=here).to(ACC) - here
        up_w = tl.load(at_ptr + 1, mask=right, other=here).to(ACC) - here
        if LOSS:
            squares_d += up_d * up_d
            squares_h += up_h * up_h
            squares_w += up_w * up_w
        if GRAD:
            last_h = here - tl.load(at_ptr - W, mask=above, other=here).to(ACC)
            last_w = here - tl.load(at_ptr - 1, mask=left, other=here).to(ACC)
            grad = by_d * (up_d - last_d) + by_h * (up_h - last_h) + by_w * (up_w - last_w)
            tl.store(grad_ptr + start + d * plane, grad, mask=mask)
        last_d = up_d
        here = after
        after = ahead
        ahead = third
    if LOSS:
        squares = share_d * squares_d + share_h * squares_h + share_w * squares_w
        row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        program = row * tl.num_programs(0) + tl.program_id(0)
        tl.store(partials_ptr + program, tl.sum(squares))


@triton.jit(do_not_specialize=["programs", "divisor"])
def _diffusion_sum_kernel(partials_ptr, loss_ptr, programs, divisor, TILE: tl.constexpr):
    """The loss from the programs' sums: one program, so always in the same order."""
    sums = tl.zeros([TILE], tl.float64)
    for first in range(0, programs, TILE):
        at = first + tl.arange(0, TILE)
        sums += tl.load(partials_ptr + at, mask=at < programs, other=0.0).to(tl.float64)
    tl.store(loss_ptr, tl.sum(sums) / divisor.to(tl.float64))


def launch(
    disp: Tensor, weight: Tensor | None, *, need_loss: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``diffusion``, and the gradient of ``weight`` times it where there is a weight.

    The loss is a scalar in float32 (float64 for float64), the gradient in ``disp``'s type.
    """
    disp = disp.contiguous()
    batch, components, D, H, W = disp.shape
    arch = _launch.architecture(disp)
    config = launch_config("diffusion", W, disp.dtype, arch)
    longest, *tile = config.tile
    down, across = triton.cdiv(H, tile[0]), triton.cdiv(W, tile[1])
    volumes = batch * components
    slices = march(
        D, longest, volumes * down * across, _launch.multiprocessors(disp),
        resident(REGISTERS, config.warps, arch), _START,
    )  # fmt: skip
    grid = (volumes * triton.cdiv(D, slices), across, down)
    programs = math.prod(grid)
    divisor = 3 * disp.numel()  # three axes, each a mean over all elements
    accumulate = _launch.compute_dtype(disp)
    partials = _launch.allocate((programs,), accumulate, disp) if need_loss else disp
    grad = None if weight is None else _launch.allocate(disp.shape, disp.dtype, disp)
    loss = _launch.allocate((), accumulate, disp) if need_loss else None
    with torch.cuda.device_of(disp):
        _diffusion_kernel[grid](
            disp, disp if weight is None else weight, partials, disp if grad is None else grad,
            divisor, D, H, W, slices,
            LOSS=need_loss, GRAD=grad is not None, ACC=_launch.compute_type(disp),
            TILE_H=tile[0], TILE_W=tile[1], num_warps=config.warps,
        )  # fmt: skip
        if loss is not None:
            config = launch_config("diffusion_sum", W, disp.dtype, arch)
            _diffusion_sum_kernel[(1,)](
                partials, loss, programs, divisor, TILE=config.tile[0], num_warps=config.warps
            )
    return loss, grad
