"""The public ``affine_normal_equations`` and the operator behind it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import is_whole
from ulae_rt.kernels.affine_normal_equations.reference import affine_normal_equations_reference

# Of the polynomial. A higher power of a brightness says nothing more of another contrast.
DEGREES = (1, 2, 3, 4)
# No face of the moving image cuts the brain.
UNCUT = (False,) * 6


@torch.library.custom_op("ulae_rt::affine_normal_equations", mutates_args=())
def _affine_normal_equations(
    moving: Tensor,
    points: Tensor,
    values: Tensor,
    matrix: Tensor,
    degree: int,
    derivatives: bool,
    cut: Sequence[bool],
) -> Tensor:
    _launch.check_available(moving)
    from ulae_rt.kernels.affine_normal_equations import kernel

    return kernel.launch_forward(
        moving, points, values, matrix, degree=degree, derivatives=derivatives, cut=cut
    )


@_affine_normal_equations.register_fake
def _(
    moving: Tensor,
    points: Tensor,
    values: Tensor,
    matrix: Tensor,
    degree: int,
    derivatives: bool,
    cut: Sequence[bool],
) -> Tensor:
    rows = (12 if derivatives else 0) + degree + 2
    return moving.new_empty((matrix.shape[0], rows, rows), dtype=torch.float64)


def affine_normal_equations(
    moving: Tensor,
    points: Tensor,
    values: Tensor,
    matrix: Tensor,
    *,
    degree: int = 1,
    derivatives: bool = True,
    cut: Sequence[bool] = UNCUT,
) -> Tensor:
    """The sums from which an affine alignment by least squares takes its steps, in one pass.

    At every point p of the fixed image, where that has the value f(p), the moving image has a value
    and a derivative by the twelve numbers of the matrix M:

        m(p) = moving(M [p, 1]),    j(p) = dm / dM = (grad moving)(M [p, 1]) x [p, 1]

    Together they are a column a(p) = [j (12 rows), 1, m, m^2, ..., m^degree, f], and the result is
    the Gram matrix sum_p a(p) a(p)^T. For ``degree`` 1 that holds the five sums of Pearson's
    correlation, its gradient and its Gauss-Newton matrix (Evangelidis and Psarakis, "Parametric
    image alignment using enhanced correlation coefficient maximization", PAMI 2008). Without
    derivatives it holds the normal equations of the polynomial of m that explains f best, a smooth
    correlation ratio (Roche et al., "The correlation ratio as a new similarity measure for
    multimodal image registration", MICCAI 1998). Nothing is centred or weighted.

    The border is that of :func:`ulae_rt.kernels.sample_world`: half a voxel around the outermost
    voxel centres belongs to the image, and there m does not change along that axis; beyond it m and
    j are 0. Beyond a face that cuts the brain nothing is known of it: points there do not count,
    not even in the row of ones.

    Args:
        moving: (1, 1, D, H, W) for all matrices, or (B, 1, D, H, W), one for each; of a floating
            type. A NaN among the voxels around a point makes m NaN, and with it the sums.
        points: (3, N), voxels (d, h, w) of the fixed image, whole or not; float32 or float64. A
            point that is not finite leads nowhere: m and j are 0.
        values: (N,), the fixed image's values there; float32 or float64.
        matrix: (B, 3, 4), from voxels (d, h, w) of the fixed image to voxels of the moving one;
            float32 or float64. One with a NaN leads nowhere.
        degree: highest power of m, 1 to 4; only 1 with ``derivatives``.
        derivatives: whether to include the rows j.
        cut: six, whether a face of the moving image cuts the brain: the first and the last along
            d, then those along h and w. A point that leads nowhere is beyond no face.

    Returns:
        (B, R, R) float64, R = 12 + degree + 2, or degree + 2 without ``derivatives``; symmetric,
        and the same bits each time on the same device. The order of j is that of ``matrix``, row
        by row. No point at all gives zeros.

        Voxels are interpolated in ``moving``'s type, at least in float32. Products and sums are
        float64, but for the kernel's with derivatives: products are in the type of the
        interpolation, and so are the sums of 128 points, which are then added up in float64. In
        float32 that is at most 12 x 2^-24 of the sum of the absolute terms.

    Raises:
        ShapeError: if a shape is none of the above, or the tensors are not on one device.
        DtypeError: if a type is not.
        UsageError: for another ``degree`` or ``cut``, or if a gradient would be needed.
    """
    given = {"moving": moving, "points": points, "values": values, "matrix": matrix}
    if not is_whole(degree) or degree not in (DEGREES[:1] if derivatives else DEGREES):
        raise UsageError(
            f"affine_normal_equations: degree is {degree!r}, expected "
            f"{'1 with derivatives' if derivatives else '1 to 4'}",
            "leave out degree, or give derivatives=False",
        )
    if not isinstance(cut, Sequence) or len(cut) != 6 or not all(isinstance(c, bool) for c in cut):
        raise UsageError(
            f"affine_normal_equations: cut is {cut!r}, expected six of True and False",
            "leave it out where no face cuts the brain",
        )
    _check_shapes(moving, points, values, matrix)
    for name, tensor in given.items():
        is_fine = tensor.dtype in (torch.float32, torch.float64)
        if not (is_fine or (name == "moving" and tensor.is_floating_point())):
            raise DtypeError(
                f"affine_normal_equations: {name} is {tensor.dtype}, expected "
                f"{'a floating type' if name == 'moving' else 'float32 or float64'}",
                f"convert it: {name}.float()",
            )
        if tensor.device != moving.device:
            raise ShapeError(
                f"affine_normal_equations: {name} is on {tensor.device}, expected "
                f"{moving.device} as moving",
                "move one to the other",
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                f"affine_normal_equations: {name} requires a gradient, and this operation has none",
                "call it under torch.no_grad()",
            )
    if _launch.uses_triton(moving):
        out: Tensor = _affine_normal_equations(
            moving, points, values, matrix, degree, derivatives, list(cut)
        )
        return out
    return affine_normal_equations_reference(
        moving, points, values, matrix, degree=degree, derivatives=derivatives, cut=cut
    )


def _check_shapes(moving: Tensor, points: Tensor, values: Tensor, matrix: Tensor) -> None:
    if matrix.ndim != 3 or matrix.shape[1:] != (3, 4):
        raise ShapeError(
            f"affine_normal_equations: matrix has shape {tuple(matrix.shape)}, expected (B, 3, 4)",
            "add the batch axis, and leave out the last row of a 4 x 4 matrix",
        )
    if (
        moving.ndim != 5
        or 0 in moving.shape
        or moving.shape[1] != 1
        or len(moving) not in (1, len(matrix))
    ):
        raise ShapeError(
            f"affine_normal_equations: moving has shape {tuple(moving.shape)}, expected "
            f"(1, 1, D, H, W) or ({len(matrix)}, 1, D, H, W), and no empty axis",
            "give one image for all matrices, or one for each",
        )
    if points.ndim != 2 or len(points) != 3 or values.shape != points.shape[1:]:
        raise ShapeError(
            f"affine_normal_equations: points has shape {tuple(points.shape)} and values "
            f"{tuple(values.shape)}, expected (3, N) and (N,)",
            "give one value for each point",
        )
