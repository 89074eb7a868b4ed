"""The network against a second, deliberately plain implementation of its specification."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _support import plain_ulae as plain
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise, smooth_image
from ulae_rt.errors import ShapeError, UsageError
from ulae_rt.model import RegistrationOutput, UlaeNet
from ulae_rt.model.blocks import ConvBlock, MovingBlock, strided_convolutions

VARIANTS = ("paper", "release")
SIZES = (32, 48, 32)
# Steps of about 20, 5 and 2 voxels: the first coarse and large, as in a real registration.
HEAD_SCALES = (1.7, 0.5, 0.5)


class Case(NamedTuple):
    """A pair, released-format weights that move it by 15 voxels, and the plain result."""

    state: plain.State
    moving: Tensor
    fixed: Tensor
    truth: plain.Registered


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case(variant: str) -> Case:
    moving, fixed = smooth_image(SIZES, seed=1), smooth_image(SIZES, seed=2)
    state = plain.scale_heads(plain.random_state(variant), HEAD_SCALES)
    with torch.no_grad():
        truth = plain.register(state, moving, fixed)
    assert 15 <= float(truth.disp.abs().max()) <= 30, "the case must reach 15 voxels"
    assert float((truth.moved > 0).double().mean()) > 0.25, "and keep enough of it in view"
    return Case(state, moving, fixed, truth)


def network(case: Case, variant: str, dtype: torch.dtype = torch.float64) -> UlaeNet:
    net = UlaeNet(variant).to(dtype)
    net.load_state_dict(plain.package_state(case.state, variant))
    return net.eval()


def small_network(variant: str = "paper", seed: int = 0, **arguments: int) -> UlaeNet:
    """Four base channels and heads that move by voxels, in float32."""
    torch.manual_seed(seed)
    net = UlaeNet(variant, **{"channels": 4, **arguments}).eval()
    for head in net.heads.values():
        nn.init.normal_(head.weight, 0.0, 0.1)
    return net


def small_pair(sizes: tuple[int, int, int] = (32, 32, 32), batch: int = 1) -> tuple[Tensor, Tensor]:
    return (
        smooth_image(sizes, batch=batch, seed=1, dtype=torch.float32),
        smooth_image(sizes, batch=batch, seed=2, dtype=torch.float32),
    )


def results(out: RegistrationOutput | plain.Registered) -> dict[str, Tensor]:
    named = {"moved": out.moved, "disp": out.disp}
    for name in ("steps", "accumulated", "progressive"):
        named |= {f"{name}[{i}]": x for i, x in enumerate(getattr(out, name))}
    return named


# What it is


@pytest.mark.parametrize(("name", "count"), [("paper", 789_561), ("release", 1_109_241)])
def test_parameter_count(name: str, count: int) -> None:
    assert sum(p.numel() for p in UlaeNet(name).parameters()) == count


def test_default_is_the_papers_network() -> None:
    net = UlaeNet()
    assert (net.variant, net.channels, net.accumulate, net.uncoupled) == ("paper", 16, True, True)
    assert (net.metadata.variant, net.metadata.channels) == ("paper", 16)


def test_heads_start_at_almost_no_displacement() -> None:
    moving, fixed = small_pair()
    with torch.no_grad():
        disp = UlaeNet()(moving, fixed).disp
    assert 0 < float(disp.abs().max()) < 0.05


# Against the plain implementation


def test_float64_agrees_with_the_plain_network(case: Case, variant: str) -> None:
    with torch.no_grad():
        actual = results(network(case, variant)(case.moving, case.fixed))
    expected = results(case.truth)
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        assert_close(name, actual[name], truth, TOL["network float64"])


def test_float32_agrees_with_float64(case: Case, variant: str) -> None:
    with torch.no_grad():
        out = network(case, variant, torch.float32)(case.moving.float(), case.fixed.float())
    assert out.disp.dtype == out.moved.dtype == torch.float32
    assert_close("disp", out.disp, case.truth.disp, TOL["network float32"])
    assert_close("moved", out.moved, case.truth.moved, TOL["network float32"])


def test_bfloat16_features_stay_close(case: Case, variant: str) -> None:
    net = network(case, variant, torch.float32)
    net.feature_dtype = torch.bfloat16
    with torch.no_grad():
        out = net(case.moving.float(), case.fixed.float())
    for name, x in results(out).items():
        assert x.dtype == torch.float32, name
    assert_close("disp", out.disp, case.truth.disp, TOL["network bfloat16"])
    rms = (out.disp - case.truth.disp).square().mean().sqrt() / case.truth.disp.std()
    assert float(rms) < 0.05


# Shapes and batches


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_equals_its_members(name: str) -> None:
    net = small_network(name).double()
    moving, fixed = (x.double() for x in small_pair(batch=2))
    with torch.no_grad():
        both = net(moving, fixed)
        for i in range(2):
            alone = net(moving[i : i + 1], fixed[i : i + 1])
            for key, x in results(alone).items():
                assert_close(key, results(both)[key][i : i + 1], x, TOL["network float64"])
    assert float(both.disp.abs().max()) > 1
    assert not torch.equal(both.disp[0], both.disp[1])


@pytest.mark.parametrize("sizes", [(33, 50, 29), (16, 16, 16), (1, 17, 32)])
def test_any_size_is_padded_symmetrically_and_cropped_back(sizes: tuple[int, int, int]) -> None:
    net = small_network().double()
    moving, fixed = (x.double() for x in small_pair(sizes))
    padding, window = [], [slice(None), slice(None)]
    for size in sizes:
        excess = (size + 15) // 16 * 16 - size
        padding = [excess // 2, excess - excess // 2, *padding]  # F.pad lists the last axis first
        window.append(slice(excess // 2, excess // 2 + size))
    with torch.no_grad():
        out = net(moving, fixed)
        padded = net(F.pad(moving, padding), F.pad(fixed, padding))
    for key, x in results(out).items():
        assert x.shape[2:] == sizes, key
        assert torch.isfinite(x).all(), key
        assert_close(key, x, results(padded)[key][tuple(window)], TOL["network float64"])


def test_smallest_size_agrees_with_plain() -> None:
    """A level of one voxel: its instance norm is zero, not an error."""
    state = plain.random_state("release", seed=3)
    moving, fixed = smooth_image((16, 16, 32), seed=1), smooth_image((16, 16, 32), seed=2)
    net = UlaeNet("release").double().eval()
    net.load_state_dict(plain.package_state(state, "release"))
    with torch.no_grad():
        disp = net.predict(moving, fixed).disp
        assert_close(
            "disp", disp, plain.register(state, moving, fixed).disp, TOL["network float64"]
        )


def test_inputs_are_not_changed() -> None:
    moving, fixed = small_pair()
    before = moving.clone(), fixed.clone()
    with torch.no_grad():
        small_network()(moving, fixed)
    assert_equal("moving", moving, before[0])
    assert_equal("fixed", fixed, before[1])


def test_non_contiguous_inputs() -> None:
    net = small_network().double()
    moving, fixed = (x.double() for x in small_pair())
    with torch.no_grad():
        expected = net.predict(moving, fixed).disp
        flipped = [x.transpose(2, 4).contiguous().transpose(2, 4) for x in (moving, fixed)]
        actual = net.predict(*flipped).disp
    assert not flipped[0].is_contiguous()
    assert_close("disp", actual, expected, TOL["network float64"])


# Outputs and switches


@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate": False}, {"uncoupled": False}, {"accumulate": False, "uncoupled": False}],
    ids=["full", "one-pass", "coupled", "baseline"],
)
def test_predict_is_forward_without_the_rest(
    arguments: dict[str, int],
) -> None:
    sizes = (17, 32, 20)
    for name in VARIANTS:
        net = small_network(name, **arguments)
        with torch.no_grad():
            out, prediction = net(*small_pair(sizes)), net.predict(*small_pair(sizes))
        assert_equal("moved", prediction.moved, out.moved)
        assert_equal("disp", prediction.disp, out.disp)


def test_results_fit_together() -> None:
    """Every result follows from the steps by the specification's own arithmetic."""
    moving, fixed = small_pair()
    with torch.no_grad():
        out = small_network()(moving, fixed)
    one, two, three = out.steps
    tol = TOL["warp float32"]
    assert_equal("Phi", out.disp, out.accumulated[2])
    assert_equal("phi_1", out.accumulated[0], one)
    assert_close("Phi_2", out.accumulated[1], plain.warp(one, two) + two, tol)
    assert_close("Phi", out.disp, plain.warp(out.accumulated[1], three) + three, tol)
    assert_close("M_1", out.progressive[0], plain.warp(moving, one), tol)
    assert_close("M_2", out.progressive[1], plain.warp(out.progressive[0], two), tol)
    assert_close("M_3", out.progressive[2], plain.warp(out.progressive[1], three), tol)
    assert_close("W", out.moved, plain.warp(moving, out.disp), tol)
    assert not torch.equal(out.moved, out.progressive[2])


@pytest.mark.parametrize("name", VARIANTS)
def test_single_pass(name: str) -> None:
    net = small_network(name, accumulate=False)
    keys = net.state_dict().keys()
    assert {k.split(".")[1] for k in keys if k.startswith(("heads", "decoders"))} == {"3"}
    with torch.no_grad():
        out = net(*small_pair())
    assert [len(out.steps), len(out.accumulated), len(out.progressive)] == [1, 1, 1]
    assert_equal("disp", out.disp, out.steps[0])
    assert_equal("moved", out.moved, out.progressive[0])


def test_single_pass_is_the_plain_third_step() -> None:
    state = plain.random_state("release", seed=4)
    moving, fixed = smooth_image((32, 16, 32), seed=1), smooth_image((32, 16, 32), seed=2)
    net = UlaeNet(accumulate=False).double().eval()
    own = plain.package_state(state, "paper")
    net.load_state_dict({k: v for k, v in own.items() if not k.startswith(("heads.1", "heads.2"))})
    with torch.no_grad():
        expected = plain.step_displacement(state, 3, moving, fixed)
        assert_close("disp", net.predict(moving, fixed).disp, expected, TOL["network float64"])


def test_coupled_encoder_sees_both_images() -> None:
    net = small_network(uncoupled=False)
    blocks = {k.split(".")[1] for k in net.state_dict() if k.startswith("encoder")}
    assert blocks == {"ec1", "ec2", "ec3", "ec4"}
    assert net.encoder.get_parameter("ec1.0.weight").shape == (4, 2, 3, 3, 3)
    moving, fixed = small_pair()
    with torch.no_grad():
        out = net(moving, fixed)
        assert len(out.steps) == 3
        assert not torch.equal(out.disp, net(fixed, fixed).disp)
        assert not torch.equal(out.disp, net(moving, moving).disp)


# Gradients


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("paper", {}),
        ("release", {}),
        ("paper", {"accumulate": False}),
        ("release", {"uncoupled": False}),
    ],
    ids=["paper", "release", "one-pass", "coupled"],
)
def test_a_training_step_reaches_every_parameter(name: str, arguments: dict[str, int]) -> None:
    net = small_network(name, **arguments).train()
    moving, fixed = small_pair((32, 16, 32))
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    out = net(moving, fixed)
    ((out.moved - fixed).square().mean() + 0.01 * out.disp.square().mean()).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert bool(parameter.grad.any()), key
    optimiser.step()
    for key, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[key]), key


def test_gradient_through_three_interpolations() -> None:
    """The released code trains on M_3; every step must learn from it."""
    net = small_network("release").train()
    moving, fixed = small_pair()
    (net(moving, fixed).progressive[2] - fixed).square().mean().backward()
    assert all(bool(p.grad.any()) for p in net.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in net.parameters())


def test_the_graph_for_gradients_does_not_change_the_result() -> None:
    # Without gradients the CPU samples, upsamples and convolves in another order of operations.
    net = small_network().double()
    moving, fixed = (x.double() for x in small_pair())
    with torch.no_grad():
        without = net(moving, fixed)
    for key, x in results(net(moving, fixed)).items():
        assert_close(key, x.detach(), results(without)[key], TOL["network float64"])


@pytest.mark.parametrize("dilation", [4, 3])
@pytest.mark.parametrize("sizes", [(9, 12, 7), (40, 8, 11)], ids=["9x12x7", "40x8x11"])
def test_moving_block_of_an_image_without_gradients(
    dilation: int, sizes: tuple[int, int, int]
) -> None:
    torch.manual_seed(dilation)
    block = MovingBlock(1, 4, dilation).double().requires_grad_(False)
    state = {f"mec.{k}": v for k, v in block.named_parameters()}
    x = noise(2, 1, *sizes, seed=1)
    y = noise(2, 4, *[(s + 1) // 2 for s in sizes], seed=2)
    expected = plain.moving_block(state, "mec", x, y, dilation)
    assert_close("block", block(x, block.fixed_level(y)), expected, TOL["block float64"])


@pytest.mark.parametrize("dilation", [4, 3, 2, 1])
@pytest.mark.parametrize("sizes", [(9, 12, 7), (16, 8, 11)], ids=["9x12x7", "16x8x11"])
def test_folded_moving_block_and_its_gradients(dilation: int, sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(dilation)
    block = MovingBlock(3, 4, dilation).double()
    state = {f"mec.{k}": v.detach().clone().requires_grad_() for k, v in block.named_parameters()}
    x = noise(2, 3, *sizes, seed=1).requires_grad_()
    y = noise(2, 4, *[(s + 1) // 2 for s in sizes], seed=2).requires_grad_()

    expected = plain.moving_block(state, "mec", x, y, dilation)
    upstream = noise(*expected.shape, seed=3) - 0.5
    wanted = torch.autograd.grad((expected * upstream).sum(), [x, y, *state.values()])

    actual = block(x, block.fixed_level(y))
    assert_close("block", actual, expected, TOL["block float64"])
    inputs = [x, y, *[block.get_parameter(k.removeprefix("mec.")) for k in state]]
    got = torch.autograd.grad((actual * upstream).sum(), inputs)
    for name, a, b in zip(["x", "y", *state], got, wanted, strict=True):
        assert bool(b.any()), name
        assert_close(f"gradient of {name}", a, b, TOL["block float64"])


# Layers


@pytest.mark.parametrize("dilations", [(1, 4, 8, 12), (1, 3, 6, 9), (1, 2), (3,)])
def test_strided_convolutions(dilations: tuple[int, ...]) -> None:
    for sizes in ((9, 12, 7), (8, 1, 16)):
        x = noise(2, 3, *sizes, seed=1).requires_grad_()
        weights = [noise(4, 3, 3, 3, 3, seed=2 + d).requires_grad_() for d in dilations]
        terms = list(strided_convolutions(x, dict(zip(dilations, weights, strict=True))))
        for dilation, weight, actual in zip(dilations, weights, terms, strict=True):
            expected = F.conv3d(x, weight, stride=2, padding=dilation, dilation=dilation)
            assert_close("forward", actual, expected, TOL["block float64"])
            wanted = torch.autograd.grad(expected.square().sum(), [x, weight])
            got = torch.autograd.grad(actual.square().sum(), [x, weight], retain_graph=True)
            for name, a, b in zip(("x", "weight"), got, wanted, strict=True):
                assert_close(f"gradient of {name}", a, b, TOL["block float64 gradient"])


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="torch's own bf16 convolution, which this processor gets, is blind to the layout",
)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["inference", "training"])
def test_features_stay_in_channels_last(with_gradients: bool) -> None:
    """One layer that falls back to the default layout costs two copies and the fast kernels."""
    net = small_network("release")
    # In float32 torch gives volumes as small as these to its own convolution, blind to the layout.
    net.feature_dtype = torch.bfloat16
    seen: list[str] = []

    def check(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(name)
            for what, x in (("input", inputs[0]), ("output", output)):
                assert x.is_contiguous(memory_format=torch.channels_last_3d), (name, what)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, ConvBlock | MovingBlock):
            module.register_forward_hook(check(name))
    with torch.set_grad_enabled(with_gradients):
        net(*small_pair((32, 64, 32)))
    assert len(set(seen)) == 12 + 5 + 6 + 7


def test_predict_exports() -> None:
    class Predict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_network()

        def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
            return self.net.predict(moving, fixed)

    moving, fixed = small_pair((16, 32, 16))
    module = Predict().eval()
    with torch.no_grad():
        program = torch.export.export(module, (moving, fixed))
        for name, actual, expected in zip(
            ("moved", "disp"), program.module()(moving, fixed), module(moving, fixed), strict=True
        ):
            assert_close(name, actual, expected, TOL["network float32 exported"])


# Bad input


@pytest.mark.parametrize(
    ("moving", "fixed", "message"),
    [
        ((1, 16, 16, 16), (1, 16, 16, 16), r"moving has shape \(1, 16, 16, 16\), expected \(B, 1"),
        ((1, 2, 16, 16, 16), (1, 2, 16, 16, 16), r"moving has shape \(1, 2, .*expected \(B, 1, D"),
        ((1, 1, 16, 16, 16), (1, 1, 16, 16, 32), r"fixed has shape .*expected .* as moving"),
        ((2, 1, 16, 16, 16), (1, 1, 16, 16, 16), r"fixed has shape \(1, 1, 16, 16, 16\), expected"),
    ],
    ids=["rank", "channels", "size", "batch"],
)
def test_bad_shapes(moving: tuple[int, ...], fixed: tuple[int, ...], message: str) -> None:
    net = small_network()
    for run in (net, net.predict):
        with pytest.raises(ShapeError, match=message):
            run(torch.zeros(moving), torch.zeros(fixed))


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="variant is 'big', expected one of paper, release"):
        UlaeNet("big")
    with pytest.raises(UsageError, match="channels is 0, expected a positive number"):
        UlaeNet(channels=0)
