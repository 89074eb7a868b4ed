"""From the network's displacement to millimetres on the fixed image, and through it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.errors import ShapeError
from ulae_rt.imaging.grid import Affine, Displacement, Grid, Interpolation, gap_mm
from ulae_rt.imaging.image import Image, file_order, matrix_between
from ulae_rt.imaging.transfers import to_device, to_host
from ulae_rt.kernels.sample_world.op import sample_world
from ulae_rt.kernels.world_displacement.op import world_displacement
from ulae_rt.kernels.world_jacobian.op import world_jacobian
from ulae_rt.reports import Refinement


@dataclass(frozen=True)
class Deformation:
    """The whole way from a fixed point to its moving point.

        moving(x) = A (x + u_mm(x)),    u_mm(x) = M u(G^-1 x)

    with A the affine, u the network's displacement, G the working grid's affine and M its upper
    left 3 x 3. u is interpolated linearly and clamped to its edge values outside the grid.

    Attributes:
        disp: (1, 3, D, H, W) float32, voxels of ``grid``, component i along axis i.
        grid: the working grid ``disp`` lies on.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        refinement: None where there was none.
    """

    disp: Tensor
    grid: Grid
    affine: Affine
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        if self.disp.shape != (1, 3, *self.grid.shape):
            raise ShapeError(
                f"disp is {tuple(self.disp.shape)}, expected {(1, 3, *self.grid.shape)}: 3 "
                "components on the working grid",
                "give the network's output for one pair",
            )

    def network_part(self, fixed: Grid) -> Tensor:
        """u_mm at every voxel of ``fixed``: (1, 3, D, H, W) float32, RAS mm, without the affine."""
        return on_grid(self.disp, self.grid, fixed, self.grid.affine)

    def sample(self, fixed: Grid) -> Tensor:
        """moving(x) - x at every voxel of ``fixed``: (1, 3, D, H, W) float32, RAS mm."""
        return on_grid(self.disp, self.grid, fixed, self.affine @ self.grid.affine, self.affine)


def on_grid(
    disp: Tensor,
    grid: Grid,
    fixed: Grid,
    linear: Affine,
    affine: Affine | None = None,
) -> Tensor:
    """A displacement sampled on another grid, clamped to its edges, with an affine after it.

        out(x) = L u(x) + (A - I) x

    Args:
        disp: u, (1, 3, D, H, W) on ``grid``.
        grid: where it lies.
        fixed: where it is wanted.
        linear: (4, 4), whose upper left 3 x 3 is L, and takes u to the units that are wanted.
        affine: A, (4, 4), RAS mm to RAS mm; the identity by default.

    Returns:
        (1, 3, *fixed.shape) float32; RAS mm where there is an affine.
    """
    offset = np.zeros((4, 4)) if affine is None else (affine - np.eye(4)) @ fixed.affine
    to_field = np.linalg.inv(grid.affine) @ fixed.affine
    matrices = (
        torch.from_numpy(matrix[None]).to(disp.device)
        for matrix in (to_field[:3], linear[:3, :3], offset[:3])
    )
    return world_displacement(disp, *matrices, shape=fixed.shape)


def add_affine(disp: Tensor, fixed: Grid, affine: Affine) -> Tensor:
    """A (x + u) - x for a displacement u in RAS mm, (1, 3, D, H, W) on ``fixed``; a new tensor."""
    return on_grid(disp, fixed, fixed, affine, affine)


def in_mm(disp: Displacement, device: str | torch.device = "cpu") -> Tensor:
    """(X, Y, Z, 3) RAS mm to (1, 3, Z, Y, X) on a device, in the order of a file's memory."""
    return to_device(disp.transpose(3, 2, 1, 0), device)[None]


def as_displacement(disp: Tensor) -> Displacement:
    """(1, 3, Z, Y, X) RAS mm on any device to (X, Y, Z, 3), as NIfTI has it."""
    return to_host(disp[0]).transpose(3, 2, 1, 0)


def resample_displacement(disp: Displacement, grid: Grid, to: Grid) -> Displacement:
    """``disp`` (X, Y, Z, 3) on ``grid`` at the voxels of ``to``: linear, clamped to its edges.

    Its own numbers where the two grids are one.
    """
    if grid.shape == to.shape and gap_mm(grid, to) == 0:
        return disp
    return as_displacement(on_grid(in_mm(disp), file_order(grid), file_order(to), np.eye(4)))


def warp_image(
    moving: Image, disp: Tensor, fixed: Grid, interp: Interpolation = "linear"
) -> Tensor:
    """Sample ``moving`` where the whole displacement points: its one and only interpolation.

        out(x) = moving(x + disp(x)),    0 outside moving

    From the very numbers that the warp file holds and by ITK's rule for the border, so that ITK's
    tools reading the file find the same image.

    Args:
        moving: in its own space.
        disp: (1, 3, D, H, W) float32, RAS mm, on ``fixed``.
        fixed: the grid of the result.
        interp: ``linear``, or ``nearest`` for labels.

    Returns:
        (1, 1, D, H, W) in the type of ``moving``.
    """
    to_index = torch.from_numpy(np.linalg.inv(moving.affine[:3, :3])[None]).to(disp.device)
    return sample_world(
        moving.voxels,
        matrix_between(moving.affine, fixed, None, disp.device),
        disp,
        disp_matrix=to_index,
        shape=fixed.shape,
        mode=interp,
    )


def jacobian_determinant(disp: Tensor, affine: Affine) -> Tensor:
    """Local change of volume of x -> x + disp(x): 1 none, below 1 the moving image is expanded.

        det(I + d disp / d x) = det(S + d disp / d i) / det S

    with S the grid's 3 x 3 and i the voxel index: central differences inside, one-sided on the
    faces, right for oblique, anisotropic and flipped grids.

    Args:
        disp: (1, 3, D, H, W), RAS mm.
        affine: (4, 4) of its grid, voxel index to RAS mm.

    Returns:
        (1, 1, D, H, W) float32; 0 or less where the deformation folds.
    """
    step = torch.from_numpy(affine[None, :3, :3]).to(disp.device)
    return world_jacobian(disp, step)


@dataclass(frozen=True)
class Folding:
    """Percent of voxels whose Jacobian determinant is 0 or less."""

    image_percent: float
    brain_percent: float


def folding(jacobian: Tensor, brain: Tensor) -> Folding:
    """Folded voxels, in percent of the whole image and of the ``brain`` mask of its shape."""
    folded = jacobian <= 0
    counts = torch.stack([torch.count_nonzero(m) for m in (folded, folded & brain, brain)]).tolist()
    return Folding(100 * counts[0] / folded.numel(), 100 * counts[1] / max(counts[2], 1))


class Field:
    """A displacement that can be asked for anywhere, clamped to its edges.

    Args:
        disp: (1, 3, D, H, W), any units.
    """

    def __init__(self, disp: Tensor) -> None:
        self._disp = disp.double()
        sizes = torch.tensor(disp.shape[2:], dtype=torch.float64, device=disp.device)
        # From voxels to grid_sample's units, in which the outermost voxels end at -1 and 1.
        self._scale, self._shift = 2 / sizes, 1 / sizes - 1

    def __call__(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values (N, 3) at ``points`` (N, 3), voxels (d, h, w)."""
        at = torch.from_numpy(points).to(self._disp.device) * self._scale + self._shift
        values = F.grid_sample(
            self._disp, at.flip(-1)[None, :, None, None], padding_mode="border", align_corners=False
        )
        return np.asarray(values[0, :, :, 0, 0].t().cpu().numpy())
