"""``world_displacement`` by its reference: against sums over voxels, scipy and today's code."""

import itertools
import re
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, smooth_displacement
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.imaging.itk import from_sitk, to_sitk
from ulae_rt.kernels import sample_world, world_displacement
from ulae_rt.kernels.world_displacement import reference

FLOAT64 = torch.float64


def turned(batch: int, shift: float = 1.5) -> Tensor:
    """(B, 3, 4): turned, sheared and scaled, each its own way."""
    linear = torch.eye(3, dtype=FLOAT64) + 0.4 * (noise(batch, 3, 3, seed=5) - 0.5)
    return torch.cat((linear, 2 * shift * (noise(batch, 3, 1, seed=6) - 0.5)), dim=2)


# Each axis of the field runs along one of the output's, forwards or backwards.
PERMUTATIONS = {
    "straight": [[0.4, 0, 0], [0, 0.7, 0], [0, 0, 1.3]],
    "flipped": [[-0.4, 0, 0], [0, 0.7, 0], [0, 0, -1.3]],
    "permuted": [[0, 0, 0.9], [0.4, 0, 0], [0, 0.6, 0]],
    "permuted and flipped": [[0, -0.5, 0], [0, 0, 0.8], [-1.1, 0, 0]],
}


def along_axes(name: str, batch: int, middle: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
    """(B, 3, 4): a scaled signed permutation about the middle of the field and of the output."""
    linear = torch.tensor(PERMUTATIONS[name], dtype=FLOAT64) * (1 + 0.2 * noise(batch, 1, 1))
    centre = (torch.tensor(shape, dtype=FLOAT64) - 1) / 2
    offset = torch.tensor(middle, dtype=FLOAT64) - linear @ centre + 0.3 * noise(batch, 3, seed=4)
    return torch.cat((linear, offset[:, :, None]), dim=2)


def in_mm(batch: int) -> tuple[Tensor, Tensor]:
    """A linear part (B, 3, 3) and an offset (B, 3, 4)."""
    return 4 * noise(batch, 3, 3, seed=7) - 2, 4 * noise(batch, 3, 4, seed=8) - 2


def by_voxels(
    disp: Tensor, to_field: Tensor, linear: Tensor, offset: Tensor, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Point by point, the eight voxels around it, clamped to the edge."""
    sizes = disp.shape[2:]
    out = np.zeros((len(disp), 3, *shape))
    for b, *p in itertools.product(range(len(disp)), *map(range, shape)):
        place = np.append(np.array(p, float), 1.0)
        x = to_field[b].double().numpy() @ place
        x = [min(max(value, 0.0), size - 1) for value, size in zip(x, sizes, strict=True)]
        lower = [min(int(value), max(size - 2, 0)) for value, size in zip(x, sizes, strict=True)]
        u = np.zeros(3)
        for corner in itertools.product((0, 1), repeat=3):
            at = [i + up for i, up in zip(lower, corner, strict=True)]
            weight = np.prod([1 - abs(a - value) for a, value in zip(at, x, strict=True)])
            if weight > 0:
                u += weight * disp[(b, slice(None), *at)].double().numpy()
        moved = linear[b].double().numpy() @ u + offset[b].double().numpy() @ place
        out[(b, slice(None), *p)] = moved
    return out


@pytest.mark.parametrize("sizes", [(4, 5, 6), (1, 3, 5), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how", ["turned", *PERMUTATIONS])
def test_is_the_mean_of_the_voxels_around(
    how: str, batch: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    disp, shape = noise(batch, 3, *sizes), (5, 7, 9)
    middle = tuple((size - 1) / 2 for size in sizes)
    to_field = turned(batch) if how == "turned" else along_axes(how, batch, middle, shape)
    separable = mock.Mock(side_effect=reference._separable_slabs)
    monkeypatch.setattr(reference, "_separable_slabs", separable)
    found = world_displacement(disp, to_field, *in_mm(batch), shape=shape)
    assert separable.call_count == (0 if how == "turned" else batch)
    expected = torch.from_numpy(by_voxels(disp, to_field, *in_mm(batch), shape))
    assert_close("values", found, expected, TOL["op float64"])


@pytest.mark.parametrize("seed", range(3))
def test_is_scipys_nearest_border(seed: int) -> None:
    disp, shape = noise(1, 3, 12, 15, 11, seed=seed), (22, 19, 27)
    to_field = 0.6 * turned(seed + 1, shift=4.0)[-1:]
    linear, offset = in_mm(1)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    places = np.vstack((places, np.ones(places.shape[1])))
    points = to_field[0].numpy() @ places
    last = np.array(disp.shape[2:])[:, None] - 1
    assert 0.2 < np.mean(((points >= 0) & (points <= last)).all(axis=0)) < 0.9
    u = np.stack([map_coordinates(volume, points, order=1, mode="nearest") for volume in disp[0]])
    expected = torch.from_numpy(linear[0].numpy() @ u + offset[0].numpy() @ places)
    found = world_displacement(disp, to_field, linear, offset, shape=shape)
    assert_close("scipy", found[0].flatten(1), expected, TOL["op float64"])


def rotation(degrees: float) -> npt.NDArray[np.float64]:
    """About two axes."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )


@pytest.mark.parametrize("degrees", [0, 12], ids=["aligned", "oblique"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_is_what_itk_makes_of_field_and_affine(axes: tuple[int, ...], degrees: float) -> None:
    """Of a field whose grid lies in the fixed image's pose, or is turned against it."""
    disp = smooth_displacement((14, 16, 13), reach=4.0, dtype=torch.float32)
    grid_affine, fixed_affine, affine = np.eye(4), np.eye(4), np.eye(4)
    grid_affine[:3, :3] = 2 * rotation(degrees)
    grid_affine[:3, 3] = -12, -13, -11
    fixed_affine[:3, :3] = np.eye(3)[:, axes] * [-0.9, 1.1, 1.3]
    shape = (30, 27, 20)
    fixed_affine[:3, 3] = 3 - fixed_affine[:3, :3] @ (np.array(shape) / 2)
    affine[:3, :3] = 1.05 * rotation(5)
    affine[:3, 3] = 9, -4, 2
    u_mm = np.tensordot(grid_affine[:3, :3], disp[0].double().numpy(), 1).transpose(1, 2, 3, 0)
    # ITK has no clamping for vectors: the outermost layer is repeated instead.
    field = sitk.ZeroFluxNeumannPad(to_sitk(u_mm, grid_affine), [20] * 3, [20] * 3)
    reference = to_sitk(np.zeros(shape, np.uint8), fixed_affine)
    sampled = from_sitk(sitk.Resample(field, reference, sitk.Transform(), sitk.sitkLinear))
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = points @ fixed_affine[:3, :3].T + fixed_affine[:3, 3]
    moved = (points + sampled) @ affine[:3, :3].T + affine[:3, 3]
    expected = (moved - points).transpose(3, 0, 1, 2)
    to_field = np.linalg.inv(grid_affine) @ fixed_affine
    linear = affine[:3, :3] @ grid_affine[:3, :3]
    offset = (affine - np.eye(4)) @ fixed_affine
    found = world_displacement(
        disp,
        *(torch.from_numpy(each)[None] for each in (to_field[:3], linear, offset[:3])),
        shape=shape,
    )
    assert found.dtype == torch.float32
    wanted = torch.from_numpy(expected.copy())
    assert_close("mm", found[0].double(), wanted, TOL["displacement float32"])


# Properties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["turned", "permuted"])
@pytest.mark.parametrize("apart", [300.0, 37e3])
def test_an_offset_is_rounded_once(apart: float, how: str, dtype: torch.dtype) -> None:
    """Coordinates of 300 mm, and images that lie 37 m apart."""
    shape = (5, 7, 9)
    to_field = turned(2) if how == "turned" else along_axes(how, 2, (2, 2, 2), shape)
    linear, offset = in_mm(2)
    offset[:, :, 3] += apart
    disp = torch.zeros(2, 3, 4, 5, 6, dtype=dtype)
    found = world_displacement(disp, to_field, linear, offset, shape=shape)
    axes = [torch.arange(size, dtype=FLOAT64) for size in shape]
    places = torch.stack((*torch.meshgrid(*axes, indexing="ij"), torch.ones(shape, dtype=FLOAT64)))
    exact = torch.einsum("bij,jdhw->bidhw", offset, places)
    assert float((found.double() - exact).abs().max()) <= apart * torch.finfo(dtype).eps


def test_far_outside_is_the_edge() -> None:
    disp = noise(1, 3, 4, 5, 6)
    nothing = torch.zeros(1, 3, 4, dtype=FLOAT64)
    for far in (-1e6, 1e6):
        for to_field in (along_axes("straight", 1, (0, 0, 0), (3, 3, 3)), turned(1)):
            to_field[0, :, 3] = far
            found = world_displacement(
                disp, to_field, torch.eye(3, dtype=FLOAT64)[None], nothing, shape=(3, 3, 3)
            )
            edge = disp[..., 0, 0, 0] if far < 0 else disp[..., -1, -1, -1]
            expected = edge[..., None, None, None].expand(1, 3, 3, 3, 3)
            assert_close("edge", found, expected, TOL["op float64"])


@pytest.mark.parametrize("strays", [0.9e-3, 1.1e-3], ids=["a header's rounding", "more"])
def test_axes_that_stray_by_a_headers_rounding_are_the_same(strays: float) -> None:
    disp, shape = noise(1, 3, 8, 9, 7), (15, 17, 13)
    to_field = along_axes("straight", 1, (3.5, 4, 3), shape)
    to_field[0, 0, 1] = strays / 16
    separable = reference._common_axes(to_field[0], shape) is not None
    assert separable == (strays < 1e-3)
    found = world_displacement(disp, to_field, *in_mm(1), shape=shape)
    expected = torch.from_numpy(by_voxels(disp, to_field, *in_mm(1), shape))
    # Right in the middle, and off by half of it at the ends.
    slope = float((in_mm(1)[0] @ disp.diff(dim=2).flatten(2)).abs().max())
    allowed = slope * strays / 2 if separable else TOL["op float64"].absolute
    assert float((found - expected).abs().max()) <= allowed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(1, 2, 3), (0, 4, 5)], ids=["inside", "edge"])
@pytest.mark.parametrize("how", ["straight", "turned"])
def test_no_number_gives_no_number(how: str, at: tuple[int, ...], value: float) -> None:
    """In all that is interpolated from it, even with a weight of 0, and nowhere else."""
    shape = (9, 11, 13)
    disp = noise(1, 3, 4, 5, 6)
    to_field = along_axes(how, 1, (1.5, 2, 2.5), shape) if how != "turned" else 0.5 * turned(1)
    bad = disp.clone()
    bad[(0, 1, *at)] = value
    found = world_displacement(bad, to_field, *in_mm(1), shape=shape)
    good = world_displacement(disp, to_field, *in_mm(1), shape=shape)
    voxel, around = torch.zeros(2, 1, 3, *disp.shape[2:], dtype=FLOAT64)
    voxel[(..., *at)] = 1
    around[(..., *(slice(max(i - 1, 0), i + 2) for i in at))] = 1
    mean = torch.eye(3)[None], torch.zeros(1, 3, 4)
    reached = torch.from_numpy(by_voxels(voxel, to_field, *mean, shape))[0, 0] > 0
    beside = torch.from_numpy(by_voxels(around, to_field, *mean, shape))[0, 0] > 1 - 1e-9
    assert 2 < int(reached.sum()) <= int(beside.sum()) < reached.numel() / 2
    assert not found[0, :, reached].isfinite().any()
    assert_close("others", found[0, :, ~beside], good[0, :, ~beside], TOL["op float64"])


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", ["straight", "turned"])
def test_a_matrix_without_numbers_gives_none(how: str, value: float, which: int) -> None:
    shape = (5, 7, 9)
    to_field = along_axes(how, 2, (1.5, 2, 2.5), shape) if how != "turned" else turned(2)
    matrices = [to_field, *in_mm(2)]
    good = world_displacement(noise(2, 3, 4, 5, 6), *matrices, shape=shape)
    matrices[which] = matrices[which].clone()
    matrices[which][1, 2, 1] = value
    found = world_displacement(noise(2, 3, 4, 5, 6), *matrices, shape=shape)
    assert_equal("the other one", found[0], good[0])
    spoilt = found[1] if which == 0 else found[1, 2]
    assert not spoilt[..., 1:, :].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["straight", "turned"])
def test_half_precision_is_computed_in_float32(how: str, dtype: torch.dtype) -> None:
    shape = (5, 7, 9)
    to_field = along_axes(how, 1, (1.5, 2, 2.5), shape) if how != "turned" else turned(1)
    disp = noise(1, 3, 4, 5, 6).to(dtype)
    found = world_displacement(disp, to_field, *in_mm(1), shape=shape)
    assert_equal(
        "values", found, world_displacement(disp.float(), to_field, *in_mm(1), shape=shape)
    )


@pytest.mark.parametrize("how", ["permuted", "turned"])
def test_memory_layouts(how: str) -> None:
    shape = (5, 7, 9)
    to_field = along_axes(how, 2, (1.5, 2, 2.5), shape) if how != "turned" else turned(2)
    inputs = [noise(2, 3, 4, 5, 6), to_field, *in_mm(2)]
    expected = world_displacement(*inputs, shape=shape)
    permuted = [x.mT.contiguous().mT for x in inputs]
    found = world_displacement(*permuted, shape=shape)
    assert_close("permuted", found, expected, TOL["op float64"])
    assert found.is_contiguous()


def test_what_it_is_for_samples_as_field_and_affine_do() -> None:
    """An image through the result, in mm, is the image through the displacement in voxels."""
    shape, image = (8, 9, 10), noise(1, 1, 9, 10, 11)
    disp = smooth_displacement(shape, reach=1.5)
    voxel_to_mm, affine = 1.4 * turned(1)[0], turned(1, shift=0.5)[0]
    to_mm = voxel_to_mm[:, :3]
    steps = affine - torch.eye(3, 4, dtype=FLOAT64)
    last_row = torch.tensor([[0, 0, 0, 1]], dtype=FLOAT64)
    offset = steps @ torch.cat((voxel_to_mm, last_row))
    on_itself = torch.eye(3, 4, dtype=FLOAT64)[None]
    total = world_displacement(
        disp, on_itself, (affine[:, :3] @ to_mm)[None], offset[None], shape=shape
    )
    from_mm = torch.linalg.inv(to_mm)[None]
    found = sample_world(image, on_itself, total, disp_matrix=from_mm, shape=shape)
    # The same point, by matrices alone: from_mm (affine (G (p + u)) - g).
    moved = affine @ torch.cat((voxel_to_mm, last_row))
    moved[:, 3] -= voxel_to_mm[:, 3]
    expected = sample_world(image, from_mm @ moved, disp, shape=shape)
    assert float((expected > 0).double().mean()) > 0.3
    assert_close("image", found, expected, TOL["op float64"])


@pytest.mark.parametrize("name", ["disp", "to_field", "linear", "offset"])
def test_a_gradient_is_refused(name: str) -> None:
    linear, offset = in_mm(1)
    given = {
        "disp": noise(1, 3, 3, 4, 5),
        "to_field": turned(1),
        "linear": linear,
        "offset": offset,
    }
    given[name].requires_grad_()
    message = f"world_displacement: {name} requires a gradient, and this operation has none"
    with pytest.raises(UsageError, match=message):
        world_displacement(**given, shape=(3, 4, 5))
    with torch.no_grad():
        assert not world_displacement(**given, shape=(3, 4, 5)).requires_grad


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"disp": torch.zeros(3, 4, 5)}, ShapeError, "disp has shape (3, 4, 5), expected (B, C, D,"),
    (
        {"disp": torch.zeros(2, 2, 3, 4, 5)}, ShapeError,
        "disp has shape (2, 2, 3, 4, 5), expected (2, 3, 3, 4, 5)",
    ),
    ({"disp": torch.zeros(2, 3, 0, 4, 5)}, ShapeError, "disp has shape (2, 3, 0, 4, 5), expected"),
    ({"disp": torch.zeros(2, 3, 3, 4, 5).int()}, DtypeError, "disp is torch.int32, expected a flo"),
    ({"to_field": turned(1)}, ShapeError, "to_field has shape (1, 3, 4), expected (2, 3, 4)"),
    ({"linear": turned(2)}, ShapeError, "linear has shape (2, 3, 4), expected (2, 3, 3)"),
    ({"offset": torch.eye(4)}, ShapeError, "offset has shape (4, 4), expected (2, 3, 4)"),
    ({"offset": turned(2).half()}, DtypeError, "offset is torch.float16, expected float32 or floa"),
    ({"linear": torch.eye(3)[None].expand(2, 3, 3).int()}, DtypeError, "linear is torch.int32, e"),
    ({"to_field": turned(2).to("meta")}, ShapeError, "to_field is on meta, expected cpu"),
    ({"shape": (3, 4)}, ShapeError, "shape is (3, 4), expected three whole numbers (D, H, W)"),
    ({"shape": (3, 4, 0)}, ShapeError, "shape is (3, 4, 0), expected (D, H, W), all positive"),
    ({"shape": None}, ShapeError, "shape is None, expected three whole numbers (D, H, W)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[each[2] for each in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    linear, offset = in_mm(2)
    arguments: dict[str, Any] = {
        "disp": noise(2, 3, 3, 4, 5), "to_field": turned(2), "linear": linear, "offset": offset,
        "shape": (3, 4, 5),
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(f"world_displacement: {message}")):
        world_displacement(**{**arguments, **changes})
