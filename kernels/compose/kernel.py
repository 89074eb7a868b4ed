"""Triton kernels of ``compose`` and their launchers."""

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
    displacement,
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
def _compose_forward_kernel(
    a_ptr, b_ptr, out_ptr, D, H, W, slices,
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
        out = composed(a_ptr + start, cells, u, voxels, H, W, mask, ACC)
        store_components(out_ptr + start + ((d * H + h) * W + w), out, voxels, mask)


@triton.jit(do_not_specialize=["D", "H"])
def _compose_backward_kernel(
    grad_ptr, a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, scale_ptr, D, H, W,
    FACTOR: tl.constexpr, A: tl.constexpr, B: tl.constexpr, FIXED: tl.constexpr,
    BATCHED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b, d, _ = slices_of(D, 1, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    u = displacement(b_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
    cells = cell(d, h, w, u, D, H, W, False, ACC, WIDE)
    voxels = volume_size(D, H, W)
    start = b * 3 * voxels
    at = (d * H + h) * W + w
    scale = tl.load(scale_ptr) if FIXED else 1.0
    grad = load_components(grad_ptr + start + at, voxels, mask, ACC)
    by_b = grad
    for c in tl.static_range(3):
        volume = start + c * voxels
        if A:
            scatter(grad_a_ptr + volume, grad[c], cells, H, W, mask, scale, False, FIXED)
        if B:
            by_b = add_slopes(by_b, grad[c], a_ptr + volume, cells, H, W, mask, False, ACC)
    if B:
        store_components(grad_b_ptr + start + at, by_b, voxels, mask)


def launch_forward(disp_a: Tensor, disp_b: Tensor, *, factor: int) -> Tensor:
    """``compose``; (B, 3, D, H, W), contiguous."""
    disp_a, disp_b = disp_a.contiguous(), disp_b.contiguous()
    out = _launch.allocate(disp_a.shape, torch.promote_types(disp_a.dtype, disp_b.dtype), disp_a)
    D, H, W = disp_a.shape[2:]
    config = launch_config("compose_forward", W, disp_a.dtype, _launch.architecture(disp_a))
    slices, grid = march_through(disp_a.shape, config, REGISTERS[factor > 1], disp_a)
    with torch.cuda.device_of(disp_a):
        _compose_forward_kernel[grid](
            disp_a, disp_b, out, D, H, W, slices,
            FACTOR=factor, BATCHED=disp_a.shape[0] > 1, ACC=_launch.compute_type(disp_a, disp_b),
            WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return out


def launch_backward(
    grad: Tensor, disp_a: Tensor, disp_b: Tensor, *, factor: int, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``compose``, in the types of what they belong to; None where not needed."""
    grad, disp_a, disp_b = grad.contiguous(), disp_a.contiguous(), disp_b.contiguous()
    D, H, W = disp_a.shape[2:]
    sums = ScatteredSums(disp_a.shape, grad) if need_a else None
    by_b = DisplacementGradient(disp_b, factor, disp_a) if need_b else None
    config = launch_config("compose_backward", W, disp_a.dtype, _launch.architecture(disp_a))
    with torch.cuda.device_of(disp_a):
        _compose_backward_kernel[tile_grid(disp_a.shape, 1, config.tile)](
            grad, disp_a, disp_b,
            sums.total if sums else grad, by_b.full if by_b else grad,
            sums.scale if sums else grad, D, H, W,
            FACTOR=factor, A=need_a, B=need_b, FIXED=sums is not None and sums.fixed,
            BATCHED=disp_a.shape[0] > 1, ACC=_launch.compute_type(disp_a, disp_b),
            WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[0], TILE_W=config.tile[1], num_warps=config.warps,
        )  # fmt: skip
    return sums.gradient(disp_a.dtype) if sums else None, by_b.gradient() if by_b else None
