"""``warp`` against grid_sample, SciPy, SimpleITK and values worked out by hand."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, off_lattice_displacement, smooth_displacement
from ulae_rt.errors import BackendUnavailable, DtypeError, ShapeError, UsageError
from ulae_rt.kernels import warp
from ulae_rt.kernels._launch import tracing_for_cpu
from ulae_rt.kernels.warp.reference import sample, sample_slices, sampling_grid

SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 7, 11, 13),
    (2, 3, 17, 5, 23),
    (1, 2, 1, 9, 8),
    (2, 1, 9, 1, 8),
    (1, 3, 9, 8, 1),
    (3, 2, 2, 2, 3),
]
READABLE = [f"b{b}-c{c}-{d}x{h}x{w}" for b, c, d, h, w in SHAPES]
PADDINGS = {"zeros": "grid-constant", "border": "nearest"}


def scipy_warp(image: Tensor, disp: Tensor, padding: str = "zeros", mode: str = "linear") -> Tensor:
    """The same in SciPy; its ``grid-constant`` interpolates into the zeros beyond the faces."""
    out = np.empty(image.shape)
    order = {"linear": 1, "nearest": 0}[mode]
    lattice = np.indices(image.shape[2:])
    for b in range(image.shape[0]):
        points = lattice + disp[b].double().numpy()
        for c in range(image.shape[1]):
            volume = image[b, c].double().numpy()
            out[b, c] = ndimage.map_coordinates(
                volume, points, order=order, mode=PADDINGS[padding], cval=0.0
            )
    return torch.from_numpy(out)


def displaced(axis: int, sizes: tuple[int, int, int], amount: float) -> Tensor:
    """The same displacement along one axis everywhere."""
    disp = torch.zeros(1, 3, *sizes, dtype=torch.float64)
    disp[:, axis] = amount
    return disp


# Independent oracles


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=READABLE)
def test_against_scipy(shape: tuple[int, int, int, int, int], padding: str) -> None:
    image = noise(*shape, seed=1)
    disp = off_lattice_displacement(shape[2:], reach=4, batch=shape[0], seed=2)
    expected = scipy_warp(image, disp, padding)
    assert_close("float64", warp(image, disp, padding), expected, TOL["op float64"])
    actual = warp(image.float(), disp.float(), padding)
    assert_close("float32", actual, expected, TOL["op float32"])


def test_against_grid_sample_with_align_corners() -> None:
    """The released code's convention: corners aligned, coordinates through S - 1."""
    image = noise(2, 3, 9, 12, 7, seed=1)
    disp = off_lattice_displacement((9, 12, 7), reach=4, batch=2, seed=2)
    d, h, w = torch.meshgrid(*[torch.arange(s).double() for s in (9, 12, 7)], indexing="ij")
    points = torch.stack((w + disp[:, 2], h + disp[:, 1], d + disp[:, 0]), dim=-1)
    grid = 2 * points / torch.tensor([6.0, 11.0, 8.0], dtype=torch.float64) - 1
    expected = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=True)
    assert_close("warp", warp(image, disp), expected, TOL["op float64"])


def test_against_simpleitk() -> None:
    """SimpleITK's axes run the other way; only inside, where the two treat no face."""
    sizes = (9, 12, 7)
    image = noise(1, 1, *sizes, seed=1)
    disp = off_lattice_displacement(sizes, reach=2, seed=2)
    field = np.ascontiguousarray(disp[0].numpy()[::-1].transpose(1, 2, 3, 0))
    transform = sitk.DisplacementFieldTransform(sitk.GetImageFromArray(field, isVector=True))
    volume = sitk.GetImageFromArray(image[0, 0].numpy())
    resampled = sitk.Resample(volume, volume, transform, sitk.sitkLinear, 0.0, sitk.sitkFloat64)
    points = torch.from_numpy(np.indices(sizes)) + disp[0]
    last = torch.tensor(sizes).view(3, 1, 1, 1) - 1
    inside = ((points >= 0) & (points <= last)).all(dim=0)
    assert int(inside.sum()) > 300
    expected = torch.from_numpy(sitk.GetArrayFromImage(resampled))
    actual = warp(image, disp)[0, 0]
    assert_close("inside", actual[inside], expected[inside], TOL["op float64"])


def test_by_hand_in_every_axis() -> None:
    """Component i moves along tensor axis i, by voxels, towards larger indices."""
    image = torch.zeros(1, 1, 4, 4, 4, dtype=torch.float64)
    image[0, 0, 1, 2, 3] = 8.0
    for axis in range(3):
        out = warp(image, displaced(axis, (4, 4, 4), 0.25))
        expected = torch.zeros_like(image)
        # p + 0.25 lies a quarter of the way from p: 3/4 of the voxel itself, 1/4 of the next.
        expected[0, 0, 1, 2, 3] = 6.0
        before = [1, 2, 3]
        before[axis] -= 1
        expected[(0, 0, *before)] = 2.0
        assert_close(f"axis {axis}", out, expected, TOL["op float64"])


def test_by_hand_between_eight_voxels() -> None:
    image = torch.arange(8.0, dtype=torch.float64).view(1, 1, 2, 2, 2)
    disp = torch.zeros(1, 3, 2, 2, 2, dtype=torch.float64)
    disp[0, :, 0, 0, 0] = torch.tensor([0.5, 0.25, 0.75])
    # Linear in the index: 4 * 0.5 + 2 * 0.25 + 1 * 0.75.
    assert float(warp(image, disp)[0, 0, 0, 0, 0]) == pytest.approx(3.25, abs=1e-12)


@pytest.mark.parametrize(
    ("amount", "zeros", "border"),
    [
        (-0.25, [0.75 * 3, 0.75 * 5 + 0.25 * 3, 0.75 * 9 + 0.25 * 5], [3, 4.5, 8]),
        (0.25, [0.75 * 3 + 0.25 * 5, 0.75 * 5 + 0.25 * 9, 0.75 * 9], [3.5, 6, 9]),
        (-0.75, [0.25 * 3, 0.25 * 5 + 0.75 * 3, 0.25 * 9 + 0.75 * 5], [3, 3.5, 6]),
        (-1.0, [0, 3, 5], [3, 3, 5]),
        (2.5, [0.5 * 9, 0, 0], [9, 9, 9]),
        (7.0, [0, 0, 0], [9, 9, 9]),
    ],
)
def test_by_hand_at_the_faces(amount: float, zeros: list[float], border: list[float]) -> None:
    """Beyond the last voxel ``zeros`` fades over one voxel; ``border`` repeats the last."""
    for axis in range(3):
        shape = [3 if i == axis else 1 for i in range(3)]
        image = torch.tensor([3.0, 5.0, 9.0], dtype=torch.float64).view(1, 1, *shape)
        disp = displaced(axis, (shape[0], shape[1], shape[2]), amount)
        for padding, values in (("zeros", zeros), ("border", border)):
            expected = torch.tensor(values, dtype=torch.float64).view(1, 1, *shape)
            actual = warp(image, disp, padding)
            assert_close(f"{padding}, axis {axis}", actual, expected, TOL["op float64"])


# Properties


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=READABLE)
def test_zero_displacement_is_the_identity(
    shape: tuple[int, int, int, int, int], padding: str
) -> None:
    image = noise(*shape, dtype=torch.float32)
    disp = torch.zeros(shape[0], 3, *shape[2:])
    assert_close("linear", warp(image, disp, padding), image, TOL["identity"])
    assert_equal("nearest", warp(image, disp, padding, "nearest"), image)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, -3])
def test_integer_shift_is_a_crop(axis: int, shift: int) -> None:
    sizes = (9, 11, 7)
    image = noise(1, 2, *sizes, dtype=torch.float32)
    out = warp(image, displaced(axis, sizes, shift).float())
    expected = torch.zeros_like(image)
    kept = sizes[axis] - abs(shift)
    expected.narrow(axis + 2, max(-shift, 0), kept).copy_(
        image.narrow(axis + 2, max(shift, 0), kept)
    )
    assert_close("shift", out, expected, TOL["op float32"])


def test_linear_in_the_image_and_adjoint() -> None:
    """<warp(x), g> = <x, warp^T(g)>, with the transpose taken at another image."""
    disp = off_lattice_displacement((5, 7, 6), reach=4, batch=2)
    x, other, g = (noise(2, 3, 5, 7, 6, seed=s) for s in (1, 2, 3))
    other.requires_grad_()
    (transposed,) = torch.autograd.grad((warp(other, disp) * g).sum(), other)
    left, right = (warp(x, disp) * g).sum(), (x * transposed).sum()
    assert_close("adjoint", left, right, TOL["op float64"])


def test_every_voxel_from_one_point() -> None:
    """All samples on one voxel: its gradient is the sum of all that arrive."""
    image = noise(1, 1, 4, 5, 6).requires_grad_()
    lattice = torch.stack(
        torch.meshgrid(*[torch.arange(s).double() for s in (4, 5, 6)], indexing="ij")
    )
    disp = (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1) - lattice)[None]
    out = warp(image, disp)
    assert_close("value", out.detach(), image[..., 1:2, 2:3, 3:4].expand_as(out), TOL["op float64"])
    (grad,) = torch.autograd.grad(out.sum(), image)
    expected = torch.zeros_like(grad)
    expected[0, 0, 1, 2, 3] = 4 * 5 * 6
    assert_close("gradient", grad, expected, TOL["op float64"])


def test_border_has_no_gradient_outside() -> None:
    image = noise(1, 1, 4, 4, 4)
    disp = displaced(1, (4, 4, 4), 9.3).requires_grad_()
    (grad,) = torch.autograd.grad(warp(image, disp, "border").sum(), disp)
    assert_equal("d h", grad[:, 1], torch.zeros_like(grad[:, 1]))


# Gradients


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 4, 3, 5), (2, 1, 3, 4, 2), (1, 1, 1, 3, 4)],
    ids=["slabs", "batch", "one-voxel-axis"],
)
def test_gradcheck(
    shape: tuple[int, int, int, int, int], padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    image = noise(*shape, seed=1).requires_grad_()
    disp = off_lattice_displacement(shape[2:], reach=2, batch=shape[0], seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, u: warp(x, u, padding), (image, disp), eps=1e-6)


def test_nearest_gives_no_gradient_to_the_displacement() -> None:
    image = noise(1, 1, 3, 3, 3).requires_grad_()
    disp = off_lattice_displacement((3, 3, 3)).requires_grad_()
    grads = torch.autograd.grad(warp(image, disp, mode="nearest").sum(), [image, disp])
    assert bool(grads[0].any())
    assert not bool(grads[1].any())


# The split over threads


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("depth", "threads"), [(12, 2), (12, 4), (12, 5), (7, 2), (9, 16)])
def test_slabs_equal_one_piece(
    depth: int, threads: int, mode: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(1, 3, depth, 6, 5, dtype=torch.float32)
    grid = sampling_grid(off_lattice_displacement((depth, 6, 5), reach=4).float())
    calls = []
    grid_sample = F.grid_sample

    def counted(x: Tensor, *rest: object, **more: object) -> Tensor:
        calls.append(x.shape[0])
        return grid_sample(x, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "grid_sample", counted)
    results = []
    for count in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(sample(image, grid, padding, mode))
    assert_equal("slabs", results[1], results[0])
    assert results[1].shape == image.shape
    # As many slabs as threads, or the next smaller number that divides the depth.
    assert calls == [1, max(n for n in range(1, threads + 1) if depth % n == 0)]


def test_an_exported_graph_has_no_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not depend on how many cores the exporting machine has."""

    class Warp(nn.Module):
        def forward(self, image: Tensor, disp: Tensor) -> Tensor:
            return warp(image, disp)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    image, disp = noise(1, 1, 8, 5, 6), off_lattice_displacement((8, 5, 6))
    program = torch.export.export(Warp(), (image, disp))
    assert not [node for node in program.graph.nodes if "expand" in node.name]
    assert_close("warp", program.module()(image, disp), warp(image, disp), TOL["op float64"])


def test_a_program_for_the_cpu_samples_as_eager_does() -> None:
    class Warp(nn.Module):
        def forward(self, image: Tensor, disp: Tensor) -> Tensor:
            return warp(image, disp)

    image, disp = noise(1, 1, 8, 5, 6), off_lattice_displacement((8, 5, 6))
    with torch.no_grad(), tracing_for_cpu():
        program = torch.export.export(Warp(), (image, disp))
    assert [node for node in program.graph.nodes if "as_strided" in str(node.target)]
    assert_equal("warp", program.module()(image, disp), warp(image, disp))


@pytest.mark.parametrize("shape", [(2, 2, 19, 3, 5), (1, 1, 1, 1, 1), (1, 3, 8, 1, 2)], ids=str)
def test_slices_sampled_in_one_plane(shape: tuple[int, int, int, int, int]) -> None:
    """What runs without gradients, against what runs with them."""
    image = noise(*shape, seed=1)
    disp = off_lattice_displacement(shape[2:], reach=4, batch=shape[0], seed=3)
    expected = sample(image, sampling_grid(disp), "zeros", "linear")
    assert_close("slices", sample_slices(image, disp), expected, TOL["op float64"])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("amount", [torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
def test_slices_end_in_zeros(axis: int, amount: float) -> None:
    image = 1 + noise(1, 1, 3, 4, 5)
    assert_equal(
        "outside", warp(image, displaced(axis, (3, 4, 5), amount)), torch.zeros_like(image)
    )


# Types and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_images_are_computed_in_float32(dtype: torch.dtype) -> None:
    image = noise(2, 2, 6, 7, 5, seed=1).to(dtype)
    disp = off_lattice_displacement((6, 7, 5), batch=2).float()
    actual = warp(image, disp)
    assert_equal("warp", actual, warp(image.float(), disp).to(dtype))


@pytest.mark.parametrize(
    ("image_type", "disp_type"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32)],
    ids=["disp64", "image64"],
)
def test_computed_in_float64_when_either_is(
    image_type: torch.dtype, disp_type: torch.dtype
) -> None:
    image = noise(1, 1, 6, 7, 5).to(image_type)
    disp = off_lattice_displacement((6, 7, 5)).to(disp_type)
    assert_equal("warp", warp(image, disp), warp(image.double(), disp.double()).to(image_type))


def test_layouts_do_not_matter() -> None:
    image, disp = noise(2, 3, 6, 7, 5), off_lattice_displacement((6, 7, 5), batch=2)
    expected = warp(image, disp)
    last = torch.channels_last_3d
    layouts = {
        "channels_last": (image.to(memory_format=last), disp.to(memory_format=last)),
        "transposed": tuple(x.transpose(2, 4).contiguous().transpose(2, 4) for x in (image, disp)),
        "sliced": tuple(F.pad(x, [1, 2, 1, 2, 1, 2])[..., 1:-2, 1:-2, 1:-2] for x in (image, disp)),
    }
    for name, (x, u) in layouts.items():
        assert not (x.is_contiguous() and u.is_contiguous()), name
        assert_close(name, warp(x, u), expected, TOL["op float64"])


def test_expanded_inputs() -> None:
    image, disp = noise(1, 1, 6, 7, 5), off_lattice_displacement((6, 7, 5))
    expected = warp(image.repeat(2, 3, 1, 1, 1), disp.repeat(2, 1, 1, 1, 1))
    actual = warp(image.expand(2, 3, -1, -1, -1), disp.expand(2, -1, -1, -1, -1))
    assert_equal("warp", actual, expected)


# Labels


def test_nearest_keeps_labels() -> None:
    labels = torch.randint(0, 2035, (1, 1, 9, 8, 7)).float()
    disp = off_lattice_displacement((9, 8, 7), reach=2).float()
    # A fraction of exactly a half would be a tie, which every library breaks its own way.
    disp = torch.where((disp - disp.floor() - 0.5).abs() < 0.02, disp + 0.05, disp)
    actual = warp(labels, disp, mode="nearest")
    assert set(actual.unique().tolist()) <= {0.0, *labels.unique().tolist()}
    assert_equal("labels", actual.double(), scipy_warp(labels, disp, mode="nearest"))


# Far and nowhere


@pytest.mark.parametrize("amount", [1e3, -1e3, 1e9, -1e30, float("inf"), float("-inf")])
def test_far_outside_is_outside(amount: float) -> None:
    image = noise(1, 1, 4, 5, 6, dtype=torch.float32) + 1
    for axis in range(3):
        disp = displaced(axis, (4, 5, 6), amount).float()
        assert_equal("zeros", warp(image, disp), torch.zeros_like(image))
        face = image.select(axis + 2, -1 if amount > 0 else 0).unsqueeze(axis + 2)
        assert_close("border", warp(image, disp, "border"), face.expand_as(image), TOL["identity"])


def test_not_a_number_is_nowhere() -> None:
    """As torch's grid_sample on the CPU: no voxel, hence 0, and no harm to its neighbours."""
    image = noise(1, 1, 4, 5, 6, dtype=torch.float32) + 1
    disp = torch.zeros(1, 3, 4, 5, 6)
    disp[0, 1, 2, 3, 4] = float("nan")
    out = warp(image, disp)
    assert float(out[0, 0, 2, 3, 4]) == 0
    out[0, 0, 2, 3, 4] = image[0, 0, 2, 3, 4]
    assert_close("neighbours", out, image, TOL["identity"])


def test_nan_in_the_image_shows() -> None:
    """Where it is sampled, and, as its weight of zero is no protection, at most a voxel beyond."""
    image = torch.ones(1, 1, 5, 5, 6)
    image[0, 0, 2, 2, 2] = float("nan")
    lost = warp(image, displaced(2, (5, 5, 6), 0.5).float()).isnan()
    assert bool(lost[0, 0, 2, 2, 1:3].all())
    lost[0, 0, 1:4, 1:4, 0:4] = False
    assert not bool(lost.any())


def test_a_linear_ramp_is_reproduced_exactly() -> None:
    ramp = torch.arange(16.0, dtype=torch.float64).view(1, 1, 1, 16, 1).expand(1, 1, 16, 16, 16)
    disp = smooth_displacement((16, 16, 16), reach=2.0)
    inner = slice(3, -3)
    actual = warp(ramp, disp)[..., inner, inner, inner]
    expected = (ramp[:, 0] + disp[:, 1])[:, None][..., inner, inner, inner]
    assert_close("ramp", actual, expected, TOL["op float64"])


# Bad input


@pytest.mark.parametrize(
    ("image", "disp", "error", "message"),
    [
        ((1, 4, 4, 4), (1, 3, 4, 4, 4), ShapeError, r"warp: image has shape \(1, 4, 4, 4\), exp"),
        ((1, 1, 4, 4, 4), (3, 4, 4, 4), ShapeError, r"warp: disp has shape .*expected \(B, C, D"),
        (
            (1, 1, 4, 4, 4),
            (1, 2, 4, 4, 4),
            ShapeError,
            r"disp has shape \(1, 2, 4, 4, 4\), expected \(1, 3",
        ),
        ((2, 1, 4, 4, 4), (1, 3, 4, 4, 4), ShapeError, r"expected \(2, 3, 4, 4, 4\)"),
        ((1, 1, 4, 4, 4), (1, 3, 4, 4, 5), ShapeError, r"expected \(1, 3, 4, 4, 4\)"),
        ((1, 1, 4, 0, 4), (1, 3, 4, 0, 4), ShapeError, r"image has .*expected no empty axis"),
    ],
    ids=["image-rank", "disp-rank", "components", "batch", "grid", "empty"],
)
def test_bad_shapes(
    image: tuple[int, ...], disp: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        warp(torch.zeros(image), torch.zeros(disp))


def test_bad_types_and_choices() -> None:
    image, disp = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(DtypeError, match=r"warp: image is torch\.int16, expected a floating type"):
        warp(image.to(torch.int16), disp)
    with pytest.raises(DtypeError, match=r"warp: disp is torch\.int64, expected a floating type"):
        warp(image, disp.long())
    with pytest.raises(UsageError, match="padding is 'reflect', expected one of zeros, border"):
        warp(image, disp, padding="reflect")
    with pytest.raises(UsageError, match="mode is 'cubic', expected one of linear, nearest"):
        warp(image, disp, mode="cubic")
    with pytest.raises(ShapeError, match="warp: disp is on meta, expected cpu"):
        warp(image, disp.to("meta"))


def test_kernels_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    image, disp = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    for choice in ("auto", "reference"):
        monkeypatch.setenv("ULAE_RT_KERNELS", choice)
        warp(image, disp)
    monkeypatch.setenv("ULAE_RT_KERNELS", "cuda")
    with pytest.raises(UsageError, match="ULAE_RT_KERNELS is 'cuda', expected one of auto, ref"):
        warp(image, disp)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match=r"the Triton kernels cannot run: "):
        warp(image, disp)


@pytest.mark.follows("convert it: {}.float()")
@pytest.mark.parametrize("name", ["image", "disp"])
def test_a_type_that_does_not_fit_is_converted(name: str) -> None:
    given = {"image": noise(1, 1, 4, 4, 4), "disp": torch.ones(1, 3, 4, 4, 4)}
    with pytest.raises(DtypeError) as caught:
        warp(**{**given, name: given[name].int()})
    assert caught.value.hint == f"convert it: {name}.float()"
    out = warp(**{**given, name: given[name].int().float()})
    assert out.shape == given["image"].shape


@pytest.mark.follows("add the batch and channel axes")
def test_axes_are_added() -> None:
    image, disp = noise(4, 4, 4), torch.ones(1, 3, 4, 4, 4)
    with pytest.raises(ShapeError) as caught:
        warp(image, disp)
    assert caught.value.hint == "add the batch and channel axes"
    assert warp(image[None, None], disp).shape == (1, 1, 4, 4, 4)


@pytest.mark.follows("unset ULAE_RT_KERNELS to let the device decide")
def test_an_implementation_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    image, disp = noise(1, 1, 4, 4, 4), torch.ones(1, 3, 4, 4, 4)
    monkeypatch.setenv("ULAE_RT_KERNELS", "cuda")
    with pytest.raises(UsageError) as caught:
        warp(image, disp)
    assert caught.value.hint == "unset ULAE_RT_KERNELS to let the device decide"
    monkeypatch.delenv("ULAE_RT_KERNELS")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert warp(image, disp).shape == image.shape


@pytest.mark.follows("move it to a GPU, or set TRITON_INTERPRET=1 to run them, slowly, on the CPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton was loaded for a GPU")
def test_kernels_that_were_asked_for_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    image, disp = noise(1, 1, 3, 4, 5), torch.full((1, 3, 3, 4, 5), 0.25)
    expected = warp(image, disp)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable) as caught:
        warp(image, disp)
    assert caught.value.hint == (
        "move it to a GPU, or set TRITON_INTERPRET=1 to run them, slowly, on the CPU"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_close("warped", warp(image, disp), expected, TOL["op float32"])
