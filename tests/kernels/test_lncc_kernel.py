"""The Triton kernels of LNCC against the reference, and as torch operators."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import assert_kernel_as_good, implementation, run
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, smooth_image
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import LnccTo, _launch, lncc, multi_window_lncc, weighted_lncc

CPU = torch.device("cpu")
# Beyond one block of slices, rows or lanes; an axis of one; several volumes.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 2, 3, 2, 4),
    (1, 1, 1, 5, 3),
    (1, 2, 4, 1, 3),
    (2, 1, 3, 4, 1),
    (1, 1, 10, 3, 103),
    (1, 1, 2, 10, 103),
]
SHAPE_IDS = [f"b{b}-c{c}-{d}x{h}x{w}" for b, c, d, h, w in SHAPES]
# Of 60 values two equally good ways differ fourfold in their largest error and twofold in the RMS,
# by the draw and by how a processor's matrix products sum. Of 720 the kernel's were at most 1.03
# times the reference's in six draws.
ENOUGH = (1, 1, 8, 9, 10)
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp32-fp64": (torch.float32, torch.float64),
}


def pair(
    shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype] = TYPES["fp32"]
) -> tuple[Tensor, Tensor]:
    return noise(*shape, seed=1).to(types[0]), noise(*shape, seed=2).to(types[1])


def windowed(*windows: int, eps: float = 1e-5) -> Callable[..., Tensor]:
    return partial(multi_window_lncc, windows=windows, eps=eps)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_shapes(shape: tuple[int, ...], triton_device: torch.device) -> None:
    assert_kernel_as_good("lncc", windowed(3, eps=0.1), pair(shape), triton_device)


@pytest.mark.parametrize("windows", [(1,), (5, 3, 1), (7,), (11,)], ids=str)
def test_windows(windows: tuple[int, ...], triton_device: torch.device) -> None:
    """Each mean with another upstream gradient."""
    assert_kernel_as_good("lncc", windowed(*windows), pair((1, 1, 6, 8, 7)), triton_device)


def test_a_window_longer_than_the_march(triton_device: torch.device) -> None:
    x, y = pair((1, 1, 2, 1, 3))
    with torch.no_grad():
        with implementation("reference"):
            expected = multi_window_lncc(x, y, (13,))
        with implementation("triton"):
            found = multi_window_lncc(x.to(triton_device), y.to(triton_device), (13,))
    assert_close("means", found.cpu(), expected, TOL["lncc float32"])


def test_longer_marches_change_no_gradient(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every program's blocks begin where others' do: only the scores' sum has another order."""
    from ulae_rt.kernels.lncc import kernel

    inputs = pair((1, 2, 11, 10, 3))
    found = {}
    for blocks in (1, 2, 4):
        monkeypatch.setattr(kernel, "march", lambda steps, most, *_, n=blocks: min(n, steps))
        found[blocks] = run(windowed(3), inputs, choice="triton", device=triton_device)
    for blocks in (1, 2):
        assert_close("mean", found[blocks][0], found[4][0], TOL["lncc float32"])
        for a, b in zip(found[blocks][1:], found[4][1:], strict=True):
            assert_equal("gradient", a, b)


def test_wide_offsets_change_nothing(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = pair((1, 2, 3, 4, 3))
    narrow = run(windowed(3), inputs, choice="triton", device=triton_device)
    monkeypatch.setattr(_launch, "wide_index", lambda voxels: True)
    wide = run(windowed(3), inputs, choice="triton", device=triton_device)
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_types(types: tuple[torch.dtype, torch.dtype], triton_device: torch.device) -> None:
    assert_kernel_as_good("lncc", windowed(3), pair(ENOUGH, types), triton_device)


def test_a_brain_like_pair(triton_device: torch.device) -> None:
    x, y = (smooth_image((8, 9, 10), seed=seed).float() for seed in (1, 2))
    assert_kernel_as_good("lncc", windowed(5), (x, y), triton_device)


# What is computed, and what is kept


@pytest.mark.parametrize("op", ["multi_window", "weighted"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
def test_only_the_gradient_that_is_needed(
    op: str,
    needs: tuple[bool, bool],
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ulae_rt.kernels.lncc import kernel

    asked = []
    volumes = kernel._Volumes

    class Spy(volumes):  # type: ignore[misc, valid-type]
        def __init__(self, x: Tensor, y: Tensor, maps: int) -> None:
            asked.append(maps)
            super().__init__(x, y, maps)

    monkeypatch.setattr(kernel, "_Volumes", Spy)
    inputs = pair(ENOUGH)
    if op == "weighted":
        call: Callable[..., Tensor] = lambda x, y: weighted_lncc(x, y, (3,), (0.5,))[0]  # noqa: E731
        expected = [3 if sum(needs) == 1 else 5]  # in the forward pass, with the value
    else:
        call = windowed(3)
        expected = [0, 3 if sum(needs) == 1 else 5]
    assert_kernel_as_good(op, call, inputs, triton_device, needs)
    assert asked == expected


def test_against_one_image_it_is_the_gradient_of_the_whole(triton_device: torch.device) -> None:
    x, y = (v.to(triton_device, torch.float32) for v in pair(ENOUGH))
    value, gradient = LnccTo(y, 3)(x)
    wanted = lncc(x.requires_grad_(), y, 3)
    (by_x,) = torch.autograd.grad(wanted, x)
    # The two programs sum up in another order.
    assert_close("value", value, wanted.detach(), TOL["lncc float32"])
    scale = by_x.abs().amax()
    assert_close(
        "gradient", gradient / scale, by_x / scale, TOL["lncc gradient float32, any offset"]
    )


def test_without_gradients_nothing_is_computed_or_kept(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulae_rt.kernels.lncc import kernel

    monkeypatch.setattr(kernel, "launch_gradient", None)
    x, y = (v.to(triton_device) for v in pair((1, 1, 2, 3, 4)))
    with implementation("triton"):
        for needs, enabled in ((False, True), (True, False)):
            x.requires_grad_(needs)
            with torch.set_grad_enabled(enabled):
                outs = (multi_window_lncc(x, y, (3,)), *weighted_lncc(x, y, (3,), (2.0,)))
            assert all(out.grad_fn is None for out in outs)
        assert_equal("total", outs[1], 2 * outs[0][0])


# The weighted sum


@pytest.mark.parametrize("weights", [(1.0, 0.5), (-2.0, 0.0)], ids=str)
def test_weighted_sum(weights: tuple[float, ...], triton_device: torch.device) -> None:
    """Times three: the gradient that comes in is not 1."""

    def op(x: Tensor, y: Tensor) -> Tensor:
        total, means = weighted_lncc(x, y, (3, 1), weights)
        assert not means.requires_grad
        factors = torch.tensor(weights, dtype=means.dtype, device=means.device)
        assert_close("total", total, (factors * means).sum(), TOL["lncc float32"])
        return 3 * total

    inputs = pair(ENOUGH)
    assert_kernel_as_good("weighted", op, inputs, triton_device)
    with implementation("triton"), torch.no_grad():
        x, y = (v.to(triton_device) for v in inputs)
        assert_equal("means", weighted_lncc(x, y, (3, 1), weights)[1],
                     multi_window_lncc(x, y, (3, 1)))  # fmt: skip


def test_half_gradients_are_rounded_once(triton_device: torch.device) -> None:
    """Loss scaling: unscaled, the gradient would be below the smallest float16."""

    def op(x: Tensor, y: Tensor) -> Tensor:
        return 2.0**20 * weighted_lncc(x, y, (3,), (2.0**-20,))[0]

    inputs = pair((1, 1, 4, 3, 5), TYPES["fp16"])
    assert_kernel_as_good("scaled", op, inputs, triton_device)
    assert run(op, inputs, choice="triton", device=triton_device)[1].any()


# Numbers


@pytest.mark.parametrize(
    ("value", "window", "size"), [(0.37, 3, 7), (333.3, 3, 7), (0.37, 5, 10)], ids=str
)
def test_a_constant_window_has_no_variance(
    value: float, window: int, size: int, triton_device: torch.device
) -> None:
    """Exactly, or the smallest eps would make it large: then a gradient of it would show.

    Inside, that is: at the faces the zeros beyond them make a step. With these values and three
    columns, sums without pivots leave a variance above 0.
    """
    x, y = torch.full((1, 1, size, size, size), value), noise(1, 1, size, size, size).float()
    found = run(windowed(window, eps=1e-30), (x, y), choice="triton", device=triton_device)
    inner = (..., *[slice(window - 1, 1 - window)] * 3)
    for name, gradient in zip("xy", found[1:], strict=True):
        assert gradient.any()
        assert_equal(name, gradient[inner], torch.zeros_like(gradient[inner]))


def test_zero_background_and_an_edge(triton_device: torch.device) -> None:
    x, y = pair((1, 1, 7, 5, 6))
    x[:, :, :4] = 0
    y[:, :, :5] = 0
    assert_kernel_as_good("edge", windowed(3), (x, y), triton_device)
    empty = torch.zeros_like(x)
    found = run(windowed(3), (empty, empty), choice="triton", device=triton_device)
    for value in found:
        assert_equal("empty", value, torch.zeros_like(value))


@pytest.mark.parametrize("level", [0.7, 30.0])
def test_faint_noise_over_a_constant(level: float, triton_device: torch.device) -> None:
    x, y = (level + 1e-3 * v for v in pair((1, 1, 6, 7, 5)))
    assert_kernel_as_good("faint", windowed(3), (x, y), triton_device)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_an_offset_is_no_loss(offset: float, triton_device: torch.device) -> None:
    """The pivots: the reference is 0.02 off at 1000."""
    x, y = (offset + v for v in pair((1, 1, 9, 8, 7)))
    truth = run(windowed(5), (x.double(), y.double()), choice="reference", device=CPU)
    found = run(windowed(5), (x, y), choice="triton", device=triton_device)
    assert_close("value", found[0], truth[0], TOL["lncc float32, any offset"])
    for name, actual, expected in zip("xy", found[1:], truth[1:], strict=True):
        scale = expected.abs().max()
        assert_close(
            name, actual / scale, expected / scale, TOL["lncc gradient float32, any offset"]
        )


@pytest.mark.parametrize("top", [255, 4095])
def test_integer_intensities(top: int, triton_device: torch.device) -> None:
    """In float16 as well: the sums of squares are far beyond its 65504."""
    x, y = ((top * v).round() for v in pair((1, 1, 5, 4, 6)))
    assert_kernel_as_good("fp32", windowed(5), (x, y), triton_device)
    x, y = x.half(), y.half()
    found = run(windowed(5), (x, y), choice="triton", device=triton_device)
    truth = run(windowed(5), (x.double(), y.double()), choice="reference", device=CPU)
    assert_close("fp16", found[0], truth[0], TOL["lncc float32"])
    assert all(value.isfinite().all() for value in found)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value: float, triton_device: torch.device) -> None:
    for which in (0, 1):
        inputs = pair((1, 1, 4, 3, 5))
        inputs[which][0, 0, 1, 2, 3] = value
        found = run(windowed(3), inputs, choice="triton", device=triton_device)
        assert not found[0].isfinite().any()
        assert not found[1].isfinite().all()
        assert not found[2].isfinite().all()


# Properties


def test_an_image_with_itself_is_one(triton_device: torch.device) -> None:
    x = noise(1, 1, 6, 5, 7).float().to(triton_device)
    with implementation("triton"), torch.no_grad():
        for sign in (1, -1):
            found = multi_window_lncc(x, sign * x, (3, 5))
            assert_close("itself", found, torch.ones_like(found), TOL["lncc of itself"])
            assert bool((found <= 1).all())
        # Beyond what float32 resolves: what rounding leaves of the variance limits the covariance.
        y = noise(1, 1, 6, 5, 7, seed=2).float().to(triton_device)
        for window in (3, 5):
            assert 0 <= float(lncc(1e6 + x, 1e6 + y, window, eps=1e-30)) <= 1


def test_scale_and_offset_of_an_image_do_not_matter(triton_device: torch.device) -> None:
    """Of the windows inside, that is: at a face the zeros beyond it are part of the window."""
    x = torch.zeros(1, 1, 9, 9, 9)
    x[:, :, 2:-2, 2:-2, 2:-2] = noise(1, 1, 5, 5, 5).float()
    x = x.to(triton_device)
    with implementation("triton"), torch.no_grad():
        expected = lncc(x, x, 3, eps=1e-12)
        assert_close("scale", lncc(x, -3 * x, 3, eps=1e-12), expected, TOL["lncc float32"])
    affine = (noise(1, 1, 6, 7, 5).float(), 3 * noise(1, 1, 6, 7, 5).float() + 10)
    assert_kernel_as_good("affine", windowed(3), affine, triton_device)


@pytest.mark.parametrize("axes", list(itertools.permutations((2, 3, 4)))[1:], ids=str)
def test_axes_are_alike(axes: tuple[int, int, int], triton_device: torch.device) -> None:
    inputs = pair((1, 1, 4, 3, 5), TYPES["fp64"])
    moved = [x.permute(0, 1, *axes) for x in inputs]
    expected = run(windowed(3), inputs, choice="reference", device=CPU)
    found = run(windowed(3), moved, choice="triton", device=triton_device)
    assert_close("value", found[0], expected[0], TOL["op float64"])
    for name, actual, wanted in zip("xy", found[1:], expected[1:], strict=True):
        assert_close(name, actual, wanted.permute(0, 1, *axes), TOL["op float64"])


def test_where_the_images_lie_does_not_matter(triton_device: torch.device) -> None:
    """Zeros around them, two windows deep: the sum of cc and the gradients move along."""
    size, shape = 9, (1, 1, 2, 3, 2)
    found = []
    for corner in ((3, 3, 3), (4, 3, 4)):
        inputs = []
        for x in pair(shape, TYPES["fp64"]):
            whole = torch.zeros(1, 1, size, size, size, dtype=torch.float64)
            place = [slice(a, a + s) for a, s in zip(corner, shape[2:], strict=True)]
            whole[(..., *place)] = x
            inputs.append(whole)
        value, *grads = run(windowed(3), inputs, choice="triton", device=triton_device)
        found.append((value, *[torch.roll(g, [-a for a in corner], (2, 3, 4)) for g in grads]))
    for name, a, b in zip(("value", "x", "y"), *found, strict=True):
        assert_close(name, a, b, TOL["op float64"])


def test_gradcheck(triton_device: torch.device) -> None:
    x, y = (v.to(triton_device).requires_grad_() for v in pair((1, 1, 2, 2, 3), TYPES["fp64"]))
    with implementation("triton"):
        check = partial(torch.autograd.gradcheck, fast_mode=True)
        assert check(windowed(3), (x, y))
        assert check(lambda a, b: weighted_lncc(a, b, (3,), (0.5,))[0], (x, y))


def test_the_same_bits_again(triton_device: torch.device) -> None:
    inputs = pair((1, 1, 10, 4, 5))
    first = run(windowed(3), inputs, choice="triton", device=triton_device)
    for _ in range(2):
        again = run(windowed(3), inputs, choice="triton", device=triton_device)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_memory_layouts(triton_device: torch.device) -> None:
    x, y = pair((1, 2, 3, 2, 4))
    expected = run(windowed(3), (x, y), choice="triton", device=triton_device)
    last = torch.channels_last_3d
    padded = torch.zeros(1, 2, 5, 4, 6)
    padded[..., 1:-1, 1:-1, 1:-1] = y

    def op(x: Tensor, y: Tensor) -> Tensor:
        return multi_window_lncc(x, y[..., 1:-1, 1:-1, 1:-1], (3,))

    found = run(op, (x.contiguous(memory_format=last), padded), choice="triton",
                device=triton_device)  # fmt: skip
    found[2] = found[2][..., 1:-1, 1:-1, 1:-1]
    for name, a, b in zip(("value", "x", "y"), found, expected, strict=True):
        assert_equal(name, a, b)
    with implementation("triton"), torch.no_grad():
        x, y = x.to(triton_device), y.to(triton_device)
        assert_equal("expanded", lncc(x[:, :1].expand(-1, 2, -1, -1, -1), y, 3),
                     lncc(x[:, :1].repeat(1, 2, 1, 1, 1), y, 3))  # fmt: skip


# As operators of torch


def test_opcheck(triton_device: torch.device) -> None:
    ops = torch.ops.ulae_rt
    x, y = (v.to(triton_device) for v in pair((1, 1, 1, 1, 2), TYPES["bf16-fp32"]))
    weights = torch.tensor([0.5], device=triton_device)
    options = ([1], 1e-5)
    for needs in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(ops.lncc_gradient.default, (x, y, weights, *options, *needs))
        a, b = x.clone().requires_grad_(needs[0]), y.clone().requires_grad_(needs[1])
        torch.library.opcheck(ops.lncc.default, (a, b, *options))
        torch.library.opcheck(ops.weighted_lncc.default, (a, b, weights, *options, *needs))
    grad = torch.ones((), device=triton_device)
    torch.library.opcheck(ops.weighted_lncc_backward.default, (grad, y, y.new_empty(0), x, y))


def test_compile_and_export(triton_device: torch.device) -> None:
    inputs = pair((1, 1, 2, 3, 4))

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total, means = weighted_lncc(x, y, (3, 1), (1.0, 0.5))
        return total + means.sum(), multi_window_lncc(x, y, (3,))

    expected = run(loss, inputs, choice="triton", device=triton_device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = run(compiled, inputs, choice="triton", device=triton_device)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return loss(x, y)

    with implementation("triton"):
        x, y = (v.to(triton_device) for v in inputs)
        program = torch.export.export(Module(), (x, y))
        assert "ulae_rt.lncc.default" in program.graph_module.code
        for found, wanted in zip(program.module()(x, y), expected, strict=False):
            assert_equal("exported", found.cpu(), wanted)


def test_autocast_changes_nothing(triton_device: torch.device) -> None:
    x, y = (v.to(triton_device) for v in pair((1, 1, 2, 3, 4)))
    x.requires_grad_()
    with implementation("triton"):
        expected = weighted_lncc(x, y, (3,), (0.5,))
        with torch.autocast(triton_device.type, dtype=torch.bfloat16):
            for name, a, b in zip(("total", "means"), weighted_lncc(x, y, (3,), (0.5,)), expected,
                                  strict=True):  # fmt: skip
                assert_equal(name, a.detach(), b.detach())


def total_of(x: Tensor, y: Tensor) -> Tensor:
    return weighted_lncc(x, y, (3,), (1.0,))[0]


@pytest.mark.parametrize("op", [windowed(3), total_of], ids=["multi_window", "weighted"])
def test_no_second_derivative(
    op: Callable[[Tensor, Tensor], Tensor], triton_device: torch.device
) -> None:
    x, y = (v.to(triton_device).requires_grad_() for v in pair((1, 1, 2, 2, 3)))
    with implementation("triton"):
        (grad,) = torch.autograd.grad(op(x, y).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward()


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair((1, 1, 2, 3, 4))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    ops = torch.ops.ulae_rt
    weights = torch.ones(1)
    calls: Sequence[Callable[[], object]] = (
        lambda: multi_window_lncc(x, y, (3,)),
        lambda: weighted_lncc(x, y, (3,), (1.0,)),
        lambda: ops.lncc(x, y, [3], 1e-5),
        lambda: ops.lncc_gradient(x, y, weights, [3], 1e-5, True, True),
        lambda: ops.weighted_lncc(x, y, weights, [3], 1e-5, True, True),
    )
    for call in calls:
        with pytest.raises(BackendUnavailable, match=r"cannot run: they need a CUDA tensor, got"):
            call()
