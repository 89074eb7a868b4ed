"""The public ``world_jacobian`` and the operator behind it."""

import torch
from torch import Tensor

from ulae_rt.errors import ShapeError, UsageError
from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import check_displacement, check_matrix, check_no_gradient
from ulae_rt.kernels.world_jacobian.reference import world_jacobian_reference

# Of the volume of a box with edges as long as the columns: axes this close to one plane are no
# scanner's.
_FLAT = 1e-6


@torch.library.custom_op("ulae_rt::world_jacobian", mutates_args=())
def _world_jacobian(disp: Tensor, matrix: Tensor) -> Tensor:
    _launch.check_available(disp)
    from ulae_rt.kernels.world_jacobian import kernel

    return kernel.launch_forward(disp, matrix)


@_world_jacobian.register_fake
def _(disp: Tensor, matrix: Tensor) -> Tensor:
    shape = (disp.shape[0], 1, *disp.shape[2:])
    return disp.new_empty(shape, dtype=_launch.compute_dtype(disp))


def world_jacobian(disp: Tensor, matrix: Tensor) -> Tensor:
    """Local change of volume of x -> x + disp(x): 1 none, below 1 a contraction, 0 or less a fold.

        out[b](p) = det(S[b] + d disp[b] / d i (p)) / det S[b]

    with S the grid's voxel-to-mm matrix and i the voxel index, which is the determinant of
    I + d disp / d x for oblique, anisotropic, flipped and permuted grids alike. Derivatives are
    central differences inside and one-sided on the faces, as numpy.gradient's. There is no
    gradient.

    Args:
        disp: (B, 3, D, H, W) in mm, any floating type, at least 2 voxels along each axis; component
            c moves along world axis c.
        matrix: S, (B, 3, 3), float32 or float64, mm: column i is the step to the next voxel along
            tensor axis i (d, h, w), row c its component along world axis c. Its determinant is
            checked, for which the host waits for a GPU, except where torch traces.

    Returns:
        (B, 1, D, H, W), float32 (float64 for a float64 ``disp``). A NaN of ``disp`` leaves NaN
        there and at its six neighbours.

    Raises:
        ShapeError: if a shape is none of the above, or the tensors are not on one device.
        DtypeError: if a type is not.
        UsageError: if a matrix is singular, or if a gradient would be needed.
    """
    check_displacement("world_jacobian", "disp", disp)
    if min(disp.shape[2:]) < 2:
        raise ShapeError(
            f"world_jacobian: disp has shape {tuple(disp.shape)}, expected at least 2 voxels along "
            "each axis",
            "give a volume",
        )
    check_matrix("world_jacobian", "matrix", matrix, 3, disp)
    check_no_gradient("world_jacobian", disp=disp, matrix=matrix)
    if not torch.compiler.is_compiling():  # where there are no numbers yet
        _check_invertible(matrix)
    if _launch.uses_triton(disp):
        out: Tensor = _world_jacobian(disp, matrix)
        return out
    return world_jacobian_reference(disp, matrix)


def _check_invertible(matrix: Tensor) -> None:
    """No matrix is singular or has a number that is not finite."""
    steps = matrix.detach().double().cpu()
    boxes = steps.norm(dim=1).prod(dim=1)
    for b, (determinant, box) in enumerate(
        zip(torch.linalg.det(steps).tolist(), boxes.tolist(), strict=True)
    ):
        if not _FLAT * box < abs(determinant):  # nor where one of them is NaN
            raise UsageError(
                f"world_jacobian: matrix {b} is singular: its determinant is {determinant:.3g}, "
                f"expected a voxel's volume, up to {box:.3g} mm^3 for columns of these lengths",
                "give the upper left 3 x 3 of the grid's voxel-to-mm matrix",
            )
