"""Weights to ONNX and back: what is written, and that nothing wrong ever is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from _support.nets import SHAPE, small_net, small_weights
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine
from ulae_rt.engines.backends import OnnxRuntimeBackend
from ulae_rt.errors import EquivalenceError, ExportError, UsageError
from ulae_rt.export import ExportConfig, exporter
from ulae_rt.export.onnx import onnx_from_model
from ulae_rt.export.verify import DISP_TOLERANCE, cases, measure
from ulae_rt.manifest import Manifest, sha256
from ulae_rt.model import UlaeNet, load_model


@pytest.fixture(scope="module")
def model() -> UlaeNet:
    return small_net()


@pytest.fixture(scope="module")
def proto(model):
    return onnx_from_model(model, SHAPE)


@pytest.fixture
def fast(monkeypatch, proto):
    """Tracing takes most of the time of an export and has tests of its own."""
    monkeypatch.setattr(exporter, "onnx_from_model", lambda model, shape: proto)


def copied(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def verified(model, proto, shape=SHAPE):
    return [
        measure(case, OnnxRuntimeBackend(case.proto.SerializeToString(), "cpu"))
        for case in cases(model, proto, shape)
    ]


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_command_writes_an_engine_that_computes_what_torch_does(variant, tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors", small_net(variant))
    out = tmp_path / "new" / "engine"
    assert run_command("export", ["--weights", str(weights), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\n") == 1
    assert "ulae-net-fp32.onnx" in printed.out
    assert sorted(path.name for path in out.iterdir()) == [
        "ulae-net-fp32.json",
        "ulae-net-fp32.onnx",
    ]

    engine = load_engine(out, device="cpu")
    manifest = engine.manifest
    assert manifest.metadata.variant == variant
    assert manifest.metadata.shape == SHAPE
    assert manifest.metadata.spacing_mm == 2.0
    assert manifest.metadata.licence == "CC0"
    assert manifest.weights_sha256 == sha256(weights.read_bytes())
    assert [spec.name for spec in manifest.inputs] == ["moving", "fixed"]
    assert [spec.name for spec in manifest.outputs] == ["moved", "disp"]
    assert manifest.outputs[1].shape == (1, 3, *SHAPE)
    assert manifest.outputs[1].components == ("d", "h", "w")
    assert {"ulae-rt", "torch", "onnx", "onnxruntime"} <= manifest.versions.keys()
    assert len(manifest.errors) == 2
    assert all(0 < measured.disp_max < DISP_TOLERANCE for measured in manifest.errors)
    assert all(measured.disp_largest > 1 for measured in manifest.errors)

    moving, fixed = torch.rand(2, 2, 1, *SHAPE)
    with torch.no_grad():
        expected = load_model(weights).predict(moving, fixed)
    found = engine.run(moving, fixed)
    np.testing.assert_allclose(found.disp, expected.disp.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.moved, expected.moved.numpy(), rtol=0, atol=1e-4)


def test_verification_passes_on_the_graph_as_it_is(model, proto):
    first, second = verified(model, proto)
    assert first.pair == "synthetic brains"
    assert second.pair == "noise, canary heads"
    assert first.disp_mean <= first.disp_p99 <= first.disp_max < 1e-4


@pytest.mark.parametrize("name", ["model.encoder.fec1.0.weight", "model.heads.2.weight"])
def test_damaged_weight_is_noticed(model, proto, name):
    damaged = copied(proto)
    tensor = next(t for t in damaged.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[values.size // 2] += 0.2
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    with pytest.raises(EquivalenceError, match=r"disp\[0, \d, \d+, \d+, \d+\] is .* expected"):
        verified(model, damaged)


TINY = (16, 32, 16)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    model = UlaeNet(channels=4).eval()
    return model, onnx_from_model(model, TINY)


@pytest.mark.parametrize("which", range(5))
def test_nearest_for_linear_is_noticed_even_when_weights_displace_nothing(untrained, which):
    model, proto = untrained
    broken = copied(proto)
    node = [n for n in broken.graph.node if n.op_type == "GridSample"][which]
    next(a for a in node.attribute if a.name == "mode").s = b"nearest"
    with pytest.raises(EquivalenceError, match="canary heads" if which < 2 else "failed on"):
        verified(model, broken, TINY)


def test_failed_verification_leaves_nothing(tmp_path, monkeypatch, proto, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    damaged = copied(proto)
    tensor = next(t for t in damaged.graph.initializer if t.name == "model.heads.3.weight")
    values = onnx.numpy_helper.to_array(tensor) * np.float32(1.1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    monkeypatch.setattr(exporter, "onnx_from_model", lambda model, shape: damaged)
    out = tmp_path / "engine"
    assert run_command("export", ["--weights", str(weights), "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("error: verification failed on synthetic brains: disp[")
    assert error[1].startswith("hint: ")
    assert len(error) == 2
    assert not out.exists()


@pytest.mark.usefixtures("fast")
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    write = Path.write_bytes

    def full(self, content):
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "engine"
    assert run_command("export", ["--weights", str(weights), "--out", str(out)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.usefixtures("fast")
def test_existing_artefact_is_replaced_only_when_told(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    out = tmp_path / "engine"
    out.mkdir()
    (out / "ulae-net-fp32.onnx").write_text("old")
    command = ["--weights", str(weights), "--out", str(out)]
    assert run_command("export", command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "ulae-net-fp32.onnx").read_text() == "old"

    assert run_command("export", [*command, "--overwrite", "--json"]) == 0
    (artefact,) = json.loads(capsys.readouterr().out)["artefacts"]
    assert artefact["path"] == str(out / "ulae-net-fp32.onnx")
    written = Manifest.read(out / "ulae-net-fp32.json")
    assert artefact["manifest"]["artefact_sha256"] == written.artefact_sha256
    assert load_engine(out).manifest == written


@pytest.mark.usefixtures("fast")
def test_default_folder_is_named_after_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_weights(Path("best.safetensors"))
    assert run_command("export", ["--weights", "best.safetensors"]) == 0
    assert load_engine("build/engines/best").manifest.metadata.shape == SHAPE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "30", "48", "32"], "30 x 48 x 32"),
        (["--shape", "0", "48", "32"], "0 x 48 x 32"),
        (["--shape", "4096", "4096", "4096"], "at most"),
        (["--shape", "32", "48"], "expected 3 arguments"),
        (["--format", "tensorrt"], "choose from"),
        (["--precision", "fp16"], "choose from"),
    ],
)
def test_wrong_usage_is_told_before_any_work(options, message, tmp_path, capsys):
    command = ["--weights", str(tmp_path / "missing.safetensors"), *options]
    try:
        status = run_command("export", command)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[0]
    assert error[1].startswith("hint: ")
    assert len(error) == 2


def test_config_refuses_what_this_version_cannot_write():
    with pytest.raises(UsageError, match="format is 'pt2', expected one of onnx"):
        ExportConfig(Path("w.pt"), formats=("pt2",))


@pytest.mark.parametrize("name", ["missing.safetensors", "broken.safetensors", "broken.pth"])
def test_bad_weights_are_one_error_and_one_hint(name, tmp_path, capsys):
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"not weights")
    out = tmp_path / "engine"
    assert run_command("export", ["--weights", str(tmp_path / name), "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in error] == ["error", "hint"]
    assert not out.exists()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    assert run_command("export", ["--weights", str(weights), "--out", str(weights)]) == 1
    assert "expected a folder" in capsys.readouterr().err


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ulae_rt.export", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--weights" in done.stdout
    assert done.stderr == ""
