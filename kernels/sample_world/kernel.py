"""Triton kernel of ``sample_world`` and its launcher."""

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
    displacement,
    interpolate,
    linear_row,
    march_through,
    slices_of,
    tile_of,
    times_components,
    volume_size,
)

# A lane's on sm_90, at most; programs are cut by how many of them fit at a time.
REGISTERS = 48


@triton.jit
def _axis(x, size, WIDE: tl.constexpr):
    """One axis of a cell as :func:`ulae_rt.kernels._sampling.cell` has it, and ITK's inside."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    last = tl.cast(size - 1, x.dtype)
    # Not so for NaN.
    inside = (x >= -0.5) & (x < last + 0.5)
    x = tl.where(inside, tl.minimum(tl.maximum(x, 0.0), last), 0.0)
    floor = tl.floor(x)
    lower = floor.to(INDEX)
    upper = tl.minimum(lower + 1, size - 1)
    return (lower, upper, inside, inside, x - floor), inside


@triton.jit
def _nearer(axis):
    """The nearer index of an axis; a half goes up, as in ITK."""
    return tl.where(axis[4] >= 0.5, axis[1], axis[0])


@triton.jit(do_not_specialize=["DI", "HI", "WI", "D", "H", "slices"])
def _sample_world_kernel(
    image_ptr, matrix_ptr, disp_ptr, disp_matrix_ptr, out_ptr, C, DI, HI, WI, D, H, W, slices,
    SHARED: tl.constexpr, FACTOR: tl.constexpr, MAPPED: tl.constexpr, BATCHED: tl.constexpr,
    NEAREST: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """SHARED: one image for the whole batch. FACTOR: of the displacement; 0 for none.

    MAPPED: the displacement has a matrix of its own.
    """
    b, first, end = slices_of(D, slices, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    matrix_ptr += 12 * b
    row_d = affine_row(matrix_ptr, 0, ACC)
    row_h = affine_row(matrix_ptr, 1, ACC)
    row_w = affine_row(matrix_ptr, 2, ACC)
    if MAPPED:
        disp_matrix_ptr += 9 * b
        step_d = linear_row(disp_matrix_ptr, 0, ACC)
        step_h = linear_row(disp_matrix_ptr, 1, ACC)
        step_w = linear_row(disp_matrix_ptr, 2, ACC)
    image_voxels = volume_size(DI, HI, WI)
    voxels = volume_size(D, H, W)
    if not SHARED:
        image_ptr += b * C * image_voxels
    out_ptr += b * C * voxels
    for d in range(first, end):
        p_d = tl.cast(d, ACC)
        p_h = h.to(ACC)
        p_w = w.to(ACC)
        if FACTOR > 0:
            u = displacement(disp_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
            if not MAPPED:
                p_d = p_d + u[0]
                p_h = p_h + u[1]
                p_w = p_w + u[2]
        x_d = affine_coordinate(row_d, p_d, p_h, p_w)
        x_h = affine_coordinate(row_h, p_d, p_h, p_w)
        x_w = affine_coordinate(row_w, p_d, p_h, p_w)
        if MAPPED:
            x_d += times_components(step_d, u)
            x_h += times_components(step_h, u)
            x_w += times_components(step_w, u)
        on_d, in_d = _axis(x_d, DI, WIDE)
        on_h, in_h = _axis(x_h, HI, WIDE)
        on_w, in_w = _axis(x_w, WI, WIDE)
        cells = (on_d, on_h, on_w)
        inside = mask & in_d & in_h & in_w
        at = (d * H + h) * W + w
        for c in range(C):
            volume_ptr = image_ptr + c * image_voxels
            if NEAREST:
                voxel = (_nearer(on_d) * HI + _nearer(on_h)) * WI + _nearer(on_w)
                value = tl.load(volume_ptr + voxel, mask=inside, other=0)
            else:
                value = interpolate(corners(volume_ptr, cells, HI, WI, inside, True, ACC), cells)
            tl.store(out_ptr + c * voxels + at, value, mask=mask)


def launch_forward(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None,
    disp_matrix: Tensor | None,
    *,
    shape: tuple[int, int, int],
    mode: str,
    factor: int,
) -> Tensor:
    """``sample_world``; (B, C, D, H, W) in ``image``'s type, contiguous."""
    image = image.contiguous()
    batch, (C, DI, HI, WI) = len(matrix), image.shape[1:]
    D, H, W = shape
    out = _launch.allocate((batch, C, *shape), image.dtype, image)
    wide = [x for x in (image, disp) if x is not None and x.is_floating_point()]
    accumulate = _launch.compute_dtype(*wide) if wide else torch.float64
    config = launch_config("sample_world", W, image.dtype, _launch.architecture(image))
    slices, grid = march_through(out.shape, config, REGISTERS, image)
    with torch.cuda.device_of(image):
        _sample_world_kernel[grid](
            image, matrix.to(accumulate).contiguous(),
            image if disp is None else disp.contiguous(),
            image if disp_matrix is None else disp_matrix.to(accumulate).contiguous(), out,
            C, DI, HI, WI, D, H, W, slices,
            SHARED=len(image) == 1, FACTOR=0 if disp is None else factor,
            MAPPED=disp_matrix is not None, BATCHED=batch > 1, NEAREST=mode == "nearest",
            ACC=_launch.triton_type(accumulate),
            WIDE=_launch.wide_index(max(DI * HI * WI, D * H * W)),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return out
