"""Engines: what they run, what they refuse, and what they do without."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from _support.engines import SHAPE, edit, images, pretend_machine, write_engine
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine
from ulae_rt.engines.machine import Gpu
from ulae_rt.errors import BackendUnavailable, DtypeError, EngineMismatch, ShapeError, UsageError
from ulae_rt.manifest import Manifest, sha256


@pytest.fixture
def folder(tmp_path):
    return write_engine(tmp_path / "engine")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["", "ulae-net-fp32.onnx"])
def test_engine_runs_any_batch_from_a_folder_or_a_file(folder, batch, name):
    engine = load_engine(folder / name)
    assert (engine.backend, engine.device) == ("onnxruntime", "cpu")
    assert engine.manifest.metadata.shape == SHAPE
    moving, fixed = images(batch)
    out = engine.run(moving, fixed)
    np.testing.assert_array_equal(out.moved, moving + fixed)
    np.testing.assert_array_equal(out.disp, np.repeat(moving - fixed, 3, axis=1))


def test_engine_takes_views(folder):
    engine = load_engine(str(folder))
    moving, fixed = images()
    flipped = moving[:, :, ::-1]
    out = engine.run(flipped, fixed)
    np.testing.assert_array_equal(out.moved, flipped + fixed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, f: (m[0], f[0]), ShapeError, "moving has shape .* expected"),
        (lambda m, f: (m, f[..., :-1]), ShapeError, "fixed has shape .* expected"),
        (lambda m, f: (m[:0], f[:0]), ShapeError, "moving has shape"),
        (lambda m, f: (m, np.concatenate([f, f])), ShapeError, "the batches are"),
        (lambda m, f: (m.astype("float64"), f), DtypeError, "moving is float64, expected float32"),
    ],
)
def test_wrong_images_are_refused(folder, change, error, message):
    with pytest.raises(error, match=message):
        load_engine(folder).run(*change(*images()))


def test_precision_chooses_among_several(folder):
    write_engine(folder, precision="fp16")
    assert load_engine(folder).manifest.precision == "fp32"
    assert load_engine(folder, precision="fp16").manifest.precision == "fp16"
    assert load_engine(folder / "ulae-net-fp16.onnx").manifest.precision == "fp16"
    with pytest.raises(
        EngineMismatch, match="no engine of precision bf16; it holds onnxruntime in fp16, fp32"
    ):
        load_engine(folder, precision="bf16")


def test_changed_artefact_is_never_opened(folder, monkeypatch):
    path = folder / "ulae-net-fp32.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr("ulae_rt.engines.folder.open_backend", None)
    with pytest.raises(EngineMismatch, match=r"SHA-256 .* expected .* changed or damaged"):
        load_engine(folder)


def test_graph_of_another_size_is_refused(folder):
    path = folder / "ulae-net-fp32.onnx"
    model = onnx.load(path)
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "moving" else name for name in node.input]
    path.write_bytes(model.SerializeToString())
    edit(folder / "ulae-net-fp32.json", artefact_sha256=sha256(path.read_bytes()))
    with pytest.raises(EngineMismatch, match=r"its inputs are .*image.* expected .*moving"):
        load_engine(folder)


def test_file_that_is_no_model_is_refused(folder):
    (folder / "ulae-net-fp32.onnx").write_bytes(b"nothing")
    edit(folder / "ulae-net-fp32.json", artefact_sha256=sha256(b"nothing"))
    with pytest.raises(EngineMismatch, match="failed loading the model with ONNX Runtime"):
        load_engine(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "manifest format 2, expected 3"),
        ({"kind": "plan"}, "kind is 'plan', expected one of onnx"),
        ({"artefact": "../other.onnx"}, "expected a file name without a folder"),
        ({"artefact": "missing.onnx"}, "is the manifest of missing.onnx, expected ulae"),
        ({"artefact": "ulae-net-fp32.pt2"}, "'ulae-net-fp32.pt2', expected one of kind onnx, .on"),
        ({"precision": "fp16"}, "precision is 'fp16', and artefact is 'ulae-net-fp32.onnx'"),
        ({"target": "sm90"}, "target is 'sm90', expected any of kind onnx"),
        ({"compatibility": "ampere-plus"}, "compatibility is 'ampere-plus', expected none of ki"),
        ({"compatibility": "all"}, "compatibility is 'all', expected one of none"),
        ({"errors": []}, "status is 'verified', and it has 0 errors"),
        ({"status": "built, not run"}, "status is 'built, not run', and it has 1 errors"),
        ({"weights_sha256": "0" * 63 + "g"}, "weights_sha256 is '000.*g', expected 64 digits"),
        ({"artefact_sha256": "A" * 64}, "artefact_sha256 is 'AAA"),
        ({"date": "yesterday"}, "date is 'yesterday', expected such as"),
        ({"date": "2026-01-01"}, "date is '2026-01-01', expected such as"),
        ({"types": {"Conv float32": -1}}, "Conv float32 is -1, expected 0 or more"),
        ({"tolerance": None}, "tolerance is NoneType"),
        ({"versions": {"a": "\ud800"}}, "surrogates not allowed"),
        ({"precision": "int4"}, "precision is 'int4', expected one of fp32"),
        ({"metadata": {"variant": "paper"}}, "metadata has no 'licence'"),
        ({"metadata": []}, "metadata is list .* expected an object"),
        ({"surprise": 1}, "unknown 'surprise'"),
        ({"errors": "20"}, "errors is str '20', expected a list"),
        ({"status": "believed"}, "status is 'believed', expected one of verified"),
        ({"inputs": 3}, "inputs is int"),
        ({"versions": {"torch": 2}}, "versions.torch is int"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(folder, changes, message):
    edit(folder / "ulae-net-fp32.json", **changes)
    with pytest.raises(EngineMismatch, match=message) as caught:
        load_engine(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("metadata", {"shape": [4, 6, 0]}, r"shape is \[4, 6, 0\], expected three sizes from 1"),
        ("metadata", {"shape": [4, 6]}, "shape is list .*, expected 3 values"),
        ("metadata", {"spacing_mm": 0}, "spacing_mm is 0, expected a whole number of mm"),
        ("metadata", {"spacing_mm": 1.5}, "spacing_mm is 1.5, expected a whole number of mm"),
        ("metadata", {"spacing_mm": 10**400}, "spacing_mm is int .* expected a smaller number"),
        ("metadata", {"variant": "huge"}, "variant is 'huge', expected one of paper, release"),
        ("metadata", {"normalisation": "z"}, "normalisation is 'z', expected one of max, p99.9"),
        ("work", {"gflop": -1}, "gflop is -1.0, expected 0 or more"),
        ("tolerance", {"disp_max": 1e-5}, "disp_max is 0.0001 on 'noise', and its tolerance 1e-05"),
        ("tolerance", {"disp_max": -1}, "tolerance disp_max is -1, expected 0 or more"),
        ("errors", {"disp_max": 0.5}, "disp_max is 0.5 on 'noise', and its tolerance 0.001"),
        ("errors", {"disp_p99": 5e-4}, "disp_p99 is 0.0005, and disp_max is 0.0001"),
        ("errors", {"disp_mean": -1e-9}, "disp_mean is -1e-09, expected 0 or more"),
        ("errors", {"seconds": -1}, "seconds is -1, expected 0 or more"),
        ("errors", {"seconds": 0}, "seconds is 0, expected more"),
        ("errors", {"sign_flips": 5}, "sign_flips is 4.17e.04 on 'noise', and its tolerance 100"),
        ("errors", {"sign_flips": 121}, "sign_flips is 121, of 120 voxels"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(folder, field, change, message):
    path = folder / "ulae-net-fp32.json"
    value = json.loads(path.read_text())[field]
    edit(path, **{field: [value[0] | change] if field == "errors" else value | change})
    with pytest.raises(EngineMismatch, match=message) as caught:
        load_engine(folder)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"components": ["w", "h", "d"]},
        {"shape": [1, 3, 6, 4, 5]},
        {"shape": [2, 3, *SHAPE]},
        {"shape": []},
    ],
)
def test_manifest_of_other_displacements_is_refused(folder, change):
    path = folder / "ulae-net-fp32.json"
    outputs = json.loads(path.read_text())["outputs"]
    edit(path, outputs=[outputs[0], outputs[1] | change])
    with pytest.raises(EngineMismatch, match=r"of its inputs and outputs one is .* expected"):
        load_engine(folder)


@pytest.mark.parametrize("batch", [0, -2])
def test_manifest_of_no_batch_is_refused(folder, batch):
    path = folder / "ulae-net-fp32.json"
    values = json.loads(path.read_text())
    for field in ("inputs", "outputs"):
        for spec in values[field]:
            spec["shape"][0] = batch
    edit(path, inputs=values["inputs"], outputs=values["outputs"])
    with pytest.raises(EngineMismatch, match=f"the batch of 'moving' is {batch}, expected 1 or m"):
        load_engine(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 3, "work": {"gflop": NaN}}', "not a manifest .NaN is no number"),
        ('{"format_version": 3, "work": {"gflop": 1e999}}', "not a manifest .the number 1e999"),
        ("[" * 100_000, "not a manifest .it is nested too deep"),
        ('{"kind": "onnx", "kind": "pt2"}', "not a manifest .the key 'kind' is there twice"),
        ("\ufeff{}", "not a manifest"),
        ('"' + "x" * 2**20 + '"', "not a manifest .1048578 bytes, expected some thousands"),
    ],
)
def test_json_that_is_doubtful_is_refused(folder, content, message):
    (folder / "ulae-net-fp32.json").write_text(content, encoding="utf-8")
    with pytest.raises(EngineMismatch, match=message) as caught:
        load_engine(folder)
    assert caught.value.hint


def test_manifest_that_is_a_folder_or_a_dangling_link_is_refused(folder):
    path = folder / "ulae-net-fp32.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(EngineMismatch, match=r"fp32\.json: not a manifest \(it is a folder\)"):
        load_engine(folder)
    path.rmdir()
    path.symlink_to(folder / "gone.json")
    with pytest.raises(EngineMismatch, match=r"not a manifest .a link to a file that is not there"):
        load_engine(folder / "ulae-net-fp32.onnx")


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"name": "image"}, {"shape": [1, 1, 4, 6, 6]}]
)
def test_manifest_of_other_tensors_is_refused(folder, change):
    path = folder / "ulae-net-fp32.json"
    inputs = json.loads(path.read_text())["inputs"]
    edit(path, inputs=[inputs[0], inputs[1] | change])
    with pytest.raises(EngineMismatch, match=r"of its inputs and outputs one is .* expected"):
        load_engine(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "\x00\xff"])
def test_file_that_is_no_manifest_is_refused(folder, content):
    (folder / "ulae-net-fp32.json").write_text(content, encoding="latin-1")
    with pytest.raises(EngineMismatch, match="manifest"):
        load_engine(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(EngineMismatch, match="no such engine"):
        load_engine(tmp_path / "nowhere")
    with pytest.raises(EngineMismatch, match="holds no engine"):
        load_engine(tmp_path)
    artefact = folder / "ulae-net-fp32.onnx"
    content = artefact.read_bytes()
    artefact.unlink()
    with pytest.raises(EngineMismatch, match=r"fp32\.onnx: cannot be read \(not there\)"):
        load_engine(folder)
    artefact.write_bytes(content)
    (folder / "ulae-net-fp32.json").unlink()
    with pytest.raises(EngineMismatch, match="no such manifest"):
        load_engine(folder)
    with pytest.raises(EngineMismatch, match="no such manifest"):
        load_engine(folder / "ulae-net-fp32.onnx")


def test_renamed_artefact_is_refused(folder):
    for suffix in (".onnx", ".json"):
        (folder / f"ulae-net-fp32{suffix}").rename(folder / f"best{suffix}")
    with pytest.raises(EngineMismatch, match=r"is the manifest of ulae-net-fp32\.onnx"):
        load_engine(folder / "best.onnx")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_backend_of_other_files_says_so(folder, backend):
    with pytest.raises(
        EngineMismatch, match=f"no engine of backend {backend}; it holds onnxruntime in fp32"
    ):
        load_engine(folder, backend=backend)


@pytest.mark.parametrize("device", ["gpu0", "cuda:", "cuda:x", "cpu:0", "auto:1"])
def test_unknown_device_is_wrong_usage(folder, device):
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
        load_engine(folder, device=device)


def test_unknown_backend_is_wrong_usage(folder):
    with pytest.raises(UsageError, match="backend is 'torch', expected one of auto"):
        load_engine(folder, backend="torch")


def test_cuda_is_refused_where_the_runtime_has_none(folder, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match="needs GPU 1, and this machine has none"):
        load_engine(folder, device="cuda:1")
    pretend_machine(monkeypatch, gpus=(Gpu("NVIDIA T4", 75),) * 2)
    with pytest.raises(BackendUnavailable, match=r"device cuda:1 .* CPU only"):
        load_engine(folder, device="cuda:1")
    assert load_engine(folder, device="auto").device == "cpu"


@pytest.mark.follows("pip install onnxruntime (or onnxruntime-gpu in its place)")
def test_missing_onnxruntime_is_one_sentence(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendUnavailable, match="onnxruntime cannot be imported") as caught:
            load_engine(folder)
    assert "pip install onnxruntime" in caught.value.hint
    assert load_engine(folder).backend == "onnxruntime"  # it is installed


def test_engines_run_without_torch_the_model_or_the_exporter(folder):
    script = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = ("torch", "triton", "onnx", "ulae_rt.model", "ulae_rt.kernels", "ulae_rt.export")
        if any(name == b or name.startswith(b + ".") for b in blocked):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Blocker())
import numpy as np
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine
image = np.ones((1, 1, 4, 6, 5), np.float32)
print(load_engine(sys.argv[1]).run(image, image).moved.max())
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder)], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == "2.0\n"


def test_manifest_survives_a_round_trip(folder):
    path = folder / "ulae-net-fp32.json"
    manifest = Manifest.read(path)
    assert manifest.to_json() == path.read_text()
    assert manifest.metadata.shape == SHAPE
    assert manifest.errors[0].disp_p99 == 1e-5


@pytest.mark.follows("`ulae-rt doctor` says what can run; an engine needs the versions it was")
def test_hint_for_a_file_that_a_library_cannot_open(folder, capsys):
    """As of another version: it opens what is of its own, which doctor names."""
    write_engine(folder, precision="fp16")
    (folder / "ulae-net-fp16.onnx").write_bytes(b"of a later version")
    edit(folder / "ulae-net-fp16.json", artefact_sha256=sha256(b"of a later version"))
    with pytest.raises(EngineMismatch, match="failed loading the model") as caught:
        load_engine(folder, precision="fp16", device="cpu")
    assert caught.value.hint.startswith("`ulae-rt doctor` says what can run")
    assert run_command("doctor", ["--engine", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"onnxruntime {onnxruntime.__version__}" in said
    assert re.search(r"ok  ulae-net-fp32\.onnx on cpu", said)
    assert load_engine(folder / "ulae-net-fp32.onnx", device="cpu").run(*images())
    write_engine(folder, precision="fp16")  # with the version that is here
    assert load_engine(folder, precision="fp16", device="cpu").run(*images())
