"""The inference graph is the network: in float64, whatever was folded, merged and respelt."""

import copy
import time

import pytest
import torch

from _support import plain_ulae
from _support.nets import small_net
from ulae_rt.errors import EquivalenceError, ExportError
from ulae_rt.export import graph
from ulae_rt.export.graph import InferenceGraph, check_rewriting
from ulae_rt.model import UlaeNet

RELATIVE = 1e-9  # asked for; 1e-13 measured


# Levels of 4, 2, 2, 1 and 3, 5, 1 voxels: odd, even and single.
@pytest.mark.parametrize("shape", [(32, 16, 64), (48, 80, 16)], ids=["even", "odd"])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_graph_equals_the_plain_network_in_float64(variant, shape):
    state = plain_ulae.scale_heads(plain_ulae.random_state(variant), (0.3, 0.6, 1.0))
    model = UlaeNet(variant).double().eval()
    model.load_state_dict(plain_ulae.package_state(state, variant))
    moving, fixed = torch.rand(2, 1, 1, *shape, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_ulae.register(state, moving, fixed)
        moved, disp = InferenceGraph(model)(moving, fixed)
    assert expected.disp.abs().max() > 1
    for found, truth in ((moved, expected.moved), (disp, expected.disp)):
        error = float((found - truth).abs().max() / truth.abs().max())
        print(f"{variant} {shape}: {error:.1e} of {float(truth.abs().max()):.1f}")
        assert error <= RELATIVE


@pytest.mark.parametrize(
    "model",
    [
        small_net("paper"),
        small_net("release"),
        small_net(accumulate=False),
        UlaeNet(channels=4, uncoupled=False).eval(),
        UlaeNet(channels=4).eval(),
    ],
    ids=["paper", "release", "one step", "coupled", "untrained"],
)
def test_rewriting_is_checked_and_leaves_the_model_alone(model):
    before = copy.deepcopy(model.state_dict())
    check_rewriting(model)
    assert {key: value.dtype for key, value in before.items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_check_of_a_full_network_takes_two_seconds_at_most():
    model = UlaeNet().eval()
    start = time.process_time()
    check_rewriting(model)
    # On a busy machine the clock of the process is the fairer one; two threads share it.
    assert time.process_time() - start < 4


def _lose_a_branch(monkeypatch):
    folded = graph.MovingBlock.folded

    def lossy(self):
        weights = folded(self)
        return weights._replace(mean=weights.mean * (1 + 1e-6))

    monkeypatch.setattr(graph.MovingBlock, "folded", lossy)


def _other_eps(monkeypatch):
    monkeypatch.setattr(graph, "NORM_EPS", 1.01e-5)


def _nearest_upsampling(monkeypatch):
    monkeypatch.setattr(
        graph, "_upsampled", lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0)
    )


@pytest.mark.parametrize("damage", [_lose_a_branch, _other_eps, _nearest_upsampling])
def test_wrong_rewriting_is_refused(damage, monkeypatch):
    model = small_net()
    damage(monkeypatch)
    with pytest.raises(EquivalenceError, match=r"moved differs by .* expected at most 1e-09"):
        check_rewriting(model)


def test_half_precision_keeps_float32_where_rounding_would_show():
    half = InferenceGraph(small_net(), "fp16")
    types = {name: value.dtype for name, value in half.model.state_dict().items()}
    wide = {name for name, dtype in types.items() if dtype == torch.float32}
    assert wide == {
        *(f"heads.{step}.{part}" for step in (1, 2) for part in ("weight", "bias")),
        *(f"encoder.mec{level}.{part}" for level in (1, 2, 3, 4) for part in ("mean", "bias")),
    }
    assert set(types.values()) == {torch.float32, torch.float16}


def test_weights_beyond_half_precision_are_refused():
    large = small_net()
    with torch.no_grad():
        large.get_parameter("encoder.fec2.0.weight")[0, 0, 0, 0, 0] = 1e5
    with pytest.raises(ExportError, match=r"fec2\.0\.weight holds values beyond 65504"):
        InferenceGraph(large, "fp16")


def test_constant_images_leave_no_nan():
    # Variances of zero, and means far above them: rounding must not make a negative variance.
    model = small_net()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "heads" not in name:
                weight.mul_(30)
        for value in (0.0, 1.0):
            image = torch.full((1, 1, 16, 16, 16), value)
            for result in InferenceGraph(model)(image, image):
                assert result.isfinite().all()
