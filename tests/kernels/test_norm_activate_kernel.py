"""The Triton kernels of ``norm_activate`` against the reference, and as torch operators."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from _support.kernels import assert_kernel_as_good, implementation, run
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import norm_activate

CHANNELS_LAST = torch.channels_last_3d
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7),
    (1, 16, 1, 3, 4),
    (1, 1, 2, 3, 5),
    (2, 5, 1, 1, 9),
    (1, 70, 1, 2, 2),  # more channels than a program takes
]
TYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def features(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    spread = 1 + torch.arange(shape[1], dtype=torch.float64).view(-1, 1, 1, 1)
    x = spread * (4 * noise(*shape) - 1)
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], triton_device: torch.device) -> None:
    assert_kernel_as_good("norm", norm_activate, [features(shape)], triton_device)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_types(dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = [features((2, 4, 2, 3, 7), dtype)]
    assert_kernel_as_good("norm", norm_activate, inputs, triton_device)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "offset"])
def test_memory_layouts(layout: str, triton_device: torch.device) -> None:
    x = features((2, 4, 2, 3, 4)).to(triton_device)
    memory = x.permute(0, 2, 3, 4, 1)
    layouts = {
        "contiguous": x.contiguous(),
        "permuted": x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "sliced": F.pad(memory, [1, 1])[..., 1:-1].permute(0, 4, 1, 2, 3),
        "offset": torch.cat((memory.flatten()[:3], memory.flatten()))[3:]
        .view(memory.shape)
        .permute(0, 4, 1, 2, 3),
    }
    expected = run(norm_activate, [x], choice="triton", device=triton_device)
    actual = run(norm_activate, [layouts[layout]], choice="triton", device=triton_device)
    for a, b in zip(actual, expected, strict=True):
        assert_equal(layout, a, b)
    assert actual[0].is_contiguous(memory_format=CHANNELS_LAST)
    with implementation("triton"):
        y = norm_activate(x)
        # A gradient in another layout than the result's.
        leaf = x.clone().requires_grad_()
        upstream = noise(*x.shape, dtype=torch.float32).to(x.device)
        for grad in (upstream.contiguous(), upstream[:1].expand_as(x)):
            (found,) = torch.autograd.grad(norm_activate(leaf), leaf, grad)
            (wanted,) = torch.autograd.grad(
                norm_activate(leaf), leaf, grad.contiguous(memory_format=CHANNELS_LAST)
            )
            assert_equal("gradient", found, wanted)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)


# Properties


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_mean_zero_and_variance_one_before_the_activation(
    offset: float, triton_device: torch.device
) -> None:
    x = offset + noise(1, 4, 4, 8, 8, dtype=torch.float32)
    with implementation("triton"):
        y = norm_activate(x.to(triton_device)).cpu().double()
    normal = torch.where(y > 0, y, y / 0.2)
    mean = normal.mean(dim=(2, 3, 4))
    variance = normal.var(dim=(2, 3, 4), unbiased=False)
    assert_close("mean", mean, torch.zeros_like(mean), TOL["norm float32"])
    spread = x.double().var(dim=(2, 3, 4), unbiased=False)
    assert_close("variance", variance, spread / (spread + 1e-5), TOL["norm float32"])
    expected = F.leaky_relu(F.instance_norm(x.double(), eps=1e-5), 0.2)
    assert_close("against float64", y, expected, TOL["norm float32"])


@pytest.mark.parametrize("step", [1e3, -30.0])
def test_a_first_voxel_unlike_all_others(step: float, triton_device: torch.device) -> None:
    """The tiles' first voxels are what they subtract: here none is like the rest of its tile."""
    x = noise(1, 4, 4, 8, 8, dtype=torch.float32)
    rows = x.view(1, 4, -1)
    rows[:, :, ::16] += step
    with implementation("triton"):
        y = norm_activate(x.to(triton_device)).cpu()
    expected = F.leaky_relu(F.instance_norm(x.double(), eps=1e-5), 0.2)
    assert_close("against float64", y, expected, TOL["norm float32"])


def test_constant_channels_are_zero(triton_device: torch.device) -> None:
    x = torch.tensor([7.0, -0.1, 12345.678, 0.0]).view(1, 4, 1, 1, 1).repeat(1, 1, 3, 4, 5)
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.to(triton_device, dtype).requires_grad_()
        with implementation("triton"):
            y = norm_activate(leaf)
            (grad,) = torch.autograd.grad((y * leaf.detach()).sum(), leaf)
        assert_equal("forward", y.detach(), torch.zeros_like(leaf))
        assert torch.isfinite(grad).all()


def test_nan_stays_in_its_channel(triton_device: torch.device) -> None:
    x = features((2, 3, 3, 4, 5))
    x[1, 2, 1, 1, 1] = float("nan")
    with implementation("triton"):
        lost = norm_activate(x.to(triton_device)).isnan().cpu()
    assert lost[1, 2].all()
    assert lost.sum() == lost[1, 2].numel()


def test_the_same_bits_every_time(triton_device: torch.device) -> None:
    first, again = (
        run(norm_activate, [features((2, 4, 3, 5, 7))], choice="triton", device=triton_device)
        for _ in range(2)
    )
    for a, b in zip(again, first, strict=True):
        assert_equal("again", a, b)


def test_only_the_result_is_kept(triton_device: torch.device) -> None:
    x = features((1, 4, 2, 3, 4)).to(triton_device).requires_grad_()
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with (
        implementation("triton"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
    ):
        y = norm_activate(x)
    assert sorted(saved.numel() for saved in kept) == [4, y.numel()]
    assert y.data_ptr() in [saved.data_ptr() for saved in kept]


def test_gradcheck(triton_device: torch.device) -> None:
    for shape in ((1, 2, 3, 4, 2), (2, 3, 2, 1, 3)):
        x = features(shape, torch.float64).to(triton_device).requires_grad_()
        with implementation("triton"):
            assert torch.autograd.gradcheck(norm_activate, (x,), fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 4, 2, 3, 4), (2, 1, 2, 1, 3), (1, 2, 1, 1, 1)], ids=str)
def test_opcheck(shape: tuple[int, ...], triton_device: torch.device) -> None:
    for x in (features(shape, torch.float16), features(shape).contiguous()):
        x = x.to(triton_device)
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(torch.ops.ulae_rt.norm_activate.default, (leaf,))
        y, rstd = torch.ops.ulae_rt.norm_activate(x)
        torch.library.opcheck(torch.ops.ulae_rt.norm_activate_backward.default, (x, y, rstd))


def test_compile_and_export(triton_device: torch.device) -> None:
    x = features((1, 4, 2, 3, 4)).to(triton_device)
    expected = run(norm_activate, [x], choice="triton", device=triton_device)
    compiled = torch.compile(norm_activate, fullgraph=True, backend="aot_eager")
    found = run(compiled, [x], choice="triton", device=triton_device)
    for a, b in zip(found, expected, strict=True):
        assert_equal("compiled", a, b)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return norm_activate(x)

    with implementation("triton"):
        program = torch.export.export(Module(), (x,))
        assert "ulae_rt.norm_activate.default" in program.graph_module.code
        assert_equal("exported", program.module()(x).cpu(), expected[0])


def test_no_second_derivative(triton_device: torch.device) -> None:
    x = features((1, 4, 2, 3, 4)).to(triton_device).requires_grad_()
    with implementation("triton"):
        (grad,) = torch.autograd.grad(norm_activate(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.square().sum().backward()


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    for op in (norm_activate, torch.ops.ulae_rt.norm_activate):
        with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
            op(features((1, 4, 2, 3, 4)))
