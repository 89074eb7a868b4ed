"""``affine_normal_equations`` by its reference: against sums point by point, and bad input."""

import itertools
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import affine_normal_equations, sample_world
from ulae_rt.kernels.affine_normal_equations import reference

Floats = npt.NDArray[np.float64]
IDENTITY = torch.eye(3, 4, dtype=torch.float64)[None]


def matrices(batch: int, shift: float = 1.5) -> Tensor:
    """(B, 3, 4): turned, sheared and scaled, each its own way."""
    linear = torch.eye(3, dtype=torch.float64) + 0.4 * (noise(batch, 3, 3, seed=5) - 0.5)
    offset = 2 * shift * (noise(batch, 3, 1, seed=6) - 0.5)
    return torch.cat((linear, offset), dim=2)


def points_in(sizes: tuple[int, ...], count: int) -> Tensor:
    """(3, N), from one voxel before the first centre to one after the last."""
    return noise(3, count, seed=7) * (torch.tensor(sizes)[:, None] + 1) - 1


def value_and_slopes(volume: Floats, x: Floats) -> tuple[float, list[float]]:
    """At one point, from the weights of the eight voxels around it and their derivatives."""
    sizes = volume.shape
    if not all(-0.5 <= c < size - 0.5 for c, size in zip(x, sizes, strict=True)):
        return 0.0, [0.0] * 3
    held = [min(max(c, 0.0), size - 1.0) for c, size in zip(x, sizes, strict=True)]
    lower = [min(int(c), max(size - 2, 0)) for c, size in zip(held, sizes, strict=True)]
    value, slopes = 0.0, [0.0] * 3
    for corner in itertools.product((0, 1), repeat=3):
        at = tuple(i + up for i, up in zip(lower, corner, strict=True))
        if any(i >= size for i, size in zip(at, sizes, strict=True)):
            continue
        weights = [1 - abs(i - c) for i, c in zip(at, held, strict=True)]
        value += float(np.prod(weights)) * volume[at]
        for axis in range(3):
            if 0 < x[axis] < sizes[axis] - 1:
                others = float(np.prod(weights[:axis] + weights[axis + 1 :]))
                slopes[axis] += (2 * corner[axis] - 1) * others * volume[at]
    return value, slopes


def by_points(
    moving: Tensor, points: Tensor, values: Tensor, matrix: Tensor, *,
    degree: int = 1, derivatives: bool = True, cut: tuple[bool, ...] = (False,) * 6,
) -> Tensor:  # fmt: skip
    """The sums of the products of a column of each point with itself, one point after another."""
    rows = 12 * derivatives + degree + 2
    sums = np.zeros((len(matrix), rows, rows))
    sizes = moving.shape[2:]
    for b, n in itertools.product(range(len(matrix)), range(len(values))):
        p = np.append(points[:, n].numpy(), 1.0)
        x = matrix[b].numpy() @ p
        faces = [beyond for c, size in zip(x, sizes, strict=True)
                 for beyond in (c < -0.5, c >= size - 0.5)]  # fmt: skip
        if any(is_cut and beyond for is_cut, beyond in zip(cut, faces, strict=True)):
            continue
        m, slopes = value_and_slopes(moving[b if len(moving) > 1 else 0, 0].numpy(), x)
        column = [slope * c for slope in slopes for c in p] if derivatives else []
        column += [m**k for k in range(degree + 1)] + [float(values[n])]
        sums[b] += np.outer(column, column)
    return torch.from_numpy(sums)


# One voxel thick along each axis, and along two and three of them.
SIZES = [(4, 5, 6), (1, 3, 5), (3, 1, 4), (3, 4, 1), (3, 1, 1), (1, 1, 1)]
FORMS = [(1, True), (1, False), (2, False), (3, False), (4, False)]
FACES = [
    (False,) * 6, *(tuple(face == n for face in range(6)) for n in range(6)),
    (True, False, False, True, True, True), (True,) * 6,
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("degree", "derivatives"), FORMS)
def test_is_the_sum_over_points(sizes: tuple[int, ...], degree: int, derivatives: bool) -> None:
    points, values, matrix = points_in(sizes, 60), noise(60, seed=8), matrices(2, shift=0.3)
    options: dict[str, Any] = {"degree": degree, "derivatives": derivatives}
    for images in (1, 2):
        moving = noise(images, 1, *sizes) + 0.5
        found = affine_normal_equations(moving, points, values, matrix, **options)
        expected = by_points(moving, points, values, matrix, **options)
        one = 12 * derivatives
        assert (expected[:, one, one + 1] > 3).all()  # points inside
        if derivatives:
            slopes = expected.diagonal(dim1=1, dim2=2)[:, 3:12:4] > 0
            assert slopes.all(dim=0).tolist() == [size > 1 for size in sizes]
        assert_close("sums", found, expected, TOL["op float64"])


@pytest.mark.parametrize("cut", FACES, ids=str)
@pytest.mark.parametrize("derivatives", [False, True])
def test_points_beyond_a_cut_face_do_not_count(cut: tuple[bool, ...], derivatives: bool) -> None:
    sizes = (3, 4, 5)
    moving, points = noise(1, 1, *sizes) + 0.5, 2 * points_in(sizes, 160) - 2
    values, matrix = noise(160, seed=8), matrices(2, shift=0.3)
    options: dict[str, Any] = {"derivatives": derivatives, "cut": cut}
    found = affine_normal_equations(moving, points, values, matrix, **options)
    expected = by_points(moving, points, values, matrix, **options)
    count = expected[:, -3, -3]
    assert (count < 160).all() == any(cut)
    assert (count > 3).all()
    assert_close("sums", found, expected, TOL["op float64"])


@pytest.mark.parametrize("axis", range(3))
def test_border_and_faces_are_half_a_voxel_away(axis: int) -> None:
    """Half a voxel before the first centre belongs to the image, half after the last does not."""
    moving, size = noise(1, 1, 3, 4, 5) + 1, 3 + axis
    x = torch.tensor([-0.75, -0.5, -0.25, 0, 0.25, size - 1, size - 0.75, size - 0.5, size - 0.25])
    points = torch.ones(3, len(x), dtype=torch.float64)
    points[axis] = x
    for n, at in enumerate(x):
        one, value = points[:, n : n + 1], torch.ones(1)
        before = tuple(face == 2 * axis for face in range(6))
        after = tuple(face == 2 * axis + 1 for face in range(6))
        found = affine_normal_equations(moving, one, value, IDENTITY)[0]
        assert (found[13, 13] > 0) == (-0.5 <= at < size - 0.5)
        assert (found[4 * axis + 3, 4 * axis + 3] > 0) == (0 < at < size - 1)
        for cut, beyond in ((before, at < -0.5), (after, at >= size - 0.5)):
            counted = affine_normal_equations(moving, one, value, IDENTITY, cut=cut)[0]
            assert counted[12, 12] == (0 if beyond else 1)


def test_derivatives_are_those_of_the_interpolation() -> None:
    """Of the sums of m, m f and m^2 / 2 by the numbers of the matrix, by central differences."""
    sizes = (6, 7, 8)
    moving, points, matrix = noise(1, 1, *sizes), points_in(sizes, 400), matrices(1)
    at = matrix[0, :, :3] @ points + matrix[0, :, 3:]
    # No step of 1e-5 times a coordinate crosses a cell's face or, half way, the image's border.
    smooth = ((at * 2).frac().abs() - 0.5).abs().max(dim=0).values < 0.45
    points, values = points[:, smooth], noise(400, seed=8)[smooth]
    assert 100 < points.shape[1] < 350
    found = affine_normal_equations(moving, points, values, matrix)[0, :12, 12:]
    step, differences = 1e-5, torch.empty(12, 3, dtype=torch.float64)
    for k in range(12):
        nudge = torch.zeros(12, dtype=torch.float64)
        nudge[k] = step
        after, before = (
            affine_normal_equations(moving, points, values, m, derivatives=False)[0]
            for m in (matrix + nudge.view(1, 3, 4), matrix - nudge.view(1, 3, 4))
        )
        change = (after - before) / (2 * step)
        differences[k] = torch.stack((change[0, 1], change[1, 1] / 2, change[1, 2]))
    assert found.abs().min() > 0.01
    assert_close("derivatives", found, differences, TOL["gram difference quotient"])


# Properties


def test_sums_of_the_image_are_those_of_sample_world() -> None:
    moving, matrix, shape = noise(2, 1, 5, 6, 7), matrices(2), (6, 5, 4)
    grid = torch.cartesian_prod(*map(torch.arange, shape)).T.double()
    fixed = noise(*shape, seed=8)
    found = affine_normal_equations(moving, grid, fixed.flatten(), matrix, derivatives=False)
    sampled = sample_world(moving, matrix, shape=shape).flatten(1)
    expected = torch.stack((sampled.sum(1), sampled.square().sum(1), sampled @ fixed.flatten()), 1)
    assert_close("sums", found[:, 1], expected, TOL["op float64"])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
def test_points_beyond_one_chunk(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", 4)
    moving, points, values = noise(1, 1, 4, 5, 6), points_in((4, 5, 6), count), noise(count, seed=8)
    for cut in FACES[::8]:
        found = affine_normal_equations(moving, points, values, matrices(3), cut=cut)
        expected = by_points(moving, points, values, matrices(3), cut=cut)
        assert_close("sums", found, expected, TOL["op float64"])


def test_symmetric_and_again_the_same_bits() -> None:
    moving, points, values = noise(1, 1, 9, 8, 7), points_in((9, 8, 7), 4000), noise(4000, seed=8)
    for degree, derivatives in FORMS:
        options: dict[str, Any] = {"degree": degree, "derivatives": derivatives}
        found = affine_normal_equations(moving, points, values, matrices(2), **options)
        assert_equal("transposed", found.mT, found)
        again = affine_normal_equations(moving, points, values, matrices(2), **options)
        assert_equal("again", again, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_types_are_interpolated_in_float32(dtype: torch.dtype) -> None:
    moving, points, values = noise(1, 1, 4, 5, 6), points_in((4, 5, 6), 50), noise(50, seed=8)
    found = affine_normal_equations(moving.to(dtype), points, values, matrices(2))
    single = moving.to(dtype).float(), points.float(), values, matrices(2).float()
    assert_equal("float32", found, affine_normal_equations(*single))
    assert found.dtype == torch.float64


@pytest.mark.follows("convert it: {}.float()")
@pytest.mark.parametrize("name", ["moving", "points", "values", "matrix"])
def test_hints_on_types(name: str) -> None:
    given = given_tensors()
    given[name] = given[name].short()
    with pytest.raises(DtypeError, match=f"{name} is torch.int16") as caught:
        affine_normal_equations(**given)
    assert caught.value.hint == f"convert it: {name}.float()"
    given[name] = given[name].float()
    assert affine_normal_equations(**given).shape == (2, 15, 15)


@pytest.mark.follows("call it under torch.no_grad()")
@pytest.mark.parametrize("name", ["moving", "points", "values", "matrix"])
def test_a_gradient_is_refused(name: str) -> None:
    given = given_tensors()
    given[name].requires_grad_()
    message = f"affine_normal_equations: {name} requires a gradient, and this operation has none"
    with pytest.raises(UsageError, match=message) as caught:
        affine_normal_equations(**given)
    assert caught.value.hint == "call it under torch.no_grad()"
    with torch.no_grad():
        assert not affine_normal_equations(**given).requires_grad


@pytest.mark.follows("leave out degree, or give derivatives=False")
def test_hint_on_the_degree() -> None:
    given = given_tensors()
    with pytest.raises(UsageError) as caught:
        affine_normal_equations(**given, degree=2)
    assert caught.value.hint == "leave out degree, or give derivatives=False"
    assert affine_normal_equations(**given).any()
    assert affine_normal_equations(**given, degree=2, derivatives=False).any()


def given_tensors() -> dict[str, Tensor]:
    return {
        "moving": noise(2, 1, 3, 4, 5), "points": points_in((3, 4, 5), 7),
        "values": noise(7, seed=8), "matrix": matrices(2),
    }  # fmt: skip


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"moving": noise(3, 4, 5)}, ShapeError,
        "moving has shape (3, 4, 5), expected (1, 1, D, H, W) or (2, 1, D, H, W), and no empty",
    ),
    ({"moving": noise(2, 2, 3, 4, 5)}, ShapeError, "moving has shape (2, 2, 3, 4, 5), expected (1"),
    ({"moving": noise(3, 1, 3, 4, 5)}, ShapeError, "moving has shape (3, 1, 3, 4, 5), expected (1"),
    ({"moving": noise(2, 1, 0, 4, 5)}, ShapeError, "moving has shape (2, 1, 0, 4, 5), expected (1"),
    ({"moving": noise(2, 1, 3, 4, 5).int()}, DtypeError, "moving is torch.int32, expected a float"),
    (
        {"moving": noise(2, 1, 3, 4, 5).cfloat()}, DtypeError,
        "moving is torch.complex64, expected a floating type",
    ),
    ({"points": noise(7, 3)}, ShapeError, "points has shape (7, 3) and values (7,), expected (3,"),
    ({"points": noise(3)}, ShapeError, "points has shape (3,) and values (7,), expected (3, N) an"),
    ({"points": noise(3, 7).half()}, DtypeError, "points is torch.float16, expected float32 or fl"),
    ({"points": noise(3, 7).to("meta")}, ShapeError, "points is on meta, expected cpu as moving"),
    ({"values": noise(6)}, ShapeError, "points has shape (3, 7) and values (6,), expected (3, N)"),
    ({"values": noise(1, 7)}, ShapeError, "points has shape (3, 7) and values (1, 7), expected (3"),
    ({"values": noise(7).half()}, DtypeError, "values is torch.float16, expected float32 or float"),
    ({"values": noise(7).to("meta")}, ShapeError, "values is on meta, expected cpu as moving"),
    ({"matrix": noise(2, 4, 4)}, ShapeError, "matrix has shape (2, 4, 4), expected (B, 3, 4)"),
    ({"matrix": noise(3, 4)}, ShapeError, "matrix has shape (3, 4), expected (B, 3, 4)"),
    ({"matrix": matrices(2).half()}, DtypeError, "matrix is torch.float16, expected float32 or fl"),
    ({"matrix": matrices(2).to("meta")}, ShapeError, "matrix is on meta, expected cpu as moving"),
    ({"degree": 0}, UsageError, "degree is 0, expected 1 with derivatives"),
    ({"degree": 2}, UsageError, "degree is 2, expected 1 with derivatives"),
    ({"degree": True}, UsageError, "degree is True, expected 1 with derivatives"),
    ({"degree": 5, "derivatives": False}, UsageError, "degree is 5, expected 1 to 4"),
    ({"degree": 2.0, "derivatives": False}, UsageError, "degree is 2.0, expected 1 to 4"),
    ({"cut": (True,) * 5}, UsageError, "cut is (True, True, True, True, True), expected six of Tr"),
    ({"cut": (1, 0, 0, 0, 0, 0)}, UsageError, "cut is (1, 0, 0, 0, 0, 0), expected six of True an"),
    ({"cut": True}, UsageError, "cut is True, expected six of True and False"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"affine_normal_equations: {message}")):
        affine_normal_equations(**{**given_tensors(), **changes})
