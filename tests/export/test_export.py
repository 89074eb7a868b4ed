"""The command: what it writes and says, and that nothing wrong and no half of anything stays."""

import functools
import json
import re
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
from ulae_rt.errors import BackendUnavailable
from ulae_rt.export import exporter
from ulae_rt.export.cases import canary_case, sample_case
from ulae_rt.export.config import TOLERANCES
from ulae_rt.export.onnx import onnx_from_model
from ulae_rt.manifest import NOT_RUN, TOLERANCE_NAMES, VERIFIED, Manifest, sha256
from ulae_rt.model import load_model

ONNX = ["--format", "onnx"]
FP32 = [*ONNX, "--precision", "fp32"]


@pytest.fixture(scope="module")
def protos():
    traced = functools.cache(
        lambda precision, batch: onnx_from_model(
            small_net(), SHAPE, precision=precision, batch=batch
        )
    )
    return lambda model, shape, *, precision, batch: traced(precision, batch)


@pytest.fixture(scope="module")
def pairs():
    """The truth of the small network, once."""
    return {
        name: functools.cache(
            lambda both_ways, make=make, model=model: make(model, SHAPE, both_ways)
        )
        for name, make, model in (
            ("sample_case", sample_case, small_net()),
            ("canary_case", canary_case, exporter.canary_heads(small_net())),
        )
    }


@pytest.fixture
def fast(monkeypatch, protos, pairs):
    """Tracing and float64 take most of an export's time and have tests of their own."""
    monkeypatch.setattr(exporter, "onnx_from_model", protos)
    monkeypatch.setattr(exporter, "check_rewriting", lambda model: None)
    for name, cached in pairs.items():
        monkeypatch.setattr(
            exporter, name, lambda model, shape, both_ways, cached=cached: cached(both_ways)
        )


def errors(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    return lines


def test_command_writes_engines_that_compute_what_torch_does(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    out = tmp_path / "new" / "engine"
    assert run_command("export", ["--weights", str(weights), "--out", str(out), *ONNX]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert len(lines) == 2
    assert "ulae-net-fp32.onnx" in lines[0]
    assert "verified: displacement within" in lines[1]
    assert sorted(path.name for path in out.iterdir()) == [
        "REPORT.md",
        "ulae-net-fp16.json",
        "ulae-net-fp16.onnx",
        "ulae-net-fp32.json",
        "ulae-net-fp32.onnx",
    ]
    report = (out / "REPORT.md").read_text()
    assert report.count("| sample pair, onnxruntime cpu |") == 2
    assert "CC0" in report

    moving, fixed = torch.rand(2, 2, 1, *SHAPE)
    with torch.no_grad():
        expected = load_model(weights).predict(moving, fixed)
    for precision, close in (("fp32", 1e-4), ("fp16", 0.05)):
        engine = load_engine(out, device="cpu", precision=precision)
        manifest = engine.manifest
        assert manifest.status == VERIFIED
        assert manifest.metadata.variant == "paper"
        assert manifest.metadata.shape == SHAPE
        assert manifest.metadata.spacing_mm == 2.0
        assert manifest.metadata.licence == "CC0"
        assert any("2 mm" in step for step in manifest.preprocessing)
        assert manifest.weights_sha256 == sha256(weights.read_bytes())
        assert [spec.name for spec in manifest.inputs] == ["moving", "fixed"]
        assert [spec.name for spec in manifest.outputs] == ["moved", "disp"]
        assert manifest.outputs[1].shape == (1, 3, *SHAPE)
        assert manifest.outputs[1].components == ("d", "h", "w")
        assert {"ulae-rt", "torch", "onnx", "onnxruntime", "opset"} <= manifest.versions.keys()
        assert manifest.work.gflop > 0
        assert manifest.work.gigabytes > 0
        assert manifest.types
        assert len(manifest.errors) == 2
        tolerance = TOLERANCES[precision]
        assert all(0 < measured.disp_max < tolerance.disp_max for measured in manifest.errors)
        assert all(measured.disp_largest > 1 for measured in manifest.errors)
        assert all(measured.seconds > 0 and measured.machine for measured in manifest.errors)
        found = engine.run(moving, fixed)
        np.testing.assert_allclose(found.disp, expected.disp.numpy(), rtol=0, atol=close)
        np.testing.assert_allclose(found.moved, expected.moved.numpy(), rtol=0, atol=close)


@pytest.mark.usefixtures("fast")
def test_batches_are_artefacts_of_their_own(tmp_path):
    weights = small_weights(tmp_path / "w.safetensors")
    out = tmp_path / "engine"
    command = ["--weights", str(weights), "--out", str(out), *FP32, "--batch", "1", "dynamic"]
    assert run_command("export", command) == 0
    assert {path.name for path in out.glob("*.onnx")} == {
        "ulae-net-fp32.onnx",
        "ulae-net-fp32-bN.onnx",
    }
    pair = np.random.default_rng(0).random((2, 4, 1, *SHAPE), dtype=np.float32)
    results = [load_engine(path).run(*pair).disp for path in sorted(out.glob("*.onnx"))]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-4)


def _damage(protos, name, factor):
    """The exporter's trace with one weight that is not the network's."""

    def damaged(model, shape, *, precision, batch):
        proto = onnx.ModelProto()
        proto.CopyFrom(protos(model, shape, precision=precision, batch=batch))
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), tensor.name))
        return proto

    return damaged


@pytest.mark.usefixtures("fast")
def test_failed_verification_leaves_nothing(tmp_path, monkeypatch, protos, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    wrong = _damage(protos, "model.heads.3.weight", 1.1)
    monkeypatch.setattr(exporter, "onnx_from_model", wrong)
    out = tmp_path / "engine"
    command = ["--weights", str(weights), "--out", str(out), *FP32]
    assert run_command("export", command) == 1
    error, hint = errors(capsys)
    assert hint.startswith("hint: this artefact is not written; install")
    assert error.startswith("error: ulae-net-fp32.onnx: verification failed on sample pair: ")
    assert "worst at disp[0, :, " in error
    assert not out.exists()
    # What was asked to be let through is.
    generous = [f"--tolerance={name}=1e9" for name in TOLERANCE_NAMES]
    assert run_command("export", [*command, *generous]) == 0
    # And an engine that was there stays when the next one fails.
    before = (out / "ulae-net-fp32.onnx").read_bytes()
    assert run_command("export", [*command, "--overwrite"]) == 1
    assert (out / "ulae-net-fp32.onnx").read_bytes() == before


@pytest.mark.usefixtures("fast")
def test_what_nothing_here_can_run_is_written_and_says_so(tmp_path, monkeypatch, capsys):
    def no_runtime(*_):
        raise BackendUnavailable("there is no GPU", "run it elsewhere")

    monkeypatch.setattr(exporter, "open_backend", no_runtime)
    out = tmp_path / "engine"
    weights = small_weights(tmp_path / "w.safetensors")
    assert run_command("export", ["--weights", str(weights), "--out", str(out), *FP32]) == 0
    assert "built, not run: there is no GPU" in capsys.readouterr().out
    manifest = Manifest.read(out / "ulae-net-fp32.json")
    assert (manifest.status, manifest.errors) == (NOT_RUN, ())
    assert "*built, not run*" in (out / "REPORT.md").read_text()


@pytest.mark.usefixtures("fast")
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    write = Path.write_bytes

    def full(self, content):
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "engine"
    assert run_command("export", ["--weights", str(weights), "--out", str(out), *FP32]) == 1
    assert "No space left" in errors(capsys)[0]
    assert list(out.iterdir()) == []


@pytest.mark.usefixtures("fast")
def test_existing_artefact_is_replaced_only_when_told(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    out = tmp_path / "engine"
    out.mkdir()
    (out / "ulae-net-fp32.onnx").write_text("old")
    command = ["--weights", str(weights), "--out", str(out), *FP32]
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
def test_one_folder_holds_the_engines_of_one_network(tmp_path, capsys):
    out = tmp_path / "engine"
    weights = small_weights(tmp_path / "w.safetensors")
    assert run_command("export", ["--weights", str(weights), "--out", str(out), *FP32]) == 0
    other = small_weights(tmp_path / "other.safetensors", small_net("release"))
    capsys.readouterr()
    command = ["--weights", str(other), "--out", str(out), "--precision", "fp16", *ONNX]
    assert run_command("export", command) == 1
    assert "holds engines of other weights" in errors(capsys)[0]
    assert not (out / "ulae-net-fp16.onnx").exists()


@pytest.mark.usefixtures("fast")
def test_default_folder_is_named_after_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_weights(Path("best.safetensors"))
    assert run_command("export", ["--weights", "best.safetensors", *FP32]) == 0
    assert load_engine("build/engines/best").manifest.metadata.shape == SHAPE


def test_dry_run_names_everything_and_does_nothing(tmp_path, capsys):
    out = tmp_path / "engine"
    weights = small_weights(tmp_path / "w.safetensors")
    command = ["--weights", str(weights), "--out", str(out), "--dry-run", "--batch", "1", "4"]
    assert run_command("export", [*command, *ONNX]) == 0
    told = capsys.readouterr().out
    assert f"would make {out / 'ulae-net-fp16-b4.onnx'}" in told
    assert "fp16 may be off by disp_mean" in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "30", "48", "32"], "30 x 48 x 32"),
        (["--shape", "0", "48", "32"], "0 x 48 x 32"),
        (["--shape", "4096", "4096", "4096"], "at most"),
        (["--shape", "32", "48"], "expected 3 arguments"),
        (["--format", "openvino"], "choose from"),
        (["--precision", "int8"], "choose from"),
        (["--batch", "many"], "batch is 'many'"),
        (["--batch", "0"], "batch is 0"),
        (["--batch", "-1"], "batch is '-1', expected a number or 'dynamic'"),
        (["--batch=-1"], "batch is '-1', expected a number or 'dynamic'"),
        (["--tolerance", "disp_max=nan"], "tolerance disp_max is nan, expected 0 or more"),
        (["--tolerance", "disp_max=inf"], "tolerance disp_max is inf, expected 0 or more"),
        (
            ["--tolerance", "disp_max=1", "--tolerance", "disp_max=2"],
            "--tolerance disp_max is given twice, 1 and 2",
        ),
        (
            [*ONNX, "--hardware-compatibility", "ampere-plus"],
            "--hardware-compatibility ampere-plus has no effect",
        ),
        ([*ONNX, "--timing-cache", "cache"], "--timing-cache has no effect"),
        (
            ["--format", "tensorrt-rtx", "--target", "sm89", "--timing-cache", "cache"],
            "--timing-cache has no effect",
        ),
        (["--tolerance", "disp_max"], "expected NAME=VALUE"),
        (["--tolerance", "disp_maximum=1"], "tolerance is 'disp_maximum'"),
        (["--target", "sm89"], "--target needs --format"),
    ],
)
def test_wrong_usage_is_told_before_any_work(options, message, tmp_path, capsys):
    command = ["--weights", str(tmp_path / "missing.safetensors"), *options]
    try:
        status = run_command("export", command)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert message in errors(capsys)[0]


def test_a_batch_that_no_runtime_can_count_is_refused(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    command = ["--weights", str(weights), "--shape", "320", "384", "320", "--batch", "8", *FP32]
    assert run_command("export", [*command, "--out", str(tmp_path / "engine")]) == 2
    assert "the largest batch of this size is 1" in errors(capsys)[1]


@pytest.mark.parametrize("name", ["missing.safetensors", "broken.safetensors", "broken.pth"])
def test_bad_weights_are_one_error_and_one_hint(name, tmp_path, capsys):
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"not weights")
    out = tmp_path / "engine"
    assert run_command("export", ["--weights", str(tmp_path / name), "--out", str(out)]) == 1
    errors(capsys)
    assert not out.exists()


def test_a_model_repository_is_checked_before_any_work(tmp_path, capsys):
    command = ["--weights", str(tmp_path / "missing.safetensors"), "--out", str(tmp_path / "out")]
    models = tmp_path / "models"
    command += ["--triton-repository", str(models)]
    assert run_command("export", [*command, "--format", "pt2", "--target", "cpu"]) == 2
    assert "none of the artefacts" in errors(capsys)[0]
    (models / "ulae-net-fp32").mkdir(parents=True)
    assert run_command("export", [*command, *FP32]) == 1
    assert "ulae-net-fp32: is there already" in errors(capsys)[0]


@pytest.mark.usefixtures("fast")
def test_a_model_repository_is_written_too(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    command = ["--weights", str(weights), "--out", str(tmp_path / "out"), *FP32]
    models = tmp_path / "models"
    assert run_command("export", [*command, "--triton-repository", str(models)]) == 0
    assert "for NVIDIA Triton Inference Server" in capsys.readouterr().out
    written = (models / "ulae-net-fp32" / "1" / "model.onnx").read_bytes()
    assert written == (tmp_path / "out" / "ulae-net-fp32.onnx").read_bytes()
    assert "onnxruntime_onnx" in (models / "ulae-net-fp32" / "config.pbtxt").read_text()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    weights = small_weights(tmp_path / "w.safetensors")
    command = ["--weights", str(weights), "--out", str(weights), *FP32]
    assert run_command("export", command) == 1
    assert "expected a folder" in errors(capsys)[0]


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ulae_rt.export", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--weights" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
@pytest.mark.follows("--tolerance {}={} lets it pass")
def test_an_artefact_that_is_off_passes_with_the_tolerances_of_its_hints(
    tmp_path, monkeypatch, protos, capsys
):
    """Each names the one that was exceeded first."""
    weights = small_weights(tmp_path / "w.safetensors")
    monkeypatch.setattr(exporter, "onnx_from_model", _damage(protos, "model.heads.3.weight", 1.1))
    command = ["--weights", str(weights), "--out", str(tmp_path / "engine"), *FP32]
    given: dict[str, str] = {}
    while run_command("export", [*command, *(f"--tolerance={n}={v}" for n, v in given.items())]):
        name, value = re.search(r"--tolerance (\w+)=(\S+) lets it pass", errors(capsys)[1]).groups()
        assert float(value) > float(given.get(name, 0))
        given[name] = value
    assert given
    assert load_engine(tmp_path / "engine").manifest.status == VERIFIED
