"""``upsample_concat`` by its reference: against a plain computation, and what must hold."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import upsample_concat


def upsampled(x: Tensor, axis: int) -> Tensor:
    """Fine voxel i takes 3/4 of i // 2 and 1/4 of the next on its side, or of itself at a face."""
    size = x.shape[axis]
    fine = torch.arange(2 * size)
    near = fine // 2
    far = (near + 2 * (fine % 2) - 1).clamp(0, size - 1)
    return 0.75 * x.index_select(axis, near) + 0.25 * x.index_select(axis, far)


@pytest.mark.parametrize("shape", [(2, 3, 3, 4, 5), (1, 2, 1, 3, 2), (1, 1, 1, 1, 1)], ids=str)
def test_against_plain(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    skip = noise(shape[0], 2, *(2 * size for size in shape[2:]), seed=1)
    out = upsample_concat(x, skip)
    expected = upsampled(upsampled(upsampled(x, 2), 3), 4)
    assert_close("upsampled", out[:, : shape[1]], expected, TOL["op float64"])
    assert_equal("skip", out[:, shape[1] :], skip)


def test_against_interpolate() -> None:
    x, skip = noise(2, 3, 3, 4, 5), noise(2, 1, 6, 8, 10, seed=1)
    fine = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
    assert_close("interpolate", upsample_concat(x, skip)[:, :3], fine, TOL["op float64"])
    with_gradient = upsample_concat(x.requires_grad_(), skip).detach()[:, :3]
    assert_close("with a gradient", with_gradient, fine, TOL["op float64"])


@pytest.mark.parametrize("shape", [(2, 3, 3, 4, 5), (1, 2, 1, 3, 2), (1, 1, 1, 1, 1)], ids=str)
def test_gradient_against_interpolates(shape: tuple[int, ...]) -> None:
    x = noise(*shape).requires_grad_()
    skip = noise(shape[0], 2, *(2 * size for size in shape[2:]), seed=1).requires_grad_()
    fine = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
    weight = noise(shape[0], shape[1] + 2, *skip.shape[2:], seed=2)
    expected = torch.autograd.grad((torch.cat((fine, skip), dim=1) * weight).sum(), (x, skip))
    found = torch.autograd.grad((upsample_concat(x, skip) * weight).sum(), (x, skip))
    for name, a, b in zip(("x", "skip"), found, expected, strict=True):
        assert_close(name, a, b, TOL["op float64"])


@pytest.mark.parametrize("needs", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("width", [5, 6, 24])
def test_wider_than_its_channels(width: int, needs: bool) -> None:
    x, skip = noise(2, 3, 3, 4, 5), noise(2, 2, 6, 8, 10, seed=1)
    for each in (x, skip):
        each.requires_grad_(needs)
    found, expected = upsample_concat(x, skip, width=width), upsample_concat(x, skip)
    assert found.shape == (2, width, 6, 8, 10)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert_equal("x and skip", found[:, :5], expected)
    assert not found[:, 5:].any()  # nor NaN
    if needs:
        weight = noise(*found.shape, seed=2)
        grads = torch.autograd.grad(expected, (x, skip), weight[:, :5])
        weight[:, 5:] = torch.nan  # what is ignored
        for name, a, b in zip(
            ("x", "skip"), torch.autograd.grad(found, (x, skip), weight), grads, strict=True
        ):
            assert_equal(name, a, b)


def test_wider_than_its_channels_as_a_graph() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return upsample_concat(x, skip, width=8)

    inputs = noise(1, 3, 2, 2, 3), noise(1, 2, 4, 4, 6, seed=1)
    program = torch.export.export(Module(), inputs).module()
    expected = upsample_concat(*inputs, width=8)
    assert_close("exported", program(*inputs), expected, TOL["op float64"])


def test_of_a_constant_is_that_constant() -> None:
    out = upsample_concat(torch.full((1, 2, 2, 3, 4), 7.0), torch.zeros(1, 1, 4, 6, 8))
    assert_equal("constant", out[:, :2], torch.full((1, 2, 4, 6, 8), 7.0))


def test_gradcheck() -> None:
    x, skip = noise(1, 2, 2, 3, 1).requires_grad_(), noise(1, 1, 4, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(upsample_concat, (x, skip))
    assert torch.autograd.gradcheck(partial(upsample_concat, width=4), (x, skip))


def test_bad_input() -> None:
    x, skip = torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 1, 6, 8, 10)
    with pytest.raises(ShapeError, match=r"upsample_concat: x has shape \(2, 3, 4, 5\), expected"):
        upsample_concat(x[0], skip)
    with pytest.raises(ShapeError, match=r"skip has shape \(1, 6, 8, 10\), expected \(B, C, D"):
        upsample_concat(x, skip[0])
    with pytest.raises(ShapeError, match=r"skip has shape \(1, 1, 6, 8, 9\), expected \(1, 1, 6, "):
        upsample_concat(x, skip[..., 1:])
    with pytest.raises(ShapeError, match=r"shape \(1, 1, 6, 8, 10\), expected \(2, 1, 6, 8, 10\)"):
        upsample_concat(x.repeat(2, 1, 1, 1, 1), skip)
    with pytest.raises(DtypeError, match=r"skip is torch\.float16, expected torch\.float32 as x"):
        upsample_concat(x, skip.half())
    with pytest.raises(DtypeError, match=r"upsample_concat: x is torch\.int64, expected a float"):
        upsample_concat(x.long(), skip)
    with pytest.raises(ShapeError, match="skip is on meta, expected cpu as x"):
        upsample_concat(x, skip.to("meta"))


@pytest.mark.parametrize("width", [2, 0, -1])
@pytest.mark.follows("leave it out for {}")
def test_too_narrow(width: int) -> None:
    x, skip = torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 1, 6, 8, 10)
    message = f"width is {width}, expected at least the 2 channels of x and the 1 of skip"
    with pytest.raises(UsageError, match=message) as caught:
        upsample_concat(x, skip, width=width)
    assert caught.value.hint == "leave it out for 3"
    assert upsample_concat(x, skip).shape[1] == 3
