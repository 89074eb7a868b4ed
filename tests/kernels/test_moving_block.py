"""``moving_block`` by its reference: against sums over taps, against the network, and bad input."""

import re
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import DtypeError, ShapeError, UsageError
from ulae_rt.kernels import moving_block
from ulae_rt.model.blocks import MovingBlock


def block(
    shape: tuple[int, ...], channels: int, branches: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The tensor arguments, of either sign, contiguous."""
    B, C, *sizes = shape
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {
        shape: dtype,
        (B, channels, *((size + 1) // 2 for size in sizes)): dtype,
        (B, channels): exact,
        (branches, channels, C, 3, 3, 3): dtype,
    }
    made = enumerate(shapes.items())
    return [(2 * noise(*each, seed=seed) - 1).to(kind) for seed, (each, kind) in made]


def by_sums_over_taps(inputs: list[Tensor], dilations: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Voxel by voxel, tap by tap: what is outside adds nothing."""
    x, fixed_term, mean_term, kernels = (tensor.numpy() for tensor in inputs)
    B, _, *sizes = x.shape
    out = fixed_term + mean_term[:, :, None, None, None]
    for b, *voxel in product(range(B), *(range(size) for size in out.shape[2:])):
        for branch, (dilation, *tap) in enumerate(product(dilations, *[range(3)] * 3)):
            at = [2 * o + (t - 1) * dilation for o, t in zip(voxel, tap, strict=True)]
            if all(0 <= i < size for i, size in zip(at, sizes, strict=True)):
                weight = kernels[(branch // 27, slice(None), slice(None), *tap)]
                out[(b, slice(None), *voxel)] += weight @ x[(b, slice(None), *at)]
    return np.where(out > 0, out, 0.2 * out)


@pytest.mark.parametrize(
    ("shape", "channels", "dilations"),
    [
        ((1, 1, 5, 4, 6), 3, (1, 2)),
        ((2, 3, 4, 3, 5), 2, (2, 1, 3)),
        ((1, 2, 1, 2, 7), 4, (3,)),
        ((2, 2, 1, 1, 1), 1, (1, 2, 3, 4)),
    ],
    ids=str,
)
def test_is_the_sum_over_the_taps(
    shape: tuple[int, ...], channels: int, dilations: tuple[int, ...]
) -> None:
    inputs = block(shape, channels, len(dilations))
    expected = torch.from_numpy(by_sums_over_taps(inputs, dilations))
    assert_close("taps", moving_block(*inputs, dilations), expected, TOL["block float64"])


def test_is_convolutions_and_an_activation() -> None:
    x, fixed_term, mean_term, kernels = block((2, 3, 6, 5, 8), 4, 2)
    total = fixed_term + mean_term[:, :, None, None, None]
    total = total + F.conv3d(x, kernels[0], stride=2, padding=1)
    total = total + F.conv3d(x, kernels[1], stride=2, padding=4, dilation=4)
    found = moving_block(x, fixed_term, mean_term, kernels, (1, 4))
    assert_close("sum", found, F.leaky_relu(total, 0.2), TOL["block float64"])


@pytest.mark.parametrize(("in_channels", "base"), [(1, 4), (3, 3), (4, 1)])
def test_is_the_block_of_the_network(in_channels: int, base: int) -> None:
    layer = MovingBlock(in_channels, 5, base).double()
    x, y = noise(2, in_channels, 8, 6, 10), noise(2, 5, 4, 3, 5, seed=1) - 0.5
    with torch.no_grad():
        weights = layer.folded()
        fixed_term = F.conv3d(y, weights.fixed)
        mean_term = x.mean(dim=(2, 3, 4)) @ weights.mean.t() + weights.bias
        kernels = torch.stack(tuple(weights.dilated.values()))
        found = moving_block(x, fixed_term, mean_term, kernels, tuple(weights.dilated))
        assert_close("network", found, layer(x, layer.fixed_level(y)), TOL["block float64"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype: torch.dtype) -> None:
    inputs = block((1, 3, 4, 5, 6), 2, 2, dtype)
    exact = moving_block(*(tensor.float() for tensor in inputs), (1, 2))
    assert_equal("half precision", moving_block(*inputs, (1, 2)), exact.to(dtype))
    assert exact.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.follows("call it under torch.no_grad()")
@pytest.mark.parametrize("index", range(4))
def test_a_gradient_is_refused(index: int) -> None:
    inputs = block((1, 2, 3, 4, 5), 3, 2)
    inputs[index].requires_grad_()
    name = ("x", "fixed_term", "mean_term", "kernels")[index]
    with pytest.raises(
        UsageError, match=f"moving_block: {name} requires a gradient, and"
    ) as caught:
        moving_block(*inputs, (1, 2))
    assert caught.value.hint == "call it under torch.no_grad()"
    with torch.no_grad():
        assert not moving_block(*inputs, (1, 2)).requires_grad


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(2, 3, 4)}, ShapeError, "x has shape (2, 3, 4), expected (B, C, D, H, W)"),
    ({"dilations": ()}, UsageError, "dilations are (), expected positive integers"),
    ({"dilations": (1, 1.5)}, UsageError, "dilations are (1, 1.5), expected positive integers"),
    ({"dilations": 1}, UsageError, "dilations are 1, expected positive integers"),
    ({"dilations": (1, 0)}, UsageError, "dilations are (1, 0), expected positive integers"),
    (
        {"dilations": (1, 2, 3)}, ShapeError,
        "kernels has shape (2, 3, 2, 3, 3, 3), expected (3, Cout, 2, 3, 3, 3)",
    ),
    (
        {"x": torch.zeros(1, 4, 3, 4, 5, dtype=torch.float64)}, ShapeError,
        "kernels has shape (2, 3, 2, 3, 3, 3), expected (2, Cout, 4, 3, 3, 3)",
    ),
    (
        {"kernels": torch.zeros(3, 2, 3, 3, 3)}, ShapeError,
        "kernels has shape (3, 2, 3, 3, 3), expected (2, Cout, 2, 3, 3, 3)",
    ),
    (
        {"kernels": torch.zeros(2, 0, 2, 3, 3, 3)}, ShapeError,
        "kernels has shape (2, 0, 2, 3, 3, 3), expected (2, Cout, 2, 3, 3, 3)",
    ),
    (
        {"fixed_term": torch.zeros(1, 3, 1, 2, 2)}, ShapeError,
        "fixed_term has shape (1, 3, 1, 2, 2), expected (1, 3, 2, 2, 3)",
    ),
    (
        {"fixed_term": torch.zeros(1, 3, 2, 2, 3)}, DtypeError,
        "fixed_term is torch.float32, expected torch.float64 for x of torch.float64",
    ),
    (
        {"mean_term": torch.zeros(3)}, ShapeError, "mean_term has shape (3,), expected (1, 3)",
    ),
    (
        {"mean_term": torch.zeros(1, 3, dtype=torch.float16)}, DtypeError,
        "mean_term is torch.float16, expected torch.float64",
    ),
    (
        {"kernels": torch.zeros(2, 3, 2, 3, 3, 3)}, DtypeError,
        "kernels is torch.float32, expected torch.float64",
    ),
    (
        {"mean_term": torch.zeros(1, 3, dtype=torch.float64, device="meta")}, ShapeError,
        "mean_term is on meta, expected cpu as x",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[each[2] for each in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("x", "fixed_term", "mean_term", "kernels")
    arguments: dict[str, Any] = dict(zip(names, block((1, 2, 3, 4, 5), 3, 2), strict=True))
    with pytest.raises(error, match=re.escape(f"moving_block: {message}")):
        moving_block(**{**arguments, "dilations": (1, 2), **changes})
