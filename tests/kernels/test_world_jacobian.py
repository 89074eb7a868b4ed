"""``world_jacobian`` by its reference: against numpy's gradient, today's code, closed forms."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import world_jacobian

FLOAT64 = torch.float64


def oblique(batch: int) -> Tensor:
    """(B, 3, 3): anisotropic, turned, of either handedness."""
    matrix = torch.tensor([[0.9, 0.2, -0.3], [-0.1, 1.4, 0.4], [0.2, -0.3, 2.2]], dtype=FLOAT64)
    matrix = matrix + 0.2 * (noise(batch, 3, 3, seed=5) - 0.5)
    matrix[1::2] = matrix[1::2].flip(2)
    return matrix


def by_numpy(disp: Tensor, matrix: Tensor) -> Tensor:
    """numpy.gradient and numpy.linalg.det, voxel by voxel."""
    found = []
    for field, step in zip(disp.double().numpy(), matrix.double().numpy(), strict=True):
        slopes = np.stack([np.stack(np.gradient(component)) for component in field])
        whole = np.moveaxis(slopes, (0, 1), (-2, -1)) + step
        found.append(np.linalg.det(whole) / np.linalg.det(step))
    return torch.from_numpy(np.stack(found)[:, None])


@pytest.mark.parametrize(
    "sizes", [(6, 5, 7), (2, 3, 9), (11, 2, 2), (2, 2, 2), (5, 13, 3)], ids=str
)
@pytest.mark.parametrize("batch", [1, 3])
def test_is_numpys_gradient(batch: int, sizes: tuple[int, ...]) -> None:
    disp, matrix = noise(batch, 3, *sizes), oblique(batch)
    found, expected = world_jacobian(disp, matrix), by_numpy(disp, matrix)
    assert expected.min() < 0.7 < 1.1 < expected.max()
    assert found.shape == (batch, 1, *sizes)
    assert_close("values", found, expected, TOL["op float64"])


@pytest.mark.parametrize("sizes", [(6, 5, 7), (19, 12, 21)], ids=str)
def test_is_the_determinant_of_numpy_s_gradients(sizes: tuple[int, ...]) -> None:
    disp, matrix = noise(1, 3, *sizes).float(), oblique(1)
    steps = matrix[0].numpy()
    slopes = np.stack([np.stack(np.gradient(row)) for row in disp[0].double().numpy()])
    moved = np.moveaxis(slopes, (0, 1), (-2, -1)) + steps
    expected = torch.from_numpy(np.linalg.det(moved) / np.linalg.det(steps)).float()
    found = world_jacobian(disp, matrix)
    assert found.dtype == torch.float32
    assert_close("values", found[0, 0], expected, TOL["jacobian float32"])


# Properties


@pytest.mark.parametrize("sizes", [(4, 5, 6), (2, 2, 2)], ids=str)
def test_a_matrix_has_its_own_determinant_everywhere(sizes: tuple[int, ...]) -> None:
    """x -> A x, on the faces too; a reflection folds."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=FLOAT64) for size in sizes), indexing="ij")
    matrix = oblique(2)
    x = torch.einsum("bci,idhw->bcdhw", matrix, torch.stack(axes))
    for affine in (torch.diag(torch.tensor([1.0, -1.0, 0.5])), torch.eye(3), noise(3, 3, seed=2)):
        affine = affine.double()
        disp = torch.einsum("ce,bedhw->bcdhw", affine - torch.eye(3), x)
        expected = torch.linalg.det(affine).expand(2, 1, *sizes)
        assert_close("determinant", world_jacobian(disp, matrix), expected, TOL["op float64"])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_it_does_not_depend_on_how_the_axes_are_stored(order: tuple[int, ...]) -> None:
    """The same field in another order of axes, and one of them from its other end."""
    disp, matrix = noise(2, 3, 6, 5, 7), oblique(2)
    expected = world_jacobian(disp, matrix).permute(0, 1, *(2 + axis for axis in order)).flip(3)
    stored = disp.permute(0, 1, *(2 + axis for axis in order)).flip(3)
    columns = matrix[:, :, list(order)] * torch.tensor([1, -1, 1])
    assert_close("values", world_jacobian(stored, columns), expected, TOL["op float64"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("component", range(3))
def test_no_number_gives_no_number(component: int, value: float) -> None:
    """There, though no difference reads the voxel itself, and at its neighbours."""
    disp, matrix = noise(2, 3, 9, 5, 7), oblique(2)
    good = world_jacobian(disp, matrix)
    for at in ((4, 2, 3), (0, 4, 0), (8, 0, 6), (3, 2, 5)):
        bad = disp.clone()
        bad[(1, component, *at)] = value
        found = world_jacobian(bad, matrix)
        distance = sum((axis - i).abs() for axis, i in zip(places(disp), at, strict=True))
        expected = torch.zeros(good.shape, dtype=torch.bool)
        expected[1, 0] = distance <= 1
        assert_equal(f"{at}", ~found.isfinite(), expected)
        assert_equal("others", found[~expected], good[~expected])


def places(disp: Tensor) -> tuple[Tensor, ...]:
    """The three indices of each voxel."""
    return torch.meshgrid(*map(torch.arange, disp.shape[2:]), indexing="ij")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    disp, matrix = noise(2, 3, 6, 5, 7).to(dtype), oblique(2)
    assert_equal("values", world_jacobian(disp, matrix), world_jacobian(disp.float(), matrix))


def test_memory_layouts() -> None:
    disp, matrix = noise(2, 3, 6, 5, 7), oblique(2)
    found = world_jacobian(disp.mT.contiguous().mT, matrix.mT.contiguous().mT)
    assert_close("permuted", found, world_jacobian(disp, matrix), TOL["op float64"])
    assert found.is_contiguous()
    assert_equal("float32", world_jacobian(disp, matrix.float()),
                 world_jacobian(disp, matrix.float().double()))  # fmt: skip


@pytest.mark.parametrize("name", ["disp", "matrix"])
def test_a_gradient_is_refused(name: str) -> None:
    given = {"disp": noise(1, 3, 3, 4, 5), "matrix": oblique(1)}
    given[name].requires_grad_()
    message = f"world_jacobian: {name} requires a gradient, and this operation has none"
    with pytest.raises(UsageError, match=message):
        world_jacobian(**given)
    with torch.no_grad():
        assert not world_jacobian(**given).requires_grad


def singular(*rows: list[float]) -> Tensor:
    """Two matrices, the second as given."""
    return torch.stack((torch.eye(3, dtype=FLOAT64), torch.tensor(rows, dtype=FLOAT64)))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"disp": torch.zeros(3, 4, 5)}, ShapeError, "disp has shape (3, 4, 5), expected (B, C, D,"),
    (
        {"disp": torch.zeros(2, 1, 3, 4, 5)}, ShapeError,
        "disp has shape (2, 1, 3, 4, 5), expected (2, 3, 3, 4, 5)",
    ),
    (
        {"disp": torch.zeros(2, 3, 3, 1, 5)}, ShapeError,
        "disp has shape (2, 3, 3, 1, 5), expected at least 2 voxels along each axis",
    ),
    ({"disp": torch.zeros(2, 3, 3, 4, 5).int()}, DtypeError, "disp is torch.int32, expected a flo"),
    ({"matrix": oblique(1)}, ShapeError, "matrix has shape (1, 3, 3), expected (2, 3, 3)"),
    ({"matrix": torch.eye(4)[None]}, ShapeError, "matrix has shape (1, 4, 4), expected (2, 3, 3)"),
    ({"matrix": oblique(2).half()}, DtypeError, "matrix is torch.float16, expected float32 or"),
    ({"matrix": oblique(2).to("meta")}, ShapeError, "matrix is on meta, expected cpu"),
    (
        {"matrix": singular([1, 0, 0], [0, 2, 0], [0, 0, 0])}, UsageError,
        "matrix 1 is singular: its determinant is 0, expected a voxel's volume, up to 0 mm^3 for",
    ),
    (
        {"matrix": singular([1e3, 0, 1e3], [0, 2e3, 0], [1e3, 0, 1e3 + 1e-5])}, UsageError,
        "matrix 1 is singular: its determinant is 20, expected a voxel's volume, up to 4e+09 mm^3",
    ),
    (
        {"matrix": singular([1, 0, 0], [0, torch.nan, 0], [0, 0, 1])}, UsageError,
        "matrix 1 is singular: its determinant is nan, expected a voxel's volume, up to nan",
    ),
    (
        {"matrix": singular([1, 0, 0], [0, torch.inf, 0], [0, 0, 1])}, UsageError,
        "matrix 1 is singular: its determinant is",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[each[2] for each in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"disp": noise(2, 3, 3, 4, 5), "matrix": oblique(2)}
    with pytest.raises(error, match=re.escape(f"world_jacobian: {message}")):
        world_jacobian(**{**arguments, **changes})


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_small_voxels_are_not_singular(scale: float) -> None:
    disp, matrix = noise(2, 3, 4, 5, 6), oblique(2)
    found = world_jacobian(scale * disp, scale * matrix)
    assert_close("values", found, world_jacobian(disp, matrix), TOL["op float64"])
