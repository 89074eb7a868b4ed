"""Every command that carries labels refuses or doubts a map that is not its scan's."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from _support.networks import FakeNetwork
from ulae_rt.cli import main
from ulae_rt.errors import GeometryError
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")


@pytest.fixture
def labels(pair) -> Path:
    """The moving brain's, by brightness, in their place."""
    image = nib.load(pair[0])
    data = np.digitize(np.asarray(image.dataobj), [1, 60, 90, 120, 150]).astype(np.uint8)
    place = pair[0].with_name("moving_labels.nii.gz")
    nib.save(nib.Nifti1Image(data, image.affine), place)
    return place


def moved(path: Path, mm: float) -> Path:
    """A copy of an image some mm away."""
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += mm
    place = path.with_name(f"by_{mm:g}_{path.name}")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), place)
    return place


def register(pair, labels, folder, *flags):
    moving, fixed = map(str, pair)
    out = ["-o", str(folder / "moved.nii.gz"), "--moved-labels", str(folder / "out.nii.gz")]
    files = ["-m", moving, "-f", fixed, *out, "--labels", str(labels)]
    return main(["register", *files, "--affine", "none", *flags])


def batch(pair, labels, folder):
    listed = folder / "pairs.csv"
    listed.write_text(f"id,moving,fixed,moving_labels\na,{pair[0]},{pair[1]},{labels}\n")
    status = main(["batch", str(listed), "-o", str(folder / "out"), "--affine", "none"])
    return status, json.loads((folder / "out" / "results.jsonl").read_text())


def test_register_refuses_labels_that_lie_elsewhere(pair, labels, tmp_path, network, capsys):
    assert register(pair, moved(labels, 400), tmp_path) == 1
    said = capsys.readouterr().err
    assert "error: 100 % of the labelled voxels of" in said
    assert "lie outside the scan" in said
    assert "hint: compare the two headers" in said
    assert not (tmp_path / "moved.nii.gz").exists()
    assert register(pair, labels, tmp_path) == 0
    assert np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj).any()
    assert "labels" not in capsys.readouterr().err


def test_register_tells_of_labels_that_are_moved(pair, labels, tmp_path, network, capsys):
    assert register(pair, moved(labels, 12), tmp_path, "--json") == 0
    said = capsys.readouterr()
    told = [message for message in json.loads(said.out)["warnings"] if "may not belong" in message]
    assert len(told) == 1
    assert "voxel by voxel" in told[0]
    assert told[0] in said.err


def test_batch_refuses_and_tells_in_the_row_and_on_the_terminal(
    pair, labels, tmp_path, network, capsys
):
    (tmp_path / "one").mkdir()
    status, row = batch(pair, moved(labels, 400), tmp_path / "one")
    assert status == 1
    assert row["status"] == "failed"
    assert "lie outside the scan" in row["error"]
    (tmp_path / "two").mkdir()
    status, row = batch(pair, moved(labels, 12), tmp_path / "two")
    assert status == 0
    told = next(message for message in row["warnings"] if "may not belong" in message)
    said = capsys.readouterr().out
    assert "warnings    1 of 1 pairs" in said
    assert f"            a: {told}" in said


def test_the_baselines_do_the_same(pair, labels, tmp_path):
    listed = tmp_path / "pairs.csv"
    lines = [f"{mm},{pair[0]},{pair[1]},{moved(labels, mm)}" for mm in (400, 12)]
    listed.write_text("\n".join(["id,moving,fixed,moving_labels", *lines]) + "\n")
    line = ["batch", str(listed), "-o", str(tmp_path / "out"), "--method", "affine"]
    assert main([*line, "--affine", "none"]) == 1
    rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    by_id = {row["id"]: row for row in rows}
    assert "lie outside the scan" in by_id["400"]["error"]
    assert any("may not belong" in message for message in by_id["12"]["warnings"])


def test_the_registrar_refuses_arrays_too(pair, labels):
    moving = nib.load(pair[0])
    data = np.asarray(nib.load(labels).dataobj)
    registrar = Registrar(FakeNetwork(), affine="none")
    array = np.asarray(moving.dataobj)
    far = moving.affine.copy()
    far[1, 3] += 300
    with pytest.raises(GeometryError, match="of the labelled voxels of labels lie outside"):
        registrar((array, moving.affine), str(pair[1]), labels=(data, far))
    result = registrar((array, moving.affine), str(pair[1]), labels=(data, moving.affine))
    assert np.asarray(result.moved_labels.dataobj).any()


def test_prepare_refuses_and_tells(pair, labels, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, mm in (("far", 400), ("near", 12), ("right", 0)):
        (scans / f"{name}.nii.gz").write_bytes(pair[0].read_bytes())
        (scans / f"{name}_labels.nii.gz").write_bytes(moved(labels, mm).read_bytes())
    empty = nib.load(labels)
    (scans / "empty.nii.gz").write_bytes(pair[0].read_bytes())
    nothing = nib.Nifti1Image(np.zeros(empty.shape, np.uint8), empty.affine)
    nib.save(nothing, scans / "empty_labels.nii.gz")
    command = ["prepare", str(scans), "-o", str(tmp_path / "out"), "--template", str(pair[1])]
    command += ["--shape", "64", "80", "64", "--affine", "none"]
    for workers in ("1", "2"):
        assert main([*command, "--workers", workers, "--overwrite"]) == 1
        said = capsys.readouterr().err
        assert "2 of 4 scans failed: empty, far" in said
        entries = json.loads((tmp_path / "out" / "prepared.json").read_text())
        assert "lie outside the scan" in entries["failed"]["far"]
        assert "has no label on the prepared grid" in entries["failed"]["empty"]
        assert any("may not belong" in text for text in entries["scans"]["near"]["warnings"])
        assert not entries["scans"]["right"]["warnings"]
        assert "may not belong" in said
        assert not (tmp_path / "out" / "far_labels.nii.gz").exists()


def test_evaluate_refuses_and_tells(pair, labels, tmp_path, capsys):
    fixed = nib.load(pair[1])
    data = np.digitize(np.asarray(fixed.dataobj), [1, 60, 90, 120, 150]).astype(np.uint8)
    nib.save(nib.Nifti1Image(data, fixed.affine), tmp_path / "fixed_labels.nii.gz")
    listed = tmp_path / "pairs.csv"
    lines = [
        f"{mm},{pair[0]},{pair[1]},{moved(labels, mm)},fixed_labels.nii.gz" for mm in (400, 12, 0)
    ]
    header = "id,moving,fixed,moving_labels,fixed_labels"
    listed.write_text("\n".join([header, *lines]) + "\n")
    assert main(["evaluate", str(listed), "-o", str(tmp_path / "report"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [failure["id"] for failure in said["failures"]] == ["400"]
    assert "lie outside the scan" in said["failures"][0]["error"]
    told = [message for message in said["warnings"] if "may not belong" in message]
    assert len(told) == 1
    assert "by_12_" in told[0]


@pytest.mark.follows("compare the two headers, e.g. with nib-diff: a label map has the affine of")
@pytest.mark.parametrize("mm", [400, 12], ids=["refused", "told"])
def test_the_headers_show_where_a_map_lies(pair, labels, tmp_path, network, capsys, mm):
    away = moved(labels, mm)
    register(pair, away, tmp_path)
    assert "compare the two headers, e.g. with nib-diff" in capsys.readouterr().err
    (program,) = entry_points(group="console_scripts", name="nib-diff")
    # A process of its own: it silences nibabel's log for good.
    code = f"import sys; from {program.module} import {program.attr} as run; run(sys.argv[1:])"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code, str(pair[0]), str(away)], capture_output=True, text=True
    ).stdout
    assert any(line.startswith("srow_x") for line in shown.splitlines())
    # ... the affine of its scan:
    image = nib.load(away)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), nib.load(pair[0]).affine), away)
    assert register(pair, away, tmp_path, "--overwrite") == 0
    assert "nib-diff" not in capsys.readouterr().err
