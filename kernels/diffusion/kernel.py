"""Triton kernels of ``diffusion`` and their launcher.

A program marches through the slices of one component with a tile of rows and columns: the slices
before and after the present one stay in registers, its other neighbours come from L1. Every voxel
is read once from memory, whether the loss is asked for, the gradient, or both: at 160x192x160 in
float32 59 MB, and 59 MB written for the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._sampling import volume_size


@triton.jit
def _share(size, ACC: tl.constexpr):
    """Voxels per difference along an axis: a mean over the differences, as one over the voxels."""
    return _ratio(size, tl.maximum(size - 1, 1), ACC)


@triton.jit
def _ratio(a, b, ACC: tl.constexpr):
    if ACC.is_fp64():
        ratio = a.to(ACC) / b.to(ACC)
    else:
        ratio = tl.div_rn(a.to(ACC), b.to(ACC))
    return ratio


@triton.jit
def _column_of(D, H, W, TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Volume, first slice, rows (TILE_H, 1) and columns (1, TILE_W) of this program."""
    program = tl.program_id(0)
    across = tl.cdiv(W, TILE_W)
    down = tl.cdiv(H, TILE_H)
    deep = tl.cdiv(D, TILE_D)
    w = (program % across) * TILE_W + tl.arange(0, TILE_W)[None, :]
    program = program // across
    h = (program % down) * TILE_H + tl.arange(0, TILE_H)[:, None]
    program = program // down
    return (program // deep).to(tl.int64), (program % deep) * TILE_D, h, w


@triton.jit(do_not_specialize=["divisor", "D", "H", "W"])
def _diffusion_kernel(
    disp_ptr, weight_ptr, partials_ptr, grad_ptr, divisor, D, H, W,
    LOSS: tl.constexpr, GRAD: tl.constexpr, ACC: tl.constexpr,
    TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Per program, the squared differences, each times its axis' share; and the gradient.

    What would lie outside the volume is the voxel itself: its difference is 0, and no load needs
    a mask.
    """
    volume, first, h, w = _column_of(D, H, W, TILE_D, TILE_H, TILE_W)
    mask = (h < H) & (w < W)
    h = tl.minimum(h, H - 1)
    w = tl.minimum(w, W - 1)
    at = h * W + w
    at_up_h = tl.minimum(h + 1, H - 1) * W + w
    at_down_h = tl.maximum(h - 1, 0) * W + w
    at_up_w = h * W + tl.minimum(w + 1, W - 1)
    at_down_w = h * W + tl.maximum(w - 1, 0)
    start = volume * volume_size(D, H, W)
    plane = H.to(tl.int64) * W
    source = disp_ptr + start
    share_d, share_h, share_w = _share(D, ACC), _share(H, ACC), _share(W, ACC)
    if GRAD:
        scale = _ratio(-2.0 * tl.load(weight_ptr).to(ACC), divisor, ACC)
        by_d, by_h, by_w = scale * share_d, scale * share_h, scale * share_w

    squares_d = tl.zeros([TILE_H, TILE_W], ACC)
    squares_h = tl.zeros([TILE_H, TILE_W], ACC)
    squares_w = tl.zeros([TILE_H, TILE_W], ACC)
    here = tl.load(source + first * plane + at).to(ACC)
    after = tl.load(source + tl.minimum(first + 1, D - 1) * plane + at).to(ACC)
    last_d = here - tl.load(source + tl.maximum(first - 1, 0) * plane + at).to(ACC)
    for d in range(first, tl.minimum(first + TILE_D, D)):
        # Two slices ahead, so that its way from memory is the length of an iteration.
        ahead = tl.load(source + tl.minimum(d + 2, D - 1) * plane + at).to(ACC)
        slice_ptr = source + d * plane
        up_d = after - here
        up_h = tl.load(slice_ptr + at_up_h).to(ACC) - here
        up_w = tl.load(slice_ptr + at_up_w).to(ACC) - here
        if LOSS:
            squares_d += up_d * up_d
            squares_h += up_h * up_h
            squares_w += up_w * up_w
        if GRAD:
            last_h = here - tl.load(slice_ptr + at_down_h).to(ACC)
            last_w = here - tl.load(slice_ptr + at_down_w).to(ACC)
            grad = by_d * (up_d - last_d) + by_h * (up_h - last_h) + by_w * (up_w - last_w)
            tl.store(grad_ptr + start + d * plane + at, grad, mask=mask)
        last_d = up_d
        here = after
        after = ahead
    if LOSS:
        squares = share_d * squares_d + share_h * squares_h + share_w * squares_w
        tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(mask, squares, 0.0)))


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
    config = launch_config("diffusion", W, disp.dtype, _launch.architecture(disp))
    blocks = [triton.cdiv(size, tile) for size, tile in zip((D, H, W), config.tile, strict=True)]
    programs = batch * components * blocks[0] * blocks[1] * blocks[2]
    divisor = 3 * disp.numel()  # three axes, each a mean over all elements
    accumulate = _launch.compute_dtype(disp)
    partials = _launch.allocate((programs,), accumulate, disp) if need_loss else disp
    grad = None if weight is None else _launch.allocate(disp.shape, disp.dtype, disp)
    loss = _launch.allocate((), accumulate, disp) if need_loss else None
    with torch.cuda.device_of(disp):
        _diffusion_kernel[(programs,)](
            disp, disp if weight is None else weight, partials, disp if grad is None else grad,
            divisor, D, H, W,
            LOSS=need_loss, GRAD=grad is not None, ACC=_launch.compute_type(disp),
            TILE_D=config.tile[0], TILE_H=config.tile[1], TILE_W=config.tile[2],
            num_warps=config.warps,
        )  # fmt: skip
        if loss is not None:
            config = launch_config("diffusion_sum", W, disp.dtype, _launch.architecture(disp))
            _diffusion_sum_kernel[(1,)](
                partials, loss, programs, divisor, TILE=config.tile[0], num_warps=config.warps
            )
    return loss, grad
