"""The gate that no wrong artefact passes: every kind of mistake is made here once."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from _support import plain_ulae as plain
from _support.nets import SHAPE, small_net
from ulae_rt.engines.backends.onnxruntime import OnnxRuntimeBackend
from ulae_rt.errors import EquivalenceError
from ulae_rt.export.cases import SAMPLE, canary_case, canary_heads, folded, sample_case
from ulae_rt.export.config import TOLERANCES
from ulae_rt.export.onnx import onnx_from_model, with_heads_of
from ulae_rt.export.verify import verify
from ulae_rt.manifest import ANY_BATCH
from ulae_rt.model import UlaeNet

TINY = (16, 32, 16)


@pytest.fixture(scope="module")
def model():
    return small_net()


@pytest.fixture(scope="module")
def sample(model):
    return sample_case(model, SHAPE, both_ways=True)


class Recorded:
    """A backend that returns the truth, made wrong in one way."""

    name, device = "recorded", "cpu"

    def __init__(self, case, wrong=lambda disp, moved, call: None):
        self.case, self.wrong, self.calls = case, wrong, 0

    def run(self, feeds, outputs=None):
        disp, moved = [], []
        for image in feeds["moving"]:
            (pair,) = [i for i, each in enumerate(self.case.moving) if np.array_equal(each, image)]
            disp.append(self.case.truth[pair].disp.astype(np.float32))
            moved.append(self.case.truth[pair].moved.astype(np.float32))
        result = {"disp": np.stack(disp), "moved": np.stack(moved)}
        self.wrong(result["disp"], result["moved"], self.calls)
        self.calls += 1
        return result


def test_the_truth_passes_and_is_described(sample):
    found = verify(Recorded(sample), 2, sample, TOLERANCES["fp32"])
    assert found.pair == SAMPLE
    assert found.runtime == "recorded cpu"
    assert found.machine
    assert found.disp_largest > 1
    assert 0 < found.disp_max < 1e-6
    assert found.sign_flips == 0


def _shift(disp, moved, call):
    disp += 0.002


def _one_voxel(disp, moved, call):
    disp[0, 1, 3, 4, 5] += 0.01


def _nan(disp, moved, call):
    disp[0, 0, 0, 0, 0] = np.nan


def _image(disp, moved, call):
    moved[0, 0, 1, 2, 3] += 0.01


def _fold(disp, moved, call):
    # A wave along d: no voxel is far off, but every second one turns over.
    disp[:, 0, 0::4] += 1.2
    disp[:, 0, 2::4] -= 1.2


def _second_time(disp, moved, call):
    moved[0, 0, 1, 2, 3] += 1e-7 * call


def _by_place(disp, moved, call):
    disp[1] = disp[0]


@pytest.mark.parametrize(
    ("wrong", "precision", "message"),
    [
        (_shift, "fp32", "mean displacement error"),
        (_one_voxel, "fp32", r"largest displacement error.*disp\[0, :, 3, 4, 5\]"),
        (_nan, "bf16", "mean displacement error, voxels: inf"),
        (_image, "fp32", "largest error of the moved image"),
        (_second_time, "fp32", "the same inputs gave another moved the second time"),
        (_by_place, "fp32", "displacement error"),
    ],
)
def test_each_mistake_is_refused(sample, wrong, precision, message):
    with pytest.raises(EquivalenceError, match=message) as caught:
        verify(Recorded(sample, wrong), 2, sample, TOLERANCES[precision])
    assert caught.value.hint


def test_folding_alone_is_refused(sample):
    generous = replace(TOLERANCES["bf16"], disp_mean=1.0, disp_p99=3.0, disp_max=3.0)
    with pytest.raises(EquivalenceError, match="changed its sign"):
        verify(Recorded(sample, _fold), 2, sample, generous)


def test_batches_are_permuted_and_open_ones_run_alone_too(sample):
    backend = Recorded(sample)
    verify(backend, ANY_BATCH, sample, TOLERANCES["fp32"])
    assert backend.calls == 4  # as it is, again, the other way round, one alone
    single = sample.batch(1)
    backend = Recorded(single)
    verify(backend, 1, single, TOLERANCES["fp32"])
    assert backend.calls == 2


def test_folded_is_where_the_determinant_is_not_positive():
    disp = np.zeros((3, 8, 8, 8))
    disp[0] = -2.0 * np.arange(8)[:, None, None]  # d to -d: turned over everywhere
    assert folded(disp).all()
    assert not folded(disp / 4).any()


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_truth_is_that_of_the_plain_network(variant):
    state = plain.random_state(variant)
    state = {key: value.float() for key, value in plain.scale_heads(state, (1.7, 0.5, 0.5)).items()}
    net = UlaeNet(variant).eval()
    net.load_state_dict(plain.package_state(state, variant))
    case = sample_case(net, (32, 48, 32), both_ways=False)
    double = {key: value.double() for key, value in state.items()}
    expected = plain.register(double, *(torch.from_numpy(x).double() for x in case[1:3]))
    assert np.abs(case.truth[0].disp - expected.disp[0].numpy()).max() < 1e-9
    assert np.abs(case.truth[0].moved - expected.moved[0].numpy()).max() < 1e-9


@pytest.fixture(scope="module")
def untrained():
    """Weights that displace nothing, where only the canary sees what sampling does."""
    torch.manual_seed(0)
    model = UlaeNet(channels=4).eval()
    canary = canary_heads(model)
    protos = {p: onnx_from_model(model, TINY, precision=p) for p in ("fp32", "fp16")}
    case = canary_case(canary, TINY, both_ways=False)
    return {p: with_heads_of(canary, proto) for p, proto in protos.items()}, case


def loaded(proto):
    return OnnxRuntimeBackend(proto.SerializeToString(), "cpu")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_as_it_is_passes_the_canary(untrained, precision):
    protos, case = untrained
    measured = verify(loaded(protos[precision]), 1, case, TOLERANCES[precision])
    assert measured.disp_largest > 1


def _set(attribute, value):
    def change(node):
        for each in node.attribute:
            if each.name == attribute:
                node.attribute.remove(each)
        node.attribute.append(onnx.helper.make_attribute(attribute, value))

    return change


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize(
    "change", [_set("mode", "nearest"), _set("align_corners", 1)], ids=["nearest", "half a voxel"]
)
def test_wrong_sampling_is_noticed_even_when_weights_displace_nothing(
    untrained, precision, which, change
):
    protos, case = untrained
    broken = onnx.ModelProto()
    broken.CopyFrom(protos[precision])
    change([node for node in broken.graph.node if node.op_type == "GridSample"][which])
    with pytest.raises(EquivalenceError, match="canary heads"):
        verify(loaded(broken), 1, case, TOLERANCES[precision])
