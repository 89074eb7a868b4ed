"""Weights in torch behind the interface of an exported engine, and the registrar on either."""

import numpy as np
import pytest
import torch

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, save_brain
from _support.engines import SHAPE as TINY
from _support.engines import write_engine
from _support.nets import SHAPE, small_weights
from _support.networks import FakeNetwork
from _support.tolerances import TOL
from ulae_rt.cli import main
from ulae_rt.engines import Engine, load_engine
from ulae_rt.errors import BackendUnavailable, DtypeError, EngineMismatch, ShapeError, UsageError
from ulae_rt.kernels import warp
from ulae_rt.manifest import EngineMetadata
from ulae_rt.model import load_model
from ulae_rt.registration import network as network_module
from ulae_rt.registration.network import TorchBackend, load_network
from ulae_rt.registration.registrar import Registrar, unmirrored

pytestmark = pytest.mark.usefixtures("upright")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


def images(batch=1):
    return np.random.default_rng(0).random((2, batch, 1, *SHAPE), dtype=np.float32)


def test_weights_show_the_interface_of_an_engine(weights):
    moving, fixed = images(2)
    with load_network(weights, device="cpu") as engine:
        assert isinstance(engine, Engine)
        assert engine.description == "torch, cpu, fp32"
        assert (engine.backend, engine.precision, engine.batch) == ("torch", "fp32", 1)
        assert engine.metadata.shape == SHAPE
        assert engine.metadata.licence == "CC0"
        out = engine.run(moving, fixed)
        later = engine.submit(moving, fixed).result(60)
        with pytest.raises(ShapeError, match="moving has shape"):
            engine.run(moving[..., 1:], fixed[..., 1:])
        with pytest.raises(DtypeError, match="moving is float64"):
            engine.run(moving.astype(float), fixed)
    with torch.inference_mode():
        expected = load_model(weights).predict(torch.from_numpy(moving), torch.from_numpy(fixed))
    assert out.disp.dtype == out.moved.dtype == np.float32
    for name in ("disp", "moved"):
        found, truth = getattr(out, name), getattr(expected, name).numpy()
        assert_arrays_close(name, found, truth, TOL["network float32, one by one"])
    np.testing.assert_array_equal(later.disp, out.disp)
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.run(moving, fixed)


def test_precision_auto_is_what_the_weights_are(weights):
    moving, fixed = images()
    exact = load_network(weights, device="cpu", precision="auto")
    assert exact.precision == "fp32"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    half = load_network(weights, device="cpu", precision="bf16")
    assert half.description == "torch, cpu, bf16"
    difference = np.abs(half.run(moving, fixed).disp - exact.run(moving, fixed).disp)
    assert 0 < difference.max() < TOL["small network bfloat16"].absolute


def test_fp16_on_the_cpu_is_refused(weights):
    with pytest.raises(BackendUnavailable, match="precision fp16 was asked for on the CPU"):
        load_network(weights, device="cpu", precision="fp16")


def test_images_that_may_not_be_written_to_are_taken(weights):
    moving, fixed = images()
    moving.flags.writeable = fixed.flags.writeable = False
    assert load_network(weights, device="cpu").run(moving, fixed).disp.shape == (1, 3, *SHAPE)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory running the"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory running the weights on"),
        (RuntimeError("cuDNN error"), "failed running the weights on cpu: cuDNN error"),
    ],
)
def test_failure_of_torch_is_one_error_with_a_remedy(weights, error, message, monkeypatch):
    engine = load_network(weights, device="cpu")

    def fail(*images):
        raise error

    monkeypatch.setattr(engine._backend._program.model, "predict", fail)
    with pytest.raises(EngineMismatch, match=message) as caught:
        engine.run(*images())
    assert caught.value.hint


def test_mistake_that_was_explained_is_passed_on(weights, monkeypatch):
    engine = load_network(weights, device="cpu")

    def fail(*images):
        raise BackendUnavailable("no kernel", "install triton")

    monkeypatch.setattr(engine._backend._program.model, "predict", fail)
    with pytest.raises(BackendUnavailable, match="no kernel"):
        engine.run(*images())


def test_convolutions_are_not_rounded_to_tf32(weights, monkeypatch):
    engine = load_network(weights, device="cpu")
    backend = engine._backend
    assert isinstance(backend, TorchBackend)
    seen = []
    predict = backend._program.model.predict

    def record(*images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return predict(*images)

    monkeypatch.setattr(backend._program.model, "predict", record)
    engine.run(*images())
    assert seen == [False]


@pytest.mark.parametrize("pairs", [1, 4, 5])
def test_an_engine_for_four_pairs_registers_any_number(tmp_path, pairs):
    coarse = EngineMetadata("paper", TINY, 40.0, "max", "none", "CC0")  # holds a whole brain
    folder = write_engine(tmp_path / "engine", "ulae-net-fp32-b4", batch=4, metadata=coarse)
    registrar = Registrar(folder / "ulae-net-fp32-b4.onnx", affine="none")
    assert (registrar.network.batch, registrar.at_once) == (4, 4)
    scan = save_brain(tmp_path / "scan.nii.gz", *GEOMETRIES["LIA"])
    prepared = registrar.prepare(scan, scan)
    found = registrar.deform([prepared] * pairs)
    assert len(found) == pairs
    for deformation in found:
        np.testing.assert_array_equal(deformation.disp, 0)
        np.testing.assert_array_equal(deformation.affine, prepared.affine)


def test_a_refinement_begins_with_the_mean_of_the_pair_and_its_mirror_image(tmp_path):
    scans = [save_brain(tmp_path / f"{name}.nii.gz", *GEOMETRIES[name]) for name in ("LIA", "LAS")]
    seen = []

    class Sided(FakeNetwork):
        """Displacements that depend on the images, and on which side is which."""

        def _displacement(self, moving, fixed):
            seen.append((moving, fixed))
            up = torch.linspace(0, 1, len(moving))[:, None, None]
            return torch.stack([2 * moving + up, fixed - moving, moving * up])

    network = Sided()
    alone, refined = (Registrar(network, affine="none", refine=n) for n in (0, 5))
    (plain,) = alone.deform([pair := refined.prepare(*scans)])
    (mean,) = refined._run([pair])
    straight, *both = seen
    for once, image, mirror in zip(straight, *both, strict=True):
        np.testing.assert_array_equal(image, once)
        np.testing.assert_array_equal(mirror, once.flip(0))
    d, h, w = network._displacement(*both[1]).flip(1)
    assert (plain.disp - mean.disp).abs().max() > 0.1
    # Halving is exact, and the sum is rounded once.
    assert torch.equal(mean.disp, (plain.disp + torch.stack([-d, h, w])) / 2)


def test_a_mirror_image_moves_as_its_pair_does(weights):
    moving, fixed = images()
    mirrored = [np.ascontiguousarray(image[:, :, ::-1]) for image in (moving, fixed)]
    network = load_network(weights, device="cpu")
    disp, moved = (getattr(network.run(*mirrored), name) for name in ("disp", "moved"))
    found = warp(torch.from_numpy(moving), unmirrored(torch.from_numpy(disp)))
    assert_arrays_close(
        "moved", found.numpy()[:, :, ::-1], moved, TOL["network float32, one by one"]
    )


def test_a_fixed_scan_made_ready_once_serves_every_moving_one(weights, tmp_path):
    registrar = Registrar(weights, device="cpu", affine="none")
    moving = save_brain(tmp_path / "moving.nii.gz", *GEOMETRIES["LIA"])
    fixed = save_brain(tmp_path / "fixed.nii.gz", *GEOMETRIES["LAS"])
    target = registrar.target(fixed)
    once, again = (registrar(moving, each) for each in (target, fixed))
    np.testing.assert_array_equal(once.warp.disp, again.warp.disp)
    np.testing.assert_array_equal(np.asarray(once.moved.dataobj), np.asarray(again.moved.dataobj))


def test_register_says_which_engine_ran(tmp_path, monkeypatch, capsys):
    scan = str(save_brain(tmp_path / "scan.nii.gz", *GEOMETRIES["LIA"]))
    asked = {}

    def remember(path, **options):
        asked.update(options)
        return load_engine(path, **options)

    monkeypatch.setattr(network_module, "load_engine", remember)
    coarse = EngineMetadata("paper", TINY, 40.0, "max", "none", "CC0")  # holds a whole brain
    folder = write_engine(tmp_path / "engine", precision="fp16", metadata=coarse)
    out = str(tmp_path / "moved.nii.gz")
    status = main(
        ["register", "-m", scan, "-f", scan, "-o", out, "--affine", "none", "--engine", str(folder)]
    )
    assert (status, asked["precision"]) == (0, "auto")
    said = capsys.readouterr().out
    assert "network     onnxruntime, cpu, fp16 (ulae-net-fp16.onnx)" in said


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """What the hints say: an engine of the weights."""
    out = tmp_path_factory.mktemp("exported") / "engine"
    line = ["--weights", str(weights), "--out", str(out), "--format", "onnx"]
    assert main(["export", *line, "--precision", "fp32"]) == 0
    return out


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return save_brain(tmp_path_factory.mktemp("scan") / "s.nii.gz", *GEOMETRIES["RAS"])


def register(scan, folder, *flags):
    out = str(folder / "moved.nii.gz")
    line = ["-m", str(scan), "-f", str(scan), "-o", out, "--affine", "none", "--device", "cpu"]
    return main(["register", *line, *flags])


@pytest.mark.slow  # an export
@pytest.mark.follows("make one with 'ulae-rt export' and give its folder; weights go to --weights")
def test_weights_given_as_an_engine(weights, exported, scan, tmp_path, capsys):
    assert register(scan, tmp_path, "--engine", str(weights)) == 1
    said = capsys.readouterr().err
    assert "hint: make one with 'ulae-rt export' and give its folder; weights go to" in said
    assert register(scan, tmp_path, "--engine", str(exported)) == 0
    assert register(scan, tmp_path, "--weights", str(weights), "--overwrite") == 0


@pytest.mark.slow  # an export
@pytest.mark.follows(
    "export the weights again: python -m ulae_rt.export --weights FILE --out DIR --overwrite"
)
def test_an_engine_of_another_grid_than_it_says(
    weights, exported, scan, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "displacement", lambda *_: torch.zeros(1, 3, 4, 4, 4))
        assert register(scan, tmp_path, "--engine", str(exported)) == 1
    said = capsys.readouterr().err
    assert "the network returned a displacement of (3, 4, 4, 4)" in said
    hint = "python -m ulae_rt.export --weights FILE --out DIR --overwrite"
    assert f"hint: export the weights again: {hint}" in said
    line = ["--weights", str(weights), "--out", str(exported), "--overwrite", "--format", "onnx"]
    assert main(["export", *line, "--precision", "fp32"]) == 0
    assert register(scan, tmp_path, "--engine", str(exported)) == 0


@pytest.mark.slow  # an export
@pytest.mark.follows("leave out --backend torch, or give --weights FILE in place of the engine")
@pytest.mark.follows("make one with 'ulae-rt export' and give its folder: --engine DIR")
def test_backends_and_what_they_run(weights, exported, scan, tmp_path, capsys):
    engine, network = ("--engine", str(exported)), ("--weights", str(weights))
    assert register(scan, tmp_path, *engine, "--backend", "torch") == 2
    assert "hint: leave out --backend torch, or give --weights" in capsys.readouterr().err
    assert register(scan, tmp_path, *engine) == 0
    assert register(scan, tmp_path, *network, "--backend", "torch", "--overwrite") == 0
    assert register(scan, tmp_path, *network, "--backend", "onnxruntime", "--overwrite") == 2
    assert "hint: make one with 'ulae-rt export' and give its" in capsys.readouterr().err
    assert register(scan, tmp_path, *engine, "--backend", "onnxruntime", "--overwrite") == 0


@pytest.mark.follows("give the file, or what ulae_rt.registration.network.load_network makes of it")
def test_a_model_is_not_an_opened_network(weights):
    for wrong in (load_model(weights), 5, [], b"x"):
        with pytest.raises(UsageError, match="expected a path or an opened network"):
            Registrar(wrong)
    Registrar(weights, device="cpu")
    assert Registrar(load_network(weights, device="cpu")).settings["method"] == "network"


def test_no_pairs_are_no_deformations(weights):
    assert Registrar(weights, device="cpu").deform([]) == []


@pytest.mark.follows("give torch.from_numpy(array).float(); for scans, use ulae_rt.Registrar")
def test_the_model_takes_tensors(weights):
    moving, fixed = images()
    model = load_model(weights)
    with pytest.raises(DtypeError, match="moving is ndarray, expected a tensor"):
        model(moving, fixed)
    with pytest.raises(DtypeError, match=r"moving is torch.int32, expected a tensor"):
        model(torch.ones(1, 1, *SHAPE, dtype=torch.int32), torch.from_numpy(fixed))
    with torch.inference_mode():
        model(torch.from_numpy(moving).float(), torch.from_numpy(fixed).float())
