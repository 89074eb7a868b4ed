"""Triton kernels of ``warp`` and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._sampling import (
    ScatteredSums,
    add_slopes,
    cell,
    corners,
    displacement,
    interpolate,
    march_through,
    nearest_value,
    scatter,
    scatter_nearest,
    slices_of,
    store_components,
    tile_grid,
    tile_of,
    volume_size,
)
from ulae_rt.kernels.resize.kernel import DisplacementGradient

# A forward lane's on sm_90, with the displacement at full resolution and with a coarser one; a
# test holds the compiler to them, and programs are cut by how many of them fit at a time.
REGISTERS = (40, 56)


@triton.jit(do_not_specialize=["D", "H", "slices"])
def _warp_forward_kernel(
    image_ptr, disp_ptr, out_ptr, C, D, H, W, slices,
    FACTOR: tl.constexpr, BATCHED: tl.constexpr, BORDER: tl.constexpr, NEAREST: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b, first, end = slices_of(D, slices, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    voxels = volume_size(D, H, W)
    for d in range(first, end):
        u = displacement(disp_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
        cells = cell(d, h, w, u, D, H, W, BORDER, ACC, WIDE)
        at = (d * H + h) * W + w
        for c in range(C):
            start = (b * C + c) * voxels
            if NEAREST:
                value = nearest_value(image_ptr + start, cells, H, W, mask)
            else:
                v = corners(image_ptr + start, cells, H, W, mask, BORDER, ACC)
                value = interpolate(v, cells)
            tl.store(out_ptr + start + at, value, mask=mask)


@triton.jit(do_not_specialize=["D", "H"])
def _warp_backward_kernel(
    grad_ptr, image_ptr, disp_ptr, grad_image_ptr, grad_disp_ptr, scale_ptr, C, D, H, W,
    FACTOR: tl.constexpr, BATCHED: tl.constexpr, BORDER: tl.constexpr, NEAREST: tl.constexpr,
    IMAGE: tl.constexpr, DISP: tl.constexpr, FIXED: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b, d, _ = slices_of(D, 1, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    u = displacement(disp_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
    cells = cell(d, h, w, u, D, H, W, BORDER, ACC, WIDE)
    voxels = volume_size(D, H, W)
    at = (d * H + h) * W + w
    scale = tl.load(scale_ptr) if FIXED else 1.0
    zero = tl.zeros([TILE_H * TILE_W], ACC)
    by_disp = (zero, zero, zero)
    for c in range(C):
        start = (b * C + c) * voxels
        grad = tl.load(grad_ptr + start + at, mask=mask, other=0.0).to(ACC)
        if IMAGE:
            if NEAREST:
                scatter_nearest(grad_image_ptr + start, grad, cells, H, W, mask, scale, FIXED)
            else:
                scatter(grad_image_ptr + start, grad, cells, H, W, mask, scale, BORDER, FIXED)
        if DISP:
            by_disp = add_slopes(by_disp, grad, image_ptr + start, cells, H, W, mask, BORDER, ACC)
    if DISP:
        store_components(grad_disp_ptr + b * 3 * voxels + at, by_disp, voxels, mask)


def launch_forward(image: Tensor, disp: Tensor, *, padding: str, mode: str, factor: int) -> Tensor:
    """``warp``; (B, C, D, H, W) in ``image``'s type, contiguous."""
    image, disp = image.contiguous(), disp.contiguous()
    out = _launch.allocate(image.shape, image.dtype, image)
    C, D, H, W = image.shape[1:]
    config = launch_config("warp_forward", W, image.dtype, _launch.architecture(image))
    slices, grid = march_through(image.shape, config, REGISTERS[factor > 1], image)
    with torch.cuda.device_of(image):
        _warp_forward_kernel[grid](
            image, disp, out, C, D, H, W, slices,
            FACTOR=factor, BORDER=padding == "border", NEAREST=mode == "nearest",
            BATCHED=image.shape[0] > 1,
            ACC=_launch.compute_type(image, disp), WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return out


def launch_backward(
    grad: Tensor,
    image: Tensor,
    disp: Tensor,
    *,
    padding: str,
    mode: str,
    factor: int,
    need_image: bool,
    need_disp: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``warp``, in the types of what they belong to; None where not needed.

    ``nearest`` has none to ``disp``: it is asked for with ``need_disp`` False.
    """
    grad, image, disp = grad.contiguous(), image.contiguous(), disp.contiguous()
    C, D, H, W = image.shape[1:]
    sums = ScatteredSums(image.shape, grad) if need_image else None
    by_disp = DisplacementGradient(disp, factor, image) if need_disp else None
    config = launch_config("warp_backward", W, image.dtype, _launch.architecture(image))
    with torch.cuda.device_of(image):
        _warp_backward_kernel[tile_grid(image.shape, 1, config.tile)](
            grad, image, disp,
            sums.total if sums else grad, by_disp.full if by_disp else grad,
            sums.scale if sums else grad, C, D, H, W,
            FACTOR=factor, BORDER=padding == "border", NEAREST=mode == "nearest",
            BATCHED=image.shape[0] > 1,
            IMAGE=need_image, DISP=need_disp, FIXED=sums is not None and sums.fixed,
            ACC=_launch.compute_type(image, disp), WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[0], TILE_W=config.tile[1], num_warps=config.warps,
        )  # fmt: skip
    return (
        sums.gradient(image.dtype) if sums else None,
        by_disp.gradient() if by_disp else None,
    )
