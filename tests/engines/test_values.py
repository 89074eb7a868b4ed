"""The values an engine is fed and gives: of the wrong scale or no numbers, they are refused."""

import time

import numpy as np
import pytest
import torch

from _support.engines import SHAPE, images, write_engine
from _support.nets import SHAPE as NET_SHAPE
from _support.nets import small_net, small_weights
from ulae_rt.engines import Engine, load_engine
from ulae_rt.engines.values import RANGE_SLACK
from ulae_rt.errors import DtypeError, EngineMismatch, IntensityError
from ulae_rt.manifest import EngineMetadata
from ulae_rt.registration.network import load_network

METADATA = EngineMetadata("paper", SHAPE, 1.0, "max", "none", "CC0")


class Answering:
    """A backend that counts its runs and answers what it is told to."""

    name, device = "answering", "cpu"

    def __init__(self, batch=1, disp=0.0, shape=SHAPE):
        self.inputs = dict.fromkeys(("moving", "fixed"), (batch, 1, *shape))
        self.outputs = {"moved": (batch, 1, *shape), "disp": (batch, 3, *shape)}
        self.disp, self.runs = disp, 0

    def run(self, feeds, outputs=None):
        self.runs += 1
        moving = feeds["moving"]
        disp = np.zeros((len(moving), 3, *moving.shape[2:]), np.float32)
        disp[-1, 1, 0, 0, 1] = self.disp
        return {"moved": moving, "disp": disp}

    def close(self):
        pass


@pytest.fixture
def backend():
    return Answering()


@pytest.fixture
def engine(backend):
    with Engine(backend, METADATA, "fp16") as engine:
        yield engine


def scaled(image):
    return image * np.float32(4095)


def below(image):
    image = image.copy()
    image[0, 0, 1, 2, 3] = -0.5
    return image


def with_value(value):
    def change(image):
        image = image.copy()
        image[0, 0, 1, 2, 3] = value
        return image

    return change


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled, r"has values from \d.* to [34]\d\d\d.*, expected 0 to 1"),
        (below, r"has values from -0\.5 to 0\.9.*, expected 0 to 1"),
        (with_value(1.01), r"has values from 0.* to 1\.01, expected 0 to 1"),
        (with_value(np.nan), r"1 of its 120 voxels is NaN or infinite, expected 0 to 1"),
        (with_value(np.inf), r"1 of its 120 voxels is NaN or infinite, expected 0 to 1"),
        (with_value(-np.inf), r"1 of its 120 voxels is NaN or infinite, expected 0 to 1"),
    ],
    ids=["scanner", "negative", "just-above", "nan", "inf", "minus-inf"],
)
def test_images_that_no_network_was_made_for_are_refused(engine, backend, which, change, message):
    pair = list(images())
    pair[which] = change(pair[which])
    name = ("moving", "fixed")[which]
    with pytest.raises(IntensityError, match=f"^{name} of pair 0: {message}"):
        engine.run(*pair)
    with pytest.raises(IntensityError, match=f"^{name} of pair 0: {message}"):
        engine.submit(*pair).result(20)
    assert backend.runs == 0


def test_the_pair_is_named_by_its_place(backend):
    engine = Engine(Answering(batch=-1), METADATA, "fp32")
    moving, fixed = images(4)
    fixed[2] *= 7
    with pytest.raises(IntensityError, match=r"^fixed of pair 2 \(counted from 0, of 4\): has val"):
        engine.run(moving, fixed)


def test_rounding_at_the_ends_is_let_through(engine):
    moving, fixed = images()
    moving[0, 0, 0, 0, :3] = (-RANGE_SLACK, 1 + RANGE_SLACK / 2, -0.0)
    fixed[...] = 0
    assert engine.run(moving, fixed).moved.shape == moving.shape
    np.testing.assert_array_equal(engine.run(moving, fixed).moved, moving)
    moving[0, 0, 0, 0, 0] = -1.5 * RANGE_SLACK
    with pytest.raises(IntensityError, match="expected 0 to 1"):
        engine.run(moving, fixed)


def test_views_are_checked_too(engine):
    moving, fixed = images()
    wide = np.zeros((*moving.shape, 2), np.float32)
    wide[..., 0], wide[..., 1] = moving, 9
    assert engine.run(wide[..., 0], fixed).moved.shape == moving.shape
    with pytest.raises(IntensityError, match="has values from 9 to 9"):
        engine.run(wide[..., 1], fixed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_results_that_are_no_numbers_are_refused(engine, backend, value):
    backend.disp = value
    with pytest.raises(EngineMismatch, match=r"disp of pair 0 has 1 of 360 values NaN or inf") as e:
        engine.run(*images())
    assert "precision" in e.value.hint
    with pytest.raises(EngineMismatch, match="NaN or inf"):
        engine.submit(*images()).result(20)


def test_the_pair_with_such_a_result_is_named_across_parts():
    engine = Engine(Answering(batch=2, disp=np.nan), METADATA, "fp16")
    with pytest.raises(EngineMismatch, match=r"disp of pair 1 \(counted from 0, of 4\) has 1 of"):
        engine.run(*images(4))


def test_large_but_finite_results_pass(engine, backend):
    backend.disp = 3e38  # its square is infinite
    assert engine.run(*images()).disp.max() == np.float32(3e38)


@pytest.mark.follows("normalise each scan as engine.metadata.normalisation says")
def test_hint_for_the_scale_leads_to_a_result(engine):
    moving, fixed = images()
    with pytest.raises(IntensityError) as caught:
        engine.run(scaled(moving), fixed)
    assert "divide by the scan's own maximum, or by its 99.9th percentile and clip" in str(
        caught.value.hint
    )
    image = scaled(moving)
    engine.run(image / image.max(), fixed)
    engine.run(np.clip(image / np.float32(np.percentile(image, 99.9)), 0, 1), fixed)


@pytest.mark.follows("find out where they come from; to take them for background: nan_to_num(")
@pytest.mark.parametrize("library", [np, torch])
def test_hint_for_nan_leads_to_a_result(engine, library):
    moving, fixed = map(library.asarray, images())
    moving[0, 0, 0, 0, 0], moving[0, 0, 0, 0, 1] = np.nan, np.inf
    with pytest.raises(IntensityError, match="2 of its 120 voxels are NaN or infinite") as caught:
        engine.run(moving, fixed)
    code, _, where = caught.value.hint.rpartition(": ")[2].rpartition(", of ")
    assert code == "nan_to_num(moving, posinf=0, neginf=0)"
    assert where == "numpy or of torch"
    engine.run(eval(code, {"nan_to_num": library.nan_to_num, "moving": moving}), fixed)


def test_hint_for_results_leads_to_one(tmp_path):
    """An fp16 engine that overflows, and the fp32 engine of the same folder."""
    write_engine(tmp_path, precision="fp16")
    write_engine(tmp_path, precision="fp32")
    half = load_engine(tmp_path, precision="fp16")
    half._backend = Answering(disp=np.inf)
    with pytest.raises(EngineMismatch, match="NaN or infinite") as caught:
        half.run(*images())
    assert "precision='fp32'" in caught.value.hint
    assert load_engine(tmp_path, precision="fp32").run(*images()).disp.shape == (1, 3, *SHAPE)


def test_weights_that_torch_runs_are_fed_by_the_same_rules(tmp_path):
    weights = small_weights(tmp_path / "w.safetensors")
    image = torch.rand(1, 1, *NET_SHAPE)
    with load_network(weights, device="cpu") as engine:
        engine.run(image, image)
        with pytest.raises(IntensityError, match="moving of pair 0"):
            engine.run(image * 4095, image)
        engine._backend._program.model.heads["3"].bias.data.fill_(torch.nan)
        with pytest.raises(EngineMismatch, match="NaN or infinite"):
            engine.run(image, image)


def test_the_checks_are_cheap():
    """One pass each over what is fed and given: a tenth of a second would be felt, this is not."""
    shape = (80, 96, 80)
    metadata = EngineMetadata("paper", shape, 2.0, "max", "none", "CC0")
    engine = Engine(Answering(shape=shape), metadata, "fp32")
    moving, fixed = np.random.default_rng(0).random((2, 1, 1, *shape), dtype=np.float32)
    results = {"moved": moving, "disp": np.zeros((1, 3, *shape), np.float32)}

    def seconds():
        start = time.perf_counter()
        engine._check_values({"moving": moving, "fixed": fixed})
        engine._check_results(results)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.02


@pytest.mark.follows("its weights give no numbers for these images: use others, or train again")
def test_hint_for_weights_that_give_no_numbers(tmp_path):
    net = small_net()
    net.heads["3"].weight.data.fill_(3e38)  # finite, and infinite once they are summed
    broken, others = tmp_path / "broken.safetensors", tmp_path / "others.safetensors"
    image = torch.rand(2, 1, 1, *NET_SHAPE)
    with (
        load_network(small_weights(broken, net), device="cpu") as engine,
        pytest.raises(EngineMismatch, match="NaN or infinite") as caught,
    ):
        engine.run(*image)
    assert "use others, or train again" in caught.value.hint
    with load_network(small_weights(others), device="cpu") as engine:
        assert engine.run(*image).disp.any()


@pytest.mark.follows("{}.filled(0)")
def test_a_masked_array_is_not_fed_whole():
    with Engine(Answering(), METADATA, "fp32") as engine:
        moving, fixed = np.random.default_rng(0).random((2, 1, 1, *SHAPE), dtype=np.float32)
        masked = np.ma.masked_array(moving, moving > 0.5)
        with pytest.raises(DtypeError, match="moving is a masked array"):
            engine.run(masked, fixed)
        assert engine.run(masked.filled(0), fixed).moved.max() <= 0.5
