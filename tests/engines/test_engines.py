"""Engines: what they run, what they refuse, and what they do without."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from ulae_rt.engines import load_engine
from ulae_rt.errors import BackendUnavailable, DtypeError, EngineMismatch, ShapeError, UsageError
from ulae_rt.manifest import (
    VERIFIED,
    EngineMetadata,
    Manifest,
    Measured,
    TensorSpec,
    Work,
    sha256,
)

SHAPE = (4, 6, 5)


def spec(name, channels):
    components = ("d", "h", "w") if channels == 3 else ("intensity",)
    return TensorSpec(name, (1, channels, *SHAPE), "float32", "", components)


def write_engine(folder: Path, precision: str = "fp32") -> Path:
    """A graph of two nodes in place of a network: moved = M + F, disp = three times M - F."""
    folder.mkdir(exist_ok=True)
    images = [helper.make_tensor_value_info(n, 1, (1, 1, *SHAPE)) for n in ("moving", "fixed")]
    results = [
        helper.make_tensor_value_info("moved", 1, (1, 1, *SHAPE)),
        helper.make_tensor_value_info("disp", 1, (1, 3, *SHAPE)),
    ]
    size = helper.make_tensor("size", TensorProto.INT64, (5,), (1, 3, 1, 1, 1))
    nodes = [
        helper.make_node("Add", ["moving", "fixed"], ["moved"]),
        helper.make_node("Sub", ["moving", "fixed"], ["difference"]),
        helper.make_node("Expand", ["difference", "size"], ["disp"]),
    ]
    graph = helper.make_graph(nodes, "net", images, results, [size])
    opset = [helper.make_opsetid("", 20)]
    content = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    manifest = Manifest(
        artefact=f"ulae-net-{precision}.onnx",
        kind="onnx",
        precision=precision,
        target="any",
        compatibility="none",
        inputs=(spec("moving", 1), spec("fixed", 1)),
        outputs=(spec("moved", 1), spec("disp", 3)),
        metadata=EngineMetadata("paper", SHAPE, 1.0, "max", "none", "CC0"),
        preprocessing=("skull-stripped",),
        versions={"ulae-rt": "0.1.0"},
        work=Work(0.0, 1e-6, 3),
        types={},
        weights_sha256="0" * 64,
        artefact_sha256=sha256(content),
        status=VERIFIED,
        errors=(
            Measured("noise", "onnxruntime cpu", "x86", 0.1, 3.0, 1e-6, 1e-5, 1e-4, 1e-7, 1e-6, 0),
        ),
        date="2026-01-01T00:00:00+00:00",
    )
    (folder / manifest.artefact).write_bytes(content)
    (folder / f"ulae-net-{precision}.json").write_text(manifest.to_json())
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_engine(tmp_path / "engine")


def images(batch=1):
    generator = np.random.default_rng(0)
    return generator.random((2, batch, 1, *SHAPE), dtype=np.float32)


def edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def test_engine_takes_torch_tensors_and_views(folder):
    engine = load_engine(str(folder))
    moving, fixed = images()
    flipped = moving[:, :, ::-1]
    out = engine.run(flipped, torch.from_numpy(fixed))
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
    write_engine(folder, "fp16")
    assert load_engine(folder).manifest.precision == "fp32"
    assert load_engine(folder, precision="fp16").manifest.precision == "fp16"
    assert load_engine(folder / "ulae-net-fp16.onnx").manifest.precision == "fp16"
    with pytest.raises(EngineMismatch, match="holds no bf16 engine, only fp16, fp32"):
        load_engine(folder, precision="bf16")


def test_changed_artefact_is_never_opened(folder, monkeypatch):
    path = folder / "ulae-net-fp32.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr("ulae_rt.engines.session.open_backend", None)
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
    with pytest.raises(EngineMismatch, match="cannot load the model"):
        load_engine(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "manifest format 3, expected 2"),
        ({"kind": "plan"}, "kind is 'plan', expected one of onnx"),
        ({"artefact": "../other.onnx"}, "expected a file name without a folder"),
        ({"artefact": "missing.onnx"}, "missing.onnx: cannot be read"),
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


@pytest.mark.parametrize("content", ["", "[]", "null", "\x00\xff"])
def test_file_that_is_no_manifest_is_refused(folder, content):
    (folder / "ulae-net-fp32.json").write_text(content, encoding="latin-1")
    with pytest.raises(EngineMismatch, match="manifest"):
        load_engine(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(EngineMismatch, match="no such engine"):
        load_engine(tmp_path / "nowhere")
    (folder / "ulae-net-fp32.json").unlink()
    with pytest.raises(EngineMismatch, match="holds no manifest"):
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
    with pytest.raises(EngineMismatch, match=f"backend {backend} was .* onnxruntime opens it"):
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
    with pytest.raises(BackendUnavailable, match=r"device cuda:1 .* CPU only"):
        load_engine(folder, device="cuda:1")
    assert load_engine(folder, device="auto").device == "cpu"


def test_missing_onnxruntime_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match="onnxruntime cannot be imported"):
        load_engine(folder)


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
