"""Triton kernels of ``resize_displacement`` and their launchers."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._configs import launch_config
from ulae_rt.kernels._sampling import (
    coarse_axis,
    displacement,
    march_through,
    slices_of,
    store_components,
    tile_of,
    volume_size,
)

# A forward lane's on sm_90; a test holds the compiler to it, and programs are cut by how many of
# them fit at a time.
REGISTERS = 32


@triton.jit(do_not_specialize=["D", "H", "slices"])
def _resize_forward_kernel(
    disp_ptr, out_ptr, D, H, W, slices,
    FACTOR: tl.constexpr, BATCHED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b, first, end = slices_of(D, slices, BATCHED, WIDE)
    h, w, mask = tile_of(H, W, TILE_H, TILE_W, WIDE)
    voxels = volume_size(D, H, W)
    start = b * 3 * voxels
    for d in range(first, end):
        u = displacement(disp_ptr, b, d, h, w, D, H, W, mask, FACTOR, ACC, WIDE)
        store_components(out_ptr + start + ((d * H + h) * W + w), u, voxels, mask)


@triton.jit
def _weight(fine, coarse, size, FACTOR: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """What fine voxel ``fine`` took of coarse voxel ``coarse``."""
    lower, t = coarse_axis(fine, size, FACTOR, ACC, WIDE)
    return tl.where(lower == coarse, 1 - t, tl.where(lower + 1 == coarse, t, 0.0))


@triton.jit(do_not_specialize=["total", "size", "inner"])
def _resize_backward_kernel(
    fine_ptr, coarse_ptr, total, size, inner, scale,
    FACTOR: tl.constexpr, REACH: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One axis of the adjoint: (outer, size FACTOR, inner) to (outer, size, inner).

    Each coarse voxel gathers from the fine ones that read it: no atomics, the same bits always.
    REACH bounds how many those are.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    mask = at < total
    rows = at // inner
    outer = rows // size
    coarse = rows - outer * size
    fine = size * FACTOR
    # Fine voxel i lies at i (size - 1) / (size FACTOR - 1).
    first = (coarse - 1) * (fine - 1) // tl.maximum(size - 1, 1)
    base = outer * fine * inner + (at - rows * inner)
    total_grad = tl.zeros([TILE], ACC)
    for i in range(REACH):
        z = first + i
        inside = mask & (z >= 0) & (z < fine)
        grad = tl.load(fine_ptr + (base + z * inner), mask=inside, other=0.0).to(ACC)
        total_grad += _weight(z, coarse, size, FACTOR, ACC, WIDE) * grad
    tl.store(coarse_ptr + at, scale * total_grad, mask=mask)


def launch_forward(disp: Tensor, *, factor: int) -> Tensor:
    """``resize_displacement``; (B, 3, f D, f H, f W) in ``disp``'s type."""
    disp = disp.contiguous()
    shape = torch.Size([*disp.shape[:2], *(factor * size for size in disp.shape[2:])])
    out = _launch.allocate(shape, disp.dtype, disp)
    D, H, W = shape[2:]
    config = launch_config("resize_forward", W, disp.dtype, _launch.architecture(disp))
    slices, grid = march_through(shape, config, REGISTERS, disp)
    with torch.cuda.device_of(disp):
        _resize_forward_kernel[grid](
            disp, out, D, H, W, slices,
            FACTOR=factor, BATCHED=shape[0] > 1, ACC=_launch.compute_type(disp),
            WIDE=_launch.wide_index(D * H * W),
            TILE_H=config.tile[1], TILE_W=config.tile[2], num_warps=config.warps,
        )  # fmt: skip
    return out


def launch_backward(grad: Tensor, *, factor: int, dtype: torch.dtype) -> Tensor:
    """Adjoint: (B, 3, f D, f H, f W) to (B, 3, D, H, W) in ``dtype``, one axis after the other."""
    grad = grad.contiguous()
    accumulate = _launch.compute_dtype(grad)
    shape = list(grad.shape)
    for axis in (4, 3, 2):  # the first pass reads rows, and leaves 1 / factor to the others
        size = shape[axis] // factor
        shape[axis] = size
        last = axis == 2
        out = _launch.allocate(shape, dtype if last else accumulate, grad)
        config = launch_config("resize_backward", shape[4], grad.dtype, _launch.architecture(grad))
        with torch.cuda.device_of(grad):
            _resize_backward_kernel[(triton.cdiv(out.numel(), config.tile[0]),)](
                grad, out, out.numel(), size, math.prod(shape[axis + 1 :]),
                float(factor) if last else 1.0,
                FACTOR=factor, REACH=reach(size, factor), ACC=_launch.compute_type(grad),
                WIDE=_launch.wide_index(grad.numel()), TILE=config.tile[0], num_warps=config.warps,
            )  # fmt: skip
        grad = out
    return grad


def reach(size: int, factor: int) -> int:
    """How many fine voxels to look at, from the first within one coarse voxel of another.

    The two open intervals of one coarse voxel span ``2 (factor size - 1) / (size - 1)`` fine ones;
    an axis of one voxel is read by all of its ``factor`` fine ones.
    """
    if size == 1:
        return 2 * factor
    return -(-2 * (factor * size - 1) // (size - 1)) + 1


class DisplacementGradient:
    """Room for the gradient at full resolution of a displacement that may be coarse.

    Args:
        disp: the displacement, contiguous.
        factor: full resolution over its own.
        image: a tensor of the full grid.
    """

    def __init__(self, disp: Tensor, factor: int, image: Tensor) -> None:
        self.disp = disp
        self.factor = factor
        dtype = disp.dtype if factor == 1 else _launch.compute_dtype(disp)
        self.full = _launch.allocate((image.shape[0], 3, *image.shape[2:]), dtype, disp)

    def gradient(self) -> Tensor:
        """The gradient to ``disp`` itself, once ``full`` is written."""
        if self.factor == 1:
            return self.full
        return launch_backward(self.full, factor=self.factor, dtype=self.disp.dtype)
