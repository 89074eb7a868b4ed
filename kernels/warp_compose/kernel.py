"""Triton kernels of ``warp_compose`` and their launchers."""

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
    composed,
    corners,
    displacement,
    interpolate,
    load_components,
    march_through,
    scatter,
    slices_of,
    store_components,
    tile_grid,
    tile_of,
    volume_size,
)
from ulae_rt.kernels.resize.kernel import DisplacementGradient

# A forward lane's on sm_90, with the displacement at full resolution and with a coarser one; a
# test holds the compiler to them, and programs are cut by how many of them fit at a time.
REGISTERS = (40, 48)


@triton.jit(do_not_specialize=["D", "H", "slices"])
def _warp_compose_forward_kernel(
    image_ptr, a_ptr, b_ptr, warped_ptr, out_ptr, C, D, H, W, slices,
    FACTOR: tl.constexpr, BATCHED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b, first, end = slices_of(D, slices, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    voxels = volume_size(D, H, W)
    start = b * 3 * voxels
    for d in range(first, end):
        u = displacement(b_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
        cells = cell(d, h, w, u, D, H, W, False, ACC, WIDE)
        at = (d * H + h) * W + w
        for c in range(C):
            volume = (b * C + c) * voxels
            value = interpolate(corners(image_ptr + volume, cells, H, W, mask, False, ACC), cells)
            tl.store(warped_ptr + volume + at, value, mask=mask)
        out = composed(a_ptr + start, cells, u, voxels, H, W, mask, ACC)
        store_components(out_ptr + start + at, out, voxels, mask)


@triton.jit(do_not_specialize=["D", "H"])
def _warp_compose_backward_kernel(
    grad_warped_ptr, grad_out_ptr, image_ptr, a_ptr, b_ptr,
    grad_image_ptr, grad_a_ptr, grad_b_ptr, image_scale_ptr, a_scale_ptr, C, D, H, W,
    FACTOR: tl.constexpr, IMAGE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    FIXED: tl.constexpr, BATCHED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b, d, _ = slices_of(D, 1, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    u = displacement(b_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
    cells = cell(d, h, w, u, D, H, W, False, ACC, WIDE)
    voxels = volume_size(D, H, W)
    start = b * 3 * voxels
    at = (d * H + h) * W + w
    image_scale = tl.load(image_scale_ptr) if FIXED and IMAGE else 1.0
    a_scale = tl.load(a_scale_ptr) if FIXED and A else 1.0
    grad = load_components(grad_out_ptr + start + at, voxels, mask, ACC)
    by_b = grad
    for c in range(C):
        volume = (b * C + c) * voxels
        by_value = tl.load(grad_warped_ptr + volume + at, mask=mask, other=0.0).to(ACC)
        if IMAGE:
            scatter(grad_image_ptr + volume, by_value, cells, H, W, mask, image_scale, False, FIXED)
        if B:
            by_b = add_slopes(by_b, by_value, image_ptr + volume, cells, H, W, mask, False, ACC)
    for c in tl.static_range(3):
        volume = start + c * voxels
        if A:
            scatter(grad_a_ptr + volume, grad[c], cells, H, W, mask, a_scale, False, FIXED)
        if B:
            by_b = add_slopes(by_b, grad[c], a_ptr + volume, cells, H, W, mask, False, ACC)
    if B:
        store_components(grad_b_ptr + start + at, by_b, voxels, mask)


def launch_forward(
    image: Tensor, disp_a: Tensor, disp_b: Tensor, *, factor: int
) -> tuple[Tensor, Tensor]:
    """``warp_compose``; (B, C, D, H, W) and (B, 3, D, H, W), contiguous."""
    image, disp_a, disp_b = image.contiguous(), disp_a.contiguous(), disp_b.contiguous()
    warped = _launch.allocate(image.shape, image.dtype, image)
    out = _launch.allocate(disp_a.shape, torch.promote_types(disp_a.dtype, disp_b.dtype), image)
    C, D, H, W = image.shape[1:]
    config = launch_config("warp_compose_forward", W, disp_a.dtype, _launch.architecture(image))
    slices, grid = march_through(image.shape, config, REGISTERS[factor > 1], image)
    with torch.cuda.device_of(image):
        _warp_compose_forward_kernel[grid](
            image, disp_a, disp_b, warped, out, C, D, H, W, slices,
            FACTOR=factor, BATCHED=image.shape[0] > 1,
            ACC=_launch.compute_type(image, disp_a, disp_b),
            WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return warped, out


def launch_backward(
    grad_warped: Tensor,
    grad_out: Tensor,
    image: Tensor,
    disp_a: Tensor,
    disp_b: Tensor,
    *,
    factor: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to image, disp_a and disp_b, each in its type; None where not needed."""
    grad_warped, grad_out = grad_warped.contiguous(), grad_out.contiguous()
    image, disp_a, disp_b = image.contiguous(), disp_a.contiguous(), disp_b.contiguous()
    C, D, H, W = image.shape[1:]
    by_image = ScatteredSums(image.shape, grad_warped) if needs[0] else None
    by_a = ScatteredSums(disp_a.shape, grad_out) if needs[1] else None
    by_b = DisplacementGradient(disp_b, factor, image) if needs[2] else None
    config = launch_config("warp_compose_backward", W, disp_a.dtype, _launch.architecture(image))
    with torch.cuda.device_of(image):
        _warp_compose_backward_kernel[tile_grid(image.shape, 1, config.tile)](
            grad_warped, grad_out, image, disp_a, disp_b,
            by_image.total if by_image else image, by_a.total if by_a else image,
            by_b.full if by_b else image,
            by_image.scale if by_image else image, by_a.scale if by_a else image, C, D, H, W,
            FACTOR=factor, BATCHED=image.shape[0] > 1, IMAGE=needs[0], A=needs[1], B=needs[2],
            FIXED=any(sums is not None and sums.fixed for sums in (by_image, by_a)),
            ACC=_launch.compute_type(image, disp_a, disp_b), WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[0], TILE_W=config.tile[1], num_warps=config.warps,
        )  # fmt: skip
    return (
        by_image.gradient(image.dtype) if by_image else None,
        by_a.gradient(disp_a.dtype) if by_a else None,
        by_b.gradient() if by_b else None,
    )
