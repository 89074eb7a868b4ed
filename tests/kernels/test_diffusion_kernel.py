"""The Triton kernels of ``diffusion`` against the reference, and as torch operators."""

from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import assert_kernel_as_good, implementation, run
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable, DtypeError, ShapeError
from ulae_rt.kernels import _launch, diffusion, diffusion_with_gradient

SHAPES = [
    (1, 3, 1, 1, 1),
    (2, 3, 3, 5, 7),
    (1, 3, 1, 9, 8),
    (1, 3, 9, 1, 8),
    (1, 3, 5, 8, 1),
    (1, 3, 9, 34, 33),  # past one block along every axis
]
TYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def field(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (8 * noise(*shape, seed=seed) - 4).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], triton_device: torch.device) -> None:
    assert_kernel_as_good("diffusion", diffusion, [field(shape)], triton_device)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_marches_of_every_length(
    multiprocessors: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more programs run at a time, each has fewer slices: in the interpreter 5 and 1."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda tensor: multiprocessors)
    assert_kernel_as_good("diffusion", diffusion, [field((1, 3, 9, 34, 33))], triton_device)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_types(dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = [field((2, 3, 4, 5, 7), dtype)]
    assert_kernel_as_good("diffusion", diffusion, inputs, triton_device)


@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 7), (1, 3, 1, 4, 1), (1, 3, 1, 1, 1)], ids=str)
def test_value_with_gradient(
    shape: tuple[int, ...], choice: str, triton_device: torch.device
) -> None:
    """What autograd finds in the reference, from one call and with a weight."""
    device = triton_device if choice == "triton" else torch.device("cpu")
    disp = field(shape, torch.float64)
    leaf = disp.clone().requires_grad_()
    with implementation("reference"):
        loss = diffusion(leaf)
        (wanted,) = torch.autograd.grad(2.5 * loss, leaf)
    with implementation(choice), torch.inference_mode():
        value, grad = diffusion_with_gradient(disp.to(device), 2.5)
        plain = diffusion_with_gradient(disp.to(device))[1]
    assert_close("value", value.cpu(), loss, TOL["op float64"])
    assert_close("gradient", grad.cpu(), wanted, TOL["op float64"])
    assert_close("without weight", 2.5 * plain.cpu(), wanted, TOL["op float64"])
    with implementation(choice):
        value, grad = diffusion_with_gradient(leaf.half().to(device))
        assert (value.dtype, grad.dtype) == (torch.float32, torch.float16)
        assert not value.requires_grad
        assert not grad.requires_grad


def test_half_is_summed_in_float32(triton_device: torch.device) -> None:
    disp = (100 * noise(1, 3, 40, 40, 40)).half()
    with implementation("triton"):
        actual = diffusion(disp.to(triton_device))
    # The sum of squares is 3e8, beyond fp16.
    expected = diffusion(disp.double())
    assert_close("value", actual.cpu() / expected, torch.ones(()), TOL["op float32"])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_of_a_linear_field(offset: float, triton_device: torch.device) -> None:
    """u_c(p) = sum_i A[c, i] p_i: every difference along i is A[:, i]; inside, nothing pulls."""
    matrix = noise(3, 3) - 0.5
    lattice = torch.stack(
        torch.meshgrid(*[torch.arange(s).double() for s in (4, 6, 5)], indexing="ij")
    )
    disp = torch.einsum("ci,idhw->cdhw", matrix, lattice)[None] + offset
    expected = matrix.square().mean(dim=0).sum() / 3
    with implementation("triton"):
        loss, grad = diffusion_with_gradient(disp.to(triton_device))
    assert_close("linear", loss.cpu(), expected, TOL["op float64"])
    inside = grad[:, :, 1:-1, 1:-1, 1:-1].cpu()
    assert_close("inside", inside, torch.zeros_like(inside), TOL["op float64"])
    assert_close("no net force", grad.sum(dim=(2, 3, 4)).cpu(), torch.zeros(1, 3).double(),
                 TOL["op float64"])  # fmt: skip


def test_of_a_constant_is_zero_exactly(triton_device: torch.device) -> None:
    disp = torch.full((1, 3, 5, 6, 7), 12345.678, device=triton_device)
    with implementation("triton"):
        loss, grad = diffusion_with_gradient(disp)
    assert_equal("value", loss, torch.zeros_like(loss))
    assert_equal("gradient", grad, torch.zeros_like(grad))


def test_memory_layouts(triton_device: torch.device) -> None:
    disp = field((2, 3, 4, 5, 6)).to(triton_device)
    layouts = {
        "channels_last": disp.to(memory_format=torch.channels_last_3d),
        "permuted": disp.transpose(2, 4).contiguous().transpose(2, 4),
        "sliced": torch.nn.functional.pad(disp, [1, 1])[..., 1:-1],
        "offset": torch.cat((disp.flatten()[:3], disp.flatten()))[3:].view(disp.shape),
    }
    expected = run(diffusion, [disp], choice="triton", device=triton_device)
    for name, x in layouts.items():
        found = run(diffusion, [x], choice="triton", device=triton_device)
        for actual, wanted in zip(found, expected, strict=True):
            assert_equal(name, actual, wanted)
    with implementation("triton"):
        actual = diffusion(disp[:1].expand(2, -1, -1, -1, -1))
        assert_equal("expanded", actual, diffusion(disp[:1].repeat(2, 1, 1, 1, 1)))


def test_the_same_bits_every_time(triton_device: torch.device) -> None:
    disp = field((1, 3, 2, 33, 34))
    first = run(diffusion, [disp], choice="triton", device=triton_device)
    again = run(diffusion, [disp], choice="triton", device=triton_device)
    for a, b in zip(first, again, strict=True):
        assert_equal("again", b, a)


def test_gradcheck(triton_device: torch.device) -> None:
    for shape in ((1, 3, 3, 4, 2), (2, 3, 2, 1, 3)):
        disp = field(shape, torch.float64).to(triton_device).requires_grad_()
        with implementation("triton"):
            assert torch.autograd.gradcheck(diffusion, (disp,), fast_mode=True)


def test_opcheck(triton_device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        disp = field((1, 3, 3, 4, 5), dtype).to(triton_device)
        leaf = disp.clone().requires_grad_()
        torch.library.opcheck(torch.ops.ulae_rt.diffusion.default, (leaf,))
        weight = torch.ones((), device=triton_device)
        for need_loss in (True, False):
            torch.library.opcheck(
                torch.ops.ulae_rt.diffusion_gradient.default, (disp, weight, need_loss)
            )


def test_compile_and_export(triton_device: torch.device) -> None:
    disp = field((1, 3, 3, 4, 5)).to(triton_device)
    expected = run(diffusion, [disp], choice="triton", device=triton_device)
    compiled = torch.compile(diffusion, fullgraph=True, backend="aot_eager")
    found = run(compiled, [disp], choice="triton", device=triton_device)
    for a, b in zip(found, expected, strict=True):
        assert_equal("compiled", a, b)
    with implementation("triton"):
        both = torch.compile(partial(diffusion_with_gradient, weight=2.0), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
        for a, b in zip(both(disp), diffusion_with_gradient(disp, 2.0), strict=True):
            assert_equal("compiled", a, b)

        class Module(torch.nn.Module):
            def forward(self, disp: Tensor) -> Tensor:
                return diffusion(disp)

        program = torch.export.export(Module(), (disp,))
        assert "ulae_rt.diffusion.default" in program.graph_module.code
        assert_equal("exported", program.module()(disp).cpu(), expected[0])


def test_no_second_derivative(triton_device: torch.device) -> None:
    disp = field((1, 3, 3, 4, 5)).to(triton_device).requires_grad_()
    with implementation("triton"):
        (grad,) = torch.autograd.grad(diffusion(disp), disp, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.square().sum().backward()


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    disp = torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(ShapeError, match=r"diffusion_with_gradient: disp has shape \(1, 2, 4, 4"):
        diffusion_with_gradient(disp[:, :2])
    with pytest.raises(DtypeError, match=r"diffusion_with_gradient: disp is torch\.int16, expect"):
        diffusion_with_gradient(disp.to(torch.int16))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    for op in (diffusion, diffusion_with_gradient, torch.ops.ulae_rt.diffusion):
        with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
            op(disp)
