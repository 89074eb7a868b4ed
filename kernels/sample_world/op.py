"""The public ``sample_world`` and the operator behind it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import _launch
from ulae_rt.kernels._check import (
    check_choice,
    check_displacement,
    check_factor,
    check_matrix,
    check_no_gradient,
    check_sizes,
)
from ulae_rt.kernels.sample_world.reference import sample_world_reference

MODES = ("linear", "nearest")


@torch.library.custom_op("ulae_rt::sample_world", mutates_args=())
def _sample_world(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None,
    disp_matrix: Tensor | None,
    shape: Sequence[int],
    mode: str,
    factor: int,
) -> Tensor:
    _launch.check_available(image)
    from ulae_rt.kernels.sample_world import kernel

    depth, height, width = shape
    return kernel.launch_forward(
        image, matrix, disp, disp_matrix,
        shape=(depth, height, width), mode=mode, factor=factor,
    )  # fmt: skip


@_sample_world.register_fake
def _(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None,
    disp_matrix: Tensor | None,
    shape: Sequence[int],
    mode: str,
    factor: int,
) -> Tensor:
    return image.new_empty((matrix.shape[0], image.shape[1], *shape))


def sample_world(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None = None,
    *,
    disp_matrix: Tensor | None = None,
    shape: Sequence[int] | None = None,
    mode: str = "linear",
    factor: int = 1,
) -> Tensor:
    """An image of any size, through a matrix and a displacement, on another grid.

        out[b, c, p] = image[b, c] at M[b] (p + u[b](p))
        out[b, c, p] = image[b, c] at M[b] p + N[b] u[b](p)    with ``disp_matrix`` N

    In one interpolation. The border is ITK's, which reads the warps: half a voxel around the
    outermost centres still belongs to the image and has the value of the nearest of them; beyond
    is 0. There is no gradient.

    Args:
        image: (B, C, D, H, W), or (1, C, D, H, W) for all B matrices; of any floating type, for
            ``nearest`` of any integer type too.
        matrix: (B, 3, 4), float32 or float64: from voxels (d, h, w) of the output's grid to voxels
            of the image. A NaN samples nothing: 0.
        disp: (B, 3, D' / factor, H' / factor, W' / factor), its own voxels, components in
            (d, h, w) order, any floating type; None for none. With ``disp_matrix`` in whatever
            units and axes that takes.
        disp_matrix: (B, 3, 3), float32 or float64: from the displacement to voxels of the image,
            for one in mm the inverse of the image's voxel-to-mm matrix; only with ``factor`` 1.
            None: the first three columns of ``matrix``.
        shape: (D', H', W') of the output; None for the image's.
        mode: ``linear``, or ``nearest`` for label maps, whose type and values stay; a half goes up.
        factor: ``disp`` is first brought to the output's grid as by
            :func:`ulae_rt.kernels.resize_displacement`.

    Returns:
        (B, C, D', H', W') in ``image``'s type; the kernel computes in float32, or float64 when an
        input other than a matrix is, the reference in float64.

    Raises:
        ShapeError: if a shape is none of the above, or the tensors are not on one device.
        DtypeError: if a type is not.
        UsageError: for another ``mode`` or ``factor``, for a ``disp_matrix`` without ``disp`` or
            with another factor than 1, or if a gradient would be needed.
    """
    check_choice("sample_world", "mode", mode, MODES)
    check_factor("sample_world", factor)
    if image.ndim != 5 or 0 in image.shape:
        raise ShapeError(
            f"sample_world: image has shape {tuple(image.shape)}, expected (B, C, D, H, W) and no "
            "empty axis",
            "add the batch and channel axes",
        )
    integral = mode == "nearest" and not image.is_complex() and image.dtype != torch.bool
    if not (image.is_floating_point() or integral):
        raise DtypeError(
            f"sample_world: image is {image.dtype}, expected a floating type, or an integer one "
            "for mode 'nearest'",
            "convert it: image.float()",
        )
    if matrix.ndim != 3 or matrix.shape[1:] != (3, 4) or len(image) not in (1, len(matrix)):
        raise ShapeError(
            f"sample_world: matrix has shape {tuple(matrix.shape)}, expected (B, 3, 4) for "
            f"{len(image)} images",
            "give one matrix for each image, or one image for all; leave out the last row",
        )
    # What the matrices and the displacement are of, without memory.
    images = image.expand(len(matrix), -1, -1, -1, -1)
    check_matrix("sample_world", "matrix", matrix, 4, images)
    sizes = check_sizes("sample_world", image.shape[2:] if shape is None else shape)
    if disp is not None:
        output = torch.empty((), device=image.device).expand(len(matrix), 1, *sizes)
        check_displacement("sample_world", "disp", disp, like=output, factor=factor)
    if disp_matrix is not None:
        if disp is None:
            raise UsageError(
                "sample_world: disp_matrix is given and disp is None, expected both",
                "give the displacement that the matrix is for, or leave the matrix out",
            )
        if factor != 1:
            raise UsageError(
                f"sample_world: factor is {factor}, expected 1 with disp_matrix: a factor scales a "
                "displacement in voxels",
                "resample the displacement to the output's grid first",
            )
        check_matrix("sample_world", "disp_matrix", disp_matrix, 3, images)
    check_no_gradient(
        "sample_world", image=image, matrix=matrix, disp=disp, disp_matrix=disp_matrix
    )
    if _launch.uses_triton(image):
        out: Tensor = _sample_world(image, matrix, disp, disp_matrix, sizes, mode, factor)
        return out
    return sample_world_reference(
        image, matrix, disp, disp_matrix, shape=sizes, mode=mode, factor=factor
    )
