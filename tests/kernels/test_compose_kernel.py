"""The Triton kernels of ``compose`` and ``warp_compose``, and both as torch operators."""

from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import assert_kernel_as_good, deterministic, implementation, run
from _support.tolerances import assert_equal
from _support.volumes import noise, off_lattice_displacement
from ulae_rt.errors import ShapeError, UsageError
from ulae_rt.kernels import compose, warp, warp_compose

SHAPES = [(1, 1, 1, 1, 1), (2, 2, 3, 5, 7), (1, 1, 1, 9, 8), (2, 1, 5, 1, 4), (1, 1, 2, 35, 37)]
SHAPE_IDS = [f"b{b}-c{c}-{d}x{h}x{w}" for b, c, d, h, w in SHAPES]
FLOAT, DOUBLE = torch.float32, torch.float64
TYPES = {
    "fp32": (FLOAT, FLOAT, FLOAT),
    "fp64": (DOUBLE, DOUBLE, DOUBLE),
    "fp16-image": (torch.float16, FLOAT, FLOAT),
    "bf16-image": (torch.bfloat16, FLOAT, FLOAT),
    "halves": (torch.float16, torch.float16, torch.float16),
}


def triple(
    shape: tuple[int, ...],
    types: tuple[torch.dtype, torch.dtype, torch.dtype] = TYPES["fp32"],
    factor: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, outer and inner displacement."""
    b, _, *sizes = shape
    coarse = tuple(size // factor for size in sizes)
    image = noise(*shape, seed=1)
    outer = 4 * noise(b, 3, *sizes, seed=2) - 2
    inner = off_lattice_displacement(coarse, reach=3, batch=b, seed=3)  # type: ignore[arg-type]
    return image.to(types[0]), outer.to(types[1]), inner.to(types[2])


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_shapes(shape: tuple[int, ...], triton_device: torch.device) -> None:
    inputs = triple(shape)
    assert_kernel_as_good("compose", compose, inputs[1:], triton_device)
    assert_kernel_as_good("warp_compose", warp_compose, inputs, triton_device)


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_types(
    types: tuple[torch.dtype, torch.dtype, torch.dtype], triton_device: torch.device
) -> None:
    inputs = triple((1, 2, 3, 4, 6), types)
    assert_kernel_as_good("compose", compose, inputs[1:], triton_device)
    assert_kernel_as_good("warp_compose", warp_compose, inputs, triton_device)


@pytest.mark.parametrize("factor", [2, 4])
def test_coarse_inner_displacement(factor: int, triton_device: torch.device) -> None:
    inputs = triple((2, 1, 4, 8, 12), factor=factor)
    assert_kernel_as_good("compose", partial(compose, factor=factor), inputs[1:], triton_device)
    assert_kernel_as_good("both", partial(warp_compose, factor=factor), inputs, triton_device)


@pytest.mark.parametrize("missing", range(3))
def test_only_the_gradients_that_are_needed(missing: int, triton_device: torch.device) -> None:
    needs = [index != missing for index in range(3)]
    inputs = triple((1, 1, 3, 4, 5))
    assert_kernel_as_good("warp_compose", warp_compose, inputs, triton_device, needs)
    if any(needs[1:]):
        assert_kernel_as_good("compose", compose, inputs[1:], triton_device, needs[1:])


def test_one_pass_is_the_two_ops_bit_for_bit(triton_device: torch.device) -> None:
    image, outer, inner = (x.to(triton_device) for x in triple((2, 2, 3, 4, 5)))
    with implementation("triton"):
        warped, composed = warp_compose(image, outer, inner)
        assert_equal("image", warped, warp(image, inner))
        assert_equal("field", composed, compose(outer, inner))
        assert_equal("zero inner", compose(outer, torch.zeros_like(inner)), outer)
        assert_equal("zero outer", compose(torch.zeros_like(outer), inner), inner)


def test_only_one_output_used(triton_device: torch.device) -> None:
    inputs = triple((1, 1, 3, 4, 5))
    for index in range(2):
        assert_kernel_as_good(
            "one of two", lambda *x, i=index: warp_compose(*x)[i], inputs, triton_device,
            [index == 0, index == 1, True],
        )  # fmt: skip


def test_layouts(triton_device: torch.device) -> None:
    image, outer, inner = (x.to(triton_device) for x in triple((2, 2, 3, 4, 5)))
    with implementation("triton"):
        expected = warp_compose(image, outer, inner)
        strided = (x.contiguous(memory_format=torch.channels_last_3d) for x in (image, outer))
        found = warp_compose(*strided, inner.mT.contiguous().mT)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.is_contiguous()
        assert_equal("layout", actual, wanted)


@pytest.mark.parametrize("amount", [1e30, float("-inf"), torch.nan])
def test_far_outside_and_nowhere(amount: float, triton_device: torch.device) -> None:
    image, outer, inner = (x.to(triton_device) for x in triple((1, 1, 3, 4, 5)))
    inner[:, 2] = amount
    with implementation("triton"):
        warped, composed = warp_compose(image, outer, inner)
    assert_equal("image", warped, torch.zeros_like(warped))
    assert_equal("field", composed[:, :2], inner[:, :2])
    assert torch.equal(composed[:, 2].isnan(), inner[:, 2].isnan())


def test_gradcheck(triton_device: torch.device) -> None:
    image, outer, inner = (
        x.to(triton_device).requires_grad_() for x in triple((1, 1, 2, 3, 2), TYPES["fp64"])
    )
    with implementation("triton"):
        for op, inputs in ((compose, (outer, inner)), (warp_compose, (image, outer, inner))):
            assert torch.autograd.gradcheck(op, inputs, fast_mode=True, nondet_tol=1e-12)


def test_deterministic_sums(triton_device: torch.device) -> None:
    inputs = triple((1, 1, 3, 5, 6))
    torch.use_deterministic_algorithms(True)
    try:
        for op, arguments in ((compose, inputs[1:]), (warp_compose, inputs)):
            first = run(op, arguments, choice="triton", device=triton_device)
            again = run(op, arguments, choice="triton", device=triton_device)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert_kernel_as_good(op.__name__, op, arguments, triton_device)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("factor", [1, 2])
def test_opcheck(factor: int, triton_device: torch.device) -> None:
    ops = torch.ops.ulae_rt
    image, outer, inner = (x.to(triton_device) for x in triple((1, 1, 2, 2, 2), factor=factor))
    leaves = [x.clone().requires_grad_() for x in (image, outer, inner)]
    torch.library.opcheck(ops.compose.default, (*leaves[1:], factor))
    torch.library.opcheck(ops.warp_compose.default, (*leaves, factor))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            ops.warp_compose_backward.default, (image, outer, image, outer, inner, factor, *needs)
        )
        torch.library.opcheck(
            ops.compose_backward.default, (outer, outer, inner, factor, *needs[:2])
        )


def test_compile_and_export(triton_device: torch.device) -> None:
    inputs = triple((1, 1, 2, 4, 5))
    on_device = tuple(x.to(triton_device) for x in inputs)

    class Module(torch.nn.Module):
        def forward(self, image: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            warped, field = warp_compose(image, a, b)
            return warped, compose(field, b)

    module = Module()
    # By default gradients are added up by atomics, on a GPU in any order.
    with deterministic():
        expected = run(module, inputs, choice="triton", device=triton_device)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        actual = run(compiled, inputs, choice="triton", device=triton_device)
    with implementation("triton"):
        program = torch.export.export(module, on_device)
        exported = program.module()(*on_device)
    for a, b in zip((*actual, *(x.cpu() for x in exported)), (*expected, *expected), strict=False):
        assert torch.equal(a, b)
    for name in ("compose", "warp_compose"):
        assert f"ulae_rt.{name}.default" in program.graph_module.code


def test_bad_input() -> None:
    image, disp = torch.zeros(1, 1, 4, 6, 4), torch.zeros(1, 3, 4, 6, 4)
    with pytest.raises(
        ShapeError, match=r"compose: the grid \(4, 6, 4\) is not a multiple of .* 4"
    ):
        compose(disp, disp, factor=4)
    with pytest.raises(ShapeError, match=r"disp_b has .* expected \(1, 3, 2, 3, 2\)"):
        warp_compose(image, disp, disp, factor=2)
    with pytest.raises(UsageError, match="warp_compose: factor is -1, expected a positive"):
        warp_compose(image, disp, disp, factor=-1)
    with pytest.raises(ShapeError, match=r"expected \(1, 3, 2, 3, 2\)"):
        warp(image, disp, factor=2)
