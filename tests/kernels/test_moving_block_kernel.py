"""The Triton kernels of ``moving_block`` against the reference, and as a torch operator."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from _support.kernels import assert_kernel_as_good, implementation, run
from _support.tolerances import assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _launch, moving_block

CHANNELS_LAST = torch.channels_last_3d
# B, Cin, D, H, W; Cout; dilations. A result of up to three voxels along w has its taps in parts.
CASES = [
    ((1, 1, 10, 12, 14), 16, (1, 4, 8, 12)),  # the network's four blocks, smaller
    ((1, 16, 10, 6, 8), 32, (1, 3, 6, 9)),
    ((1, 32, 6, 8, 10), 32, (1, 2, 4, 6)),
    ((1, 32, 4, 6, 4), 32, (1, 2, 3)),
    ((2, 1, 5, 7, 9), 3, (1, 2)),
    ((2, 3, 5, 7, 9), 16, (2,)),
    ((2, 16, 7, 4, 5), 3, (1, 5)),
    ((2, 32, 3, 5, 11), 16, (3, 1, 2, 1)),  # in any order, and one twice
    ((1, 1, 1, 1, 1), 1, (1, 2, 3, 4)),
    ((1, 16, 1, 1, 1), 32, (1, 2, 3, 4)),
    ((1, 3, 1, 9, 2), 3, (1, 4)),
    ((1, 1, 40, 14, 18), 2, (1,)),  # more voxels than a program takes
    ((2, 3, 40, 14, 18), 2, (1,)),
    ((1, 40, 2, 3, 8), 40, (1, 2)),  # more channels than a program takes
    ((1, 40, 4, 3, 5), 40, (1, 2, 3, 4, 5)),
    ((1, 1, 3, 2, 4), 40, (2**40, 1)),  # only the centre is inside
    ((1, 4, 3, 2, 4), 4, (2**40, 1)),
]
TYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def block(
    shape: tuple[int, ...],
    channels: int,
    dilations: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """All tensor arguments; the result is of order 1, of either sign."""
    B, C, *sizes = shape
    halves = [(size + 1) // 2 for size in sizes]
    scale = (27 * C * len(dilations)) ** -0.5
    x = (4 * noise(*shape) - 2).to(dtype)
    fixed_term = (4 * noise(B, channels, *halves, seed=1) - 2).to(dtype)
    mean_term = (noise(B, channels, seed=2) - 0.5).to(_launch.compute_dtype(x))
    kernels = (scale * (4 * noise(len(dilations), channels, C, 27, seed=3) - 2)).to(dtype)
    return [
        x.contiguous(memory_format=CHANNELS_LAST),
        fixed_term.contiguous(memory_format=CHANNELS_LAST),
        mean_term,
        kernels.unflatten(-1, (3, 3, 3)),
    ]


def values(inputs: list[Tensor], dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """By the kernel, on the CPU."""
    call = partial(moving_block, dilations=dilations)
    (found,) = run(call, inputs, [False] * 4, choice="triton", device=device)
    return found


def assert_as_good(inputs: list[Tensor], dilations: tuple[int, ...], device: torch.device) -> None:
    call = partial(moving_block, dilations=dilations)
    assert_kernel_as_good("moving block", call, inputs, device, [False] * 4)


@pytest.mark.parametrize(("shape", "channels", "dilations"), CASES, ids=str)
def test_value(
    shape: tuple[int, ...], channels: int, dilations: tuple[int, ...], triton_device: torch.device
) -> None:
    assert_as_good(block(shape, channels, dilations), dilations, triton_device)


@pytest.mark.parametrize("C", [1, 3, 16, 32])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_types(dtype: torch.dtype, C: int, triton_device: torch.device) -> None:
    for shape in ((2, C, 4, 3, 9), (2, C, 4, 3, 5)):
        assert_as_good(block(shape, 16, (1, 2, 3), dtype), (1, 2, 3), triton_device)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@pytest.mark.parametrize("C", [1, 16])
def test_any_number_of_branches(C: int, branches: int, triton_device: torch.device) -> None:
    dilations = (2, 1, 4, 3)[:branches]
    for W in (9, 5):
        assert_as_good(block((1, C, 5, 4, W), 16, dilations), dilations, triton_device)


@pytest.mark.parametrize("W", [9, 5])
@pytest.mark.parametrize("C", [1, 2])
def test_every_tap_reads_its_own_voxel(C: int, W: int, triton_device: torch.device) -> None:
    """One voxel that is not zero, and each tap of every branch a number of its own."""
    dilations = (1, 2)
    _, fixed_term, mean_term, kernels = block((1, C, 6, 5, W), 3, dilations, torch.float64)
    fixed_term, mean_term = torch.zeros_like(fixed_term), torch.zeros_like(mean_term)
    kernels = torch.arange(1, 1 + kernels.numel(), dtype=torch.float64).view(kernels.shape)
    for place in ((0, 0, 0), (3, 2, 4), (5, 4, W - 1)):
        x = torch.zeros(1, C, 6, 5, W, dtype=torch.float64)
        x[(0, C - 1, *place)] = 1
        inputs = [x, fixed_term, mean_term, kernels]
        with implementation("reference"):
            expected = moving_block(*inputs, dilations)
        assert_equal(str(place), values(inputs, dilations, triton_device), expected)


@pytest.mark.parametrize("C", [1, 16])
def test_offsets_of_64_bits(
    C: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for W in (9, 5):
        inputs, dilations = block((2, C, 5, 4, W), 16, (1, 3)), (1, 3)
        expected = values(inputs, dilations, triton_device)
        with monkeypatch.context() as patch:
            patch.setattr(_launch, "wide_index", lambda voxels: True)
            assert_equal("wide", values(inputs, dilations, triton_device), expected)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "expanded", "ready"])
@pytest.mark.parametrize("C", [1, 4])
def test_memory_layouts(C: int, layout: str, triton_device: torch.device) -> None:
    inputs, dilations = block((2, C, 3, 4, 5), 4, (1, 2)), (1, 2)
    if layout == "expanded":
        inputs = [tensor[:1].expand_as(tensor) for tensor in inputs]
    layouts = {
        "contiguous": lambda t: t.contiguous(),
        "permuted": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: F.pad(t, [1, 1])[..., 1:-1],
        "expanded": lambda t: t,
        "ready": lambda t: t,
    }
    expected = values(
        [t.clone(memory_format=torch.contiguous_format) for t in inputs], dilations, triton_device
    )
    given = [layouts[layout](tensor) for tensor in inputs]
    if layout == "ready":  # as the kernel reads it
        given[3] = given[3].permute(0, 3, 4, 5, 2, 1).contiguous().permute(0, 5, 4, 1, 2, 3)
    found = values(given, dilations, triton_device)
    assert_equal(layout, found, expected)
    assert found.is_contiguous(memory_format=CHANNELS_LAST)


def test_kernels_as_it_reads_them_are_not_copied(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulae_rt.kernels.moving_block import kernel

    read = []

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> "Launch":
            return self

        def __call__(self, *arguments: object, **options: object) -> None:
            read.append(arguments[:4])

    monkeypatch.setattr(kernel, "_moving_block_kernel", Launch())
    inputs = [tensor.to(triton_device) for tensor in block((1, 4, 3, 4, 5), 4, (1, 2))]
    memory = inputs[3].permute(0, 3, 4, 5, 2, 1).contiguous()
    inputs[3] = memory.permute(0, 5, 4, 1, 2, 3)
    kernel.launch_forward(*inputs, dilations=(1, 2))
    ((x, weight, fixed_term, mean_term),) = read
    wanted = (inputs[0], memory, *inputs[1:3])
    for tensor, given in zip((x, weight, fixed_term, mean_term), wanted, strict=True):
        assert isinstance(tensor, Tensor)
        assert tensor.data_ptr() == given.data_ptr()


# Properties


@pytest.mark.parametrize("W", [7, 5])
@pytest.mark.parametrize("C", [1, 16])
def test_what_is_not_finite_reaches_what_reads_it(
    C: int, W: int, triton_device: torch.device
) -> None:
    for value in (float("nan"), float("inf")):
        # As many channels as a tile has: numpy warns of infinities times those that are not there.
        inputs = block((2, C, 5, 6, W), 16, (1, 2))
        inputs[3].abs_()  # or infinities of two signs would cancel
        inputs[0][1, 0, 2, 2, 2] = value
        found = values(inputs, (1, 2), triton_device)
        with implementation("reference"):
            expected = moving_block(*inputs, (1, 2))
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        assert found[0].isfinite().all()
        assert not found[1].isfinite().all()


@pytest.mark.parametrize("C", [1, 16])
def test_the_same_bits_every_time(C: int, triton_device: torch.device) -> None:
    for W in (9, 5):
        inputs = block((1, C, 7, 4, W), 16, (1, 3))
        first = values(inputs, (1, 3), triton_device)
        assert_equal("again", values(inputs, (1, 3), triton_device), first)


@pytest.mark.parametrize("C", [1, 16])
def test_opcheck(C: int, triton_device: torch.device) -> None:
    for dtype in (torch.float16, torch.float32):
        inputs = [tensor.to(triton_device) for tensor in block((2, C, 3, 4, 5), 3, (1, 2), dtype)]
        operator = torch.ops.ulae_rt.moving_block.default
        torch.library.opcheck(operator, (*inputs, [1, 2]))
        contiguous = [tensor.contiguous() for tensor in inputs]
        torch.library.opcheck(operator, (*contiguous, [1, 2]))


def test_compile_and_export(triton_device: torch.device) -> None:
    inputs = [tensor.to(triton_device) for tensor in block((1, 4, 4, 3, 5), 3, (1, 2))]
    expected = values(inputs, (1, 2), triton_device)
    call = partial(moving_block, dilations=(1, 2))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return call(*inputs)

    with implementation("triton"):
        assert_equal("compiled", compiled(*inputs).cpu(), expected)
        program = torch.export.export(Module(), tuple(inputs))
        assert "ulae_rt.moving_block.default" in program.graph_module.code
        assert_equal("exported", program.module()(*inputs).cpu(), expected)


def test_the_operator_has_no_gradient(triton_device: torch.device) -> None:
    inputs = [tensor.to(triton_device) for tensor in block((1, 4, 4, 3, 5), 3, (1, 2))]
    leaf = inputs[0].requires_grad_()
    out = torch.ops.ulae_rt.moving_block(leaf, *inputs[1:], [1, 2])
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    for op in (moving_block, torch.ops.ulae_rt.moving_block):
        with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
            op(*block((1, 4, 4, 3, 5), 3, (1, 2)), (1, 2))
