"""``norm_activate`` by its reference: against torch's own layers, and what must hold."""

import pytest
import torch
from torch.nn import functional as F

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError
from ulae_rt.kernels import norm_activate


@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 5), (2, 3, 4, 3, 2)], ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x = (4 * noise(*shape) - 2).requires_grad_()
    assert torch.autograd.gradcheck(norm_activate, (x,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_is_instance_norm_and_leaky_relu(layout: torch.memory_format) -> None:
    x = (4 * noise(2, 3, 5, 7, 4) + 3).contiguous(memory_format=layout).requires_grad_()
    upstream = noise(2, 3, 5, 7, 4, seed=1) - 0.5
    expected = F.leaky_relu(F.instance_norm(x, eps=1e-5), 0.2)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), x)
    actual = norm_activate(x)
    (got,) = torch.autograd.grad((actual * upstream).sum(), x)
    assert_close("forward", actual, expected, TOL["block float64"])
    assert_close("gradient", got, wanted, TOL["block float64"])
    with torch.no_grad():
        assert_equal("without gradients", norm_activate(x), actual.detach())


def test_of_constants_is_zero() -> None:
    x = torch.full((1, 2, 3, 3, 3), 7.0, requires_grad=True)
    y = norm_activate(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_equal("forward", y.detach(), torch.zeros_like(x))
    assert torch.isfinite(grad).all()


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"norm_activate: x has shape \(2, 3, 4\), expected \(B,"):
        norm_activate(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"x has shape \(1, 2, 0, 3, 4\), expected no empty axis"):
        norm_activate(torch.zeros(1, 2, 0, 3, 4))
    with pytest.raises(DtypeError, match=r"norm_activate: x is torch\.int32, expected a floating"):
        norm_activate(torch.zeros(1, 2, 3, 4, 5, dtype=torch.int32))
