"""Triton kernel of ``world_displacement`` and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._sampling import (
    affine_coordinate,
    affine_row,
    corners,
    interpolate,
    linear_row,
    march_through,
    slices_of,
    store_components,
    tile_of,
    times_components,
    volume_size,
)

# A lane's on sm_90, at most, to which a test holds the compiler: how many programs fit at a time.
REGISTERS = 64


@triton.jit
def _clamped_axis(x, size, WIDE: tl.constexpr):
    """One axis of a cell as :func:`ulae_rt.kernels._sampling.cell` has it, clamped to the edge.

    Where the coordinate is not finite, so is the weight, and NaN what is interpolated.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    last = tl.cast(size - 1, x.dtype)
    number = x == x  # not so for NaN
    inside = tl.where(number, tl.minimum(tl.maximum(x, 0.0), last), 0.0)
    floor = tl.floor(inside)
    lower = floor.to(INDEX)
    upper = tl.minimum(lower + 1, size - 1)
    return lower, upper, number, number, (inside - floor) + (x - x)


@triton.jit
def _offset_from(row, first, h, w, local_h, local_w, ACC: tl.constexpr):
    """A component of the offset in slice ``first``, as a number and what is missing from it.

    ``row`` is in float64, and so is the offset of the tile's corner, where it may be large. From
    there to a voxel of the tile it changes by little.
    """
    corner = affine_coordinate(row, first.to(tl.float64), h.to(tl.float64), w.to(tl.float64))
    whole = corner.to(ACC)
    missing = (corner - whole.to(tl.float64)).to(ACC)
    return whole, missing + (row[1].to(ACC) * local_h + row[2].to(ACC) * local_w)


@triton.jit(do_not_specialize=["DU", "HU", "WU", "D", "H", "slices"])
def _world_displacement_kernel(
    disp_ptr, to_field_ptr, linear_ptr, offset_ptr, out_ptr, DU, HU, WU, D, H, W, slices,
    BATCHED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """``disp_ptr`` (B, 3, DU, HU, WU), ``out_ptr`` (B, 3, D, H, W); the offset in float64."""
    b, first, end = slices_of(D, slices, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    to_field_ptr += 12 * b
    to_d = affine_row(to_field_ptr, 0, ACC)
    to_h = affine_row(to_field_ptr, 1, ACC)
    to_w = affine_row(to_field_ptr, 2, ACC)
    linear_ptr += 9 * b
    linear_d = linear_row(linear_ptr, 0, ACC)
    linear_h = linear_row(linear_ptr, 1, ACC)
    linear_w = linear_row(linear_ptr, 2, ACC)
    offset_ptr += 12 * b
    offset_d = affine_row(offset_ptr, 0, tl.float64)
    offset_h = affine_row(offset_ptr, 1, tl.float64)
    offset_w = affine_row(offset_ptr, 2, tl.float64)
    corner_h = tl.program_id(2) * TILE_H
    corner_w = tl.program_id(1) * TILE_W
    local_h = (h - corner_h).to(ACC)
    local_w = (w - corner_w).to(ACC)
    whole_d, rest_d = _offset_from(offset_d, first, corner_h, corner_w, local_h, local_w, ACC)
    whole_h, rest_h = _offset_from(offset_h, first, corner_h, corner_w, local_h, local_w, ACC)
    whole_w, rest_w = _offset_from(offset_w, first, corner_h, corner_w, local_h, local_w, ACC)
    step_d, step_h, step_w = offset_d[0].to(ACC), offset_h[0].to(ACC), offset_w[0].to(ACC)
    field_voxels = volume_size(DU, HU, WU)
    voxels = volume_size(D, H, W)
    field_ptr = disp_ptr + b * 3 * field_voxels
    out_ptr += b * 3 * voxels
    p_h = h.to(ACC)
    p_w = w.to(ACC)
    for d in range(first, end):
        p_d = tl.cast(d, ACC)
        cells = (
            _clamped_axis(affine_coordinate(to_d, p_d, p_h, p_w), DU, WIDE),
            _clamped_axis(affine_coordinate(to_h, p_d, p_h, p_w), HU, WIDE),
            _clamped_axis(affine_coordinate(to_w, p_d, p_h, p_w), WU, WIDE),
        )
        second_ptr = field_ptr + field_voxels
        third_ptr = second_ptr + field_voxels
        u = (
            interpolate(corners(field_ptr, cells, HU, WU, mask, True, ACC), cells),
            interpolate(corners(second_ptr, cells, HU, WU, mask, True, ACC), cells),
            interpolate(corners(third_ptr, cells, HU, WU, mask, True, ACC), cells),
        )
        local_d = tl.cast(d - first, ACC)
        total = (
            whole_d + (rest_d + step_d * local_d + times_components(linear_d, u)),
            whole_h + (rest_h + step_h * local_d + times_components(linear_h, u)),
            whole_w + (rest_w + step_w * local_d + times_components(linear_w, u)),
        )
        store_components(out_ptr + ((d * H + h) * W + w), total, voxels, mask)


def launch_forward(
    disp: Tensor,
    to_field: Tensor,
    linear: Tensor,
    offset: Tensor,
    *,
    shape: tuple[int, int, int],
) -> Tensor:
    """``world_displacement``; (B, 3, D, H, W), contiguous."""
    disp = disp.contiguous()
    accumulate = _launch.compute_dtype(disp)
    DU, HU, WU = disp.shape[2:]
    D, H, W = shape
    out = _launch.allocate((len(disp), 3, *shape), accumulate, disp)
    config = launch_config("world_displacement", W, disp.dtype, _launch.architecture(disp))
    slices, grid = march_through(out.shape, config, REGISTERS, disp)
    with torch.cuda.device_of(disp):
        _world_displacement_kernel[grid](
            disp, to_field.to(accumulate).contiguous(), linear.to(accumulate).contiguous(),
            offset.double().contiguous(), out, DU, HU, WU, D, H, W, slices,
            BATCHED=len(disp) > 1, ACC=_launch.triton_type(accumulate),
            WIDE=_launch.wide_index(max(DU * HU * WU, D * H * W)),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return out
