"""The Triton kernels of ``warp`` against the reference, and as a torch operator."""

from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import assert_kernel_as_good, deterministic, implementation, run
from _support.tolerances import assert_equal
from _support.volumes import noise, off_lattice_displacement, smooth_displacement, smooth_image
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _launch, compose, resize_displacement, warp, warp_compose

SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7),
    (1, 2, 1, 9, 8),
    (2, 1, 9, 1, 8),
    (1, 1, 5, 8, 1),
    (1, 1, 2, 37, 41),
]
SHAPE_IDS = [f"b{b}-c{c}-{d}x{h}x{w}" for b, c, d, h, w in SHAPES]
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "fp16": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "halves": (torch.float16, torch.float16),
}


def pair(
    shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], factor: int = 1
) -> tuple[Tensor, Tensor]:
    b, _, *sizes = shape
    grid = tuple(size // factor for size in sizes)
    disp = off_lattice_displacement(grid, reach=3, batch=b, seed=2)  # type: ignore[arg-type]
    return noise(*shape, seed=1).to(types[0]), disp.to(types[1])


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_linear(shape: tuple[int, ...], padding: str, triton_device: torch.device) -> None:
    op = partial(warp, padding=padding)
    assert_kernel_as_good("warp", op, pair(shape, TYPES["fp32"]), triton_device)


def test_no_value_depends_on_how_many_slices_a_program_has(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs along an axis, as many as slices, and one."""
    from ulae_rt.kernels import _sampling

    inputs = pair((2, 2, 7, 5, 6), TYPES["fp32"])
    field = inputs[1]
    coarse = field[:, :, :3, :2, :3]
    found = []
    for slices in (4, 1, 7):
        monkeypatch.setattr(_sampling, "march", lambda *_, n=slices: n)
        with implementation("triton"):
            image, disp, small = (x.to(triton_device) for x in (*inputs, coarse))
            whole = (warp(image, disp), compose(disp, disp), *warp_compose(image, disp, disp))
            found.append((*whole, resize_displacement(small, 2)))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_equal("value", a, b)


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_types(types: tuple[torch.dtype, torch.dtype], triton_device: torch.device) -> None:
    assert_kernel_as_good("warp", warp, pair((2, 2, 4, 5, 7), types), triton_device)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_nearest(padding: str, triton_device: torch.device) -> None:
    op = partial(warp, padding=padding, mode="nearest")
    labels, disp = pair((2, 1, 5, 6, 7), TYPES["fp32"])
    labels = (labels * 3000).round()
    found = run(op, (labels, disp), choice="triton", device=triton_device)
    truth = run(op, (labels, disp), choice="reference", device=torch.device("cpu"))
    for name, actual, expected in zip(("out", "image", "disp"), found, truth, strict=True):
        assert_equal(name, actual, expected)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_coarse_displacement(factor: int, padding: str, triton_device: torch.device) -> None:
    op = partial(warp, padding=padding, factor=factor)
    for types in (TYPES["fp32"], TYPES["fp64"]):
        assert_kernel_as_good("warp", op, pair((2, 2, 8, 16, 24), types, factor), triton_device)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["image", "disp"])
def test_only_the_gradient_that_is_needed(
    needs: tuple[bool, bool], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulae_rt.kernels.warp import kernel

    asked = []
    launch = kernel.launch_backward

    def spy(*arguments: Tensor, **options: bool) -> tuple[Tensor | None, Tensor | None]:
        asked.append((options["need_image"], options["need_disp"]))
        return launch(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "launch_backward", spy)
    inputs = pair((1, 2, 3, 4, 5), TYPES["fp32"])
    assert_kernel_as_good("warp", warp, inputs, triton_device, needs)
    assert asked == [needs]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    padded = torch.zeros([size + 2 for size in x.shape], dtype=x.dtype, device=x.device)
    inner = padded[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return {
        "permuted": x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "channels_last": x.contiguous(memory_format=torch.channels_last_3d),
        "sliced": inner,
        "offset": torch.cat((x.flatten()[:3], x.flatten()))[3:].view(x.shape),
    }


@pytest.mark.parametrize("layout", ["permuted", "channels_last", "sliced", "offset"])
def test_memory_layouts(layout: str, triton_device: torch.device) -> None:
    image, disp = (x.to(triton_device) for x in pair((2, 2, 3, 4, 5), TYPES["fp32"]))
    with implementation("triton"):
        expected = warp(image, disp)
        actual = warp(layouts(image)[layout], layouts(disp)[layout])
        assert_equal("expanded", warp(image[:1, :1].expand(2, 2, -1, -1, -1), disp)[:, :1],
                     warp(image[:1, :1].repeat(2, 1, 1, 1, 1), disp))  # fmt: skip
    assert actual.is_contiguous()
    assert_equal(layout, actual, expected)


# Properties


def test_no_displacement_is_the_identity_bit_for_bit(triton_device: torch.device) -> None:
    image = noise(2, 2, 5, 6, 7, dtype=torch.float32).to(triton_device)
    disp = torch.zeros(2, 3, 5, 6, 7, device=triton_device)
    with implementation("triton"):
        for padding in ("zeros", "border"):
            for mode in ("linear", "nearest"):
                assert_equal(f"{padding} {mode}", warp(image, disp, padding, mode), image)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_whole_voxels_are_a_shift_bit_for_bit(axis: int, triton_device: torch.device) -> None:
    image = noise(1, 1, 5, 6, 7, dtype=torch.float32).to(triton_device)
    disp = torch.zeros(1, 3, 5, 6, 7, device=triton_device)
    disp[:, axis] = 2
    expected = torch.zeros_like(image)
    size = image.shape[axis + 2]
    expected.narrow(axis + 2, 0, size - 2).copy_(image.narrow(axis + 2, 2, size - 2))
    with implementation("triton"):
        assert_equal("shift", warp(image, disp), expected)


@pytest.mark.parametrize("amount", [1e3, -1e3, 1e9, -1e30, float("inf"), float("-inf"), torch.nan])
def test_far_outside_and_nowhere(amount: float, triton_device: torch.device) -> None:
    image = (noise(1, 1, 3, 4, 5, dtype=torch.float32) + 1).to(triton_device).requires_grad_()
    disp = torch.zeros(1, 3, 3, 4, 5, device=triton_device)
    disp[:, 1] = amount
    disp.requires_grad_()
    nowhere = amount != amount
    with implementation("triton"):
        for padding in ("zeros", "border"):
            out = warp(image, disp, padding)
            face = image[:, :, :, -1 if amount > 0 else 0].unsqueeze(3).expand_as(image)
            expected = face if padding == "border" and not nowhere else torch.zeros_like(image)
            assert_equal(padding, out, expected)
            (by_disp,) = torch.autograd.grad(out.sum(), disp)
            assert_equal("gradient", by_disp[:, 1], torch.zeros_like(by_disp[:, 1]))


def test_the_border_is_flat_at_the_border_itself(triton_device: torch.device) -> None:
    """The derivative of clipping is 0 at both ends, the ends included."""
    image = noise(1, 1, 3, 4, 5, dtype=torch.float32).to(triton_device)
    disp = torch.zeros(1, 3, 3, 4, 5, device=triton_device, requires_grad=True)
    with implementation("triton"):
        (grad,) = torch.autograd.grad(warp(image, disp, "border").sum(), disp)
    for axis in range(3):
        assert not grad[:, axis].select(axis + 1, 0).any()
        assert not grad[:, axis].select(axis + 1, -1).any()
    assert grad[:, :, 1, 1, 1].all()


def test_gradcheck(triton_device: torch.device) -> None:
    image = noise(1, 2, 3, 4, 3).to(triton_device).requires_grad_()
    for factor, grid in ((1, (3, 4, 3)), (2, (2, 2, 2))):
        if factor == 2:
            image = noise(1, 1, 4, 4, 4).to(triton_device).requires_grad_()
        disp = off_lattice_displacement(grid, reach=1, seed=3).to(triton_device)
        with implementation("triton"):
            for padding in ("zeros", "border"):
                op = partial(warp, padding=padding, factor=factor)
                assert torch.autograd.gradcheck(
                    op, (image, (disp / factor).requires_grad_()), fast_mode=True, nondet_tol=1e-12
                )


def test_everything_onto_one_voxel(triton_device: torch.device) -> None:
    """The most collisions there can be among the atomics."""
    sizes = (4, 5, 6)
    lattice = torch.stack(torch.meshgrid(*[torch.arange(s) for s in sizes], indexing="ij")).double()
    disp = (torch.tensor([1.25, 2.5, 3.75], dtype=torch.float64).view(3, 1, 1, 1) - lattice)[None]
    inputs = (noise(1, 1, *sizes, dtype=torch.float32), disp.float())
    assert_kernel_as_good("warp", warp, inputs, triton_device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, of the interpreter
def test_deterministic_sums(triton_device: torch.device) -> None:
    image, disp = smooth_image((5, 6, 7)).float(), smooth_displacement((5, 6, 7), 2.0).float()
    plain = run(warp, (image, disp), choice="triton", device=triton_device)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(warp, (image, disp), choice="triton", device=triton_device)
        for _ in range(3):
            again = run(warp, (image, disp), choice="triton", device=triton_device)
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b)
        assert_kernel_as_good("warp", warp, (image, disp), triton_device)
        disp[0, 0, 2, 2, 2] = float("nan")
        image[0, 0, 0, 0, 0] = float("inf")
        lost = run(lambda i, d: warp(i, d) * i, (image, disp), choice="triton",
                   device=triton_device)[1]  # fmt: skip
        assert not lost.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (plain[1] - first[1]).abs().max() < 1e-5


# As an operator of torch


@pytest.mark.parametrize("factor", [1, 2])
def test_opcheck(factor: int, triton_device: torch.device) -> None:
    image, disp = (x.to(triton_device) for x in pair((1, 2, 4, 4, 6), TYPES["fp32"], factor))
    for need_image, need_disp in ((True, True), (False, True), (False, False)):
        arguments = (
            image.clone().requires_grad_(need_image), disp.clone().requires_grad_(need_disp),
            "zeros", "linear", factor,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.ulae_rt.warp.default, arguments)
    grad = torch.ones_like(image)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (grad, image, disp, "border", "linear", factor, *needs)
        torch.library.opcheck(torch.ops.ulae_rt.warp_backward.default, arguments)


def test_compile_and_export(triton_device: torch.device) -> None:
    image, disp = (x.to(triton_device) for x in pair((1, 1, 3, 4, 5), TYPES["fp32"]))
    # By default gradients are added up by atomics, on a GPU in any order.
    with implementation("triton"), deterministic():
        expected = run(warp, (image, disp), choice="triton", device=triton_device)
        compiled = torch.compile(warp, fullgraph=True, backend="aot_eager")
        actual = run(compiled, (image, disp), choice="triton", device=triton_device)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)

        class Module(torch.nn.Module):
            def forward(self, image: Tensor, disp: Tensor) -> Tensor:
                return warp(image, disp)

        program = torch.export.export(Module(), (image, disp))
        assert "ulae_rt.warp.default" in program.graph_module.code
        assert_equal("exported", program.module()(image, disp).cpu(), expected[0])


def test_autocast_changes_nothing(triton_device: torch.device) -> None:
    image, disp = (x.to(triton_device) for x in pair((1, 1, 3, 4, 5), TYPES["fp32"]))
    with implementation("triton"):
        expected = warp(image, disp)
        with torch.autocast(triton_device.type, dtype=torch.bfloat16):
            assert_equal("autocast", warp(image, disp), expected)


def test_no_second_derivative(triton_device: torch.device) -> None:
    image, disp = (
        x.to(triton_device).requires_grad_() for x in pair((1, 1, 3, 4, 5), TYPES["fp32"])
    )
    with implementation("triton"):
        (grad,) = torch.autograd.grad(warp(image, disp).square().sum(), disp, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward()


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    image, disp = pair((1, 1, 3, 4, 5), TYPES["fp32"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    with pytest.raises(BackendUnavailable, match=r"cannot run: they need a CUDA tensor, got one"):
        warp(image, disp)
    with pytest.raises(BackendUnavailable, match=r"cannot run: they need a CUDA tensor, got one"):
        torch.ops.ulae_rt.warp(image, disp, "zeros", "linear", 1)
    monkeypatch.setattr(_launch, "TRITON_INSTALLED", False)
    with pytest.raises(BackendUnavailable, match="cannot run: triton is not installed"):
        warp(image, disp)
    monkeypatch.setenv("ULAE_RT_KERNELS", "auto")
    warp(image, disp)
