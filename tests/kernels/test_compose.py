"""``compose``: warping by one displacement after another, as one."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, off_lattice_displacement, smooth_displacement, wave_image
from ulae_rt.errors import DtypeError, ShapeError
from ulae_rt.kernels import compose, warp

SHAPES = [(1, 1, 1, 1), (1, 7, 11, 5), (2, 5, 8, 3), (2, 1, 6, 7), (3, 6, 1, 2)]


def scipy_compose(disp_a: Tensor, disp_b: Tensor) -> Tensor:
    out = np.empty(disp_a.shape)
    for b in range(disp_a.shape[0]):
        points = np.indices(disp_a.shape[2:]) + disp_b[b].numpy()
        for c in range(3):
            out[b, c] = ndimage.map_coordinates(
                disp_a[b, c].numpy(), points, order=1, mode="grid-constant", cval=0.0
            )
    return torch.from_numpy(out + disp_b.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_scipy(shape: tuple[int, int, int, int]) -> None:
    batch, *sizes = shape
    grid = (sizes[0], sizes[1], sizes[2])
    a = 4 * noise(batch, 3, *sizes, seed=1) - 2
    b = off_lattice_displacement(grid, reach=3, batch=batch, seed=2)
    expected = scipy_compose(a, b)
    assert_close("float64", compose(a, b), expected, TOL["op float64"])
    assert_close("float32", compose(a.float(), b.float()), expected, TOL["op float32"])


def test_by_hand() -> None:
    """Two shifts add up, component by component, where the second lands inside the first."""
    a = torch.zeros(1, 3, 1, 1, 5, dtype=torch.float64)
    b = torch.zeros_like(a)
    a[0, 0] = 10.0
    a[0, 2, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    b[0, 2] = 1.5
    out = compose(a, b)
    # At p + 1.5: the means of neighbours, then half of the last into the zeros, then nothing.
    expected = torch.tensor([3.0, 6.0, 12.0, 8.0, 0.0], dtype=torch.float64) + 1.5
    assert_close("w", out[0, 2, 0, 0], expected, TOL["op float64"])
    expected = torch.tensor([10.0, 10.0, 10.0, 5.0, 0.0], dtype=torch.float64)
    assert_close("d", out[0, 0, 0, 0], expected, TOL["op float64"])
    assert_equal("h", out[0, 1], torch.zeros_like(out[0, 1]))


def test_zero_is_neutral() -> None:
    u = smooth_displacement((9, 11, 7), reach=3.0, batch=2, dtype=torch.float32)
    zero = torch.zeros_like(u)
    assert_close("u then 0", compose(u, zero), u, TOL["identity"])
    assert_equal("0 then u", compose(zero, u), u)


def test_two_warps_are_one() -> None:
    sizes = (32, 36, 28)
    x = wave_image(sizes)
    a = smooth_displacement(sizes, reach=1.5, seed=2)
    b = smooth_displacement(sizes, reach=1.5, seed=3)
    inner = (..., slice(4, -4), slice(4, -4), slice(4, -4))
    twice, once = warp(warp(x, a), b)[inner], warp(x, compose(a, b))[inner]
    assert_close("warps", twice, once, TOL["second interpolation"])
    # The order matters, and the tolerance is tight enough to see it.
    reversed_order = warp(x, compose(b, a))[inner]
    assert float((twice - reversed_order).abs().max()) > 1.5 * TOL["second interpolation"].absolute


def test_is_warp_plus_displacement() -> None:
    a, b = 4 * noise(2, 3, 5, 6, 7) - 2, off_lattice_displacement((5, 6, 7), batch=2)
    assert_equal("compose", compose(a, b), warp(a, b) + b)


@pytest.mark.parametrize(("batch", "sizes"), [(1, (4, 3, 2)), (2, (3, 2, 3))], ids=["slabs", "b2"])
def test_gradcheck(
    batch: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    a = (4 * noise(batch, 3, *sizes, seed=1) - 2).requires_grad_()
    b = off_lattice_displacement(sizes, batch=batch, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(compose, (a, b), eps=1e-6)


def test_layouts_do_not_matter() -> None:
    a, b = 4 * noise(2, 3, 5, 6, 7) - 2, off_lattice_displacement((5, 6, 7), batch=2)
    last = torch.channels_last_3d
    actual = compose(a.to(memory_format=last), b.transpose(2, 3).contiguous().transpose(2, 3))
    assert_close("compose", actual, compose(a, b), TOL["op float64"])
    actual = compose(a[:1].expand(2, -1, -1, -1, -1), b)
    assert_equal("expanded", actual, compose(a[:1].repeat(2, 1, 1, 1, 1), b))


def test_bad_input() -> None:
    good = torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(ShapeError, match=r"disp_a has shape \(1, 1, 4, 4, 4\), expected \(1, 3"):
        compose(good[:, :1], good)
    with pytest.raises(ShapeError, match=r"disp_b has shape \(1, 3, 4, 4, 3\), expected \(1, 3, 4"):
        compose(good, good[..., :3])
    with pytest.raises(ShapeError, match=r"disp_b has shape \(1, 3, 4, 4\), expected \(B, C"):
        compose(good, good[..., 0])
    with pytest.raises(DtypeError, match=r"compose: disp_a is torch\.int32, expected a floating"):
        compose(good.int(), good)
    with pytest.raises(ShapeError, match="compose: disp_b is on meta, expected cpu"):
        compose(good, good.to("meta"))
