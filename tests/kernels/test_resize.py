"""``resize_displacement``: reference against SciPy, kernel against reference, operator checks."""

import pytest
import torch
from torch import Tensor

from _support.kernels import assert_kernel_as_good, implementation, run
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import resize_displacement

SHAPES = [(1, 3, 1, 1, 1), (2, 3, 2, 3, 5), (1, 3, 1, 4, 3), (1, 3, 5, 1, 10)]
SHAPE_IDS = [f"b{b}-{d}x{h}x{w}" for b, _, d, h, w in SHAPES]


def displacement(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return (4 * noise(*shape, seed=5) - 2).to(dtype)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=SHAPE_IDS[1:])
def test_against_scipy(shape: tuple[int, ...], factor: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")  # a GPU machine may have no more than torch
    disp = displacement(shape)
    sizes = [factor * size for size in shape[2:]]
    points = torch.meshgrid(
        *[
            torch.arange(n, dtype=torch.float64) * (s - 1) / (n - 1)
            for s, n in zip(shape[2:], sizes, strict=True)
        ],
        indexing="ij",
    )
    for b in range(shape[0]):
        for c in range(3):
            expected = factor * ndimage.map_coordinates(
                disp[b, c].numpy(), torch.stack(points).numpy(), order=1, mode="nearest"
            )
            actual = resize_displacement(disp, factor)[b, c]
            assert_close("resize", actual, torch.from_numpy(expected), TOL["op float64"])


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_kernel(shape: tuple[int, ...], factor: int, triton_device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        inputs = (displacement(shape, dtype),)
        assert_kernel_as_good(
            str(dtype), lambda u: resize_displacement(u, factor), inputs, triton_device
        )


def test_a_constant_and_a_ramp_stay(triton_device: torch.device) -> None:
    """Corners are aligned: the first and the last value stay, and what lies between is a line."""
    disp = torch.zeros(1, 3, 2, 2, 5)
    disp[:, 1] = 1.5
    disp[:, 2] = torch.arange(5.0)
    with implementation("triton"):
        out = resize_displacement(disp.to(triton_device), 2).cpu()
    assert_equal("zero", out[:, 0], torch.zeros_like(out[:, 0]))
    assert_equal("constant", out[:, 1], torch.full_like(out[:, 1], 3.0))
    ramp = torch.linspace(0, 8, 10).expand(1, 4, 4, 10)
    assert_close("ramp", out[:, 2], ramp, TOL["op float32"])


def test_the_gradient_is_the_adjoint_and_the_same_every_time(triton_device: torch.device) -> None:
    disp = displacement((1, 3, 3, 4, 5))
    first = run(lambda u: resize_displacement(u, 4), (disp,), choice="triton", device=triton_device)
    again = run(lambda u: resize_displacement(u, 4), (disp,), choice="triton", device=triton_device)
    assert torch.equal(first[1], again[1])
    with implementation("triton"):
        grad = noise(1, 3, 12, 16, 20, seed=9)
        leaf = disp.clone().to(triton_device).requires_grad_()
        out = resize_displacement(leaf, 4)
        out.backward(grad.to(triton_device))
    assert leaf.grad is not None
    left, right = float((out.detach().cpu() * grad).sum()), float((disp * leaf.grad.cpu()).sum())
    assert abs(left - right) < 1e-11 * abs(left)


def test_gradcheck(triton_device: torch.device) -> None:
    disp = displacement((1, 3, 2, 1, 3)).to(triton_device).requires_grad_()
    with implementation("triton"):
        assert torch.autograd.gradcheck(
            lambda u: resize_displacement(u, 2), (disp,), fast_mode=True
        )


def test_opcheck(triton_device: torch.device) -> None:
    disp = displacement((2, 3, 2, 3, 2), torch.float32).to(triton_device)
    for need in (True, False):
        torch.library.opcheck(
            torch.ops.ulae_rt.resize_displacement.default,
            (disp.clone().requires_grad_(need), 2),
        )
    grad = noise(2, 3, 4, 6, 4, dtype=torch.float32).to(triton_device)
    torch.library.opcheck(torch.ops.ulae_rt.resize_displacement_backward.default, (grad, 2))


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"resize_displacement: disp has shape \(1, 2, 4, 4, 4\)"):
        resize_displacement(torch.zeros(1, 2, 4, 4, 4), 2)
    with pytest.raises(DtypeError, match=r"disp is torch\.int32, expected a floating type"):
        resize_displacement(torch.zeros(1, 3, 4, 4, 4, dtype=torch.int32), 2)
    with pytest.raises(UsageError, match="factor is 0, expected a positive integer"):
        resize_displacement(torch.zeros(1, 3, 4, 4, 4), 0)
