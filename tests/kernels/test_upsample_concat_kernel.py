"""The Triton kernels of ``upsample_concat`` against the reference, and as torch operators."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from _support.kernels import assert_kernel_as_good, implementation, run
from _support.tolerances import assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import upsample_concat

CHANNELS_LAST = torch.channels_last_3d
SHAPES = [  # of x, and the channels of skip
    ((1, 1, 1, 1, 1), 1),
    ((2, 3, 2, 3, 5), 2),
    ((1, 4, 1, 4, 3), 4),
    ((1, 2, 3, 1, 2), 5),
    ((1, 4, 2, 2, 1), 70),  # more channels than a program takes
    ((1, 65, 1, 2, 2), 1),
    ((1, 16, 1, 5, 33), 2),  # past one tile of columns, and of rows
]
TYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def pair(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    x = (4 * noise(*shape) - 2).to(dtype)
    skip = noise(shape[0], channels, *(2 * size for size in shape[2:]), seed=1).to(dtype)
    return x.contiguous(memory_format=CHANNELS_LAST), skip.contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize(("shape", "channels"), SHAPES, ids=str)
def test_value_and_gradients(
    shape: tuple[int, ...], channels: int, triton_device: torch.device
) -> None:
    assert_kernel_as_good("upsample", upsample_concat, pair(shape, channels), triton_device)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_types(dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = pair((1, 4, 2, 3, 2), 2, dtype)
    assert_kernel_as_good("upsample", upsample_concat, inputs, triton_device)


@pytest.mark.parametrize(
    ("channels", "skipped", "width"),
    [(3, 2, 5), (3, 2, 6), (16, 2, 24), (4, 3, 72), (65, 1, 67)],
    ids=str,
)
def test_wider_than_its_channels(
    channels: int, skipped: int, width: int, triton_device: torch.device
) -> None:
    """Value, gradients, and zeros in memory that was all NaN before."""
    inputs = pair((2, channels, 2, 1, 3), skipped)
    wide = partial(upsample_concat, width=width)
    assert_kernel_as_good("upsample", wide, inputs, triton_device)
    found = run(wide, inputs, choice="triton", device=triton_device)[0]
    plain = run(upsample_concat, inputs, choice="triton", device=triton_device)[0]
    assert found.is_contiguous(memory_format=CHANNELS_LAST)
    assert_equal("x and skip", found[:, : channels + skipped], plain)
    assert not found[:, channels + skipped :].any()  # nor NaN


def test_gradient_of_the_zeros_is_ignored(triton_device: torch.device) -> None:
    leaves = [each.to(triton_device).requires_grad_() for each in pair((1, 3, 2, 3, 2), 2)]
    grad = noise(1, 8, 4, 6, 4, dtype=torch.float32).to(triton_device)
    with implementation("triton"):
        expected = torch.autograd.grad(upsample_concat(*leaves), leaves, grad[:, :5])
        grad[:, 5:] = torch.nan
        found = torch.autograd.grad(upsample_concat(*leaves, width=8), leaves, grad)
    for a, b in zip(found, expected, strict=True):
        assert_equal("gradient", a, b)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "skip"])
def test_only_the_gradient_that_is_needed(
    needs: tuple[bool, bool], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulae_rt.kernels.upsample_concat import kernel

    launched = []
    launch = kernel.launch_backward

    def spy(grad: Tensor, *, channels: int) -> Tensor:
        launched.append(channels)
        return launch(grad, channels=channels)

    monkeypatch.setattr(kernel, "launch_backward", spy)
    inputs = pair((1, 3, 2, 2, 2), 2)
    assert_kernel_as_good("upsample", upsample_concat, inputs, triton_device, needs)
    assert launched == [3] * needs[0]


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "offset"])
def test_memory_layouts(layout: str, triton_device: torch.device) -> None:
    def other(x: Tensor) -> Tensor:
        memory = x.permute(0, 2, 3, 4, 1)
        return {
            "contiguous": x.contiguous(),
            "permuted": x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
            "sliced": F.pad(memory, [1, 1])[..., 1:-1].permute(0, 4, 1, 2, 3),
            "offset": torch.cat((memory.flatten()[:3], memory.flatten()))[3:]
            .view(memory.shape)
            .permute(0, 4, 1, 2, 3),
        }[layout]

    inputs = [x.to(triton_device) for x in pair((1, 3, 1, 2, 3), 2)]
    with implementation("triton"):
        expected = upsample_concat(*inputs)
        assert_equal(layout, upsample_concat(*map(other, inputs)), expected)
        leaf = inputs[0].clone().requires_grad_()
        upstream = noise(*expected.shape, dtype=torch.float32).to(triton_device)
        upstream = upstream.contiguous(memory_format=CHANNELS_LAST)
        found, wanted = (
            torch.autograd.grad(upsample_concat(leaf, inputs[1]), leaf, grad)[0]
            for grad in (other(upstream), upstream)
        )
    assert expected.is_contiguous(memory_format=CHANNELS_LAST)
    assert_equal("gradient", found, wanted)


def test_of_a_constant_is_that_constant(triton_device: torch.device) -> None:
    x = torch.full((1, 2, 2, 3, 4), 0.1, device=triton_device)
    skip = torch.zeros(1, 1, 4, 6, 8, device=triton_device)
    with implementation("triton"):
        out = upsample_concat(x, skip)
    assert_equal("constant", out[:, :2], torch.full_like(out[:, :2], 0.1))
    assert_equal("skip", out[:, 2:], skip)


def test_gradients_are_the_adjoint(triton_device: torch.device) -> None:
    """<upsample(x), g> = <x, its gradient>, and each fine voxel gives away exactly itself."""
    x, skip = (each.double().to(triton_device) for each in pair((1, 2, 3, 2, 4), 1))
    x.requires_grad_()
    with implementation("triton"):
        out = upsample_concat(x, skip)[:, :2]
        g = noise(*out.shape, seed=2).to(triton_device)
        (grad,) = torch.autograd.grad((out * g).sum(), x)
    assert torch.isclose((x * grad).sum(), (out * g).sum(), rtol=1e-13, atol=0)
    assert torch.isclose(grad.sum(), g.sum(), rtol=1e-13, atol=0)


def test_the_same_bits_every_time(triton_device: torch.device) -> None:
    inputs = pair((1, 4, 2, 2, 5), 2)
    first, again = (
        run(upsample_concat, inputs, choice="triton", device=triton_device) for _ in range(2)
    )
    for a, b in zip(again, first, strict=True):
        assert_equal("again", a, b)


def test_gradcheck(triton_device: torch.device) -> None:
    inputs = [x.to(triton_device).requires_grad_() for x in pair((1, 2, 2, 2, 1), 1, torch.float64)]
    with implementation("triton"):
        assert torch.autograd.gradcheck(upsample_concat, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 3, 1, 2, 2), (1, 1, 1, 1, 1)], ids=str)
def test_opcheck(shape: tuple[int, ...], triton_device: torch.device) -> None:
    x, skip = (each.to(triton_device) for each in pair(shape, 2, torch.float16))
    for needs in ((True, True), (False, True)):
        leaves = [
            each.clone().requires_grad_(need) for each, need in zip((x, skip), needs, strict=True)
        ]
        for width in (shape[1] + 2, 8):
            torch.library.opcheck(torch.ops.ulae_rt.upsample_concat.default, (*leaves, width))
    grad = torch.ops.ulae_rt.upsample_concat(x, skip, 8)
    for memory in (grad, grad.contiguous()):
        torch.library.opcheck(
            torch.ops.ulae_rt.upsample_concat_backward.default, (memory, shape[1])
        )


def test_compile_and_export(triton_device: torch.device) -> None:
    inputs = [each.to(triton_device) for each in pair((1, 3, 1, 2, 2), 2)]
    expected = run(upsample_concat, inputs, choice="triton", device=triton_device)
    compiled = torch.compile(upsample_concat, fullgraph=True, backend="aot_eager")
    found = run(compiled, inputs, choice="triton", device=triton_device)
    for a, b in zip(found, expected, strict=True):
        assert_equal("compiled", a, b)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return upsample_concat(x, skip, width=8)

    with implementation("triton"):
        program = torch.export.export(Module(), tuple(inputs))
        assert "ulae_rt.upsample_concat.default" in program.graph_module.code
        out = program.module()(*inputs).cpu()
    assert_equal("exported", out[:, :5], expected[0])
    assert_equal("zeros", out[:, 5:], torch.zeros_like(out[:, 5:]))


def test_no_second_derivative(triton_device: torch.device) -> None:
    x, skip = (each.to(triton_device).requires_grad_() for each in pair((1, 3, 1, 2, 2), 2))
    with implementation("triton"):
        out = upsample_concat(x, skip).square().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.square().sum().backward()


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    for op in (upsample_concat, partial(torch.ops.ulae_rt.upsample_concat, width=5)):
        with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
            op(*pair((1, 3, 1, 2, 2), 2))
