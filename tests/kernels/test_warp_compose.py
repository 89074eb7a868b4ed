"""``warp_compose`` is its two parts, bit for bit, and their gradients."""

import pytest
import torch

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, off_lattice_displacement
from ulae_rt.errors import DtypeError, ShapeError
from ulae_rt.kernels import compose, warp, warp_compose

SHAPES = [(1, 1, 1, 1, 1), (1, 1, 7, 11, 5), (2, 3, 5, 8, 3), (2, 2, 1, 6, 7), (1, 1, 6, 1, 2)]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_parts(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch, _, *sizes = shape
    image = noise(*shape, seed=1, dtype=dtype)
    a = (4 * noise(batch, 3, *sizes, seed=2) - 2).to(dtype)
    b = off_lattice_displacement(shape[2:], reach=3, batch=batch, seed=3, dtype=dtype)
    warped, composed = warp_compose(image, a, b)
    assert_equal("warp", warped, warp(image, b))
    assert_equal("compose", composed, compose(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_images_with_float32_displacements(dtype: torch.dtype) -> None:
    image = noise(1, 1, 6, 5, 4).to(dtype)
    a = noise(1, 3, 6, 5, 4, seed=1, dtype=torch.float32)
    b = off_lattice_displacement((6, 5, 4), dtype=torch.float32)
    warped, composed = warp_compose(image, a, b)
    assert_equal("warp", warped, warp(image, b))
    assert_equal("compose", composed, compose(a, b))


@pytest.mark.parametrize("double", [0, 1, 2], ids=["image", "disp_a", "disp_b"])
def test_one_float64_input_makes_what_it_touches_float64(double: int) -> None:
    inputs = [
        noise(1, 1, 6, 5, 4, seed=1, dtype=torch.float32),
        noise(1, 3, 6, 5, 4, seed=2, dtype=torch.float32),
        off_lattice_displacement((6, 5, 4), dtype=torch.float32),
    ]
    inputs[double] = inputs[double].double()
    image, a, b = inputs
    warped, composed = warp_compose(image, a, b)
    assert (warped.dtype, composed.dtype) == (warp(image, b).dtype, compose(a, b).dtype)
    assert_close("warp", warped, warp(image, b), TOL["op float32"])
    assert_close("compose", composed, compose(a, b), TOL["op float32"])


@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    image = noise(batch, 2, 4, 2, 3, seed=1).requires_grad_()
    a = (4 * noise(batch, 3, 4, 2, 3, seed=2) - 2).requires_grad_()
    b = off_lattice_displacement((4, 2, 3), batch=batch, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(warp_compose, (image, a, b), eps=1e-6)


def test_gradients_are_those_of_its_parts() -> None:
    image = noise(1, 1, 5, 6, 4, seed=1).requires_grad_()
    a = (4 * noise(1, 3, 5, 6, 4, seed=2) - 2).requires_grad_()
    b = off_lattice_displacement((5, 6, 4), seed=3).requires_grad_()
    weight_w, weight_c = noise(1, 1, 5, 6, 4, seed=4), noise(1, 3, 5, 6, 4, seed=5)
    warped, composed = warp_compose(image, a, b)
    together = (warped * weight_w).sum() + (composed * weight_c).sum()
    apart = (warp(image, b) * weight_w).sum() + (compose(a, b) * weight_c).sum()
    wanted = torch.autograd.grad(apart, [image, a, b])
    for name, x, y in zip("iab", torch.autograd.grad(together, [image, a, b]), wanted, strict=True):
        assert_close(name, x, y, TOL["op float64"])


def test_bad_input() -> None:
    image, disp = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(ShapeError, match=r"warp_compose: image has shape \(1, 4, 4, 4\)"):
        warp_compose(image[0], disp, disp)
    with pytest.raises(ShapeError, match=r"warp_compose: disp_a has shape .*expected \(1, 3, 4"):
        warp_compose(image, disp[..., :2], disp)
    with pytest.raises(ShapeError, match=r"warp_compose: disp_b has shape .*expected \(1, 3, 4"):
        warp_compose(image, disp, disp[:, :2])
    with pytest.raises(DtypeError, match=r"warp_compose: disp_b is torch\.int64, expected a float"):
        warp_compose(image, disp, disp.long())
