"""The public ``world_displacement`` and the operator behind it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import (
    check_displacement,
    check_matrix,
    check_no_gradient,
    check_sizes,
)
from ulae_rt.kernels.world_displacement.reference import world_displacement_reference


@torch.library.custom_op("ulae_rt::world_displacement", mutates_args=())
def _world_displacement(
    disp: Tensor, to_field: Tensor, linear: Tensor, offset: Tensor, shape: Sequence[int]
) -> Tensor:
    _launch.check_available(disp)
    from ulae_rt.kernels.world_displacement import kernel

    depth, height, width = shape
    return kernel.launch_forward(disp, to_field, linear, offset, shape=(depth, height, width))


@_world_displacement.register_fake
def _(
    disp: Tensor, to_field: Tensor, linear: Tensor, offset: Tensor, shape: Sequence[int]
) -> Tensor:
    return disp.new_empty((disp.shape[0], 3, *shape), dtype=_launch.compute_dtype(disp))


def world_displacement(
    disp: Tensor, to_field: Tensor, linear: Tensor, offset: Tensor, *, shape: Sequence[int]
) -> Tensor:
    """A field on a grid of its own and an affine, as one displacement on another grid.

        out[b](p) = linear[b] u[b](to_field[b] [p, 1]) + offset[b] [p, 1]

    This is a whole registration as a displacement in mm on the fixed image's own grid. The
    registration takes a fixed point x to ``A (x + R u(x))``, with A the affine and R the 3 x 3 that
    brings u from voxels of its grid to mm; G takes voxels of the fixed image to mm. Then
    ``linear`` is the 3 x 3 of A times R, and ``offset`` is ``(A - I) G`` without its last row. u is
    linear between its voxels and has the edge's value beyond them. There is no gradient.

    Offsets are computed in float64, so that images may lie far from the origin and from each other:
    what is rounded is their sum with the rest.

    Args:
        disp: u, (B, 3, D, H, W), any floating type, components in (d, h, w) order of its own grid
            or in whatever order ``linear`` takes.
        to_field: (B, 3, 4), float32 or float64: from voxels (d, h, w) of the output's grid to
            voxels of u's.
        linear: (B, 3, 3), float32 or float64: from u to the output's components, mm.
        offset: (B, 3, 4), float32 or float64: from voxels of the output's grid to mm.
        shape: (D', H', W') of the output.

    Returns:
        (B, 3, D', H', W') in mm, float32 (float64 for a float64 ``disp``). A number of ``disp`` or
        of a matrix that is not finite leaves NaN or infinities in all that it reaches.

    Raises:
        ShapeError: if a shape is none of the above, or the tensors are not on one device.
        DtypeError: if a type is not.
        UsageError: if a gradient would be needed.
    """
    check_displacement("world_displacement", "disp", disp)
    check_matrix("world_displacement", "to_field", to_field, 4, disp)
    check_matrix("world_displacement", "linear", linear, 3, disp)
    check_matrix("world_displacement", "offset", offset, 4, disp)
    sizes = check_sizes("world_displacement", shape)
    check_no_gradient(
        "world_displacement", disp=disp, to_field=to_field, linear=linear, offset=offset
    )
    if _launch.uses_triton(disp):
        out: Tensor = _world_displacement(disp, to_field, linear, offset, sizes)
        return out
    return world_displacement_reference(disp, to_field, linear, offset, shape=sizes)
