"""``diffusion`` against closed forms and a plain computation."""

import pytest
import torch

from _support import plain_ulae as plain
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError
from ulae_rt.kernels import diffusion


@pytest.mark.parametrize("shape", [(1, 3, 7, 11, 5), (2, 3, 2, 3, 4), (3, 3, 2, 2, 2)], ids=str)
def test_against_plain(shape: tuple[int, ...]) -> None:
    disp = 8 * noise(*shape) - 4
    assert_close("float64", diffusion(disp), plain.smoothness(disp), TOL["op float64"])
    actual = diffusion(disp.float())
    assert actual.dtype == torch.float32
    assert actual.ndim == 0
    assert_close("float32", actual / plain.smoothness(disp), torch.ones(()), TOL["op float32"])


def test_of_a_linear_field() -> None:
    """u_c(p) = sum_i A[c, i] p_i: every difference along i is A[:, i]."""
    matrix = noise(3, 3) - 0.5
    lattice = torch.stack(
        torch.meshgrid(*[torch.arange(s).double() for s in (4, 6, 5)], indexing="ij")
    )
    disp = torch.einsum("ci,idhw->cdhw", matrix, lattice)[None]
    expected = matrix.square().mean(dim=0).sum() / 3
    assert_close("linear", diffusion(disp), expected, TOL["op float64"])
    assert_close("translated", diffusion(disp + 100), expected, TOL["op float64"])


def test_by_hand() -> None:
    disp = torch.zeros(1, 3, 2, 1, 3, dtype=torch.float64)
    disp[0, 1, 0, 0] = torch.tensor([0.0, 1.0, 3.0])
    # Along d 9 differences, three of them 0, 1, 3; along h none; along w 12, two of them 1 and 2.
    expected = torch.tensor(((1 + 9) / 9 + 0 + (1 + 4) / 12) / 3, dtype=torch.float64)
    assert_close("by hand", diffusion(disp), expected, TOL["op float64"])


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_an_axis_of_one_voxel_adds_nothing(axis: int) -> None:
    disp = (8 * noise(2, 3, 4, 5, 6) - 4).narrow(axis, 1, 1).requires_grad_()
    others = [i for i in (2, 3, 4) if i != axis]
    expected = sum(disp.diff(dim=i).square().mean() for i in others) / 3
    actual = diffusion(disp)
    assert_close("two axes", actual, torch.as_tensor(expected), TOL["op float64"])
    (grad,) = torch.autograd.grad(actual, disp)
    assert torch.isfinite(grad).all()


def test_of_one_voxel_is_zero() -> None:
    disp = torch.ones(1, 3, 1, 1, 1, requires_grad=True)
    assert_equal("value", diffusion(disp).detach(), torch.zeros(()))


@pytest.mark.parametrize("shape", [(1, 3, 3, 4, 2), (2, 3, 2, 1, 3)], ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(diffusion, ((4 * noise(*shape) - 2).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_summed_in_float32(dtype: torch.dtype) -> None:
    disp = (100 * noise(1, 3, 40, 40, 40)).to(dtype)
    actual = diffusion(disp)
    assert_equal("value", actual, diffusion(disp.float()))
    assert torch.isfinite(actual)  # the sum of squares is 3e8, beyond fp16


def test_layouts_do_not_matter() -> None:
    disp = 8 * noise(2, 3, 4, 5, 6) - 4
    expected = diffusion(disp)
    for x in (
        disp.to(memory_format=torch.channels_last_3d),
        disp.transpose(2, 4).contiguous().transpose(2, 4),
        torch.nn.functional.pad(disp, [1, 1])[..., 1:-1],
    ):
        assert_close("diffusion", diffusion(x), expected, TOL["op float64"])


def test_axes_are_alike() -> None:
    disp = 8 * noise(1, 3, 4, 5, 6) - 4
    expected = diffusion(disp)
    assert_close("permuted", diffusion(disp.permute(0, 1, 4, 2, 3)), expected, TOL["op float64"])
    assert_close("flipped", diffusion(disp.flip(2, 4)), expected, TOL["op float64"])


def test_bad_input() -> None:
    disp = torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(ShapeError, match=r"disp has shape \(1, 2, 4, 4, 4\), expected \(1, 3, 4"):
        diffusion(disp[:, :2])
    with pytest.raises(ShapeError, match=r"disp has shape \(3, 4, 4, 4\), expected \(B, C, D"):
        diffusion(disp[0])
    with pytest.raises(DtypeError, match=r"diffusion: disp is torch\.int16, expected a floating"):
        diffusion(disp.to(torch.int16))
