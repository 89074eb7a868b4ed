"""The network as it is run: the same function as the one that is trained."""

import pytest
import torch
from torch import Tensor

from _support import plain_ulae
from _support.nets import SHAPE, small_net
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import smooth_image
from ulae_rt.kernels import warp
from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import ConvBlock, channel_multiple
from ulae_rt.model.checkpoint import PRECISIONS
from ulae_rt.model.program import InferenceProgram


def pair(dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    return [smooth_image(SHAPE, batch, seed=seed, dtype=dtype) for seed in (1, 2)]


def full_net(variant: str) -> UlaeNet:
    """Of 16 channels, whose heads displace by voxels."""
    state = plain_ulae.scale_heads(plain_ulae.random_state(variant), (0.3, 0.6, 1.0))
    net = UlaeNet(variant).double().eval()
    net.load_state_dict(plain_ulae.package_state(state, variant))
    return net


@pytest.mark.parametrize(("multiple", "fused"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_program_is_the_network_in_float64(variant: str, multiple: int, fused: bool) -> None:
    net = full_net(variant)
    images = pair(torch.float64)
    with torch.inference_mode():
        expected = net.predict(*images)
        moved, disp = InferenceProgram(net, "fp32", multiple, fused=fused)(*images)
    assert expected.disp.abs().max() > 1
    for result, truth in ((moved, expected.moved), (disp, expected.disp)):
        assert float((result - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


def test_concatenations_are_filled_up_to_a_multiple_of_eight() -> None:
    program = InferenceProgram(full_net("release"), "fp16", 8)
    inputs = {
        name: block.get_parameter("0.weight").shape[1]
        for name, block in program.model.named_modules()
        if isinstance(block, ConvBlock)
    }
    # Nothing else, and not the images: a convolution of one channel gains nothing.
    assert [count for name, count in inputs.items() if name.endswith("dc6")] == [24] * 3
    assert inputs["encoder.fec1"] == 1
    assert {count % 8 for name, count in inputs.items() if name != "encoder.fec1"} == {0}
    assert [
        channel_multiple(dtype, device)
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ] == [1, 1, 1, 1, 8, 8]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_displacement_alone_is_that_of_both(precision: str) -> None:
    net = small_net()
    net.feature_dtype = PRECISIONS[precision]
    program = InferenceProgram(net, precision)
    images = pair(torch.float32)
    with torch.inference_mode():
        moved, disp = program(*images)
        assert_equal("disp", program.displacement(*images), disp)
        assert_equal("moved", moved, warp(images[0], disp))
        assert_equal("network's", net.displacement(*images), net.predict(*images).disp)
        name = "network float32 exported" if precision == "fp32" else "network bfloat16"
        assert_close("disp", disp, net.displacement(*images), TOL[name])


def test_weights_rest_as_they_are_read() -> None:
    """A conversion in every run would be a launch for each."""
    program = InferenceProgram(small_net(), "bf16")
    wide = {name for name, x in program.state_dict().items() if x.dtype == torch.float32}
    assert wide == {
        *(f"model.heads.{step}.{part}" for step in (1, 2) for part in ("weight", "bias")),
        *(
            f"model.encoder.mec{level}.{part}"
            for level in (1, 2, 3, 4)
            for part in ("mean", "bias")
        ),
    }
    for name, x in program.state_dict().items():
        if x.ndim == 5:
            assert x.is_contiguous(memory_format=torch.channels_last_3d), name
        assert not x.requires_grad, name


def test_the_model_is_left_alone() -> None:
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    InferenceProgram(net, "fp16", 8)
    assert net.feature_dtype is None
    for name, value in net.state_dict().items():
        assert_equal(name, value, before[name])
