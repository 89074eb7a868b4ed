"""From the network's displacement to millimetres on the fixed image, and through it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import ShapeError
from ulae_rt.imaging.grid import (
    Affine,
    Grid,
    Interpolation,
    from_sitk,
    gap_mm,
    reference,
    to_sitk,
)
from ulae_rt.imaging.nifti import Volume
from ulae_rt.reports import Refinement

Displacement = NDArray[np.float32]

# RAS to LPS and back, by component.
LPS_SIGNS = np.array([-1, -1, 1], np.float32)
# A fixed image whose axes stray by less than this from the grid's, in voxels, end to end, is
# on it: the rounding of a header.
ALIGNED = 1e-3
# Planes at a time, so that nine derivatives of the whole field are never held at once.
SLAB = 16


@dataclass(frozen=True)
class Deformation:
    """The whole way from a fixed point to its moving point.

        moving(x) = A (x + u_mm(x)),    u_mm(x) = M u(G^-1 x)

    with A the affine, u the network's displacement, G the working grid's affine and M its upper
    left 3 x 3. u is interpolated linearly and clamped to its edge values outside the grid.

    Attributes:
        disp: (3, D, H, W) float32, voxels of ``grid``, component i along axis i.
        grid: the working grid ``disp`` lies on.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        refinement: None where there was none.
    """

    disp: NDArray[np.float32]
    grid: Grid
    affine: Affine
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        if self.disp.shape != (3, *self.grid.shape):
            raise ShapeError(
                f"disp is {self.disp.shape}, expected {(3, *self.grid.shape)}: 3 components on "
                "the working grid",
                "give the network's output for one pair, without its batch axis",
            )

    def network_part(self, fixed: Grid) -> Displacement:
        """u_mm at every voxel of ``fixed``: (X, Y, Z, 3) float32, RAS mm, without the affine."""
        u_mm = np.tensordot(self.grid.affine[:3, :3].astype(np.float32), self.disp, 1)
        return _sample_clamped(u_mm, self.grid, fixed)

    def sample(self, fixed: Grid) -> Displacement:
        """moving(x) - x at every voxel of ``fixed``: (X, Y, Z, 3) float32, RAS mm."""
        return add_affine(self.network_part(fixed), fixed, self.affine)


def add_affine(network_part: Displacement, fixed: Grid, affine: Affine) -> Displacement:
    """A (x + u) - x for ``network_part`` u (X, Y, Z, 3) on ``fixed``, RAS mm, in a new array."""
    if np.array_equal(affine, np.eye(4)):
        return network_part
    linear = affine[:3, :3].astype(np.float32)
    # (A - I) x in float64 a plane at a time: world coordinates of 300 mm leave float32 too little
    from_index = (affine - np.eye(4)) @ fixed.affine
    i, j, k = (np.arange(n, dtype=np.float64) for n in fixed.shape)
    total = np.empty_like(network_part)
    for plane in range(fixed.shape[2]):
        moved = network_part[:, :, plane] @ linear.T
        for row in range(3):
            a, b, c, d = from_index[row]
            moved[..., row] += (a * i)[:, None] + (b * j + (c * k[plane] + d))[None, :]
        total[:, :, plane] = moved
    return total


def resample_displacement(disp: Displacement, grid: Grid, to: Grid) -> Displacement:
    """``disp`` (X, Y, Z, 3) on ``grid`` at the voxels of ``to``: linear, clamped to its edges.

    Its own numbers where the two grids are one.
    """
    if grid.shape == to.shape and gap_mm(grid, to) == 0:
        return disp
    return _sample_clamped(disp.transpose(3, 0, 1, 2), grid, to)


def _sample_clamped(field: NDArray[np.float32], grid: Grid, fixed: Grid) -> Displacement:
    """``field`` (3, D, H, W) on ``grid`` at the voxels of ``fixed``, clamped to its edges."""
    step = np.linalg.inv(grid.affine) @ fixed.affine
    along = np.abs(step[:3, :3]).argmax(axis=1)
    rest = step[:3, :3].copy()
    rest[np.arange(3), along] = 0
    reach = float((np.abs(rest) @ np.array(fixed.shape)).max())
    if sorted(along) == [0, 1, 2] and reach < ALIGNED:
        return _sample_separably(field, step, along, fixed.shape)
    # ITK has no clamping for vectors: the outermost layer is repeated as far out as the fixed
    # image reaches instead.
    corners = np.array(np.meshgrid(*([0, n - 1] for n in fixed.shape))).reshape(3, -1)
    index = step[:3, :3] @ corners + step[:3, 3:]
    last = np.array(grid.shape) - 1
    before = np.ceil(np.maximum(0, -index.min(axis=1))).astype(int)
    after = np.ceil(np.maximum(0, index.max(axis=1) - last)).astype(int)
    image = sitk.ZeroFluxNeumannPad(
        to_sitk(field.transpose(1, 2, 3, 0), grid.affine), before.tolist(), after.tolist()
    )
    sampled = sitk.Resample(image, reference(fixed), sitk.Transform(), sitk.sitkLinear)
    return np.asarray(from_sitk(sampled), np.float32)


def _sample_separably(
    field: NDArray[np.float32], step: Affine, along: NDArray[np.intp], shape: tuple[int, int, int]
) -> Displacement:
    """`_sample_clamped` where each axis of the grid runs along one axis of the fixed image.

    One axis after the other, which for the usual 1 mm image is copying: several times faster
    than a general resampling.
    """
    # The axis that loses most voxels first, the one that gains most last.
    for axis in np.argsort([shape[along[a]] / field.shape[a + 1] for a in range(3)]):
        column, last = along[axis], field.shape[axis + 1] - 1
        at = step[axis, column] * np.arange(shape[column]) + step[axis, 3]
        nearest = np.rint(at)
        at = np.clip(np.where(np.abs(at - nearest) < ALIGNED, nearest, at), 0, last)
        below = at.astype(int)
        weight = (at - below).astype(np.float32)
        values = field.take(below, axis=axis + 1)
        if weight.any():
            above = field.take(np.minimum(below + 1, last), axis=axis + 1)
            above -= values
            above *= weight[(slice(None), *[None] * (2 - axis))]
            values += above
        field = values
    # Components last and the first axis fastest, as ITK and NIfTI keep it.
    out = np.empty((*shape[::-1], 3), np.float32).transpose(2, 1, 0, 3)
    order = np.argsort(along)
    for component in range(3):
        out[..., component] = field[component].transpose(order)
    return out


def warp_image(
    moving: Volume, disp: Displacement, fixed: Grid, interp: Interpolation = "linear"
) -> NDArray[Any]:
    """Sample ``moving`` where the whole displacement points: its one and only interpolation.

        out(x) = moving(x + disp(x)),    0 outside moving

    Done by ITK from the very numbers that the warp file holds, so that ITK's tools reading the
    file find the same image.

    Args:
        moving: in its own space.
        disp: (X, Y, Z, 3) float32, RAS mm, on ``fixed``.
        fixed: the grid of the result.
        interp: ``linear`` gives float32, ``nearest`` keeps the type (labels).

    Returns:
        (X, Y, Z).
    """
    image = to_sitk(moving.data, moving.affine)
    if interp == "linear":
        image = sitk.Cast(image, sitk.sitkFloat32)
    field = to_sitk(disp * LPS_SIGNS, fixed.affine)
    method = sitk.sitkLinear if interp == "linear" else sitk.sitkNearestNeighbor
    warper = sitk.WarpImageFilter()
    warper.SetInterpolator(method)
    warper.SetOutputParameteresFromImage(field)
    return np.asarray(from_sitk(warper.Execute(image, field)))


def jacobian_determinant(disp: Displacement, affine: Affine) -> NDArray[np.float32]:
    """Local change of volume of x -> x + disp(x): 1 none, below 1 the moving image is expanded.

        det(I + d disp / d x) = det(S + d disp / d i) / det S

    with S the grid's 3 x 3 and i the voxel index: central differences inside, one-sided on the
    faces, right for oblique, anisotropic and flipped grids.

    Args:
        disp: (X, Y, Z, 3), RAS mm.
        affine: (4, 4) of its grid, voxel index to RAS mm.

    Returns:
        (X, Y, Z) float32; 0 or less where the deformation folds.
    """
    if min(disp.shape[:3]) < 2:
        raise ShapeError(
            f"disp is {disp.shape}, expected at least 2 voxels along each axis", "give a volume"
        )
    step = affine[:3, :3].astype(np.float32)
    scale = np.float32(1 / np.linalg.det(affine[:3, :3]))
    out = np.empty(disp.shape[2::-1], np.float32).transpose(2, 1, 0)
    planes = disp.shape[2]
    for first in range(0, planes, SLAB):
        stop = min(first + SLAB, planes)
        low, high = max(first - 1, 0), min(stop + 1, planes)
        slab = np.ascontiguousarray(disp[:, :, low:high].transpose(3, 2, 1, 0))
        keep = slice(first - low, stop - low)
        m = [
            [
                np.gradient(slab[row], axis=2 - column)[keep] + step[row, column]
                for column in range(3)
            ]
            for row in range(3)
        ]
        det = m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
        det -= m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        det += m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
        out[:, :, first:stop] = (det * scale).transpose(2, 1, 0)
    return out


@dataclass(frozen=True)
class Folding:
    """Percent of voxels whose Jacobian determinant is 0 or less."""

    image_percent: float
    brain_percent: float


def folding(jacobian: NDArray[np.float32], brain: NDArray[np.bool_]) -> Folding:
    """Folded voxels, in percent of the whole image and of the ``brain`` mask."""
    folded = jacobian <= 0
    inside = int(np.count_nonzero(brain))
    return Folding(
        100 * float(folded.mean()),
        100 * float(np.count_nonzero(folded & brain)) / max(inside, 1),
    )
