"""What an export writes beside what is there: one network a folder, and nothing is lost."""

import dataclasses
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.ndimage import zoom

from _support import engines as support
from _support.engines import (
    edit,
    graph,
    make_manifest,
    measured,
    pretend_machine,
    write_engine,
)
from _support.nets import small_net, small_weights
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine, survey
from ulae_rt.engines.machine import Gpu
from ulae_rt.errors import (
    BackendUnavailable,
    EngineMismatch,
    EquivalenceError,
    ExportError,
    OutputError,
    ShapeError,
)
from ulae_rt.export import exporter
from ulae_rt.export.config import TOLERANCES, ExportConfig
from ulae_rt.export.report import report_of
from ulae_rt.export.serving import write_repository
from ulae_rt.manifest import TENSORS, VERIFIED, EngineMetadata, Manifest, TensorSpec, sha256


class FakeNetwork:
    """In place of tracing and float64: no artefact computes anything."""

    def __init__(self, model, shape, wanted, weights_sha256, progress):
        self.model, self.shape, self.weights_sha256 = model, shape, weights_sha256
        self.progress = progress


FAILING: dict[str, ExportError] = {}


def fake_build(network, item, config):
    if item.precision in FAILING:
        raise FAILING[item.precision]
    time.sleep(0.02)
    return exporter._Built(f"{item.name} of {network.weights_sha256}".encode(), {}, {})


@pytest.fixture
def fake(monkeypatch):
    FAILING.clear()
    monkeypatch.setattr(exporter, "_Network", FakeNetwork)
    monkeypatch.setattr(exporter, "_build", fake_build)
    monkeypatch.setattr(exporter, "_work", lambda network, item: exporter.Work(0.0, 0.0, 1))
    monkeypatch.setattr(exporter, "_verified", lambda *_: ([measured()], ""))
    monkeypatch.setattr(exporter, "check_rewriting", lambda model: None)
    monkeypatch.setattr("ulae_rt.export.plan.gpus", lambda: ())
    monkeypatch.setattr("ulae_rt.export.plan.processor", lambda: ("x86", frozenset({"amx_bf16"})))


@pytest.fixture
def weights(tmp_path):
    return small_weights(tmp_path / "w.safetensors")


@pytest.fixture
def other(tmp_path):
    return small_weights(tmp_path / "other.safetensors", small_net("release"))


def run(capsys, *options):
    status = run_command("export", list(map(str, options)))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# Precisions of the default set


@pytest.mark.usefixtures("fake")
def test_default_precision_beyond_its_tolerance_is_left_out_and_said(tmp_path, weights, capsys):
    FAILING["bf16"] = EquivalenceError("mean displacement error: 3, expected at most 1", "a hint")
    out = tmp_path / "engine"
    status, said, err = run(capsys, "--weights", weights, "--out", out)
    assert (status, err) == (0, "")
    assert "not made: ulae-net-bf16-cpu.pt2: mean displacement error: 3" in said
    assert not (out / "ulae-net-bf16-cpu.pt2").exists()
    assert (out / "ulae-net-fp32-cpu.pt2").exists()
    assert "- Left out: ulae-net-bf16-cpu.pt2: " in (out / "REPORT.md").read_text()
    status, said, _ = run(capsys, "--weights", weights, "--out", out, "--overwrite", "--json")
    (left_out,) = json.loads(said)["left_out"]
    assert left_out["artefact"] == "ulae-net-bf16-cpu.pt2"
    assert "mean displacement error" in left_out["reason"]
    assert left_out["hint"] == "a hint"
    # A later export keeps that line, until the artefact is made.
    FAILING.clear()
    run(capsys, "--weights", weights, "--out", out, "--format", "onnx", "--overwrite")
    assert "Left out: ulae-net-bf16" in (out / "REPORT.md").read_text()
    run(capsys, "--weights", weights, "--out", out, "--overwrite")
    assert "Left out" not in (out / "REPORT.md").read_text()


@pytest.mark.usefixtures("fake")
def test_precision_asked_for_by_name_must_hold(tmp_path, weights, capsys):
    FAILING["fp16"] = EquivalenceError("too far off", "a hint")
    out = tmp_path / "engine"
    options = ("--weights", weights, "--out", out, "--precision", "fp32", "--precision", "fp16")
    status, _, err = run(capsys, *options)
    assert status == 1
    assert err.startswith("error: ulae-net-fp16.onnx: too far off\nhint: a hint")


@pytest.mark.usefixtures("fake")
def test_defaults_of_which_none_holds_fail(tmp_path, weights, capsys):
    for precision in ("fp32", "fp16", "bf16"):
        FAILING[precision] = EquivalenceError(f"{precision} is off", "")
    status, _, err = run(capsys, "--weights", weights, "--out", tmp_path / "engine")
    assert status == 1
    assert "error: ulae-net-fp32.onnx: fp32 is off" in err
    assert not (tmp_path / "engine").exists()


@pytest.mark.usefixtures("fake")
def test_named_format_needs_one_precision_that_holds(tmp_path, weights, capsys):
    FAILING["fp16"] = EquivalenceError("too far off", "")
    options = ("--weights", weights, "--out", tmp_path / "engine", "--format", "onnx")
    assert run(capsys, *options)[0] == 0
    FAILING["fp32"] = EquivalenceError("too far off too", "")
    assert run(capsys, *options, "--overwrite")[0] == 1


# Tolerances


@pytest.mark.usefixtures("fake")
def test_tolerance_is_in_the_manifest_and_a_looser_one_is_marked(tmp_path, weights, capsys):
    out = tmp_path / "engine"
    options = ("--weights", weights, "--out", out, "--format", "onnx", "--precision", "fp32")
    assert run(capsys, *options)[0] == 0
    assert Manifest.read(out / "ulae-net-fp32.json").tolerance == TOLERANCES["fp32"]
    assert "Looser" not in (out / "REPORT.md").read_text()
    assert run(capsys, *options, "--overwrite", "--tolerance", "disp_max=0.5")[0] == 0
    assert Manifest.read(out / "ulae-net-fp32.json").tolerance.disp_max == 0.5
    assert "**Looser than the standard of fp32: disp_max.**" in (out / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("flips", "voxels", "options", "passes"),
    [
        (1, 8192, {}, True),  # 122 in a million, of which 100 pass
        (4, 8192, {}, True),
        (5, 8192, {}, False),
        (491, 160 * 192 * 160, {}, True),
        (492, 160 * 192 * 160, {}, False),
        (1, 8192, {"sign_flips": 0}, False),
        (1, 8192, {"sign_flips": 0, "sign_flip_count": 1}, True),
    ],
)
def test_sign_flips_pass_by_rate_or_by_number(flips, voxels, options, passes):
    tolerance = ExportConfig(tolerances=options).tolerance("fp32")
    errors = dataclasses.replace(measured(), sign_flips=flips)
    assert (not tolerance.exceeded(errors, voxels)) == passes


# One network a folder


@pytest.mark.follows("give another --out, or remove them")
@pytest.mark.usefixtures("fake")
def test_folder_is_looked_at_again_when_files_are_renamed(tmp_path, weights, other, monkeypatch):
    """While one export builds, another one of other weights has written."""
    out = tmp_path / "engine"
    build = exporter._build

    def slow(network, item, config):
        if config.weights == weights and not out.exists():
            exporter.export(
                ExportConfig(other, out, formats=("onnx",), precisions=("fp16",)), lambda _: None
            )
        return build(network, item, config)

    monkeypatch.setattr(exporter, "_build", slow)
    with pytest.raises(OutputError, match="holds engines of other weights") as caught:
        exporter.export(
            ExportConfig(weights, out, formats=("onnx",), precisions=("fp32",)), lambda _: None
        )
    assert sorted(path.name for path in out.iterdir()) == [
        "REPORT.md", "ulae-net-fp16.json", "ulae-net-fp16.onnx",
    ]  # fmt: skip
    assert "--out" in caught.value.hint
    exporter.export(  # the hint
        ExportConfig(weights, tmp_path / "own", formats=("onnx",), precisions=("fp32",)),
        lambda _: None,
    )


@pytest.mark.usefixtures("fake")
def test_two_exports_at_once_lose_nothing(tmp_path, weights):
    out = tmp_path / "engine"
    results = {}

    def export(precision):
        config = ExportConfig(weights, out, formats=("onnx",), precisions=(precision,))
        results[precision] = exporter.export(config, lambda _: None)

    threads = [threading.Thread(target=export, args=(p,)) for p in ("fp32", "fp16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    report = (out / "REPORT.md").read_text()
    for precision in results:
        manifest = Manifest.read(out / f"ulae-net-{precision}.json")
        assert sha256((out / manifest.artefact).read_bytes()) == manifest.artefact_sha256
        assert f"| {manifest.artefact} |" in report
    assert not list(out.glob(".*"))


@pytest.mark.usefixtures("fake")
def test_two_exports_of_one_artefact_do_not_replace_each_other(tmp_path, weights):
    out = tmp_path / "engine"
    barrier, outcomes = threading.Barrier(2), []

    def export():
        config = ExportConfig(weights, out, formats=("onnx",), precisions=("fp32",))
        try:
            outcomes.append(exporter.export(config, lambda stage: stage == "x"))
        except OutputError as error:
            outcomes.append(error)

    def together():
        barrier.wait(20)
        export()

    threads = [threading.Thread(target=together) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OutputError)]
    assert len(outcomes) == 2
    assert len(refused) == 1
    assert "is there already" in str(refused[0])


@pytest.mark.follows("give another --out, or remove that file")
@pytest.mark.usefixtures("fake")
def test_unreadable_manifest_that_is_replaced_is_no_hindrance(tmp_path, weights, capsys):
    out = tmp_path / "engine"
    options = ("--weights", weights, "--out", out, "--format", "onnx", "--precision", "fp32")
    assert run(capsys, *options)[0] == 0
    edit(out / "ulae-net-fp32.json", format_version=2)
    assert run(capsys, *options)[0] == 1
    assert run(capsys, *options, "--overwrite")[0] == 0  # the hint
    (out / "ulae-net-bf16.json").write_text("{")
    status, _, err = run(capsys, *options, "--overwrite")
    assert status == 1
    assert "ulae-net-bf16.json: not a manifest" in err
    assert "remove that file" in err
    (out / "ulae-net-bf16.json").unlink()  # the hint
    assert run(capsys, *options, "--overwrite")[0] == 0


@pytest.mark.usefixtures("fake")
def test_failure_between_the_two_files_takes_the_first_back(tmp_path, weights, monkeypatch):
    out = tmp_path / "engine"
    config = ExportConfig(weights, out, formats=("onnx",), precisions=("fp32",))
    exporter.export(config, lambda _: None)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    replace = Path.replace

    def fail(self, target):
        if Path(target).name == "ulae-net-fp32.json":
            raise OSError(5, "Input/output error", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        exporter.export(dataclasses.replace(config, overwrite=True), lambda _: None)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# What a dry run promises


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("weights", "no such weights file"),
        ("there", "ulae-net-fp32.onnx: is there already"),
        ("network", "holds engines of other weights"),
        ("out-file", "is a file, expected a folder"),
        ("triton-file", "is a file, expected a folder"),
        ("triton-in-file", "is a file, expected a folder"),
        ("triton-there", "ulae-net-fp32: is there already"),
        ("batch", "expected at most"),
    ],
)
def test_dry_run_refuses_what_the_run_refuses(tmp_path, weights, other, capsys, case, message):
    out, file = tmp_path / "engine", tmp_path / "file"
    file.write_text("")
    options = ["--weights", weights, "--out", out, "--format", "onnx", "--precision", "fp32"]
    if case == "weights":
        weights.unlink()
    elif case in ("there", "network"):
        made = [*options, "--precision", "fp16"] if case == "network" else options
        made = [other if each == weights and case == "network" else each for each in made]
        assert run(capsys, *made)[0] == 0
        if case == "network":
            (out / "ulae-net-fp32.onnx").unlink()
            (out / "ulae-net-fp32.json").unlink()
    elif case == "out-file":
        options[3] = file
    elif case == "batch":
        options += ["--shape", 320, 384, 320, "--batch", 8]
    else:
        models = {"triton-file": file, "triton-in-file": file / "models"}.get(case, tmp_path / "m")
        if case == "triton-there":
            (models / "ulae-net-fp32").mkdir(parents=True)
        options += ["--triton-repository", models]
    outcomes = [run(capsys, *options, *extra) for extra in (["--dry-run"], [])]
    assert outcomes[0][0] == outcomes[1][0] != 0
    for _, said, err in outcomes:
        assert said == ""
        assert message in err


# The model repository


def served(folder, name, weights_sha256="a" * 64, grid=(16, 32, 16)):
    path = folder / f"{name}.onnx"
    path.write_bytes(b"a graph")
    specs = [
        TensorSpec(tensor, (1, len(channels), *grid), "float32", "", channels)
        for tensor, channels in TENSORS.items()
    ]
    manifest = make_manifest(
        b"a graph", path.name, inputs=tuple(specs[:2]), outputs=tuple(specs[2:]),
        weights_sha256=weights_sha256, metadata=EngineMetadata("paper", grid, 1.0, "max", "", ""),
    )  # fmt: skip
    return path, manifest


@pytest.mark.follows("give another --triton-repository, or remove it")
@pytest.mark.parametrize("change", [{"weights_sha256": "b" * 64}, {"grid": (32, 32, 16)}])
def test_repository_of_two_networks_is_refused(tmp_path, change):
    repository = tmp_path / "models"
    write_repository(repository, [served(tmp_path, "ulae-net-fp32")], overwrite=False)
    with pytest.raises(OutputError, match="is of another network or grid: weights aaa") as caught:
        write_repository(repository, [served(tmp_path, "ulae-net-fp16", **change)], overwrite=True)
    assert sorted(path.name for path in repository.iterdir()) == ["ulae-net-fp32"]
    assert "--triton-repository" in caught.value.hint
    write_repository(
        tmp_path / "own", [served(tmp_path, "ulae-net-fp16", **change)], overwrite=False
    )
    write_repository(repository, [served(tmp_path, "ulae-net-fp16")], overwrite=False)
    assert len(list(repository.iterdir())) == 2


def _write_model(repository, path, manifest):
    try:
        write_repository(repository, [(path, manifest)], overwrite=False)
    except OutputError:
        os._exit(3)


def test_two_writers_of_one_repository_lose_nothing(tmp_path):
    """In processes of their own, as two exports are."""
    repository = tmp_path / "models"
    context = multiprocessing.get_context("fork")
    artefacts = [served(tmp_path, f"ulae-net-fp32-b{n}") for n in (1, 2)]
    artefacts.append(artefacts[0])
    writers = [context.Process(target=_write_model, args=(repository, *a)) for a in artefacts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sorted(writer.exitcode for writer in writers) == [0, 0, 3]
    assert sorted(path.name for path in repository.iterdir()) == [
        "ulae-net-fp32-b1", "ulae-net-fp32-b2",
    ]  # fmt: skip


# The report


def test_report_has_the_tolerance(tmp_path):
    write_engine(tmp_path)
    text = report_of(tmp_path, {"ulae-net-bf16-cpu.pt2": "too far off"})
    assert "- Tolerance of ulae-net-fp32.onnx: disp_mean 0.0002, disp_p99 0.001" in text
    assert "- Left out: ulae-net-bf16-cpu.pt2: too far off" in text
    assert load_engine(tmp_path).manifest.status == VERIFIED


# Hints, followed


@pytest.mark.follows(
    "export the weights again: python -m ulae_rt.export --weights FILE --out DIR --overwrite",
    "another version of ulae_rt wrote it; export the weights again",
    "a newer version of ulae_rt wrote it; install that version, or export",
)
@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "damage", ["artefact", "manifest", "old", "newer", "no-artefact", "changed"]
)
def test_hint_to_export_again_mends_the_folder(tmp_path, weights, capsys, damage):
    out = tmp_path / "engine"
    options = ("--weights", weights, "--out", out, "--format", "onnx", "--precision", "fp32")
    assert run(capsys, *options)[0] == 0
    artefact, manifest = out / "ulae-net-fp32.onnx", out / "ulae-net-fp32.json"
    if damage == "artefact":
        artefact.write_bytes(b"damaged")
    elif damage == "no-artefact":
        artefact.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        changes = {"old": {"format_version": 2}, "newer": {"precision": "int4"}}
        edit(manifest, **changes.get(damage, {"target": "sm90"}))
    with pytest.raises(EngineMismatch) as caught:
        load_engine(out)
    assert "--weights FILE --out DIR --overwrite" in caught.value.hint
    assert run(capsys, *options)[0] == 1  # without --overwrite it would not be mended
    assert run(capsys, *options, "--overwrite")[0] == 0
    assert survey(out)[0].refusal is None
    assert sha256(artefact.read_bytes()) == Manifest.read(manifest).artefact_sha256


@pytest.mark.follows("pass --overwrite, or another --out")
@pytest.mark.usefixtures("fake")
def test_hint_for_a_file_that_is_there(tmp_path, weights, capsys):
    options = ("--weights", weights, "--format", "onnx", "--precision", "fp32", "--out")
    out = tmp_path / "engine"
    assert run(capsys, *options, out)[0] == 0
    _, _, err = run(capsys, *options, out)
    assert "hint: pass --overwrite, or another --out" in err
    assert run(capsys, *options, tmp_path / "another")[0] == 0
    assert run(capsys, *options, out, "--overwrite")[0] == 0


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("shape", [(32, 16, 16), (16, 16, 32)])
def test_failure_on_a_grid_with_two_coarsest_voxels_says_so(tmp_path, weights, capsys, shape):
    FAILING["fp32"] = EquivalenceError("too far off", "a hint")
    options = ["--weights", weights, "--out", tmp_path / "engine", "--precision", "fp32"]
    _, _, err = run(capsys, *options, "--shape", *shape)
    assert "two voxels at its coarsest level" in err
    assert "take --shape 32 32 16 or larger" in err
    _, _, err = run(capsys, *options, "--shape", 32, 32, 16)
    assert "coarsest" not in err
    FAILING.clear()
    assert run(capsys, *options, "--shape", 32, 32, 16)[0] == 0


@pytest.mark.usefixtures("fake")
@pytest.mark.follows("give another --out")
@pytest.mark.parametrize("what", ["ulae-net-fp32.onnx", "ulae-net-fp32.json"])
def test_hint_for_a_folder_in_the_place_of_a_file(tmp_path, weights, capsys, what):
    options = ("--weights", weights, "--format", "onnx", "--precision", "fp32", "--out")
    (tmp_path / "engine" / what).mkdir(parents=True)
    status, _, err = run(capsys, *options, tmp_path / "engine")
    assert (status, "hint: give another --out\n" in err) == (1, True)
    assert run(capsys, *options, tmp_path / "another")[0] == 0


@pytest.mark.usefixtures("fake")
@pytest.mark.follows("free some space or give another --out")
def test_hint_for_a_full_disk(tmp_path, weights, capsys, monkeypatch):
    out, write = tmp_path / "engine", Path.write_bytes
    options = ("--weights", weights, "--format", "onnx", "--precision", "fp32", "--out")

    def full(self, content):
        if out in self.parents:
            raise OSError(28, "No space left on device", str(self))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        status, _, err = run(capsys, *options, out)
        assert (status, "hint: free some space or give another --out\n" in err) == (1, True)
        assert run(capsys, *options, tmp_path / "another")[0] == 0
    assert run(capsys, *options, out)[0] == 0  # there is space now


@pytest.mark.usefixtures("fake")
@pytest.mark.follows("e.g. --batch 1 4 8")
def test_hint_for_a_batch_that_is_none(tmp_path, weights, capsys):
    options = ("--weights", weights, "--out", tmp_path / "engine", "--format", "onnx", "--batch")
    status, _, err = run(capsys, *options, "many")
    assert (status, "hint: e.g. --batch 1 4 8\n" in err) == (2, True)
    assert run(capsys, *options, 1, 4, 8)[0] == 0
    assert (tmp_path / "engine" / "ulae-net-fp32-b8.onnx").is_file()


@pytest.mark.usefixtures("fake")
@pytest.mark.follows("add --format onnx, or --format tensorrt on the server's GPU")
def test_hint_for_a_repository_of_nothing(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.setattr("ulae_rt.export.plan.tensorrt.missing", lambda *_: None)
    options = ["--weights", weights, "--format", "pt2", "--target", "cpu", "--dry-run"]
    options += ["--out", tmp_path / "engine", "--triton-repository", tmp_path / "models"]
    status, _, err = run(capsys, *options)
    assert (status, "hint: add --format onnx, or --format tensorrt on" in err) == (2, True)
    assert run(capsys, *options, "--format", "onnx")[0] == 0
    monkeypatch.setattr("ulae_rt.export.plan.pt2.missing", lambda *_: None)
    assert run(capsys, *options, "--format", "tensorrt", "--target", "sm90")[0] == 0


@pytest.fixture
def summed(fake, monkeypatch):
    """The graph of `_support.engines` in place of the network's, of whatever was asked for."""

    def build(network, item, config):
        monkeypatch.setattr(support, "SHAPE", network.shape)
        return exporter._Built(graph(item.batch), {}, {"tensorrt_rtx": "1.7.1.116"})

    monkeypatch.setattr(exporter, "_build", build)


@pytest.mark.usefixtures("summed")
@pytest.mark.follows("resample to its grid (engine.metadata), or export with --shape")
def test_hint_for_images_of_another_grid(tmp_path, weights, capsys):
    options = ("--weights", weights, "--format", "onnx", "--precision", "fp32", "--out")
    assert run(capsys, *options, tmp_path / "engine")[0] == 0
    moving, fixed = np.random.default_rng(0).random((2, 1, 1, 48, 48, 32), dtype=np.float32)
    engine = load_engine(tmp_path / "engine", device="cpu")
    with pytest.raises(ShapeError, match=r"expected \(1, 1, 32, 48, 32\)") as caught:
        engine.run(moving, fixed)
    assert "resample to its grid (engine.metadata), or export with --shape" in caught.value.hint
    factors = np.divide((1, 1, *engine.metadata.shape), moving.shape)
    assert engine.run(zoom(moving, factors, order=1), zoom(fixed, factors, order=1)).disp.any()
    assert run(capsys, *options, tmp_path / "another", "--shape", 48, 48, 32)[0] == 0
    assert load_engine(tmp_path / "another", device="cpu").run(moving, fixed).disp.any()


@pytest.mark.usefixtures("summed")
@pytest.mark.follows("fill up with pairs that are there already, or export with --batch 1")
def test_hint_for_pairs_that_do_not_fill_a_batch(tmp_path, weights, capsys):
    options = ("--weights", weights, "--format", "onnx", "--precision", "fp32", "--out")
    assert run(capsys, *options, tmp_path / "engine", "--batch", 4)[0] == 0
    moving, fixed = np.random.default_rng(0).random((2, 6, 1, 32, 48, 32), dtype=np.float32)
    engine = load_engine(tmp_path / "engine", device="cpu")
    with pytest.raises(ShapeError, match="expected a multiple of 4") as caught:
        engine.run(moving, fixed)
    assert "fill up with pairs that are there already, or" in caught.value.hint
    filled = [np.concatenate([images, images[:2]]) for images in (moving, fixed)]
    disp = engine.run(*filled).disp[:6]
    assert run(capsys, *options, tmp_path / "another", "--batch", 1)[0] == 0
    alone = load_engine(tmp_path / "another", device="cpu").run(moving, fixed).disp
    np.testing.assert_array_equal(disp, alone)


@pytest.mark.usefixtures("summed")
@pytest.mark.follows("export for this GPU: --target sm{}")
def test_hint_for_an_engine_of_another_gpu(tmp_path, weights, capsys, monkeypatch):
    """A TensorRT-RTX engine is built without a GPU."""
    monkeypatch.setattr("ulae_rt.export.plan.tensorrt.missing", lambda *_: None)
    library = SimpleNamespace(__version__="1.7.1.116")
    monkeypatch.setattr("ulae_rt.engines.machine.require", lambda module, extra: library)
    options = ("--weights", weights, "--format", "tensorrt-rtx", "--out", tmp_path / "engine")
    assert run(capsys, *options, "--target", "sm120")[0] == 0
    pretend_machine(monkeypatch, gpus=(Gpu("NVIDIA L40S", 89),))
    with pytest.raises(BackendUnavailable, match="was built for sm120") as caught:
        load_engine(tmp_path / "engine")
    flags = caught.value.hint.partition(": ")[2].split()
    assert flags == ["--target", "sm89"]
    assert run(capsys, *options, *flags)[0] == 0
    chosen = survey(tmp_path / "engine")[0]
    assert (chosen.refusal, chosen.manifest.target) == (None, "sm89")
