"""``sample_world`` by its reference: against ITK, against sums over voxels, and bad input."""

import itertools
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import resize_displacement, sample_world, warp

IDENTITY = torch.eye(3, 4, dtype=torch.float64)[None]


def matrices(batch: int, shift: float = 1.5) -> Tensor:
    """(B, 3, 4): turned, sheared and scaled, each its own way."""
    linear = torch.eye(3, dtype=torch.float64) + 0.4 * (noise(batch, 3, 3, seed=5) - 0.5)
    offset = 2 * shift * (noise(batch, 3, 1, seed=6) - 0.5)
    return torch.cat((linear, offset), dim=2)


def by_voxels(
    image: Tensor,
    matrix: Tensor,
    disp: Tensor | None,
    shape: tuple[int, int, int],
    disp_matrix: Tensor | None = None,
) -> npt.NDArray[np.float64]:
    """Point by point, the eight voxels around it: clamped to the border, 0 beyond half a voxel."""
    steps = matrix[:, :, :3] if disp_matrix is None else disp_matrix
    sizes = image.shape[2:]
    out = np.zeros((len(matrix), image.shape[1], *shape))
    for b, *p in itertools.product(range(len(matrix)), *map(range, shape)):
        u = np.zeros(3) if disp is None else disp[(b, slice(None), *p)].numpy()
        x = matrix[b].numpy() @ np.append(p, 1.0) + steps[b].numpy() @ u
        if not all(-0.5 <= value < size - 0.5 for value, size in zip(x, sizes, strict=True)):
            continue
        x = [min(max(value, 0.0), size - 1) for value, size in zip(x, sizes, strict=True)]
        lower = [min(int(value), max(size - 2, 0)) for value, size in zip(x, sizes, strict=True)]
        for corner in itertools.product((0, 1), repeat=3):
            at = [i + up for i, up in zip(lower, corner, strict=True)]
            weight = np.prod([1 - abs(a - value) for a, value in zip(at, x, strict=True)])
            if weight > 0:
                volume = image[b if len(image) > 1 else 0].numpy()
                out[(b, slice(None), *p)] += weight * volume[(slice(None), *at)]
    return out


@pytest.mark.parametrize("sizes", [(4, 5, 6), (1, 3, 5), (3, 1, 1)], ids=str)
@pytest.mark.parametrize(("batch", "images"), [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("displaced", ["not", "in voxels", "in mm"])
def test_is_the_mean_of_the_voxels_around(
    sizes: tuple[int, ...], batch: int, images: int, displaced: str
) -> None:
    image, shape = noise(images, 2, *sizes), (5, 3, 4)
    disp = None if displaced == "not" else 2 * noise(batch, 3, *shape, seed=2) - 1
    disp_matrix = noise(batch, 3, 3, seed=9) - 0.5 if displaced == "in mm" else None
    matrix = matrices(batch, shift=0.3)
    found = sample_world(image, matrix, disp, disp_matrix=disp_matrix, shape=shape)
    expected = torch.from_numpy(by_voxels(image, matrix, disp, shape, disp_matrix))
    assert expected.count_nonzero() >= 2 * batch
    assert_close("values", found, expected, TOL["op float64"])


def itk_resampled(image: Tensor, matrix: Tensor, shape: tuple[int, int, int], how: int) -> Tensor:
    """By ITK, whose axes are the other way round."""
    numbers = matrix.numpy()
    flip = np.eye(3)[::-1]
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((flip @ numbers[:, :3] @ flip).ravel())
    transform.SetTranslation(flip @ numbers[:, 3])
    reference = sitk.Image(shape[::-1], sitk.sitkUInt8)
    moving = sitk.GetImageFromArray(image.numpy())
    done = sitk.Resample(moving, reference, transform, how, 0.0, moving.GetPixelID())
    return torch.from_numpy(sitk.GetArrayFromImage(done))


@pytest.mark.parametrize("seed", range(5))
def test_is_itk(seed: int) -> None:
    image, shape = noise(1, 1, 20, 25, 23, seed=seed), (22, 19, 27)
    matrix = matrices(seed + 1, shift=4.0)[-1:]
    expected = itk_resampled(image[0, 0], matrix[0], shape, sitk.sitkLinear)
    assert 0.2 < float((expected > 0).double().mean()) < 0.98
    found = sample_world(image, matrix, shape=shape)[0, 0]
    assert_close("linear", found, expected, TOL["op float64"])
    for dtype in (
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float32,
    ):
        labels = (200 * image).to(dtype)
        expected = itk_resampled(labels[0, 0], matrix[0], shape, sitk.sitkNearestNeighbor)
        found = sample_world(labels, matrix, shape=shape, mode="nearest")[0, 0]
        assert_equal(f"nearest {dtype}", found, expected)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_at_the_border_and_at_halves_as_itk(mode: str) -> None:
    """Half a voxel below the first centre is inside, half a voxel beyond the last is not."""
    image, shape = noise(1, 1, 3, 4, 5) + 1, (3, 4, 5)
    how = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}[mode]
    for axis, shift in itertools.product(range(3), (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75)):
        matrix = IDENTITY.clone()
        matrix[0, axis, 3] = shift
        found = sample_world(image, matrix, mode=mode)[0, 0]
        expected = itk_resampled(image[0, 0], matrix[0], shape, how)
        assert_close(f"{axis} {shift}", found, expected, TOL["op float64"])
        beyond = found.movedim(axis, 0)[0 if shift < 0 else -1]
        assert bool((beyond > 0).all()) == (-0.5 <= shift < 0.5)


# Properties


def test_without_a_matrix_it_is_a_warp_inside() -> None:
    image, disp = noise(2, 2, 6, 7, 8), 3 * noise(2, 3, 6, 7, 8, seed=1) - 1.5
    found = sample_world(image, IDENTITY.expand(2, -1, -1), disp)
    p = torch.stack(torch.meshgrid(*map(torch.arange, (6, 7, 8)), indexing="ij")) + disp
    last = torch.tensor([5.0, 6.0, 7.0]).view(3, 1, 1, 1)
    inside = ((p >= 0) & (p <= last)).all(dim=1, keepdim=True).expand_as(found)
    assert 0.3 < float(inside.double().mean()) < 0.9
    assert_close("inside", found[inside], warp(image, disp)[inside], TOL["op float64"])


@pytest.mark.parametrize("factor", [2, 4])
def test_a_coarse_displacement_is_brought_to_the_output(factor: int) -> None:
    image, matrix, shape = noise(2, 1, 7, 6, 5), matrices(2), (8, 4, 12)
    disp = noise(2, 3, *(size // factor for size in shape), seed=3) - 0.5
    found = sample_world(image, matrix, disp, shape=shape, factor=factor)
    fine = resize_displacement(disp, factor)
    assert_equal("fine", found, sample_world(image, matrix, fine, shape=shape))


def test_a_displacement_in_mm_on_the_grids_of_two_scans() -> None:
    """image(G_moving^-1 (G_fixed p + u)), which ITK does for warps as they are written."""
    fixed, moving = (scale * matrices(1, 4.0)[0] for scale in (1.5, 2.0))
    shape, image = (7, 8, 6), noise(1, 1, 9, 10, 11)
    u_mm = 3 * noise(1, 3, *shape, seed=8) - 1.5
    from_mm = torch.linalg.inv(moving[:, :3])
    offset = from_mm @ (fixed[:, 3:] - moving[:, 3:])
    matrix = torch.cat((from_mm @ fixed[:, :3], offset), dim=1)[None]
    found = sample_world(image, matrix, u_mm, disp_matrix=from_mm[None], shape=shape)
    in_voxels = torch.einsum("ij,bjdhw->bidhw", torch.linalg.inv(fixed[:, :3]), u_mm)
    expected = sample_world(image, matrix, in_voxels, shape=shape)
    assert float((expected > 0).double().mean()) > 0.3
    assert_close("in mm", found, expected, TOL["op float64"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("where", ["matrix", "disp", "disp_matrix"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_point_that_is_nowhere_samples_nothing(mode: str, where: str, value: float) -> None:
    image, disp = noise(1, 1, 4, 5, 6) + 1, torch.zeros(1, 3, 4, 5, 6, dtype=torch.float64)
    matrix, disp_matrix = IDENTITY.clone(), IDENTITY[:, :, :3].clone()
    if where == "matrix":
        matrix[0, 1, 3] = value
        assert not sample_world(image, matrix, disp, mode=mode).any()
        return
    if where == "disp_matrix":
        disp_matrix[0, 1, 1] = value
        assert not sample_world(image, matrix, disp + 1, disp_matrix=disp_matrix, mode=mode).any()
        return
    disp[0, 2, 1, 2, 3] = value
    expected = image.clone()
    expected[0, 0, 1, 2, 3] = 0
    found = sample_world(image, matrix, disp, disp_matrix=disp_matrix, mode=mode)
    assert_close("others, in mm", found, expected, TOL["op float64"])
    found = sample_world(image, matrix, disp, mode=mode)
    assert_close("others", found, expected, TOL["op float64"])


def test_a_voxel_that_is_no_number_reaches_its_neighbours_alone() -> None:
    image = noise(1, 2, 4, 5, 6)
    image[0, 1, 2, 0, 3] = torch.nan  # in the first row of the other channel
    found = sample_world(image, IDENTITY)
    expected = torch.zeros_like(image, dtype=torch.bool)
    expected[0, 1, 1:3, :2, 2:4] = True
    assert_equal("NaN", found.isnan() & ~expected, torch.zeros_like(expected))
    assert found[0, 1, 2, 0, 3].isnan()


def test_labels_stay_exact() -> None:
    labels = torch.tensor([2**53 + 1, -(2**62) - 1, 7], dtype=torch.int64).view(1, 1, 1, 1, 3)
    assert_equal("labels", sample_world(labels, IDENTITY, mode="nearest"), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounds_once(dtype: torch.dtype) -> None:
    image, matrix = noise(1, 2, 5, 6, 7).to(dtype), matrices(1)
    exact = sample_world(image.double(), matrix)
    assert_equal("rounded", sample_world(image, matrix), exact.to(dtype))


@pytest.mark.follows("convert it: image.float()", "convert it: {}.double()")
def test_hints_on_types() -> None:
    image, matrix = (100 * noise(1, 1, 3, 4, 5)).short(), matrices(1)
    with pytest.raises(DtypeError) as caught:
        sample_world(image, matrix)
    assert caught.value.hint == "convert it: image.float()"
    with pytest.raises(DtypeError) as caught:
        sample_world(image.float(), matrix.bfloat16())
    assert caught.value.hint == "convert it: matrix.double()"
    assert sample_world(image.float(), matrix.bfloat16().double()).any()


@pytest.mark.follows("call it under torch.no_grad()")
@pytest.mark.parametrize("name", ["image", "matrix", "disp", "disp_matrix"])
def test_a_gradient_is_refused(name: str) -> None:
    given = {
        "image": noise(1, 1, 3, 4, 5), "matrix": matrices(1), "disp": noise(1, 3, 3, 4, 5),
        "disp_matrix": noise(1, 3, 3),
    }  # fmt: skip
    given[name].requires_grad_()
    message = f"sample_world: {name} requires a gradient, and this operation has none"
    with pytest.raises(UsageError, match=message) as caught:
        sample_world(**given)
    assert caught.value.hint == "call it under torch.no_grad()"
    with torch.no_grad():
        assert not sample_world(**given).requires_grad


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"image": torch.zeros(3, 4, 5)}, ShapeError, "image has shape (3, 4, 5), expected (B, C, D,"),
    ({"image": torch.zeros(2, 1, 0, 4, 5)}, ShapeError, "image has shape (2, 1, 0, 4, 5), expecte"),
    ({"image": torch.zeros(2, 1, 3, 4, 5, dtype=torch.int16)}, DtypeError, "image is torch.int16"),
    (
        {"image": torch.zeros(2, 1, 3, 4, 5, dtype=torch.bool), "mode": "nearest"}, DtypeError,
        "image is torch.bool, expected a floating type, or an integer one for mode 'nearest'",
    ),
    ({"image": torch.zeros(2, 1, 3, 4, 5, dtype=torch.cfloat)}, DtypeError, "image is torch.compl"),
    ({"matrix": torch.eye(4)[None]}, ShapeError, "matrix has shape (1, 4, 4), expected (B, 3, 4)"),
    (
        {"matrix": matrices(3)}, ShapeError,
        "matrix has shape (3, 3, 4), expected (B, 3, 4) for 2 images",
    ),
    ({"matrix": matrices(2).half()}, DtypeError, "matrix is torch.float16, expected float32 or"),
    ({"matrix": matrices(2).to("meta")}, ShapeError, "matrix is on meta, expected cpu"),
    (
        {"disp_matrix": torch.eye(3)}, ShapeError,
        "disp_matrix has shape (3, 3), expected (2, 3, 3)",
    ),
    (
        {"disp_matrix": torch.zeros(2, 3, 3).half()}, DtypeError,
        "disp_matrix is torch.float16, expected float32 or float64",
    ),
    (
        {"disp_matrix": torch.zeros(2, 3, 3, device="meta")}, ShapeError,
        "disp_matrix is on meta, expected cpu",
    ),
    (
        {"disp_matrix": torch.zeros(2, 3, 3), "disp": None}, UsageError,
        "disp_matrix is given and disp is None, expected both",
    ),
    (
        {
            "disp_matrix": torch.zeros(2, 3, 3), "disp": torch.zeros(2, 3, 2, 2, 2), "factor": 2,
            "shape": (4, 4, 4),
        },
        UsageError, "factor is 2, expected 1 with disp_matrix",
    ),
    ({"shape": (3, 4)}, ShapeError, "shape is (3, 4), expected three whole numbers (D, H, W)"),
    ({"shape": (3, 4, 2.5)}, ShapeError, "shape is (3, 4, 2.5), expected three whole numbers"),
    ({"shape": 4}, ShapeError, "shape is 4, expected three whole numbers (D, H, W)"),
    ({"factor": "2"}, UsageError, "factor is 2, expected a positive integer"),
    ({"shape": (3, 0, 4)}, ShapeError, "shape is (3, 0, 4), expected (D, H, W), all positive"),
    (
        {"shape": (3, 4, 6)}, ShapeError,
        "disp has shape (2, 3, 3, 4, 5), expected (2, 3, 3, 4, 6)",
    ),
    ({"factor": 2}, ShapeError, "the grid (3, 4, 5) is not a multiple of factor = 2"),
    ({"factor": 0}, UsageError, "factor is 0, expected a positive integer"),
    ({"mode": "cubic"}, UsageError, "mode is 'cubic', expected one of linear, nearest"),
    (
        {"disp": torch.zeros(2, 3, 3, 4, 5, device="meta")}, ShapeError,
        "disp is on meta, expected cpu",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[each[2] for each in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "image": noise(2, 1, 3, 4, 5), "matrix": matrices(2), "disp": noise(2, 3, 3, 4, 5),
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(f"sample_world: {message}")):
        sample_world(**{**arguments, **changes})
