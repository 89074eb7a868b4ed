"""Triton kernel of ``world_jacobian`` and its launcher.

A program marches through slices with a tile of rows and columns: the slices before and after the
present one stay in registers, its other neighbours come from L1. Every voxel is read once from
memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._sampling import linear_row, march_through, slices_of, tile_of, volume_size

# A lane's on sm_90, at most, to which a test holds the compiler: how many programs fit at a time.
REGISTERS = 64


@triton.jit
def _components(ptr, voxels, mask, ACC: tl.constexpr):
    """Three components, one volume each, through L1: the rows beside are read again."""
    return (
        tl.load(ptr, mask=mask, other=0.0).to(ACC),
        tl.load(ptr + voxels, mask=mask, other=0.0).to(ACC),
        tl.load(ptr + 2 * voxels, mask=mask, other=0.0).to(ACC),
    )


@triton.jit
def _column(upper, lower, share, row_0, row_1, row_2, AXIS: tl.constexpr):
    """How the point moves from voxel to voxel along an axis: the grid's step and the slope."""
    return (
        row_0[AXIS] + share * (upper[0] - lower[0]),
        row_1[AXIS] + share * (upper[1] - lower[1]),
        row_2[AXIS] + share * (upper[2] - lower[2]),
    )


@triton.jit
def _determinant(a, b, c):
    """Of the matrix whose columns (or rows) these are."""
    total = a[0] * (b[1] * c[2] - b[2] * c[1])
    total += a[1] * (b[2] * c[0] - b[0] * c[2])
    return total + a[2] * (b[0] * c[1] - b[1] * c[0])


@triton.jit
def _share(index, size, ACC: tl.constexpr):
    """Of the difference of the neighbours that there are: a half inside, all of it at an end."""
    inside = (index > 0) & (index + 1 < size)
    return tl.where(inside, tl.full([], 0.5, ACC), tl.full([], 1.0, ACC))


@triton.jit(do_not_specialize=["D", "H", "slices"])
def _world_jacobian_kernel(
    disp_ptr, matrix_ptr, out_ptr, D, H, W, slices,
    BATCHED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """``disp_ptr`` (B, 3, D, H, W), ``matrix_ptr`` (B, 3, 3), ``out_ptr`` (B, 1, D, H, W)."""
    b, first, end = slices_of(D, slices, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    matrix_ptr += 9 * b
    row_0 = linear_row(matrix_ptr, 0, ACC)
    row_1 = linear_row(matrix_ptr, 1, ACC)
    row_2 = linear_row(matrix_ptr, 2, ACC)
    scale = 1.0 / _determinant(row_0, row_1, row_2)
    voxels = volume_size(D, H, W)
    start = h * W + w
    disp_ptr += b * 3 * voxels
    out_ptr += b * voxels
    # To the neighbour above and below, or to the voxel itself where there is none.
    up_h = tl.where(h + 1 < H, W, 0)
    down_h = tl.where(h > 0, W, 0)
    up_w = tl.where(w + 1 < W, 1, 0)
    down_w = tl.where(w > 0, 1, 0)
    share_h = _share(h, H, ACC)
    share_w = _share(w, W, ACC)
    plane = H * W
    before = _components(disp_ptr + (start + tl.maximum(first - 1, 0) * plane), voxels, mask, ACC)
    here = _components(disp_ptr + (start + first * plane), voxels, mask, ACC)
    for d in range(first, end):
        at_ptr = disp_ptr + (start + d * plane)
        after_ptr = disp_ptr + (start + tl.minimum(d + 1, D - 1) * plane)
        after = _components(after_ptr, voxels, mask, ACC)
        upper_h = _components(at_ptr + up_h, voxels, mask, ACC)
        lower_h = _components(at_ptr - down_h, voxels, mask, ACC)
        upper_w = _components(at_ptr + up_w, voxels, mask, ACC)
        lower_w = _components(at_ptr - down_w, voxels, mask, ACC)
        share_d = _share(d, D, ACC)
        determinant = _determinant(
            _column(after, before, share_d, row_0, row_1, row_2, 0),
            _column(upper_h, lower_h, share_h, row_0, row_1, row_2, 1),
            _column(upper_w, lower_w, share_w, row_0, row_1, row_2, 2),
        )
        # NaN where the displacement is not finite: no difference inside reads the voxel itself.
        nothing = (here[0] - here[0]) + (here[1] - here[1]) + (here[2] - here[2])
        tl.store(out_ptr + (start + d * plane), determinant * scale + nothing, mask=mask)
        before = here
        here = after


def launch_forward(disp: Tensor, matrix: Tensor) -> Tensor:
    """``world_jacobian``; (B, 1, D, H, W), contiguous."""
    disp = disp.contiguous()
    accumulate = _launch.compute_dtype(disp)
    batch, _, D, H, W = disp.shape
    out = _launch.allocate((batch, 1, D, H, W), accumulate, disp)
    config = launch_config("world_jacobian", W, disp.dtype, _launch.architecture(disp))
    slices, grid = march_through(out.shape, config, REGISTERS, disp)
    with torch.cuda.device_of(disp):
        _world_jacobian_kernel[grid](
            disp, matrix.to(accumulate).contiguous(), out, D, H, W, slices,
            BATCHED=batch > 1, ACC=_launch.triton_type(accumulate),
            WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return out
