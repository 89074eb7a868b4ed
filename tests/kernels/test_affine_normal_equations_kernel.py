"""The Triton kernels of ``affine_normal_equations`` against the reference, and as an operator."""

from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import implementation
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _configs, _launch, affine_normal_equations

CPU = torch.device("cpu")
UNCUT = (False,) * 6
SOME_CUT = (True, False, False, True, True, True)
# Degree, derivatives.
FORMS = [(1, True), (1, False), (2, False), (3, False), (4, False)]
# Image's B, D, H, W; matrices; points; which faces are cut. The interpreter takes 4,096 points a
# program.
CASES = [
    ((1, 9, 11, 10), 1, 1, UNCUT),
    ((1, 9, 11, 10), 3, 701, UNCUT),  # one image for all
    ((3, 9, 11, 10), 3, 4099, SOME_CUT),
    ((2, 6, 5, 7), 2, 8192, (True,) * 6),
    ((1, 1, 5, 7), 2, 50, UNCUT),
    ((1, 5, 1, 7), 2, 50, SOME_CUT),
    ((1, 5, 7, 1), 2, 50, UNCUT),
    ((1, 1, 1, 1), 2, 50, UNCUT),
]


def inputs_of(
    image: tuple[int, ...], batch: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An image, points from a voxel before it to one after it, values, matrices of some degrees."""
    moving = noise(image[0], 1, *image[1:]).to(dtype) + 0.5
    sizes = torch.tensor(image[1:])[:, None]
    points = noise(3, count, seed=7) * (sizes + 1) - 1
    points[:, :1] = 0.45 * (sizes - 1)  # inside, were it the only one
    linear = torch.eye(3, dtype=torch.float64) + 0.2 * (noise(batch, 3, 3, seed=5) - 0.5)
    matrix = torch.cat((linear, noise(batch, 3, 1, seed=6) - 0.5), dim=2)
    return moving, points.float(), noise(count, seed=8).float(), matrix.float()


def by(choice: str, *inputs: Tensor, device: torch.device, **options: object) -> Tensor:
    """By ``reference`` or ``triton``, on the CPU."""
    with implementation(choice):
        return affine_normal_equations(*(x.to(device) for x in inputs), **options).cpu()  # type: ignore[arg-type]


def true(*inputs: Tensor, **options: object) -> Tensor:
    """By the reference, in float64."""
    return by("reference", *(x.double() for x in inputs), device=CPU, **options)


def assert_gram_close(name: str, actual: Tensor, expected: Tensor, tolerance: str) -> None:
    """Every sum of products relative to the lengths of its two rows.

    A slope is relative to the whole gradient: along one axis it may cancel to nearly nothing.
    """
    squares = expected.diagonal(dim1=1, dim2=2).clone()
    if squares.shape[1] == 15:
        gradient = squares[:, :12].view(-1, 3, 4)
        gradient[:] = gradient.sum(dim=1, keepdim=True)
    lengths = torch.where(squares > 0, squares, 1).sqrt()
    scale = lengths[:, :, None] * lengths[:, None]
    assert_close(name, actual / scale, expected / scale, TOL[tolerance])


@pytest.mark.parametrize(("degree", "derivatives"), FORMS)
@pytest.mark.parametrize(("image", "batch", "count", "cut"), CASES, ids=str)
def test_value(
    image: tuple[int, ...], batch: int, count: int, cut: tuple[bool, ...], degree: int,
    derivatives: bool, triton_device: torch.device,
) -> None:  # fmt: skip
    inputs = inputs_of(image, batch, count)
    options = {"degree": degree, "derivatives": derivatives, "cut": cut}
    found = by("triton", *inputs, device=triton_device, **options)
    expected = true(*inputs, **options)
    one = 12 * derivatives
    assert (expected[:, one, one + 1] > 0).all()  # points inside
    assert (expected[:, one, one] < count).all() == any(cut)
    assert_gram_close("sums", found, expected, "gram float32")
    assert_equal("transposed", found.mT, found)


@pytest.mark.parametrize(("degree", "derivatives"), FORMS[::4])
def test_no_points(degree: int, derivatives: bool, triton_device: torch.device) -> None:
    inputs, options = inputs_of((1, 4, 5, 6), 2, 0), {"degree": degree, "derivatives": derivatives}
    found = by("triton", *inputs, device=triton_device, **options)
    assert_equal("zeros", found, torch.zeros_like(true(*inputs, **options)))


def test_no_matrices(triton_device: torch.device) -> None:
    found = by("triton", *inputs_of((1, 4, 5, 6), 0, 9), device=triton_device)
    assert found.shape == (0, 15, 15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("degree", "derivatives"), FORMS[::4])
def test_types(
    dtype: torch.dtype, degree: int, derivatives: bool, triton_device: torch.device
) -> None:
    inputs = inputs_of((2, 9, 11, 10), 2, 700, dtype)
    options = {"degree": degree, "derivatives": derivatives, "cut": SOME_CUT}
    found = by("triton", *inputs, device=triton_device, **options)
    tolerance = "gram float64" if dtype == torch.float64 else "gram float32"
    assert_gram_close("sums", found, true(*inputs, **options), tolerance)
    # Points, values and matrices in double precision change no type.
    wide = (inputs[0], *(x.double() for x in inputs[1:]))
    assert_equal("wide", by("triton", *wide, device=triton_device, **options), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiles_of_a_gpu(
    dtype: torch.dtype, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program's lanes and steps as on a GPU, which the interpreter otherwise has not."""
    for name in ("", "_values", "_sum"):
        table = _configs.TABLE[f"affine_normal_equations{name}"]
        monkeypatch.setitem(_configs.TABLE, f"affine_normal_equations{name}", table[1:])
    inputs = inputs_of((1, 9, 11, 10), 2, 1301, dtype)
    tolerance = "gram float64" if dtype == torch.float64 else "gram float32"
    for degree, derivatives in FORMS[::4]:
        options = {"degree": degree, "derivatives": derivatives, "cut": SOME_CUT}
        found = by("triton", *inputs, device=triton_device, **options)
        assert_gram_close("sums", found, true(*inputs, **options), tolerance)


def test_sums_are_as_exact_as_they_are_said_to_be(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values and slopes are exact: 12 roundings of the sum of the absolute terms at most."""
    table = _configs.TABLE["affine_normal_equations"]
    monkeypatch.setitem(_configs.TABLE, "affine_normal_equations", table[-1:])
    count = 1000
    # Whole numbers and halves: what is interpolated and multiplied once has few bits.
    moving = (2**11 * noise(1, 1, 20, 25, 22)).round().float() / 2**11
    points = (2 * noise(3, count, seed=7) * torch.tensor([[19], [24], [21]])).round().float() / 2
    values = noise(count, seed=8).float()
    inputs = moving, points, values, torch.eye(3, 4)[None]
    found = by("triton", *inputs, device=triton_device)
    expected = true(*inputs)
    # Of absolute terms; by Cauchy-Schwarz no more than the lengths of the rows.
    lengths = expected.diagonal(dim1=1, dim2=2).sqrt()
    bound = 12 * 2.0**-24 * lengths[:, :, None] * lengths[:, None]
    assert ((found - expected).abs() <= bound).all()
    assert (found != expected).any()


@pytest.mark.parametrize("axis", range(3))
def test_border_and_faces_are_half_a_voxel_away(axis: int, triton_device: torch.device) -> None:
    """One point, and matrices that only shift it, by numbers that are exact."""
    first = torch.tensor([-0.75, -0.5, -0.25, 0.0, 0.25])
    size = 3 + axis
    shifts = torch.cat((first, first[:4] + size))
    moving, points, values = noise(1, 1, 3, 4, 5).float() + 1, torch.ones(3, 1), torch.ones(1)
    points[axis] = 0
    matrix = torch.eye(3, 4).repeat(len(shifts), 1, 1)
    matrix[:, axis, 3] = shifts
    cut = tuple(face // 2 == axis for face in range(6))
    found = by("triton", moving, points, values, matrix, device=triton_device, cut=cut)
    counts = ((shifts >= -0.5) & (shifts < size - 0.5)).double()
    assert_equal("which count", found[:, 12, 12], counts)
    assert_equal("which are inside", (found[:, 13, 13] > 0).double(), counts)
    expected = true(moving, points, values, matrix, cut=cut)
    assert_gram_close("sums", found, expected, "gram float32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_point_that_is_nowhere_counts_as_0(
    choice: str, value: float, triton_device: torch.device
) -> None:
    device = triton_device if choice == "triton" else CPU
    moving, points, values, matrix = inputs_of((1, 4, 5, 6), 2, 30)
    expected = by(choice, moving, points[:, 1:], values[1:], matrix, device=device)
    expected[:, 12, 12] += 1
    expected[:, 12, 14] += values[0]
    expected[:, 14, 12] += values[0]
    expected[:, 14, 14] += values[0].double() ** 2
    points[1, 0] = value
    found = by(choice, moving, points, values, matrix, device=device)
    assert_gram_close("one point nowhere", found, expected, "gram float32")
    matrix[1, 0, 2] = value
    found = by(choice, moving, points[:, 1:], values[1:], matrix, device=device)
    assert_gram_close("the other matrix", found[:1], true(
        moving, points[:, 1:], values[1:], matrix[:1]
    ), "gram float32")  # fmt: skip
    assert found[1, 12, 12] == 29
    assert not found[1, :12].any()
    assert not found[1, 13].any()


@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_nan_is_seen_where_it_is_sampled_and_counted(
    choice: str, triton_device: torch.device
) -> None:
    device = triton_device if choice == "triton" else CPU
    moving, values, identity = noise(1, 1, 4, 5, 6).float(), torch.ones(3), torch.eye(3, 4)[None]
    moving[0, 0, 0, 2, 3] = torch.nan
    call = partial(by, choice, device=device)
    # Before the first slice, at its border, and two slices behind it.
    points = torch.tensor([[-0.7, 2.0, 3.0], [-0.4, 2.0, 3.0], [2.0, 2.0, 3.0]]).T
    found = call(moving, points[:, ::2], values[::2], identity)
    assert found.isfinite().all()
    assert found[0, 12, 12] == 2
    found = call(moving, points, values, identity)
    ones, m, f = 12, 13, 14
    assert found[0, m, (ones, m, f)].isnan().all()
    assert found[0, (ones, f)][:, (ones, f)].eq(3).all()
    # The last slice's centre has the NaN before it, with no weight.
    last = torch.tensor([[3.0], [2.0], [3.0]])
    found = call(moving.flip(2).roll(-1, 2), last, values[:1], identity)
    assert found[0, m, m].isnan()
    # A value that is NaN, of a point that counts and of one that does not.
    values[0] = torch.nan
    found = call(moving, points[:, ::2], values[::2], identity)
    assert found[0, f].isnan()[[ones, m, f]].all()
    assert found[0, :f, :f].isfinite().all()
    found = call(moving, points[:, ::2], values[::2], identity, cut=(True, *UNCUT[1:]))
    assert found.isfinite().all()
    assert found[0, ones, ones] == 1


def test_large_values_stay_within_their_range(triton_device: torch.device) -> None:
    """The eighth power of a 16-bit brightness is beyond float32."""
    moving, points, values, matrix = inputs_of((1, 9, 11, 10), 2, 200)
    options = {"degree": 4, "derivatives": False}
    found = by("triton", 65535 * moving, points, values, matrix, device=triton_device, **options)
    expected = true(65535 * moving, points, values, matrix, **options)
    assert expected.max() > 1e39
    assert_gram_close("sums", found, expected, "gram float32")


def test_offsets_of_64_bits(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of((2, 9, 11, 10), 2, 300)
    for degree, derivatives in FORMS[::4]:
        options = {"degree": degree, "derivatives": derivatives}
        expected = by("triton", *inputs, device=triton_device, **options)
        with monkeypatch.context() as patch:
            patch.setattr(_launch, "wide_index", lambda voxels: True)
            wide = by("triton", *inputs, device=triton_device, **options)
        assert_equal("wide", wide, expected)


def test_memory_layouts_and_the_same_bits_again(triton_device: torch.device) -> None:
    inputs = inputs_of((2, 9, 11, 10), 2, 701)
    expected = by("triton", *inputs, device=triton_device)
    assert_equal("again", by("triton", *inputs, device=triton_device), expected)
    moving, points, values, matrix = inputs
    strided = torch.stack((values, -values), dim=1)[:, 0]
    others = [x.mT.contiguous().mT for x in (moving, points, matrix)]
    assert not any(x.is_contiguous() for x in (strided, *others))
    permuted = others[0], others[1], strided, others[2]
    assert_equal("permuted", by("triton", *permuted, device=triton_device), expected)
    shared = by("triton", moving[:1], points, values, matrix, device=triton_device)
    repeated = moving[:1].expand(2, -1, -1, -1, -1)
    found = by("triton", repeated, points, values, matrix, device=triton_device)
    assert_equal("one image for all", found, shared)
    assert not shared[1].equal(expected[1])


@pytest.mark.parametrize(("degree", "derivatives"), FORMS[::4])
def test_opcheck(degree: int, derivatives: bool, triton_device: torch.device) -> None:
    inputs = [x.to(triton_device) for x in inputs_of((1, 5, 4, 6), 2, 9)]
    operator = torch.ops.ulae_rt.affine_normal_equations.default
    torch.library.opcheck(operator, (*inputs, degree, derivatives, list(SOME_CUT)))


def test_compile_and_export(triton_device: torch.device) -> None:
    inputs = [x.to(triton_device) for x in inputs_of((1, 5, 4, 6), 2, 9)]
    expected = by("triton", *inputs, device=triton_device, cut=SOME_CUT)
    call = partial(affine_normal_equations, cut=SOME_CUT)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return call(*inputs)

    with implementation("triton"):
        assert_equal("compiled", compiled(*inputs).cpu(), expected)
        program = torch.export.export(Module(), tuple(inputs))
        assert "ulae_rt.affine_normal_equations.default" in program.graph_module.code
        assert_equal("exported", program.module()(*inputs).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("degree", "derivatives"), FORMS[::4])
def test_captured_graph_and_no_waiting(degree: int, derivatives: bool) -> None:
    """At the size of a registration: recorded once, replayed with another matrix."""
    device = torch.device("cuda")
    inputs = [x.to(device) for x in inputs_of((1, 96, 112, 96), 3, 50_000)]
    call = partial(affine_normal_equations, degree=degree, derivatives=derivatives)
    with implementation("triton"):
        call(*inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            first = call(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(*inputs)
        graph.replay()
        assert_equal("replayed", found.cpu(), first.cpu())
        inputs[3].mul_(0.9)
        graph.replay()
        assert not found.equal(first)
        assert_equal("another matrix", found.cpu(), call(*inputs).cpu())


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
        affine_normal_equations(*inputs_of((1, 3, 4, 5), 1, 5))
