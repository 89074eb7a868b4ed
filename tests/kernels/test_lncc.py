"""``lncc`` and ``multi_window_lncc`` against a dense convolution in float64 and by hand."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from _support import plain_ulae as plain
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, smooth_image
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import LnccTo, lncc, multi_window_lncc, weighted_lncc
from ulae_rt.kernels.lncc.reference import box_sum

SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 7, 13, 11),
    (2, 1, 5, 3, 8),
    (1, 1, 1, 9, 6),
    (2, 1, 6, 1, 1),
    (3, 1, 2, 2, 2),
]


def plain_ncc(x: Tensor, y: Tensor, window: int, eps: float = 1e-5) -> Tensor:
    """Channels are volumes of their own: the mean over all of them."""
    x, y = x.double().flatten(0, 1)[:, None], y.double().flatten(0, 1)[:, None]
    return plain.ncc(x, y, window, eps)


# Independent oracles


@pytest.mark.parametrize("window", [1, 3, 5, 9, 11, 13])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense_convolution(shape: tuple[int, ...], window: int) -> None:
    x, y = noise(*shape, seed=1), noise(*shape, seed=2)
    expected = plain_ncc(x, y, window)
    assert_close("float64", lncc(x, y, window), expected, TOL["op float64"])
    actual = lncc(x.float(), y.float(), window)
    assert actual.dtype == torch.float32
    assert actual.ndim == 0
    assert_close("float32", actual, expected, TOL["lncc float32"])


def test_against_dense_convolution_on_a_brain_like_pair() -> None:
    x, y = smooth_image((24, 28, 20), seed=1), smooth_image((24, 28, 20), seed=2)
    actual = multi_window_lncc(x.float(), y.float())
    expected = torch.stack([plain_ncc(x, y, w) for w in (11, 9, 7)])
    assert_close("float64", multi_window_lncc(x, y), expected, TOL["op float64"])
    assert_close("float32", actual, expected, TOL["lncc float32"])


def test_channels_are_compared_each_with_its_own() -> None:
    x, y = noise(2, 3, 6, 5, 7, seed=1), noise(2, 3, 6, 5, 7, seed=2)
    assert_close("three channels", lncc(x, y, 5), plain_ncc(x, y, 5), TOL["op float64"])


def test_one_voxel_by_hand() -> None:
    """n counts the zeros around it: X = V = 26/27 of the product."""
    x, y = torch.full((1, 1, 1, 1, 1), 2.0).double(), torch.full((1, 1, 1, 1, 1), 3.0).double()
    share = 26 / 27
    expected = (6 * share) ** 2 / (4 * share * 9 * share + 1e-5)
    assert float(lncc(x, y, window=3)) == pytest.approx(expected, abs=1e-12)
    assert float(lncc(x, y, window=1)) == 0.0  # a window of one voxel has no variance


def test_two_voxels_by_hand() -> None:
    """x = (1, 2), y = (2, 1): sums 3, 3, 4, 5, 5, so X = 11/3 and V = 14/3 in both windows."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 1, 1, 1, 2)
    expected = (11 / 3) ** 2 / ((14 / 3) ** 2 + 1e-5)
    assert float(lncc(x, x.flip(4), window=3)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_box_sum_of_ones_counts_voxels(window: int) -> None:
    sizes = (5, 4, 9)
    counts = [
        [min(i + window // 2, s - 1) - max(i - window // 2, 0) + 1 for i in range(s)] for s in sizes
    ]
    expected = torch.tensor([math.prod(c) for c in itertools.product(*counts)]).view(1, 1, *sizes)
    assert_equal("counts", box_sum(torch.ones(1, 1, *sizes), window), expected.float())


def test_several_windows_are_each_alone() -> None:
    x, y = noise(2, 1, 9, 7, 8, seed=1), noise(2, 1, 9, 7, 8, seed=2)
    together = multi_window_lncc(x, y, windows=(11, 3, 7))
    assert together.shape == (3,)
    assert_equal("windows", together, torch.stack([lncc(x, y, w) for w in (11, 3, 7)]))
    assert_equal("default", multi_window_lncc(x, y), multi_window_lncc(x, y, [11, 9, 7]))


def test_eps_is_used() -> None:
    x, y = noise(1, 1, 6, 6, 6, seed=1), noise(1, 1, 6, 6, 6, seed=2)
    expected = plain_ncc(x, y, 5, eps=0.5)
    assert_close("eps", lncc(x, y, window=5, eps=0.5), expected, TOL["op float64"])
    assert abs(float(expected - plain_ncc(x, y, 5))) > 1e-3


# Properties


def test_symmetric() -> None:
    x, y = noise(1, 2, 8, 7, 6, seed=1), noise(1, 2, 8, 7, 6, seed=2)
    assert_close("swapped", lncc(x, y), lncc(y, x), TOL["op float64"])


@pytest.mark.parametrize("axes", list(itertools.permutations((2, 3, 4)))[1:], ids=str)
def test_axes_are_alike(axes: tuple[int, int, int]) -> None:
    x, y = noise(1, 1, 8, 7, 6, seed=1), noise(1, 1, 8, 7, 6, seed=2)
    expected = multi_window_lncc(x, y)
    actual = multi_window_lncc(x.permute(0, 1, *axes), y.permute(0, 1, *axes))
    assert_close("permuted", actual, expected, TOL["op float64"])
    assert_close("flipped", multi_window_lncc(x.flip(2), y.flip(2)), expected, TOL["op float64"])


def test_an_image_with_itself_is_one() -> None:
    x = noise(1, 1, 12, 11, 13)
    for sign in (1, -1):
        assert_close("itself", lncc(x, sign * x), torch.ones(()), TOL["lncc of itself"])


def test_scale_does_not_matter() -> None:
    """Up to eps, taken out here; windows at the faces see zeros, which scale along."""
    x, y = noise(1, 1, 9, 8, 7, seed=1), noise(1, 1, 9, 8, 7, seed=2)
    expected = lncc(x, y, eps=1e-12)
    assert_close("scaled", lncc(7 * x, -0.2 * y, eps=1e-12), expected, TOL["op float64"])


def interior(x: Tensor, y: Tensor, window: int) -> Tensor:
    """The mean over the voxels whose windows lie inside, from the means of the whole.

    Voxels near a face see the zeros beyond it, where an offset of the volume makes a step.
    """
    radius = window // 2
    inner = (..., *[slice(radius, -radius)] * 3)
    sums = box_sum(torch.cat((x, y, x * y, x * x, y * y)), window)[inner]
    n = window**3
    s_x, s_y, s_xy, s_xx, s_yy = sums
    cross = s_xy - s_x * s_y / n
    return (cross**2 / ((s_xx - s_x**2 / n) * (s_yy - s_y**2 / n) + 1e-5)).mean()


def test_scale_and_offset_do_not_matter_inside() -> None:
    x, y = noise(1, 1, 12, 11, 10, seed=1), noise(1, 1, 12, 11, 10, seed=2)
    expected = interior(x, y, 5)
    assert_close("affine", interior(3 * x + 10, y - 4, 5), expected, TOL["lncc offset float64"])


def test_large_offset() -> None:
    """Intensities in [0, 1] are the contract. Far from it precision goes, the range stays."""
    x, y = noise(1, 1, 20, 18, 16, seed=1), noise(1, 1, 20, 18, 16, seed=2)
    for offset, tolerance in ((1, "10"), (10, "10"), (1000, "1000")):
        expected = plain_ncc(x + offset, y + offset, 9)
        actual = lncc(x + offset, y + offset)
        assert_close(f"float64, {offset}", actual, expected, TOL["lncc offset float64"])
        a = (x + offset).float().requires_grad_()
        actual = lncc(a, (y + offset).float())
        (grad,) = torch.autograd.grad(actual, a)
        assert torch.isfinite(grad).all()
        name = f"lncc offset {tolerance} float32"
        assert_close(f"float32, {offset}", actual, expected, TOL[name])


def test_a_correlation_never_exceeds_one_in_float32() -> None:
    """Where rounding takes the variance away and leaves the covariance."""
    x = 1000 + noise(1, 1, 16, 16, 16, seed=1).float()
    y = 1000 + noise(1, 1, 16, 16, 16, seed=2).float()
    for window in (3, 5, 7, 9, 11):
        assert 0 <= float(lncc(x, y, window)) <= 1


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("other", ["constant", "texture"])
def test_constant_volumes(value: float, other: str) -> None:
    """No variance inside is a correlation of 0 there; only the faces, a step to zero, count."""
    x = torch.full((1, 1, 12, 12, 12), value, requires_grad=True)
    y = x.detach().clone() if other == "constant" else noise(1, 1, 12, 12, 12).float()
    actual = lncc(x, y, window=5)
    (grad,) = torch.autograd.grad(actual, x)
    assert torch.isfinite(actual)
    assert torch.isfinite(grad).all()
    if value == 0:
        assert float(actual.detach()) == 0
    inner = plain_ncc(x.detach(), y, 5)
    assert_close("float64", lncc(x.detach().double(), y.double(), 5), inner, TOL["op float64"])
    assert_close("float32", actual.detach(), inner, TOL["lncc flat float32"])


def test_flat_regions_stay_in_range_in_float32() -> None:
    """Rounding makes a variance of zero slightly negative; the quotient must not follow it."""
    x = torch.full((1, 1, 16, 16, 16), 0.7)
    x += 1e-4 * noise(1, 1, 16, 16, 16, seed=1).float()
    y = noise(1, 1, 16, 16, 16, seed=2).float()
    out = multi_window_lncc(x, y)
    assert bool(((out >= 0) & (out <= 1)).all())


# Gradients


@pytest.mark.parametrize("shape", [(1, 1, 4, 3, 5), (2, 2, 3, 2, 3), (1, 1, 1, 4, 3)], ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x, y = noise(*shape, seed=1).requires_grad_(), noise(*shape, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: multi_window_lncc(a, b, (3, 5)), (x, y))


def test_gradients_against_dense_convolution() -> None:
    """With other weights for every window, as the loss has."""
    x = noise(1, 1, 9, 8, 10, seed=1).requires_grad_()
    y = noise(1, 1, 9, 8, 10, seed=2).requires_grad_()
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    expected = sum(w * plain_ncc(x, y, k) for w, k in zip(weights, (11, 9, 7), strict=True))
    wanted = torch.autograd.grad(torch.as_tensor(expected), [x, y])
    got = torch.autograd.grad((weights * multi_window_lncc(x, y)).sum(), [x, y])
    for name, a, b in zip("xy", got, wanted, strict=True):
        assert_close(name, a / b.abs().max(), b / b.abs().max(), TOL["op float64"])


def test_gradient_in_float32() -> None:
    x = smooth_image((14, 12, 16), seed=1)
    y = smooth_image((14, 12, 16), seed=2)
    grads = []
    for dtype in (torch.float64, torch.float32):
        a = x.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(multi_window_lncc(a, y.to(dtype)).sum(), a)[0])
    scale = grads[0].abs().max()
    assert_close("gradient", grads[1] / scale, grads[0] / scale, TOL["lncc gradient float32"])


# The weighted sum


def test_weighted_sum() -> None:
    x = noise(1, 2, 6, 5, 7, seed=1).requires_grad_()
    y = noise(1, 2, 6, 5, 7, seed=2).requires_grad_()
    weights = (1.0, -0.5, 0.0)
    total, means = weighted_lncc(x, y, (5, 3, 7), weights)
    plainly = multi_window_lncc(x, y, (5, 3, 7))
    assert total.ndim == 0
    assert not means.requires_grad
    assert_equal("means", means, plainly.detach())
    expected = plainly[0] - 0.5 * plainly[1]
    assert_close("total", total, expected, TOL["op float64"])
    wanted = torch.autograd.grad(3 * expected, [x, y])
    for name, a, b in zip("xy", torch.autograd.grad(3 * total, [x, y]), wanted, strict=True):
        assert_close(name, a, b, TOL["op float64"])
    with torch.no_grad():
        assert weighted_lncc(x, y, (5,), (1.0,))[0].grad_fn is None
    assert weighted_lncc(x.half(), y.bfloat16(), (5,), (1.0,))[0].dtype == torch.float32


# Against one image


@pytest.mark.parametrize("window", [3, 5])
def test_against_one_image_it_is_the_same_with_its_gradient(window: int) -> None:
    y = noise(2, 2, 7, 6, 9, seed=2)
    y[:, :, :4] = 0.25  # where one image says nothing, nothing but rounding is left
    to_y = LnccTo(y, window)
    for seed in (1, 5):
        x = noise(2, 2, 7, 6, 9, seed=seed)
        x[:, :, :, 4:] = 0.5
        wanted = lncc(x.requires_grad_(), y, window)
        value, gradient = to_y(x)
        assert_close("value", value, wanted.detach(), TOL["op float64"])
        assert gradient.abs().amax() > 1e-4
        (by_x,) = torch.autograd.grad(wanted, x)
        assert_close("gradient", gradient, by_x, TOL["op float64"])
        assert not value.requires_grad
        assert not gradient.requires_grad


def test_against_the_image_itself_the_gradient_is_that_of_a_tie() -> None:
    y = noise(1, 1, 6, 7, 8, seed=3)
    x = y.clone().requires_grad_()
    (by_x,) = torch.autograd.grad(lncc(x, y, 3), x)
    value, gradient = LnccTo(y, 3)(y)
    assert_close("value", value, lncc(y, y, 3), TOL["op float64"])
    assert_close("gradient", gradient, by_x, TOL["op float64"])


@pytest.mark.follows("convert it: y.float()", "x.to({})")
def test_against_one_image_other_images_are_refused() -> None:
    y = noise(1, 1, 6, 7, 8)
    with pytest.raises(DtypeError, match=r"y is torch\.float16, expected float32"):
        LnccTo(y.half())
    LnccTo(y.half().float())
    with pytest.raises(UsageError, match="window is 4"):
        LnccTo(y, 4)
    with pytest.raises(ShapeError, match="y has shape"):
        LnccTo(y, 3)(y[:, :, 1:])
    with pytest.raises(DtypeError, match=r"x is torch\.float32, expected torch"):
        LnccTo(y, 3)(y.float())
    LnccTo(y, 3)(y.float().to(torch.float64))


# Types and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_summed_in_float32(dtype: torch.dtype) -> None:
    """8-bit intensities: their squares summed over a window are 6e7, far beyond fp16."""
    x = (255 * noise(1, 1, 12, 12, 12, seed=1)).to(dtype)
    y = (255 * noise(1, 1, 12, 12, 12, seed=2)).to(dtype)
    actual = multi_window_lncc(x, y)
    assert_equal("value", actual, multi_window_lncc(x.float(), y.float()))
    assert torch.isfinite(actual).all()


def test_float64_when_either_is() -> None:
    x, y = noise(1, 1, 6, 6, 6, seed=1), noise(1, 1, 6, 6, 6, seed=2)
    assert_equal("value", lncc(x.float(), y), lncc(x.float().double(), y))


def test_layouts_do_not_matter() -> None:
    x, y = noise(2, 3, 5, 6, 7, seed=1), noise(2, 3, 5, 6, 7, seed=2)
    expected = lncc(x, y, 5)
    last = torch.channels_last_3d
    actual = lncc(x.to(memory_format=last), y.transpose(2, 4).contiguous().transpose(2, 4), 5)
    assert_close("lncc", actual, expected, TOL["op float64"])
    actual = lncc(x[:1].expand(2, -1, -1, -1, -1), y, 5)
    assert_close("expanded", actual, lncc(x[:1].repeat(2, 1, 1, 1, 1), y, 5), TOL["op float64"])


def test_nan_shows() -> None:
    x, y = noise(1, 1, 6, 6, 6, seed=1), noise(1, 1, 6, 6, 6, seed=2)
    x[0, 0, 3, 3, 3] = float("nan")
    assert torch.isnan(lncc(x, y))


# Bad input


def test_bad_input() -> None:
    x = torch.zeros(1, 1, 4, 4, 4)
    weighted = partial(weighted_lncc, windows=(3,), weights=(1.0,))
    for op in (lncc, multi_window_lncc, weighted):
        with pytest.raises(ShapeError, match=r"lncc: x has shape \(4, 4, 4\), expected \(B, C, D"):
            op(x[0, 0], x)
        with pytest.raises(ShapeError, match=r"lncc: y has shape \(1, 1, 4, 4, 3\), expected \(1"):
            op(x, x[..., :3])
        with pytest.raises(DtypeError, match=r"lncc: y is torch\.uint8, expected a floating type"):
            op(x, x.byte())
        with pytest.raises(ShapeError, match="lncc: y is on meta, expected cpu as x"):
            op(x, x.to("meta"))
    for window in (4, 0, -3):
        with pytest.raises(UsageError, match=f"window is {window}, expected a positive odd"):
            lncc(x, x, window=window)
    with pytest.raises(UsageError, match="window is 6, expected a positive odd"):
        multi_window_lncc(x, x, windows=(9, 6))
    with pytest.raises(UsageError, match="windows is empty, expected at least one odd size"):
        multi_window_lncc(x, x, windows=())
    with pytest.raises(UsageError, match="2 weights for 3 windows, expected one for each"):
        weighted_lncc(x, x, (11, 9, 7), (1.0, 0.5))
